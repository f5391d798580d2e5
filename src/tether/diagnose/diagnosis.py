"""`tether doctor RUN`: how a run stands, and what went wrong in it."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import Any

from tether.config.kinds import Kind
from tether.diagnose.alarms import alarms
from tether.diagnose.state import patience_s, silence_s, state
from tether.diagnose.view import Alarm
from tether.runs import Run


def examine(run: str | Path | Run) -> str:
    """State, cycles done, headline figures and every alarm with its cause and remedy; RunError if there is no run."""
    run = run if isinstance(run, Run) else Run.open(run)
    kind, status, metrics, now = run.kind, run.status, run.metrics, datetime.now(UTC)
    config, report = run.config, preference_report(run)
    found = alarms(kind.command, config, metrics, run.events, status, now=now, reward_report=report)
    planned = f" of {attrgetter(kind.total)(config):,}" if kind.total else ""
    done = metrics[-1][kind.unit] if metrics else 0
    head = f"{run.path}: {kind.title}, {_state(status, metrics, now)}, {done:,}{planned} {kind.unit}s done"
    parts = [head + _headline(run, metrics, report), *_fallen(run), *(_told(alarm, kind.unit) for alarm in found)]
    if not found:
        parts.append(_nothing(kind, done))
    return "\n\n".join(parts)


def _fallen(run: Run) -> list[str]:
    """That gold ended the run, and which policy to take; nothing where it did not."""
    fell = [event for event in run.events if event["event"] == "gold_fell"]
    if not fell:
        return []
    best = fell[-1]["best"]
    take = f"best/ is the policy of cycle {best}" if best else "the model that it began from was better than all since"
    return [f"ended at cycle {fell[-1]['cycle']}, as gold has fallen since cycle {best}: {take}."]


def preference_report(run: Run) -> dict[str, Any] | None:
    """What a run found out on held-out pairs; None where there is nothing of it, and where it cannot be read."""
    if run.kind.report is None:
        return None
    try:
        found = json.loads((run.path / run.kind.report).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _state(status: dict[str, Any], metrics: Sequence[dict[str, Any]], now: datetime) -> str:
    what = state(status, now, patience_s=patience_s(metrics))
    age = silence_s(status, now)
    if what == "running" and age is not None:
        return f"running (last sign of life {max(0, age):.0f} s ago)"
    if what in ("stopped", "failed") and status.get("exit_reason"):
        return f"{what} ({' '.join(str(status['exit_reason']).split()).rstrip('.')})"
    return what


def _headline(run: Run, metrics: Sequence[dict[str, Any]], report: dict[str, Any] | None) -> str:
    """Each figure from its first tenth to its last."""
    lines = []
    for label, name, note in run.kind.headline:
        values = [v for m in metrics if (v := m.get(name)) is not None]
        if values:
            tenth = max(1, len(values) // 10)
            first, last = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
            note = f"on {run.held_out_claim}" if name == "eval/score_mean" else note
            lines.append((label, f"{first:.3g} → {last:.3g}", note))
    if report is not None and report["accuracy"] is None:
        what = f"{held_out} undecided" if (held_out := report.get("held_out")) else "no pairs"
        lines.append(("held-out", what, "nothing is known about pairs that it was not trained on"))
    elif report is not None:
        a = report["accuracy"]
        interval = f"[{a['low']:.3g}, {a['high']:.3g}] on {report['test_pairs']:,} pairs"
        lines.append(("held-out", f"{a['value']:.3g} right", interval))
    return "".join(f"\n  {label:<9} {value:<17} {note}".rstrip() for label, value, note in lines)


def _told(alarm: Alarm, unit: str) -> str:
    where = f"{unit} {alarm.first:,}" + (f" to {alarm.last:,}" if alarm.last > alarm.first else "")
    says = (("what", alarm.what), ("cause", alarm.cause), ("remedy", alarm.remedy))
    return "\n".join([f"{alarm.severity}: {alarm.rule} ({where})", *(_wrapped(*pair) for pair in says)])


def _wrapped(label: str, text: str) -> str:
    """One entry in lines of 100, a path or a key in one piece."""
    return textwrap.fill(
        text, 100, initial_indent=f"  {label:<6} ", subsequent_indent=" " * 9,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _nothing(kind: Kind, done: int) -> str:
    if done < 20:
        return f"nothing found, but {done} {kind.unit}s are few: rules on curves ask for 15 {kind.unit}s in a row."
    return f"nothing found: none of the {len(kind.alarms)} rules holds."
