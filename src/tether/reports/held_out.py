"""What the held-out prompts say: the same prompts, with the same draws, at every evaluation of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tether.runs import Run

if TYPE_CHECKING:  # it loads torch, which looking at a run does not need
    from tether.math import Interval

_LEAST_POINTS = 4  # of a law with two numbers
_COLUMNS = ["prompt_index", "prompt", "completion", "finish_reason", "length", "score", "kl"]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: its rows by prompt."""

    cycle: int
    answers: dict[int, list[dict[str, Any]]]  # prompt_index -> its sampled answers, in the order they were drawn

    @classmethod
    def read(cls, run: Run, cycle: int) -> Evaluation:
        answers: dict[int, list[dict[str, Any]]] = {}
        table = run.evaluations(cycle)
        gold = [name for name in table.column_names if name.startswith("gold/")]
        for row in table.select([*_COLUMNS, *gold]).to_pylist():
            answers.setdefault(row["prompt_index"], []).append(row)
        return cls(cycle, answers)

    @property
    def gold(self) -> list[str]:
        """Columns of the gold sources, the one that decides first."""
        first = next(iter(self.answers.values()))[0]
        return [name for name in first if name.startswith("gold/")]

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


def best_of(evaluation: Evaluation, judged: str = "score") -> list[tuple[int, float, float]]:
    """(n, KL, score) of choosing the best of n answers, n = 1, 2, 4, … as far as there are samples.

    judged: the column of which the chosen answers' mean is given; they are chosen by their score. See
    `tether.math.best_of_n`: the score is the mean over every choice of n of a prompt's samples.
    """
    import torch

    from tether.math import best_of_n_kl_estimate, best_of_n_score

    scores, values = (
        [torch.tensor([[_or_nan(a[name]) for a in rows]]) for rows in evaluation.answers.values()]
        for name in ("score", judged)
    )
    samples, found, n = min(s.shape[1] for s in scores), [], 1
    while n <= samples:
        kl = torch.cat([best_of_n_kl_estimate(s, n=n) for s in scores])
        score = torch.cat([best_of_n_score(s, n=n, values=v) for s, v in zip(scores, values, strict=True)])
        found.append((n, float(kl.mean()), float(score.mean())))
        n *= 2
    return found


@dataclass(frozen=True)
class Law:
    """One of Gao et al.'s laws, fitted to points of gold over distance: see `tether.math.overoptimization`."""

    alpha: float
    beta: float
    r_squared: float
    distance: list[float]  # √nats, from 0 to the farthest point, to draw it
    gold: list[float]


def fit_law(distance: Sequence[float], gold: Sequence[float], start: float, *, rl: bool) -> Law | None:
    """The law of RL, or that of best of n; None where fewer than four points away from the start would be fitted by
    its two numbers, which says little."""
    import torch

    from tether.math import best_of_n_law, fit_best_of_n, fit_rl, rl_law

    points = [(d, g) for d, g in zip(distance, gold, strict=True) if d > 0 and math.isfinite(g)]
    if len(points) < _LEAST_POINTS:
        return None
    d, g = torch.tensor(points, dtype=torch.float64).unbind(1)
    fit = (fit_rl if rl else fit_best_of_n)(d, g, start=start)
    at = torch.linspace(0, float(d.max()), 60, dtype=torch.float64)
    return Law(fit.alpha, fit.beta, fit.r_squared, at.tolist(), (rl_law if rl else best_of_n_law)(fit, at).tolist())


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(values: Sequence[float]) -> Interval:
    import torch

    from tether.math import bootstrap_mean

    return bootstrap_mean(torch.tensor(values))
