"""Two real processes against one: the same gradients, the same tokens, the same run; and no failure that hangs.

The processes are started once and do one job after the other: to start them costs more than all that they do.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policies_on_ranks import LAYOUTS, gradients
from resume import steady, wait_for_step
from tether import Run, load_config, ppo
from tether.cli import main
from tether.config import DistributedConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.distributed.ranks import ALONE
from tether.runs.files import damage, read_lines, read_table, sha256
from tiny_ppo import tiny_config

WORLD = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
TESTS = Path(__file__).parents[1]
REWARD = "def id_score(completion_ids, **_):\n    return [sum(ids) / len(ids) / 100 for ids in completion_ids]\n"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def config_of(folder: Path, model: Path, *, reward: str = REWARD, shard: str = "replicate", **sections):
    """A tiny run in `folder`, and the file that asks for it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(reward)
    sections = {"optim": {"lr": 1e-3, "schedule": "constant"}, **sections}
    config = replace(
        tiny_config(folder / "run", model, **sections), distributed=DistributedConfig(shard=shard),
        reward=[RewardSourceConfig(function=f"{folder / 'reward.py'}:id_score")],
    )  # fmt: skip
    (folder / "c.yaml").write_text(to_yaml(config))
    return config


def alone(config, cycles: int = 4) -> Run:
    return ppo(replace(config, ppo=replace(config.ppo, cycles=cycles)))


JOBS = {
    "replicate": {}, "from one to full": {}, "stopped": {"stop_at": 1}, "reward fails": {},
    "another seed": {"on_rank_1": ["--seed", "1"]}, "breaks": {"breaks": True},
}  # fmt: skip
FAILS = REWARD.replace(
    "    return", "    import os\n    if os.path.exists(__file__ + '.fails'): raise ValueError('no score')\n    return"
)


@dataclass(frozen=True)
class Done:
    """What two processes did, one job after the other."""

    root: Path  # with a folder for every job
    model: Path
    said: list[str]  # by each rank
    codes: dict[str, list[Any]]  # of each job, on each rank
    seconds: dict[str, list[float]]

    def status(self, job: str) -> dict[str, Any]:
        return Run(self.root / job / "run").status


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model) -> Done:
    root, model = tmp_path_factory.mktemp("ranks"), tiny_model()
    jobs = [{"gradients": str(root / "gradients.pt")}]
    for name, extra in JOBS.items():
        folder = root / name.replace(" ", "-")
        config = config_of(folder, model, shard="full" if "full" in name else "replicate",
                           reward=FAILS if name == "reward fails" else REWARD)  # fmt: skip
        if name == "from one to full":
            alone(config, cycles=2)
        if name == "reward fails":
            alone(config, cycles=2)
            (folder / "reward.py.fails").touch()
        jobs.append({"argv": [str(folder / "c.yaml")], "run": str(folder / "run"), **extra})
    for job, port in zip(jobs, free_ports(len(jobs)), strict=True):
        job["port"] = port
    (root / "jobs.json").write_text(json.dumps(jobs))
    pair = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "rank_worker.py"), str(root / "jobs.json")], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | WORLD | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    ended = [json.loads((root / f"jobs.json.{rank}").read_text()) for rank in range(2)]
    print(*said, ended, sep="\n")
    names = ["gradients", *(name.replace(" ", "-") for name in JOBS)]
    return Done(
        root, model, said, {n: [e[i][0] for e in ended] for i, n in enumerate(names)},
        {n: [e[i][1] for e in ended] for i, n in enumerate(names)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model):
    return alone(config_of(tmp_path_factory.mktemp("alone"), tiny_model()))


def close(got: Tensor, want: Tensor, bound: float) -> None:
    assert (got - want).norm() <= bound * want.norm(), f"off by {(got - want).norm() / want.norm():.2g}"


@pytest.fixture(scope="module")
def on_one():
    """The same on one process, computed once a kind."""
    return functools.cache(lambda kind: gradients(kind, ALONE, "replicate"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=", ".join)
def test_gradients_metrics_and_steps_of_two_processes_are_those_of_one(done, on_one, layout):
    got, want = torch.load(done.root / "gradients.pt")[layout], on_one(layout[0])
    assert got.keys() == want.keys()
    for name in want:
        close(got[name], want[name], 1e-6)


def test_two_processes_train_the_run_of_one(done, reference):
    run = Run.open(done.root / "replicate" / "run")
    assert done.codes["replicate"] == [0, 0]
    same_numbers(run, reference)
    ids = [read_table(r.path / "rollouts" / "cycle-000001.parquet", ["response_ids"]) for r in (run, reference)]
    assert ids[0].equals(ids[1])
    for folder in ("final", "best"):
        assert not damage(run.path / folder)
    assert {e["event"] for e in read_lines(run.path / "events.jsonl")} == {
        e["event"] for e in read_lines(reference.path / "events.jsonl")
    }


def same_numbers(run: Run, want: Run) -> None:
    lines, others = steady(run), steady(want)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5), line["cycle"]


def test_a_checkpoint_of_one_process_is_continued_on_two_that_share_its_weights(done, reference):
    assert done.codes["from-one-to-full"] == [0, 0]
    same_numbers(Run.open(done.root / "from-one-to-full" / "run"), reference)


def test_a_checkpoint_of_two_processes_is_continued_on_one(done, reference):
    config = load_config(done.root / "stopped" / "c.yaml")
    assert Run.open(config.run).metrics[-1]["cycle"] < 4
    same_numbers(alone(config), reference)


def test_a_signal_to_one_process_stops_all_of_them_saved(done):
    assert done.codes["stopped"] == [3, 3]
    assert (done.status("stopped")["state"], done.status("stopped")["exit_code"]) == ("stopped", 3)


def test_a_reward_that_fails_on_rank_0_ends_all_with_its_message(done):
    assert done.codes["reward-fails"] == [2, 2]
    assert "raised ValueError: no score" in done.status("reward-fails")["exit_reason"]
    assert sum("raised ValueError: no score" in text for text in done.said) == 1


def test_ranks_that_were_given_different_configs_are_refused(done):
    assert done.codes["another-seed"] == [2, 2]
    assert "seed is 1 on rank 1" in done.said[0]
    assert not (done.root / "another-seed" / "run").exists()


def test_a_rank_that_fails_alone_hangs_no_other(done):
    assert done.codes["breaks"] == [1, "ValueError('on rank 1 alone')"]
    assert done.status("breaks")["state"] == "failed"
    assert done.status("breaks")["exit_reason"] == "rank 1: ValueError: on rank 1 alone"
    assert max(done.seconds["breaks"]) < 10


def test_torchrun_restarts_a_run_that_was_killed_and_it_ends_with_the_same_bits(done, tmp_path):
    config = config_of(tmp_path, done.model)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
               "--master-port", str(free_ports(1)[0]), "-m", "tether", "ppo", str(tmp_path / "c.yaml")]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for_step(Path(config.run), 3, process)
    os.kill(Run(Path(config.run)).status["pid"], signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    run, want = Run.open(config.run), Run.open(done.root / "replicate" / "run")
    assert [e["cycle"] for e in read_lines(run.path / "events.jsonl") if e["event"] == "resumed"] == [2]
    assert steady(run) == steady(want)
    assert sha256(run.final / "model.safetensors") == sha256(want.final / "model.safetensors")


def test_a_command_for_one_process_is_refused_on_two(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "model"]) == 2
    assert "tether generate does not run on 2 processes" in capsys.readouterr().err
