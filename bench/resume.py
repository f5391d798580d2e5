"""Kill a run with SIGKILL at random moments, run the same command again, and compare bits.

Ten runs of one config, each killed once: eight at a moment drawn uniformly over the time that a whole run takes, two
while a checkpoint is being written. Each is then continued, and must end with the metrics (less what measures time and
memory), the rollout files and the final weights of a run that nothing happened to.

    python bench/resume.py             ten kills of PPO, a table; exit code 1 if a single bit differs
    python bench/resume.py --kind dpo [--kills 3]

Takes about two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import tether
from tether.config import (
    CheckpointConfig,
    DPOConfig,
    DPOSection,
    HeldOutConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    SamplingConfig,
    ScoredConfig,
)
from tether.runs import Run

KINDS = ("ppo", "dpo", "qlearning")
Config = PPOConfig | DPOConfig | QLearningConfig


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=KINDS, default="ppo")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model")
        config = {"ppo": ppo, "dpo": dpo, "qlearning": qlearning}[args.kind]
        began = time.monotonic()
        assert wait(start(config(folder, "whole"))) == 0
        seconds = time.monotonic() - began
        whole = Run.open(folder / "whole")
        unit = "cycle" if args.kind == "ppo" else "step"
        print(f"A run of {len(whole.metrics)} {unit}s takes {seconds:.1f} s. Killed:\n")
        print("| kill | after | while | checkpoint | continued from | metrics | rollouts | weights |")
        print("|---|---|---|---|---|---|---|---|")
        equal = True
        for number in range(1, args.kills + 1):
            in_checkpoint = number > args.kills - 2
            killed = kill_once(config(folder, f"run-{number}"), whole, seconds, rng, in_checkpoint=in_checkpoint)
            assert wait(start(config(folder, f"run-{number}"))) == 0
            run = Run.open(folder / f"run-{number}")
            resumed = [str(e[unit]) for e in run.events if e["event"] == "resumed"]
            same = compare(run, whole)
            equal &= all(same)
            words = " | ".join("equal" if s else "DIFFERENT" for s in same)
            print(f"| {number} | {killed} | {resumed[-1] if resumed else 'the beginning'} | {words} |", flush=True)
    return 0 if equal else 1


# ---------------------------------------------------------------- one run, one kill


@dataclass(frozen=True)
class Killed:
    """When, and what the run directory looked like just after."""

    seconds: float
    doing: str
    checkpoint: str

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s | {self.doing} | {self.checkpoint}"


def kill_once(config: Config, whole: Run, seconds: float, rng: random.Random, *, in_checkpoint: bool) -> Killed:
    """Start a run and kill it; again in a new directory's place if it was over too soon, or past its checkpoint."""
    run, last = Path(config.run), len(whole.metrics)
    unit = "cycle" if isinstance(config, PPOConfig) else "step"
    while True:
        began = time.monotonic()
        pid = start(config)
        if in_checkpoint:
            wait_for_checkpoint(run, rng.randrange(1 + config.checkpoint.keep), pid)
            time.sleep(rng.uniform(0, 0.01))
        else:
            time.sleep(rng.uniform(0, seconds))
        after = time.monotonic() - began
        os.kill(pid, signal.SIGKILL)
        died = wait(pid) == -signal.SIGKILL
        if died and (partial(run) or not in_checkpoint):
            found = checkpoints(run)
            done = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
            doing = "writing a checkpoint" if partial(run) else f"in {unit} {done + 1}" if done < last else "finishing"
            return Killed(after, doing if (run / "config.yaml").exists() else "loading", found[-1] if found else "none")
        if run.exists():
            run.rename(run.with_name(f"{run.name}-missed-{time.monotonic_ns()}"))


def start(config: Config) -> int:
    """Train in a fork of this process; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
            if isinstance(config, PPOConfig):
                tether.ppo(config, reward=score)
            elif isinstance(config, DPOConfig):
                tether.dpo(config)
            else:
                tether.qlearning(config)
        code = 0
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for_checkpoint(run: Path, before: int, pid: int) -> None:
    """Until one is being written with `before` others there, or the process has ended."""
    while not (partial(run) and len(checkpoints(run)) >= before):
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.0005)


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").glob("[!.]*"))


def partial(run: Path) -> bool:
    return any((run / "checkpoints").glob(".*.partial"))


def compare(run: Run, whole: Run) -> tuple[bool, bool, bool]:
    """Whether metrics, rollout files and final weights are equal, bit for bit."""
    measured = ("time/", "tokens_per_s/", "memory/")
    metrics = [[{k: v for k, v in m.items() if not k.startswith(measured)} for m in r.metrics] for r in (run, whole)]
    files = [{p.name: p.read_bytes() for p in (r.path / "rollouts").glob("*")} for r in (run, whole)]
    weights = [
        {
            f"{file.relative_to(r.final)} {name}": t
            for file in r.final.rglob("*.safetensors")
            for name, t in load_file(file).items()
        }
        for r in (run, whole)
    ]
    same = weights[0].keys() == weights[1].keys() and all(torch.equal(weights[0][k], t) for k, t in weights[1].items())
    return metrics[0] == metrics[1], files[0] == files[1], same


# ---------------------------------------------------------------- what is trained


def score(completion_ids, **_):
    return [sum(ids) / len(ids) / 100 for ids in completion_ids]


def ppo(folder: Path, name: str) -> PPOConfig:
    return PPOConfig(
        run=str(folder / name),
        device="cpu",
        model=ModelConfig(policy=str(folder / "model")),
        prompts=PromptsConfig(path=str(folder / "prompts.jsonl")),
        sampling=SamplingConfig(max_new_tokens=24),
        ppo=PPOSection(cycles=12, batch=16, minibatch=8, epochs=2, kl=KLConfig(target=0.1, horizon=100)),
        optim=OptimConfig(lr=1e-3),
        log=LogConfig(tensorboard=False),
        checkpoint=CheckpointConfig(every=3),
        evaluate=HeldOutConfig(every=4, count=4, samples=2),
    )


def dpo(folder: Path, name: str) -> DPOConfig:
    return DPOConfig(
        run=str(folder / name),
        device="cpu",
        model=ReferencedModelConfig(policy=str(folder / "model")),
        data=PairsConfig(path=str(folder / "pairs.jsonl")),
        dpo=DPOSection(epochs=2, batch=8),
        optim=OptimConfig(lr=1e-3),
        log=LogConfig(tensorboard=False),
        checkpoint=CheckpointConfig(every=20),
    )


def qlearning(folder: Path, name: str) -> QLearningConfig:
    return QLearningConfig(
        run=str(folder / name),
        device="cpu",
        model=ModelConfig(policy=str(folder / "model")),
        data=ScoredConfig(path=str(folder / "scored.jsonl")),
        qlearning=QLearningSection(epochs=2, batch=8),
        optim=OptimConfig(lr=1e-3),
        log=LogConfig(tensorboard=False),
        checkpoint=CheckpointConfig(every=20),
    )


def make_model(directory: Path) -> None:
    """A random model over bytes, its tokenizer, and beside both prompts, pairs and scored answers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<eos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(directory)
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(settings).save_pretrained(directory)
    prompts = [letter * n for n, letter in enumerate("abcdefghijklmnop", start=1)]
    answers = [
        (p, "".join(rng.choices("xyz", k=rng.randint(2, 24)))) for rng in [random.Random(0)] for p in prompts * 40
    ]
    write(directory.parent / "prompts.jsonl", [{"prompt": p} for p in prompts])
    write(directory.parent / "pairs.jsonl", [{"prompt": p, "chosen": a, "rejected": f"{a}."} for p, a in answers])
    write(
        directory.parent / "scored.jsonl", [{"prompt": p, "completion": a, "score": a.count("x")} for p, a in answers]
    )


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
