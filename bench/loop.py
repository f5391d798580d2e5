"""The whole loop of examples/loop, over seeds and CPU paths: do people get what they wanted?

    python bench/loop.py --model DIR [--seeds 0 1 2 3 4] [--paths default avx2]

Prints a line per run: how far the two people agree, the reward model on held-out pairs, and what the lexicon that the
people go by, which no model has seen, says of the answers before and after; then the ranges.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from paths import Row, add_options, figures, ranged, sweep

LOOP = Path(__file__).resolve().parent.parent / "examples" / "loop" / "loop.py"


def measure(args: argparse.Namespace) -> Row:
    to = args.to / f"loop-{args.seeds[0]}-{args.paths[0]}"
    shutil.rmtree(to, ignore_errors=True)  # of a run that was killed: its store holds labels already
    began = time.monotonic()
    command = [sys.executable, str(LOOP), args.model, "--to", str(to), "--seed", str(args.seeds[0])]
    subprocess.run(command, check=True)
    return json.loads((to / "result.json").read_text()) | {"minutes": (time.monotonic() - began) / 60}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of stories260K")
    add_options(parser, seeds=5, to="runs/bench-loop")
    args = parser.parse_args()
    if result := os.environ.get("RESULT"):
        Path(result).write_text(json.dumps(measure(args)))
        return
    one = [__file__, "--model", args.model, "--to", str(args.to)]
    rows = sweep(args, lambda seed, path: figures([*one, "--seeds", str(seed), "--paths", path], path))
    print(
        "| seed | CPU path | κ of both people | reward model, held out | lexicon before | after | KL, nats "
        "| distinct-2 against the start | minutes |"
    )
    print("|---|---|--:|---|--:|--:|--:|--:|--:|")
    for r in rows:
        share = r["reward_model"]
        print(
            f"| {r['seed']} | {r['path']} | {' '.join(f'{k:.2f}' for k in r['kappa'])} "
            f"| {share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}] | {r['before']:.2f} | {r['after']:.2f} "
            f"| {r['kl']:.1f} | {r['variety']:.0%} | {r['minutes']:.1f} |"
        )
    for name, take, form in (
        ("reward model", lambda r: r["reward_model"]["value"], ".3f"),
        ("before", lambda r: r["before"], ".2f"),
        ("after", lambda r: r["after"], ".2f"),
        ("kl", lambda r: r["kl"], ".1f"),
        ("distinct-2", lambda r: r["variety"], ".0%"),
        ("minutes", lambda r: r["minutes"], ".1f"),
    ):
        print(f"{name:14}{ranged(map(take, rows), form)}")


if __name__ == "__main__":
    main()
