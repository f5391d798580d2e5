"""What the held-out prompts say: the same prompts, with the same draws, at every evaluation of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tether.runs import Run

if TYPE_CHECKING:  # it loads torch, which looking at a run does not need
    from tether.math import Interval

_COLUMNS = ["prompt_index", "prompt", "completion", "finish_reason", "length", "score", "kl"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its rows by prompt."""

    cycle: int
    answers: dict[int, list[dict[str, Any]]]  # prompt_index -> its sampled answers, in the order they were drawn

    @classmethod
    def read(cls, run: Run, cycle: int) -> Evaluation:
        answers: dict[int, list[dict[str, Any]]] = {}
        for row in run.evaluations(cycle).select(_COLUMNS).to_pylist():
            answers.setdefault(row["prompt_index"], []).append(row)
        return cls(cycle, answers)

    def means(self, column: str = "score") -> dict[int, float]:
        """prompt_index -> mean over its answers; NaN where one of them has no number."""
        return {i: sum(_or_nan(a[column]) for a in rows) / len(rows) for i, rows in self.answers.items()}

    def mean(self, column: str = "score") -> Interval:
        """Mean over prompts, with its 95 % interval."""
        return _mean(list(self.means(column).values()))


def win_share(before: Evaluation, after: Evaluation) -> Interval | None:
    """Share of the common prompts that are answered with a higher mean score after than before, ties half."""
    old, new = before.means(), after.means()
    common = [i for i in old if i in new]
    if not common:
        return None
    return _mean([float(new[i] > old[i]) + 0.5 * (new[i] == old[i]) for i in common])


def best_of(evaluation: Evaluation) -> list[tuple[int, float, float]]:
    """(n, KL, score) of choosing the best of n answers, n = 1, 2, 4, … as far as there are samples.

    See `tether.math.best_of_n`: the score is the mean over every choice of n of a prompt's samples.
    """
    import torch

    from tether.math import best_of_n_kl_estimate, best_of_n_score

    scores = [torch.tensor([[_or_nan(a["score"]) for a in rows]]) for rows in evaluation.answers.values()]
    samples, found, n = min(s.shape[1] for s in scores), [], 1
    while n <= samples:
        kl, score = (torch.cat([of(s, n=n) for s in scores]) for of in (best_of_n_kl_estimate, best_of_n_score))
        found.append((n, float(kl.mean()), float(score.mean())))
        n *= 2
    return found


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> Interval:
    import torch

    from tether.math import bootstrap_mean

    return bootstrap_mean(torch.tensor(values))
