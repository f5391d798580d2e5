"""How wide are the margins of the tests that ask for learning? Every figure they record, over seeds and CPU paths.

    python tests/measure.py                       five seeds, each with the CPU's own kernels and with those for AVX2
    python tests/measure.py -k gemma3 --seeds 0 1 --paths avx2

Prints a line per test and figure: its lowest and highest value, of which architecture, seed and path; then every test
that failed. Needs about two minutes for each seed and path on one core. A test says what it measured with
`record_property`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PATHS = {"default": {}, "avx2": {"ATEN_CPU_CAPABILITY": "avx2"}}


def measure(seed: int, path: str, chosen: list[str]) -> ET.Element:
    """JUnit's report of one run of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "learning", f"--learning-seed={seed}", f"--junitxml={report}",
             "-o", "junit_family=xunit1", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp", *chosen],
            cwd=Path(__file__).parent.parent, env={**os.environ, "OMP_NUM_THREADS": "1", **PATHS[path]},
            stdout=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        print(f"seed {seed}, {path}: done", file=sys.stderr, flush=True)
        return ET.parse(report).getroot()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=PATHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (%(default)s)")
    args, chosen = parser.parse_known_args()  # what is left is pytest's: -k, a file, a test
    runs = [(seed, path) for seed in args.seeds for path in args.paths]
    with ThreadPoolExecutor(args.jobs) as pool:
        reports = list(pool.map(lambda run: measure(*run, chosen), runs))
    figures, failed = defaultdict(list), []
    for (seed, path), report in zip(runs, reports, strict=True):
        for case in report.iter("testcase"):
            case_name, where = case.get("name", ""), f"seed {seed}, {path}"
            for said in case.iter("property"):
                key = case_name.partition("[")[0], said.get("name")
                figures[key].append((float(said.get("value", "nan")), f"{case_name.partition('[')[2][:-1]} {where}"))
            if case.find("failure") is not None or case.find("error") is not None:
                failed.append(f"failed: {case_name}, {where}")
    for (test, name), values in figures.items():
        (low, first), (high, last) = min(values), max(values)
        print(f"{test}: {name} {low:.4g} ({first.strip()}) to {high:.4g} ({last.strip()}), n = {len(values)}")
    print("\n".join(failed) or f"{len(runs)} runs, none failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
