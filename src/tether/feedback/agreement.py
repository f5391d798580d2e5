"""Whether labels can be trusted: how far people agree, with each other and with themselves, and what sways them.

    α   Krippendorff's, nominal, over everything judged twice or more     1 perfect, 0 chance, below 0 worse than chance
    κ   Cohen's, of two people on what both judged
    self-consistency   the same choice when the same pair came back with its sides exchanged
    left, longer       how often the left, the longer answer was chosen: 0.5 shows no habit, if answers are as good
    gold               how often the answer known to be better was chosen

Ties are a category of their own; a ranking counts as the pairs that it orders; skips count nowhere. Gold items and
repeats have measures of their own and are left out of every other. Where there is too little data the result is None.

Sources: Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"; Cohen 1960, "A coefficient of agreement for
nominal scales"; Wilson 1927.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any

from tether.feedback.records import TIES, Label
from tether.statistics import wilson_interval

_FEWEST = 2  # items, before an agreement means anything at all


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its 95 % interval: a share with Wilson's, α with the bootstrap's over items."""

    value: float
    low: float
    high: float
    count: int  # of what it is a share; for α the items with two labels or more


@dataclass(frozen=True, slots=True)
class Kappa:
    """Cohen's κ of two people."""

    first: str
    second: str
    value: float
    agreement: float  # share of what both judged on which they agreed
    items: int


@dataclass(frozen=True, slots=True)
class Quality:
    """One person's labels, or everybody's."""

    annotator: str | None  # None: everybody
    labels: int  # that stand, skips not
    skips: int
    ties: int
    consistency: Estimate | None
    left: Estimate | None  # of pairs that were decided, the left answer
    longer: Estimate | None  # of pairs that were decided and whose answers differ in length, the longer one
    gold: Estimate | None
    seconds: float | None  # an item, median


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far people agree."""

    alpha: Estimate | None
    kappas: tuple[Kappa, ...]  # of every two who share items, by name
    overall: Quality
    annotators: tuple[Quality, ...]  # by name


def agreement(labels: Iterable[Label], *, seed: int = 0, draws: int = 1000) -> Agreement:
    """Agreement and habits in labels that stand, such as `Store.labels()` gives.

    seed, draws: of the bootstrap; the same seed gives the same interval.
    """
    labels = list(labels)
    by_person: dict[str, list[Label]] = {}
    for label in labels:
        by_person.setdefault(label.annotator, []).append(label)
    units = _units(labels)
    return Agreement(
        alpha=krippendorff_alpha(units, seed=seed, draws=draws),
        kappas=cohen_kappas(units),
        overall=quality(None, labels),
        annotators=tuple(quality(name, by_person[name]) for name in sorted(by_person)),
    )


# ---------------------------------------------------------------- between people


Unit = tuple[int, int, int]  # item, and the two of its answers that are compared
Units = Mapping[Unit, Mapping[str, str]]  # what each annotator chose: a, b or tie


def _units(labels: Iterable[Label]) -> dict[Unit, dict[str, str]]:
    """What each person chose of each pair that two or more judged; a ranking as all its pairs."""
    units: dict[Unit, dict[str, str]] = {}
    judged = [x for x in labels if x.choice != "skip" and x.gold is None and x.repeat_of is None]
    people = Counter(label.item for label in judged)
    for label in judged:
        if people[label.item] < 2:
            continue  # nobody to agree with
        for i, j in combinations(range(len(label.order)), 2):
            side = "tie" if label.choice in TIES else label.choice
            if label.ranking is not None:
                side = "a" if label.ranking.index(i) < label.ranking.index(j) else "b"
            units.setdefault((label.item, i, j), {})[label.annotator] = side
    return units


def krippendorff_alpha(units: Units, *, seed: int = 0, draws: int = 1000) -> Estimate | None:
    """α over the units that two people or more judged; None below two items, or where all chose the same.

    Items are drawn, not units: the pairs of one ranking are not independent. Items with the same coincidences are
    interchangeable, so that a draw is one multinomial over the few kinds of items there are, however many items.
    """
    categories = sorted({value for sides in units.values() for value in sides.values()})
    judged: dict[int, list[list[int]]] = {}
    for (item, _, _), sides in units.items():
        if len(sides) >= 2:
            counts = Counter(sides.values())
            judged.setdefault(item, []).append([counts[c] for c in categories])
    if len(judged) < _FEWEST:
        return None
    if sum(any(column) for column in zip(*(counts for unit in judged.values() for counts in unit), strict=True)) < 2:
        return None  # one category alone: chance would agree as well, and α is 0/0
    import numpy as np  # only where there is something to compute: the pages start sooner

    kinds = Counter(tuple(map(tuple, sorted(unit))) for unit in judged.values())
    each = np.array([sum(_coincidences(np.array(counts)) for counts in kind) for kind in kinds])  # [kinds, C, C]
    frequency = np.array(list(kinds.values()))
    value = float(_alpha_of(np.tensordot(frequency[None], each, axes=1))[0])
    drawn = np.random.default_rng(seed).multinomial(len(judged), frequency / frequency.sum(), size=draws)
    alphas = _alpha_of(np.tensordot(drawn, each, axes=1))
    low, high = np.nanquantile(alphas, [0.025, 0.975]) if not np.isnan(alphas).all() else (value, value)
    return Estimate(value, float(low), float(high), len(judged))


def _coincidences(counts: Any) -> Any:
    """[C, C]: ordered pairs of values within a unit, each weighted by 1/(m - 1) for its m values."""
    pairs = counts[:, None] * counts[None, :]
    pairs[range(len(counts)), range(len(counts))] -= counts
    return pairs / (counts.sum() - 1)


def _alpha_of(o: Any) -> Any:
    """α [draws] of coincidence matrices o [draws, C, C]: 1 - (n - 1)·Σ_{c≠k} o_ck / Σ_{c≠k} n_c·n_k; NaN for 0/0."""
    import numpy as np

    marginal = o.sum(2)
    n = marginal.sum(1)
    observed = n - np.trace(o, axis1=1, axis2=2)
    expected = n**2 - (marginal**2).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected > 0, 1 - (n - 1) * observed / expected, np.nan)


def cohen_kappas(units: Units) -> tuple[Kappa, ...]:
    """κ of every two people who judged two units or more in common; none where both always chose the same."""
    shared: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for sides in units.values():
        for first, second in combinations(sorted(sides), 2):
            shared.setdefault((first, second), []).append((sides[first], sides[second]))
    found = []
    for (first, second), pairs in sorted(shared.items()):
        if len(pairs) >= _FEWEST and len({side for pair in pairs for side in pair}) > 1:
            same = sum(a == b for a, b in pairs) / len(pairs)
            found.append(Kappa(first, second, cohen_kappa(pairs), same, len(pairs)))
    return tuple(found)


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float:
    """κ = (p_o - p_e) / (1 - p_e): observed agreement, and what two people of the same habits have by chance."""
    observed = sum(a == b for a, b in pairs) / len(pairs)
    first, second = (Counter(side) for side in zip(*pairs, strict=True))
    chance = sum(first[category] * second[category] for category in first) / len(pairs) ** 2
    return (observed - chance) / (1 - chance)


# ---------------------------------------------------------------- one person


def quality(annotator: str | None, labels: Sequence[Label]) -> Quality:
    """One annotator's labels that stand, or everybody's."""
    judged = [label for label in labels if label.choice != "skip"]
    plain = [label for label in judged if label.gold is None and label.repeat_of is None]
    decided = [label for label in plain if label.choice in ("a", "b")]
    uneven = [label for label in decided if label.longer is not None]
    gold = [label for label in judged if label.gold is not None]
    seconds = [label.seconds for label in judged if label.seconds is not None]
    first = {(label.annotator, label.item): label.choice for label in plain}
    again = [
        first[label.annotator, label.repeat_of] == label.choice
        for label in judged
        if label.repeat_of is not None and (label.annotator, label.repeat_of) in first
    ]
    return Quality(
        annotator=annotator,
        labels=len(judged),
        skips=len(labels) - len(judged),
        ties=sum(label.choice in TIES for label in judged),
        consistency=wilson(sum(again), len(again)),
        left=wilson(sum(_index(x) == x.order[0] for x in decided), len(decided)),
        longer=wilson(sum(_index(x) == x.longer for x in uneven), len(uneven)),
        gold=wilson(sum(_index(x) == x.gold for x in gold), len(gold)),
        seconds=median(seconds) if seconds else None,
    )


def _index(label: Label) -> int | None:
    """The answer put first; None for a tie."""
    if label.ranking is not None:
        return label.ranking[0]
    return "ab".index(label.choice) if label.choice in ("a", "b") else None


def wilson(successes: int, count: int) -> Estimate | None:
    """A share with Wilson's 95 % interval; None of nothing."""
    if count == 0:
        return None
    share = successes / count
    return Estimate(share, *wilson_interval(share, count), count)
