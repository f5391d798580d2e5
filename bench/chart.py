"""A line chart as an SVG file, written by hand: the docs' plots then need nothing to draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]  # told apart by color-blind readers too
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 360, 60, 150, 24, 44


@dataclass(frozen=True)
class Line:
    """Points in one color; lines of one name share a color and one entry in the legend."""

    name: str
    points: list[tuple[float, float]]
    dots: bool = False  # marks instead of a stroke


def draw(
    path: Path, lines: list[Line], *, x: str, y: str, log_y: tuple[float, float] | None = None, bar: float | None = None
) -> None:
    """Write the chart. log_y: (lowest, highest) power of ten shown. bar: a dashed level to compare with."""
    xs = [p[0] for line in lines for p in line.points]
    ys = [math.log10(max(p[1], 1e-12)) if log_y else p[1] for line in lines for p in line.points]
    low, high = log_y or (min(ys), max(ys) + 0.05 * (max(ys) - min(ys)))
    left, right = min(0.0, *xs), max(xs)

    def across(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - left) / (right - left)

    def up(value: float) -> float:
        level = math.log10(max(value, 1e-12)) if log_y else value
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(level, low), high)) / (high - low)

    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
           'font-family="sans-serif" font-size="12">',
           f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>']  # fmt: skip
    levels = [10.0**p for p in range(math.ceil(low), math.floor(high) + 1)] if log_y else _ticks(low, high)
    for level in levels:
        out.append(
            f'<line x1="{LEFT}" x2="{across(right):.0f}" y1="{up(level):.1f}" y2="{up(level):.1f}" stroke="#ddd"/>'
        )
        out.append(f'<text x="{LEFT - 8}" y="{up(level) + 4:.1f}" text-anchor="end" fill="#444">{level:g}</text>')
    for tick in _ticks(left, right):
        out.append(f'<text x="{across(tick):.0f}" y="{HEIGHT - 24}" text-anchor="middle" fill="#444">{tick:g}</text>')
    if bar is not None:
        out.append(
            f'<line x1="{LEFT}" x2="{across(right):.0f}" y1="{up(bar):.1f}" y2="{up(bar):.1f}" '
            'stroke="#444" stroke-dasharray="4 3"/>'
        )
    names = list(dict.fromkeys(line.name for line in lines))
    for line in lines:
        color = COLORS[names.index(line.name) % len(COLORS)]
        if line.dots:
            out += [f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="3.5" fill="{color}"/>' for a, b in line.points]
        else:
            points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line.points)
            out.append(
                f'<polyline points="{points}" fill="none" stroke="{color}" stroke-opacity=".75" stroke-width="1.5"/>'
            )
    for i, name in enumerate(names):
        out.append(
            f'<text x="{WIDTH - RIGHT + 12}" y="{TOP + 14 + 20 * i}" fill="{COLORS[i % len(COLORS)]}">{name}</text>'
        )
    out.append(
        f'<text x="{(LEFT + across(right)) / 2:.0f}" y="{HEIGHT - 6}" text-anchor="middle" fill="#444">{x}</text>'
    )
    out.append(f'<text x="{LEFT - 50}" y="14" fill="#444">{y}</text>')
    path.write_text("\n".join([*out, "</svg>"]) + "\n", encoding="utf-8")


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about six."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= 7)
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
