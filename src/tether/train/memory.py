"""How much memory a run takes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


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
