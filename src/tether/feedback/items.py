"""`tether label`: makes the queue that people work through in the studio, and says how far they are.

Items come from a file of answers, from what a run sampled, or from a model that answers on the spot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tether.data.cells import as_answer, as_prompt
from tether.data.pairs import triple
from tether.data.table import Table, kind, listed, read_table
from tether.errors import ConfigError, DataError, RunError, StoreError
from tether.feedback.queue import draw
from tether.feedback.records import Added, Answer, Filters, Item, Progress, Prompt, prompt_of
from tether.feedback.schema import to_json
from tether.feedback.store import Store, check_fraction
from tether.runs import Run

_FORMS = '{"prompt": "…", "answers": ["…", "…"]}, {"prompt": "…", "a": "…", "b": "…"} or prompt, chosen, rejected'
SHOWN_COLUMNS = ["prompt", "completion", "finish_reason", "prompt_index", "response_index"]


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Items from one source, and prompts that gave none."""

    items: list[Item]
    where: str  # for people
    too_few: int = 0  # prompts without enough answers that differ
    first: bool = False  # before everything that waits
    notes: Sequence[str] = ()  # further lines for people


def label(
    *, to: str, source: ItemBatch | None = None, gold: str | None = None, overlap: float = 0.2, seed: int | None = None,
    guidelines: str | None = None, annotators: Sequence[str] = (), export: str | None = None, judges: bool = False,
    status: bool = False,
) -> list[str]:  # fmt: skip
    """Do what the command line asks for; returns what was done, a line each.

    seed: of a new store; one that is there keeps its own. judges: their labels are exported among the pairs too.
    Everything is read before anything is written: a mistake in the third file leaves the store as it was.
    """
    check_fraction("overlap", overlap)
    checked = read_items(gold, gold=True) if gold else None
    text = _read_text(guidelines) if guidelines else None
    if judges and export is None:
        raise ConfigError("--judges goes with --export: nothing else is written. Add --export DIR, or leave it out.")
    adds = bool(source or checked or text or annotators)
    if not (adds or export or status):
        raise ConfigError(
            "nothing to do: neither items, gold, guidelines nor an annotator to add, nothing to export or to show. "
            "Give --from FILE, say; tether label --help lists the rest."
        )
    lines = []
    new = not Path(to).exists() or not Path(to).stat().st_size
    with Store(to, create=adds, seed=seed if new else None) as store:
        if seed is not None and seed != store.mix.seed:
            lines.append(f"{to} keeps its own seed, {store.mix.seed}, for order, sides and overlap")
        for batch in (source, checked):
            if batch is not None:
                lines += batch.notes
                added = store.add_items(batch.items, overlap=overlap, first=batch.first)
                lines.append(_describe_added(batch, added, to))
        if text is not None:
            lines.append(f"{guidelines}: version {store.add_guidelines(text)} of the guidelines, in force")
        for name in annotators:
            lines.append(f"{name} is registered" + ("" if store.add_annotator(name) else " already"))
        if export is not None:
            done = store.export(export, Filters(judges=judges))
            lines.append(
                f"{done.path}: {done.rows} pairs in preferences.jsonl, {done.events} events, {done.items} items"
            )
        if status:
            lines += _status(to, store.overview())
    return lines


def _describe_added(batch: ItemBatch, added: Added, to: str) -> str:
    line = f"{batch.where}: {added.new} items added to {to}, {added.twice} of them for two people"
    if added.known:
        line += f"; {added.known} were there already"
    if batch.first and batch.items:
        line += "; all of them are asked first"
    if batch.too_few:
        line += f"; {batch.too_few} prompts left out, whose answers are too few or all the same"
    return line


def _status(path: str, now: Progress) -> list[str]:
    done = now.wanted - now.remaining
    share = f" ({done / now.wanted:.0%})" if now.wanted else ""
    version = f"guidelines version {now.guideline}" if now.guideline else "no guidelines"
    lines = [f"{path}: {done} of {now.wanted} labels{share} on {now.items} items; {now.gold} gold items; {version}"]
    width = max((len(person.annotator) for person in now.annotators), default=0)
    return lines + [
        f"  {person.annotator:<{width}}  {person.labels} labels, {person.skips} skips" for person in now.annotators
    ]


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"{path} cannot be read ({why}): there would be no guidelines. Check the path.") from error


# ---------------------------------------------------------------- from a file


def read_items(path: str, limit: int | None = None, *, gold: bool = False) -> ItemBatch:
    """Items of a JSONL or Parquet file; which answer was preferred there is not shown to anybody.

    gold: the better answer is known: `chosen`, or `gold`, an index or a, b.
    """
    table = read_table(path, limit=limit)
    items = [_item(table, row, gold=gold) for row in range(len(table))]
    return ItemBatch(items, f"{path} (gold)" if gold else path)


def _item(table: Table, row: int, *, gold: bool) -> Item:
    cells = table.rows[row]
    better: int | None = None
    if "chosen" in cells and "rejected" in cells:
        prompt, *values = triple(table, row)
        column, better = "chosen", 0
        reasons = [cells.get(f"{name}_finish_reason") for name in ("chosen", "rejected")]
    else:
        column = "answers" if "answers" in cells else "a"
        values = _listed_answers(table, row)
        reasons = [None] * len(values)
        with table.at(row, "prompt"):
            prompt = as_prompt(cells.get("prompt"))
        better = _better(table, row, len(values)) if gold else None
    with table.at(row, column):
        try:
            answers = tuple(_answer(prompt, value, reason) for value, reason in zip(values, reasons, strict=True))
            return Item(
                prompt,
                answers,
                group=None if cells.get("group") is None else str(cells["group"]),
                gold=better if gold else None,
                source={"file": table.path, "row": row},
            )
        except StoreError as error:
            raise DataError(str(error)) from error


def _listed_answers(table: Table, row: int) -> list[Any]:
    cells = table.rows[row]
    if isinstance(cells.get("answers"), list):
        return list(cells["answers"])
    if "a" in cells and "b" in cells:
        return [cells["a"], cells["b"]]
    raise DataError(f"{table.place(row)}: the columns {listed(cells)} hold no answers to compare. Write {_FORMS}.")


def _better(table: Table, row: int, answers: int) -> int:
    value = table.rows[row].get("gold")
    index = "ab".find(value) if isinstance(value, str) and len(value) == 1 else value
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < answers:
        raise table.error(
            row,
            "gold",
            f"is {kind(value)}, and no answer of {answers}: nobody could be right. Write 0 to {answers - 1}.",
        )
    return index


def _answer(prompt: Prompt, value: Any, finish_reason: str | None) -> Answer:
    """A text, the assistant's message, or {"text": …, "finish_reason": …, "source": {…}}."""
    source = None
    if isinstance(value, dict) and "text" in value:
        value, source, finish_reason = value["text"], value.get("source"), value.get("finish_reason")
        if source is not None and not isinstance(source, dict):
            raise DataError(f"an answer's source is {kind(source)}, where an object belongs. Write it as {{…}}.")
    answer = as_answer(prompt, value)
    text = answer if isinstance(answer, str) else answer[0].get("content")
    if not isinstance(text, str):
        raise DataError("holds an answer that is more than text, which the pages cannot show. Give its text alone.")
    return Answer(text, source, finish_reason or "stop")


# ---------------------------------------------------------------- from a run


def items_of_run(
    path: str, *, cycle: int | None = None, answers: int = 2, limit: int | None = None, seed: int = 0
) -> ItemBatch:
    """One item a prompt, from what a run answered it: in one cycle, or in whichever, so that people see it learn.

    Which answers, and of which prompts where there are more than `limit`, follows from the seed; answers that say the
    same count as one.
    """
    check_answers("--per-prompt", answers)
    run = Run.open(path)
    cycles = cycles_of(run) if cycle is None else [cycle]
    found: dict[str, dict[str, tuple[str, dict[str, int]]]] = {}  # prompt → answer → how it ended, where first given
    for number in cycles:
        for row in run.rollouts(number).select(SHOWN_COLUMNS).to_pylist():
            where = {"cycle": number} | {name: row[name] for name in SHOWN_COLUMNS[3:]}
            found.setdefault(row["prompt"], {}).setdefault(row["completion"], (row["finish_reason"], where))
    items = []
    for prompt, given in found.items():
        drawn = sorted(given.items(), key=lambda answer: draw(seed, "answer", *answer[1][1].values()))[:answers]
        if len(drawn) == answers:
            shown = tuple(Answer(text, {"run": path} | where, reason) for text, (reason, where) in drawn)
            items.append(Item(prompt_of(prompt), shown))
    too_few = len(found) - len(items)
    if limit is not None:  # drawn: the first would all be of the first cycles
        items = sorted(items, key=lambda item: draw(seed, "prompt", to_json(item.prompt)))[:limit]
    return ItemBatch(items, path, too_few=too_few)


def cycles_of(run: Run) -> list[int]:
    """Cycles whose rollouts were written, ascending; RunError where none were."""
    if not run.rollout_cycles:
        raise RunError(
            f"{run.path} holds no rollouts, so there are no answers to compare. Name a run of tether ppo, with "
            "log.rollouts_every above 0."
        )
    return run.rollout_cycles


# ---------------------------------------------------------------- from a model


def items_of_model(
    model: str, prompts: str, *, answers: int = 2, limit: int | None = None, seed: int = 0, **sampling: Any
) -> ItemBatch:
    """One item a prompt of a file, answered by the model; sampling: of `tether.generate`."""
    check_answers("--answers", answers)
    table = read_table(prompts, limit=limit)
    table.require(["prompt"])
    from tether.train.evaluate import generate  # takes seconds to load

    prompt_rows = [row["prompt"] for row in table.rows]
    generations = generate(model, prompt_rows, samples=answers, seed=seed, **sampling)
    items = []
    for i, prompt in enumerate(prompt_rows):
        given = generations[i * answers : (i + 1) * answers]
        if len({g.completion for g in given}) == answers:
            source = {"model": model, "seed": seed, "prompt_index": i}
            drawn = [Answer(g.completion, source | {"response_index": k}, g.finish_reason) for k, g in enumerate(given)]
            items.append(Item(prompt, tuple(drawn)))
    return ItemBatch(items, model, too_few=len(prompt_rows) - len(items))


def check_answers(flag: str, answers: int) -> None:
    """ConfigError for fewer than two."""
    if answers < 2:
        raise ConfigError(f"{flag} {answers}: there would be nothing to compare. Give 2 for pairs, more for rankings.")
