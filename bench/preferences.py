"""What people prefer, learned as a reward model or by DPO, over seeds and CPU paths: the examples on the real data.

    python bench/preferences.py polite --model DIR --data FILE [--seeds 0 1 2 3 4] [--paths default avx2]
    python bench/preferences.py dpo-polite --model DIR --data FILE
    python bench/preferences.py hh --model DIR --data FILE

Prints a line per run: accuracy on held-out pairs with its 95 % interval, what length alone reaches, calibration error;
then the ranges.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import tether
from paths import Row, add_options, figures, ranged, sweep

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
CONFIGS = {"polite": "preferences/polite.yaml", "hh": "preferences/hh.yaml", "dpo-polite": "dpo/polite.yaml"}


def measure(args: argparse.Namespace) -> Row:
    config = tether.load_config(EXAMPLES / CONFIGS[args.example])
    train = tether.dpo if args.example.startswith("dpo") else tether.reward_model
    run = train(
        replace(
            config,
            run=str(args.to / f"{args.example}-{args.seeds[0]}-{args.paths[0]}"),
            seed=args.seeds[0],
            model=replace(config.model, policy=args.model),
            data=replace(config.data, path=args.data),
        )
    )
    return json.loads((run.path / run.kind.report).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=list(CONFIGS))
    parser.add_argument("--model", required=True, help="directory of stories260K")
    parser.add_argument("--data", required=True, help="the pairs that the example's first lines name")
    add_options(parser, seeds=5, to="runs/bench-preferences")
    args = parser.parse_args()
    if result := os.environ.get("RESULT"):
        Path(result).write_text(json.dumps(measure(args)))
        return
    one = [__file__, args.example, "--model", args.model, "--data", args.data, "--to", str(args.to)]
    rows = sweep(
        args,
        lambda seed, path: figures([*one, "--seeds", str(seed), "--paths", path], path),
        example=args.example,
    )
    print("| seed | CPU path | held-out pairs | accuracy, 95 % interval | by length alone | calibration error |")
    print("|---|---|--:|---|---|---|")
    for r in rows:
        print(
            f"| {r['seed']} | {r['path']} | {r['test_pairs']} | {share(r['accuracy'])} | {share(r['length_accuracy'])} "
            f"| {r['calibration_error']:.3f} |"
        )
    for name, take in (
        ("accuracy", lambda r: r["accuracy"]["value"]),
        ("length", lambda r: r["length_accuracy"]["value"]),
        ("calibration", lambda r: r["calibration_error"]),
    ):
        print(f"{name:12}{ranged(map(take, rows), '.3f')}")


def share(found: Row) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


if __name__ == "__main__":
    main()
