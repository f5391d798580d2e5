"""Metrics as rules look at them: medians of a few cycles, and how long a condition held. Plain Python, linear in time.

A single cycle is noise: its mean is over a batch of responses. So rules read *levels*, the medians of five cycles in a
row, and ask that a condition holds for several levels in a row.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

BLOCK = 5  # cycles a level; two of them may be odd without a trace
_MOST_ROWS = 4_000  # of a longer run every k-th cycle is read


class Curve:
    """One metric over the run, without the cycles in which it is null.

    first, last, levels: of each block of five values its first and last cycle, and its median. Values at the end that
    do not fill a block are not judged yet, so that an alarm does not come and go with one of them.
    """

    def __init__(self, at: Sequence[int], values: Sequence[Any], block: int = BLOCK):
        points = [(s, v) for s, v in zip(at, values, strict=True) if v is not None and -math.inf < v < math.inf]
        blocks = [points[i : i + block] for i in range(0, len(points) - block + 1, block)]
        self.first = [b[0][0] for b in blocks]
        self.last = [b[-1][0] for b in blocks]
        self.levels = [median([v for _, v in b]) for b in blocks]

    def __len__(self) -> int:
        return len(self.levels)

    def held(self, holds: Callable[[float], bool], *, least: int, after: int = 0) -> Held | None:
        """Where `holds` is true of `least` levels in a row or more, cycles up to `after` left out; None if nowhere."""
        found: list[int] = []
        for true, group in groupby(range(len(self)), lambda i: self.first[i] > after and holds(self.levels[i])):
            blocks = list(group)
            if true and len(blocks) >= least:
                found += blocks
        return Held(self, found) if found else None

    @cached_property
    def noise(self) -> float:
        """Standard deviation of a level about the trend, from second differences, their median left out: neither a
        slope nor a bend is noise. Robust (1.4826 · median deviation), so that a jump is none either; but no less than
        half of the plain estimate, for of a dozen levels the robust one may be far too small by chance."""
        bends = [a - 2 * b + c for a, b, c in zip(self.levels, self.levels[1:], self.levels[2:], strict=False)]
        if not bends:
            return 0.0
        center = median(bends)
        plain = math.sqrt(sum((b - center) ** 2 for b in bends) / len(bends))
        return max(1.4826 * _deviation(bends), 0.5 * plain) / math.sqrt(6)

    def like(self, levels: Sequence[float]) -> Curve:
        """Other levels at the same cycles."""
        curve = Curve((), ())
        curve.first, curve.last, curve.levels = self.first, self.last, list(levels)
        return curve

    def coarse(self, most: int = 20) -> Curve:
        """The same in at most `most` blocks: of so few, one that is extreme by chance is not very extreme."""
        together, curve = max(1, math.ceil(len(self) / most)), Curve((), ())
        for i in range(0, len(self) - together + 1, together):
            curve.first.append(self.first[i])
            curve.last.append(self.last[i + together - 1])
            curve.levels.append(median(self.levels[i : i + together]))
        return curve


class Held:
    """The blocks in which a condition held."""

    def __init__(self, curve: Curve, blocks: Sequence[int]):
        self.blocks = list(blocks)
        self.first, self.last = curve.first[self.blocks[0]], curve.last[self.blocks[-1]]
        self.levels = [curve.levels[i] for i in self.blocks]


class Series:
    """A run's metrics by name. Of a run of more than 4,000 cycles every k-th is read, but by `points`."""

    def __init__(self, unit: str, metrics: Sequence[dict[str, Any]]):
        self.unit, self._metrics = unit, metrics
        self._rows = metrics[:: max(1, len(metrics) // _MOST_ROWS)]
        self._curves: dict[str, Curve] = {}

    @cached_property
    def at(self) -> list[int]:
        """The cycles (or steps) that are read."""
        return [m[self.unit] for m in self._rows]

    @property
    def done(self) -> int:
        """The last cycle (or step)."""
        return int(self._metrics[-1][self.unit]) if self._metrics else 0

    @property
    def names(self) -> list[str]:
        """Metrics of the last cycle."""
        return list(self._metrics[-1]) if self._metrics else []

    def values(self, name: str) -> list[Any]:
        """A metric beside `at`; None where there is none."""
        return [m.get(name) for m in self._rows]

    def curve(self, name: str) -> Curve:
        """A metric in levels."""
        if name not in self._curves:
            self._curves[name] = Curve(self.at, self.values(name))
        return self._curves[name]

    def nulls(self, name: str) -> list[int]:
        """Cycles in which a metric is there and is not a number."""
        return [m[self.unit] for m in self._rows if name in m and m[name] is None]

    def points(self, name: str) -> dict[int, Any]:
        """cycle -> value over every cycle that has the metric."""
        return {m[self.unit]: v for m in self._metrics if (v := m.get(name)) is not None}

    def sparse(self, name: str) -> Curve:
        """A metric that few cycles have: each value of it is a level, of more than 1,000 every k-th."""
        points = list(self.points(name).items())
        points = points[:: max(1, len(points) // 1000)]
        return Curve([at for at, _ in points], [v for _, v in points], block=1)

    def tail(self, count: int) -> Sequence[dict[str, Any]]:
        """The metrics of the last `count` cycles, as they are."""
        return self._metrics[-count:]


def median(values: Sequence[float]) -> float:
    """The middle value; of an even number the upper one of the two, 0 of none."""
    return statistics.median_high(values) if values else 0.0


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's; 0 where one does not vary."""
    try:
        return statistics.correlation(a, b)
    except statistics.StatisticsError:
        return 0.0


def _deviation(values: Sequence[float]) -> float:
    center = median(values)
    return median([abs(v - center) for v in values])
