"""Several processes, one run: what is broken on one of them, killed, or continued on another number of them.

    python bench/ranks.py faults     an error, NaN, a full disk, a signal … on one of two ranks: when have all ended?
    python bench/ranks.py kills      SIGKILL of a rank at ten moments, two of them inside a save, under --max-restarts
    python bench/ranks.py numbers    checkpoints written and read on 1, 2 and 4 ranks
    python bench/ranks.py time       one rank under torchrun beside none; two with a thread each beside one with two

Every run is started by torchrun, as a user would. On a CPU, of the small random model of bench/resume.py.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import psutil
import torch

from resume import compare, make_model, partial, ppo
from tether.cli import main as tether_command
from tether.config import CheckpointConfig, DistributedConfig, PPOConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.errors import RewardError
from tether.runs import Run
from tether.runs.files import sha256

ALLOWED_S = 10.0  # from a fault until every rank has ended
REWARD = """
def mean_id(completion_ids, **_):
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]
"""


def config_of(folder: Path, name: str, shard: str, cycles: int = 6) -> PPOConfig:
    (folder / "reward.py").write_text(REWARD)
    base = ppo(folder, name)
    return replace(
        base, ppo=replace(base.ppo, cycles=cycles), distributed=DistributedConfig(shard=shard, timeout_s=60),
        reward=[RewardSourceConfig(function=f"{folder / 'reward.py'}:mean_id")], checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip


def launch(config: PPOConfig, ranks: int, *more: str, fault: str | None = None) -> subprocess.Popen[str]:
    """torchrun of `tether ppo`, in the background; `more` goes to torchrun."""
    file = Path(config.run).with_suffix(".yaml")
    file.write_text(to_yaml(config))
    started = ["-m", "tether"] if fault is None else [__file__, "broken", fault, config.run]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", *more,
               *started, "ppo", str(file)]  # fmt: skip
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def whole(config: PPOConfig, ranks: int, *more: str) -> Run:
    """A run to its end."""
    process = launch(config, ranks, *more)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return Run.open(config.run)


# ---------------------------------------------------------------- faults


@dataclass(frozen=True)
class Fault:
    """What happens on one rank, before a call of a function."""

    where: str  # module and function
    call: int  # which of its calls
    does: Callable[[tuple[Any, ...]], None]  # with its arguments
    rank: int = 1
    says: str = ""  # in the message, where the run fails
    state: str = "failed"


def fail(error: BaseException) -> Callable[[tuple[Any, ...]], None]:
    def does(_: tuple[Any, ...]) -> None:
        raise error

    return does


def spoil(value: float) -> Callable[[tuple[Any, ...]], None]:
    """This rank's weights, whose policy or sampler is among the arguments."""

    def does(given: tuple[Any, ...]) -> None:
        model = next(x for x in given if hasattr(x, "model")).model
        with torch.no_grad():
            for p in model.lm.parameters():
                p.add_(value)

    return does


def send(number: int) -> Callable[[tuple[Any, ...]], None]:
    return lambda _: os.kill(os.getpid(), number)


def fill_disk(_: tuple[Any, ...]) -> None:
    """No file of this process grows beyond what fits into a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


SAMPLE, VALUE = "tether.train.rollout:sample_part", "tether.train.rollout:value"
SCORE, PART_OF_SCORE = "tether.rewards.function:FunctionReward.score", "tether.rewards.combine:RewardSet._by_rows"
UPDATE, STEP = "tether.train.ppo:update", "tether.train.update:accumulate"
SAVE = "tether.train.state:TrainingState.save"
NAN, TERM = spoil(float("nan")), send(signal.SIGTERM)
FAULTS = {
    "the reward raises": Fault(SCORE, 3, fail(RewardError("no score")), rank=0, says="no score"),
    "a rank raises": Fault(VALUE, 3, fail(ValueError("on its own")), says="on its own"),
    "NaN in a rank's weights, sampling": Fault(SAMPLE, 3, NAN, says="finite"),
    "NaN in a rank's weights, update": Fault(UPDATE, 2, NAN, says="finite"),
    "the first ratio is off": Fault(UPDATE, 2, spoil(0.05), says="first ratio"),
    "no memory": Fault(STEP, 3, lambda _: torch.empty(2**50), says="memory"),
    "the disk is full": Fault(SAVE, 1, fill_disk, rank=0, says="File too large"),
    "a rank is killed": Fault(STEP, 3, send(signal.SIGKILL), says="has ended"),
    "SIGTERM, sampling": Fault(SAMPLE, 3, TERM, state="stopped"),
    "SIGTERM, scoring": Fault(PART_OF_SCORE, 3, TERM, state="stopped"),
    "SIGTERM, valuing": Fault(VALUE, 3, TERM, state="stopped"),
    "SIGTERM, update": Fault(STEP, 3, TERM, state="stopped"),
    "SIGTERM, saving": Fault(SAVE, 1, TERM, state="stopped"),
}


def broken(name: str, run: str, argv: list[str]) -> int:
    """What a rank runs instead of `tether`: the same, with a fault on one of them, once."""
    fault = FAULTS[name]
    if int(os.environ["RANK"]) == fault.rank:
        import importlib

        module, _, path = fault.where.partition(":")
        owner: Any = importlib.import_module(module)
        *outer, last = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        real, calls = getattr(owner, last), 0

        def breaks(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fault.call:
                Path(f"{run}.broken").touch()
                fault.does(given)
            return real(*given, **named)

        setattr(owner, last, breaks)
    return tether_command(argv)


def faults(folder: Path, shard: str) -> bool:
    print("| on one of two ranks | all ended after | status | said once | message |\n|---|--:|---|---|---|")
    good = True
    for number, (name, fault) in enumerate(FAULTS.items()):
        config = config_of(folder, f"fault-{number}", shard)
        process = launch(config, 2, fault=name)
        ranks = ranks_of(process, 2)
        said: list[str] = []
        reader = threading.Thread(target=lambda p=process, s=said: s.append(p.stdout.read()))
        reader.start()
        psutil.wait_procs(ranks, timeout=120)
        ended = time.time()
        process.wait()
        reader.join()
        mark = Path(f"{config.run}.broken")
        assert mark.exists(), said[0]
        seconds = ended - mark.stat().st_mtime
        errors = re.findall(r"^tether: error: .*", said[0], re.M)
        status = Run(Path(config.run)).status
        once = len(errors) == (fault.state == "failed")
        right = seconds <= ALLOWED_S and status["state"] == fault.state and once and fault.says in "".join(errors)
        good &= right
        message = (errors or [""])[0].removeprefix("tether: error: ")[:110]
        print(f"| {name} | {seconds:.1f} s | {status['state']} | {'yes' if once else 'NO'} | {message} |", flush=True)
        if not right:
            print(said[0][-3000:], file=sys.stderr)
    return good


def ranks_of(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """torchrun's processes, once they are there."""
    while True:
        found = [p for p in psutil.Process(process.pid).children() if "ppo" in p.cmdline()]
        if len(found) == count:
            return found
        time.sleep(0.01)


# ---------------------------------------------------------------- kills, numbers, time


def kills(folder: Path, shard: str, count: int, seed: int) -> bool:
    began = time.monotonic()
    want = whole(config_of(folder, "whole", shard), 2)
    seconds, rng, good = time.monotonic() - began, random.Random(seed), True
    print(f"A run of two ranks takes {seconds:.1f} s.\n")
    print("| kill | rank | after | metrics | rollouts | weights |\n|---|---|---|---|---|---|")
    number = 0
    while number < count:
        config = config_of(folder, f"kill-{number}", shard)
        shutil.rmtree(config.run, ignore_errors=True)
        began, in_save = time.monotonic(), number >= count - 2
        process = launch(config, 2, "--max-restarts", "3")
        victim, moment = rng.randrange(2), rng.uniform(0.3, 1) * seconds
        chosen = ranks_of(process, 2)[victim]
        while process.poll() is None and not (
            partial(Path(config.run)) if in_save else time.monotonic() > began + moment
        ):
            time.sleep(0.0005)
        alive = chosen.is_running() and chosen.status() != psutil.STATUS_ZOMBIE
        with suppress(psutil.NoSuchProcess):
            chosen.kill()
        after = time.monotonic() - began
        said, _ = process.communicate()
        if not alive:
            continue  # it was done before
        assert process.returncode == 0, said
        same = compare(Run.open(config.run), want)
        good &= all(same)
        words = " | ".join("equal" if s else "DIFFERENT" for s in same)
        print(f"| {number + 1}{', in a save' if in_save else ''} | {victim} | {after:.1f} s | {words} |", flush=True)
        number += 1
    return good


def numbers(folder: Path, shard: str) -> bool:
    """final/ is written from the last checkpoint where it is gone: what another number of ranks reads, and writes."""
    config = config_of(folder, "run", shard)
    good = True
    print("| ranks | weights | critic |\n|---|---|---|")
    first = None
    for ranks in (1, 2, 1, 2, 4, 1):
        run = whole(config, ranks)
        digests = tuple(sha256(run.final / name) for name in ("model.safetensors", "critic/value_head.safetensors"))
        first = first or digests
        good &= digests == first
        print(f"| {ranks} | {digests[0][:16]} | {digests[1][:16]} |", flush=True)
        shutil.rmtree(run.final)
    return good


def times(folder: Path, rounds: int) -> bool:
    sides = {"plain": (0, 1), "torchrun, one rank": (1, 1), "one rank, two threads": (1, 2), "two ranks": (2, 1)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    ends: dict[str, str] = {}
    for turn in range(rounds):
        for side, (name, (ranks, threads)) in enumerate(sides.items()):
            os.environ["OMP_NUM_THREADS"] = str(threads)
            base = config_of(folder, f"time-{turn}-{side}", "replicate", 8)
            config = replace(
                base,
                ppo=replace(base.ppo, batch=256, minibatch=128),
                sampling=replace(base.sampling, max_new_tokens=64),
            )
            if ranks:
                run = whole(config, ranks)
            else:
                file = Path(config.run).with_suffix(".yaml")
                file.write_text(to_yaml(config))
                subprocess.run([sys.executable, "-m", "tether", "ppo", str(file)], check=True, capture_output=True)
                run = Run.open(config.run)
            cycles = [sum(v for k, v in line.items() if k.startswith("time/") and v) for line in run.metrics[1:]]
            seconds[name].append(statistics.median(cycles))
            ends[name] = sha256(run.final / "model.safetensors")
    print("| | seconds a cycle |\n|---|--:|")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.2f} |")
    for a, b in (("torchrun, one rank", "plain"), ("two ranks", "one rank, two threads")):
        ratios = sorted(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        print(f"{a} / {b}: {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]")
    print("one rank's bits are the plain run's:", same := ends["torchrun, one rank"] == ends["plain"])
    return same


def main() -> int:
    if sys.argv[1:2] == ["broken"]:
        return broken(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["faults", "kills", "numbers", "time"])
    parser.add_argument("--shard", choices=["replicate", "full"], default="replicate")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        good = {
            "faults": lambda: faults(folder, args.shard),
            "kills": lambda: kills(folder, args.shard, args.kills, args.seed),
            "numbers": lambda: numbers(folder, args.shard),
            "time": lambda: times(folder, args.rounds),
        }[args.part]()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
