"""Phase 1 of a cycle: from prompts to completions, scores, values and advantages."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tether.config import PPOSection
from tether.distributed.ranks import ALONE, Ranks
from tether.errors import BatchError, TrainingError
from tether.math import (
    distinct_pairs,
    explained_variance,
    gae,
    group_advantages,
    importance_weights,
    masked_mean,
    masked_var,
    optimality_gap,
    place_rewards,
    shared_phrase,
    whiten,
)
from tether.models.policy import Policy, Reference
from tether.rewards import RewardSet, ScoredBatch
from tether.runs.bounds import SAMPLER_GAP
from tether.types import Completions, Prompt, Rollout, Rows, Sampler, Sampling

Metrics = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Experience:
    """What a cycle's phase 1 found: all that phase 2 and the rollout file need."""

    completions: Completions
    scored: ScoredBatch
    rollout: Rollout
    advantages: Tensor  # [B, R] reward units, before whitening
    entropy: Tensor  # [B, R] nats, of the policy as it was when the cycle began
    kl_coef: float  # β of the cycle, reward units per nat
    metrics: Metrics
    alarms: list[tuple[str, str]]  # self-checks out of bounds: rule, text

    def evaluation_metrics(self, gold: Mapping[str, Sequence[float | None]]) -> Metrics:
        """The metrics of an evaluation, eval/*. gold: name of a gold source -> its score of each response."""
        m = self.metrics
        sums = ("score_mean", "score_std", "score_min", "score_max", "total_mean")
        sources = [f"reward/{name}_mean" for name in self.scored.parts]  # one may be called `length`
        sources += [f"reward/{name}_disagreement" for name in self.scored.disagreement]
        own = ("kl/ref_mean", "response/length_mean", "response/truncated_fraction", "value/explained_variance")
        return (
            {f"eval/{name}": m[f"reward/{name}"] for name in sums}
            | {f"eval/{name}": m[name] for name in sources}
            | {f"eval/{name.replace('kl/', 'kl_').rpartition('/')[2]}": m[name] for name in own if name in m}
            | {f"eval/gold/{name}_mean": _mean_of_answers(answers) for name, answers in gold.items()}
        )


def collect(
    prompts: Sequence[Prompt], sampler: Sampler, reward: RewardSet, policy: Policy, reference: Reference,
    sampling: Sampling, ppo: PPOSection, *, kl_coef: Callable[[Tensor, Tensor], float], cycle: int,
    drawn: Completions | None = None, lagged: bool = False, phase: str = "",
    progress: Callable[[str], None] = lambda _: None, ranks: Ranks = ALONE,
) -> Experience:  # fmt: skip
    """Sample, score, value, and turn all three into advantages, whitened over the cycle's counted tokens.

    Each rank samples, values and, by reward models, scores its part; rank 0 asks all other sources, those on other
    machines while values are computed. The experience is the same on all ranks.

    kl_coef: β, from the cycle's scores [B] and sums of log π - log ref [B], π the policy that sampled.
    drawn: the responses, where they were sampled already. lagged: by the policy of one update before
        (`tether.train.ahead`).
    phase: see `RewardSet.asking`; by default the cycle.
    """
    clock = _Clock()
    progress("sampling")
    completions = drawn or sample(prompts, sampler, sampling, cycle=cycle, ranks=ranks)
    clock.lap("time/rollout_s")

    progress("valuing")  # and other machines score meanwhile
    rows = completions.rows().to(policy.model.device)
    mask = rows.response_mask
    with reward.asking(completions, phase or f"cycle-{cycle:06d}", ranks=ranks) as scores:
        old, entropy, ref, values = value(rows, policy, reference, sampling, ppo, ranks)
        clock.lap("time/forward_s")
        progress("scoring")
        scored = scores()
    clock.lap("time/score_s")

    sampled = torch.zeros_like(old)
    sampled[mask] = torch.tensor([x for row in completions.sampler_logprobs for x in row], device=mask.device)
    # Of the policy that sampled: over its samples log π/ref has the mean KL(μ‖ref) - KL(μ‖π), which may be negative and
    # falls as steps grow, and β would fall with it.
    log_ratios = (sampled if lagged else old) - ref
    log_ratio_sums = (log_ratios * mask).sum(1)
    beta = kl_coef(scored.scores, log_ratio_sums)
    in_reward = beta if ppo.kl.place == "reward" else 0.0
    last = scored.scores.to(old)
    rewards = place_rewards(last, old, ref, mask, kl_coef=in_reward)
    _check_placement(rewards, -in_reward * (old - ref), last, rows.response_lengths.to(mask.device))
    advantages, returns = estimate(rewards, values, mask, ppo, responses_per_prompt=sampling.responses_per_prompt)
    learned = whiten(advantages, mask) if ppo.whitens else advantages
    lag: Metrics = {}
    if lagged:  # both surrogates are linear in the advantage for a weight that is not negative
        weights = importance_weights(old, sampled, mask, cap=ppo.ahead_cap)
        learned = learned * weights
        lag = {
            "ahead/kl": float(masked_mean(sampled - old, mask)),
            "ahead/weight_mean": float(masked_mean(weights, mask)),
            "ahead/capped_fraction": float(masked_mean((weights >= ppo.ahead_cap).float(), mask)),
        }
    rollout = Rollout(rows, old, ref, values, rewards, learned, returns)

    gap = None
    exact = not lagged and ppo.gamma == 1 and ppo.entropy_coef == 0 and not sampling.top_k and sampling.top_p == 1
    if exact and in_reward > 0 and sampling.responses_per_prompt >= 2:
        gap = optimality_gap(
            scored.scores, log_ratio_sums.cpu(), responses_per_prompt=sampling.responses_per_prompt, kl_coef=in_reward
        )
    critic: Metrics = {}
    if values is not None and returns is not None:
        critic["value/explained_variance"] = explained_variance(values, returns, mask)
    cut = [x for row in completions.truncated_mass for x in row]
    lengths = rows.response_lengths.float()
    metrics: Metrics = {
        "reward/score_mean": float(scored.scores.mean()),
        "reward/score_std": float(scored.scores.std(correction=0)),
        "reward/score_min": float(scored.scores.min()),
        "reward/score_max": float(scored.scores.max()),
        **{f"reward/{name}_mean": _mean_of_answers(answers) for name, answers in scored.parts.items()},
        **{f"reward/{name}_missing": float(count) for name, count in scored.missing.items()},
        **{f"reward/{name}_disagreement": sum(found) / len(found) for name, found in scored.disagreement.items()},
        "reward/total_mean": float(rewards.sum(1).mean()),
        "kl/ref_mean": float(log_ratio_sums.mean()),
        "kl/ref_per_token": float(masked_mean(log_ratios, mask)),
        "kl/coef": beta,
        "policy/optimality_gap": gap,
        **critic,
        "advantage/mean": float(masked_mean(advantages, mask)),
        "advantage/std": float(masked_var(advantages, mask).sqrt()),
        **_of_the_groups(advantages, ppo, sampling.responses_per_prompt),
        "response/length_mean": float(lengths.mean()),
        "response/length_min": float(lengths.min()),
        "response/length_max": float(lengths.max()),
        "response/truncated_fraction": completions.finish_reasons.count("length") / len(completions),
        "response/distinct_2": distinct_pairs(completions.response_ids),
        "response/shared_phrase": shared_phrase(completions.response_ids),
        "check/sampler_gap": None if lagged else float(masked_mean((old - sampled).abs(), mask)),
        "check/truncated_mass": sum(cut) / len(cut),
        "tokens/generated": float(lengths.sum()),
        "tokens_per_s/rollout": None if drawn else float(lengths.sum()) / max(clock.laps["time/rollout_s"], 1e-9),
        **lag,
        **clock.laps,
    }
    # The engine and the trainer must give the same tokens the same log-probs, up to rounding, for the same weights.
    sampler_gap = metrics["check/sampler_gap"] or 0.0
    bound = SAMPLER_GAP["float32" if policy.model.dtype == torch.float32 else "bfloat16"]
    alarms = []
    if sampler_gap > bound:
        alarms.append(("sampler-gap", f"sampler gap {sampler_gap:.2g} nats per token, above {bound}"))
    return Experience(completions, scored, rollout, advantages, entropy, beta, metrics, alarms)


def sample(
    prompts: Sequence[Prompt], sampler: Sampler, sampling: Sampling, *, cycle: int, ranks: Ranks = ALONE
) -> Completions:
    """`responses_per_prompt` responses to each prompt, in order; each rank draws those to its part of the prompts."""
    return gather_responses(sample_part(prompts, sampler, sampling, cycle=cycle, ranks=ranks), prompts, sampling, ranks)


def sample_part(
    prompts: Sequence[Prompt], sampler: Sampler, sampling: Sampling, *, cycle: int, ranks: Ranks
) -> Completions:
    """This rank's part of `sample`; no other rank is spoken to."""
    mine, count = ranks.span(len(prompts)), sampling.responses_per_prompt
    asked = prompts[mine.start : mine.stop]
    if not asked:  # more ranks than prompts
        found = Completions([], [], [], [], [])
    elif ranks.size == 1:
        found = sampler.generate(asked, sampling, cycle=cycle)
    else:
        found = sampler.generate(asked, sampling, cycle=cycle, first=mine.start * count)
    if [p.row for p in found.prompts] != [p.row for p in asked for _ in range(count)]:
        raise BatchError(
            f"the sampler gave {len(found)} responses to other prompts, or in another order, than the "
            f"{len(asked)} × {count} that it was asked for: scores would go astray."
        )
    return found


def gather_responses(part: Completions, prompts: Sequence[Prompt], sampling: Sampling, ranks: Ranks) -> Completions:
    """The responses of all ranks' parts."""
    if ranks.size == 1:
        return part
    rows = zip(part.response_ids, part.sampler_logprobs, part.truncated_mass, part.finish_reasons, strict=True)
    columns = zip(*ranks.gather(list(rows)), strict=True)
    return Completions([p for p in prompts for _ in range(sampling.responses_per_prompt)], *map(list, columns))


def value(
    rows: Rows, policy: Policy, reference: Reference, sampling: Sampling, ppo: PPOSection, ranks: Ranks = ALONE
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(log-probs, entropy, the reference's log-probs, values where there is a critic) of every token, each [B, R] and 0
    outside the mask; each rank computes its part of the rows."""
    mask = rows.response_mask
    old, entropy, ref = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))
    values = torch.zeros_like(old) if policy.has_critic else None
    for index, counts in ranks.deal(rows.prompt_lengths + rows.response_lengths, ppo.microbatch_tokens):
        part = rows.select(index)
        width = part.response_mask.shape[1]
        with torch.no_grad():
            output = policy(part, temperature=sampling.temperature)
        ref_logprobs = reference.logprobs(part, temperature=sampling.temperature)
        if not counts:
            continue
        old[index, :width], entropy[index, :width] = output.logprobs, output.entropy
        if values is not None:
            values[index, :width] = output.values
        ref[index, :width] = ref_logprobs
    old, entropy, ref, *of_critic = ranks.sum(old, entropy, ref, *([] if values is None else [values]))
    return old, entropy, ref, of_critic[0] if of_critic else None


def estimate(
    rewards: Tensor, values: Tensor | None, mask: Tensor, ppo: PPOSection, *, responses_per_prompt: int
) -> tuple[Tensor, Tensor | None]:
    """(advantages [B, R] in reward units, not whitened; the critic's returns [B, R], None where there is no critic)."""
    if values is None:
        g = rewards.sum(1)  # rewards are 0 outside the mask
        if ppo.advantage == "group" and responses_per_prompt > 1:  # an evaluation may take one sample
            g = group_advantages(g, responses_per_prompt=responses_per_prompt, std=ppo.group_std)
        else:
            g = g - g.mean()
        return torch.where(mask, g[:, None], 0.0), None
    lam, critic_lam = ppo.lams
    advantages, returns = gae(rewards, values, mask, gamma=ppo.gamma, lam=lam)
    if critic_lam != lam:
        _, returns = gae(rewards, values, mask, gamma=ppo.gamma, lam=critic_lam)
    return advantages, returns


def _of_the_groups(advantages: Tensor, ppo: PPOSection, responses_per_prompt: int) -> Metrics:
    """Prompts whose responses are all worth the same: nothing is learned from them."""
    if ppo.advantage != "group":
        return {}
    dead = (advantages == 0).all(1).view(-1, responses_per_prompt).all(1)
    return {"advantage/dead_groups": float(dead.sum())}


def _check_placement(rewards: Tensor, penalties: Tensor, scores: Tensor, lengths: Tensor) -> None:
    """Before anything is learned from them: a row's rewards [B, R] are the KL's penalties [B, R] and, on its last
    token, its score.

    One past the stop token, where some implementations put it, the score would be masked and lost. Sums are compared,
    not differences: of a penalty of thousands the rounding alone would look like a score.
    """
    want = penalties.scatter_add(1, lengths[:, None] - 1, scores[:, None])
    wrong = ~torch.isclose(rewards, want, rtol=1e-5, atol=1e-3, equal_nan=True)
    if wrong.any():
        row, t = wrong.nonzero()[0].tolist()
        raise TrainingError(
            f"the reward of token {t} of response {row} is off by {float((rewards - want)[row, t]):.3g}: the score "
            "is not on the last token, and the policy would learn something else. Please report it."
        )


def _mean_of_answers(answers: Sequence[float | None]) -> float | None:
    given = [a for a in answers if a is not None]
    return sum(given) / len(given) if given else None


class _Clock:
    """Seconds of each part of a phase."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
