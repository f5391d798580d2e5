"""The same prompts through two checkpoints, runs or models, side by side; blind if wanted."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import re
from itertools import islice
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup, escape

from tether.errors import RunError
from tether.reports.plots import frontier
from tether.reports.text import prompt_text, visible
from tether.runs import EvaluationDir, short_name
from tether.studio.answers import Answers
from tether.studio.shared import Studio, paged

_A_PAGE = 10  # prompts
_MOST = 200  # runs, and evaluations, to choose from
_LONGEST_MARKED = 600  # words: finding differences takes up to the product of the lengths


def routes(studio: Studio) -> APIRouter:
    """The page."""
    router = APIRouter()

    @router.get("/compare")
    def compare(request: Request, a: str = "", b: str = "", blind: bool = False, page: int = 1) -> HTMLResponse:
        sides = [Answers.of(studio, key) for key in (a, b)] if a and b else []
        answers = [side.by_prompt() for side in sides]
        common = [prompt for prompt in answers[0] if prompt in answers[1]] if sides else []
        prompts, page, pages = paged(common, page, _A_PAGE)
        shown = [
            _pair(prompt, answers[0][prompt], answers[1][prompt], swapped=blind and coin(prompt, a, b))
            for prompt in prompts
        ]
        means = [_mean([r["score"] for p in common for r in found[p]]) for found in answers]
        return studio.page(
            request, "compare.html.j2", choices=_choices(studio, a, b), a=a, b=b, blind=blind, sides=sides, pairs=shown,
            page=page, pages=pages, count=len(common), means=means, frontiers=[] if blind else _frontiers(studio, a, b),
        )  # fmt: skip

    return router


def coin(*about: str) -> bool:
    """A toss that is the same for the same prompt and sides: turning the page must not give the game away."""
    return hashlib.sha256("\0".join(about).encode("utf-8", "surrogatepass")).digest()[0] % 2 == 1


def _choices(studio: Studio, *chosen: str) -> list[tuple[str, str]]:
    """(key, name) of what may be chosen: what `tether evaluate` asked, and some evaluations of each run."""
    found = []
    named = {
        kind: [key.partition(":")[0] for key in chosen if f":{kind}:" in key] for kind in ("answers", "evaluations")
    }
    for evaluation_id in dict.fromkeys([*islice(studio.runs.evaluations(), _MOST), *named["answers"]]):
        with contextlib.suppress(RunError):  # damaged: there is nothing to choose
            evaluation = studio.runs.evaluation(evaluation_id)
            name = studio.runs.name(evaluation)
            for i, model in enumerate(evaluation.models):
                if evaluation.file(i).exists():
                    found.append((f"{evaluation_id}:answers:{i}", f"{name}: {short_name(model)}"))
    for run_id in dict.fromkeys([*islice(studio.runs.all(), _MOST), *named["evaluations"]]):
        run = studio.runs.open(run_id)
        cycles = run.evaluation_cycles
        every = max(1, -(-len(cycles) // 8))  # the first, the last, and some between
        chosen_cycles = {c for c in cycles if f"{run_id}:evaluations:{c}" in chosen}
        for cycle in sorted({*cycles[::every], *cycles[-1:], *chosen_cycles}):
            found.append((f"{run_id}:evaluations:{cycle}", f"{studio.runs.name(run)}, cycle {cycle}"))
    return found


def _frontiers(studio: Studio, *keys: str) -> list[dict[str, Any]]:
    """Score over KL of every evaluation by `tether evaluate` among the sides: its plot, and the models by number."""
    found = []
    for evaluation_id in dict.fromkeys(key.partition(":")[0] for key in keys if ":answers:" in key):
        evaluation = studio.runs.evaluation(evaluation_id)
        found.append({"name": studio.runs.name(evaluation), "models": evaluation.models, "plot": _frontier(evaluation)})
    return found


def _frontier(evaluation: EvaluationDir) -> str:
    """JSON of the plot; a model whose KL is not known, because its vocabulary is another, is not in it."""
    shown = [(f"model {i}", r) for i, r in enumerate(evaluation.results) if r["kl"] is not None]
    chosen = [(b["n"], b["kl"][0], b["score"][0]) for b in evaluation.best_of]
    return json.dumps(
        frontier(
            [r["kl"][0] for _, r in shown], [r["score"][0] for _, r in shown], [label for label, _ in shown], chosen,
            name="models", joined=False,
        )
    )  # fmt: skip


def _pair(prompt: str, a: list[dict[str, Any]], b: list[dict[str, Any]], *, swapped: bool) -> dict[str, Any]:
    left, right = (b, a) if swapped else (a, b)
    marked = differences(left[0]["completion"], right[0]["completion"])
    return {
        "prompt": prompt_text(prompt), "swapped": swapped, "a": a[0], "b": b[0], "left": left[0], "right": right[0],
        "left_text": marked[0], "right_text": marked[1],
        "left_mean": _mean([r["score"] for r in left]), "right_mean": _mean([r["score"] for r in right]),
    }  # fmt: skip


def _mean(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def differences(a: str, b: str) -> tuple[Markup, Markup]:
    """Both texts, escaped, with the words marked that the other does not have there."""
    words: list[list[str]] = [re.findall(r"\s+|[^\s]+", visible(text)) for text in (a, b)]
    if max(len(text) for text in words) > 2 * _LONGEST_MARKED:  # the spaces between them count
        return escape(visible(a)), escape(visible(b))
    matcher = difflib.SequenceMatcher(None, words[0], words[1], autojunk=False)
    marked: tuple[list[Markup], list[Markup]] = ([], [])
    for what, a0, a1, b0, b1 in matcher.get_opcodes():
        for out, part in zip(marked, (words[0][a0:a1], words[1][b0:b1]), strict=True):
            text = escape("".join(part))
            out.append(text if what == "equal" or not text else Markup("<mark>{}</mark>").format(text))
    return Markup("").join(marked[0]), Markup("").join(marked[1])
