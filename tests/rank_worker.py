"""One of two processes: python rank_worker.py JOBS.json, with RANK in the environment.

Does every job, and writes how each ended into JOBS.json.RANK. A job is {"port": …} with "gradients": FILE, or with
"argv" of tether ppo.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from policies_on_ranks import LAYOUTS, gradients
from tether.cli import main
from tether.distributed.ranks import join
from tether.train import update

RANK = int(os.environ["RANK"])


def stop_at_step(run: Path, step: int) -> None:
    """A signal to this process alone once the run has done so many cycles."""
    file = run / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < step:
        time.sleep(0.01)
    os.kill(os.getpid(), 15)


def broken(*_):
    raise ValueError("on rank 1 alone")


def do(job: dict) -> int:
    os.environ["MASTER_PORT"] = str(job["port"])
    if "gradients" in job:
        with join("cpu", timeout_s=60) as ranks:
            found = {layout: gradients(layout[0], ranks, layout[1]) for layout in LAYOUTS}
        if RANK == 0:
            torch.save(found, job["gradients"])
        return 0
    if job.get("stop_at") and RANK == 1:
        threading.Thread(target=stop_at_step, args=(Path(job["run"]), job["stop_at"]), daemon=True).start()
    if job.get("breaks") and RANK == 1:
        update._means = broken
    return main(["ppo", *job["argv"], *(job.get("on_rank_1", []) if RANK == 1 else [])])


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, ended = Path(sys.argv[1]), []
    for job in json.loads(jobs.read_text()):
        began = time.monotonic()
        try:
            code = do(job)
        except Exception as error:
            code = repr(error)
        ended.append([code, time.monotonic() - began])
        Path(f"{jobs}.{RANK}").write_text(json.dumps(ended))
