"""What can be seen of a token: signals, their colors, the arithmetic with its numbers, and V(t) as a curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tether.config import Config, PPOConfig, QLearningConfig
from tether.config.ppo import PPOSection
from tether.reports.text import visible

Row = Mapping[str, Any]
"""A response as rollouts/ hold it (run directory, schema 1)."""

STEPS = 8  # colors on either side of the middle


@dataclass(frozen=True)
class Signal:
    """One number a token."""

    key: str
    name: str
    says: str
    column: str  # of a row that has it: without a critic there is no value
    derived: Callable[[Row], list[float | None]] | None = None  # from a row, where it is not the column itself
    middle: float | None = 0.0  # the value without color; None: the mean over the cycle

    def of(self, row: Row) -> list[float | None]:
        """Its values in a row; None where it has none."""
        return self.derived(row) if self.derived else list(row[self.column])


def _kl(row: Row) -> list[float | None]:
    return [old - ref for old, ref in zip(row["old_logprob"], row["ref_logprob"], strict=True)]


def _log_ratio(row: Row) -> list[float | None]:
    return [None if r is None else math.log(r) if r > 0 else None for r in row["ratio"]]


SIGNALS = {
    s.key: s
    for s in (
        Signal("value", "Value V", "What the critic expected still to come, before this token was chosen.",
               "value", middle=None),
        Signal("advantage", "Advantage A", "How much better things went from this token on than the critic expected, "
               "colored around the cycle's mean, as whitening sees it: training makes blue tokens likelier, orange "
               "ones less likely.", "advantage", middle=None),
        Signal("delta", "Surprise δ", "What this one token changed in the critic's estimate.", "delta"),
        Signal("ratio", "Ratio, log", "How much likelier this cycle's update made the token; underlined where the clip "
               "cut its gradient.", "ratio", _log_ratio),
        Signal("kl", "KL to the reference", "How much likelier the token is than under the reference, in nats: summed "
               "over the response, what it paid.", "ref_logprob", _kl),
        Signal("q", "Value of the token Q", "The smaller of the two target Q: what was expected to come once this "
               "token was chosen.", "q", middle=None),
        Signal("entropy", "Entropy", "How open the choice was, in nats.", "entropy"),
        Signal("reward", "Reward", "What the token was paid: the KL's price, and the score at the last one.",
               "reward"),
    )
}  # fmt: skip


def signals_of(row: Row) -> dict[str, Signal]:
    """The signals that a row has."""
    return {key: signal for key, signal in SIGNALS.items() if signal.column in row}


@dataclass(frozen=True)
class Scale:
    """From a signal's value to a color, the same for a whole cycle."""

    middle: float  # the value without color
    reach: float  # distance from it at which the color is full: the 98th percentile, so that no outlier grays the rest

    @classmethod
    def of(cls, signal: Signal, rows: Sequence[Row]) -> Scale:
        """The scale of a signal over a cycle's rows."""
        values = [v for row in rows for v in signal.of(row) if v is not None and math.isfinite(v)]
        if not values:
            return cls(0.0, 1.0)
        middle = sum(values) / len(values) if signal.middle is None else signal.middle
        away = sorted(abs(v - middle) for v in values)
        return cls(middle, away[min(len(away) - 1, int(0.98 * len(away)))] or 1.0)

    def step(self, value: float | None) -> int:
        """-STEPS … STEPS, 0 in the middle and where there is no number."""
        if value is None or not math.isfinite(value):
            return 0
        return round(max(-1.0, min(1.0, (value - self.middle) / self.reach)) * STEPS)


def beta_of(row: Row, ppo: PPOSection) -> float | None:
    """β as the row was paid, off the row itself where its KL is largest: a controller moves it from cycle to cycle.

    None where the KL is not in the reward.
    """
    if ppo.kl.place != "reward":
        return None
    kl = _kl(row)
    t = max(range(len(kl)), key=lambda i: abs(kl[i] or 0.0), default=0)
    if not kl or not kl[t] or row["score"] is None:
        return ppo.kl.coef
    return float((row["score"] * (t == len(kl) - 1) - row["reward"][t]) / kl[t])


def arithmetic(row: Row, t: int, ppo: PPOSection, beta: float | None) -> list[tuple[str, str]]:
    """(what, the sum with this token's numbers) of token `t`.

    beta: see `beta_of`.
    """
    reward, advantage = row["reward"], row["advantage"]
    last = t == len(reward) - 1
    lines, kl = [], 0.0
    if "ref_logprob" in row:
        kl = row["old_logprob"][t] - row["ref_logprob"][t]
        lines = [("KL", f"ln π − ln π_ref = {_n(row['old_logprob'][t])} − {_n(row['ref_logprob'][t])} = {_n(kl)}")]
    score = f"score = {_n(row['score'])}" if last and row["score"] is not None else ""
    if beta is None:
        lines.append(("reward", f"r = {score}" if score else f"r = {_n(reward[t])}: nothing before the end"))
    elif score:
        said = f"{_n(row['score'])} − {beta:.3g}·{_n(kl)}"
        lines.append(("reward", f"r = score − β·KL = {said} = {_n(reward[t])}"))
    else:
        lines.append(("reward", f"r = −β·KL = −{beta:.3g}·{_n(kl)} = {_n(reward[t])}"))
    lines += _of_the_critic(row, t, ppo) if "value" in row else [("A", _n(advantage[t]))]
    ratio = row["ratio"][t]
    if ratio is not None:
        new, old = row["new_logprob"][t], row["old_logprob"][t]
        lines.append(("ratio", f"exp(new − old) = exp({_n(new)} − {_n(old)}) = {_n(ratio)}; {_clipped(row, t, ppo)}"))
    lines.append(("entropy", f"{_n(row['entropy'][t])} nats"))
    return lines


def _of_the_critic(row: Row, t: int, ppo: PPOSection) -> list[tuple[str, str]]:
    """δ, A and the return of token `t`: they follow from the critic's values."""
    value, reward, delta, advantage = row["value"], row["reward"], row["delta"], row["advantage"]
    after, next_advantage = (0.0, 0.0) if t == len(value) - 1 else (value[t + 1], advantage[t + 1])
    actor, critic = ppo.lams
    change = ("δ", f"r + γ·V′ − V = {_n(reward[t])} + {ppo.gamma:g}·{_n(after)} − {_n(value[t])} = {_n(delta[t])}")
    if "q" in row:
        return [change, ("A", f"min Q̄ − V = {_n(row['q'][t])} − {_n(value[t])} = {_n(advantage[t])}")]
    lines = [
        change,
        ("A", f"δ + γλ·A′ = {_n(delta[t])} + {ppo.gamma * actor:g}·{_n(next_advantage)} = {_n(advantage[t])}"),
    ]
    if actor == critic:
        lines.append(("return", f"A + V = {_n(advantage[t])} + {_n(value[t])} = {_n(row['return'][t])}"))
    else:
        lines.append(("return", f"{_n(row['return'][t])}, with the critic's own λ = {critic:g}"))
    return lines


def _clipped(row: Row, t: int, ppo: PPOSection) -> str:
    low, high = 1 - ppo.clips[0], 1 + ppo.clips[1]
    if not row["clipped"][t]:
        return f"inside the clip [{low:g}, {high:g}], or on the side where it does not hold back"
    side = f"above {high:g} with whitened A > 0" if row["ratio"][t] > high else f"below {low:g} with whitened A < 0"
    return f"clipped: {side}, no gradient"


def _n(value: float) -> str:
    text = f"{value:.3f}"
    return f"({text})".replace("-", "−") if text.startswith("-") else text


def ppo_of(config: Config) -> PPOSection | None:
    """How rewards and advantages of a run's responses were made; None where it has no per-token values."""
    if isinstance(config, QLearningConfig):
        return config.as_ppo
    return config.ppo if isinstance(config, PPOConfig) else None


def tokens_of(row: Row, steps: Sequence[int], ppo: PPOSection) -> list[dict[str, Any]]:
    """What a page shows of each token: its text, color and arithmetic. As many as there are steps."""
    beta = beta_of(row, ppo)
    return [
        {
            "t": t, "text": visible(text) or "∅", "blank": not text.strip(), "clipped": bool(row["clipped"][t]),
            "step": step, "lines": arithmetic(row, t, ppo, beta),
        }
        for t, (text, step) in enumerate(zip(row["text"], steps, strict=False))
    ]  # fmt: skip


def surprise(row: Row) -> float:
    """Mean |A| over the tokens: how far the critic was from what came."""
    advantages: list[float] = row["advantage"]
    return sum(abs(a) for a in advantages) / max(1, len(advantages))


# ---------------------------------------------------------------- the curve


def value_curve(row: Row, most: int = 4000, width: int = 900, height: int = 150) -> Markup:
    """V(t) over the response with the score at its end, as SVG; a group of class `at` that a script moves.

    most: tokens drawn.
    """
    values, score = row.get("value", [])[:most], row["score"]
    if not values:
        return Markup("")
    levels = [*values, *([] if score is None else [score])]
    low, high = min(levels), max(levels)
    step = (width - 150) / len(values)
    ys = [height - 20 - (v - low) * (height - 40) / ((high - low) or 1.0) for v in levels]
    points = " ".join(f"{50 + t * step:.1f},{y:.1f}" for t, y in enumerate(ys[: len(values)]))
    end = ""
    if score is not None and len(values) == len(row["value"]):  # else it goes on beyond what is drawn
        x = 50 + len(values) * step
        end = (
            f'<circle class="end" cx="{x:.1f}" cy="{ys[-1]:.1f}" r="5"/>'
            f'<text x="{x + 10:.1f}" y="{ys[-1] + 4:.1f}">score {score:.2f}</text>'
        )
    return Markup(
        f'<svg class="curve" viewBox="0 0 {width} {height}" role="img" data-step="{step:.4f}" '
        f'data-ys="{" ".join(f"{y:.1f}" for y in ys[: len(values)])}" '
        f'aria-label="The critic\'s estimate from {values[0]:.2f} at the first token to {values[-1]:.2f} at the last">'
        f'<polyline points="{points}"/>{end}<text x="4" y="{ys[0] + 4:.1f}">V {values[0]:.2f}</text>'
        '<g class="at"><line y1="8" y2="130"/><circle r="4"/></g></svg>'
    )
