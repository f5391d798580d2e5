"""Phase 2 of a cycle: epochs × minibatches of the clipped objective."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.batch import Rollout, microbatches
from tether.config import OptimConfig, PPOSection
from tether.errors import TrainingError
from tether.math import clipped_policy_loss, entropy_mean, kl_loss, value_loss
from tether.model import Policy
from tether.train.experience import Metrics
from tether.train.optim import MAX_SKIPPED_IN_A_ROW, SHUFFLE, permutation, set_lr, step_if_finite


@dataclass(frozen=True, slots=True)
class Update:
    """What phase 2 did."""

    metrics: Metrics
    new_logprobs: Tensor  # [B, R] nats, from the last epoch's own passes
    alarms: list[str]  # self-checks out of bounds, steps that were skipped


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout,
    ppo: PPOSection, optim: OptimConfig, *, cycle: int, kl_coef: float, temperature: float, seed: int,
) -> Update:  # fmt: skip
    """Maximise the clipped objective over the cycle's rollout; changes `policy` and `optimizer` in place.

    Every metric is taken before its minibatch's step and averaged over the cycle by tokens. The learning rate follows
    from the step's number in the whole run, so nothing of the schedule needs saving.

    Raises TrainingError when gradients stay not finite, or when the first ratio of the cycle is not 1.
    """
    began = time.perf_counter()
    steps = len(rollout.rows) // ppo.minibatch
    step = (cycle - 1) * ppo.epochs * steps
    total = ppo.cycles * ppo.epochs * steps
    new_logprobs = rollout.old_logprobs.clone()
    averages, first_ratio_error, skipped, tokens_done = _Averages(), 0.0, 0, 0
    alarms: list[str] = []
    policy.critic_only = cycle <= ppo.value_warmup_cycles

    for epoch in range(ppo.epochs):
        order = permutation(len(rollout.rows), seed=seed, stream=SHUFFLE, counter=(cycle, epoch))
        epoch_kl, epoch_tokens = 0.0, 0.0
        for m in range(steps):
            chosen = sorted(order[m * ppo.minibatch : (m + 1) * ppo.minibatch])
            index = torch.tensor(chosen, device=rollout.values.device)
            minibatch = rollout.select(index)
            metrics, logprobs = accumulate(policy, minibatch, ppo, kl_coef=kl_coef, temperature=temperature)
            new_logprobs[index, : logprobs.shape[1]] = logprobs
            if epoch == m == 0:
                first_ratio_error = _check_first_ratio(logprobs, minibatch, policy, alarms)

            metrics["optim/lr"] = set_lr(optimizer, optim, step + epoch * steps + m, total)
            metrics["optim/grad_norm"], finite = step_if_finite(optimizer, optim.max_grad_norm)
            skipped += not finite
            policy.skipped_in_a_row = 0 if finite else policy.skipped_in_a_row + 1
            if not finite:
                alarms.append(f"optimiser step {step + epoch * steps + m} skipped: its gradient is not finite")
            if policy.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise TrainingError(
                    f"the gradients of {MAX_SKIPPED_IN_A_ROW} optimiser steps in a row are not finite: nothing can be "
                    "learned any more. Lower optim.lr, or look at the scores in the cycle's rollout file."
                )
            tokens = float(minibatch.rows.response_lengths.sum())
            averages.add(metrics, tokens)
            epoch_kl, epoch_tokens = epoch_kl + metrics["policy/kl_old_new"] * tokens, epoch_tokens + tokens
            tokens_done += int(tokens)
        if ppo.stop_epoch_at_kl is not None and epoch_kl / epoch_tokens > ppo.stop_epoch_at_kl:
            break

    policy.critic_only = False
    seconds = time.perf_counter() - began
    return Update(
        {
            **averages.means(),
            "check/first_ratio_error": first_ratio_error,
            "optim/skipped_steps": skipped,
            "time/update_s": seconds,
            "tokens_per_s/update": tokens_done / max(seconds, 1e-9),
        },
        new_logprobs,
        alarms,
    )


def accumulate(
    policy: Policy, minibatch: Rollout, ppo: PPOSection, *, kl_coef: float, temperature: float
) -> tuple[dict[str, float], Tensor]:
    """Add one minibatch's gradients to the policy's, microbatch by microbatch; no step.

        L = L_policy + c1·L_value - c2·entropy  [+ β·k2 when the KL is in the loss]

    Every sum is divided by the tokens of the whole minibatch, so how it is cut into microbatches changes nothing.
    Returns (the minibatch's metrics, new log-probs [B, R]).
    """
    rows = minibatch.rows
    denominator = float(rows.response_lengths.sum())
    clip = (ppo.clip[0], ppo.clip[-1]) if isinstance(ppo.clip, list) else ppo.clip
    metrics: dict[str, float] = {}
    new_logprobs = torch.zeros_like(minibatch.old_logprobs)
    for index in microbatches(rows.prompt_lengths + rows.response_lengths, ppo.microbatch_tokens):
        part = minibatch.select(index)
        mask = part.rows.response_mask
        output = policy(part.rows, temperature=temperature)
        loss_value, value_metrics = value_loss(
            output.values, part.values, part.returns, mask, clip=ppo.value_clip, denominator=denominator
        )
        loss_policy, policy_metrics = clipped_policy_loss(
            output.logprobs, part.old_logprobs, part.advantages, mask, clip=clip, denominator=denominator
        )
        entropy = entropy_mean(output.entropy, mask, denominator=denominator)
        loss = ppo.value_coef * loss_value
        if not policy.critic_only:
            loss = loss + loss_policy
            if ppo.entropy_coef:  # only then is its gradient worth the work
                loss = loss - ppo.entropy_coef * entropy
            if ppo.kl.place == "loss":
                loss = loss + kl_coef * kl_loss(output.logprobs, part.ref_logprobs, mask, denominator=denominator)
        loss.backward()
        _combine(metrics, {**policy_metrics, **value_metrics, "policy/entropy": entropy.detach()})
        new_logprobs[index, : mask.shape[1]] = output.logprobs.detach()
    return metrics, new_logprobs


def _combine(total: dict[str, float], part: dict[str, Tensor]) -> None:
    """Metrics of microbatches add up to the minibatch's; extremes combine as extremes."""
    for name, value in part.items():
        if name.endswith(("_min", "_max")):
            pick = min if name.endswith("_min") else max
            total[name] = pick(total.get(name, float(value)), float(value))
        else:
            total[name] = total.get(name, 0.0) + float(value)


class _Averages:
    """Metrics of minibatches, averaged over the cycle by tokens; extremes stay extremes."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.extremes: dict[str, float] = {}
        self.tokens = 0.0

    def add(self, metrics: dict[str, float], tokens: float) -> None:
        self.tokens += tokens
        for name, value in metrics.items():
            if name.endswith(("_min", "_max")):
                pick = min if name.endswith("_min") else max
                self.extremes[name] = pick(self.extremes.get(name, value), value)
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value * tokens

    def means(self) -> Metrics:
        return {**{name: value / self.tokens for name, value in self.sums.items()}, **self.extremes}


def _check_first_ratio(logprobs: Tensor, minibatch: Rollout, policy: Policy, alarms: list[str]) -> float:
    """Before anything is learned the ratio must be 1: anything else is a bug, in us or in a kernel. Mean of |ρ - 1|."""
    mask = minibatch.rows.response_mask
    error = ((logprobs - minibatch.old_logprobs)[mask].exp() - 1).abs()
    mean, largest = float(error.mean()), float(error.max())
    if mean > 5e-2:
        raise TrainingError(
            f"the first ratio of the cycle is off 1 by {mean:.2g} on average: old and new log-probs come from "
            "different arithmetic, and the objective would be wrong. Set model.dtype to float32, and please report it."
        )
    precise = policy.model.dtype == torch.float32
    if mean > (1e-5 if precise else 1e-2) or (precise and largest > 1e-4):
        alarms.append(f"the first ratio is off 1 by {mean:.2g} on average, {largest:.2g} at most")
    return mean
