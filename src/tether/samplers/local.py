"""The local engine: prompts in, sampled responses out, in this process and with the policy's own weights.

Continuous batching: up to `slots` rows decode together; a row that stops leaves at once and a waiting prompt takes its
slot. Three verbs a step: prefill, draw, step. Nothing in a step is done row by row in Python.

Left out: paging (a slot is as wide as the longest prompt plus the length limit), sharing common prefixes, speculation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tether.distributed.shard import whole
from tether.models.language_model import LanguageModel, freeze
from tether.models.loading import head_size
from tether.samplers.draw import draw
from tether.samplers.slots import SlotCache
from tether.samplers.uniforms import uniforms
from tether.types import Completions, Prompt, Rows, Sampling

PREFILL_TOKENS = 8192  # padded prompt tokens encoded at once: bounds the memory of their attention scores
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}

# Of `slots: auto`. More rows a step make each of them cheaper: the small operations of a step cost the same for all,
# and matmuls come nearer their peak. They pay in memory.
_FEWEST_SLOTS, _MOST_SLOTS = 64, 256
_SLOT_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}  # of cache and workspace, beyond the fewest
_DRAW_BYTES = 28  # a token of the vocabulary: logits, log-probs and probabilities in fp32, their sums in fp64


class Decoder(Protocol):
    """Turns tokens into hidden states, remembering each slot's past. The active slots are always 0 … n-1."""

    def prefill(self, tokens: Tensor, lengths: Tensor, first: int, copies: Tensor) -> Tensor:
        """Encode prompts [m, P] (padded right), prompt copies[j] into slot first+j; [k, D] at their last tokens.

        copies: [k] rows of `tokens`, in order, each at least once: a prompt that is answered n times is encoded once.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token [n] to each active slot; [n, D]."""

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy slots `source` [k] over slots `target` [k]: finished rows leave no hole among the active ones."""


class LocalSampler:
    """Samples from a language model that lives in this process."""

    def __init__(
        self, model: LanguageModel, *, slots: int | str = "auto", copied: bool = False, beside: bool = False
    ) -> None:
        """copied: sample from a copy, as of a model whose weights will be cut into parts (tether.distributed.shard).
        beside: in a thread, while another trains: from a copy too, and no step is recorded, for a recording takes in
        what the other does."""
        self.slots = slots  # rows decoded at once, see `count_slots`
        self._copied = copied or beside or (model.dtype == torch.bfloat16 and model.hf_model.dtype == torch.float32)
        self.model = model
        if self._copied:
            self.model = replace(model, lm=freeze(copy.deepcopy(model.lm), model.dtype))
        self.note = why_not_cached(model)  # the fallback, for the log
        self.cached = self.note is None
        self.recorded = self.cached and model.device.type == "cuda" and not beside
        if self.recorded:
            self.note = _why_not_recorded(self.model)
            self.recorded = self.note is None

    def load_weights(self, weights: LanguageModel, version: int = 0) -> None:
        """Sample from `weights` as they are now: from their very storage, or from the copy in the compute precision."""
        if not self._copied:
            self.model = weights
            return
        with torch.no_grad():
            for ours, theirs in zip(self.model.lm.parameters(), weights.lm.parameters(), strict=True):
                ours.copy_(whole(theirs))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, cycle: int, first: int = 0) -> Completions:
        """Draw `responses_per_prompt` responses to each prompt, in the prompts' order; see `tether.types.Sampler`."""
        for batch in self.steps(prompts, sampling, cycle=cycle, first=first):  # noqa: B007
            pass
        return batch.completions()

    @torch.no_grad()
    def steps(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, cycle: int, first: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Batch]:  # fmt: skip
        """The batch of `generate` after every draw, with the hidden states that were drawn from.

        numbers: those of the responses, where they do not count up from `first`.

        For one thread: torch's modes are set until it is exhausted or closed.
        """
        requests = [p for p in prompts for _ in range(sampling.responses_per_prompt)]
        width = max(len(p.ids) for p in requests) + sampling.max_new_tokens
        m, wish = self.model, self.slots if self.cached or self.slots != "auto" else _FEWEST_SLOTS
        slots = count_slots(wish, len(requests), m.config, width, m.dtype, m.device.type)
        decoder: Decoder
        if self.cached:
            decoder = SlotCache(self.model, slots=slots, width=width, recorded=self.recorded)
        else:
            decoder = Recompute(self.model, slots=slots, width=width)
        if numbers is None:
            numbers = range(first, first + len(requests))
        batch = Batch(self.model, decoder, requests, sampling, cycle, slots, numbers)
        with self.model.evaluating(), self.model.autocast():
            while not batch.done:
                batch.prefill()
                batch.draw()
                yield batch
                batch.step()


def count_slots(slots: int | str, responses: int, config: Any, width: int, dtype: torch.dtype, device: str) -> int:
    """Rows to decode at once: `slots`, or for "auto" what the model's text config and a slot's width in tokens allow.

    A function of config and kind of device alone, never of free memory: the same run gets the same every time.
    """
    if slots == "auto":
        room = _SLOT_BYTES.get(device, _SLOT_BYTES["cpu"]) // sum(slot_bytes(config, width, dtype))
        slots = min(max(room, _FEWEST_SLOTS), _MOST_SLOTS)
    return min(responses, int(slots))


def slot_bytes(config: Any, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(bytes of a slot's keys and values, bytes of its workspace when a token is drawn); config: the text config."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    cache = 2 * config.num_hidden_layers * kv_heads * head_size(config) * width * dtype.itemsize
    return cache, config.vocab_size * _DRAW_BYTES


@torch.no_grad()
def why_not_cached(model: LanguageModel) -> str | None:
    """Decode a few tokens through the cache and compare with a plain forward pass; None if they agree.

    What a few tokens cannot show is read off the config: kinds of layers, and windows of the mask that we do not know.
    """
    slow = "sampling recomputes every token, which is slow"
    if model.use_full_logits:
        return f"the head is not ours to apply to a single token: {slow}"
    unknown = sorted(set(getattr(model.config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if unknown:
        name = type(model.hf_model).__name__
        return f"{name} has layers of {', '.join(unknown)}, which our cache does not know: {slow}"
    tokens = torch.arange(8, device=model.device)[None] * 7919 % model.config.vocab_size
    with model.evaluating(), model.full_precision():
        want = model.hidden(tokens)[0, 4:]
        try:
            cache = SlotCache(model, slots=1, width=8)
            one = torch.zeros(1, dtype=torch.long, device=model.device)
            first = cache.prefill(tokens[:, :5], one + 5, 0, one)
            got = torch.cat([first, *[cache.step(tokens[:, t]) for t in range(5, 8)]])
            gap = ((got - want).abs().max() / want.abs().max()).item()
            why = f"off by {gap:.2g}"
            if wrong := [layer for layer, window in cache.windows.items() if window != _window(model.config, layer)]:
                gap, why = float("inf"), f"layer {wrong[0]} does not tell it its sliding window"
        except Exception as error:  # whatever another library's attention may raise
            gap, why = float("inf"), f"{type(error).__name__}: {error}"
    if gap <= 1e-4:
        return None
    return f"{type(model.hf_model).__name__} does not decode through our cache ({why}): {slow}"


@torch.no_grad()
def _why_not_recorded(model: LanguageModel) -> str | None:
    """Record a decode step, replay it, and compare with plain ones; None if they agree.

    A model that reads a number off the device in the middle of a step cannot be recorded.
    """
    zero = torch.zeros(1, dtype=torch.long, device=model.device)
    seen = []
    try:
        with model.evaluating(), model.autocast():
            for recorded in (False, True):
                cache = SlotCache(model, slots=1, width=4, recorded=recorded)
                cache.prefill(zero[:, None], zero + 1, 0, zero)
                # Cloned: a replay returns its recording's memory, and `.float()` of float32 is the same memory.
                seen.append(torch.cat([cache.step(zero + t).float().clone() for t in range(3)]))
        gap = ((seen[0] - seen[1]).abs().max() / seen[0].abs().max()).item()
        why = f"a replay is off by {gap:.2g}" if not gap <= 1e-2 else None
    except Exception as error:  # whatever another library's model may raise
        why = f"{type(error).__name__}: {error}"
    return why and f"decode steps are not recorded ({why}): sampling is slower"


def _window(config: Any, layer: int) -> int | None:
    """The sliding window of a layer's mask, as transformers reads it off the config."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[layer] == "sliding_attention"
    return getattr(config, "sliding_window", None) if slides else None


class Batch:
    """The state of one `generate`: which response sits in which slot, and what has been drawn.

    Slots 0 … len(row)-1 are active. `row` maps a slot to its response, `drawn` counts its tokens so far.
    """

    def __init__(
        self, model: LanguageModel, decoder: Decoder, requests: list[Prompt], sampling: Sampling, cycle: int,
        slots: int, numbers: Sequence[int],
    ) -> None:  # fmt: skip
        self.model, self.decoder, self.requests = model, decoder, requests
        self.head = None if model.use_full_logits else model.output_head()  # None: the decoder gives logits
        self.sampling, self.cycle, self.slots, self.numbers = sampling, cycle, slots, numbers
        device, limit = model.device, sampling.max_new_tokens
        self.waiting = 0  # the next request to prefill
        self.row = torch.empty(0, dtype=torch.long, device=device)
        self.drawn = torch.empty(0, dtype=torch.long, device=device)
        self.tokens = torch.empty(0, dtype=torch.long, device=device)  # each slot's newest token
        self.hidden = torch.empty(0, device=device)  # [active, D] after it
        precise = torch.float32 if device.type == "mps" else torch.float64
        self.uniforms = torch.zeros(slots, limit, dtype=precise, device=device)
        self.stops = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)
        self.ids = torch.zeros(len(requests), limit, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(requests), limit, device=device)
        self.truncated = torch.zeros(len(requests), limit, device=device)
        self.lengths = torch.zeros(len(requests), dtype=torch.long, device=device)
        self.stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)

    @property
    def done(self) -> bool:
        return self.waiting == len(self.requests) and len(self.row) == 0

    def prefill(self) -> None:
        """Let waiting responses into the free slots and encode their prompts."""
        s, device = self.sampling, self.model.device
        while self.waiting < len(self.requests) and len(self.row) < self.slots:
            first, (rows, prompts, copies) = len(self.row), self._next_rows()
            batch = Rows.of([p.ids for p in prompts], [()] * len(prompts)).to(device)
            which = torch.tensor(copies, device=device)
            hidden = self.decoder.prefill(batch.tokens, batch.prompt_lengths.to(device), first, which)
            counts = [self.numbers[i] for i in rows]
            chance = np.stack([uniforms(s.seed, s.stream, self.cycle, i, s.max_new_tokens) for i in counts])
            self.uniforms[first : first + len(rows)] = torch.from_numpy(chance).to(self.uniforms)
            self.row = torch.cat([self.row, torch.tensor(rows, device=device)])
            self.drawn = torch.cat([self.drawn, torch.zeros(len(rows), dtype=torch.long, device=device)])
            self.hidden = torch.cat([self.hidden, hidden]) if first else hidden
            self.waiting += len(rows)

    def _next_rows(self) -> tuple[list[int], list[Prompt], list[int]]:
        """(waiting responses for the free slots, their prompts, each once, and which of these each response answers).

        As many as are encoded at once.
        """
        rows: list[int] = []
        prompts: list[Prompt] = []
        copies: list[int] = []
        width = 0
        for i in range(self.waiting, min(len(self.requests), self.waiting + self.slots - len(self.row))):
            prompt = self.requests[i]
            if not prompts or prompt is not prompts[-1]:
                width = max(width, len(prompt.ids))
                if prompts and width * (len(prompts) + 1) > PREFILL_TOKENS:
                    break
                prompts.append(prompt)
            rows.append(i)
            copies.append(len(prompts) - 1)
        return rows, prompts, copies

    def draw(self) -> None:
        """Draw a token for every active slot and let the rows go that it finishes."""
        s = self.sampling
        logits = self.head.logits(self.hidden) if self.head else self.hidden
        if self.model.steer is not None:
            logits = self.model.steer(logits, self.hidden)
        chance = self.uniforms[: len(self.row)].gather(1, self.drawn[:, None]).squeeze(1)
        new = draw(logits, chance, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
        self.ids[self.row, self.drawn] = new.tokens
        self.logprobs[self.row, self.drawn] = new.logprobs
        self.truncated[self.row, self.drawn] = new.truncated_mass
        self.drawn += 1
        self.tokens = new.tokens
        stopped = torch.isin(new.tokens, self.stops)
        finished = stopped | (self.drawn == s.max_new_tokens)
        if finished.any():
            self.lengths[self.row] = self.drawn
            self.stopped[self.row] = stopped
            self._release(finished)

    def _release(self, finished: Tensor) -> None:
        """Free the finished slots; active ones from the end move into the holes."""
        keep = int((~finished).sum())
        target = finished[:keep].nonzero().squeeze(1)
        source = keep + (~finished[keep:]).nonzero().squeeze(1)
        self.decoder.move(source, target)
        for state in (self.row, self.drawn, self.tokens, self.uniforms):
            state[target] = state[source]
        self.row, self.drawn, self.tokens = self.row[:keep], self.drawn[:keep], self.tokens[:keep]

    def step(self) -> None:
        """Run the model on the tokens just drawn."""
        if len(self.row):
            self.hidden = self.decoder.step(self.tokens)

    def completions(self) -> Completions:
        lengths = self.lengths.tolist()

        def ragged(values: Tensor) -> list[list[Any]]:
            return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]

        return Completions(
            prompts=self.requests,
            response_ids=ragged(self.ids),
            sampler_logprobs=ragged(self.logprobs),
            truncated_mass=ragged(self.truncated),
            finish_reasons=["stop" if stopped else "length" for stopped in self.stopped.tolist()],
        )


class Recompute:
    """A decoder without a cache: every step runs the whole sequences again. For any architecture at all.

    Where the head is not ours to apply it returns logits [n, V] in place of hidden states.
    """

    def __init__(self, model: LanguageModel, *, slots: int, width: int) -> None:
        self.model = model
        self.tokens = torch.zeros(slots, width, dtype=torch.long, device=model.device)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=model.device)

    def prefill(self, tokens: Tensor, lengths: Tensor, first: int, copies: Tensor) -> Tensor:
        end = first + len(copies)
        self.tokens[first:end, : tokens.shape[1]] = tokens[copies]
        self.lengths[first:end] = lengths[copies]
        return self._last(first, end)

    def step(self, tokens: Tensor) -> Tensor:
        n = len(tokens)
        self.tokens[torch.arange(n, device=tokens.device), self.lengths[:n]] = tokens
        self.lengths[:n] += 1
        return self._last(0, n)

    def move(self, source: Tensor, target: Tensor) -> None:
        self.tokens[target], self.lengths[target] = self.tokens[source], self.lengths[source]

    def _last(self, first: int, end: int) -> Tensor:
        lengths = self.lengths[first:end]
        tokens = self.tokens[first:end, : int(lengths.max())]
        at = torch.arange(end - first, device=tokens.device), lengths - 1
        if self.model.use_full_logits:
            logits: Tensor = self.model.hf_model(input_ids=tokens, use_cache=False).logits[at]
            return logits.float()
        return self.model.hidden(tokens)[at]
