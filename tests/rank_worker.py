"""What torchrun starts on every rank: torchrun … rank_worker.py JOBS.json.

Does one job after the other, each in a process forked off, so that one may be killed; writes how each ended, and after
how many seconds, into JOBS.json.RANK. A job is {"gradients": FILE}, {"scores": FILE, …}, or {"argv": …} of the command
line.
"""

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from policies_on_ranks import LAYOUTS, gradients, scores
from tether.cli import main
from tether.distributed.ranks import Ranks, join
from tether.train import update

RANK = int(os.environ["RANK"])


def signal_at_step(number: int, step: int, run: Path) -> None:
    """To this process alone, once the run has done so many cycles."""
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < step:
        time.sleep(0.01)
    os.kill(os.getpid(), number)


def of_experts(ranks: Ranks) -> list[torch.Tensor | None]:
    """The summed gradients of two weights of which each rank reached another, and of one that none did."""
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    weights[ranks.rank].grad = torch.full((2,), 1.0 + ranks.rank)
    ranks.sum_gradients(weights)
    return [weight.grad for weight in weights]


def broken(*_):
    raise ValueError("on rank 1 alone")


def do(job: dict) -> int:
    if "gradients" in job:
        with join("cpu", timeout_s=60) as ranks:
            found: dict = {layout: gradients(layout[0], ranks, layout[1]) for layout in LAYOUTS}
            found["experts"] = of_experts(ranks)
        if RANK == 0:
            torch.save(found, job["gradients"])
        return 0
    if "scores" in job:
        with join("cpu", timeout_s=60) as ranks:
            torch.save(scores(job["policy"], job["models"], ranks), f"{job['scores']}.{RANK}")
        return 0
    if "signal" in job and RANK == 1:
        threading.Thread(target=signal_at_step, args=(*job["signal"], Path(job["run"])), daemon=True).start()
    if "breaks" in job and RANK == 1:
        update._means = broken
    return main([*job["argv"], *job.get("more", []), *(job.get("on_rank_1", []) if RANK == 1 else [])])


def forked(job: dict) -> int:
    """How a process that does the job ends: its exit code, or the signal that killed it, negative."""
    sys.stdout.flush()
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        code = do(job)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, ended = Path(sys.argv[1]), []
    for number, job in enumerate(json.loads(jobs.read_text())):
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # torchrun keeps one store: every job a name of its own
        began = time.monotonic()
        ended.append([forked(job), time.monotonic() - began])
        Path(f"{jobs}.{RANK}").write_text(json.dumps(ended))
