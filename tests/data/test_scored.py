"""Scored answers: what a row becomes, and what other runs sampled, with the very ids that they sampled."""

from dataclasses import replace
from shutil import copytree

import pyarrow
import pytest
from pyarrow import parquet

import tether
from tether.config import ScoredConfig
from tether.data.scored import ScoredResponse, all_stop_ids, load_scored
from tether.errors import ConfigError, DataError
from tether.types import Prompt
from tiny_ppo import PROMPTS, STOPS, id_score, tiny_config


def test_an_answer_is_followed_by_a_stop_token_only_where_it_stopped(write, tiny_tokenizer):
    rows = [
        {"prompt": "ab", "completion": "cd", "score": 1},
        {"prompt": "x", "completion": "yz", "score": -0.5, "finish_reason": "length"},
        {"prompt": "ab", "completion": "", "score": 0.0, "finish_reason": "stop"},
    ]
    found = load_scored(ScoredConfig(write("a.jsonl", rows)), tiny_tokenizer, stop_id=1)
    ids = {c: tiny_tokenizer(c, add_special_tokens=False).input_ids[0] for c in "abcdxyz"}
    assert [list(a.prompt.ids) for a in found] == [[ids["a"], ids["b"]], [ids["x"]], [ids["a"], ids["b"]]]
    assert [a.response_ids for a in found] == [[ids["c"], ids["d"], 1], [ids["y"], ids["z"]], [1]]
    assert [a.score for a in found] == [1.0, -0.5, 0.0]
    assert [a.finish_reason for a in found] == ["stop", "length", "stop"]
    assert [a.prompt.row for a in found] == [0, 1, 0]  # answers to one prompt are known to belong together


def test_stop_tokens_are_the_models_and_what_ended_answers_of_runs_in_a_fixed_order(write, tiny_tokenizer):
    def ended(ids, reason):
        return ScoredResponse(Prompt((5,), "…", 0), ids, reason, 0.0)

    answers = [ended([7, 30], "stop"), ended([9, 8], "length"), ended([12], "stop"), ended([4, 3], "stop")]
    assert all_stop_ids((3, 40), answers) == (3, 40, 12, 30)
    assert all_stop_ids((), []) == ()
    # a file's answers end with the model's stop token: where it has none, their last token is an ordinary one
    (answer,) = load_scored(
        ScoredConfig(write("a.jsonl", [{"prompt": "a", "completion": "b", "score": 1}])), tiny_tokenizer, stop_id=None
    )
    assert all_stop_ids((), [answer]) == ()


def test_a_long_prompt_is_cut_and_a_long_answer_never(write, tiny_tokenizer):
    path = write("a.jsonl", [{"prompt": "abcdef", "completion": "gh", "score": 1}])
    config = ScoredConfig(path, max_tokens=5, overlong="cut_left")
    (answer,) = load_scored(config, tiny_tokenizer, stop_id=1)
    assert tiny_tokenizer.decode([*answer.prompt.ids, *answer.response_ids]) == "efgh<eos>"
    assert answer.prompt.cut
    with pytest.raises(DataError, match=r"has 3 tokens, which leaves no room for a prompt.*data\.overlong to drop"):
        load_scored(replace(config, max_tokens=3), tiny_tokenizer, stop_id=1)
    with pytest.raises(DataError, match="has 9 tokens, prompt included"):
        load_scored(replace(config, overlong="error"), tiny_tokenizer, stop_id=1)


# ---------------------------------------------------------------- what a run sampled


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, tiny_model):
    """A run of PPO, four cycles of eight responses by random weights: their bytes are mostly no text at all."""
    folder = tmp_path_factory.mktemp("replay")
    return tether.ppo(tiny_config(folder / "run", tiny_model(), evaluate={"every": 0}), reward=id_score)


def test_a_run_is_replayed_with_the_ids_that_it_sampled(sampled, tiny_tokenizer):
    found = load_scored(ScoredConfig(str(sampled.path)), tiny_tokenizer, stop_id=1)
    rows = [row for cycle in sampled.rollout_cycles for row in sampled.rollouts(cycle).to_pylist()]
    assert len(found) == 32
    assert [a.response_ids for a in found] == [row["token_id"] for row in rows]
    assert [a.score for a in found] == [row["score"] for row in rows]
    assert [a.finish_reason == "stop" for a in found] == [row["token_id"][-1] in STOPS for row in rows]
    texts = [tiny_tokenizer.decode(a.prompt.ids) for a in found]
    assert texts == [a.prompt.source for a in found] == [row["prompt"] for row in rows]
    assert set(texts) <= set(PROMPTS)
    # the point of it: through text, these answers would have come back as other tokens
    again = [tiny_tokenizer(row["completion"], add_special_tokens=False).input_ids for row in rows]
    assert again != [row["token_id"][: len(ids)] for row, ids in zip(rows, again, strict=True)]


def test_runs_and_files_are_read_together_and_a_limit_is_of_each(sampled, write, tiny_tokenizer):
    path = write("a.jsonl", [{"prompt": "why?", "completion": c, "score": 1} for c in "abcd"])
    config = ScoredConfig([path, str(sampled.path)], limit=3)
    found = load_scored(config, tiny_tokenizer, stop_id=1)
    assert [tiny_tokenizer.decode(a.response_ids) for a in found[:3]] == ["a<eos>", "b<eos>", "c<eos>"]
    assert [a.response_ids for a in found[3:]] == sampled.rollouts(1)["token_id"].to_pylist()[:3]


def test_a_run_that_was_sampled_with_another_tokenizer_is_refused(sampled, spaced_tokenizer):
    # its 304 ids cover the byte tokenizer's 258: only what they read shows that it is another
    with pytest.raises(DataError, match=r"sampled with another tokenizer: the run read it as .*Name a model\.policy"):
        load_scored(ScoredConfig(str(sampled.path)), spaced_tokenizer, stop_id=2)


def test_an_answer_cut_just_after_what_another_run_stops_at_is_no_other_tokenizers(sampled, tmp_path, tiny_tokenizer):
    # a run of Q-learning writes down the stop tokens of all runs that it read as "", also where an answer was cut there
    run = copytree(sampled.path, tmp_path / "run")
    rows = [row | {"finish_reason": "length"} for row in sampled.rollouts(1).to_pylist()]
    parquet.write_table(pyarrow.Table.from_pylist(rows), run / "rollouts" / "cycle-000001.parquet")
    assert len(load_scored(ScoredConfig(str(run)), tiny_tokenizer, stop_id=1)) == 32


def test_a_run_without_rollouts_is_refused(tiny_model, tmp_path, tiny_tokenizer):
    run = tether.ppo(
        tiny_config(
            tmp_path / "run", tiny_model(), ppo={"cycles": 1}, evaluate={"every": 0},
            log={"rollouts_every": 0, "tensorboard": False},
        ),
        reward=id_score,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"holds no rollouts.*log\.rollouts_every above 0"):
        load_scored(ScoredConfig(str(run.path)), tiny_tokenizer, stop_id=1)


def test_one_path_spelled_in_two_ways_is_refused_before_its_answers_count_double(write, monkeypatch, tmp_path):
    path = write("a.jsonl", [{"prompt": "a", "completion": "b", "score": 1}])
    (tmp_path / "link").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for first, second in (("a.jsonl", "./a.jsonl"), ("a.jsonl", path), ("a.jsonl", "link"), ("a.jsonl", "a.jsonl")):
        with pytest.raises(ConfigError, match=r"twice.*would count double"):
            ScoredConfig(["b", first, second]).check("data")
    with pytest.raises(ConfigError, match=r"data\.path names \./a\.jsonl twice, once as a\.jsonl:"):
        ScoredConfig(["a.jsonl", "./a.jsonl"]).check("data")
    ScoredConfig(["owner/name", "owner/name2", "a.jsonl"]).check("data")


def test_scores_that_are_all_equal_are_told(write, tiny_tokenizer, capsys):
    load_scored(
        ScoredConfig(write("a.jsonl", [{"prompt": "a", "completion": c, "score": 2} for c in "bc"])),
        tiny_tokenizer, stop_id=1,
    )  # fmt: skip
    assert "every answer has the score 2: none is better than another" in capsys.readouterr().err
