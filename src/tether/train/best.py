"""best/: the policy of the evaluation with the highest score or gold, kept whatever becomes of the checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tether.config import PPOConfig
from tether.runs import Run, RunDirectory
from tether.train.card import ppo_card
from tether.train.gold import gold_metric


def keep_best(
    run: RunDirectory, config: PPOConfig, cycle: int, metrics: dict[str, Any],
    write_model: Callable[[Path, str, Callable[[Path], object]], None],
) -> None:  # fmt: skip
    """Write best/ where this cycle was evaluated and scored higher than the one in it, or is done again after a kill.

    Where there is gold, it is what decides. Where answers are compared with each other alone, their mean score is 0
    whatever the policy: none is best then. Call before metrics are logged: what they say is best is then there.
    write_model(directory, card, add) writes the policy.
    """
    score = metrics.get("eval/score_mean")
    if score is None or not math.isfinite(score):
        return
    found = {"score": float(score)}
    name = gold_metric(config)
    if name is None and config.reward and all(source.form == "pairwise" for source in config.reward):
        return
    if name:
        found["gold"] = metrics[name]
    by = "gold" if name else "score"
    best = Run(run.path).best
    if best is not None and best["cycle"] != cycle and not found[by] > best[by]:
        return
    record = json.dumps({"cycle": cycle, **found}) + "\n"
    which = f"cycle {cycle}, the best on held-out prompts"
    before = [line for line in run.metrics() if line["cycle"] < cycle]  # this one's is there if it is evaluated later
    card = ppo_card(run.path.name, [*before, {"cycle": cycle, **metrics}], config, which)
    write_model(run.path / "best", card, lambda directory: (directory / "best.json").write_text(record))
    run.event("best", cycle=cycle, **found)
