"""Metrics where they go: the record, TensorBoard, and a screen that is one or is not."""

import importlib.util
import json
import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tether.config import DataConfig, LogConfig, SFTConfig, SFTModelConfig, WandbConfig
from tether.config.reading import to_yaml
from tether.errors import ConfigError, Interrupted
from tether.runs import Run, RunDirectory
from tether.train.log import Logger

PLAIN = LogConfig(tensorboard=False)
CYCLE = {
    "reward/score_mean": 0.51234,
    "kl/ref_mean": 1.5,
    "policy/entropy": 2.25,
    "value/explained_variance": None,
    "tokens_per_s/rollout": 12345.6,
}

ON_A_TERMINAL = """
import sys, time
from tether.config.reading import load_config
from tether.runs import RunDirectory
from tether.train.log import Logger
config = load_config(sys.argv[1])
with RunDirectory.open(config, command="ppo") as run, Logger(run, config.log, total=2) as log:
    log.note("[not markup] 3 prompts dropped")
    log.phase("sampling")
    time.sleep(0.2)
    log.write(1, {"reward/score_mean": 0.51234, "kl/ref_mean": 1.5})
    log.write(2, {"reward/score_mean": 0.75, "kl/ref_mean": 1.25})
"""

READ_BY_NOBODY = """
import sys
from tether.config.reading import load_config
from tether.runs import RunDirectory
from tether.train.log import Logger
config = load_config(sys.argv[1])
sys.stdin.read()  # until our reader has left
with RunDirectory.open(config, command="ppo") as run, Logger(run, config.log, total=2) as log:
    log.write(1, {})
    log.note("…")
    log.write(2, {})
print("goodbye")
print("goodbye", file=sys.stderr)
"""


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, round(e.value, 6)) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_without_a_terminal_each_write_is_one_plain_line(config, capsys):
    with RunDirectory.open(config, command="ppo") as run, Logger(run, PLAIN, total=2) as log:
        log.write(1, CYCLE)
        log.note("a [note]")
        log.phase("sampling")  # too soon after the last line to be worth one
        log.write(2, CYCLE)
    first, note, second = capsys.readouterr().out.splitlines()
    assert first == "cycle 1/2  score 0.512  KL 1.500  entropy 2.250  tokens/s 12,346  left 0 s"
    assert note == "a [note]"
    assert second == "cycle 2/2  score 0.512  KL 1.500  entropy 2.250  tokens/s 12,346"
    assert Run.open(config.run).metrics == [{"cycle": 1, **CYCLE}, {"cycle": 2, **CYCLE}]


def test_a_reader_that_leaves_early_does_not_stop_the_run(config, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(replace(config, log=PLAIN)))
    command = [sys.executable, "-c", READ_BY_NOBODY, str(file)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # 2>&1 | head
    with subprocess.Popen(command, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.wait() == 0
    assert [m["cycle"] for m in Run.open(config.run).metrics] == [1, 2]
    assert Run.open(config.run).status["state"] == "finished"


def test_a_long_phase_says_where_it_is_without_a_terminal(config, capsys, monkeypatch):
    monkeypatch.setattr("tether.train.log._PHASE_SILENCE_S", 0.0)
    with RunDirectory.open(config, command="ppo") as run, Logger(run, PLAIN, total=2) as log:
        log.phase("sampling")
    assert capsys.readouterr().out == "  cycle 1/2: sampling\n"


def test_sft_and_reward_count_steps_and_show_loss_accuracy_and_learning_rate(tmp_path, capsys):
    config = SFTConfig(run=str(tmp_path / "run"), model=SFTModelConfig(policy="m"), data=DataConfig(path="d"))
    with RunDirectory.open(config, command="sft") as run, Logger(run, PLAIN, total=9) as log:
        log.write(9, {"sft/loss": 2.0, "sft/accuracy": 0.5, "optim/lr": 3e-4})
    assert capsys.readouterr().out == "step 9/9  loss 2.0000  accuracy 0.500  lr 3.00e-04\n"
    assert Run.open(run.path).metrics[0]["step"] == 9


def test_on_a_terminal_there_is_a_bar_with_the_latest_metrics(config, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(replace(config, log=PLAIN)))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, str(file)],
        stdout=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "140", "NO_COLOR": "1"},
    )
    os.close(theirs)
    screen = b""
    try:
        while part := os.read(ours, 10_000):
            screen += part
    except OSError:
        pass  # how a terminal ends
    assert process.wait() == 0
    for words in (
        "[not markup] 3 prompts dropped",
        "cycle 0/2",
        "cycle 1/2: sampling",
        "cycle 2/2",
        "score 0.750  KL 1.250",
    ):
        assert words in screen.decode()


def test_tensorboard_has_every_number(config):
    with RunDirectory.open(config, command="ppo") as run, Logger(run, config.log, total=2) as log:
        log.write(1, CYCLE | {"policy/ratio_max": float("nan")})
        log.write(2, CYCLE)
    got = scalars(run.path)
    assert got["kl/ref_mean"] == [(1, 1.5), (2, 1.5)]
    assert "policy/ratio_max" not in got


def test_after_a_resume_tensorboard_holds_each_cycle_once_and_none_that_was_cut_back(config):
    run = RunDirectory.open(config, command="ppo")
    with Logger(run, config.log, total=9) as log:
        for cycle in range(1, 6):
            log.write(cycle, {"reward/score_mean": cycle / 4})
    run.__exit__(Interrupted, Interrupted(), None)
    with RunDirectory.open(config, command="ppo") as run:
        run.truncate_after(3)
        with Logger(run, config.log, total=9) as log:
            log.write(4, {"reward/score_mean": -1.0})
    assert scalars(run.path)["reward/score_mean"] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, -1.0)]


def test_tensorboard_can_be_turned_off(config):
    with RunDirectory.open(config, command="ppo") as run, Logger(run, PLAIN, total=1) as log:
        log.write(1, CYCLE)
    assert not (run.path / "tensorboard").exists()


def test_the_status_has_a_heartbeat_while_a_phase_goes_on(config, monkeypatch):
    with RunDirectory.open(config, command="ppo") as run, Logger(run, PLAIN, total=1) as log:
        (run.path / "status.json").unlink()
        log.phase("sampling")
        assert not (run.path / "status.json").exists()  # the last beat is less than a second ago
        run._last_heartbeat -= 1.0
        log.phase("sampling")
        assert json.loads((run.path / "status.json").read_text())["state"] == "running"


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed here")
def test_wandb_that_is_not_installed_is_an_error_with_the_command_to_type(config):
    with (
        RunDirectory.open(config, command="ppo") as run,
        pytest.raises(ConfigError, match=r"pip install tether\[wandb\]"),
    ):
        Logger(run, LogConfig(tensorboard=False, wandb=WandbConfig()), total=1)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb: pip install tether[wandb]")
def test_wandb_gets_the_metrics(config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = LogConfig(tensorboard=False, wandb=WandbConfig(project="p"))
    with RunDirectory.open(config, command="ppo") as run, Logger(run, settings, total=1) as log:
        log.write(1, CYCLE)
    assert list((run.path / "wandb").glob("offline-run-*/*.wandb"))


def test_without_a_terminal_fast_steps_do_not_flood_the_screen(tmp_path, capsys):
    config = SFTConfig(run=str(tmp_path / "run"), model=SFTModelConfig(policy="m"), data=DataConfig(path="d"))
    with RunDirectory.open(config, command="sft") as run, Logger(run, PLAIN, total=100) as log:
        for step in range(1, 101):
            log.write(step, {"sft/loss": 2.0})
    assert capsys.readouterr().out == "step 100/100  loss 2.0000\n"
    assert len(Run.open(run.path).metrics) == 100
