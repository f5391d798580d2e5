"""Two real processes against one: the same gradients, the same tokens, the same run; and no failure that hangs.

The processes are started once and do one job after the other: to start them costs more than all that they do.
"""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from policies_on_ranks import LAYOUTS, gradients, scores
from resume import steady
from served_rewards import make_reward_model
from tether import Run, load_config, ppo
from tether.cli import main
from tether.config import DistributedConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.distributed.ranks import ALONE, local_device
from tether.errors import ConfigError
from tether.runs.files import damage, read_lines, read_table, sha256
from tiny_ppo import tiny_config

TESTS = Path(__file__).parents[1]
REWARD = "def id_score(completion_ids, **_):\n    return [sum(ids) / len(ids) / 100 for ids in completion_ids]\n"


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


def with_reward_models(config, models: list[str], folder: Path):
    """Scored by a model and a function, and as gold by an ensemble."""
    sources = [RewardSourceConfig(model=models[0], name="model", dtype="float32"), *config.reward]
    gold = RewardSourceConfig(models=models[1:], name="ensemble", dtype="float32")
    config = replace(config, reward=sources, evaluate=replace(config.evaluate, gold=[gold]),
                     ppo=replace(config.ppo, cycles=2))  # fmt: skip
    (folder / "c.yaml").write_text(to_yaml(config))
    return config


def alone(config, cycles: int = 4) -> Run:
    return ppo(replace(config, ppo=replace(config.ppo, cycles=cycles)))


FAILS = REWARD.replace(
    "    return", "    import os\n    if os.path.exists(__file__ + '.fails'): raise ValueError('no score')\n    return"
)
JOBS: dict[str, dict[str, Any]] = {
    "replicate": {},
    "from-one-to-full": {"cycles_before": 2, "shard": "full"},
    "stopped": {"signal": [signal.SIGTERM, 1]},
    "killed": {"signal": [signal.SIGKILL, 3]},
    "killed, again": {"more": ["--fresh"]},  # as torchrun --max-restarts would, which the worker counts
    "reward-fails": {"cycles_before": 2, "reward": FAILS},
    "another-seed": {"on_rank_1": ["--seed", "1"]},
    "breaks": {"breaks": True},
    "reward-models": {"scored_by_models": True},
    "ahead": {"sections": {"ppo": {"ahead": 1}}},
}


@dataclass(frozen=True)
class Done:
    """What two processes did, one job after the other."""

    root: Path  # with a folder for every job
    said: str  # by both
    codes: dict[str, list[int]]  # of each job, on each rank
    seconds: dict[str, list[float]]

    def run(self, job: str) -> Run:
        return Run(self.root / job / "run")


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model) -> Done:
    root = tmp_path_factory.getbasetemp() / "ranks"
    if "PYTEST_XDIST_WORKER" in os.environ:  # once for all of them
        root = tmp_path_factory.getbasetemp().parent / "ranks"
    with FileLock(f"{root}.lock"):
        if not (root / "said").exists():
            root.mkdir()
            start(root, shutil.copytree(tiny_model(), root / "model"))
    names, ended = (
        ["gradients", "scores", *JOBS],
        [json.loads((root / f"jobs.json.{rank}").read_text()) for rank in range(2)],
    )
    codes = {name: [codes[i][0] for codes in ended] for i, name in enumerate(names)}
    return Done(root, (root / "said").read_text(), codes, {n: [e[i][1] for e in ended] for i, n in enumerate(names)})


def start(root: Path, model: Path) -> None:
    """Do every job, below `root`."""
    models = [str(make_reward_model(root / f"reward-model-{i}", model, seed=i)) for i in range(3)]
    jobs: list[dict[str, Any]] = [
        {"gradients": str(root / "gradients.pt")},
        {"scores": str(root / "scores.pt"), "policy": str(model), "models": models[:2]},
    ]
    for name, job in JOBS.items():
        folder = root / name.partition(",")[0]
        config = config_of(folder, model, reward=job.get("reward", REWARD), shard=job.get("shard", "replicate"),
                           **job.get("sections", {}))  # fmt: skip
        if "scored_by_models" in job:
            config = with_reward_models(config, models, folder)
        if "cycles_before" in job:
            alone(config, cycles=job["cycles_before"])
        (folder / "reward.py.fails").touch()
        jobs.append({"argv": ["ppo", str(folder / "c.yaml")], "run": config.run, **job})
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", str(TESTS / "rank_worker.py"), str(root / "jobs.json")]  # fmt: skip
    with (root / "said").open("w") as said:
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=said, stderr=said, timeout=900,
                       check=True)  # fmt: skip


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
    assert got.pop("share") <= (0.55 if layout[1] == "full" else 1)  # of weights and moments, on rank 0
    for name in got:
        close(got[name], want[name], 1e-6)


def test_a_weight_that_one_process_alone_reached_is_learned_by_all(done):
    first, second, third = torch.load(done.root / "gradients.pt")["experts"]
    assert (first.tolist(), second.tolist(), third) == ([1.0, 1.0], [2.0, 2.0], None)


def test_two_processes_train_the_run_of_one(done, reference):
    run = done.run("replicate")
    assert done.codes["replicate"] == [0, 0]
    same_numbers(run, reference)
    for cycle in range(1, 5):
        got, want = (read_table(r.table_file("rollouts", cycle)) for r in (run, reference))
        assert got["token_id"].equals(want["token_id"])
    for folder in ("final", "best"):
        assert not damage(run.path / folder)
    assert {e["event"] for e in read_lines(run.path / "events.jsonl")} == {
        e["event"] for e in read_lines(reference.path / "events.jsonl")
    }


def same_numbers(run: Run, want: Run) -> None:
    lines, others = steady(run), steady(want)
    assert [line.keys() for line in lines] == [line.keys() for line in others]
    for line, other in zip(lines, others, strict=True):
        missing = [name for name, x in other.items() if x is None]
        assert [line.pop(name) for name in missing] == [other.pop(name) for name in missing]
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5), line["cycle"]


def test_two_processes_sample_ahead_what_one_does(done, tmp_path, tiny_model):
    run, want = done.run("ahead"), alone(config_of(tmp_path, tiny_model(), **JOBS["ahead"]["sections"]))
    assert done.codes["ahead"] == [0, 0]
    same_numbers(run, want)
    got, tokens = (read_table(r.table_file("rollouts", 4))["token_id"] for r in (run, want))
    assert got.equals(tokens)


def test_a_checkpoint_of_one_process_is_continued_on_two_that_share_its_weights(done, reference):
    assert done.codes["from-one-to-full"] == [0, 0]
    same_numbers(done.run("from-one-to-full"), reference)
    got, want = (load_file(r.final / "model.safetensors") for r in (done.run("from-one-to-full"), reference))
    for name in want:
        close(got[name], want[name], 1e-5)


def test_a_checkpoint_of_two_processes_is_continued_on_one(done, reference, tmp_path):
    config = replace(load_config(done.root / "stopped" / "c.yaml"), run=str(tmp_path / "run"))
    shutil.copytree(done.run("stopped").path, config.run)
    assert Run(Path(config.run)).metrics[-1]["cycle"] < 4
    same_numbers(alone(config), reference)


def test_a_signal_to_one_process_stops_all_of_them_saved(done):
    status = done.run("stopped").status
    assert done.codes["stopped"] == [0, 0]  # torchrun would start them again
    assert (status["state"], status["exit_code"]) == ("stopped", 3)


def test_a_run_of_which_a_process_was_killed_ends_with_the_same_bits(done):
    assert done.codes["killed"] == [1, -signal.SIGKILL]
    assert max(done.seconds["killed"]) < done.seconds["replicate"][0] + 10
    assert done.codes["killed, again"] == [0, 0]
    assert "another process of the run has ended" in done.said
    run, want = done.run("killed"), done.run("replicate")
    assert [e["cycle"] for e in read_lines(run.path / "events.jsonl") if e["event"] == "resumed"] == [2]
    assert steady(run) == steady(want)
    assert sha256(run.final / "model.safetensors") == sha256(want.final / "model.safetensors")


def test_a_reward_that_fails_on_rank_0_ends_all_with_its_message(done):
    assert done.codes["reward-fails"] == [2, 2]
    assert "raised ValueError: no score" in done.run("reward-fails").status["exit_reason"]
    assert done.said.count("raised ValueError: no score") == 1


def test_reward_models_score_a_part_of_the_rows_on_each_process(done):
    assert done.codes["scores"] == [0, 0]
    models = [str(done.root / f"reward-model-{i}") for i in range(2)]
    got, want = (
        [torch.load(done.root / f"scores.pt.{rank}") for rank in range(2)],
        scores(str(done.root / "model"), models, ALONE),
    )
    assert want["rows"] == 9
    assert sum(rank["rows"] for rank in got) == 9
    assert all(rank["rows"] >= 3 for rank in got)
    for rank in got:
        close(rank["scores"], want["scores"], 1e-6)
        for name in ("one", "several"):
            close(torch.tensor(rank["parts"][name]), torch.tensor(want["parts"][name]), 1e-6)
        close(torch.tensor(rank["members"]["several"]), torch.tensor(want["members"]["several"]), 1e-6)


def test_a_row_that_no_reward_model_can_score_is_named_by_all_as_by_one_process(done):
    models = [str(done.root / f"reward-model-{i}") for i in range(2)]
    want = scores(str(done.root / "model"), models, ALONE)["said"]
    assert "but row 7 (row 7 of the data" in want
    assert [torch.load(done.root / f"scores.pt.{rank}")["said"] for rank in range(2)] == [want] * 2


def test_a_run_with_reward_models_on_two_processes_is_that_of_one(done, tmp_path):
    assert done.codes["reward-models"] == [0, 0]
    config = replace(load_config(done.root / "reward-models" / "c.yaml"), run=str(tmp_path / "run"))
    same_numbers(done.run("reward-models"), ppo(config))


def test_ranks_that_were_given_different_configs_are_refused(done):
    assert done.codes["another-seed"] == [2, 2]
    assert done.said.count("seed is 1 on rank 1") == 1
    assert not done.run("another-seed").path.exists()


def test_a_rank_that_fails_alone_hangs_no_other(done):
    assert done.codes["breaks"] == [1, 1]
    status = done.run("breaks").status
    assert (status["state"], status["exit_reason"]) == ("failed", "rank 1: ValueError: on rank 1 alone")
    assert done.said.count("tether: error: rank 1: ValueError: on rank 1 alone") == 1
    assert max(done.seconds["breaks"]) < 10


def test_too_few_gpus_are_told_by_the_process_that_has_one(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1", "LOCAL_RANK": "0",
                        "LOCAL_WORLD_SIZE": "2"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device=cuda with 2 processes on a host"):
        local_device(torch.device("cuda"))


def test_a_command_for_one_process_is_refused_on_two(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "model"]) == 2
    assert "tether generate does not run on 2 processes" in capsys.readouterr().err
