"""A key-value cache of slots, written in place, behind transformers' own attention modules.

transformers lets a program register an attention function by name. Ours writes each new key and value into its row's
slot and attends over the slot, so that nothing is ever concatenated, and rows of different lengths decode side by side.
The model code stays as it is: projections, rotary positions, norms and MLPs are the architecture's own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tether.models.language_model import LanguageModel
from tether.samplers.cuda_graphs import CudaGraphRunner

_NAME = "tether_slots"


class SlotCache:
    """Keys and values of up to `slots` sequences of up to `width` tokens. recorded: decode steps as CUDA graphs."""

    def __init__(self, model: LanguageModel, *, slots: int, width: int, recorded: bool = False) -> None:
        self.model, self.slots, self.width = model, slots, width
        self.keys: dict[int, Tensor] = {}  # layer -> [slots, heads, width, head_dim], made at the first write
        self.values: dict[int, Tensor] = {}
        self.windows: dict[int, int | None] = {}  # layer -> the sliding window that it told us
        self.lengths = torch.zeros(slots, dtype=torch.long, device=model.device)  # tokens each slot holds
        self.first = 0  # prefill: the first slot that is written
        self.decoding = False
        # Handed our step at every call: to keep it would be a circle, and the cache would outlive its use.
        self._recorded = CudaGraphRunner(slots=slots, width=width, device=model.device) if recorded else None
        self._reach: int | None = None  # the most tokens an active slot holds; unknown after rows came or went
        # Of this decode step, made when the first layer of a kind asks:
        self._target: dict[int, Tensor] = {}  # key heads -> where keys and values go
        self._bias: dict[tuple[int | None, int], Tensor] = {}  # (sliding window, key heads) -> what may be looked at

    # ------------------------------------------------ what the engine calls, see `tether.samplers.local.Decoder`

    def prefill(self, tokens: Tensor, lengths: Tensor, first: int, copies: Tensor) -> Tensor:
        self.first, self.decoding, self._reach = first, False, None
        m, width = tokens.shape
        end = first + len(copies)
        positions = torch.arange(width, device=tokens.device)[None]
        with attending(self):
            hidden = self.model.hidden(tokens, position_ids=positions.expand_as(tokens))
        if len(copies) > m:
            for store in (self.keys, self.values):
                for cached in store.values():
                    cached[first:end, :, :width] = cached[first + copies, :, :width]
        self.lengths[first:end] = lengths[copies]
        return hidden[copies, lengths[copies] - 1]

    def step(self, tokens: Tensor) -> Tensor:
        at = self.lengths[: len(tokens)]
        self._reach = 1 + (int(at.max()) if self._reach is None else self._reach)  # every active row grows by one
        arguments = tokens, at, self._reach
        hidden = self._recorded(self._run, *arguments) if self._recorded else self._run(*arguments)
        at += 1
        return hidden

    def _run(self, tokens: Tensor, at: Tensor, reach: int) -> Tensor:
        """Token i becomes number at[i] of slot i. Nothing here reads a number off the device, so it can be recorded."""
        self.decoding, self._bias, self._target = True, {}, {}
        self._at, self._visible = at, reach
        with attending(self):
            return self.model.hidden(tokens[:, None], position_ids=at[:, None])[:, 0]

    def move(self, source: Tensor, target: Tensor) -> None:
        self._reach = None
        if len(source) == 0:
            return
        width = int(self.lengths[source].max())
        for store in (self.keys, self.values):
            for cached in store.values():
                cached[target, :, :width] = cached[source, :, :width]
        self.lengths[target] = self.lengths[source]

    # ------------------------------------------------ what the attention modules call

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor,
        *, scaling: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        """Attention of query [n, Hq, q, Dh] over the slots, after key and value [n, H, q, Dh] are stored in them."""
        if layer not in self.keys:
            self.windows[layer] = window
            self.keys[layer] = key.new_zeros(self.slots, key.shape[1], self.width, key.shape[3])
            self.values[layer] = value.new_zeros(self.slots, value.shape[1], self.width, value.shape[3])
        n, heads, q, dim = key.shape
        keys, values = self.keys[layer], self.values[layer]
        if self.decoding:
            target = self._target_of(heads)
            keys.view(-1, dim).index_copy_(0, target, key.reshape(-1, dim))
            values.view(-1, value.shape[3]).index_copy_(0, target, value.reshape(-1, value.shape[3]))
            key, value = keys[:n, :, : self._visible], values[:n, :, : self._visible]
            bias = self._bias_of(window, heads, query.dtype)
        else:
            keys[self.first : self.first + n, :, :q] = key
            values[self.first : self.first + n, :, :q] = value
            if softcap is None and (window is None or window >= q):
                # Never holds the [P, P] scores, which take most of the time and memory of a long prompt.
                attended = scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] > heads
                )
                return attended.transpose(1, 2)
            bias = _causal_bias(torch.arange(q, device=key.device), q, window, query.dtype)
        # Query heads that share a key head become rows of one product; slots and heads its batch.
        query = query.reshape(n * heads, -1, q, dim)
        shape = query.shape
        query, key, value = query.flatten(1, 2), key.flatten(0, 1), value.flatten(0, 1)
        if softcap is None and q == 1:
            scores = torch.baddbmm(bias[:, 0], query, key.mT, alpha=scaling).float()
        else:
            scores = torch.bmm(query, key.mT).float().mul_(scaling)
            if softcap is not None:
                scores = scores.div_(softcap).tanh_().mul_(softcap)
            scores.view(*shape[:3], -1).add_(bias)
        attended = torch.bmm(torch.softmax(scores, dim=-1).to(value.dtype), value)
        return attended.view(n, -1, q, value.shape[-1]).transpose(1, 2)

    def _target_of(self, heads: int) -> Tensor:
        """[n·H] where this step's keys go, counted in keys from the start of the store."""
        if heads not in self._target:
            row = torch.arange(len(self._at) * heads, device=self._at.device)
            self._target[heads] = row * self.width + self._at.repeat_interleave(heads)
        return self._target[heads]

    def _bias_of(self, window: int | None, heads: int, dtype: torch.dtype) -> Tensor:
        """[n·H, 1, 1, L] added to the scores of a decode step: see `_causal_bias`."""
        if (window, heads) not in self._bias:
            bias = _causal_bias(self._at, self._visible, window, dtype)
            self._bias[window, heads] = bias.repeat_interleave(heads, dim=0)[:, None, None]
        return self._bias[window, heads]


def _causal_bias(at: Tensor, width: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """[q, width] added to the scores: 0 where position at[q] may look, at itself and what is before it within the
    sliding window, and -∞ elsewhere."""
    column, at = torch.arange(width, device=at.device), at[:, None]
    visible = column <= at
    if window is not None:
        visible &= column > at - window
    return torch.zeros(visible.shape, dtype=dtype, device=at.device).masked_fill_(~visible, float("-inf"))


# ---------------------------------------------------------------- the hook into transformers


class _Active(threading.local):
    """The cache that attention writes to, of each thread: transformers calls us without a way to pass it along."""

    cache: SlotCache | None = None


_active = _Active()


@contextmanager
def attending(cache: SlotCache) -> Iterator[None]:
    """Inside, this thread's calls of the model's attention go through `cache`.

    Which attention a model uses stands in its config, and so holds for every thread: see `LanguageModel.evaluating`.
    """
    config, outer = cache.model.config, _active.cache
    before = config._attn_implementation
    config._attn_implementation, _active.cache = _NAME, cache
    try:
        yield
    finally:
        config._attn_implementation, _active.cache = before, outer


def _slot_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if s_aux is not None:
        raise NotImplementedError("attention sinks")  # found by the sampler's probe, which then recomputes instead
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    assert _active.cache is not None
    attended = _active.cache.attend(
        module.layer_idx, query, key, value, scaling=scaling, window=sliding_window, softcap=softcap
    )
    return attended, None


AttentionInterface.register(_NAME, _slot_attention)
