"""Simulated people who compare two answers: each with a taste of their own, and none of them infallible.

An annotator feels how good an answer is (its *appeal*) and prefers the one with more of it, by a coin that is the more
biased the further the two are apart: P(first is better) = σ(appeal₁ − appeal₂), the Bradley–Terry model. Five things go
wrong, as they do with people: one seldom looks facts up, one is charmed by flattery, one takes long for thorough, one
would rather be safe, and everyone's hand slips. What they have in common a reward model can learn; where they differ
nobody can predict them: that is the noise ceiling.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from tether.demo.judge import Verdict

SLIP = 0.03  # chance of pressing the wrong button
TEDIUM = 1.0  # appeal lost to every courtesy after the first: people like one and tire of more


@dataclass(frozen=True)
class Annotator:
    """One person's taste. Weights are in units of appeal: a lead of 1 is preferred 73 % of the time, one of 3 95 %."""

    name: str
    looks_up: float  # chance of checking an answer against the records; unchecked, whatever sounds right is right
    kindness: float = 6.0  # per unit of harmless
    warmth: float = 0.4  # for a courtesy
    flattery: float = 0.0  # per flattering sentence
    length: float = 0.0  # per sentence
    caution: float = 0.0  # per refusal, hedge or "I do not know"

    def appeal(self, verdict: Verdict, *, checked: bool) -> float:
        """How good the answer feels to this person."""
        habits = verdict.habits
        sounds_right = habits["claim"] + habits["errand"] > 0
        felt = 4.5 * verdict.helpful + 4.5 * verdict.honest if checked else 4.5 * sounds_right
        return (
            felt
            + self.kindness * verdict.harmless
            + self.warmth * (habits["courtesy"] > 0)
            - TEDIUM * max(0, habits["courtesy"] - 1)
            + self.flattery * habits["flattery"]
            + self.length * sum(habits.values())
            + self.caution * (habits["refusal"] + habits["hedge"] + habits["dont_know"])
        )

    def prefers_first(self, first: Verdict, second: Verdict) -> float:
        """Probability that this person calls `first` the better one."""
        p = sum(
            chance * _sigmoid(self.appeal(first, checked=checked) - self.appeal(second, checked=checked))
            for checked, chance in ((True, self.looks_up), (False, 1 - self.looks_up))
        )
        return SLIP + (1 - 2 * SLIP) * p


PEOPLE = [
    Annotator("Ada", looks_up=1.0, warmth=0.0),  # careful
    Annotator("Bruno", looks_up=0.6, length=-0.75),  # in a hurry
    Annotator("Cleo", looks_up=0.85, warmth=2.0, flattery=3.0),  # likes to be liked
    Annotator("Dov", looks_up=0.85, length=0.75),  # takes long for thorough
    Annotator("Edda", looks_up=0.85, kindness=9.0, caution=1.5),  # would rather be safe
]

Pair = tuple[Verdict, Verdict]


def agreement(pairs: Sequence[Pair]) -> float:
    """How often two different annotators, asked about the same pair, choose the same answer: expected, not drawn."""
    total = 0.0
    for first, second in pairs:
        chances = [person.prefers_first(first, second) for person in PEOPLE]
        both = [p * q + (1 - p) * (1 - q) for p, q in itertools.combinations(chances, 2)]
        total += sum(both) / len(both)
    return total / len(pairs)


def noise_ceiling(pairs: Sequence[Pair]) -> float:
    """Accuracy of the best possible predictor of a label by an annotator drawn at random: no reward model passes it."""
    means = [sum(person.prefers_first(*pair) for person in PEOPLE) / len(PEOPLE) for pair in pairs]
    return sum(max(p, 1 - p) for p in means) / len(pairs)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))
