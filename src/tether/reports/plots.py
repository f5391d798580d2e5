"""Plots as plotly takes them, in plain dicts: nothing but numbers and fixed words ever gets in, for plotly reads some
markup in text.

A color "--accent" is the name of a CSS variable; the page puts in its value, light or dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Plot = dict[str, Any]
Numbers = Sequence[float | None]

_MOST_POINTS = 1000  # beyond it, neighbors are averaged: a screen has no more columns


def line(
    x: Numbers, y: Numbers, *, unit: str,
    low: Numbers = (), high: Numbers = (),
    healthy: tuple[float, float] | None = None, mark: float | None = None, shows: Sequence[float] = (),
) -> Plot:  # fmt: skip
    """A curve over cycles or steps.

    low, high: edges of a band. healthy: a range to shade. mark: a level to draw. shows: levels the axis always reaches.
    """
    xs, ys, lows, highs = (_thin(v) for v in (x, y, low, high))
    traces: list[dict[str, Any]] = []
    if lows and highs:
        edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        traces += [
            {**edge, "x": xs, "y": lows},
            {**edge, "x": xs, "y": highs, "fill": "tonexty", "fillcolor": "--accent-soft"},
        ]
    traces.append({"x": xs, "y": ys, **_style(len(xs)), "hovertemplate": "%{y:.4g}<extra></extra>"})
    bottom, top = _range([*ys, *lows, *highs, *shows, *([] if mark is None else [mark])])
    shapes = []
    if healthy is not None:
        shapes.append(_band(max(healthy[0], bottom), min(healthy[1], top)))
    if mark is not None:
        shapes.append(_level(mark))
    return _plot(traces, x_title=unit, y_range=(bottom, top), shapes=shapes)


def points(x: Numbers, y: Numbers, *, unit: str, low: Numbers, high: Numbers) -> Plot:
    """A curve with an interval at every point; the first point's level is drawn through."""
    trace = {"x": x, "y": y, **_style(1), "error_y": _bars(y, low, high), "hovertemplate": "%{y:.4g}<extra></extra>"}
    return _plot([trace], x_title=unit, y_range=_range([*low, *high]), shapes=[_level(y[0])] if y else [])


def frontier(
    kl: Numbers, score: Numbers, labels: Sequence[str], best_of: Sequence[tuple[int, float, float]],
    *, name: str = "this run", joined: bool = True,
) -> Plot:  # fmt: skip
    """Score against what it cost; best_of: (n, KL, score) of choosing the best of n answers of the start model.

    joined: the points are one run's, in order; else each is a model of its own, with its label beside it.
    """
    style = _style(1) if joined else {**_style(1), "mode": "markers+text", "text": labels, "textposition": "top center"}
    traces: list[dict[str, Any]] = [
        {"x": kl, "y": score, **style, "name": name, "customdata": labels,
         "hovertemplate": "%{customdata}: score %{y:.4g} at %{x:.3g} nats<extra></extra>"}
    ]  # fmt: skip
    if best_of:
        traces.append(
            {"x": [b[1] for b in best_of], "y": [b[2] for b in best_of], "name": "best of n of the start model",
             "mode": "lines+markers", "line": {"color": "--warm", "dash": "dot"},
             "marker": {"color": "--warm", "size": 6},
             "customdata": [f"best of {b[0]}" for b in best_of],
             "hovertemplate": "%{customdata}: score %{y:.4g} at %{x:.3g} nats<extra></extra>"}
        )  # fmt: skip
    plot = _plot(traces, x_title="KL to the reference, nats per response", y_range=None, shapes=[])
    plot["layout"] |= {"hovermode": "closest", "showlegend": bool(best_of), "height": 270}
    return plot


def overoptimization(
    distance: Numbers, score: Numbers, golds: Sequence[Numbers], best_of: Sequence[tuple[float, float]],
    laws: Sequence[tuple[Numbers, Numbers]],
) -> Plot:  # fmt: skip
    """Proxy (right axis) and gold (left) over distance. best_of: (distance, first gold) of choosing the best of n
    answers of the start model. laws: curves of (distance, first gold), that of this run and that of best of n."""
    hover = "%{y:.4g} at %{x:.3g} √nats<extra></extra>"
    dots = {"mode": "markers", "hovertemplate": hover}
    traces: list[dict[str, Any]] = [
        {"x": distance, "y": score, "name": "score, right axis", "yaxis": "y2", "mode": "lines+markers",
         "hovertemplate": hover, "line": {"color": "--faint", "width": 1}, "marker": {"color": "--faint", "size": 4}}
    ]  # fmt: skip
    for i, gold in enumerate(golds):
        color = "--accent" if i == 0 else "--muted"
        name = "gold" if len(golds) == 1 else f"gold {i + 1}"
        traces.append({"x": distance, "y": gold, "name": name, **dots, "marker": {"color": color, "size": 6}})
    if best_of:
        traces.append(
            {"x": [d for d, _ in best_of], "y": [gold for _, gold in best_of], **dots,
             "name": "gold, best of n of the start model", "marker": {"color": "--warm", "size": 6}}
        )  # fmt: skip
    for (x, y), color in zip(laws, ("--accent", "--warm"), strict=False):
        traces.append({"x": x, "y": y, "mode": "lines", "hoverinfo": "skip", "showlegend": False,
                       "line": {"color": color, "dash": "dot", "width": 1}})  # fmt: skip
    plot = _plot(traces, x_title="distance: √KL to the reference, √nats", y_range=None, shapes=[])
    # Auto, else its ticks stand where those of the left axis do.
    right = {"overlaying": "y", "side": "right", "showgrid": False, "tickmode": "auto"}
    plot["layout"] |= {
        "hovermode": "closest",
        "showlegend": True,
        "height": 290,
        "yaxis2": {**plot["layout"]["yaxis"], **right},
    }
    return plot


def calibration(bins: Sequence[dict[str, Any]]) -> Plot:
    """Confidence against accuracy, with intervals, and the diagonal where both agree."""
    y = [b["accuracy"]["value"] for b in bins]
    bars = _bars(y, [b["accuracy"]["low"] for b in bins], [b["accuracy"]["high"] for b in bins])
    traces = [
        {"x": [0.5, 1], "y": [0.5, 1], "mode": "lines", "line": {"color": "--faint", "dash": "dash"},
         "hoverinfo": "skip"},
        {"x": [b["confidence"] for b in bins], "y": y, **_style(1), "error_y": bars,
         "customdata": [b["pairs"] for b in bins],
         "hovertemplate": "sure %{x:.2f}, right %{y:.2f}, %{customdata} pairs<extra></extra>"},
    ]  # fmt: skip
    plot = _plot(traces, x_title="probability given to the favorite", y_range=(0, 1.05), shapes=[])
    plot["layout"]["hovermode"] = "closest"
    return plot


# ---------------------------------------------------------------- parts


def _plot(
    traces: list[dict[str, Any]], *, x_title: str, y_range: tuple[float, float] | None, shapes: list[dict[str, Any]]
) -> Plot:
    axis = {"gridcolor": "--line", "linecolor": "--line", "zeroline": False, "automargin": True, "fixedrange": True}
    layout = {
        "height": 230,
        "margin": {"l": 44, "r": 8, "t": 10, "b": 36},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "--muted", "size": 12, "family": "system-ui, sans-serif"},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--ink"}},
        "showlegend": False,
        "legend": {"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom"},
        "xaxis": {**axis, "title": {"text": x_title, "standoff": 6}, "showgrid": False, "nticks": 7},
        "yaxis": {**axis, "nticks": 6, **({"range": y_range} if y_range else {})},
        "shapes": shapes,
    }
    return {"data": traces, "layout": layout}


def _style(count: int) -> dict[str, Any]:
    """A line, with dots while there are few points."""
    return {
        "mode": "lines+markers" if count <= 40 else "lines",
        "line": {"color": "--accent", "width": 2},
        "marker": {"color": "--accent", "size": 5},
    }


def _bars(y: Numbers, low: Numbers, high: Numbers) -> dict[str, Any]:
    return {
        "array": [h - v for v, h in zip(y, high, strict=True) if v is not None and h is not None],
        "arrayminus": [v - b for v, b in zip(y, low, strict=True) if v is not None and b is not None],
        "color": "--faint",
        "thickness": 1.2,
        "width": 3,
    }


def _band(low: float, high: float) -> dict[str, Any]:
    place = {"xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": max(low, high)}
    return {"type": "rect", **place, "fillcolor": "--good-soft", "line": {"width": 0}, "layer": "below"}


def _level(y: float | None) -> dict[str, Any]:
    place = {"xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y}
    return {"type": "line", **place, "line": {"color": "--faint", "dash": "dot", "width": 1}, "layer": "below"}


def _range(values: Numbers) -> tuple[float, float]:
    """From the lowest to the highest, with some air; fixed here, or plotly would make room for the shading too."""
    known = [v for v in values if v is not None]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    air = 0.07 * (high - low) or 0.1 * abs(high) or 0.1
    return low - (0 if low == 0 else air), high + (0 if high == 1 and low >= 0 else air)


def _thin(values: Numbers) -> list[float | None]:
    """At most `_MOST_POINTS` values: means of equal runs of neighbors; None where a run has no number."""
    width = -(-len(values) // _MOST_POINTS)
    if width <= 1:
        return list(values)
    runs = ([v for v in values[i : i + width] if v is not None] for i in range(0, len(values), width))
    return [sum(run) / len(run) if run else None for run in runs]
