"""docs/metrics.md: written from the code, and complete for what real runs write."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

import tether
from tether.config import (
    DataConfig,
    LogConfig,
    ModelConfig,
    QLearningConfig,
    QLearningSection,
    RewardConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
)
from tether.reports.metrics import page
from tiny_ppo import id_score, tiny_config

TEXTS = '{"text": "once upon a time"}\n' * 4
SCORED = '{"prompt": "a", "completion": "b", "score": 1}\n{"prompt": "a", "completion": "c", "score": 0}\n'
PAIRS = "".join(f'{{"prompt": "p{i}", "chosen": "good {i}", "rejected": "bad"}}\n' for i in range(8))


def listed(command: str) -> set[str]:
    """The metrics that the page lists of a command."""
    _, _, section = page().partition(f"`tether {command}`\n")
    return set(re.findall(r"^\| `(.+?)` \|", section.partition("\n## ")[0], re.M))


def test_the_page_is_what_the_code_says_now():
    file = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"
    assert file.read_text(encoding="utf-8") == page(), "python -m tether.reports.metrics > docs/metrics.md"


def test_the_page_lists_every_metric_of_a_ppo_run_and_no_other(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run", tiny_model(), ppo={"cycles": 3, "stop_epoch_at_kl": 1.0, "ahead": 1}, evaluate={"every": 1}
    )
    metrics = tether.ppo(config, reward=id_score).metrics[1]  # sampled ahead, and the next one beside it
    found = {re.sub(r"^eval/.*", "eval/*", name).replace("id_score", "SOURCE") for name in metrics}
    # of optional sources, of ensembles, and of group baselines
    elsewhere = {"reward/SOURCE_missing", "reward/SOURCE_disagreement", "advantage/dead_groups"}
    assert found - {"cycle"} == listed("ppo") - elsewhere


@pytest.mark.parametrize("command", ["sft", "reward", "qlearning"])
def test_the_page_lists_every_metric_of_a_run_of_steps_and_no_other(tiny_model, tmp_path, command):
    kind, trainer, text = {
        "sft": (SFTConfig, tether.sft, TEXTS), "reward": (RewardConfig, tether.reward_model, PAIRS),
        "qlearning": (QLearningConfig, tether.qlearning, SCORED),
    }[command]  # fmt: skip
    (tmp_path / "data.jsonl").write_text(text)
    model, data = (ModelConfig, ScoredConfig) if command == "qlearning" else (SFTModelConfig, DataConfig)
    config = kind(
        run=str(tmp_path / "run"), model=model(policy=str(tiny_model())),
        data=data(path=str(tmp_path / "data.jsonl")), log=LogConfig(tensorboard=False), device="cpu",
    )  # fmt: skip
    found = {name for m in trainer(config).metrics for name in m} - {"step"}
    if command == "qlearning":  # each of its two losses has metrics of its own
        implicit = replace(config, run=str(tmp_path / "ilql"), qlearning=QLearningSection(loss="ilql"))
        found |= {name for m in trainer(implicit).metrics for name in m} - {"step"}
    assert found == listed(command)
