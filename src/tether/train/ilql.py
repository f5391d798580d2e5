"""Implicit Q-learning: the gradients of a step, and what its heads make of every token; the loop is Q-learning's own.

What each head learns is in `tether.math.ilql`. There is no reference: what holds the model is that it imitates the
data. Trunk and heads learn together, every loss through the trunk, as in Snell et al. 2022 (arXiv:2206.11871).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tether.config import QLearningConfig, QLearningSection
from tether.data.scored import ScoredResponse, as_completions, scored_microbatches
from tether.distributed.ranks import ALONE, Ranks
from tether.errors import ModelError
from tether.math import expectile_loss, explained_variance, nll_loss, place_rewards, q_loss, q_targets
from tether.models.ilql import FOLDER, HeadOutput, ILQLHeads
from tether.models.policy import Policy, fill
from tether.rewards import ScoredBatch
from tether.runs import RunDirectory
from tether.train.rollout import Experience
from tether.types import Rollout, Rows


class ImplicitQ:
    """What `qlearning.loss: ilql` brings to the loop: see `tether.train.qlearning.Objective`."""

    def __init__(
        self, policy: Policy, answers: Sequence[ScoredResponse], config: QLearningConfig, ranks: Ranks
    ) -> None:
        self.policy, self.answers, self.section, self.ranks = policy, answers, config.qlearning, ranks
        self.heads = build_heads(policy, seed=config.seed)

    def parts(self) -> dict[str, Any]:
        return {"ilql": self.heads}

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return self.heads.trained()

    def prepare(self, run: RunDirectory, inputs: Mapping[str, str]) -> None:
        pass  # there is no reference

    def accumulate(self, batch: list[int]) -> dict[str, float | None]:
        return accumulate(self.policy, self.heads, [self.answers[i] for i in batch], self.section, self.ranks)

    def after_step(self, step: int) -> None:
        if step % self.section.ilql.sync_every == 0:
            self.heads.sync(self.section.ilql.polyak)

    def inspect(self, which: Sequence[int]) -> tuple[Experience, Tensor]:
        return inspect_answers(self.policy, self.heads, [self.answers[i] for i in which], self.section)

    def save(self, final: Path) -> None:
        self.heads.save(final / FOLDER, strength=self.section.ilql.strength, top_k=self.section.ilql.top_k)


def build_heads(policy: Policy, *, seed: int) -> ILQLHeads:
    """The heads of a run that begins. Raises ModelError where the sampler could not use them."""
    model = policy.model
    if model.use_full_logits:
        raise ModelError(
            f"qlearning.loss=ilql with a {type(model.hf_model).__name__}, whose output head is not a plain linear "
            "layer: its hidden states would not be at hand where Q is to steer what is sampled. Use another model, or "
            "set qlearning.loss to bellman."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ILQLHeads(model.config.hidden_size, model.config.vocab_size).to(model.device)


def accumulate(
    policy: Policy,
    heads: ILQLHeads,
    answers: Sequence[ScoredResponse],
    section: QLearningSection,
    ranks: Ranks = ALONE,
) -> dict[str, float | None]:
    """Add one optimizer step's gradients, microbatch by microbatch; no step. Returns its metrics."""
    s, tokens = section.ilql, sum(len(answer.response_ids) for answer in answers)
    sums = list[Tensor]()  # [5] of a microbatch: loss, squared errors of both Q, and the parts of the loss
    values, advantages, returns = list[Tensor](), list[Tensor](), list[Tensor]()  # [N] of a microbatch
    device = policy.model.device
    for _, counts, rows, scores in scored_microbatches(answers, section.microbatch_tokens, device, ranks):
        mask = rows.response_mask
        logprobs, found = run_heads(policy, heads, rows, cql=s.cql > 0)
        v, q1, q2, target_q = (fill(x, mask) for x in found[:4])
        targets = q_targets(scores, v, mask, gamma=s.gamma)
        errors = q_loss(q1, targets, mask, denominator=tokens) + q_loss(q2, targets, mask, denominator=tokens)
        expectile = expectile_loss(v, target_q, mask, tau=s.tau, denominator=tokens)
        cql = -(found.q1_logprobs.sum() + found.q2_logprobs.sum()) / tokens
        nll = nll_loss(fill(logprobs, mask), mask, denominator=tokens)
        loss = errors + expectile + s.cql * cql + s.awac * nll
        (loss if counts else 0.0 * loss).backward()
        if not counts:
            continue
        sums.append(torch.stack([x.detach() for x in (loss, errors, expectile, cql, nll)]))
        values.append(v.detach()[mask])
        advantages.append((target_q - v.detach())[mask])
        returns.append(_discounted(scores, rows, s.gamma)[mask])
    loss_sum, error_sum, expectile_sum, cql_sum, nll_sum = ranks.cat([x[None] for x in sums]).sum(0).tolist()
    value, realized = ranks.cat(values)[None], ranks.cat(returns)[None]
    return {
        "qlearning/loss": loss_sum,
        "qlearning/residual": (error_sum / 2) ** 0.5,
        "qlearning/expectile_loss": expectile_sum,
        **({"qlearning/cql_loss": cql_sum} if s.cql else {}),
        "qlearning/nll": nll_sum,
        "qlearning/advantage": float(ranks.cat(advantages).mean()),
        "value/mean": float(value.mean()),
        "value/explained_variance": explained_variance(value, realized, torch.ones_like(value, dtype=torch.bool)),
        "tokens/trained": float(tokens),
    }


def run_heads(policy: Policy, heads: ILQLHeads, rows: Rows, *, cql: bool) -> tuple[Tensor, HeadOutput]:
    """([N] the language model's log-probs, what the heads say) of every response token: one pass."""
    model = policy.model
    logprobs, _, hidden = model.response_logprobs(rows, temperature=1.0, entropy=False)
    with model.autocast():
        found: HeadOutput = heads(hidden, rows.targets, cql=cql)
    return logprobs, found


def _discounted(scores: Tensor, rows: Rows, gamma: float) -> Tensor:
    """[B, R] what came of each answer, seen from before each of its tokens: γ^(tokens after this one)·score."""
    t = torch.arange(rows.response_mask.shape[1])
    after = (rows.response_lengths[:, None] - 1 - t).clamp(min=0)
    return scores[:, None] * (gamma ** after.to(scores))


@torch.no_grad()
def inspect_answers(
    policy: Policy, heads: ILQLHeads, answers: Sequence[ScoredResponse], section: QLearningSection
) -> tuple[Experience, Tensor]:
    """What the heads make of every token of these answers, as a cycle of PPO would have found it, and min Q̄ [B, R].

    Advantages are min Q̄ - V. There is no reference; the policy stands in its place, so that no KL is in the rewards.
    """
    completions = as_completions(answers)
    rows = completions.rows()
    mask = rows.response_mask
    new, entropy, values, q = (torch.zeros(mask.shape) for _ in range(4))
    for index, _, part, _ in scored_microbatches(answers, section.microbatch_tokens, policy.model.device):
        m = part.response_mask
        logprobs, entropies, hidden = policy.model.response_logprobs(part, temperature=1.0, entropy=True)
        found: HeadOutput = heads(hidden, part.targets, cql=False)
        columns = ((new, logprobs), (entropy, entropies), (values, found.values), (q, found.target_q))
        for whole, column in columns:
            whole[index, : m.shape[1]] = fill(column, m).cpu()
    scores = torch.tensor([a.score for a in answers])
    rewards = place_rewards(scores, new, new, mask, kl_coef=0.0)
    rollout = Rollout(rows, new, new, values, rewards, q - values, q)
    return Experience(completions, ScoredBatch(scores, {}), rollout, q - values, entropy, 0.0, {}, []), q
