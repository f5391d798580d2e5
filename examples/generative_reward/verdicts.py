"""Verdicts that a judge learns from: of pairs whose better answer is known, what `tether judge` asks, and the letter.

    python verdicts.py pairs.jsonl --to verdicts.jsonl

A verdict is a question and its answer, as `tether sft` reads them: {"prompt": …, "completion": "A"}. The question is
made by the functions that ask it later, principle and all. Each pair stands there in both orders: whoever answers
by place alone is right on half of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tether.feedback.constitution import draw_principle, read_constitution
from tether.feedback.verdict import plain_question, question


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path, nargs="+", help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--constitution", default="principle.txt", help="as in judge.yaml (%(default)s)")
    parser.add_argument("--chat", action="store_true", help="for a model with a chat template")
    args = parser.parse_args()
    principles = read_constitution(args.constitution)
    pairs = [json.loads(line) for path in args.pairs for line in path.read_text().splitlines()]
    rows = [row for number, pair in enumerate(pairs) for row in verdicts(pair, number, principles, chat=args.chat)]
    args.to.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{args.to}: {len(rows)} verdicts on {len(pairs)} pairs")


def verdicts(pair: dict[str, Any], number: int, principles: tuple[str, ...], *, chat: bool) -> list[dict[str, Any]]:
    """A pair in both orders, by one principle."""
    principle = draw_principle(principles, seed=0, item=str(number))
    rows = []
    for first, second, letter in ((pair["chosen"], pair["rejected"], "A"), (pair["rejected"], pair["chosen"], "B")):
        messages = question(principle, pair["prompt"], first, second)
        if chat:
            rows.append({"messages": [*messages, {"role": "assistant", "content": letter}]})
        else:
            rows.append({"prompt": plain_question(messages), "completion": letter})
    return rows


if __name__ == "__main__":
    main()
