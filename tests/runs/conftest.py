"""Run directories to try things on: real files, real locks, real processes."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tether.config import ModelConfig, PPOConfig, PromptsConfig, RewardSourceConfig


@pytest.fixture
def config(tmp_path: Path) -> PPOConfig:
    return PPOConfig(
        run=str(tmp_path / "run"),
        model=ModelConfig(policy="models/some"),
        prompts=PromptsConfig(path="prompts.jsonl"),
        reward=[RewardSourceConfig(function="rewards.py:helpful")],
    )


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start Python on a script; what is still running when the test ends is killed."""
    started = []

    def run(script: str, *arguments: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 KiB; skipped where we may not mount one."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
