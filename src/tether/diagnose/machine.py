"""What this machine has."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

import psutil
import torch

from tether.diagnose.memory import GIB, size
from tether.runs.environment import describe_environment

_PACKAGES = ("tether", "torch", "transformers", "peft")


def machine() -> str:
    """Processor, memory, GPUs, versions and disk, as lines of text."""
    environment = describe_environment()
    hardware, versions = environment["hardware"], environment["versions"]
    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else hardware["cpus"]
    fast = torch.backends.cpu.get_cpu_capability()
    half = "has" if torch.cpu._is_avx512_bf16_supported() else "no"
    lines = [
        f"system      {platform.platform()}",
        f"processor   {hardware['cpu']}, {usable} cores usable, {fast}, {half} bfloat16 arithmetic",
        f"memory      {size(memory.available)} free of {size(memory.total)}",
        *_gpus(),
        f"disk        {size(shutil.disk_usage(Path.cwd()).free)} free in {Path.cwd()}",
        "versions    " + ", ".join(f"{name} {versions.get(name, 'not installed')}" for name in _PACKAGES),
        f"threads     {torch.get_num_threads()} (OMP_NUM_THREADS sets them)",
    ]
    return "\n".join(lines)


def memory_of(device: str) -> int:
    """Bytes that a run could have: free RAM, or the whole of the first GPU."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return int(psutil.virtual_memory().available)


def _gpus() -> list[str]:
    if torch.cuda.is_available():
        return [
            f"GPU         {p.name}, {p.total_memory / GIB:.0f} GiB, "
            + ("bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16: computes in float32")
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ]
    if torch.backends.mps.is_available():
        return ["GPU         Apple Metal"]
    built = "torch is built without CUDA" if torch.version.cuda is None else "none that torch can use"
    return [f"GPU         none ({built}): everything runs on the processor"]
