"""A run as the rules see it, and the alarms that they raise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from tether.config.kinds import Kind
from tether.diagnose.advice import ADVICE
from tether.diagnose.series import Curve, Held, Series

Severity = Literal["warning", "serious"]


@dataclass(frozen=True, slots=True)
class Alarm:
    """One thing that went wrong."""

    rule: str  # the same in every run: negative-kl
    metric: str | None  # the curve that it shows in; None if in none
    first: int  # first cycle (or step) in which it held
    last: int  # last one: where it is the run's last, it may still hold
    severity: Severity  # serious: what is trained now is not what was meant, or nothing is
    what: str  # one sentence with the numbers
    cause: str  # what it likely comes from
    remedy: str  # the config key to turn, and in which direction


@dataclass(frozen=True, slots=True)
class View:
    """A run, as rules see it."""

    kind: Kind
    config: Any  # of that kind
    series: Series
    events: Sequence[dict[str, Any]]
    status: dict[str, Any]
    now: datetime | None
    reward_report: dict[str, Any] | None

    @property
    def unit(self) -> str:
        return self.series.unit

    def curve(self, name: str) -> Curve:
        return self.series.curve(name)

    def recorded(self, rule: str | None) -> list[tuple[int, str]]:
        """(cycle, text) of the alarms of a rule that the trainer raised while it ran; None: those of no rule here."""
        own = [name.replace("_", "-") for name in self.kind.alarms]
        return [
            (e[self.unit] if isinstance(e.get(self.unit), int) else self.series.done, str(e.get("what", "")))
            for e in self.events
            if e.get("event") == "alarm" and (e.get("rule") if e.get("rule") in own else None) == rule
        ]


def alarm(
    case: str, span: Held | tuple[int, int], severity: Severity, what: str,
    *, metric: str | None = None, then: str = "",
) -> Alarm:  # fmt: skip
    """An alarm with the cause and the remedy that ADVICE has for it.

    case      its key in ADVICE: a rule's name, or one case of the rule, `negative-kl/truncated`.
    span      where it held: (first, last) cycle.
    metric    the curve that it shows in, where that is not the one in ADVICE.
    then      one more sentence for the remedy.
    """
    advice = ADVICE[case]
    first, last = (span.first, span.last) if isinstance(span, Held) else span
    remedy = f"{advice.remedy} {then}" if then else advice.remedy
    return Alarm(case.partition("/")[0], metric or advice.metric, first, last, severity, what, advice.cause, remedy)
