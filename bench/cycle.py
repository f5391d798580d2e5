"""How long is a whole PPO cycle, beside TRL's, and how near is its update to the matmuls alone?

    python bench/cycle.py [--models 7M] [--rounds 5] [--lines efgi] [--peers .peers]

64 prompts × 16 tokens, 64 new tokens each, 4 epochs × 4 minibatches, a reward model of the policy's size; the last two
cycles of every side run one after the other, so that a busy machine slows all of them, and the ratio printed is the
median of the rounds' ratios. TRL takes part where `bench/peers/setup.sh trl-ppo` has been run.

    e  our defaults (shared trunk) against TRL 1.12 in float32, four models, as its users run it
    f  a separate critic, the same arithmetic as TRL's, against TRL in bfloat16 where the CPU has it, else float32
    g  update phase, one epoch: time of the weights' matmuls alone, forward and backward, over ours; also at 100M
    i  peak memory of a cycle at V = 50,000, 16 × 512, against TRL, each in a process of its own
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from peer import Peer
from shapes import build, matmul_weights, prompts, words
from shapes import build_reward as build_reward_model
from tether.config import (
    HeldOutConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    RewardSourceConfig,
    SamplingConfig,
)
from tether.data.prompts import load_prompts
from tether.data.tokenizer import load_tokenizer
from tether.models.loading import resolve_device
from tether.models.policy import build_policy
from tether.rewards import build_reward
from tether.samplers.local import LocalSampler
from tether.train.optim import ScheduledOptimizer, build_optimizer
from tether.train.rollout import Experience, collect
from tether.train.update import update
from tether.types import Sampling

EPOCHS, MINIBATCHES = 4, 4


class Cycles:
    """Ours: cycle after cycle of one run, timed by phase."""

    def __init__(self, name: str, folder: Path, *, batch: int, length: int, new: int, critic: str = "shared",
                 epochs: int = EPOCHS) -> None:  # fmt: skip
        asked = prompts(name, batch, length)
        file = folder / f"prompts-{name}-{batch}-{length}.jsonl"
        file.write_text("".join(json.dumps({"prompt": words(ids)}) + "\n" for ids in asked))
        self.tokens = batch * new
        self.config = PPOConfig(
            run=str(folder / "run"), model=ModelConfig(policy=str(build(name, folder)), critic=critic),
            prompts=PromptsConfig(path=str(file)),
            reward=[RewardSourceConfig(model=str(build_reward_model(name, folder)))],
            sampling=SamplingConfig(max_new_tokens=new, stop_token_ids=[]),
            ppo=PPOSection(cycles=1000, batch=batch, epochs=epochs, minibatch=batch // MINIBATCHES),
            optim=OptimConfig(lr=1e-5), evaluate=HeldOutConfig(every=0),
        )  # fmt: skip
        c, device = self.config, resolve_device("auto")
        tokenizer = load_tokenizer(c.model.policy)
        self.prompts = load_prompts(c.prompts, tokenizer, context=None, max_new_tokens=new)
        self.policy, self.reference, _ = build_policy(c.model, device=device, seed=0)
        self.reward = build_reward(c.reward, c.reward_shaping, tokenizer, (), device)
        self.sampler = LocalSampler(self.policy.model)
        optimizer = build_optimizer(
            c.optim, self.policy.policy_parameters(), self.policy.critic_parameters(),
            lora=False, critic_is_head=self.policy.critic is None,
        )  # fmt: skip
        self.steps = ScheduledOptimizer(optimizer, c.optim, 1000 * epochs * MINIBATCHES)
        self.cycle = 0

    def run(self) -> int:
        self.learn(self.collect())
        return self.tokens

    def collect(self) -> Experience:
        self.cycle += 1
        return collect(
            self.prompts, self.sampler, self.reward, self.policy, self.reference,
            Sampling(max_new_tokens=self.config.sampling.max_new_tokens), self.config.ppo,
            kl_coef=lambda *_: 0.05, cycle=self.cycle,
        )  # fmt: skip

    def learn(self, experience: Experience) -> None:
        update(
            self.policy, self.steps, experience.rollout, self.config.ppo,
            cycle=self.cycle, kl_coef=0.05, temperature=1.0, seed=0,
        )  # fmt: skip
        self.sampler.load_weights(self.policy.model)


def matmuls(name: str, rows: int) -> Callable[[], None]:
    """The weights' arithmetic of an update on `rows` rows of 80 tokens: forward and both products of backward."""
    weights = [torch.randn(n_out, n_in) for n_in, n_out in matmul_weights(name)]
    tokens = rows * 80
    x, y = ({n: torch.randn(tokens, n) for n in {w.shape[d] for w in weights}} for d in (1, 0))

    def run() -> None:
        for i, w in enumerate(weights):
            n = tokens if i < len(weights) - 1 else rows * 64  # the head sees responses alone
            into, out = x[w.shape[1]][:n], y[w.shape[0]][:n]
            torch.nn.functional.linear(into, w)
            out @ w
            out.T @ into

    return run


def alternate(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def trl(peers: Path, name: str, folder: Path, dtype: str, *, batch: int = 64, length: int = 16, new: int = 64) -> Peer:
    return Peer(
        peers / "trl-ppo", "trl_ppo.py", model=str(build(name, folder).absolute()), dtype=dtype,
        reward=str(build_reward_model(name, folder).absolute()), prompts=prompts(name, batch, length), new=new,
        epochs=EPOCHS, minibatches=MINIBATCHES,
    )  # fmt: skip


def show(line: str, text: str, times: dict[str, list[float]]) -> None:
    each = "  ".join(f"{name} {statistics.median(t):.2f} s" for name, t in times.items())
    print(f"{line}  {text}    [{each}]", flush=True)


def measure(name: str, folder: Path, rounds: int, lines: str, peers: Path) -> None:
    print(f"\n{name}, {torch.get_num_threads()} threads", flush=True)
    has_trl = (peers / "trl-ppo" / ".ready").exists()
    if "e" in lines and has_trl:
        ours = Cycles(name, folder, batch=64, length=16, new=64)
        with trl(peers, name, folder, "float32") as theirs:
            times = alternate({"ours": ours.run, "TRL": theirs.run}, rounds)
        show("e", f"{ratio(times['TRL'], times['ours']):.1f} × TRL", times)
    if "f" in lines and has_trl:
        ours = Cycles(name, folder, batch=64, length=16, new=64, critic="separate")
        best = "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"  # else it takes minutes a cycle
        with trl(peers, name, folder, best) as theirs:
            times = alternate({"ours": ours.run, f"TRL {best}": theirs.run}, rounds)
        show("f", f"{ratio(times[f'TRL {best}'], times['ours']):.1f} × TRL {best}", times)
    if "g" in lines:
        ours = Cycles(name, folder, batch=64, length=16, new=64, epochs=1)
        experience, bare = ours.collect(), matmuls(name, 16)
        for group in ours.steps.optimizer.param_groups:
            group["peak"] = 1e-12  # the same rollout again and again: were it learned, its first ratio would leave 1

        def all_matmuls() -> None:
            for _ in range(MINIBATCHES):
                bare()

        times = alternate({"update": lambda: ours.learn(experience), "matmuls": all_matmuls}, rounds)
        weights = 6 * sum(i * o for i, o in matmul_weights(name)) * 64 * 80
        peak = weights / statistics.median(times["matmuls"]) / 1e9
        show("g", f"{1 / ratio(times['update'], times['matmuls']):.0%} of the matmuls' {peak:.0f} GFLOP/s", times)


def peak_memory(folder: Path, peers: Path) -> None:
    """Line i, TRL and ours, resident memory at its highest; ours in a process of its own, as TRL is."""
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; from pathlib import Path; "
        f"import cycle; cycle.Cycles('50k', Path({str(folder)!r}), batch=16, length=256, new=256).run(); "
        "from peers.peak import peak_mb; print(peak_mb())"
    )
    ours = int(
        subprocess.run([sys.executable, "-c", code], check=True, text=True, capture_output=True).stdout.split()[-1]
    )
    with trl(peers, "50k", folder, "float32", batch=16, length=256, new=256) as theirs:
        theirs.run()
        print(f"\ni  peak memory of a cycle, V = 50,000, 16 × 512: ours {ours:,} MB, TRL {theirs.peak_mb:,} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["7M", "100M"], choices=["7M", "100M"])
    parser.add_argument("--lines", default="efgi")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", type=Path, default=Path(".peers"))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-models"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        lines = args.lines if name == "7M" else "".join(set(args.lines) & {"g"})  # the others would take hours
        rounds = args.rounds if name == "7M" else max(1, args.rounds // 2)  # a minute a round
        measure(name, args.folder, rounds, lines, args.peers)
    if "i" in args.lines and (args.peers / "trl-ppo" / ".ready").exists():
        peak_memory(args.folder, args.peers)


if __name__ == "__main__":
    main()
