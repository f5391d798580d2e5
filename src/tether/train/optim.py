"""What every trainer's optimiser step is made of: AdamW, learning rates, and counted shuffles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from tether.config import OptimConfig

Named = Sequence[tuple[str, nn.Parameter]]

MAX_SKIPPED_IN_A_ROW = 5  # steps with gradients that are not finite: one is bad luck, five a broken run

SHUFFLE, PROMPTS, HELD_OUT = 101, 102, 103  # streams of `permutation`: one for each thing that is shuffled


def permutation(count: int, *, seed: int, stream: int, counter: Sequence[int] = ()) -> list[int]:
    """A shuffle of 0 … count-1, a function of (seed, stream, counter) alone: there is nothing to save or resume."""
    words = [*counter, 0, 0, 0][:3]
    shuffled = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, *words])).permutation(count)
    return [int(i) for i in shuffled]


def build_optimizer(
    config: OptimConfig, policy: Named, critic: Named = (), *, lora: bool, critic_is_head: bool = True
) -> torch.optim.AdamW:
    """AdamW with the policy's weights in one group and the critic's in another, each with its own peak learning rate.

    lr null is 1e-5, with LoRA 1e-4. critic_lr null is 10·lr for a head: it starts at zero, and under Adam a weight
    moves by at most about lr a step, so at 1e-5 thousands of steps would pass before it said anything.
    """
    lr = config.lr if config.lr is not None else (1e-4 if lora else 1e-5)
    critic_lr = config.critic_lr if config.critic_lr is not None else (10 * lr if critic_is_head else lr)
    groups = [{"params": [p for _, p in named], "lr": peak, "peak": peak}
              for named, peak in ((policy, lr), (critic, critic_lr)) if named]  # fmt: skip
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, total: int) -> float:
    """Set the learning rate of optimiser step `step` (from 0) of `total`; returns the first group's."""
    factor = lr_factor(config, step, total)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
    return float(optimizer.param_groups[0]["lr"])


def lr_factor(config: OptimConfig, step: int, total: int) -> float:
    """The schedule, as a factor of the peak: up linearly over `warmup` steps, then constant, or to 0 after the last."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, total - config.warmup)
    if config.schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float) -> float:
    """Scale all gradients down to `max_norm` together; returns the norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return float(nn.utils.clip_grad_norm_(parameters, max_norm))


def step_if_finite(optimizer: torch.optim.Optimizer, max_norm: float) -> tuple[float, bool]:
    """Clip and step: (gradient norm before clipping, True). Where that is not finite, leave the weights as they are."""
    norm = clip_gradients(optimizer, max_norm)
    finite = math.isfinite(norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
