"""A policy without a critic: what needs one stays away, and the rest is what it is with one."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import tether
from tether.config import (
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    RewardShapingConfig,
)
from tether.diagnose.alarms import alarms
from tether.errors import BatchError
from tether.models.policy import Policy, Reference
from tether.reports.signals import signals_of, surprise, tokens_of, value_curve
from tether.rewards import build_reward
from tether.samplers.local import LocalSampler
from tether.train.columns import rollout_columns
from tether.train.optim import ScheduledOptimizer, build_optimizer
from tether.train.rollout import collect
from tether.train.update import accumulate, update
from tether.types import Rollout, Sampling
from tiny import language_model, prompts_of, ragged_rows
from tiny_ppo import id_score, tiny_config

CONFIG = PPOConfig(
    run="run", model=ModelConfig("m"), prompts=PromptsConfig("p"),
    ppo=PPOSection(cycles=60, batch=4, minibatch=2, epochs=2, responses_per_prompt=2, advantage="group"),
)  # fmt: skip


@pytest.fixture
def policy() -> Policy:
    return Policy(language_model(), value_head=False).train()


@pytest.fixture
def experience(policy, tiny_tokenizer):
    """Phase 1 with a group baseline."""
    reference = Reference(policy, Policy(language_model(seed=1), value_head=False))
    rewards = build_reward([], RewardShapingConfig(), tiny_tokenizer, (), torch.device("cpu"), id_score)
    sampling = Sampling(max_new_tokens=6, responses_per_prompt=2)
    return collect(
        prompts_of([3, 5]), LocalSampler(policy.model), rewards, policy, reference, sampling, CONFIG.ppo,
        kl_coef=lambda *_: 0.1, cycle=1,
    )  # fmt: skip


def test_a_policy_without_a_critic_has_no_values_and_nothing_of_it_to_train_or_save(policy, tmp_path):
    with_one = Policy(language_model())
    rows = ragged_rows()
    output, want = (p(rows, temperature=1.0) for p in (policy, with_one))
    assert output.values is None
    assert_close(output.logprobs, want.logprobs, rtol=0, atol=0)
    assert policy.critic_parameters() == []
    assert list(policy.parts()) == ["policy"]
    policy.save_critic(tmp_path / "critic")
    assert not (tmp_path / "critic").exists()


def test_a_rollout_has_values_and_returns_or_neither():
    rows = ragged_rows()
    x = torch.zeros(rows.response_mask.shape)
    cut = Rollout(rows, x, x, None, x, x, None).select(torch.tensor([2]))
    assert (cut.values, cut.returns) == (None, None)
    assert list(cut.rewards.shape) == [1, 3]
    with pytest.raises(BatchError, match="belong together"):
        Rollout(rows, x, x, x, x, x, None)


def test_phase_1_leaves_out_the_critics_metric_and_columns(experience, tiny_tokenizer):
    assert experience.rollout.values is None
    assert not [name for name in experience.metrics if name.startswith("value/")]
    assert "eval/explained_variance" not in experience.evaluation_metrics({})
    assert "eval/kl_ref_mean" in experience.evaluation_metrics({})
    columns = rollout_columns(experience, tiny_tokenizer, (), CONFIG.ppo, cycle=1, responses_per_prompt=2)
    assert not {"value", "delta", "return"} & set(columns)
    ours, other = (sum(columns["reward"][i]) for i in (0, 1))
    assert columns["advantage"][0] == pytest.approx([ours - other] * columns["length"][0], abs=1e-5)


def test_phase_2_learns_from_the_policys_loss_alone(policy, experience):
    optimizer = build_optimizer(
        OptimConfig(lr=1e-3), policy.policy_parameters(), policy.critic_parameters(), lora=False
    )
    before = [p.detach().clone() for _, p in policy.policy_parameters()]
    done = update(
        policy, ScheduledOptimizer(optimizer, OptimConfig(), 8), experience.rollout, CONFIG.ppo,
        cycle=1, kl_coef=0.1, temperature=1.0, seed=0,
    )  # fmt: skip
    assert not [name for name in done.metrics if name.startswith("value/")]
    assert not all(torch.equal(a, p) for a, (_, p) in zip(before, policy.policy_parameters(), strict=True))


def test_its_gradient_is_that_of_a_critic_whose_loss_counts_nothing(policy, experience):
    ppo = replace(CONFIG.ppo, value_coef=0.0, microbatch_tokens=16)
    accumulate(policy, experience.rollout, ppo, kl_coef=0.1, temperature=1.0)
    other = Policy(language_model()).train()
    zeros = torch.zeros_like(experience.rollout.rewards)
    accumulate(other, replace(experience.rollout, values=zeros, returns=zeros), ppo, kl_coef=0.1, temperature=1.0)
    for (name, a), (_, b) in zip(policy.policy_parameters(), other.policy_parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8, msg=name)


def test_a_group_of_equal_responses_dilutes_no_other(policy, experience):
    rollout = experience.rollout
    dead = replace(rollout, advantages=torch.where(torch.tensor([0, 0, 1, 1])[:, None] == 0, rollout.advantages, 0.0))
    accumulate(policy, dead, CONFIG.ppo, kl_coef=0.1, temperature=1.0)
    other = Policy(language_model(), value_head=False).train()
    accumulate(other, dead.select(torch.tensor([0, 1])), CONFIG.ppo, kl_coef=0.1, temperature=1.0)
    for (name, a), (_, b) in zip(policy.policy_parameters(), other.policy_parameters(), strict=True):
        assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("advantage", ["group", "batch"])
def test_a_run_without_a_critic_finishes_and_leaves_none(tiny_model, tmp_path, advantage):
    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"advantage": advantage})
    run = tether.ppo(config, reward=id_score)
    assert not any("critic" in path.name for path in run.path.rglob("*"))
    assert not [name for name in run.metrics[-1] if name.startswith("value/")]
    assert ("advantage/dead_groups" in run.metrics[-1]) == (advantage == "group")
    tether.report(run.path)


def test_pages_show_what_such_a_response_has(experience, tiny_tokenizer):
    new = experience.rollout.old_logprobs
    columns = rollout_columns(
        experience, tiny_tokenizer, (), CONFIG.ppo, cycle=1, responses_per_prompt=2, new_logprobs=new
    )
    row = {name: values[0] for name, values in columns.items()}
    signals = signals_of(row)
    assert list(signals) == ["advantage", "ratio", "kl", "entropy", "reward"]
    assert all(len(signal.of(row)) == row["length"] for signal in signals.values())
    assert value_curve(row) == ""
    assert surprise(row) >= 0
    first = tokens_of(row, [0] * row["length"], CONFIG.ppo)[0]
    assert [what for what, _ in first["lines"]] == ["KL", "reward", "A", "ratio", "entropy"]


def test_no_alarm_speaks_of_a_critic_that_is_not_there():
    """60 healthy cycles, and 60 in which a critic would be dead."""
    line = {"kl/ref_mean": 1.0, "policy/loss": 0.0, "policy/entropy": 2.0, "reward/score_mean": 1.0,
            "reward/score_std": 1.0, "reward/score_min": -1.0, "reward/score_max": 3.0}  # fmt: skip
    without = [{"cycle": c, **line} for c in range(1, 61)]
    dead = [m | {"value/explained_variance": 0.0, "value/loss": 0.1} for m in without]
    found = [[a.rule for a in alarms("ppo", CONFIG, metrics, [], {"state": "finished"})] for metrics in (without, dead)]
    assert found == [[], ["dead-critic"]]
