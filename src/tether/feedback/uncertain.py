"""Which answers of a run people should compare: those of whose order its reward models, or a judge, are least sure.

    rollouts ── two answers to one prompt ── how sure each reward model is ── the least sure pairs ── queue

Everything is turned into probabilities first. A reward model prefers a to b with P = σ((r_a - r_b) / s), where s is the
root mean square of its differences over the pairs that are looked at: relative to what it usually says.

- members of an ensemble: the standard deviation of their P's. Two members that are far apart and yet both sure of the
  same answer disagree about nothing that a label could tell.
  Source: Christiano et al. 2017, section 2.2.4 (arXiv:1706.03741).
- one reward model: 1 - |2P - 1|, which is 1 where both answers score alike.
- a judge that has labeled the pair in the store, and prefers the other answer than the (mean) P: |P_judge - P|. Such a
  pair comes before all others: two readings contradict each other, where the others only waver.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from tether.config import source_name
from tether.errors import ConfigError, RunError
from tether.feedback.items import SHOWN_COLUMNS, ItemBatch, cycles_of
from tether.feedback.queue import draw
from tether.feedback.records import Answer, Filters, Item, prompt_of
from tether.feedback.schema import to_json
from tether.feedback.store import Store
from tether.runs import Run
from tether.statistics import sigmoid

LIMIT = 100  # pairs
_LOOKED_AT = 4  # prompts for each pair that is wanted: what is least sure among them, and still what is written now
_WHERE = ["prompt_index", "response_index"]


@dataclass(frozen=True, slots=True)
class _Response:
    answer: Answer
    scores: list[float]  # of each member, or of the one reward model


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What a judge said of a pair that is in the store."""

    judge: str
    texts: tuple[str, str]  # in stored order
    probability: float  # that the first is better


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two answers to a prompt, and how unsure their order is."""

    prompt: str  # JSON
    answers: tuple[Answer, Answer]
    probabilities: list[float]  # of each member, that the first is better
    contrary: _Verdict | None  # of a judge that prefers the other one
    uncertainty: float

    def item(self, name: str, *, swapped: bool = False) -> Item:
        answers = self.answers[::-1] if swapped else self.answers
        said = [1 - p if swapped else p for p in self.probabilities]
        why: dict[str, Any] = {"why": self._why(name), "uncertainty": round(self.uncertainty, 4)}
        why["probabilities"] = [round(p, 4) for p in said]
        if self.contrary is not None:
            why["judge"] = round(self.contrary.probability, 4)
        return Item(json.loads(self.prompt), answers, source={"uncertain": why})

    def _why(self, name: str) -> str:
        if self.contrary is not None:
            return f"{self.contrary.judge} and {name} prefer different answers"
        return f"members of {name} disagree" if len(self.probabilities) > 1 else f"{name} scores both nearly alike"


def uncertain_items(path: str, *, to: str, cycle: int | None = None, limit: int = LIMIT) -> ItemBatch:
    """The `limit` pairs of a run's answers of whose order its reward models, or a judge in the store `to`, are least
    sure; at most one of each prompt.

    A prompt's answers are those of the latest cycle in which there are two; where a cycle has one, of the latest two.
    Cycles are read from the latest back until there are four prompts for each pair that is wanted: people are asked
    about what the policy writes now. Pairs that a judge has labeled count whichever cycles they are from. Pairs that
    have all the labels of people that they are to have are left out.
    """
    if limit < 1:
        raise ConfigError(f"--limit {limit}: no pair would be asked about. Give 1 or more.")
    run = Run.open(path)
    cycles = cycles_of(run) if cycle is None else [cycle]
    name, column = _reward_model(run, cycles[-1])
    filled = Path(to).exists() and Path(to).stat().st_size > 0
    with Store(to, create=False) if filled else nullcontext() as store:
        verdicts = _verdicts(store) if store else {}
        newest, every, read = _responses(run, cycles, column, _LOOKED_AT * limit, verdicts)
        among = f"cycle {read[0]}" if len(read) == 1 else f"cycles {read[-1]} to {read[0]}"
        ranked = _ranked(newest, every, verdicts)
        if not ranked:
            raise RunError(
                f"{path}: no prompt has two answers in {among} that differ and that {name} scored, so there is nothing "
                "to compare. Name a run with ppo.responses_per_prompt of 2 or more, or leave --cycle out."
            )
        chosen = _choose(ranked, limit, store, name)
    notes = [f"{path}, {among}: {len(chosen)} of {len(ranked)} pairs, one of a prompt, whose order is least certain"]
    return ItemBatch(
        [item for _, item in chosen], path, first=True, notes=notes + _counts([p for p, _ in chosen], name)
    )


def _reward_model(run: Run, cycle: int) -> tuple[str, str]:
    """(name, column of its scores) of the run's first ensemble; where it has none, of its first reward model."""
    sources = getattr(run.config, "reward", [])
    ensembles = [source for source in sources if source.models]
    models = [source for source in sources if source.model or source.url]
    if not ensembles + models:
        names = ", ".join(map(source_name, sources)) or "given from Python"
        raise RunError(
            f"{run.path} has no reward model: its reward is {names}, and a function has no doubts that a label could "
            "settle. Leave --uncertain out, or name a run that has `model`, `models` or `url` in its reward."
        )
    name = source_name((ensembles or models)[0])
    column = f"members/{name}" if ensembles else f"score/{name}"
    if column not in run.table("rollouts", cycle, [column]).column_names:
        raise RunError(
            f"the rollouts of {run.path} do not hold {column}: an earlier version of tether wrote them, and how far "
            "reward models disagree about a pair cannot be told. Continue the run with this version, or name another."
        )
    return name, column


# ---------------------------------------------------------------- what is read


def _verdicts(store: Store) -> dict[str, list[_Verdict]]:
    """prompt → what judges said of pairs with it; gold left out, which checks people."""
    found: dict[str, list[_Verdict]] = {}
    for label in store.labels(Filters(judges=True)):
        if label.probability is not None and label.gold is None and label.repeat_of is None:
            item = store.item(label.item)
            texts = (item.answers[0].text, item.answers[1].text)
            verdict = _Verdict(label.annotator, texts, label.probability)
            found.setdefault(to_json(item.prompt), []).append(verdict)
    return found


def _responses(
    run: Run, cycles: Sequence[int], column: str, enough: int, judged: Collection[str]
) -> tuple[dict[str, dict[str, _Response]], dict[str, dict[str, _Response]], list[int]]:
    """prompt → text → response: (two or more of each prompt's latest ones, every one to prompts in `judged`), and the
    cycles of the former, latest first."""
    newest: dict[str, dict[str, _Response]] = {}
    every: dict[str, dict[str, _Response]] = {}
    read: list[int] = []
    for cycle in reversed(cycles):
        wanted = sum(len(given) > 1 for given in newest.values()) < enough
        if not wanted and not judged:
            break
        if wanted:
            read.append(cycle)
        for prompt, given in _responses_of(run, cycle, column).items():
            if wanted and len(newest.get(prompt, {})) < 2:
                newest[prompt] = given | newest.get(prompt, {})
            if prompt in judged:
                every[prompt] = given | every.get(prompt, {})
    return newest, every, read


def _responses_of(run: Run, cycle: int, column: str) -> dict[str, dict[str, _Response]]:
    """A cycle's responses that were scored: prompt → text → the first that says so."""
    table = run.table("rollouts", cycle, [*SHOWN_COLUMNS, column])
    found: dict[str, dict[str, _Response]] = {}
    for row in table.to_pylist():
        scores = row.get(column)
        if scores is not None:
            source = {"run": str(run.path), "cycle": cycle} | {name: row[name] for name in _WHERE}
            response = _Response(
                Answer(row["completion"], source, row["finish_reason"]),
                scores if isinstance(scores, list) else [scores],
            )
            found.setdefault(to_json(prompt_of(row["prompt"])), {}).setdefault(row["completion"], response)
    return found


# ---------------------------------------------------------------- what is made of it


def _ranked(
    newest: Mapping[str, Mapping[str, _Response]], every: Mapping[str, Mapping[str, _Response]],
    verdicts: Mapping[str, list[_Verdict]],
) -> list[_Pair]:  # fmt: skip
    """All pairs, least certain first; of pairs that are as uncertain, that of the latest cycle first."""
    pairs: list[tuple[str, _Response, _Response, list[_Verdict]]] = []
    for prompt in [*newest, *(every.keys() - newest.keys())]:
        given = every.get(prompt, {})
        of_texts: dict[frozenset[str], list[_Verdict]] = {}
        for verdict in verdicts.get(prompt, []):
            if all(text in given for text in verdict.texts):
                of_texts.setdefault(frozenset(verdict.texts), []).append(verdict)
        for said in of_texts.values():
            a, b = said[0].texts
            pairs.append((prompt, given[a], given[b], [v for v in said if v.texts == (a, b)]))
        for x, y in combinations(newest.get(prompt, {}).values(), 2):
            if frozenset((x.answer.text, y.answer.text)) not in of_texts:
                x, y = sorted((x, y), key=lambda response: draw("answer", response.answer.text))
                pairs.append((prompt, x, y, []))
    differences = [[p - q for p, q in zip(x.scores, y.scores, strict=True)] for _, x, y, _ in pairs]
    scale = math.sqrt(fmean([d * d for row in differences for d in row] or [0.0])) or 1.0
    found = []
    for (prompt, x, y, said), row in zip(pairs, differences, strict=True):
        probabilities = [sigmoid(d / scale) for d in row]
        p = fmean(probabilities)
        contrary = [v for v in said if (v.probability - 0.5) * (p - 0.5) < 0]
        worst = max(contrary, key=lambda v: abs(v.probability - p), default=None)
        if worst is not None:
            uncertainty = abs(worst.probability - p)
        else:
            uncertainty = pstdev(probabilities) if len(probabilities) > 1 else 1 - abs(2 * p - 1)
        found.append(_Pair(prompt, (x.answer, y.answer), probabilities, worst, uncertainty))
    return sorted(found, key=lambda pair: (pair.contrary is None, -pair.uncertainty))


def _choose(ranked: Sequence[_Pair], limit: int, store: Store | None, name: str) -> list[tuple[_Pair, Item]]:
    """The first `limit` of different prompts that people have not judged; those in the store, as they are there."""
    chosen: dict[str, tuple[_Pair, Item]] = {}
    for pair in ranked:
        if len(chosen) == limit:
            break
        if pair.prompt in chosen:
            continue
        item, swapped = pair.item(name), pair.item(name, swapped=True)
        wanted = store.labels_wanted(item) if store else None
        if store and wanted is None and (wanted := store.labels_wanted(swapped)) is not None:
            item = swapped
        if wanted != 0:
            chosen[pair.prompt] = (pair, item)
    return list(chosen.values())


def _counts(pairs: Sequence[_Pair], name: str) -> list[str]:
    """How many of them are asked about for which reason."""
    judges = Counter(pair.contrary.judge for pair in pairs if pair.contrary is not None)
    lines = [f"  {count} where {judge} and {name} prefer different answers" for judge, count in judges.most_common()]
    rest = [pair for pair in pairs if pair.contrary is None]
    if rest and len(rest[0].probabilities) > 1:
        most, least = rest[0].uncertainty, rest[-1].uncertainty
        lines.append(f"  {len(rest)} by how far members of {name} disagree: P(better) by {most:.3f} to {least:.3f}")
    elif rest:
        most, least = ((1 + 1 - pair.uncertainty) / 2 for pair in (rest[0], rest[-1]))
        lines.append(f"  {len(rest)} by how close {name} scores both answers: P(better) {most:.3f} to {least:.3f}")
    return lines
