"""deterministic: true is in force for the length of a run, and for no longer."""

import json
import os
from dataclasses import replace

import pytest
import torch

import tether
from tether.config import (
    DataConfig,
    DPOConfig,
    LogConfig,
    ModelConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    RewardConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
)
from tether.train.preamble import deterministic
from tiny_ppo import id_score, tiny_config

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


def settings() -> tuple[int, str | None]:
    return torch.get_deterministic_debug_mode(), os.environ.get(WORKSPACE)


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
@pytest.mark.parametrize(("workspace", "inside"), [(None, ":4096:8"), (":0:0", ":4096:8"), (":16:8", ":16:8")])
def test_torch_and_cublas_are_told_and_put_back_even_after_an_error(monkeypatch, mode, workspace, inside):
    if workspace:
        monkeypatch.setenv(WORKSPACE, workspace)
    torch.set_deterministic_debug_mode(mode)
    before = settings()
    seen = []

    def break_off():
        seen.append(settings())
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), deterministic(True):
        break_off()
    assert seen == [(2, inside)]
    assert settings() == before


def test_not_wanted_is_nothing_done():
    with deterministic(False):
        assert settings() == (0, None)


def test_a_ppo_run_is_deterministic_while_it_runs_and_leaves_torch_as_it_was(tiny_model, tmp_path):
    seen = []

    def score(completion_ids, **rest):
        seen.append(settings())
        return id_score(completion_ids, **rest)

    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"cycles": 1, "batch": 2, "minibatch": 2})
    tether.ppo(replace(config, deterministic=True), reward=score)
    assert set(seen) == {(2, ":4096:8")}
    assert settings() == (0, None)


@pytest.mark.parametrize("trainer", ["sft", "reward_model", "dpo", "qlearning", "ilql"])
def test_the_trainers_of_steps_are_deterministic_while_they_run_and_leave_torch_as_it_was(
    tiny_model, tmp_path, monkeypatch, trainer
):
    data = tmp_path / "data.jsonl"
    command, section = trainer, {}
    if trainer == "ilql":
        command, section = "qlearning", {"qlearning": QLearningSection(loss="ilql")}
    kind, model, rows, answers = {
        "sft": (SFTConfig, SFTModelConfig, DataConfig, {"completion": "b"}),
        "reward_model": (RewardConfig, SFTModelConfig, DataConfig, {"chosen": "c", "rejected": "d"}),
        "dpo": (DPOConfig, ReferencedModelConfig, DataConfig, {"chosen": "c", "rejected": "d"}),
        "qlearning": (QLearningConfig, ModelConfig, ScoredConfig, {"completion": "b", "score": 1}),
    }[command]
    data.write_text("".join(json.dumps({"prompt": prompt, **answers}) + "\n" for prompt in "abcdefgh"))
    config = kind(
        run=str(tmp_path / "run"), device="cpu", deterministic=True, model=model(policy=str(tiny_model())),
        data=rows(path=str(data)), log=LogConfig(tensorboard=False), **section,
    )  # fmt: skip
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (seen.append(settings()), step(self)))
    getattr(tether, command)(config)
    assert set(seen) == {(2, ":4096:8")}
    assert settings() == (0, None)
