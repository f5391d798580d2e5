"""A cycle's responses as a table, and one response token by token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse

from tether.errors import RunError
from tether.reports.html import safe_json
from tether.reports.signals import SIGNALS, Row, Scale, ppo_of, signals_of, surprise, tokens_of, value_curve
from tether.reports.text import prompt_text
from tether.runs import Run
from tether.runs.files import read_table
from tether.studio.shared import Studio, paged

_A_PAGE = 50  # responses
_MOST_SHOWN = 4000  # tokens of a response with numbers; the rest is there as text
_STRIP = 12  # cycles in the strip of one prompt
_MOST_SEARCHED = 100  # cycles looked through for it

Folder = Literal["rollouts", "evaluations"]

SORTS = {
    "best": ("best first", lambda r: -(r["score"] or 0.0)),
    "worst": ("worst first", lambda r: r["score"] or 0.0),
    "surprise": ("most surprising to the critic first", lambda r: -r["surprise"]),
    "disagreement": ("reward models that disagree most first", lambda r: -r["disagreement"]),
    "kl": ("highest KL first", lambda r: -(r["kl"] or 0.0)),
    "length": ("longest first", lambda r: -r["length"]),
    "order": ("as they were drawn", lambda r: r["number"]),
}


def routes(studio: Studio) -> APIRouter:
    """The pages."""
    router = APIRouter()

    @router.get("/runs/{run_id}/rollouts")
    def to_cycle(run_id: str, cycle: int) -> RedirectResponse:
        return RedirectResponse(f"/runs/{run_id}/rollouts/{cycle}")

    @router.get("/runs/{run_id}/{folder}/{cycle}")
    def cycle_page(
        request: Request, run_id: str, folder: Folder, cycle: int,
        sort: str = "best", find: str = "", finish: str = "", page: int = 1,
    ) -> Any:  # fmt: skip
        run = studio.runs.open(run_id)
        there = run.cycles(folder)
        if there and cycle not in there:  # a point of a curve between two that were written
            return RedirectResponse(f"/runs/{run_id}/{folder}/{min(there, key=lambda c: abs(c - cycle))}")
        content = read(run, folder, cycle)
        sort = sort if sort in SORTS else "best"
        rows = [
            r for r in content.rows
            if (not finish or r["finish_reason"] == finish)
            and find.lower() in f"{r['prompt']}\n{r['completion']}".lower()
        ]  # fmt: skip
        rows.sort(key=SORTS[sort][1])
        shown, page, pages = paged(rows, page, _A_PAGE)
        return studio.page(
            request, "cycle.html.j2", id=run_id, name=studio.runs.name(run), unit=run.kind.unit, folder=folder,
            cycle=cycle, there=there, rows=shown, count=len(rows), total=len(content.rows), page=page,
            pages=pages, sort=sort, find=find, finish=finish, parts=content.parts, ensembles=content.ensembles,
            sorts={k: v[0] for k, v in SORTS.items() if content.ensembles or k != "disagreement"},
            color=content.color, prompt_text=prompt_text,
        )  # fmt: skip

    @router.get("/runs/{run_id}/{folder}/{cycle}/{number}")
    def completion_page(
        request: Request, run_id: str, folder: Folder, cycle: int, number: int, signal: str = "value"
    ) -> HTMLResponse:
        run = studio.runs.open(run_id)
        content = read(run, folder, cycle)
        if not 0 <= number < len(content.rows):
            raise RunError(f"cycle {cycle} has {len(content.rows)} responses: there is no number {number}.")
        row = content.rows[number]
        if (ppo := ppo_of(run.config)) is None:
            raise RunError(
                f"{studio.runs.name(run)} is a run of tether {run.kind.command}: it has no per-token values."
            )
        signals = signals_of(row)
        signal = signal if signal in signals else next(iter(signals))
        steps = {key: [content.scale(key).step(v) for v in s.of(row)[:_MOST_SHOWN]] for key, s in signals.items()}
        tokens = tokens_of(row, steps[signal], ppo)
        says = {key: s.says for key, s in signals.items()}
        return studio.page(
            request, "completion.html.j2", id=run_id, name=studio.runs.name(run), unit=run.kind.unit, folder=folder,
            cycle=cycle, number=number, count=len(content.rows), row=row, tokens=tokens, signal=signal, signals=signals,
            scale=content.scale(signal), curve=value_curve(row, _MOST_SHOWN), rest="".join(row["text"][_MOST_SHOWN:]),
            strip=_strip(run, folder, row), prompt=prompt_text(row["prompt"]), parts=content.parts,
            ensembles=content.ensembles,
            data=safe_json({"steps": steps, "lines": [t["lines"] for t in tokens], "says": says}),
        )  # fmt: skip

    return router


# ---------------------------------------------------------------- what is read


@dataclass(frozen=True)
class Content:
    """A cycle's responses."""

    rows: list[
        dict[str, Any]
    ]  # with `number`, their place in the file, `surprise` and `disagreement`, of the ensembles
    parts: list[str]  # names of the reward sources
    ensembles: list[str]  # those of them that have several reward models
    scales: dict[str, Scale]  # filled as signals are asked for

    def scale(self, key: str) -> Scale:
        """A signal's colors over the cycle."""
        if key not in self.scales:
            self.scales[key] = Scale.of(SIGNALS[key], self.rows)
        return self.scales[key]

    def color(self, row: Row, ensemble: str) -> int:
        """How far an ensemble disagrees on a response: 0, or 1 … STEPS among the cycle's."""
        most = max(r[f"disagreement/{ensemble}"] for r in self.rows)
        return Scale(0.0, most or 1.0).step(row[f"disagreement/{ensemble}"])


def read(run: Run, folder: Folder, cycle: int) -> Content:
    """A cycle's responses; kept in memory while the file is the same. RunError where the cycle was not written."""
    there = run.cycles(folder)
    if cycle not in there:
        raise RunError(f"cycle {str(cycle)[:20]} is not among the {folder} that were written ({len(there)} are).")
    stamp = run.table_file(folder, cycle).stat().st_mtime_ns
    return _read(str(run.path), folder, cycle, stamp)


@lru_cache(maxsize=8)
def _read(path: str, folder: Folder, cycle: int, stamp: int) -> Content:
    table = Run(path).table(folder, cycle)
    rows = table.to_pylist()
    parts, ensembles = (
        [n.removeprefix(kind) for n in table.column_names if n.startswith(kind)] for kind in ("score/", "disagreement/")
    )
    for number, row in enumerate(rows):
        disputed = max((row[f"disagreement/{name}"] for name in ensembles), default=0.0)
        row |= {"number": number, "surprise": surprise(row), "disagreement": disputed}
    return Content(rows, parts, ensembles, {})


def _strip(run: Run, folder: Folder, row: Row) -> list[dict[str, Any]]:
    """The same prompt at other cycles, evenly over at most `_STRIP` of them: so one sees it learn."""
    cycles = run.cycles(folder)
    every = max(1, -(-len(cycles) // (_STRIP if folder == "evaluations" else _MOST_SEARCHED)))
    found = []
    for cycle in sorted({*cycles[::every], *cycles[-1:]}):
        file = run.table_file(folder, cycle)
        prompts = read_table(file, columns=["prompt"])["prompt"].to_pylist()
        numbers = [i for i, prompt in enumerate(prompts) if prompt == row["prompt"]]
        if numbers:  # which prompts are asked may change when a run is continued
            rows = read_table(file, columns=["completion", "score"]).take(numbers).to_pylist()
            scores = [answer["score"] for answer in rows if answer["score"] is not None]
            mean = sum(scores) / len(scores) if scores else None
            found.append({"cycle": cycle, "number": numbers[0], "completion": rows[0]["completion"], "mean": mean})
    thin = max(1, -(-len(found) // _STRIP))
    return [at for i, at in enumerate(found) if i % thin == 0 or at is found[-1]]
