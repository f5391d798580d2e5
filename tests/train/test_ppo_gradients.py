"""The gradient of a minibatch: of the objective as it is written, and the same however the work is cut up."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from tether.config import KLConfig, LoraConfig, PPOSection
from tether.models.language_model import LanguageModel
from tether.models.loading import add_lora, checkpoint_activations
from tether.models.policy import Policy, SeparateCritic
from tether.train.update import accumulate
from tether.types import Rollout, Rows
from tiny import VOCABULARY, ragged_rows, randomize, transformer

TEMPERATURE, BETA = 0.7, 0.3


def build(*, separate: bool = False, lora: bool = False) -> Policy:
    """A float64 policy with a critic that says something."""
    lm = transformer("llama").double()
    critic = None
    if separate:
        critic = SeparateCritic(copy.deepcopy(lm.base_model), torch.nn.Linear(32, 1).double(), torch.float64)
    if lora:
        lm = add_lora(lm, LoraConfig(rank=2), seed=0)
        for name, parameter in lm.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()
    policy = Policy(LanguageModel(lm, torch.float64), critic).double()
    randomize(critic.head if critic else policy.value_head)
    return policy.train()


def rollout(rows: Rows) -> Rollout:
    """Numbers such that tokens fall on every side of every clip."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        now = build()(rows, temperature=TEMPERATURE)
    noise = [torch.randn(now.values.shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    mask = rows.response_mask
    return Rollout(
        rows, now.logprobs + 0.3 * noise[0], now.logprobs + noise[1], now.values + 0.5 * noise[2],
        noise[3] * mask, noise[3] * mask, now.values + noise[4],
    )  # fmt: skip


def gradients(policy: Policy) -> dict[str, torch.Tensor]:
    named = policy.policy_parameters() + policy.critic_parameters()
    found = {name: p.grad.clone() for name, p in named}
    for _, p in named:
        p.grad = None
    return found


def assert_equal(got, want) -> None:
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        assert_close(got[name], gradient, atol=1e-6, rtol=0, msg=name)


KINDS = {
    "shared head": ({}, {}),
    "separate critic": ({"separate": True}, {}),
    "KL in the loss": ({}, {"kl": KLConfig(place="loss")}),
    "entropy bonus": ({}, {"entropy_coef": 0.2}),
    "asymmetric clip, no value clip": ({}, {"clip": 0.1, "clip_high": 0.4, "value_clip": None}),
    "adapters": ({"lora": True}, {"entropy_coef": 0.2, "kl": KLConfig(place="loss")}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_objective_written_out_token_by_token(kind):
    how, settings = KINDS[kind]
    policy, batch, ppo = build(**how), rollout(ragged_rows()), PPOSection(value_coef=0.1, **settings)
    rows = batch.rows
    low, high = ppo.clip, ppo.clip if ppo.clip_high is None else ppo.clip_high
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for i, (p, r) in enumerate(zip(rows.prompt_lengths.tolist(), rows.response_lengths.tolist(), strict=True)):
        ids = rows.tokens[i : i + 1, : p + r]
        log_p = torch.log_softmax(policy.lm(input_ids=ids).logits[0] / TEMPERATURE, -1)
        trunk, head = (
            (policy.critic.trunk, policy.critic.head)
            if policy.critic
            else (policy.model.hf_model.base_model, policy.value_head)
        )
        values = head(trunk(input_ids=ids).last_hidden_state[0]).squeeze(-1)
        for t in range(r):
            tokens += 1
            new, value = log_p[p + t - 1, ids[0, p + t]], values[p + t - 1]
            old, ref, advantage, old_value, target = (
                getattr(batch, name)[i, t]
                for name in ("old_logprobs", "ref_logprobs", "advantages", "values", "returns")
            )
            ratio = torch.exp(new - old)
            loss = loss - torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
            error = (value - target) ** 2
            if ppo.value_clip is not None:
                near = old_value + (value - old_value).clamp(-ppo.value_clip, ppo.value_clip)
                error = torch.maximum(error, (near - target) ** 2)
            loss = loss + ppo.value_coef * error / 2
            entropy = -(log_p[p + t - 1].exp() * log_p[p + t - 1]).sum()
            loss = loss - ppo.entropy_coef * entropy
            if ppo.kl.place == "loss":
                loss = loss + BETA * (new - ref) ** 2 / 2
    (loss / tokens).backward()
    want = gradients(policy)

    accumulate(policy, batch, ppo, kl_coef=BETA, temperature=TEMPERATURE)
    assert_equal(gradients(policy), want)


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_padding_and_checkpointing_change_no_gradient(kind):
    how, settings = KINDS[kind]
    batch = rollout(ragged_rows((5, 1, 12, 3, 7), (6, 14, 3, 1, 9)))
    policy = build(**how)

    def run(batch: Rollout, microbatch_tokens: int):
        ppo = PPOSection(value_coef=0.1, microbatch_tokens=microbatch_tokens, **settings)
        metrics, logprobs = accumulate(policy, batch, ppo, kl_coef=BETA, temperature=TEMPERATURE)
        return metrics, logprobs, gradients(policy)

    metrics, logprobs, want = run(batch, 1000)
    for microbatch_tokens in (1, 32, 50):  # a row at a time, two, three
        again, others, got = run(batch, microbatch_tokens)
        assert_equal(got, want)
        assert again == pytest.approx(metrics, abs=1e-9)
        assert_close(others, logprobs, atol=1e-9, rtol=0)

    garbage = torch.randint(VOCABULARY, (len(batch.rows), batch.rows.tokens.shape[1] + 6))
    for row, length in enumerate((batch.rows.prompt_lengths + batch.rows.response_lengths).tolist()):
        garbage[row, :length] = batch.rows.tokens[row, :length]
    padded = dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, tokens=garbage))
    assert_equal(run(padded, 1000)[2], want)

    for module in [policy.lm] + ([policy.critic.trunk] if policy.critic else []):
        checkpoint_activations(module)
    passes = count_passes(policy.model.hf_model.base_model.layers[0].mlp)
    assert_equal(run(batch, 1000)[2], want)
    assert len(passes) == 2  # the second, in the backward pass, is what checkpointing is


def count_passes(module: torch.nn.Module) -> list[None]:
    passes: list[None] = []
    module.register_forward_pre_hook(lambda *_: passes.append(None))
    return passes


def test_in_value_warm_up_only_the_critic_gets_a_gradient():
    batch = rollout(ragged_rows())
    for separate in (False, True):
        policy = build(separate=separate)
        policy.critic_only = True
        accumulate(policy, batch, PPOSection(entropy_coef=0.1), kl_coef=BETA, temperature=TEMPERATURE)
        assert all(p.grad is None for _, p in policy.policy_parameters())
        assert all(p.grad is not None for _, p in policy.critic_parameters())


def test_an_extreme_ratio_costs_much_but_stays_finite():
    batch = rollout(ragged_rows())
    lost = dataclasses.replace(batch, old_logprobs=batch.old_logprobs - 1000.0, advantages=-batch.advantages.abs())
    metrics, _ = accumulate(build(), lost, PPOSection(), kl_coef=0.0, temperature=TEMPERATURE)
    assert math.isfinite(metrics["policy/loss"])
    assert metrics["policy/loss"] > 1e6
