"""Gold: sources that score answers to held-out prompts alone, and when a run ends because they say that it got worse.

The sum that is trained on is a proxy of what people want, and past some point a policy pleases the proxy instead (Gao
et al. 2022, arXiv:2210.10760). Gold is a better and more costly reading, which nothing is learned from.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tether.config import PPOConfig, source_name
from tether.math import bootstrap_mean
from tether.runs import Run
from tether.runs.files import read_table


def gold_metric(config: PPOConfig) -> str | None:
    """The metric that best/ and the end of a run go by: the mean of the first gold source; None where there is none."""
    return f"eval/gold/{source_name(config.evaluate.gold[0])}_mean" if config.evaluate.gold else None


def fallen_below(path: Path, config: PPOConfig, cycle: int) -> int | None:
    """The cycle of the best evaluation by gold, where the last `evaluate.stop_when_gold_falls` ones lie below it; None
    where they do not, or `cycle`, the last one, was not evaluated.

    Everything is read off evaluations/ of the run in `path`, so a run that is continued ends where it would have.
    """
    wanted = config.evaluate.stop_when_gold_falls
    run = Run(path)
    if wanted is None or cycle not in run.evaluation_cycles:
        return None
    column = f"gold/{source_name(config.evaluate.gold[0])}"
    by_prompt = {}
    for evaluated in run.evaluation_cycles:
        table = read_table(run.table_file("evaluations", evaluated), columns=["prompt_index", column]).to_pydict()
        answers: dict[int, list[float]] = {}
        for prompt, gold in zip(table["prompt_index"], table[column], strict=True):
            answers.setdefault(prompt, []).append(gold)
        by_prompt[evaluated] = {prompt: sum(found) / len(found) for prompt, found in answers.items()}
    best, below = best_and_below(by_prompt)
    return best if below >= wanted else None


def best_and_below(gold: dict[int, dict[int, float]]) -> tuple[int, int]:
    """(cycle of the evaluation with the highest mean, how many of the last ones in a row lie below it).

    gold: cycle -> prompt -> mean gold of its answers, ascending. An evaluation lies below the best where the 95 %
    bootstrap interval of the mean difference, prompt by prompt, does: prompts and draws are the same every time, so
    what prompts differ by among themselves is no noise.
    """
    mean = {cycle: sum(found.values()) / len(found) for cycle, found in gold.items()}
    best = max(mean, key=lambda cycle: mean[cycle], default=0)
    below = 0
    for cycle in reversed([c for c in gold if c > best]):
        lost = [gold[cycle][prompt] - gold[best][prompt] for prompt in gold[cycle] if prompt in gold[best]]
        if not lost or bootstrap_mean(torch.tensor(lost, dtype=torch.float64)).high >= 0:
            break
        below += 1
    return best, below
