"""`ppo.ahead: 1`: whose responses a cycle learns from, that both halves run at once, and what a checkpoint keeps."""

import math
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

import tether
from resume import launch, wait_for_step
from tether.config import PPOSection, RewardShapingConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.errors import ConfigError, Interrupted, RewardError
from tether.math import whiten
from tether.models.language_model import LanguageModel
from tether.models.loading import load_causal_lm
from tether.models.policy import Policy, Reference
from tether.rewards import build_reward
from tether.runs import Run
from tether.runs.files import read_table
from tether.samplers.local import LocalSampler
from tether.train.ahead import read_ahead, write_ahead
from tether.train.rollout import collect
from tether.types import TRAIN, Completions, Prompt, Sampling
from tiny import language_model, prompts_of
from tiny_ppo import STOPS, id_score, tiny_config

CPU = torch.device("cpu")


def sampler_of(model) -> LocalSampler:
    return LocalSampler(LanguageModel(load_causal_lm(str(model), dtype=torch.float32, device=CPU), torch.float32))


def test_a_cycle_learns_from_what_the_policy_of_one_update_before_sampled(tiny_model, tmp_path):
    start = tiny_model()
    config = tiny_config(
        tmp_path / "run", start, ppo={"ahead": 1}, optim={"lr": 1e-2}, checkpoint={"every": 1, "keep": 9}
    )
    run = tether.ppo(config, reward=id_score)
    sampling = Sampling(0.7, 0, 1.0, 10, tuple(STOPS), 2, config.seed, TRAIN)
    policies = [start, *(run.path / "checkpoints" / f"cycle-{c:06d}" / "policy" for c in (1, 2, 3))]
    for cycle, theirs in ((1, 0), (2, 0), (3, 1), (4, 2)):
        rollout = read_table(run.table_file("rollouts", cycle)).to_pydict()
        prompts = [
            Prompt(tuple(ids), "", row)
            for ids, row in zip(rollout["prompt_token_id"], rollout["prompt_index"], strict=True)
        ]
        drawn = {p: sampler_of(policies[p]).generate(prompts[::2], sampling, cycle=cycle) for p in range(cycle)}
        assert drawn[theirs].response_ids == rollout["token_id"]
        assert_close(drawn[theirs].sampler_logprobs, rollout["sampler_logprob"], rtol=0, atol=1e-5)
        others = [drawn[p].response_ids for p in drawn if p != theirs]
        assert rollout["token_id"] not in others
    assert [m.get("ahead/weight_mean") is None for m in run.metrics] == [True, False, False, False]
    assert [m["check/sampler_gap"] is None for m in run.metrics] == [False, True, True, True]


class Meeting:
    """A sampler that draws cycle 2 only once the update of cycle 1 has begun."""

    def __init__(self, began: threading.Event, drawing: threading.Event) -> None:
        self.began, self.drawing, self.engine = began, drawing, None

    def load_weights(self, weights, version):
        self.engine = self.engine or LocalSampler(weights, copied=True)
        self.engine.load_weights(weights, version)

    def generate(self, prompts, sampling, *, cycle, first=0):
        if cycle == 2:
            self.drawing.set()
            assert self.began.wait(20)
        return self.engine.generate(prompts, sampling, cycle=cycle, first=first)


def test_sampling_and_learning_go_on_at_the_same_time(tiny_model, tmp_path, monkeypatch):
    began, drawing, real = threading.Event(), threading.Event(), torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        began.set()
        assert drawing.wait(20)  # neither ends before the other has begun
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"ahead": 1, "cycles": 2}, evaluate={"every": 0})
    assert len(tether.ppo(config, reward=id_score, sampler=Meeting(began, drawing)).metrics) == 2


@pytest.mark.slow
def test_stopped_while_it_samples_ahead_a_run_ends_saved_and_not_by_an_abort(tiny_model, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def f(completion_ids, **_):\n    return [len(set(ids)) for ids in completion_ids]\n"
    )
    config = tiny_config(
        tmp_path / "run", tiny_model(), ppo={"ahead": 1, "cycles": 500, "batch": 64, "minibatch": 64},
        sampling={"stop_token_ids": [], "max_new_tokens": 100},
    )  # fmt: skip
    config = replace(config, reward=[RewardSourceConfig(function=f"{tmp_path / 'reward.py'}:f")])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    process = launch("ppo", tmp_path / "c.yaml")
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 3
    assert Run(tmp_path / "run").status["state"] == "stopped"


def test_a_sampler_that_fails_ahead_ends_the_run_with_its_error_and_the_same_command_continues(tiny_model, tmp_path):
    class Fails(Meeting):
        def generate(self, prompts, sampling, *, cycle, first=0):
            if cycle == 4 and not self.began.is_set():
                self.began.set()
                raise OSError("the engine is gone")
            return self.engine.generate(prompts, sampling, cycle=cycle, first=first)

    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"ahead": 1})
    failing = Fails(threading.Event(), threading.Event())
    with pytest.raises(OSError, match="the engine is gone"):
        tether.ppo(config, reward=id_score, sampler=failing)
    run = tether.ppo(config, reward=id_score, sampler=failing)
    assert [m["cycle"] for m in run.metrics] == [1, 2, 3, 4]


def test_a_run_that_fails_waits_for_its_sampler_which_the_next_may_use_again(tiny_model, tmp_path):
    class Slow(Meeting):
        def generate(self, prompts, sampling, *, cycle, first=0):
            if cycle == 3:
                self.drawing.set()
                assert failing.wait(20)
                time.sleep(0.5)
                self.began.set()
            return self.engine.generate(prompts, sampling, cycle=cycle, first=first)

    def fails_in_cycle_2(completion_ids, **_):
        if scored and sampler.drawing.wait(20):
            failing.set()
            raise ValueError("no score")
        scored.append(1)
        return [1.0] * len(completion_ids)

    failing, scored, sampler = threading.Event(), [], Slow(threading.Event(), threading.Event())
    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"ahead": 1}, evaluate={"every": 0})
    with pytest.raises(RewardError, match="no score"):
        tether.ppo(config, reward=fails_in_cycle_2, sampler=sampler)
    assert sampler.began.is_set()
    assert not [t for t in threading.enumerate() if t.name == "sampling"]
    assert (tmp_path / "run" / "checkpoints" / "cycle-000001" / "ahead.safetensors").exists()


def test_a_run_that_is_stopped_while_it_learns_samples_nothing_more(tiny_model, tmp_path, monkeypatch):
    class Counts(Meeting):
        def generate(self, prompts, sampling, *, cycle, first=0):
            drawn.append(cycle)
            return self.engine.generate(prompts, sampling, cycle=cycle, first=first)

    def step(self, *args, **kwargs):
        if not sent:
            sent.append(signal.raise_signal(signal.SIGINT))
        return real(self, *args, **kwargs)

    drawn, sent, real = [], [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"ahead": 1}, evaluate={"every": 0})
    with pytest.raises(Interrupted):
        tether.ppo(config, reward=id_score, sampler=Counts(threading.Event(), threading.Event()))
    assert drawn == [1, 2]


def test_what_is_learned_is_weighed_by_both_policies_and_cut_at_the_cap(tiny_tokenizer):
    theirs, policy = language_model(), Policy(language_model(seed=1))
    prompts, sampling = prompts_of([3, 5, 2]), Sampling(max_new_tokens=6, responses_per_prompt=2)
    drawn = LocalSampler(theirs).generate(prompts, sampling, cycle=1)
    rewards = build_reward([], RewardShapingConfig(), tiny_tokenizer, (), CPU, id_score)
    found = collect(
        prompts, LocalSampler(policy.model), rewards, policy, Reference(policy, policy), sampling,
        PPOSection(ahead=1, ahead_cap=1.5), kl_coef=lambda *_: 0.1, cycle=1, drawn=drawn, lagged=True,
    )  # fmt: skip
    assert found.completions is drawn
    plain = whiten(found.advantages, found.rollout.rows.response_mask)
    weights = []
    for row, logprobs in enumerate(drawn.sampler_logprobs):
        for t, sampled in enumerate(logprobs):
            weight = min(1.5, math.exp(float(found.rollout.old_logprobs[row, t]) - sampled))
            assert float(found.rollout.advantages[row, t]) == pytest.approx(weight * float(plain[row, t]), rel=1e-4)
            weights.append(weight)
    assert found.metrics["ahead/weight_mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-4)
    assert found.metrics["ahead/capped_fraction"] == pytest.approx(sum(w == 1.5 for w in weights) / len(weights))
    assert 0 < found.metrics["ahead/capped_fraction"] < 1


def test_the_kl_of_what_was_sampled_ahead_is_that_of_the_policy_that_sampled(tiny_tokenizer):
    theirs, policy = language_model(), Policy(language_model(seed=1))  # which has moved away from the reference
    prompts, sampling = prompts_of([3, 5, 2]), Sampling(max_new_tokens=6, responses_per_prompt=2)
    drawn = LocalSampler(theirs).generate(prompts, sampling, cycle=1)
    rewards, asked = build_reward([], RewardShapingConfig(), tiny_tokenizer, (), CPU, id_score), []
    found = collect(
        prompts, LocalSampler(policy.model), rewards, policy, Reference(policy, Policy(theirs)), sampling,
        PPOSection(ahead=1), kl_coef=lambda _, sums: asked.append(sums) or 0.1, cycle=1, drawn=drawn, lagged=True,
    )  # fmt: skip
    # The reference is what sampled: every log-ratio is 0, and that of the policy, on average negative, far from it.
    assert_close(asked[0], torch.zeros(6), rtol=0, atol=1e-4)
    assert found.metrics["kl/ref_mean"] == pytest.approx(0, abs=1e-4)
    assert found.metrics["kl/ref_per_token"] == pytest.approx(0, abs=1e-5)
    assert float((found.rollout.old_logprobs - found.rollout.ref_logprobs).sum(1).mean()) < -0.1


numbers = st.floats(-50, 0, width=64)
rows = st.lists(st.tuples(st.integers(0, 2**31 - 1), numbers, numbers), min_size=1, max_size=4)


@given(st.lists(st.tuples(rows, st.sampled_from(["stop", "length"])), min_size=1, max_size=5))
def test_what_waits_comes_back_from_a_checkpoint_bit_for_bit(tmp_path_factory, drawn):
    file = tmp_path_factory.mktemp("ahead") / "ahead.safetensors"
    prompts = [Prompt((1, 2), f"p{i}", i) for i in range(len(drawn))]
    columns = [[list(column) for column in zip(*row, strict=True)] for row, _ in drawn]
    want = Completions(prompts, *map(list, zip(*columns, strict=True)), [reason for _, reason in drawn])
    write_ahead(file, want)
    assert read_ahead(file, prompts) == want


def test_a_cap_without_ahead_is_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"ppo.ahead_cap=3.0 with ppo.ahead=0: nothing is sampled ahead"):
        tether.ppo(tiny_config(tmp_path / "run", tiny_model(), ppo={"ahead_cap": 3.0}), reward=id_score)
