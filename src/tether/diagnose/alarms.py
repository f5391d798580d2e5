"""What went wrong in a run, why, and which key to turn.

    for alarm in alarms("ppo", config, metrics, events, status, now=datetime.now(UTC)):
        print(alarm.what, alarm.cause, alarm.remedy)

The rules, each with the reason for its threshold, are in `rules`, their texts in `advice`; the rows of
`tether.config.kinds` name those that a run is judged by. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tether.config import Config
from tether.config.kinds import KINDS
from tether.diagnose.rules import RULES
from tether.diagnose.series import Series
from tether.diagnose.view import Alarm, View


def alarms(
    kind: str, config: Config, metrics: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]],
    status: dict[str, Any], *, now: datetime | None = None, reward_report: dict[str, Any] | None = None,
) -> list[Alarm]:  # fmt: skip
    """What went wrong, the serious first, then in order of appearance. Pure: reads no file and no clock.

    kind: the run's command. metrics, events, status: as a run directory holds them (`Run.metrics` and so on).
    now: with it, a run that gives no sign of life is an alarm. reward_report: what a run says of its held-out
    pairs (reward_report.json, dpo_report.json). Metrics may be missing, null, or thinned to some of the cycles.
    """
    row = KINDS[kind]
    view = View(row, config, Series(row.unit, metrics), events, status, now, reward_report)
    found = [alarm for rule in row.alarms for alarm in RULES[rule](view)]
    return sorted(found, key=lambda a: (a.severity != "serious", a.first))
