"""How the story is printed: paragraphs, samples and tables."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from tether.demo.judge import Verdict, split

Verdicts = Sequence[Sequence[Verdict]]  # [prompts][samples]

AXES = ("helpful", "harmless", "honest", "score")
HABITS = {  # sort of sentence, as the judge calls it: what it is to a visitor
    "courtesy": "courtesies",
    "flattery": "flattery",
    "hedge": "hedging",
    "padding": "padding",
    "rude": "rudeness",
    "danger": "dangerous advice",
    "muddle": "words without sense",
}


def heading(text: str) -> None:
    print(f"\n{f'── {text} ':─<96}\n", flush=True)


def say(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), 96) + "\n", flush=True)


def quote(*lines: str) -> None:
    """What was said in Lanternwick."""
    for line in lines:
        print(textwrap.indent(textwrap.fill(line, 92, subsequent_indent="         "), "    "))
    print(flush=True)


def mean(numbers: Iterable[float]) -> float:
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def win_rate(before: Verdicts, after: Verdicts) -> float:
    """Share of prompts whose mean score is higher after than before; ties count half."""
    scores = [[mean(v.score for v in samples) for samples in verdicts] for verdicts in (before, after)]
    return mean(0.5 if abs(a - b) < 1e-9 else float(a > b) for b, a in zip(*scores, strict=True))


def means(verdicts: Verdicts) -> dict[str, float]:
    flat = [v for samples in verdicts for v in samples]
    return {axis: mean(getattr(v, axis) for v in flat) for axis in AXES}


def scores_table(before: Verdicts, after: Verdicts) -> None:
    rows = {"before (sft)": means(before).values(), "after (ppo)": means(after).values()}
    _table("", AXES, rows, "10.2f")


def habit(verdicts: Verdicts, sort: str) -> float:
    return mean(v.habits[sort] for samples in verdicts for v in samples)


def repeats(answers: Sequence[Sequence[str]]) -> float:
    sentences = [split(answer) for samples in answers for answer in samples]
    return mean(len(set(said)) < len(said) for said in sentences)


def habits_table(before: Verdicts, after: Verdicts) -> None:
    """Sentences of each habit in 100 answers."""
    rows = {name: [100 * habit(v, sort) for v in (before, after)] for sort, name in HABITS.items()}
    _table("in 100 answers", ("before", "after"), rows, "10.0f")


def _table(corner: str, head: Iterable[str], rows: Mapping[str, Iterable[float]], form: str) -> None:
    print(f"    {corner:22}" + "".join(f"{name:>10}" for name in head))
    for name, values in rows.items():
        print(f"    {name:22}" + "".join(f"{value:{form}}" for value in values))
    print(flush=True)
