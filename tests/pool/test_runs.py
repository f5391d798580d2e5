"""`tether ppo` with a pool: the local engine's run to the bit, whoever is killed, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

import tiny_ppo
from resume import launch, steady, wait_for_step
from tether import Run
from tether.config import RewardSourceConfig
from tether.config.reading import to_yaml


@pytest.fixture
def write(tmp_path, tiny_model):
    """Writes the config of a tiny run whose sampling has these changes."""
    if not os.environ.get("TETHER_TEST_RAY"):
        pytest.skip("Ray has a stage of its own: make test-ray")
    policy = tiny_model("llama")

    def config(name: str, **sampling) -> Path:
        base = {"temperature": 0.7, "max_new_tokens": 10, "stop_token_ids": tiny_ppo.STOPS}
        run = tiny_ppo.tiny_config(tmp_path / name, policy, sampling=base | sampling)
        file = tmp_path / f"{name}.yaml"
        file.write_text(to_yaml(replace(run, reward=[RewardSourceConfig(function=f"{tiny_ppo.__file__}:id_score")])))
        return file

    return config


def of_ray(process) -> list[psutil.Process]:
    """All but Ray's agents, who need a minute to see that they are alone."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [p for p in children if not p.cmdline()[0].endswith("Agent")]


def worker_of(process) -> psutil.Process:
    return next(p for p in of_ray(process) if p.cmdline()[0].startswith("ray::PoolWorker"))


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=60)
    return not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def ended(process, code: int = 0) -> str:
    _, error = process.communicate()
    assert process.returncode == code, error
    return error


def test_a_run_whose_worker_and_then_itself_are_killed_ends_with_the_local_engines_bits(tmp_path, write):
    local, killed = launch("ppo", write("local")), launch("ppo", write("killed", engine="pool"))
    wait_for_step(tmp_path / "killed", 1, killed)
    os.kill(worker_of(killed).pid, signal.SIGKILL)
    wait_for_step(tmp_path / "killed", 3, killed)
    left = of_ray(killed)
    assert left
    killed.kill()
    killed.wait()
    assert gone(left)
    assert "engine_restarted" in (tmp_path / "killed" / "events.jsonl").read_text()

    again = launch("ppo", tmp_path / "killed.yaml")
    ended(local)
    ended(again)
    first, second = Run(tmp_path / "local"), Run(tmp_path / "killed")
    rounded = ("check/sampler_gap",)  # rows that decode together are others
    for a, b in zip(steady(first), steady(second), strict=True):
        assert {k: v for k, v in a.items() if k not in rounded} == {k: v for k, v in b.items() if k not in rounded}
    a, b = (load_file(run.final / "model.safetensors") for run in (first, second))
    assert all(a[name].equal(b[name]) for name in a)


def test_a_signal_saves_the_run_though_ray_has_handlers_of_its_own(tmp_path, write):
    stopped = launch("ppo", write("stopped", engine="pool"))
    wait_for_step(tmp_path / "stopped", 1, stopped)
    left = of_ray(stopped)
    stopped.send_signal(signal.SIGTERM)
    ended(stopped, 3)
    assert Run(tmp_path / "stopped").status["state"] == "stopped"
    assert gone(left)


def test_an_address_where_no_ray_is_ends_in_one_line(write):
    file = write("nowhere", engine="pool")
    process = subprocess.run(
        [sys.executable, "-m", "tether", "ppo", str(file), "--sampling.pool.address", "127.0.0.1:1"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 2, process.stderr
    assert "sampling.pool.address=127.0.0.1:1: Ray does not answer (ConnectionRefusedError" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_cluster_that_runs_already_serves_one_process_and_two_ranks_and_stays(tmp_path, write):
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled"}
    subprocess.run([*ray, "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"],
                   check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        place = ["--sampling.pool.address", f"127.0.0.1:{port}"]
        local = launch("ppo", write("local"))
        one = [sys.executable, "-m", "tether", "ppo", str(write("one", engine="pool")), *place]
        two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "tether",
               "ppo", str(write("two", engine="pool")), *place]  # fmt: skip
        for command in (one, two):
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
        ended(local)
        steps = [steady(Run(tmp_path / name)) for name in ("local", "one", "two")]
        for a, b, c in zip(*steps, strict=True):
            assert a["reward/score_mean"] == b["reward/score_mean"] == pytest.approx(c["reward/score_mean"], abs=1e-6)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and "0.0/2.0 CPU" not in status(ray, environment, port):
            time.sleep(0.5)
        assert "0.0/2.0 CPU" in status(ray, environment, port)  # it stands, and nothing of ours is left there
    finally:
        subprocess.run([*ray, "stop", "--force"], check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def status(ray: list[str], environment: dict[str, str], port: int) -> str:
    return subprocess.run([*ray, "status", f"--address=127.0.0.1:{port}"], env=environment, capture_output=True,
                          text=True).stdout  # fmt: skip
