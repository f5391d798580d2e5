"""An update's memory, measured in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_an_update_peaks_under_a_quarter_of_what_the_logits_alone_would_take():
    done = subprocess.run([sys.executable, BENCH, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["logits_mb"] > 1500
    assert 20 < found["update_mb"] < found["logits_mb"] / 4  # nothing at all would mean that nothing was measured
