"""The values that travel between the rooms: prompts, completions, rows of tokens, and a cycle's rollout.

Ids travel as Python lists, ragged, because responses are ragged; tensors are built where arithmetic begins. Rows are
padded on the right, prompt and response in one piece: under causal attention no token sees what comes after it, so
padding needs no attention mask, cannot change a number, and costs nothing but its own arithmetic.

Shape letters: `B` rows, `P` prompt positions, `R` response positions, `T` longest prompt + response, `V` vocabulary,
`N` tokens, `K` chosen rows. Annotations with shapes are checked while the tests run and cost nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tether.errors import BatchError

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Int64

Text = str | list[dict[str, Any]]  # plain text, or chat messages: [{"role": …, "content": …}, …]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, tokenized once: everything downstream uses these ids."""

    ids: tuple[int, ...]  # never empty
    source: Text  # as the user wrote it
    row: int  # its row in the data set, from 0
    columns: dict[str, Any] = field(default_factory=dict)  # the row's other columns, for reward functions
    cut: bool = False  # `ids` lack the beginning of `source`, which was too long


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw responses: the config's keys, resolved against model and tokenizer."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    responses_per_prompt: int = 1
    seed: int = 0
    stream: int = 0  # counted uniforms of their own: TRAIN, EVALUATE, GENERATE or REVISE


TRAIN, EVALUATE, GENERATE, REVISE = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class Completions:
    """B sampled responses. Row i answers prompts[i]; the n responses to one prompt stand together."""

    prompts: list[Prompt]  # B; a prompt answered n times appears n times
    response_ids: list[list[int]]  # B, ragged, at least one token each; the stop token included, no pads
    sampler_logprobs: list[list[float]]  # B, ragged, nats: before top-k and top-p, at the sampling temperature
    truncated_mass: list[list[float]]  # B, ragged: probability that top-k and top-p cut off at each token
    finish_reasons: list[str]  # B; "stop" if the last token is a stop token, else "length"

    def __post_init__(self) -> None:
        want = len(self.prompts)
        for name in ("response_ids", "sampler_logprobs", "truncated_mass", "finish_reasons"):
            if len(getattr(self, name)) != want:
                raise BatchError(f"{name} has {len(getattr(self, name))} rows, but prompts has {want}")

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.response_ids]

    def select(self, index: Sequence[int]) -> Completions:
        """These rows, in this order."""
        columns = (self.prompts, self.response_ids, self.sampler_logprobs, self.truncated_mass, self.finish_reasons)
        return Completions(*([column[i] for i in index] for column in columns))  # type: ignore[arg-type]

    def rows(self) -> Rows:
        return Rows.of([p.ids for p in self.prompts], self.response_ids)


@dataclass(frozen=True, slots=True)
class Rows:
    """B sequences, each a prompt and its response, padded right with 0 (any id would do: nothing sees it).

    The lengths stay on the CPU, wherever the tokens are: to read one off a GPU is to wait for all that it has to do.
    """

    tokens: Int64[Tensor, "B T"]
    prompt_lengths: Int64[Tensor, " B"]  # at least 1; on the CPU
    response_lengths: Int64[Tensor, " B"]  # on the CPU

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2:
            raise BatchError(f"tokens is {list(self.tokens.shape)}, want [B, T]")
        for name in ("prompt_lengths", "response_lengths"):
            if list(getattr(self, name).shape) != [self.tokens.shape[0]]:
                raise BatchError(f"{name} is {list(getattr(self, name).shape)}, want [B] = [{self.tokens.shape[0]}]")
        if int((self.prompt_lengths + self.response_lengths).max()) > self.tokens.shape[1]:
            raise BatchError("a prompt and its response are longer than tokens is wide")

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Rows:
        """Pad ragged ids into rows."""
        whole = [torch.tensor([*p, *r], dtype=torch.long) for p, r in zip(prompts, responses, strict=True)]
        tokens = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)
        return cls(tokens, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in responses]))

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def response_mask(self) -> Bool[Tensor, "B R"]:
        """True for every response token, the stop token included; from lengths, never from ids."""
        return self._mask().to(self.tokens.device)

    @property
    def targets(self) -> Int64[Tensor, " N"]:
        """The response tokens, row after row; N = the mask's sum."""
        return self.tokens[self._response_positions()]

    @property
    def before_targets(self) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        """Row and column of the position *before* each response token: whose hidden state predicts it."""
        row, column = self._response_positions()
        return row, column - 1

    def _mask(self) -> Bool[Tensor, "B R"]:
        return torch.arange(int(self.response_lengths.max())) < self.response_lengths[:, None]

    def _response_positions(self) -> tuple[Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        row, t = self._mask().nonzero(as_tuple=True)
        device = self.tokens.device
        return row.to(device), (self.prompt_lengths[row] + t).to(device)

    def select(self, index: Int64[Tensor, " K"]) -> Rows:
        """Rows `index`, on the CPU, cut to their own longest."""
        prompt_lengths, response_lengths = self.prompt_lengths[index], self.response_lengths[index]
        width = int((prompt_lengths + response_lengths).max())
        return Rows(self.tokens[index, :width], prompt_lengths, response_lengths)

    def to(self, device: torch.device) -> Rows:
        return Rows(self.tokens.to(device), self.prompt_lengths, self.response_lengths)


_PER_TOKEN = ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")


@dataclass(frozen=True, slots=True)
class Rollout:
    """B scored responses, ready for phase 2. Positions outside the mask hold 0."""

    rows: Rows
    old_logprobs: Float[Tensor, "B R"]  # nats: the policy as it was when the cycle began
    ref_logprobs: Float[Tensor, "B R"]  # nats: the frozen reference
    values: Float[Tensor, "B R"] | None  # reward units: V(prompt + response[:t]), before token t; None: no critic
    rewards: Float[Tensor, "B R"]  # reward units: -β·KL everywhere, + score on the last token
    advantages: Float[Tensor, "B R"]  # reward units, whitened if the config says so
    returns: Float[Tensor, "B R"] | None  # reward units: advantage before whitening + value; None: no critic

    def __post_init__(self) -> None:
        want = list(self.rows.response_mask.shape)
        for name in _PER_TOKEN:
            tensor = getattr(self, name)
            if tensor is not None and list(tensor.shape) != want:
                raise BatchError(f"{name} is {list(tensor.shape)}, but the response mask is [B, R] = {want}")
        if (self.values is None) != (self.returns is None):
            raise BatchError("values and returns belong together: a critic has both, a rollout without one neither")

    def select(self, index: Int64[Tensor, " K"]) -> Rollout:
        """Rows `index`, cut to their own longest response."""
        rows = self.rows.select(index)
        width = int(rows.response_lengths.max())
        tensors = {name: getattr(self, name) for name in _PER_TOKEN}
        cut: dict[str, Any] = {name: None if t is None else t[index, :width] for name, t in tensors.items()}
        return Rollout(rows, **cut)


def microbatches(lengths: Int[Tensor, " B"] | Sequence[int], max_tokens: int) -> list[Int64[Tensor, " _"]]:
    """Split rows into groups of similar length, none above `max_tokens` padded tokens unless it is a single row.

    lengths: tokens of each row. Returns index tensors that partition 0 … B-1. Longest first: if memory does not
    suffice, one learns it at once.
    """
    lengths = torch.as_tensor(lengths)
    order = torch.argsort(lengths, descending=True, stable=True)
    groups, start = [], 0
    while start < len(order):
        width = max(1, int(lengths[order[start]]))
        count = max(1, max_tokens // width)
        groups.append(order[start : start + count])
        start += count
    return groups


def similar(lengths: Int[Tensor, " B"]) -> list[Int64[Tensor, " _"]]:
    """Split rows into groups of similar length: within an eighth of the longest, or few enough that it does not matter.

    lengths: tokens of each row. Returns index tensors that partition 0 … B-1, longest first.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    groups, start = [], 0
    for i in range(1, len(order)):
        width = int(lengths[order[start]])
        if (i - start) * width >= _GROUP_TOKENS and int(lengths[order[i]]) < width * 7 / 8:
            groups.append(order[start:i])
            start = i
    return [*groups, order[start:]]


_GROUP_TOKENS = 1024  # of a group, at least: below it a pass costs more than the padding that it saves


# ---------------------------------------------------------------- extension points: these three, and no others


class Sampler(Protocol):
    """Draws responses. The local engine is one; another process could be."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, cycle: int, first: int = 0) -> Completions:
        """`responses_per_prompt` responses to each prompt, in the prompts' order.

        cycle: draws of another cycle are others; evaluation is cycle 0. first: the number of the first response, where
        the prompts are a part of the cycle's: response i here is response first + i of the cycle.
        """

    def load_weights(self, weights: Any, version: int) -> None:
        """Sample from `weights` as they are now; called before the first `generate`, and after every cycle.

        With `ppo.ahead: 1` the policy learns while `generate` runs in a thread: sample from a copy of them then.

        weights: the policy, a `tether.models.language_model.LanguageModel`; its `lm` is the transformers (or peft)
            model.
        version: cycles that they have learned from.
        """


class Reward(Protocol):
    """Scores responses: one number a response, None where it does not answer."""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise RewardError if responses to these prompts cannot be scored; called before anything is sampled."""

    def score(self, completions: Completions) -> Sequence[float | None]:
        """B scores, in order."""


class LogSink(Protocol):
    """Takes a cycle's metrics somewhere."""

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Called once a cycle (for sft and reward: once an optimizer step), with what metrics.jsonl gets."""
