"""What a run's numbers depend on beside its config: versions, hardware, command line."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from tether.runs.resume import Change, changes

_PACKAGES = ("tether", "torch", "transformers", "peft", "safetensors", "numpy", "pyarrow")
_NO_MATTER = {"hardware.memory_gb", "hardware.system"}  # cannot change a floating-point result


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and command line, as environment.json holds them."""
    import psutil
    import torch  # here, not above: reading a run needs no torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a source tree
            versions[package] = importlib.metadata.version(package)
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "versions": versions,
        "hardware": {
            "system": platform.platform(),
            "cpu": _cpu_model(),
            "cpus": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            **({"processes": processes} if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1 else {}),
            "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        },
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
    }


def environment_changes(then: dict[str, Any]) -> list[Change]:
    """What differs from the environment `then` and may change a floating-point result."""
    now = describe_environment()
    found = changes({k: then[k] for k in ("versions", "hardware")}, {k: now[k] for k in ("versions", "hardware")})
    return [change for change in found if change[0] not in _NO_MATTER]


def _cpu_model() -> str:
    with contextlib.suppress(OSError):  # only Linux has it
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
    return platform.processor() or platform.machine()
