"""Phase 2 of a cycle: epochs × minibatches of the clipped objective."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.config import PPOSection
from tether.distributed.ranks import ALONE, Ranks
from tether.errors import TrainingError
from tether.math import cispo_loss, clipped_policy_loss, entropy_mean, kl_loss, value_loss
from tether.models.policy import Policy
from tether.runs.bounds import FIRST_RATIO_MAX_FLOAT32, FIRST_RATIO_MEAN, FIRST_RATIO_STOP
from tether.train.memory import peak_mb
from tether.train.optim import RESTART_HINT, SHUFFLE, ScheduledOptimizer, permutation, read_numbers
from tether.train.rollout import Metrics
from tether.types import Rollout


@dataclass(frozen=True, slots=True)
class Update:
    metrics: Metrics
    new_logprobs: Tensor  # [B, R] nats, from the last epoch's own passes
    alarms: list[tuple[str, str]]  # self-checks out of bounds, steps that were skipped: rule, text


def update(
    policy: Policy, steps: ScheduledOptimizer, rollout: Rollout, ppo: PPOSection,
    *, cycle: int, kl_coef: float, temperature: float, seed: int,
    progress: Callable[[str], None] = lambda _: None, ranks: Ranks = ALONE,
) -> Update:  # fmt: skip
    """Maximize the clipped objective over the cycle's rollout; changes `policy` and the optimizer in place.

    Every metric is taken before its minibatch's step and averaged over the cycle by tokens. Raises TrainingError when
    gradients stay not finite, or when the first ratio of the cycle is not 1.
    """
    began = time.perf_counter()
    per_epoch = len(rollout.rows) // ppo.minibatch
    new_logprobs = rollout.old_logprobs.clone()
    done: list[tuple[dict[str, float], float]] = []  # metrics and tokens of every minibatch
    first_ratio_error = 0.0
    alarms: list[tuple[str, str]] = []
    policy.critic_only = cycle <= ppo.value_warmup_cycles

    for epoch in range(ppo.epochs):
        progress(f"updating, epoch {epoch + 1} of {ppo.epochs}")
        order = permutation(len(rollout.rows), seed=seed, stream=SHUFFLE, counter=(cycle, epoch))
        for m in range(per_epoch):
            chosen = sorted(order[m * ppo.minibatch : (m + 1) * ppo.minibatch])
            index = torch.tensor(chosen)
            minibatch = rollout.select(index)
            metrics, logprobs = accumulate(
                policy, minibatch, ppo, kl_coef=kl_coef, temperature=temperature, ranks=ranks
            )
            new_logprobs[index, : logprobs.shape[1]] = logprobs
            if epoch == m == 0:
                first_ratio_error = _check_first_ratio(logprobs, minibatch, policy, alarms)

            step = ((cycle - 1) * ppo.epochs + epoch) * per_epoch + m
            metrics |= steps.step(step)
            if steps.skipped:
                alarms.append(("skipped-steps", f"optimizer step {step} skipped: its gradient is not finite"))
            steps.stop_if_broken()
            done.append((metrics, float(minibatch.rows.response_lengths.sum())))
        if ppo.stop_epoch_at_kl is not None and _means(done[-per_epoch:])["policy/kl_old_new"] > ppo.stop_epoch_at_kl:
            break

    policy.critic_only = False
    seconds = time.perf_counter() - began
    return Update(
        {
            **_means(done),
            "check/first_ratio_error": first_ratio_error,
            **({} if ppo.stop_epoch_at_kl is None else {"optim/steps": len(done)}),
            "optim/skipped_steps": sum(int(metrics["optim/skipped_steps"]) for metrics, _ in done),
            "time/update_s": seconds,
            "tokens_per_s/update": sum(tokens for _, tokens in done) / max(seconds, 1e-9),
            "memory/peak_mb": peak_mb(policy.model.device),
        },
        new_logprobs,
        alarms,
    )


def accumulate(
    policy: Policy, minibatch: Rollout, ppo: PPOSection, *, kl_coef: float, temperature: float, ranks: Ranks = ALONE
) -> tuple[dict[str, float], Tensor]:
    """Add one minibatch's gradients to the policy's, microbatch by microbatch; no step. Each rank adds those of its own
    rows.

        L = L_policy + c1·L_value - c2·entropy  [+ β·k2 when the KL is in the loss; without L_value where no critic is]

    Every sum is divided by the tokens of the whole minibatch, so how it is cut into microbatches changes nothing. The
    policy's loss is divided by those tokens that it can learn from: a group of equal responses dilutes no other.
    Returns (the minibatch's metrics, new log-probs [B, R]).
    """
    rows = minibatch.rows
    denominator = float(rows.response_lengths.sum())
    share = denominator / max(1.0, _live_tokens(minibatch, ppo))
    surrogate = cispo_loss if ppo.surrogate == "cispo" else clipped_policy_loss
    found: list[dict[str, Tensor]] = []  # metrics of each microbatch
    new_logprobs = torch.zeros_like(minibatch.old_logprobs)
    for index, counts in ranks.deal(rows.prompt_lengths + rows.response_lengths, ppo.microbatch_tokens):
        part = minibatch.select(index)
        mask = part.rows.response_mask
        output = policy(part.rows, temperature=temperature)
        terms, value_metrics = [], dict[str, Tensor]()
        if output.values is not None and part.values is not None and part.returns is not None:
            loss_value, value_metrics = value_loss(
                output.values, part.values, part.returns, mask, clip=ppo.value_clip, denominator=denominator
            )
            terms.append(ppo.value_coef * loss_value)
        loss_policy, policy_metrics = surrogate(
            output.logprobs, part.old_logprobs, part.advantages, mask, clip=ppo.clips, denominator=denominator
        )
        entropy = entropy_mean(output.entropy, mask, denominator=denominator)
        if not policy.critic_only:
            terms.append(share * loss_policy)
            if ppo.entropy_coef:  # only then is its gradient worth the work
                terms.append(-ppo.entropy_coef * entropy)
            if ppo.kl.place == "loss":
                terms.append(kl_coef * kl_loss(output.logprobs, part.ref_logprobs, mask, denominator=denominator))
        loss = sum(terms[1:], terms[0])
        (loss if counts else 0.0 * loss).backward()
        if counts:
            found.append({**policy_metrics, **value_metrics, "policy/entropy": entropy.detach()})
            new_logprobs[index, : mask.shape[1]] = output.logprobs.detach()
    metrics: dict[str, float] = {}
    for part_metrics in ranks.gather(read_numbers(found)):
        _merge(metrics, part_metrics)
    (new_logprobs,) = ranks.sum(new_logprobs)
    return metrics, new_logprobs


def _live_tokens(minibatch: Rollout, ppo: PPOSection) -> float:
    """Tokens of the responses that differ from the others to their prompt; all of them where there are no groups."""
    lengths = minibatch.rows.response_lengths
    if ppo.advantage != "group":
        return float(lengths.sum())
    return float(lengths[(minibatch.advantages != 0).any(1).cpu()].sum())


def _means(minibatches: list[tuple[dict[str, float], float]]) -> dict[str, float]:
    """Averages of the metrics, by tokens."""
    tokens, total = sum(count for _, count in minibatches), dict[str, float]()
    for metrics, count in minibatches:
        _merge(total, metrics, weight=count / tokens)
    return total


def _merge(total: dict[str, float], part: Mapping[str, float], *, weight: float = 1.0) -> None:
    """Add `part` to `total`, weighted; extremes combine as extremes."""
    for name, x in part.items():
        if name.endswith(("_min", "_max")):
            total[name] = (min if name.endswith("_min") else max)(total.get(name, x), x)
        else:
            total[name] = total.get(name, 0.0) + weight * x


def _check_first_ratio(logprobs: Tensor, minibatch: Rollout, policy: Policy, alarms: list[tuple[str, str]]) -> float:
    """Before anything is learned the ratio must be 1: anything else is a bug, in us or in a kernel. Mean of |ρ - 1|."""
    mask = minibatch.rows.response_mask
    error = ((logprobs - minibatch.old_logprobs)[mask].exp() - 1).abs()
    mean, largest = float(error.mean()), float(error.max())
    if mean > FIRST_RATIO_STOP:
        raise TrainingError(
            f"the first ratio of the cycle is off 1 by {mean:.2g} on average: old and new log-probs come from "
            f"different arithmetic, and the objective would be wrong. Please report it; and set model.dtype to float32 "
            f"and {RESTART_HINT}."
        )
    precise = policy.model.dtype == torch.float32
    bound = FIRST_RATIO_MEAN["float32" if precise else "bfloat16"]
    if mean > bound or (precise and largest > FIRST_RATIO_MAX_FLOAT32):
        alarms.append(("first-ratio", f"the first ratio is off 1 by {mean:.2g} on average, {largest:.2g} at most"))
    return mean
