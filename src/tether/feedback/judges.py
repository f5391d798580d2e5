"""Whether a judge's labels can be trusted: a model's labels beside those that people gave to the same pairs.

What people say of a pair is what most of them chose; where as many chose each, a tie. Gold items and repeats are left
out, as in every measure of agreement. Where there is too little data the result is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from tether.feedback.agreement import Estimate, Quality, cohen_kappa, quality, wilson
from tether.feedback.records import TIES, Label
from tether.statistics import rogan_gladen

_BINS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # of how sure a judge is
_FEWEST = 2  # items, before an agreement means anything at all


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of which a judge is about as sure."""

    sure: float  # its probability for the answer that it prefers, mean
    right: Estimate  # share of them of which people prefer that answer too


@dataclass(frozen=True, slots=True)
class JudgeQuality:
    """One judge beside people."""

    quality: Quality  # of its labels alone
    shared: int  # pairs that people judged too
    agreement: Estimate | None  # of those that both decided: the same answer
    kappa: float | None  # Cohen's, of judge and people; ties count as a choice
    by_length: Estimate | None  # of those that people decided and whose answers differ in length: they chose the longer
    first: float | None  # mean probability that the answer shown first wins; 0.5 where place makes no difference
    calibration: tuple[Bin, ...]  # by how sure it was, bins without a pair left out
    wins: Estimate | None  # share of all pairs that it decided in which the first answer of the data is better
    true_wins: Estimate | None  # the same share, corrected by the judge's errors on what people decided


def judge_quality(labels: Iterable[Label]) -> tuple[JudgeQuality, ...]:
    """Every judge in `labels` beside the people in them, by name; see `Filters.judges`."""
    people: dict[int, list[Label]] = {}
    judges: dict[str, list[Label]] = {}
    for label in labels:
        if label.probability is not None:
            judges.setdefault(label.annotator, []).append(label)
        elif label.choice in ("a", "b", *TIES) and label.gold is None and label.repeat_of is None:
            people.setdefault(label.item, []).append(label)
    said = {item: _majority(given) for item, given in people.items()}
    return tuple(_beside(judges[name], said) for name in sorted(judges))


def _majority(labels: Sequence[Label]) -> str:
    balance = sum({"a": 1, "b": -1}.get(label.choice, 0) for label in labels)
    return "a" if balance > 0 else "b" if balance < 0 else "tie"


def _beside(labels: Sequence[Label], people: dict[int, str]) -> JudgeQuality:
    """labels: one judge's. people: item -> what they chose."""
    plain = [x for x in labels if x.gold is None and x.repeat_of is None]
    shared = [x for x in plain if x.item in people]
    both = [x for x in shared if x.choice in ("a", "b") and people[x.item] in ("a", "b")]
    uneven = [x for x in shared if x.longer is not None and people[x.item] in ("a", "b")]
    pairs = [("tie" if x.choice in TIES else x.choice, people[x.item]) for x in shared]
    compared = len(pairs) >= _FEWEST and len({side for pair in pairs for side in pair}) > 1
    places = [x.first for x in plain if x.first is not None]
    wins, true_wins = _wins(plain, both, people)
    return JudgeQuality(
        quality=quality(labels[0].annotator, labels),
        shared=len(shared),
        agreement=wilson(sum(x.choice == people[x.item] for x in both), len(both)),
        kappa=cohen_kappa(pairs) if compared else None,
        by_length=wilson(sum("ab"[x.longer or 0] == people[x.item] for x in uneven), len(uneven)),
        first=fmean(places) if places else None,
        calibration=_calibration(both, people),
        wins=wins,
        true_wins=true_wins,
    )


def _calibration(both: Sequence[Label], people: dict[int, str]) -> tuple[Bin, ...]:
    found = []
    sure = [(max(x.probability or 0.0, 1 - (x.probability or 0.0)), x.choice == people[x.item]) for x in both]
    for low, high in pairwise(_BINS):
        inside = [(p, right) for p, right in sure if low <= p < high or p == high == _BINS[-1]]
        if right := wilson(sum(right for _, right in inside), len(inside)):
            found.append(Bin(fmean(p for p, _ in inside), right))
    return tuple(found)


def _wins(
    plain: Sequence[Label], both: Sequence[Label], people: dict[int, str]
) -> tuple[Estimate | None, Estimate | None]:
    """(share of the pairs in which the judge prefers the first answer, the same without the judge's errors)."""
    decided = [x for x in plain if x.choice in ("a", "b")]
    wins = wilson(sum(x.choice == "a" for x in decided), len(decided))
    yes, no = ([x for x in both if people[x.item] == side] for side in "ab")
    if wins is None or not yes or not no:
        return wins, None
    corrected = rogan_gladen(
        wins.value, wins.count,
        sensitivity=sum(x.choice == "a" for x in yes) / len(yes), positives=len(yes),
        specificity=sum(x.choice == "b" for x in no) / len(no), negatives=len(no),
    )  # fmt: skip
    return wins, Estimate(*corrected, len(both)) if corrected else None
