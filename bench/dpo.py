"""How long is a step of DPO, beside TRL's?

    python bench/dpo.py [--models 7M] [--rounds 5] [--peers .peers]

32 pairs, prompts of 16 tokens, answers of 16 to 112 (64 on average); a step of each in turn, so that a busy machine
slows all of them; the ratio is the median of the rounds'. TRL runs twice: by default, with the reference model beside
the policy, and with its log-probs computed before the first step, as ours are. It takes part where
`bench/peers/setup.sh trl` has been run. The last line: median seconds, and TRL's peak resident memory, MB.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from cycle import alternate, ratio, show
from peer import Peer
from shapes import build, prompts, words
from tether.config import DPOSection, OptimConfig
from tether.data.pairs import Pair
from tether.models.language_model import LanguageModel
from tether.models.loading import load_causal_lm
from tether.train.dpo import Item, accumulate
from tether.train.optim import ScheduledOptimizer, build_optimizer
from tether.types import Rows

PAIRS, PROMPT, SHORTEST, LONGEST = 32, 16, 16, 112


def pairs(name: str) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) as ids; each answer ends in the stop token, 0."""
    asked, answers = prompts(name, PAIRS, PROMPT), prompts(name, 2 * PAIRS, LONGEST)
    lengths = [SHORTEST + i * 37 % (LONGEST - SHORTEST + 1) for i in range(2 * PAIRS)]
    cut = [[*ids[: n - 1], 0] for ids, n in zip(answers, lengths, strict=True)]
    return [(asked[i], cut[2 * i], cut[2 * i + 1]) for i in range(PAIRS)]


class Steps:
    """Ours: step after step on the same pairs."""

    def __init__(self, directory: Path, name: str) -> None:
        lm: Any = load_causal_lm(str(directory), dtype=torch.float32, device=torch.device("cpu"))
        self.model = LanguageModel(lm.train(), torch.float32)
        found = [Pair(p, c, r, row=i, prompt_key=str(i)) for i, (p, c, r) in enumerate(pairs(name))]
        self.items = [Item(pair, (self._logprobs(pair, 0), self._logprobs(pair, 1))) for pair in found]
        self.tokens = sum(len(answer) for pair in found for answer in pair.answers)
        optim = OptimConfig(lr=1e-12)
        named = list(lm.named_parameters())
        self.steps = ScheduledOptimizer(build_optimizer(optim, named, lora=False), optim, 1000)
        self.done = 0

    def _logprobs(self, pair: Pair, which: int) -> torch.Tensor:
        rows = Rows.of([pair.prompt_ids], [pair.answers[which]])
        with torch.no_grad():
            return self.model.response_logprobs(rows, temperature=1.0, entropy=False)[0]

    def run(self) -> int:
        accumulate(self.model, None, self.items, DPOSection(batch=PAIRS))
        self.steps.step(self.done)
        self.done += 1
        return self.tokens


def measure(name: str, folder: Path, rounds: int, peers: Path) -> None:
    print(f"\n{name}, {torch.get_num_threads()} threads", flush=True)
    directory = build(name, folder)
    ours = Steps(directory, name)
    job = {"model": str(directory.absolute()), "dtype": "float32", "tokens": ours.tokens,
           "pairs": [[words(p), f" {words(c[:-1])}", f" {words(r[:-1])}"] for p, c, r in pairs(name)]}  # fmt: skip
    with (
        Peer(peers / "trl", "trl_dpo.py", precompute=False, **job) as live,
        Peer(peers / "trl", "trl_dpo.py", precompute=True, **job) as kept,
    ):
        runs = {"ours": ours.run, "TRL": live.run, "TRL, log-probs kept": kept.run}
        times = alternate(runs, rounds)
        for side in list(times)[1:]:
            show("dpo", f"{ratio(times[side], times['ours']):.1f} × {side}", times)
        print(json.dumps({k: statistics.median(v) for k, v in times.items()}), live.peak_mb, kept.peak_mb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["7M"], choices=["7M", "100M", "50k"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-models"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        measure(name, args.folder, args.rounds, args.peers)


if __name__ == "__main__":
    main()
