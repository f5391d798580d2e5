"""Examples: which ids are imitated, and exactly which of them are trained."""

import copy
import json
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.config import DataConfig
from tether.data.chat import _Splitter, encode_completion, encode_conversations, encode_prompts
from tether.data.examples import Example, load_examples
from tether.errors import DataError, ModelError

STOP = 1


def load(path, tokenizer, stop_id=STOP, train_on="completion", context=None, **changes):
    return load_examples(DataConfig(path, **changes), tokenizer, stop_id=stop_id, train_on=train_on, context=context)


def shown(tokenizer, example):
    """The text with what is trained in brackets."""
    out, inside = "", False
    for token, trained in zip(example.ids, example.trained, strict=True):
        out += "[" * (trained and not inside) + "]" * (inside and not trained) + tokenizer.decode([token])
        inside = trained
    return out + "]" * inside


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def with_template(tokenizer, template):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


# ---------------------------------------------------------------- text


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(st.text(min_size=1, max_size=8), st.text(max_size=8)), min_size=1, max_size=5))
def test_a_mask_covers_exactly_the_completion_and_the_stop_token(any_tokenizer, rows):
    stop = any_tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.jsonl"
        path.write_text("\n".join(json.dumps({"prompt": p, "completion": c}) for p, c in rows))
        examples = load(str(path), any_tokenizer, stop_id=stop)
    for (prompt, completion), example in zip(rows, examples, strict=True):
        # tokenized apart, each by the tokenizer itself
        before = any_tokenizer(prompt)["input_ids"]
        after = any_tokenizer(completion, add_special_tokens=False)["input_ids"]
        assert example.ids == [*before, *after, stop]
        assert example.trained == [False] * len(before) + [True] * (len(after) + 1)


def test_prompt_and_completion_are_tokenized_apart(write, spaced_tokenizer):
    # "t" + "he" would be one token if they were tokenized together
    (example,) = load(write("a.jsonl", [{"prompt": "t", "completion": "he"}]), spaced_tokenizer, stop_id=2)
    assert spaced_tokenizer.convert_ids_to_tokens(example.ids) == ["<s>", "▁t", "▁", "he", "</s>"]


def test_train_on_all_trains_everything_but_the_first_token_which_nothing_predicts(write, tiny_tokenizer):
    path = write("a.jsonl", [{"prompt": "ab", "completion": "c"}])
    assert load(path, tiny_tokenizer, train_on="all")[0].trained == [False, True, True, True]
    assert load(path, tiny_tokenizer)[0].trained == [False, False, True, True]


def test_a_whole_text_is_trained_from_its_second_token_on(write, tiny_tokenizer, spaced_tokenizer):
    path = write("a.jsonl", [{"text": "the", "label": 1}])
    assert shown(tiny_tokenizer, load(path, tiny_tokenizer)[0]) == "t[he<eos>]"
    assert (
        shown(spaced_tokenizer, load(path, spaced_tokenizer, stop_id=2)[0]) == "<s>[the</s>]"
    )  # bos predicts the first


def test_a_stop_token_that_stands_there_already_is_not_doubled(write, tiny_tokenizer):
    rows = [{"prompt": "a", "completion": "b<eos>"}]
    assert shown(tiny_tokenizer, load(write("a.jsonl", rows), tiny_tokenizer)[0]) == "a[b<eos>]"
    assert shown(tiny_tokenizer, load(write("b.jsonl", rows), tiny_tokenizer, stop_id=None)[0]) == "a[b<eos>]"


def test_without_a_stop_token_none_is_appended(write, tiny_tokenizer):
    path = write("a.jsonl", [{"prompt": "a", "completion": "b"}])
    assert shown(tiny_tokenizer, load(path, tiny_tokenizer, stop_id=None)[0]) == "a[b]"


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q", "completion": "ab"}, {"text": "qab"}, {"messages": chat(("user", "q"), ("assistant", "ab"))}],
    ids=lambda row: next(reversed(row)),
)
def test_only_an_example_that_stopped_teaches_to_stop(write, tiny_tokenizer, row):
    rows = [row | {"finish_reason": reason} for reason in ("stop", "length", None)]
    stopped, cut, unsaid = load(write("a.jsonl", rows), tiny_tokenizer)
    assert stopped.ids == unsaid.ids == [*cut.ids, STOP]
    assert stopped.trained == unsaid.trained == [*cut.trained, True]
    assert shown(tiny_tokenizer, cut).endswith("ab]")


def test_an_empty_completion_teaches_to_stop(write, tiny_tokenizer):
    assert load(write("a.jsonl", [{"prompt": "a", "completion": ""}]), tiny_tokenizer) == [
        Example(ids=[tiny_tokenizer.convert_tokens_to_ids("a"), STOP], trained=[False, True], row=0)
    ]


def test_a_text_of_one_token_without_bos_holds_nothing_to_learn(write, tiny_tokenizer):
    with pytest.raises(DataError, match=r"line 2, column 'text': holds nothing to learn"):
        load(write("a.jsonl", [{"text": "ab"}, {"text": ""}]), tiny_tokenizer)


def test_cut_left_cuts_the_prompt_and_keeps_the_mask_in_place(write, tiny_tokenizer, capsys):
    path = write("a.jsonl", [{"prompt": "abcd", "completion": "xy"}, {"prompt": "a", "completion": "uvwxyz"}])
    cut = load(path, tiny_tokenizer, max_tokens=5, overlong="cut_left")
    assert [shown(tiny_tokenizer, e) for e in cut] == ["cd[xy<eos>]", "w[xyz<eos>]"]
    said = capsys.readouterr().err
    assert "2 of 2 rows are longer than 5 tokens (data.max_tokens=5): cut on the left" in said
    assert "1 of them lost some of what is to be learned" in said


def test_cut_left_keeps_bos_in_front_of_an_example(write, spaced_tokenizer):
    path = write("a.jsonl", [{"prompt": "xyz", "completion": "a"}])
    (example,) = load(path, spaced_tokenizer, stop_id=2, max_tokens=4, overlong="cut_left")
    assert shown(spaced_tokenizer, example) == "<s>z[a</s>]"


def test_drop_and_error_count_prompt_and_completion_together(write, tiny_tokenizer, capsys):
    path = write("a.jsonl", [{"prompt": "abcd", "completion": "xy"}, {"prompt": "a", "completion": "b"}])
    assert [e.row for e in load(path, tiny_tokenizer, max_tokens=6, overlong="drop")] == [1]
    assert "1 of 2 rows are longer than 6 tokens" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"line 1, column 'completion': has 7 tokens, prompt included"):
        load(path, tiny_tokenizer, max_tokens=6)
    with pytest.raises(DataError, match=r"\(the model's context of 6\)"):
        load(path, tiny_tokenizer, max_tokens=512, context=6)


# ---------------------------------------------------------------- chat

TURNS = chat(("user", "Hi"), ("assistant", "Yo"), ("user", "Why"), ("assistant", "So"))


@pytest.mark.parametrize(
    ("template", "want"),
    [
        # nothing marked: what each turn adds to the prompt before it. The end of a turn is the tokenizer's eos …
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>Hi<assistant>[Yo<eos>]<user>Why<assistant>[So<eos>]",
        ),
        # … which may be followed by more that the model never has to write …
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}<eos>;{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>Hi<assistant>[Yo<eos>];<user>Why<assistant>[So<eos>]",
        ),
        # … or be missing: the last turn gets one, an earlier one has no place for it
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>Hi<assistant>[Yo]<user>Why<assistant>[So<eos>]",
        ),
        # marked, with the stop token inside or outside of the mark
        (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
            "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "<user>Hi<assistant>[Yo<eos>]<user>Why<assistant>[So<eos>]",
        ),
        (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
            "{%- generation -%}{{ m.content }}{%- endgeneration -%}<eos>"
            "{% else %}{{ m.content }}{% endif %}{% endfor %}",
            "<user>Hi<assistant>[Yo<eos>]<user>Why<assistant>[So<eos>]",
        ),
        # a mark may leave out what the difference would take in
        (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}think "
            "{% generation %}{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            "<user>Hi<assistant>think [Yo<eos>]<user>Why<assistant>think [So<eos>]",
        ),
    ],
)
def test_in_a_conversation_the_assistants_turns_are_trained(write, tiny_tokenizer, template, want):
    tokenizer = with_template(tiny_tokenizer, template)
    (example,) = load(write("a.jsonl", [{"messages": TURNS}]), tokenizer)
    assert shown(tokenizer, example) == want


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(st.text(max_size=6).filter(lambda text: "<eos>" not in text), min_size=2, max_size=6),
)
def test_a_conversations_mask_covers_exactly_what_the_assistant_wrote(tiny_tokenizer, contents):
    turns = chat(*((("user", "assistant")[i % 2], content) for i, content in enumerate(contents)))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "a.jsonl"
        path.write_text(json.dumps({"messages": turns}))
        (example,) = load(str(path), tiny_tokenizer)
    trained = [token for token, counts in zip(example.ids, example.trained, strict=True) if counts]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert trained == [token for answer in answers for token in (*tiny_tokenizer(answer)["input_ids"], STOP)]
    assert not example.trained[0]
    assert example.trained[-1]


HEADER = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
TEMPLATES = {
    "chatml": HEADER + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama 3": "<|im_start|>{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}",
    "llama 2": "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>[q] {{ m.content }} [/q]{% else %}"
    " {{ m.content }} <|im_end|>{% endif %}{% endfor %}",
    "no special tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "nothing between": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "no end": HEADER + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "marked": "{% for m in messages %}<|im_start|>{{ m.role }} {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@settings(deadline=None, max_examples=12)
@given(turns=st.lists(st.text("ab the\n<>é東", max_size=7), min_size=2, max_size=6))
def test_conversations_tokenized_once_have_the_ids_of_pieces_tokenized_one_by_one(any_tokenizer, template, turns):
    tokenizer = with_template(any_tokenizer, template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|h|>", "<|/h|>"]})
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = chat(*((("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)))

    def encode():
        return encode_conversations(tokenizer, [messages] * 2, lambda i: nullcontext(), stop_id=stop)

    once = encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Splitter, "_counts", lambda *_: None)
        assert once == encode()


def test_a_conversation_is_tokenized_once_however_many_turns_it_has(tiny_tokenizer, monkeypatch):
    tokenizer = with_template(tiny_tokenizer, TEMPLATES["chatml"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    seen = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts, **k: (seen.extend(texts), call(self, texts, **k))[1]
    )
    turns = chat(*((("user", "assistant")[i % 2], "x" * 50) for i in range(40)))
    encode_conversations(tokenizer, [turns] * 3, lambda i: nullcontext(), stop_id=STOP)
    whole = 3 * len(tokenizer.apply_chat_template(turns, tokenize=False))
    assert sum(map(len, seen)) < 1.1 * whole


def test_train_on_all_trains_a_whole_conversation_up_to_the_last_answer(write, tiny_tokenizer):
    path = write("a.jsonl", [{"messages": [*TURNS[:2], {"role": "user", "content": "Bye"}]}])
    (example,) = load(path, tiny_tokenizer, train_on="all")
    assert shown(tiny_tokenizer, example) == "<[user>Hi<assistant>Yo<eos>]"


def test_a_prompt_of_messages_is_followed_by_what_the_answer_adds_to_it(write, tiny_tokenizer):
    rows = [
        {"prompt": TURNS[:3], "completion": TURNS[3:]},
        {"prompt": TURNS[:3], "completion": "So"},  # the bare text of the answer
    ]
    examples = load(write("a.jsonl", rows), tiny_tokenizer)
    for example in examples:
        assert shown(tiny_tokenizer, example) == "<user>Hi<assistant>Yo<eos><user>Why<assistant>[So<eos>]"
        prompt = encode_prompts(tiny_tokenizer, [TURNS[:3]])[0]
        assert example.ids == [*prompt, *encode_completion(tiny_tokenizer, "So"), STOP]


def test_a_token_that_would_straddle_the_border_of_prompt_and_answer_is_split(write, spaced_tokenizer):
    # rendered whole it would read "a t" + "he" = ["▁a", "▁the"]; PPO samples after ["▁a", "▁t"]
    tokenizer = with_template(
        spaced_tokenizer,
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %} t{% endif %}",
    )
    turns = chat(("user", "a"), ("assistant", " the"))
    (example,) = load(write("a.jsonl", [{"messages": turns}]), tokenizer, stop_id=2)
    assert tokenizer.convert_ids_to_tokens(example.ids) == ["▁a", "▁t", "▁", "he", "</s>"]
    assert example.trained == [False, False, True, True, True]


def test_inside_a_rendering_no_space_is_put_before_an_answer(write, spaced_tokenizer):
    tokenizer = with_template(
        spaced_tokenizer,
        "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}.{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}",
    )
    (example,) = load(write("a.jsonl", [{"messages": chat(("user", "x"), ("assistant", "the"))}]), tokenizer, stop_id=2)
    answer = [token for token, counts in zip(example.ids, example.trained, strict=True) if counts]
    assert tokenizer.convert_ids_to_tokens(answer) == ["▁the", ".", "</s>"]  # not "▁", "▁the"


def test_a_template_that_rewrites_earlier_turns_is_refused_for_conversations_and_fine_for_single_answers(
    write, tiny_tokenizer
):
    # as templates do that drop the reasoning of every turn but the last
    tokenizer = with_template(
        tiny_tokenizer,
        "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '…' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    with pytest.raises(DataError, match=r"line 1, column 'messages': the chat template renders message 1 differently"):
        load(write("a.jsonl", [{"messages": TURNS}]), tokenizer)
    (example,) = load(write("b.jsonl", [{"prompt": TURNS[:3], "completion": "So"}]), tokenizer)
    assert shown(tokenizer, example).endswith("<assistant>[So<eos>]")


def test_messages_without_a_chat_template_say_what_to_do(write, spaced_tokenizer):
    with pytest.raises(ModelError, match=r"has no chat template.*Write plain text instead"):
        load(write("a.jsonl", [{"messages": TURNS}]), spaced_tokenizer)
