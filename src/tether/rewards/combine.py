"""From several sources to one score per response: weighted sum, then clip, then the rule for a missing stop token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tether.background import in_thread
from tether.config import RewardShapingConfig
from tether.distributed.ranks import ALONE, Ranks
from tether.errors import RewardError
from tether.math import disagreement
from tether.models.reward_model import BATCH_TOKENS
from tether.rewards.ensemble import EnsembleReward
from tether.rewards.function import describe_row
from tether.rewards.model import ModelReward
from tether.rewards.url import request_hashes
from tether.runs.answers import KeptAnswers
from tether.types import Completions, Prompt, Reward


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """The scores of B responses and what they are made of."""

    scores: Tensor  # [B] float64, what PPO maximizes: summed, clipped, missing_eos applied
    parts: dict[str, list[float | None]]  # source name -> B raw answers, before weight and shaping
    missing: dict[str, int] = field(default_factory=dict)  # optional source name -> responses that it did not score
    disagreement: dict[str, list[float]] = field(default_factory=dict)  # ensemble's name -> B deviations of its members
    members: dict[str, list[list[float]]] = field(default_factory=dict)  # ensemble's name -> B times its K scores


Answers = tuple[list[float | None], Tensor | None]  # B scores, and those of an ensemble's members [K, B]


@dataclass(frozen=True, slots=True)
class RewardSet:
    """All sources of a run with their weights and shaping.

    A source whose `remote` is true is asked in a thread, its answers are kept, and its `cancel` ends the asking.

    score = Σ weight·source. Where a source answers None beside another's score, the response would be worth more or
    less than its siblings for no reason, so that is an error, unless the source is optional: it then adds nothing. The
    weights are not renormalized.
    """

    sources: Mapping[str, tuple[Reward, float]]  # by name, with their weights
    shaping: RewardShapingConfig
    optional: Collection[str] = ()  # names of the sources that may answer None
    kept: KeptAnswers | None = None  # where answers from other machines are kept

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise RewardError if a source cannot score these prompts: before anything is sampled."""
        for source, _ in self.sources.values():
            source.check(prompts)

    def score(self, completions: Completions, phase: str = "", *, ranks: Ranks = ALONE) -> ScoredBatch:
        """phase, ranks: see `asking`."""
        with self.asking(completions, phase, ranks=ranks) as scores:
            return scores()

    @contextmanager
    def asking(
        self, completions: Completions, phase: str = "", *, ranks: Ranks = ALONE
    ) -> Iterator[Callable[[], ScoredBatch]]:
        """Ask other machines, all at once, each in a thread, while what stands in the `with` computes; what it gives
        has the sources here score, waits, and returns the scores. Left before that, the asking ends.

        phase: what the responses are for, cycle-000003 say; answers from other machines are kept under it.
        ranks: all of them call, with the same completions. Each scores a part of the rows by the reward models here;
        the first asks all other sources, of which the others have none.
        """
        remote: dict[str, Any] = {
            n: source for n, (source, _) in self.sources.items() if getattr(source, "remote", False)
        }
        store = self.kept if phase and remote else None
        requests = request_hashes(completions) if store else []
        kept = {name: store.read(phase, name, requests) for name in remote} if store else {}
        asked = {
            name: in_thread(partial(source.score, completions), "reward")
            for name, source in remote.items()
            if kept.get(name) is None
        }

        def scored(by_rows: Mapping[str, Answers]) -> ScoredBatch:
            found = {name: answers for name, answers in kept.items() if answers is not None}
            parts, members = self._answers(completions, found, by_rows, asked)
            self._check_answered(completions, parts)
            if store:  # only now: an answer that ends the run would end it again
                for name in asked:
                    store.write(phase, name, requests, parts[name])
            return self._add(completions, parts, members)

        def scores() -> ScoredBatch:
            by_rows = self._by_rows(completions, ranks)
            return ranks.first(lambda: scored(by_rows))

        try:
            yield scores
        except BaseException:
            for name, future in asked.items():
                if not future.done():
                    remote[name].cancel()
            raise

    def _answers(
        self, completions: Completions, kept: Mapping[str, list[float | None]], by_rows: Mapping[str, Answers],
        asked: Mapping[str, Future[Any]],
    ) -> tuple[dict[str, list[float | None]], dict[str, Tensor]]:  # fmt: skip
        """Every source's answers, in the config's order, and the scores [K, B] of the members of ensembles.

        kept, by_rows: answers that are there already. asked: those that are waited for.
        """
        parts, members = dict(kept), dict[str, Tensor]()
        for name, (source, _) in self.sources.items():
            if isinstance(source, ModelReward | EnsembleReward):
                parts[name], of_members = by_rows.get(name) or _ask_model(source, completions)
                members |= {} if of_members is None else {name: of_members}
            elif name not in asked and name not in kept:
                parts[name] = list(source.score(completions))
        ended, _ = wait(asked.values(), return_when=FIRST_EXCEPTION)
        for name, future in asked.items():
            if future in ended:  # where one is not, another has failed
                parts[name] = future.result()
        return {name: parts[name] for name in self.sources}, members

    def _check_answered(self, completions: Completions, parts: Mapping[str, list[float | None]]) -> None:
        """RewardError where a response has no score."""
        for row, answers in enumerate(zip(*parts.values(), strict=True)):
            if all(answer is None for answer in answers):
                raise RewardError(
                    f"no reward source scored {describe_row(completions, row)}: {', '.join(parts)} all answered None, "
                    "and a response without a score cannot be learned from. Let one source answer every row."
                )
            silent = [n for n, answer in zip(parts, answers, strict=True) if answer is None and n not in self.optional]
            if silent:
                raise RewardError(
                    f"reward {silent[0]} answered None for {describe_row(completions, row)}, where another source gave "
                    "a score: counted as 0, it would reward or punish the response for nothing. Let it answer every "
                    "row, or set `optional: true` of this source if nothing is what it should add."
                )

    def _add(
        self, completions: Completions, parts: dict[str, list[float | None]], members: Mapping[str, Tensor]
    ) -> ScoredBatch:
        total = torch.zeros(len(completions), dtype=torch.float64)
        for name, (_, weight) in self.sources.items():
            total += weight * torch.tensor([0.0 if a is None else a for a in parts[name]], dtype=torch.float64)
        return ScoredBatch(
            shape_scores(total, completions.finish_reasons, self.shaping),
            parts,
            missing={name: parts[name].count(None) for name in parts if name in self.optional},
            disagreement={name: disagreement(found).tolist() for name, found in members.items()},
            members={name: found.T.tolist() for name, found in members.items()},
        )

    def _by_rows(self, completions: Completions, ranks: Ranks) -> dict[str, Answers]:
        """What the reward models here say, of which each of several ranks asked its own for a part of the rows; nothing
        alone, and where one could not score its part: the first rank, asked for all, then says so of the right row."""
        local = {name: s for name, (s, _) in self.sources.items() if isinstance(s, ModelReward | EnsembleReward)}
        if ranks.size == 1 or not local:
            return {}
        lengths = [len(p.ids) + count for p, count in zip(completions.prompts, completions.lengths, strict=True)]
        mine = sorted(i for index, counts in ranks.deal(lengths, BATCH_TOKENS) if counts for i in index.tolist())
        part = completions.select(mine)
        try:
            answers = {name: _ask_model(source, part) for name, source in local.items()} if mine else {}
        except RewardError:
            answers = None
        found = ranks.gather([(mine, answers)])
        if any(answers is None for _, answers in found):
            return {}
        rows = [row for rows, _ in found for row in rows]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        together = dict[str, Answers]()
        for name in local:
            parts = [answers[name] for _, answers in found if answers]
            scores = [score for scores, _ in parts for score in scores]
            members = [m for _, m in parts if m is not None]
            together[name] = [scores[i] for i in order], torch.cat(members, dim=1)[:, order] if members else None
        return together


def _ask_model(source: ModelReward | EnsembleReward, completions: Completions) -> Answers:
    if isinstance(source, EnsembleReward):
        return source.score_with_members(completions)
    return source.score(completions), None


def shape_scores(scores: Tensor, finish_reasons: Sequence[str], shaping: RewardShapingConfig) -> Tensor:
    """Clip [B] scores to ±clip, then set or lower those of responses that ran into the length limit.

    In this order, so that a clip never weakens what a missing stop token costs.
    Source: Ziegler et al. 2019 set the score to -1; "Secrets of RLHF" (arXiv:2307.04964) clips it.
    """
    if shaping.clip is not None:
        scores = scores.clamp(-shaping.clip, shaping.clip)
    rule = shaping.missing_eos
    if rule is None:
        return scores
    cut = torch.tensor([reason == "length" for reason in finish_reasons], dtype=torch.bool)
    punished = torch.full_like(scores, rule.set) if rule.set is not None else scores - (rule.subtract or 0.0)
    return torch.where(cut, punished, scores)
