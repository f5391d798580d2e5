"""The squared soft-Bellman residual: the gradients of a step, and what V makes of every token.

Log-probs of the policy are the advantages, its value head is V; why the minimum is PPO's optimum is in
`tether.math.bellman`. The loop is `tether.train.qlearning`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from tether.config import QLearningConfig, QLearningSection
from tether.data.scored import ScoredResponse, as_completions, scored_microbatches
from tether.distributed.ranks import ALONE, Ranks
from tether.math import bellman_loss, explained_variance, gae, grouped_std, place_rewards
from tether.models.policy import Policy
from tether.rewards import ScoredBatch
from tether.runs import RunDirectory
from tether.train.reference import reference_logprobs
from tether.train.rollout import Experience
from tether.types import Rollout


class Bellman:
    """What `qlearning.loss: bellman` brings to the loop: see `tether.train.qlearning.Objective`."""

    def __init__(
        self, policy: Policy, answers: Sequence[ScoredResponse], config: QLearningConfig, ranks: Ranks
    ) -> None:
        self.policy, self.answers, self.model, self.section = policy, answers, config.model, config.qlearning
        self.ranks = ranks
        self.references = list[Tensor]()  # [R] of each answer, nats

    def parts(self) -> dict[str, Any]:
        return {}

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self.policy.critic_parameters()

    def prepare(self, run: RunDirectory, inputs: Mapping[str, str]) -> None:
        self.references = reference_logprobs(
            run, self.policy.model, self.model, [(a.prompt.ids, a.response_ids) for a in self.answers], inputs,
            microbatch_tokens=self.section.microbatch_tokens, ranks=self.ranks,
        )  # fmt: skip

    def accumulate(self, batch: list[int]) -> dict[str, float | None]:
        return accumulate(self.policy, *self._of(batch), self.section, self.ranks)

    def after_step(self, step: int) -> None:
        pass

    def inspect(self, which: Sequence[int]) -> tuple[Experience, None]:
        return inspect_answers(self.policy, *self._of(which), self.section), None

    def save(self, final: Path) -> None:
        self.policy.save_critic(final / "critic")

    def _of(self, which: Sequence[int]) -> tuple[list[ScoredResponse], list[Tensor]]:
        return [self.answers[i] for i in which], [self.references[i] for i in which]


def accumulate(
    policy: Policy,
    answers: Sequence[ScoredResponse],
    references: Sequence[Tensor],
    section: QLearningSection,
    ranks: Ranks = ALONE,
) -> dict[str, float | None]:
    """Add one optimizer step's gradients to the policy's, microbatch by microbatch; no step. Returns its metrics.

    references: the reference's log-prob of every token of each answer.
    """
    tokens = sum(len(answer.response_ids) for answer in answers)
    losses, residuals, values = list[Tensor](), list[Tensor](), list[Tensor]()  # each [] or [N] of a microbatch
    log_ratio_sums = torch.zeros(len(answers), device=policy.model.device)
    device = policy.model.device
    for index, counts, rows, scores in scored_microbatches(answers, section.microbatch_tokens, device, ranks):
        mask, ref = rows.response_mask, _padded(references, index).to(policy.model.device)
        output = policy(rows, temperature=1.0, entropy=False)
        assert output.values is not None
        loss, residual = bellman_loss(
            output.logprobs, ref, output.values, scores, mask,
            kl_coef=section.beta, lam=section.lam, denominator=tokens,
        )  # fmt: skip
        (loss if counts else 0.0 * loss).backward()
        if not counts:
            continue
        losses.append(loss.detach())
        residuals.append(residual.detach()[mask])
        values.append(output.values.detach()[mask])
        log_ratio_sums[index] = (output.logprobs.detach() - ref).sum(1)  # both are 0 outside the mask
    residual, value = ranks.cat(residuals), ranks.cat(values)
    log_ratios = ranks.sum(log_ratio_sums)[0].cpu()
    scores = torch.tensor([answer.score for answer in answers])
    every = torch.ones_like(value, dtype=torch.bool)[None]
    g = scores - section.beta * log_ratios
    return {
        "qlearning/loss": float(ranks.cat([loss[None] for loss in losses]).sum()),
        "qlearning/residual": float(residual.square().mean().sqrt()),
        "qlearning/g_std": grouped_std(g, [answer.prompt.row for answer in answers]),
        "qlearning/log_ratio": float(log_ratios.mean()),
        "value/mean": float(value.mean()),
        "value/explained_variance": explained_variance(value[None], (value + residual)[None], every),
        "tokens/trained": float(tokens),
    }


def _padded(references: Sequence[Tensor], index: Tensor) -> Tensor:
    """[B, R] of the answers at `index`, 0 outside the mask."""
    return pad_sequence([references[i] for i in index.tolist()], batch_first=True)


@torch.no_grad()
def inspect_answers(
    policy: Policy, answers: Sequence[ScoredResponse], references: Sequence[Tensor], section: QLearningSection
) -> Experience:
    """What the policy and V make of every token of these answers, as a cycle of PPO would have found it."""
    completions = as_completions(answers)
    rows = completions.rows()
    mask = rows.response_mask
    new, entropy, values = (torch.zeros(mask.shape) for _ in range(3))
    for index, _, part, _ in scored_microbatches(answers, section.microbatch_tokens, policy.model.device):
        output, width = policy(part, temperature=1.0), part.response_mask.shape[1]
        assert output.values is not None
        for whole, found in ((new, output.logprobs), (entropy, output.entropy), (values, output.values)):
            whole[index, :width] = found.cpu()
    ref = pad_sequence(list(references), batch_first=True)
    scores = torch.tensor([a.score for a in answers])
    rewards = place_rewards(scores, new, ref, mask, kl_coef=section.beta)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=section.lam)
    rollout = Rollout(rows, new, ref, values, rewards, advantages, returns)
    return Experience(completions, ScoredBatch(scores, {}), rollout, advantages, entropy, section.beta, {}, [])
