"""What a model judges or revises by: a text file of principles, of which one is drawn for each pair or round.

Constitutional AI (Bai et al. 2022, arXiv:2212.08073) draws a principle per comparison, so that no single wording
decides every label.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from tether.config.judge import CONSTITUTIONS
from tether.errors import DataError, did_you_mean_path
from tether.feedback.queue import draw


def read_constitution(name: str, key: str = "judge.constitution") -> tuple[str, ...]:
    """Its principles: the paragraphs of a file in UTF-8, or its lines where no empty line parts them.

    # begins a comment.

    name: a file, or one of those that are shipped. key: of the config, that names it. Raises DataError for a file
    without a principle.
    """
    if name in CONSTITUTIONS:
        data = files("tether.feedback").joinpath("constitutions", f"{name}.txt").read_bytes()
    else:
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            hint = did_you_mean_path(name) if isinstance(error, FileNotFoundError) else ""
            raise DataError(
                f"{key}={name} cannot be read ({error.strerror}): there would be nothing to go by."
                f"{hint} Name a text file, or one of {', '.join(CONSTITUTIONS)}."
            ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{key}={name}, line {line}: not UTF-8, so the model would read something else than you "
            "wrote. Save the file as UTF-8."
        ) from None
    lines = ("" if not line.strip() else line for line in text.splitlines() if not line.lstrip().startswith("#"))
    paragraphs = [part for part in re.split(r"\n\n+", "\n".join(lines).strip()) if part.strip()]
    parts = paragraphs[0].splitlines() if len(paragraphs) == 1 else paragraphs
    principles = tuple(" ".join(part.split()) for part in parts)
    if not principles:
        raise DataError(
            f"{key}={name} holds no principle: there would be nothing to go by. Write one a line, or one a paragraph."
        )
    return principles


def draw_principle(principles: tuple[str, ...], *, seed: int, item: str) -> str:
    """The principle that an item is judged by: it follows from the seed and the item alone.

    item: its fingerprint, so that the same pair in another store has the same principle.
    """
    return principles[draw(seed, "principle", item) % len(principles)]


def draw_principles(principles: tuple[str, ...], *, seed: int, item: str, count: int) -> tuple[str, ...]:
    """One principle for each of `count` rounds, from the seed and the item alone; none again before all were drawn."""
    order = sorted(range(len(principles)), key=lambda i: draw(seed, "round", item, i))
    return tuple(principles[order[i % len(order)]] for i in range(count))
