"""How fast does the local engine sample, beside HF `generate`, vLLM and the matmuls alone?

    python bench/sampling.py [--models 7M 100M] [--rounds 5] [--peers .peers]
    python bench/sampling.py --steered DIR …    line q, on these models

Every round runs ours, theirs and the bare matmuls one after the other, so that a busy machine slows all of them; the
ratio printed is the median of the rounds' ratios. `generate` gets the better of float32 and bfloat16. vLLM takes part
where `bench/peers/setup.sh vllm` has been run.

    a  64 prompts × 16 tokens, 64 new tokens each            against generate
    b  the same                                              against vLLM
    c  256 prompts × 16 tokens, ragged: mean 64, at most 256 against generate
    d  as a: time of the weights' matmuls alone, at the shapes used, over ours
    j  cost of a token at 4 × batch and 4 × length, over the cost at 1 ×
    q  as a, steered by the heads of implicit Q-learning     against itself without; with --steered DIR … alone
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from peer import Peer
from shapes import build, matmul_weights, prompts
from tether.models.ilql import ILQLHeads, Steering
from tether.models.language_model import LanguageModel
from tether.models.loading import resolve_dtype
from tether.samplers.local import LocalSampler
from tether.types import TRAIN, Prompt, Sampling

NEW, LENGTH = 64, 16


def ours(model: LanguageModel, asked: list[list[int]], new: int, stops: tuple[int, ...]) -> Callable[[], int]:
    sampler = LocalSampler(model)
    rows = [Prompt(tuple(ids), "", i) for i, ids in enumerate(asked)]
    sampling = Sampling(1.0, 0, 1.0, new, stops, 1, 0, TRAIN)
    cycle = 0

    def run() -> int:
        nonlocal cycle
        cycle += 1
        return sum(sampler.generate(rows, sampling, cycle=cycle).lengths)

    return run


def generate(lm: Any, asked: list[list[int]], new: int, stops: tuple[int, ...]) -> Callable[[], int]:
    ids = torch.tensor(asked)
    mask = torch.ones_like(ids)
    stop = torch.tensor(stops)
    kwargs = {"eos_token_id": list(stops)} if stops else {"eos_token_id": None}

    @torch.no_grad()
    def run() -> int:
        out = lm.generate(
            ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new,
            pad_token_id=1, **kwargs,
        )[:, ids.shape[1] :]  # fmt: skip
        ended = torch.isin(out, stop).int().cumsum(1)
        return int(((ended == 0) | ((ended == 1) & torch.isin(out, stop))).sum())  # up to and with the stop token

    return run


def matmuls(name: str, rows: int, dtype: torch.dtype) -> Callable[[], int]:
    """The weights' arithmetic of a whole run of line a: prompts at once, then one token a row at a time."""
    weights = [torch.randn(n_out, n_in, dtype=dtype) for n_in, n_out in matmul_weights(name)]
    step = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=dtype) for w in weights}
    prefill = {w.shape[1]: torch.randn(rows * LENGTH, w.shape[1], dtype=dtype) for w in weights}

    @torch.no_grad()
    def run() -> int:
        for w in weights[:-1]:
            torch.nn.functional.linear(prefill[w.shape[1]], w)
        torch.nn.functional.linear(step[weights[-1].shape[1]], weights[-1])
        for _ in range(NEW - 1):
            for w in weights:
                torch.nn.functional.linear(step[w.shape[1]], w)
        return rows * NEW

    return run


def fastest(runs: dict[str, Callable[[], int]]) -> str:
    """The name of the fastest, by one run each after a warm-up of the first."""
    next(iter(runs.values()))()
    return min((seconds_a_token(run), name) for name, run in runs.items())[1]


def seconds_a_token(run: Callable[[], int]) -> float:
    began = time.perf_counter()
    tokens = run()
    return (time.perf_counter() - began) / tokens


def compare(runs: dict[str, Callable[[], int]], rounds: int, *, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds a token of every run in every round, after one warm-up each."""
    for run in runs.values() if warm_up else ():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_a_token(run))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def show(line: str, times: dict[str, list[float]], text: str) -> None:
    each = "  ".join(f"{name} {1 / statistics.median(t):,.0f}/s" for name, t in times.items())
    print(f"{line}  {text}    [{each}]", flush=True)


def measure(name: str, folder: Path, rounds: int, lines: str, peers: Path) -> None:
    path = build(name, folder)
    dtype = resolve_dtype("auto", torch.device("cpu"), AutoModelForCausalLM.from_pretrained(path).config)
    lm = AutoModelForCausalLM.from_pretrained(path).eval()
    model = LanguageModel(lm, dtype)
    vocabulary = lm.config.vocab_size
    print(f"\n{name}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads")

    asked = prompts(name, 64, LENGTH)
    fixed = ours(model, asked, NEW, ())
    if "a" in lines or "c" in lines:
        hf = {d: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, d)).eval()
              for d in ("float32", "bfloat16")}  # fmt: skip
        best = fastest({d: generate(m, asked, NEW, ()) for d, m in hf.items()})
        theirs = f"generate {best}"
    if "a" in lines:
        times = compare({"ours": fixed, theirs: generate(hf[best], asked, NEW, ())}, rounds)
        show("a", times, f"{ratio(times[theirs], times['ours']):.1f} × {theirs}")
    if "b" in lines and (peers / "vllm" / ".ready").exists():
        with Peer(peers / "vllm", "vllm_generate.py", model=str(path.absolute()), prompts=asked, new=NEW) as vllm:
            times = compare({"ours": fixed, "vllm": vllm.run}, rounds)
        show("b", times, f"{ratio(times['vllm'], times['ours']):.1f} × vLLM")
    if "c" in lines:
        stops = tuple(range(2, 2 + vocabulary // 64))  # of nearly uniform logits: one token in 64 ends a response
        many = prompts(name, 256, LENGTH)
        runs = {"ours": ours(model, many, 256, stops), theirs: generate(hf[best], many, 256, stops)}
        times = compare(runs, max(1, rounds // 2), warm_up=False)  # minutes a round
        show("c", times, f"{ratio(times[theirs], times['ours']):.1f} × {theirs}")
    if "d" in lines:
        times = compare({"ours": fixed, "matmuls": matmuls(name, 64, dtype)}, rounds)
        weights = 2 * sum(i * o for i, o in matmul_weights(name))
        peak = weights / statistics.median(times["matmuls"]) / 1e9
        show("d", times, f"{1 / ratio(times['ours'], times['matmuls']):.0%} of the matmuls' {peak:.0f} GFLOP/s")
    if "j" in lines:
        runs = {
            "1 ×": fixed,
            "4 × batch": ours(model, prompts(name, 256, LENGTH), NEW, ()),
            "4 × length": ours(model, asked, 4 * NEW, ()),
        }
        times = compare(runs, rounds)
        show("j", times, ", ".join(f"{k}: {ratio(t, times['1 ×']):.2f} a token" for k, t in times.items()))


def measure_steering(path: Path, rounds: int) -> None:
    """Heads of random weights: what they say changes no cost. Prompts and lengths as in a, the 10 likeliest tokens."""
    lm = AutoModelForCausalLM.from_pretrained(path).eval()
    dtype = resolve_dtype("auto", torch.device("cpu"), lm.config)
    model = LanguageModel(lm.to(dtype), dtype)
    torch.manual_seed(0)
    heads = ILQLHeads(lm.config.hidden_size, lm.config.vocab_size)
    for head in (heads.target_q1, heads.target_q2):
        torch.nn.init.normal_(head.last.weight, std=0.02)
    steered = replace(model, steer=Steering(heads.state_dict(), strength=1.0, top_k=10))
    asked = torch.randint(2, lm.config.vocab_size, (64, LENGTH)).tolist()
    times = compare({"plain": ours(model, asked, NEW, ()), "steered": ours(steered, asked, NEW, ())}, rounds)
    text = f"{path.name}: steering adds {ratio(times['steered'], times['plain']) - 1:.0%} to the time of a token"
    show("q", times, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["7M", "100M"], choices=["7M", "100M"])
    parser.add_argument("--lines", default="abcdj")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-models"))
    parser.add_argument("--steered", nargs="+", type=Path, default=[], metavar="DIR")
    args = parser.parse_args()
    for path in args.steered:
        measure_steering(path, args.rounds)
    for name in args.models if not args.steered else ():
        lines = args.lines if name == "7M" else "".join(set(args.lines) & {"d"})  # the others would take an hour
        measure(name, args.folder, args.rounds, lines, args.peers)


if __name__ == "__main__":
    main()
