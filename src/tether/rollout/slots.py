"""A key-value cache of slots, written in place, behind transformers' own attention modules.

transformers lets a program register an attention function by name. Ours writes each new key and value into its row's
slot and attends over the slot, so that nothing is ever concatenated, and rows of different lengths decode side by side.
The model code stays as it is: projections, rotary positions, norms and MLPs are the architecture's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from tether.model import LanguageModel

_NAME = "tether_slots"


class SlotCache:
    """Keys and values of up to `slots` sequences of up to `width` tokens. The active ones are always slots 0 … n-1."""

    def __init__(self, model: LanguageModel, *, slots: int, width: int) -> None:
        self.model, self.slots, self.width = model, slots, width
        self.keys: dict[int, Tensor] = {}  # layer -> [slots, heads, width, head_dim], made at the first write
        self.values: dict[int, Tensor] = {}
        self.windows: dict[int, int | None] = {}  # layer -> the sliding window that it told us
        self.lengths = torch.zeros(slots, dtype=torch.long, device=model.device)  # tokens each slot holds
        self.first = 0  # prefill: the first slot that is written
        self.decoding = False
        self._visible: dict[int | None, Tensor] = {}  # sliding window -> [n, 1, 1, L] mask of this decode step

    # ------------------------------------------------ what the engine calls

    def admit(self, tokens: Tensor, lengths: Tensor, first: int) -> Tensor:
        """Encode prompts [m, P] (padded right) into slots first … first+m-1; the last hidden states [m, D]."""
        self.first, self.decoding = first, False
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        with attending(self):
            hidden = self.model.hidden(tokens, position_ids=positions.expand_as(tokens))
        self.lengths[first : first + len(tokens)] = lengths
        return hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1]

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token [n] to each of the active slots 0 … n-1; their hidden states [n, D]."""
        self.decoding, self._visible = True, {}
        n = len(tokens)
        self._rows, self._at = torch.arange(n, device=tokens.device), self.lengths[:n].clone()
        self._longest = int(self._at.max()) + 1
        with attending(self):
            hidden = self.model.hidden(tokens[:, None], position_ids=self._at[:, None])
        self.lengths[:n] += 1
        return hidden[:, 0]

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` [k] over slots `target` [k]: finished rows leave no hole among the active ones."""
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
        keys, values = self.keys[layer], self.values[layer]
        if self.decoding:
            keys[self._rows, :, self._at] = key[:, :, 0]
            values[self._rows, :, self._at] = value[:, :, 0]
            n = len(query)
            key, value = keys[:n, :, : self._longest], values[:n, :, : self._longest]
            visible = self._visible_at(window)
        else:
            m, width = len(key), key.shape[2]
            keys[self.first : self.first + m, :, :width] = key
            values[self.first : self.first + m, :, :width] = value
            visible = _causal(width, window, key.device)
        groups = query.shape[1] // key.shape[1]  # query heads that share a key head
        n, _, q, dim = query.shape
        query = query.reshape(n, key.shape[1], groups * q, dim)
        scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(n, key.shape[1], groups, q, -1).masked_fill_(~visible[:, None], float("-inf"))
        weights = torch.softmax(scores, dim=-1).to(value.dtype).view(n, key.shape[1], groups * q, -1)
        return torch.matmul(weights, value).view(n, -1, q, value.shape[-1]).transpose(1, 2)

    def _visible_at(self, window: int | None) -> Tensor:
        """[n, 1, 1, L] True where a decoding row may look: its own tokens, within the layer's sliding window."""
        if window not in self._visible:
            column = torch.arange(self._longest, device=self._at.device)
            visible = column <= self._at[:, None]
            if window is not None:
                visible &= column > self._at[:, None] - window
            self._visible[window] = visible[:, None, None]
        return self._visible[window]


def _causal(width: int, window: int | None, device: torch.device) -> Tensor:
    """[1, 1, P, P] True where prompt position q may look at position k."""
    q, k = torch.arange(width, device=device)[:, None], torch.arange(width, device=device)[None]
    visible = k <= q
    if window is not None:
        visible &= k > q - window
    return visible[None, None]


# ---------------------------------------------------------------- the hook into transformers

_active: list[SlotCache] = []  # the cache that attention writes to: a stack, for a sampler inside a sampler


@contextmanager
def attending(cache: SlotCache) -> Iterator[None]:
    """Inside, the model's attention goes through `cache`."""
    config = cache.model.config
    before = config._attn_implementation
    config._attn_implementation = _NAME
    _active.append(cache)
    try:
        yield
    finally:
        _active.pop()
        config._attn_implementation = before


def _slot_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if s_aux is not None:
        raise NotImplementedError("attention sinks")  # found by the sampler's probe, which then recomputes instead
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    cache, layer = _active[-1], module.layer_idx
    attended = cache.attend(layer, query, key, value, scaling=scaling, window=sliding_window, softcap=softcap)
    return attended, None


AttentionInterface.register(_NAME, _slot_attention)
