"""How much memory a run takes, and what to do when there is not enough."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tether.config import PPOConfig
from tether.config.kinds import KINDS
from tether.errors import TrainingError
from tether.runs import RunDirectory


def peak_mb(device: torch.device) -> float:
    """MiB: on a GPU what torch had allocated at most, on a CPU the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # Linux: a process inherits ru_maxrss from the one that started it, but not this
    if found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE):
        return int(found[1]) / 2**10
    import resource  # not on every system

    unit = 2**20 if sys.platform == "darwin" else 2**10  # there in bytes, elsewhere in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@contextmanager
def explaining_out_of_memory(run: RunDirectory) -> Iterator[None]:
    """Turn torch's error into a TrainingError that names the part, the bytes and the key to turn."""
    try:
        yield
    except RuntimeError as error:  # of a GPU torch.OutOfMemoryError, of a CPU no kind of its own
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and "DefaultCPUAllocator" not in str(error):
            raise
        asked, total, free = (
            found[1] if (found := re.search(pattern, str(error))) else None
            for pattern in (r"allocate ([\d.]+ \w+)", r"capacity of ([\d.]+ \w+)", r"of which ([\d.]+ \w+) is free")
        )
        where = "CUDA out" if on_gpu else "Out"
        room = f", and {free} of {total} are free" if free and total else ""
        raise TrainingError(
            f"{where} of memory while {run.phase}: {asked or 'more memory'} was asked for{room}. "
            f"{_knob(run)}, and run the same command again: it continues from the last checkpoint."
        ) from error


def _knob(run: RunDirectory) -> str:
    """What to change for the phase that the run is in; all of it may change when a run is continued."""
    config = run.config
    name = KINDS[run.command].section
    tokens = getattr(config, name).microbatch_tokens
    if "loading" in run.phase:
        return "Free memory of other programs, train with model.lora, or take a smaller model"
    if "scoring" in run.phase:
        return "Set dtype: bfloat16 for the reward models, or serve them from elsewhere"
    if "sampling" in run.phase and isinstance(config, PPOConfig):
        return f"Lower sampling.slots ({config.sampling.slots} now; 16, say)"
    return f"Lower {name}.microbatch_tokens ({tokens:,} now) or set model.gradient_checkpointing: true"
