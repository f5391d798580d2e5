"""`tether ppo` with vLLM: what it learns from, and that nothing is lost whoever is killed."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
from safetensors.torch import load_file

import tiny_ppo
from resume import launch, steady, wait_for_step
from tether import Run
from tether.config import RewardSourceConfig, VLLMConfig
from tether.config.reading import to_yaml


def config_of(run: Path, policy: Path, python: str):
    sampling = {"engine": "vllm", "vllm": VLLMConfig(python), "temperature": 0.7, "max_new_tokens": 10,
                "stop_token_ids": tiny_ppo.STOPS}  # fmt: skip
    config = tiny_ppo.tiny_config(run, policy, sampling=sampling)
    return replace(config, reward=[RewardSourceConfig(function=f"{tiny_ppo.__file__}:id_score")])


def engine_of(process) -> psutil.Process | None:
    return next((p for p in psutil.Process(process.pid).children() if "vllm_worker.py" in " ".join(p.cmdline())), None)


def gone(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 60
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_run_whose_engine_and_then_itself_are_killed_ends_with_the_same_bits(tmp_path, tiny_model, python):
    policy = tiny_model("llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    configs = {}
    for name in ("whole", "killed"):
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(to_yaml(config_of(tmp_path / name, policy, python)))

    whole = launch("ppo", configs["whole"])
    killed = launch("ppo", configs["killed"])
    wait_for_step(tmp_path / "killed", 1, killed)
    os.kill(engine_of(killed).pid, signal.SIGKILL)
    wait_for_step(tmp_path / "killed", 3, killed)
    engine = engine_of(killed)
    killed.kill()
    killed.wait()
    assert gone(engine)
    events = (tmp_path / "killed" / "events.jsonl").read_text()
    assert "engine_restarted" in events
    assert "was killed by signal 9" in events

    again = launch("ppo", configs["killed"])
    for process in (whole, again):
        _, error = process.communicate()
        assert process.returncode == 0, error
    first, second = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    assert steady(second) == steady(first)
    a, b = (load_file(run.final / "model.safetensors") for run in (first, second))
    assert all(a[name].equal(b[name]) for name in a)
    for line in first.metrics:
        assert line["check/sampler_gap"] <= 1e-5
        assert line["check/truncated_mass"] == 0
    assert first.metrics[0]["response/truncated_fraction"] not in (0, 1)
    assert [p.name for p in (first.path / "vllm").iterdir()] == ["log.txt"]
