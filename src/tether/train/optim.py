"""What every trainer's optimizer step is made of: AdamW, learning rates, and counted shuffles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tether.config import OptimConfig
from tether.distributed.ranks import ALONE, Ranks
from tether.distributed.shard import whole
from tether.errors import TrainingError

Named = Sequence[tuple[str, nn.Parameter]]

RESTART_HINT = "start over with --fresh (a run that continues keeps its settings)"  # ends advice to change one

MAX_SKIPPED_IN_A_ROW = 5  # steps with gradients that are not finite: one is bad luck, five a broken run

# streams of `permutation`: one for each thing that is shuffled
SHUFFLE, PROMPTS, HELD_OUT, MISMATCH = 101, 102, 103, 104


def permutation(count: int, *, seed: int, stream: int, counter: Sequence[int] = ()) -> list[int]:
    """A shuffle of 0 … count-1, a function of (seed, stream, counter) alone: there is nothing to save or resume."""
    words = [*counter, 0, 0, 0][:3]
    shuffled = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, *words])).permutation(count)
    return [int(i) for i in shuffled]


def shuffled_batches(count: int, *, batch: int, epochs: int, seed: int) -> list[list[int]]:
    """The examples of every optimizer step, a function of the seed alone; an epoch's last step may be smaller."""
    plan = list[list[int]]()
    for epoch in range(epochs):
        order = permutation(count, seed=seed, stream=SHUFFLE, counter=(epoch,))
        plan += [order[start : start + batch] for start in range(0, count, batch)]
    return plan


def build_optimizer(
    config: OptimConfig, policy: Named, critic: Named = (), *, lora: bool, critic_is_head: bool = True,
    lr: tuple[float, float] = (1e-5, 1e-4),
) -> torch.optim.AdamW:  # fmt: skip
    """AdamW with the policy's weights in one group and the critic's in another, each with its own peak learning rate.

    lr: what the config's null stands for, without and with LoRA. critic_lr null is 10·lr for a head: it starts at zero,
    and under Adam a weight moves by at most about lr a step, so at 1e-5 thousands of steps would pass before it said
    anything.
    """
    policy_lr = config.lr if config.lr is not None else lr[lora]
    critic_lr = config.critic_lr if config.critic_lr is not None else policy_lr * (10 if critic_is_head else 1)
    groups = [{"params": [p for _, p in named], "names": [name for name, _ in named], "lr": peak, "peak": peak}
              for named, peak in ((policy, policy_lr), (critic, critic_lr)) if named]  # fmt: skip
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True)


class ScheduledOptimizer:
    """The optimizer of a run with its learning rates, and what becomes of a gradient that is not finite."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimConfig, total: int, ranks: Ranks = ALONE) -> None:
        self.optimizer, self.config, self.total, self.ranks = optimizer, config, total, ranks
        self.skipped = 0  # steps in a row whose gradient was not finite; a checkpoint keeps it

    @property
    def named(self) -> Named:
        return [item for g in self.optimizer.param_groups for item in zip(g["names"], g["params"], strict=True)]

    def step(self, step: int) -> dict[str, float]:
        """Step `step` (from 0) of the run; where the gradient is not finite, leave the weights as they are.

        Returns its metrics: learning rate of the first group, gradient norm before clipping, whether it was skipped.
        """
        factor, groups = lr_factor(self.config, step, self.total), self.optimizer.param_groups
        for group in groups:
            group["lr"] = group["peak"] * factor
        parameters = [p for g in groups for p in g["params"]]
        self.ranks.sum_gradients(parameters)
        norm = float(whole(nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)))
        finite = math.isfinite(norm)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped = 0 if finite else self.skipped + 1
        return {"optim/lr": groups[0]["lr"], "optim/grad_norm": norm, "optim/skipped_steps": int(not finite)}

    def stop_if_broken(self) -> None:
        """Raise TrainingError when too many steps in a row were skipped."""
        if self.skipped >= MAX_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"the gradients of {self.skipped} optimizer steps in a row are not finite: nothing can be learned any "
                f"more. Look at the data or the scores of these steps; or lower optim.lr, or set model.dtype to "
                f"float32, and {RESTART_HINT}."
            )


def read_numbers(metrics: Sequence[dict[str, Tensor]]) -> list[dict[str, float]]:
    """Scalars as numbers, all at once: reading one off a GPU waits for all that it has to do."""
    if not metrics:
        return []
    rows = torch.stack([torch.stack(list(m.values())) for m in metrics]).tolist()
    return [dict(zip(m, row, strict=True)) for m, row in zip(metrics, rows, strict=True)]


def lr_factor(config: OptimConfig, step: int, total: int) -> float:
    """The schedule, as a factor of the peak: up linearly over `warmup` steps, then constant, or to 0 after the last."""
    if step < config.warmup:
        return (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, total - config.warmup)
    if config.schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0
