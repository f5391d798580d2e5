"""Memory: an update's, and what a run says of its own, each measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize("flags", [[], ["--dpo"]], ids=["PPO", "DPO"])
def test_an_update_peaks_under_a_quarter_of_what_the_logits_alone_would_take(flags):
    done = subprocess.run([sys.executable, BENCH, "--json", *flags], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["logits_mb"] > 1500
    assert 20 < found["update_mb"] < found["logits_mb"] / 4  # nothing at all would mean that nothing was measured


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="elsewhere a process's peak is inherited")
def test_a_runs_peak_is_its_own_and_not_that_of_the_process_that_started_it():
    child = "import torch; from tether.train.memory import peak_mb; print(peak_mb(torch.device('cpu')))"
    start = f"subprocess.run([sys.executable, '-c', {child!r}])"
    parent = "import subprocess, sys; held = bytearray(b'x') * 2**31; " + start
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < 1500
