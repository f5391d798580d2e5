"""A judge as a source of scores: ratings worked by hand, groups against the truth of every pair, and what has none."""

import json
import math
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripted_judge import scripted_judge
from scripted_rater import ScriptedRater
from served_rewards import listening
from tether.config import RewardShapingConfig, RewardSourceConfig
from tether.errors import ConfigError, DataError, ModelError, RewardError
from tether.feedback.local_judge import symbol_tokens
from tether.feedback.rating import DIGITS, Rating
from tether.rewards import RewardSet, build_reward, judge_reward
from tether.rewards.judge import judge_hash
from tether.types import Completions, Prompt

STOP = 1  # <eos> of the tiny tokenizer
PRINCIPLE = "Choose what is worth more."


def judge_file(tmp_path, name="judge.yaml", **keys):
    """A file as for `tether judge`, with the section `judge` of `keys`, and what it has of `limits` beside it."""
    (tmp_path / "rules.txt").write_text(PRINCIPLE)
    limits = keys.pop("limits", {})
    section = {"constitution": str(tmp_path / "rules.txt"), **keys}
    tree = {"judge": section, "data": {"path": "preferences.db"}, "to": "x.db", "limits": limits, "device": "cpu"}
    (tmp_path / name).write_text(json.dumps(tree))
    return str(tmp_path / name)


def completions_of(tokenizer, answers, cut=False):
    """Answers by prompt, in order."""
    rows = [
        (Prompt((5,), prompt, row, cut=cut), [*tokenizer(text, add_special_tokens=False)["input_ids"], STOP])
        for row, (prompt, texts) in enumerate(answers)
        for text in texts
    ]
    unused = [[] for _ in rows]
    return Completions([p for p, _ in rows], [ids for _, ids in rows], unused, unused, ["stop"] * len(rows))


def source_of(file, tokenizer, tmp_path, **keys):
    return judge_reward(RewardSourceConfig(judge=file, **keys), tokenizer, (STOP,), tmp_path / "rewards.db")


# ---------------------------------------------------------------- ratings


def test_a_rating_is_the_mean_of_what_may_come_next_worked_by_hand():
    rating = Rating(0, "p", "a", "b")
    # on digits .75: a third on level 1, two thirds on level 10
    spread = {"0": 0.25, "9": 0.25, " 9": 0.25, "10": 0.25}
    assert rating.read_logprobs({token: math.log(p) for token, p in spread.items()}) == pytest.approx(1 / 3 + 20 / 3)
    assert rating.read_logprobs({"7": math.log(0.49), "I": math.log(0.51)}) is None
    assert rating.read_logprobs({"7": math.nan}) is None
    assert rating.read_votes([2.0, 3.0, 10.0]) == (5.0, {"votes": 3})


@pytest.mark.parametrize(
    ("form", "text", "level"),
    [
        ("text", "RATING: 2, no.\n**RATING:** 7.", 8), ("text", "rating: 0/9", 1),
        ("text", "Rating = 9 out of 9", 10),
        ("text", "RATING: 10", None), ("text", "RATING: 7/10", None), ("text", "RATING: 7.5", None),
        ("text", "It is 7", None), ("text", "RATING: -3", None),
        ("json", '{"reasoning": "so", "rating": 7}', 8), ("json", '```json\n{"rating": "7"}\n```', 8),
        ("json", '{"rating": 12}', None), ("json", '{"rating": true}', None),
        ("json", "[7]", None), ("json", "{", None),
    ],
)  # fmt: skip
def test_a_digit_is_read_or_nothing(form, text, level):
    assert Rating(0, "p", "a", "b").read_reply(text, form) == level


@pytest.mark.parametrize("name", ["stories260K", "imdb-6M"])
def test_the_tokens_of_the_digits_are_all_of_a_real_vocabulary_that_write_one(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    written = {i: tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))}
    # the start of a word is ▁ or Ġ; <0x35> is a byte of something else, for 5 has a token
    wanted = {i for i, token in written.items() if token.strip("▁Ġ") in list(DIGITS)}
    found = symbol_tokens(tokenizer, DIGITS)
    assert set(found.values()) == wanted
    assert {text.strip() for text in found} == set(DIGITS)
    assert all(written[i].strip("▁Ġ") == text.strip() for text, i in found.items())


def speaking_model(tiny_model, tokenizer, symbols, **changes):
    """A random GPT-2 that nearly always says one of `symbols`: its last norm has a bias, and they read it."""
    path = tiny_model("gpt2", n_positions=1024, tie_word_embeddings=False, **changes)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.transformer.ln_f.bias.copy_(torch.ones(32))
        model.lm_head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(5))
        model.lm_head.weight[[tokenizer.convert_tokens_to_ids(s) for s in symbols]] += 12 / 32
    model.save_pretrained(path)
    return path


def test_a_local_judge_rates_by_its_digits(tiny_model, tiny_tokenizer, tmp_path):
    path = speaking_model(tiny_model, tiny_tokenizer, DIGITS, seed=3)
    source = source_of(judge_file(tmp_path, model=str(path)), tiny_tokenizer, tmp_path)
    answers = [("Why?", ["so", "because it is", "so"]), ("Say 5", ["5"])]
    scores = source.score(completions_of(tiny_tokenizer, answers))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    wanted = []
    for prompt, texts in answers:
        for text in texts:
            messages = Rating(0, prompt, text, PRINCIPLE).question((0,), "logprobs")
            assert PRINCIPLE in messages[-1]["content"]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            with torch.no_grad():
                p = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            digits = torch.tensor([p[tokenizer.convert_tokens_to_ids(d)] for d in DIGITS])
            assert digits.sum() > 0.5
            wanted.append(float((digits / digits.sum() * torch.arange(1, 11)).sum()))
    assert scores == pytest.approx(wanted, abs=1e-4)
    assert len(set(scores)) == 3
    assert not source.remote
    assert not list(tmp_path.glob("*.db"))


def test_votes_are_averaged_and_the_same_answer_is_asked_about_once(tiny_tokenizer, tmp_path):
    rater = ScriptedRater()
    with listening(rater) as url:
        file = judge_file(tmp_path, model="m", base_url=f"{url}/v1", answer="text", votes=3)
        source = source_of(file, tiny_tokenizer, tmp_path)
        batch = completions_of(tiny_tokenizer, [("Why?", ["so", "no", "so"]), ("When?", ["so"])])
        scores = source.score(batch)
        assert source.remote
        assert source.score(batch) == scores
    assert len(rater.asked) == 9  # three questions, three votes each
    assert scores[0] == scores[2]
    assert set(rater.answered.values()) == {3}
    levels = {key: [Random(f"{key} {n}").randrange(10) + 1 for n in (1, 2, 3)] for key in rater.answered}
    by_answer = {key: sum(found) / 3 for key, found in levels.items()}
    assert sorted(set(scores)) == pytest.approx(sorted(set(by_answer.values())))


# ---------------------------------------------------------------- pairs


def test_scores_of_a_group_are_the_worth_of_its_answers_less_their_mean(tiny_tokenizer, tmp_path):
    worth = {"Why?": [0.5, -1.0, 0.25, 0.5], "When?": [1.0, 0.0]}
    with scripted_judge() as server:  # which likes what is shown first, by two logits
        file = judge_file(tmp_path, model="m", base_url=server.url)
        source = source_of(file, tiny_tokenizer, tmp_path, form="pairwise")
        texts = [(prompt, [f"worth {w}" for w in found]) for prompt, found in worth.items()]
        scores = source.score(completions_of(tiny_tokenizer, texts))
        assert len(server.asked) == 2 * (3 + 1)  # both orders of three pairs and of one; of equal answers none
        shown = Counter(tuple(body["messages"][-1]["content"].split("[Answer A]")[1:]) for body in server.asked)
        assert set(shown.values()) == {1}
    wanted = [w - sum(found) / len(found) for found in worth.values() for w in found]
    assert scores == pytest.approx(wanted, abs=1e-6)


def test_a_group_of_one_is_refused(tiny_tokenizer, tmp_path):
    file = judge_file(tmp_path, model="m", base_url="http://127.0.0.1:9/v1")
    source = source_of(file, tiny_tokenizer, tmp_path, form="pairwise")
    with pytest.raises(RewardError, match=r"row 2 \(row 1 of the data, 'b'\) has only one"):
        source.score(completions_of(tiny_tokenizer, [("a", ["x", "y"]), ("b", ["z"])]))


# ---------------------------------------------------------------- what has no score


def test_an_answer_that_cannot_be_read_is_no_score(tiny_tokenizer, tmp_path):
    batch = completions_of(tiny_tokenizer, [("Why?", ["so", "no"])])
    with listening(ScriptedRater(reply="I like it.")) as url:
        file = judge_file(tmp_path, model="m", base_url=f"{url}/v1", answer="text")
        with pytest.raises(
            RewardError, match=r"row 0 .*no verdict in the answer, as in 'I like it\.'\), and about 1 more"
        ):
            source_of(file, tiny_tokenizer, tmp_path).score(batch)
        assert source_of(file, tiny_tokenizer, tmp_path, optional=True).score(batch) == [None, None]


def test_a_pair_that_cannot_be_read_takes_the_scores_of_both_and_of_no_other(tiny_tokenizer, tmp_path):
    with scripted_judge() as server:

        def refuses_one_pair(n):
            asked = server.asked[n]["messages"][-1]["content"]
            return "refuse" if "worth 9" in asked and "worth 8" in asked else None

        server.fault = refuses_one_pair
        file = judge_file(tmp_path, model="m", base_url=server.url, answer="text")
        source = source_of(file, tiny_tokenizer, tmp_path, form="pairwise", optional=True)
        scores = source.score(completions_of(tiny_tokenizer, [("Why?", ["worth 9", "worth 8", "worth 1"])]))
    assert scores[:2] == [None, None]
    assert scores[2] is not None
    assert scores[2] < 0


def test_a_limit_and_an_endpoint_that_is_gone_end_the_run_whatever_is_optional_and_nothing_is_lost(
    tiny_tokenizer, tmp_path
):
    batch = completions_of(tiny_tokenizer, [("Why?", ["a", "b", "c", "d"])])
    rater = ScriptedRater(status=lambda n: 503 if n == 3 else 200)
    with listening(rater) as url:
        keys = {"model": "m", "base_url": f"{url}/v1", "answer": "text"}
        limited = judge_file(tmp_path, **keys, limits={"requests": 2})
        with pytest.raises(RewardError, match=r"2 requests .* 2 of 4 questions .* were not asked: a limit is reached"):
            source_of(limited, tiny_tokenizer, tmp_path, optional=True).score(batch)
        assert len(rater.asked) == 2
        gone = judge_file(tmp_path, **keys, limits={"retries": 0, "concurrency": 1})
        with pytest.raises(RewardError, match=r"did not answer 1 of 4 questions .*raise limits.retries"):
            source_of(gone, tiny_tokenizer, tmp_path, optional=True).score(batch)
        assert len(rater.asked) == 4
        assert None not in source_of(gone, tiny_tokenizer, tmp_path).score(batch)
    assert set(rater.answered.values()) == {1}


def test_a_local_judge_without_digits_or_room_says_so(tiny_model, tiny_tokenizer, tmp_path):
    batch = completions_of(tiny_tokenizer, [("Why?", ["so"])])
    mute = judge_file(tmp_path, model=str(tiny_model("gpt2", n_positions=1024)))
    with pytest.raises(RewardError, match=r"no digit likely"):
        source_of(mute, tiny_tokenizer, tmp_path).score(batch)
    short = judge_file(tmp_path, model=str(tiny_model("gpt2", n_positions=64)))
    with pytest.raises(RewardError, match=r"longer than the model's 64 tokens"):
        source_of(short, tiny_tokenizer, tmp_path).score(batch)


def test_a_prompt_that_was_cut_is_refused(tiny_tokenizer, tmp_path):
    file = judge_file(tmp_path, model="m", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(RewardError, match=r"row 0 .* was cut"):
        source_of(file, tiny_tokenizer, tmp_path).check(
            completions_of(tiny_tokenizer, [("a", ["x"])], cut=True).prompts
        )


# ---------------------------------------------------------------- files


def test_a_file_that_is_no_judge_is_named(tiny_tokenizer, tmp_path, monkeypatch):
    def build(text):
        (tmp_path / "j.yaml").write_text(text)
        return source_of(str(tmp_path / "j.yaml"), tiny_tokenizer, tmp_path)

    with pytest.raises(ConfigError, match=r"nowhere.yaml does not exist"):
        source_of(str(tmp_path / "nowhere.yaml"), tiny_tokenizer, tmp_path)
    with pytest.raises(ConfigError, match=r"j.yaml: judge.model is missing"):
        build("judge: {}")
    with pytest.raises(
        ConfigError, match=r"j.yaml: unknown key judge.modle for tether judge: did you mean judge.model"
    ):
        build("judge: {modle: x}")
    with pytest.raises(DataError, match=r"j.yaml: judge.constitution=nope.txt cannot be read"):
        build("judge: {model: m, base_url: 'http://127.0.0.1:9/v1', constitution: nope.txt}")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"j.yaml: judge.key_env=NO_SUCH_KEY: there is no such variable"):
        build("judge: {model: m, base_url: 'http://127.0.0.1:9/v1', key_env: NO_SUCH_KEY}")
    with pytest.raises(ModelError):
        build(f"judge: {{model: {tmp_path / 'no-model'}}}")


@pytest.mark.parametrize("name", ["judge.yaml", "judge.yml", "judge"])
def test_outside_of_a_run_answers_are_kept_in_a_database_beside_the_judges_file(tiny_tokenizer, tmp_path, name):
    completions = completions_of(tiny_tokenizer, [("p", ["the dog"])])
    with listening(ScriptedRater()) as url:
        file = judge_file(tmp_path, name, model="m", base_url=f"{url}/v1", answer="text")
        judge_reward(RewardSourceConfig(judge=file, name="critic"), tiny_tokenizer, (STOP,)).score(completions)
    assert {path.name for path in tmp_path.iterdir()} == {name, "rules.txt", "judge.judge-critic.db"}


def test_what_scores_depend_on_is_hashed_and_where_they_come_from_is_not(tmp_path):
    def hashed(**keys):
        return judge_hash(judge_file(tmp_path, **{"model": "m", "base_url": "http://127.0.0.1:9/v1"} | keys))

    first = hashed()
    assert hashed(base_url="http://127.0.0.1:10/v1", limits={"requests": 7}) == first
    assert len({first, hashed(model="n"), hashed(votes=2), hashed(orders="one"), hashed(constitution="honest")}) == 5


def test_the_config_refuses_what_would_mean_nothing():
    for keys, said in [
        ({"function": "a.py:f", "form": "pairwise"}, "form=pairwise is for a judge, and would do nothing"),
        ({"judge": "a.yaml", "url": "http://h/score"}, "has url and judge"),
        ({"judge": "a.yaml", "key_env": "KEY"}, "key_env is for a url"),
        ({"judge": "my judge.yaml"}, "is called 'my judge'"),
        ({"judge": "a.yaml", "timeout_s": 5.0}, r"timeout_s is set, .* set limits.timeout_s in a.yaml"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            RewardSourceConfig(**keys).check("reward[0]")


def test_a_judge_stands_beside_other_sources(tiny_tokenizer, tmp_path):
    (tmp_path / "f.py").write_text("def f(completions): return [1.0 for _ in completions]\n")
    with scripted_judge() as server:
        file = judge_file(tmp_path, name="worth.yaml", model="m", base_url=server.url)
        sources = [
            RewardSourceConfig(function=f"{tmp_path / 'f.py'}:f"),
            RewardSourceConfig(judge=file, form="pairwise", weight=2.0),
        ]
        rewards = build_reward(
            sources, RewardShapingConfig(), tiny_tokenizer, (STOP,), torch.device("cpu"), kept=tmp_path / "rewards.db"
        )
        assert isinstance(rewards, RewardSet)
        batch = completions_of(tiny_tokenizer, [("Why?", ["worth 1.0", "worth 0.0"])])
        scored = rewards.score(batch, "cycle-000001")
        assert scored.scores.tolist() == pytest.approx([1 + 2 * 0.5, 1 - 2 * 0.5], abs=1e-6)
        assert list(scored.parts) == ["f", "worth"]
        asked = len(server.asked)
        (tmp_path / "rewards.judge-worth.db").unlink()
        assert rewards.score(batch, "cycle-000001").parts == scored.parts  # of rewards.db
        assert len(server.asked) == asked
    assert all(a > b for a, b in pairwise(scored.parts["worth"]))
