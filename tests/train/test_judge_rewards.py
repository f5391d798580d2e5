"""PPO with a judge as its reward: one in this process, and one at an endpoint that answers differently each time, whose
runs have the bits of one that was left alone after any kill, and nothing is paid twice."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tether
from resume import steady
from scripted_rater import ScriptedRater
from served_rewards import listening
from tether.cli import main
from tether.config import RewardSourceConfig
from tether.config.reading import to_yaml
from tether.errors import ConfigError, Interrupted, RewardError, RunError
from tether.feedback.rating import DIGITS
from tether.runs import Run
from tiny_ppo import tiny_config


@pytest.fixture(scope="module")
def policy(tiny_model) -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def speaking(tiny_model, tiny_tokenizer) -> Callable[[str], Path]:
    """A random GPT-2 that nearly always says one of some characters: its last norm has a bias, and they read it."""

    def make(symbols: str) -> Path:
        path = tiny_model("gpt2", n_positions=1024, tie_word_embeddings=False, seed=4)
        model = AutoModelForCausalLM.from_pretrained(path)
        with torch.no_grad():
            model.transformer.ln_f.bias.copy_(torch.ones(32))
            model.lm_head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(5))
            model.lm_head.weight[[tiny_tokenizer.convert_tokens_to_ids(symbol) for symbol in symbols]] += 12 / 32
        model.save_pretrained(path)
        return path

    return make


def write_judge(folder: Path, **keys) -> str:
    """A judge's file, in which `section` holds what stands beside `judge`."""
    section = keys.pop("section", {})
    (folder / "judge.yaml").write_text(json.dumps({"judge": keys, "device": "cpu", **section}))
    return str(folder / "judge.yaml")


def at_endpoint(folder: Path, url: str, **section) -> str:
    """One request in flight, so that a kill finds no other in the air; two votes for each answer."""
    limits = {"concurrency": 1, "timeout_s": 5.0, **section}
    return write_judge(folder, model="m", base_url=f"{url}/v1", answer="text", votes=2, section={"limits": limits})


def config_of(run: Path, policy: Path, *sources: RewardSourceConfig, **sections):
    return replace(tiny_config(run, policy, **sections), reward=list(sources))


def same(a: Run, b: Run) -> bool:
    first, second = (load_file(run.final / "model.safetensors") for run in (a, b))
    return steady(a) == steady(b) and all((first[name] == second[name]).all() for name in first)


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory) -> tuple[Run, ScriptedRater]:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    rater = ScriptedRater()
    with listening(rater) as url:
        run = tether.ppo(config_of(folder / "run", policy, RewardSourceConfig(judge=at_endpoint(folder, url))))
    return run, rater


def test_a_run_learns_from_ratings(whole):
    run, rater = whole
    assert [m["cycle"] for m in run.metrics] == [1, 2, 3, 4]
    assert all(1 <= m["reward/judge_mean"] <= 10 for m in run.metrics)
    assert set(rater.answered.values()) == {2}  # the votes
    assert (run.path / "rewards.judge-judge.db").exists()
    assert (run.path / "rewards.db").exists()


# in the first evaluation of 6 answers; in cycle 2; between two votes of cycle 3, after the checkpoint; in the last one
@pytest.mark.parametrize("kill_at", [5, 32, 58, 80])
def test_killed_and_continued_a_run_learns_from_the_answers_that_it_paid(policy, whole, tmp_path, kill_at):
    run, undisturbed = whole
    rater = ScriptedRater(kill_at)
    with listening(rater) as url:
        config = config_of(tmp_path / "run", policy, RewardSourceConfig(judge=at_endpoint(tmp_path, url)))
        child = os.fork()
        if child == 0:
            try:
                tether.ppo(config)
            finally:
                os._exit(1)
        rater.client = child
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        rater.client = 0
        assert same(tether.ppo(config), run)
    assert rater.answered == undisturbed.answered


def test_a_signal_ends_the_asking_and_the_run_goes_on_later(policy, whole, tmp_path):
    def away_from_cycle_3_on(n):
        if n == 60:
            os.kill(os.getpid(), signal.SIGTERM)
        return 503 if n >= 58 and away else 200

    away = True
    rater = ScriptedRater(status=away_from_cycle_3_on)
    with listening(rater) as url:
        config = config_of(
            tmp_path / "run", policy, RewardSourceConfig(judge=at_endpoint(tmp_path, url, retries=1000, timeout_s=60.0))
        )
        began = time.monotonic()
        with pytest.raises(Interrupted, match="stopped after cycle 2, saved"):
            tether.ppo(config)
        assert time.monotonic() - began < 60
        for thread in [t for t in threading.enumerate() if t.name == "reward"]:
            thread.join(20)
            assert not thread.is_alive()  # the endpoint is still away: nobody asks it any more
        away = False
        assert same(tether.ppo(config), whole[0])
    assert rater.answered == whole[1].answered


def test_a_limit_that_is_reached_saves_the_run_and_a_higher_one_continues_it(policy, whole, tmp_path):
    rater = ScriptedRater()
    with listening(rater) as url:
        config = config_of(tmp_path / "run", policy, RewardSourceConfig(judge=at_endpoint(tmp_path, url, requests=60)))
        with pytest.raises(RewardError, match=r"60 requests .*a limit is reached"):
            tether.ppo(config)
        assert len(rater.asked) == 60
        assert Run.open(tmp_path / "run").status["state"] == "failed"
        at_endpoint(tmp_path, url)
        assert same(tether.ppo(config), whole[0])
        write_judge(tmp_path, model="another", base_url=f"{url}/v1", answer="text", votes=2)
        with pytest.raises(RunError, match=r"reward\[0\].judge has other content than when the run"):
            tether.ppo(config)
    assert rater.answered == whole[1].answered


def test_two_answers_to_each_prompt_are_compared_by_a_model_in_this_process(policy, speaking, tmp_path, capsys):
    model = speaking("AB")
    source = RewardSourceConfig(judge=write_judge(tmp_path, model=str(model)), form="pairwise", name="better")
    ppo = {"cycles": 2, "batch": 4, "responses_per_prompt": 2, "minibatch": 4, "advantage": "group"}
    config = config_of(tmp_path / "run", policy, source, ppo=ppo, evaluate={"every": 2, "count": 2, "samples": 2})
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert main(["ppo", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"reward better: judge {model}, in this process, pairwise, " in told
    assert "judge better" in told.split("memory on cpu")[1]
    run = tether.ppo(config)
    for cycle in (1, 2):
        scores = run.rollouts(cycle).column("score/better").to_pylist()
        assert len(scores) == 4
        assert scores[0] == -scores[1] != 0
        assert scores[2] == -scores[3]
    assert not (run.path / "best").exists()  # every mean is 0
    assert not list(run.path.glob("rewards*"))


def test_gold_and_evaluation_take_a_judge_that_rates_and_none_that_compares(policy, speaking, tmp_path, capsys):
    (tmp_path / "f.py").write_text("def f(completions): return [float(len(c)) for c in completions]\n")
    judge = write_judge(tmp_path, model=str(speaking(DIGITS)))
    gold = RewardSourceConfig(judge=judge, name="gold")
    function = RewardSourceConfig(function=f"{tmp_path / 'f.py'}:f")
    evaluate = {"every": 2, "count": 2, "samples": 1, "gold": [gold]}
    config = config_of(
        tmp_path / "run", policy, function, evaluate=evaluate, ppo={"cycles": 2, "batch": 4, "minibatch": 4}
    )
    run = tether.ppo(config)
    assert 1 < run.metrics[-1]["eval/gold/gold_mean"] < 10
    assert run.best["gold"] == run.metrics[-1]["eval/gold/gold_mean"]
    prompts = tmp_path / "prompts.jsonl"
    flags = ["--prompts.path", str(prompts), "--samples", "2", "--device", "cpu", "--sampling.max_new_tokens", "4",
             "--prompts.limit", "3", "--models", f"[{policy}]"]  # fmt: skip
    assert main(["evaluate", *flags, "--reward", f"[{{judge: {judge}}}]"]) == 0
    assert "3 prompts, 2 responses to each" in capsys.readouterr().out
    assert main(["evaluate", *flags, "--reward", f"[{{judge: {judge}, form: pairwise}}]"]) == 2
    assert "its mean score be 0 however good they are" in capsys.readouterr().err
    assert main(["generate", str(policy), "--prompts", str(prompts), "--best-of", "2", "--reward", judge,
                 "--max-new-tokens", "4", "--device", "cpu"]) == 0  # fmt: skip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 12
    assert all(1 < row["score_mean"] <= row["score"] < 10 for row in rows)


def test_a_group_of_one_or_a_question_too_long_is_refused_before_cycle_1(policy, speaking, tiny_model, tmp_path):
    judge = write_judge(tmp_path, model=str(speaking(DIGITS)))
    pairs = RewardSourceConfig(judge=judge, form="pairwise")
    one = {"ppo": {"cycles": 1, "batch": 4, "minibatch": 4, "responses_per_prompt": 1}}
    with pytest.raises(ConfigError, match=r"reward\[0\].form=pairwise with ppo.responses_per_prompt=1"):
        tether.ppo(config_of(tmp_path / "run", policy, pairs, **one))
    with pytest.raises(ConfigError, match=r"reward\[0\].form=pairwise with evaluate.samples=1"):
        tether.ppo(config_of(tmp_path / "run", policy, pairs, evaluate={"samples": 1}))
    with pytest.raises(ConfigError, match=r"evaluate.gold\[0\].form=pairwise"):
        tether.ppo(config_of(tmp_path / "run", policy, RewardSourceConfig(model="m"), evaluate={"gold": [pairs]}))
    gold = [RewardSourceConfig(judge=judge)]
    with pytest.raises(ConfigError, match=r"evaluate.gold\[0\] is what reward\[0\] scores by"):
        tether.ppo(config_of(tmp_path / "run", policy, pairs, evaluate={"gold": gold}))
    write_judge(tmp_path, model=str(tiny_model("gpt2", n_positions=400)))
    with pytest.raises(ConfigError, match="reward judge: its judge has a context of 400 tokens, but a question about"):
        tether.ppo(config_of(tmp_path / "run", policy, RewardSourceConfig(judge=judge)))
