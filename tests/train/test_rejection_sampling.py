"""Choosing among answers: the rows are compared with plain sampling and its scores, and read by the trainers."""

import json
from pathlib import Path

import pytest
import torch

import tether
from tether.cli import main
from tether.config import DataConfig, PairsConfig
from tether.data.examples import load_examples
from tether.data.pairs import load_pairs
from tether.data.tokenizer import load_tokenizer
from tether.models.reward_model import init_reward_model, save_reward_model
from tether.train.rejection_sampling import ScoredAnswers, best_of_n, pairs, winners

PROMPTS = [
    {"prompt": "Hello", "wanted": 3.0},
    {"prompt": "The sun", "wanted": 5.0},
    {"prompt": [{"role": "user", "content": "Hi"}], "wanted": 2.0},
]


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama")


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return str(path)


def near(completion_ids, wanted, **columns):
    return [-abs(len(ids) - want) for ids, want in zip(completion_ids, wanted, strict=True)]


def scored(scores: list[float], answers: list[str] | None = None) -> ScoredAnswers:
    answers = answers or [f"answer {i}" for i in range(len(scores))]
    return ScoredAnswers("p", answers, ["stop", "length", "stop", "length"][: len(scores)], scores)


def test_the_answers_are_those_of_plain_sampling_and_the_best_has_the_highest_score(model, prompts):
    found = best_of_n(model, prompts, n=5, reward=near, max_new_tokens=8, seed=3)
    drawn = tether.generate(model, [row["prompt"] for row in PROMPTS], samples=5, max_new_tokens=8, seed=3)
    for i, (row, kept) in enumerate(zip(PROMPTS, winners(found), strict=True)):
        answers = drawn[5 * i : 5 * i + 5]
        scores = [-abs(len(a.token_ids) - row["wanted"]) for a in answers]
        best = answers[scores.index(max(scores))]
        text = kept["completion"] if isinstance(row["prompt"], str) else kept["completion"][0]["content"]
        assert (kept["prompt"], text, kept["finish_reason"]) == (row["prompt"], best.completion, best.finish_reason)
        assert (kept["score"], kept["score_mean"]) == (max(scores), sum(scores) / 5)


def test_a_pair_is_the_best_against_the_worst_with_how_each_ended():
    (pair,) = pairs([scored([0.5, 2.0, -1.0, 2.0])])
    assert (pair["chosen"], pair["chosen_finish_reason"], pair["chosen_score"]) == ("answer 1", "length", 2.0)
    assert (pair["rejected"], pair["rejected_finish_reason"], pair["rejected_score"]) == ("answer 2", "stop", -1.0)


def test_answers_that_all_score_alike_or_read_alike_give_no_pair():
    assert pairs([scored([1.0, 1.0]), scored([1.0, 0.0], ["same", "same"])]) == []
    assert len(pairs([scored([1.0, 1.0]), scored([1.0, 0.0])])) == 1


@pytest.fixture
def score_file(tmp_path) -> str:
    path = tmp_path / "scores.py"
    path.write_text(
        "def score(completion_ids, wanted, **columns):\n"
        "    return [-abs(len(ids) - want) for ids, want in zip(completion_ids, wanted)]\n"
        "def first(prompts, completion_ids):\n"
        "    return [len(i) if p == 'Hello' else 1.0 for p, i in zip(prompts, completion_ids)]\n"
        "def alike(completions):\n"
        "    return [1.0] * len(completions)\n"
    )
    return str(path)


def command(model, prompts, *flags) -> int:
    return main(["generate", str(model), "--prompts", prompts, "--max-new-tokens", "8", "--best-of", "4", *flags])


def test_the_command_writes_pairs_that_the_reward_trainer_reads(model, prompts, score_file, tmp_path, capsys):
    to = tmp_path / "pairs.jsonl"
    assert command(model, prompts, "--reward", f"{score_file}:score", "--pairs", "--to", str(to)) == 0
    assert "3 prompts, 4 answers each: mean score " in capsys.readouterr().err
    tokenizer = load_tokenizer(str(model))
    stop = tokenizer.eos_token_id
    rows = [json.loads(line) for line in to.read_text().splitlines()]
    for row, pair in zip(rows, load_pairs(PairsConfig(str(to)), tokenizer, stop_id=stop), strict=True):
        assert (pair.chosen_ids[-1] == stop) == (row["chosen_finish_reason"] == "stop")
        assert (pair.rejected_ids[-1] == stop) == (row["rejected_finish_reason"] == "stop")


def test_the_command_prints_winners_that_the_fine_tuning_reads(model, prompts, score_file, tmp_path, capsys):
    assert command(model, prompts, "--reward", f"{score_file}:score") == 0
    printed = capsys.readouterr().out
    assert printed.isascii()  # what a model wrote must not act on the terminal
    (tmp_path / "winners.jsonl").write_text(printed)
    examples = load_examples(DataConfig(str(tmp_path / "winners.jsonl")), load_tokenizer(str(model)), stop_id=None)
    assert len(examples) == len(PROMPTS)


def test_prompts_without_a_pair_are_counted_and_none_at_all_is_an_error(model, prompts, score_file, capsys):
    assert command(model, prompts, "--reward", f"{score_file}:first", "--pairs") == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in printed.out.splitlines()] == ["Hello"]
    assert "2 prompts give no pair" in printed.err
    assert command(model, prompts, "--reward", f"{score_file}:alike", "--pairs") == 2
    assert "gives a pair: there is nothing to prefer" in capsys.readouterr().err


def test_a_reward_model_scores_the_answers_with_the_prompt_before_them(model, tiny_model, tiny_tokenizer, tmp_path):
    cpu = torch.device("cpu")
    judge = init_reward_model(
        str(tiny_model("llama", seed=5)), dtype=torch.float32, weights_dtype=torch.float32, device=cpu, seed=0
    )
    save_reward_model(judge, tiny_tokenizer, tmp_path / "judge", stop_id=tiny_tokenizer.eos_token_id)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "Hello"}\n')
    (found,) = best_of_n(model, file, n=3, reward=str(tmp_path / "judge"), max_new_tokens=8, seed=1)
    drawn = tether.generate(model, ["Hello"], samples=3, max_new_tokens=8, seed=1)
    want = judge.score([tiny_tokenizer("Hello").input_ids + g.token_ids for g in drawn])
    assert found.scores == pytest.approx(want.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--best-of", "1", "--prompts", "p.jsonl", "--reward", "a.py:f"], "--best-of 1: there would be nothing"),
        (["--best-of", "4", "--prompts", "p.jsonl"], "--best-of without --reward SOURCE"),
        (["--best-of", "4", "--reward", "a.py:f"], "--best-of without --prompts FILE"),
        (["--best-of", "4", "--prompt", "Hi", "--reward", "a.py:f"], "--prompt with --best-of"),
        (["--best-of", "4", "--prompts", "p.jsonl", "--reward", "a.py:f", "--to", "."], "no file can be written there"),
        (
            ["--best-of", "4", "--prompts", "p.jsonl", "--reward", "a.py:f", "--samples", "2"],
            "--samples with --best-of",
        ),
        (["--prompt", "Hi", "--pairs"], "--reward, --pairs and --to go with --best-of"),
        (["--best-of", "2", "--prompts", "p.jsonl", "--reward", "a.py:f", "--to", "no/x.jsonl"], "no directory no"),
        (["--best-of", "2", "--prompts", "p.jsonl", "--reward", "no_such.py:f"], "there is no file no_such.py"),
        (["--best-of", "2", "--prompts", "p.jsonl", "--reward", "./nowhere"], "nowhere"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(model, tmp_path, monkeypatch, capsys, flags, says):
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "Hi"}\n')
    assert main(["generate", str(model), *flags]) == 2
    assert says in capsys.readouterr().err
