"""Pairs: three forms of the same preference, and how pairs are split into train and test."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.config import PairsConfig
from tether.data.chat import encode_completion, encode_prompts
from tether.data.pairs import Pair, load_pairs, split_transcripts
from tether.data.split import share_prompts, split_pairs
from tether.errors import DataError

STOP = 1


def load(path, tokenizer, stop_id=STOP, context=None, **changes):
    return load_pairs(PairsConfig(path, **changes), tokenizer, stop_id=stop_id, context=context)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


# ---------------------------------------------------------------- forms


def test_prompt_and_both_completions_are_tokenized_apart_and_end_with_the_stop_token(write, tiny_tokenizer):
    path = write("a.jsonl", [{"prompt": "ab", "chosen": "c", "rejected": "", "group": 7}])
    (pair,) = load(path, tiny_tokenizer)
    assert tiny_tokenizer.decode(pair.prompt_ids) == "ab"
    assert tiny_tokenizer.decode(pair.chosen_ids) == "c<eos>"
    assert pair.rejected_ids == [STOP]  # an empty completion is legal
    assert (pair.row, pair.group) == (0, "7")


@pytest.mark.parametrize("form", [str, lambda text: [assistant(text)]], ids=["text", "chat"])
def test_only_an_answer_that_stopped_gets_its_stop_token(write, tiny_tokenizer, form):
    reasons = [("stop", "length"), ("length", "stop"), ("length", "length"), (None, None)]
    prompt = "q" if form is str else [user("q")]
    rows = [
        {"prompt": prompt, "chosen": form("ab"), "rejected": form("c"),
         "chosen_finish_reason": c, "rejected_finish_reason": r} for c, r in reasons
    ]  # fmt: skip
    found = [
        (tiny_tokenizer.decode(pair.chosen_ids), tiny_tokenizer.decode(pair.rejected_ids))
        for pair in load(write("a.jsonl", rows), tiny_tokenizer)
    ]
    assert found == [("ab<eos>", "c"), ("ab", "c<eos>"), ("ab", "c"), ("ab<eos>", "c<eos>")]


def test_a_finish_reason_that_is_neither_is_named(write, tiny_tokenizer):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "rejected_finish_reason": "eos"}]
    with pytest.raises(DataError, match=r"line 1, column 'rejected_finish_reason': is the text 'eos'.*stop or length"):
        load(write("a.jsonl", rows), tiny_tokenizer)


def test_a_probability_and_a_weight_are_read_and_a_pair_without_them_is_certain_and_counts_once(write, tiny_tokenizer):
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    path = write("a.jsonl", [row, row | {"probability": 0.5, "weight": 2}, row | {"probability": None}])
    assert [(p.probability, p.weight) for p in load(path, tiny_tokenizer)] == [(1, 1), (0.5, 2), (1, 1)]


@pytest.mark.parametrize(
    ("column", "value"),
    [("probability", 1.5), ("probability", "0.5"), ("probability", True), ("weight", 0), ("weight", float("inf"))],
)
def test_a_number_that_is_no_probability_or_weight_is_named(write, tiny_tokenizer, column, value):
    path = write("a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b", column: value}])
    with pytest.raises(DataError, match=f"line 1, column '{column}': is .* leave the column out"):
        load(path, tiny_tokenizer)


CHAT = {
    "explicit": {"prompt": [user("Hi")], "chosen": [assistant("Yo")], "rejected": [assistant("No")]},
    "whole conversations": {"chosen": [user("Hi"), assistant("Yo")], "rejected": [user("Hi"), assistant("No")]},
    "whole conversations beside a prompt": {
        "prompt": "Hi",
        "chosen": [user("Hi"), assistant("Yo")],
        "rejected": [user("Hi"), assistant("No")],
    },
    "prompt as text": {"prompt": "Hi", "chosen": [assistant("Yo")], "rejected": [assistant("No")]},
    "answers as text": {"prompt": [user("Hi")], "chosen": "Yo", "rejected": "No"},
}


@pytest.mark.parametrize("row", CHAT.values(), ids=CHAT)
def test_every_way_to_write_a_chat_pair_gives_the_ids_that_ppo_would_see(write, tiny_tokenizer, row):
    (pair,) = load(write("a.jsonl", [row]), tiny_tokenizer)
    assert pair.prompt_ids == encode_prompts(tiny_tokenizer, [[user("Hi")]])[0]
    assert pair.chosen_ids == [*encode_completion(tiny_tokenizer, "Yo"), STOP]
    assert pair.rejected_ids == [*encode_completion(tiny_tokenizer, "No"), STOP]


def test_whole_transcripts_are_split_after_the_last_assistant_that_they_share(write, tiny_tokenizer):
    shared = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why\n\nAssistant:"
    (pair,) = load(write("a.jsonl", [{"chosen": shared + " So", "rejected": shared + " No"}]), tiny_tokenizer)
    assert tiny_tokenizer.decode(pair.prompt_ids) == shared
    assert tiny_tokenizer.decode(pair.chosen_ids) == " So<eos>"
    assert tiny_tokenizer.decode(pair.rejected_ids) == " No<eos>"


@pytest.mark.parametrize(
    ("chosen", "rejected", "want"),
    [
        ("Human: a\n\nAssistant: b", "Human: a\n\nAssistant: c", ("Human: a\n\nAssistant:", " b", " c")),
        # an empty answer; the other may begin with anything
        ("x\n\nAssistant:", "x\n\nAssistant: c", ("x\n\nAssistant:", "", " c")),
        # answers that begin alike, even with the same words
        ("x\n\nAssistant: I am", "x\n\nAssistant: I was", ("x\n\nAssistant:", " I am", " I was")),
        # turns that only one of them goes on to have belong to its answer
        ("x\n\nAssistant: b\n\nHuman: y\n\nAssistant: z", "x\n\nAssistant: c",
         ("x\n\nAssistant:", " b\n\nHuman: y\n\nAssistant: z", " c")),
        # an Assistant: that they share only in part is not shared
        ("x\n\nAssistant: b\n\nAssistant: c", "x\n\nAssistant: b\n\nAssist", ("x\n\nAssistant:",
         " b\n\nAssistant: c", " b\n\nAssist")),
    ],
)  # fmt: skip
def test_where_transcripts_part(chosen, rejected, want):
    assert split_transcripts(chosen, rejected) == want


def test_rows_without_a_group_belong_to_none(write, tiny_tokenizer):
    rows = [{"prompt": p, "chosen": "c", "rejected": "d", "group": g} for p, g in (("a", None), ("b", None), ("c", 0))]
    assert [p.group for p in load(write("a.jsonl", rows), tiny_tokenizer)] == [None, None, "0"]


def test_drop_keeps_the_row_numbers_of_pairs(write, tiny_tokenizer):
    rows = [{"prompt": p, "chosen": "c", "rejected": "d"} for p in ("a", "a" * 20, "b")]
    pairs = load(write("a.jsonl", rows), tiny_tokenizer, max_tokens=10, overlong="drop")
    assert [p.row for p in pairs] == [0, 2]


def test_cut_left_cuts_the_shared_prompt_by_the_longer_answer(write, tiny_tokenizer, capsys):
    rows = [
        {"prompt": "abcd", "chosen": "xy", "rejected": "z"},
        {"prompt": "a", "chosen": "tuvwxyz", "rejected": "q"},
    ]
    pairs = load(write("a.jsonl", rows), tiny_tokenizer, max_tokens=5, overlong="cut_left")
    decoded = [[tiny_tokenizer.decode(ids) for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs]
    assert decoded == [["cd", "xy<eos>", "z<eos>"], ["a", "xyz<eos>", "q<eos>"]]
    assert "1 of them lost some of what is to be learned" in capsys.readouterr().err


def test_pairs_that_the_cut_makes_alike_are_dropped_and_counted(write, tiny_tokenizer, capsys):
    alike = {"prompt": "a", "chosen": "1 the same end", "rejected": "2 the same end"}
    rows = [alike, {"prompt": "a", "chosen": "x", "rejected": "y"}]
    (pair,) = load(write("a.jsonl", rows), tiny_tokenizer, max_tokens=8, overlong="cut_left")
    assert pair.row == 1
    assert "1 of them hold the same answer twice once cut to 8 tokens: dropped" in capsys.readouterr().err
    with pytest.raises(DataError, match="no pair is left"):
        load(write("b.jsonl", [alike]), tiny_tokenizer, max_tokens=8, overlong="cut_left")


def test_pairs_that_only_a_poor_tokenizer_confuses_are_named(write, spaced_tokenizer):
    # its alphabet has bytes for anything, so take them away by a normalizer that forgets: every digit is an x
    from tokenizers import normalizers

    blind = type(spaced_tokenizer)(
        tokenizer_object=type(spaced_tokenizer.backend_tokenizer).from_str(spaced_tokenizer.backend_tokenizer.to_str()),
        eos_token="</s>",
        bos_token="<s>",
    )
    blind.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match=r"line 1, column 'rejected': has the same tokens as chosen"):
        load(write("a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "B"}]), blind, stop_id=2)


def test_prompts_that_differ_only_in_what_was_cut_keep_different_keys(write, tiny_tokenizer):
    rows = [{"prompt": first + "bcd", "chosen": "x", "rejected": "y"} for first in "aaz"]
    same, again, other = load(write("a.jsonl", rows), tiny_tokenizer, max_tokens=4, overlong="cut_left")
    assert same.prompt_ids == other.prompt_ids
    assert same.prompt_key == again.prompt_key != other.prompt_key


def test_a_prompt_is_the_same_in_whatever_order_its_keys_are_written(write, tiny_tokenizer):
    rows = [
        {"prompt": [message], "chosen": "x", "rejected": "y"}
        for message in ({"role": "user", "content": "Hi"}, {"content": "Hi", "role": "user"})
    ]
    first, second = load(write("a.jsonl", rows), tiny_tokenizer)
    assert first.prompt_key == second.prompt_key


# ---------------------------------------------------------------- split


def pairs_of(links):
    """One pair for each (prompt, group)."""
    return [Pair([2], [3], [4], row=i, prompt_key=str(p), group=g) for i, (p, g) in enumerate(links)]


links = st.lists(
    st.tuples(st.integers(0, 12), st.none() | st.integers(0, 12).map(str)), min_size=2, max_size=40
)  # fmt: skip


def reachable(links):
    """For each pair, all that hang together with it: by breadth-first search, pair by pair."""
    found = []
    for start in range(len(links)):
        seen, queue = {start}, [start]
        for i in queue:
            for j, (prompt, group) in enumerate(links):
                near = prompt == links[i][0] or (group is not None and group == links[i][1])
                if near and j not in seen:
                    seen.add(j)
                    queue.append(j)
        found.append(frozenset(seen))
    return found


@settings(deadline=None, max_examples=150)
@given(links=links, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 5))
def test_a_split_never_separates_what_hangs_together(links, fraction, seed):
    components = reachable(links)
    if len(set(components)) == 1:
        with pytest.raises(DataError, match=r"hang together by (prompt|answer) or group"):
            split_pairs(pairs_of(links), fraction, seed)
        return
    train, test = split_pairs(pairs_of(links), fraction, seed)
    assert train
    assert test
    assert sorted(p.row for p in train + test) == list(range(len(links)))  # each pair once
    held_out = {p.row for p in test}
    for component in components:
        assert component <= held_out or not component & held_out


@settings(deadline=None, max_examples=50)
@given(count=st.integers(10, 200), fraction=st.floats(0.05, 0.95), seed=st.integers(0, 5))
def test_with_pairs_of_their_own_the_test_side_is_the_fraction_asked_for(count, fraction, seed):
    _, test = split_pairs(pairs_of([(i, None) for i in range(count)]), fraction, seed)
    assert abs(len(test) - fraction * count) <= 1


def test_a_split_is_the_same_for_the_same_seed_and_differs_between_seeds():
    pairs = pairs_of([(i, None) for i in range(50)])
    tests = [[p.row for p in split_pairs(pairs, 0.2, seed)[1]] for seed in (0, 0, 1)]
    assert tests[0] == tests[1] != tests[2]


def test_a_split_takes_its_components_from_all_over_the_file():
    counts = Counter(
        p.row // 25 for seed in range(40) for p in split_pairs(pairs_of([(i, None) for i in range(100)]), 0.2, seed)[1]
    )
    assert all(150 < counts[quarter] < 250 for quarter in range(4))  # 200 each, ± 4 standard deviations


def one_prompt(answers, group=None):
    """Pairs of one prompt whose answers are these numbers: [(chosen, rejected), …]."""
    return [Pair([3], [c], [r], i, "same", group) for i, (c, r) in enumerate(answers)]


def test_pairs_of_one_prompt_are_held_out_by_their_answers():
    answers = [(1, 2), (2, 3), (4, 5), (6, 7), (8, 6), (9, 10), (11, 12), (13, 14)]
    train, test = split_pairs(one_prompt(answers), 0.25, seed=0)
    assert len(test) == 2
    assert len(train) == 6
    on_either_side = [{ids[0] for p in side for ids in (p.chosen_ids, p.rejected_ids)} for side in (train, test)]
    assert on_either_side[0].isdisjoint(on_either_side[1])
    assert share_prompts(train, test)
    assert not share_prompts(*split_pairs(pairs_of([(i, None) for i in range(9)]), 0.25, seed=0))


@pytest.mark.parametrize(
    "pairs",
    [one_prompt([(1, 2), (2, 3), (3, 1)]), one_prompt([(1, 2), (3, 4)], group="g"), pairs_of([(0, "g"), (1, "g")])],
    ids=["answers", "one group", "prompts"],
)
def test_pairs_that_all_hang_together_can_be_trained_on_without_holding_any_out(pairs):
    with pytest.raises(DataError, match=r"all \d pairs hang together by .* or group.*test_fraction to 0"):
        split_pairs(pairs, 0.25, seed=0)
    assert split_pairs(pairs, 0, seed=0) == (pairs, [])


def test_large_components_still_leave_something_on_either_side():
    links = [(0, None)] * 9 + [(1, None)] * 11
    random.Random(0).shuffle(links)
    train, test = split_pairs(pairs_of(links), 0.1, seed=0)
    assert (len(train), len(test)) == (11, 9)
