"""The heads of implicit Q-learning on a language model's trunk, and what they do where answers are sampled.

No [N, V] of Q is ever held for a large vocabulary. A loss needs Q of the one token that the data holds, which is a row
of the last layer's weight times the features; CQL's softmax walks over the tokens in chunks, as the language model's
own does; and a sampler that keeps the top k of the language model asks for Q of those alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, relu

from tether.errors import ModelError
from tether.math import ilql_logits, token_logprobs

FOLDER = "ilql"  # of a final directory, beside the language model's files
_HEADS, _SETTINGS = "heads.safetensors", "ilql.json"
_TARGETS = ("target_q1", "target_q2")
_LAYERS = ("first.weight", "first.bias", "last.weight", "last.bias")


class HeadOutput(NamedTuple):
    """Of N tokens of the data, each read off the hidden state before it."""

    values: Tensor  # [N] reward units: V before the token
    q1: Tensor  # [N] reward units: Q of the token
    q2: Tensor  # [N]
    target_q: Tensor  # [N] min of the two targets' Q, without gradient
    q1_logprobs: Tensor  # [N] log softmax of Q1 over the vocabulary, at the token
    q2_logprobs: Tensor  # [N]


class TwoLayers(nn.Module):
    """Linear(D, 2D) - ReLU - Linear, the last layer 0 at first."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, 2 * width), nn.Linear(2 * width, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def features(self, hidden: Tensor) -> Tensor:
        """[N, 2D] what the last layer sees."""
        features: Tensor = relu(self.first(hidden))
        return features

    def of_tokens(self, features: Tensor, tokens: Tensor) -> Tensor:
        """[N] the output of one token each: [N, V] is not needed for that."""
        chosen: Tensor = torch.linalg.vecdot(features, self.last.weight[tokens]) + self.last.bias[tokens]
        return chosen


class ILQLHeads(nn.Module):
    """V, Q1 and Q2, each Linear(D, 2D) - ReLU - Linear, and the slowly following targets of the two Q.

    Last layers begin at 0: no token is preferred at first. The two Q differ by their first layers.
    Everything is float32 but CQL's product over the vocabulary, which is in the caller's autocast.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.value = TwoLayers(width, 1)
        self.q1, self.q2 = TwoLayers(width, vocabulary), TwoLayers(width, vocabulary)
        self.target_q1, self.target_q2 = (TwoLayers(width, vocabulary).requires_grad_(False) for _ in range(2))
        self.sync(1.0)

    def forward(self, hidden: Tensor, tokens: Tensor, *, cql: bool = True) -> HeadOutput:
        """hidden [N, D] before each of tokens [N]. cql: False saves the products over the vocabulary; zeros then."""
        learned, targets = (self.q1, self.q2), (self.target_q1, self.target_q2)
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.float()
            values = self.value.last(self.value.features(h)).squeeze(-1)
            features = [head.features(h) for head in learned]
            q1, q2 = (head.of_tokens(x, tokens) for head, x in zip(learned, features, strict=True))
            with torch.no_grad():
                target_q = torch.minimum(*(head.of_tokens(head.features(h), tokens) for head in targets))
        logprobs = [torch.zeros_like(values) for _ in learned]
        if cql:
            logprobs = [
                token_logprobs(x, head.last.weight, tokens, bias=head.last.bias, entropy=False)[0]
                for head, x in zip(learned, features, strict=True)
            ]
        return HeadOutput(values, q1, q2, target_q, *logprobs)

    @torch.no_grad()
    def sync(self, polyak: float) -> None:
        """θ̄ ← α·θ + (1 - α)·θ̄ of both targets."""
        for target, learned in ((self.target_q1, self.q1), (self.target_q2, self.q2)):
            for slow, fast in zip(target.parameters(), learned.parameters(), strict=True):
                slow.lerp_(fast, polyak)

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Trained weights, by name, in a fixed order."""
        return [(f"ilql.{name}", p) for name, p in self.named_parameters() if p.requires_grad]

    def save(self, directory: Path, *, strength: float, top_k: int) -> None:
        """Write what sampling and V need: V and the targets; the two Q that they follow are in the checkpoints."""
        directory.mkdir()
        kept = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.state_dict().items()
            if name.partition(".")[0] in ("value", *_TARGETS)
        }
        save_file(kept, directory / _HEADS)
        (directory / _SETTINGS).write_text(json.dumps({"strength": strength, "top_k": top_k}) + "\n")


class Steering:
    """What implicit Q-learning samples from: see `tether.math.ilql_logits`.

    heads: tensors by name, as `ILQLHeads.save` writes them. strength 0: the language model alone, whatever top_k is.
    top_k 0: every token.
    """

    def __init__(self, heads: dict[str, Tensor], *, strength: float, top_k: int) -> None:
        self.strength, self.top_k = strength, top_k
        weight, bias, last_weight, last_bias = ([heads[f"{name}.{part}"] for name in _TARGETS] for part in _LAYERS)
        # Both Q side by side, so that each token's rows are fetched at once: a step is a matter of few operations.
        self._first = torch.cat(weight), torch.cat(bias)  # [4D, D], [4D]
        self._last = torch.cat(last_weight, 1), torch.stack(last_bias, 1)  # [V, 4D], [V, 2]

    def __call__(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """[N, V] logits, -inf where a token is never sampled, of the model's own logits and [N, D] hidden states."""
        if self.strength == 0:
            return logits
        everything = not 0 < self.top_k < logits.shape[-1]
        with torch.autocast(hidden.device.type, enabled=False):
            tokens = None if everything else logits.topk(self.top_k, dim=-1).indices
            return ilql_logits(logits, self._min_q(hidden.float(), tokens), tokens, strength=self.strength)

    def _min_q(self, hidden: Tensor, tokens: Tensor | None) -> Tensor:
        """[N, K] of tokens [N, K]; [N, V] of all."""
        features = relu(linear(hidden, *self._first))  # [N, 4D]
        weight, bias = self._last
        if tokens is None:
            q1, q2 = (linear(f, w, b) for f, w, b in zip(features.chunk(2, 1), weight.chunk(2, 1), bias.T, strict=True))
            return torch.minimum(q1, q2)
        rows = embedding(tokens, weight).unflatten(-1, (2, -1))  # [N, K, 2, 2D]
        both: Tensor = torch.linalg.vecdot(rows, features.view(len(features), 1, 2, -1)) + embedding(tokens, bias)
        return both.amin(-1)


def has_heads(model: str | Path) -> bool:
    """Whether directory `model` has heads beside it, whole or damaged."""
    return (Path(model) / FOLDER).is_dir()


def heads_left_out(model: Any) -> list[str]:
    """The note of a run that reads `model`, which may be None or a description of random weights instead of a path."""
    if not isinstance(model, str) or not has_heads(model):
        return []
    return [
        f"{model} has Q-learning heads ({FOLDER}/), which this run leaves out: it takes the language model alone, "
        "which imitates the data that it was trained on"
    ]


def load_steering(
    model: str, *, width: int, vocabulary: int, device: torch.device, strength: float | None = None
) -> Steering | None:
    """The heads beside the language model in directory `model`; None where it has none. (Of a hub id: none.)

    width, vocabulary: of the language model. strength: another than it was saved with.
    """
    if not has_heads(model):
        return None
    folder = Path(model) / FOLDER
    try:
        settings: dict[str, Any] = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        own, top_k = float(settings["strength"]), int(settings["top_k"])
        if not (math.isfinite(own) and own >= 0 and top_k >= 0):
            raise ValueError(f"strength {own:g} and top_k {top_k}, which are 0 or more")
        heads = {name: tensor.to(device) for name, tensor in load_file(folder / _HEADS).items()}
        shapes = [[list(heads[f"{name}.{layer}"].shape) for layer in _LAYERS] for name in _TARGETS]
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder} cannot be read ({type(error).__name__}: {error}): the model would be sampled from without what "
            "Q-learning learned. Copy the whole directory again; or remove this one, to sample from the language model "
            "alone."
        ) from error
    wanted = [[2 * width, width], [2 * width], [vocabulary, 2 * width], [vocabulary]]
    if wrong := [shape for shape in shapes if shape != wanted]:
        raise ModelError(
            f"{folder} has heads of shapes {wrong[0]}, where the language model beside it needs {wanted}: they belong "
            "to another model. Keep the two together as they were written."
        )
    return Steering(heads, strength=own if strength is None else strength, top_k=top_k)
