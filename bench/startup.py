"""How long the first answer takes: `import tether` and --help, each in a fresh process, median of several.

.venv/bin/python bench/startup.py
"""

import statistics
import subprocess
import sys
import time

RUNS = 9
CASES = {
    "python alone": ["-c", "pass"],
    "import tether": ["-c", "import tether"],
    "tether --help": ["-m", "tether.cli", "--help"],
    "tether ppo --help": ["-m", "tether.cli", "ppo", "--help"],
}


def seconds(argv: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


for name, argv in CASES.items():
    seconds(argv)  # the first run writes bytecode
    times = [seconds(argv) for _ in range(RUNS)]
    print(f"{name:20} {statistics.median(times):.3f} s   (fastest {min(times):.3f}, slowest {max(times):.3f})")
