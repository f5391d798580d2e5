"""How much memory does an update take, where the logits would take most?

A vocabulary of 50,000 and 16 × 512 tokens on a small model (width 64, two layers): the float32 logits alone would be
1.6 GB, their softmax and its gradient as much again. What is measured is the peak of the resident set during
`tether.train.update.update`, over what the process holds before it: weights, gradients and the optimizer's moments.

    python bench/memory.py           a table
    python bench/memory.py --dpo     a step of DPO on 8 pairs of as many tokens
    python bench/memory.py --json    the same for a program

Linux only: it reads /proc. Takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tether.config import DPOSection, OptimConfig, PPOSection
from tether.data.pairs import Pair
from tether.models.language_model import LanguageModel
from tether.models.policy import Policy
from tether.train.dpo import Item, accumulate
from tether.train.optim import ScheduledOptimizer, build_optimizer
from tether.train.update import update
from tether.types import Rollout, Rows

VOCABULARY, ROWS, TOKENS = 50_000, 16, 512


def measure() -> dict[str, float]:
    """MB: the process before the update, the update's peak over it, and the float32 logits it never holds."""
    torch.manual_seed(0)
    policy = small_policy()
    optimizer = build_optimizer(OptimConfig(), policy.policy_parameters(), policy.critic_parameters(), lora=False)
    steps = ScheduledOptimizer(optimizer, OptimConfig(), total=2)
    run_update(policy, steps, rollout(policy, rows=1, tokens=8))  # libraries, and the optimizer's moments
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = rollout(policy, rows=ROWS, tokens=TOKENS)

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    run_update(policy, steps, batch)
    logits = ROWS * TOKENS * VOCABULARY * 4 / 2**20
    return {"before_mb": before, "update_mb": resident("VmHWM") - before, "logits_mb": logits}


def measure_dpo() -> dict[str, float]:
    """The same of a step of `tether.train.dpo.accumulate`."""
    torch.manual_seed(0)
    model, section = small_policy().model, DPOSection(microbatch_tokens=ROWS * TOKENS)
    accumulate(model, None, pairs(1, 8), section)  # libraries
    for parameter in model.lm.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = pairs(ROWS // 2, TOKENS)

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    accumulate(model, None, batch, section)
    logits = ROWS * TOKENS * VOCABULARY * 4 / 2**20
    return {"before_mb": before, "update_mb": resident("VmHWM") - before, "logits_mb": logits}


def pairs(count: int, tokens: int) -> list[Item]:
    """Pairs of answers to prompts of one token; the reference gives every token the same."""
    ids = torch.randint(VOCABULARY, (count, 2, tokens)).tolist()
    return [
        Item(Pair(a[:1], a[1:], b[1:], i, str(i)), (torch.full((tokens - 1,), -10.0),) * 2)
        for i, (a, b) in enumerate(ids)
    ]


def small_policy() -> Policy:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    return Policy(LanguageModel(AutoModelForCausalLM.from_config(config), torch.float32)).train()


def rollout(policy: Policy, *, rows: int, tokens: int) -> Rollout:
    """Responses to prompts of one token, as the policy as it is would have given them."""
    ids = torch.randint(VOCABULARY, (rows, tokens)).tolist()
    batch = Rows.of([row[:1] for row in ids], [row[1:] for row in ids])
    with torch.no_grad():
        old = policy(batch, temperature=1.0, entropy=False).logprobs
    noise = torch.randn(old.shape)
    return Rollout(batch, old, old, torch.zeros_like(old), noise, noise, noise)


def run_update(policy: Policy, steps: ScheduledOptimizer, batch: Rollout) -> None:
    ppo = PPOSection(cycles=1, epochs=1, batch=len(batch.rows), minibatch=len(batch.rows), microbatch_tokens=8192)
    update(policy, steps, batch, ppo, cycle=1, kl_coef=0.0, temperature=1.0, seed=0)


def resident(what: str) -> float:
    """MB of /proc/self/status: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dpo", action="store_true", help="a step of DPO instead of PPO's update")
    args = parser.parse_args()
    found = measure_dpo() if args.dpo else measure()
    if args.json:
        print(json.dumps(found))
    else:
        print(f"before the update    {found['before_mb']:7.0f} MB")
        print(f"float32 logits alone {found['logits_mb']:7.0f} MB")
        print(
            f"peak of the update   {found['update_mb']:7.0f} MB, {found['update_mb'] / found['logits_mb']:.1%} of that"
        )
