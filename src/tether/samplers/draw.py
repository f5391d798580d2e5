"""From logits to tokens: temperature, top-k, top-p, and one uniform per row."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from tether.errors import TrainingError


class Draw(NamedTuple):
    tokens: Tensor  # [B] int64
    logprobs: Tensor  # [B] nats: at the temperature, over the whole vocabulary, before top-k and top-p
    truncated_mass: Tensor  # [B] probability that top-k and top-p cut off


def draw(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Draw:
    """Draw one token per row by inverting the cumulative distribution at that row's uniform.

    logits [B, V] float32; uniforms [B] in [0, 1), float64 where the device has it: probabilities are summed in their
    precision. One uniform per row is enough, where adding Gumbel noise would need V of them.

    Raises TrainingError when a row's logits are not finite.
    """
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    probs = logprobs.exp()
    kept = truncate(probs, top_k=top_k, top_p=top_p)
    cdf = _cumsum(kept, uniforms.dtype)
    mass = cdf[:, -1:]
    # Rounding can put the uniform on the very end of the distribution, beyond the last token that has any mass.
    point = torch.minimum(uniforms[:, None] * mass, torch.nextafter(mass, torch.zeros_like(mass)))
    tokens = torch.searchsorted(cdf, point, right=True).squeeze(-1).clamp_(max=logits.shape[-1] - 1)  # NaN: see below
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    if not torch.isfinite(chosen).all():
        raise TrainingError(
            "the model's logits are not finite: no token can be drawn from them. If training broke it, lower optim.lr "
            "and start over with --fresh (a run that continues keeps its settings)."
        )
    cut = torch.zeros_like(chosen) if kept is probs else (1.0 - mass.squeeze(-1)).clamp(min=0.0)
    return Draw(tokens, chosen, cut.to(chosen.dtype))


def truncate(probs: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Zero all but the kept tokens of `probs` [B, V]; not renormalized. Top-k first, then top-p of what that kept.

    top_p keeps the smallest set of likeliest tokens whose share of the mass reaches it (Holtzman et al. 2020), so never
    less than one token.
    """
    if 0 < top_k < probs.shape[-1]:
        values, indices = probs.topk(top_k, dim=-1)
        probs = torch.zeros_like(probs).scatter(-1, indices, values)
    if top_p < 1.0:
        values, indices = probs.sort(dim=-1, descending=True, stable=True)
        share_before = (_cumsum(values) - values) / values.sum(-1, keepdim=True)
        probs = torch.zeros_like(probs).scatter(-1, indices, torch.where(share_before < top_p, values, 0.0))
    return probs


_mode_lock = threading.Lock()  # torch's mode is one for all threads


def _cumsum(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The cumulative sum of each row of `x` [B, V]; on a GPU in a fixed order too, when torch is asked for one.

    torch has one check for all its scans. Only that of a single row splits it over blocks and adds their sums as they
    arrive; of two rows or more, each is summed by one block, in order. So the check is lifted for this one call.
    """
    if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return x.cumsum(-1, dtype=dtype)
    rows = len(x)
    with _mode_lock:
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("default")
        try:
            return x.expand(max(rows, 2), -1).cumsum(-1, dtype=dtype)[:rows]
        finally:
            torch.set_deterministic_debug_mode(mode)
