"""PPO with its reward model behind `tether serve` and a network that fails, beside the same reward model in the run.

.venv/bin/python bench/remote.py --model DIR

Of every 20 requests two are answered 503 and one far too late, in an order drawn from a seed. Rounds alternate; what is
compared are the seconds of all cycles together, and whether the metrics have the same bits. The model on disk is the
policy, and with a random head the reward model.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random

import torch
from starlette.responses import JSONResponse

import tether
from tether.config import RewardSourceConfig
from tether.config.reading import load_config
from tether.data.tokenizer import load_tokenizer
from tether.models.reward_model import init_reward_model, save_reward_model
from tether.runs import Run

TOKEN_ENV = "REMOTE_BENCH_TOKEN"
TIMES = ("time/", "tokens_per_s/", "memory/")
PROMPTS = ["The film", "I watched", "This is", "What a", "My wife", "Nobody", "The plot", "An actor"]


class Flapping:
    """A middleware: of every 20 requests, two 503 and one that nobody waits for."""

    def __init__(self, app, late_s):
        self.app, self.late_s, self.count, self.random, self.faults = app, late_s, 0, Random(0), []

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http" and scope["method"] == "POST":
            if not self.faults:
                self.faults = ["503"] * 2 + ["late"] + [""] * 17
                self.random.shuffle(self.faults)
            fault = self.faults.pop()
            if fault == "503":
                await JSONResponse({"detail": "busy"}, 503)(scope, receive, send)
                return
            if fault == "late":
                await asyncio.sleep(self.late_s)
        await self.app(scope, receive, send)


def serve(directory: str, late_s: float) -> None:
    """What the server's process does: `tether serve`, with faults around it."""
    from tether.serving import app, serve

    plain = app.create_app
    app.create_app = lambda *args, **options: Flapping(plain(*args, **options), late_s)
    serve.serve(
        directory, port=0, token_env=TOKEN_ENV, device="cpu", most_rows=8192, most_megabytes=128, most_waiting=32
    )


def run(folder: Path, name: str, model: str, source: RewardSourceConfig, args: argparse.Namespace) -> Run:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (folder / "c.yaml").write_text(f"""
run: {folder / name}
device: cpu
model: {{policy: {model}}}
prompts: {{path: {folder / "prompts.jsonl"}}}
reward: [{{model: placeholder}}]
sampling: {{max_new_tokens: {args.tokens}}}
ppo: {{cycles: {args.cycles}, batch: {args.batch}, minibatch: {args.batch // 2}, responses_per_prompt: 4}}
evaluate: {{every: 0}}
checkpoint: {{every: {args.cycles}}}
log: {{tensorboard: false, rollouts_every: 0}}
""")
    config = load_config(folder / "c.yaml")
    return tether.ppo(type(config)(**vars(config) | {"reward": [source]}))


def seconds(done: Run) -> float:
    """Of all cycles but the first, which warms up."""
    return sum(
        value for line in done.metrics[1:] for key, value in line.items() if re.fullmatch(r"time/(?!cycle)\w+_s", key)
    )


def steady(done: Run) -> list[dict]:
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in done.metrics]


parser = argparse.ArgumentParser()
parser.add_argument("--model")
parser.add_argument("--serve", nargs=2, metavar=("DIR", "LATE_S"), help=argparse.SUPPRESS)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--cycles", type=int, default=21)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--tokens", type=int, default=64)
parser.add_argument("--timeout", type=float, default=9.0)
args = parser.parse_args()
torch.set_num_threads(1)
if args.serve:
    serve(args.serve[0], float(args.serve[1]))
    sys.exit()
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    rm = init_reward_model(
        args.model, dtype=torch.float32, weights_dtype=torch.float32, device=torch.device("cpu"), seed=0
    )
    tokenizer = load_tokenizer(args.model)
    save_reward_model(rm, tokenizer, folder / "rm", stop_id=tokenizer.eos_token_id)
    os.environ[TOKEN_ENV] = "a-token-of-the-benchmark-alone"
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(folder / "rm"), str(args.timeout)], stdout=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://\S+", server.stdout.readline())[0]
        local = RewardSourceConfig(model=str(folder / "rm"), name="rm")
        remote = RewardSourceConfig(url=url, key_env=TOKEN_ENV, name="rm", timeout_s=args.timeout)
        ratios = []
        for i in range(args.rounds):
            here = run(folder, f"local-{i}", args.model, local, args)
            there = run(folder, f"remote-{i}", args.model, remote, args)
            ratios.append(seconds(here) / seconds(there))
            print(f"{seconds(here):.1f} s here, {seconds(there):.1f} s through {url}: {ratios[-1]:.0%} of the speed; "
                  f"metrics {'bit-equal' if steady(here) == steady(there) else 'DIFFER'}", flush=True)  # fmt: skip
        print(f"speed {statistics.median(ratios):.0%} [{min(ratios):.0%}–{max(ratios):.0%}] of the local model's")
    finally:
        server.kill()
