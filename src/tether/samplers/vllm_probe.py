"""Whether vLLM has the trainer's weights: fixed tokens, whose log-probs both sides give after every load.

One text is scored, which runs every layer and the head afresh. Another, longer than a block of cached keys, is
continued, as prompts are: it finds cached keys of earlier weights, and log-probs that are not at the temperature.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tether.math import token_logprobs
from tether.models.language_model import LanguageModel
from tether.types import Rows

_SCORED = 64  # tokens of the text that is scored
_DRAWN = 4  # tokens that continue the other


@dataclass(frozen=True, slots=True)
class Probe:
    """Tokens from all over the vocabulary."""

    text: list[int]  # scored
    prompt: list[int]  # continued

    @classmethod
    def of(cls, vocabulary: int, *, longest: int, block: int) -> Probe:
        """longest: tokens of a sequence in the engine. block: of what its cache shares between prompts."""
        text, prompt = min(_SCORED, longest - 1), max(1, min(block + 8, longest - _DRAWN))
        return cls([(7919 * i + 1) % vocabulary for i in range(text)],
                   [(104729 * i + 2) % vocabulary for i in range(prompt)])  # fmt: skip

    def rows(self, temperature: float) -> list[dict[str, Any]]:
        """What the engine is asked."""
        return [
            {"prompt": self.text, "prompt_logprobs": 0, "max_tokens": 1, "seed": 0, "ignore_eos": True},
            {"prompt": self.prompt, "max_tokens": _DRAWN, "temperature": temperature, "seed": 0, "ignore_eos": True},
        ]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one side makes of the probe."""

    drawn: list[int]  # how the prompt goes on
    scored: Tensor  # [N] nats, at temperature 1
    continued: Tensor  # [N] nats, at the sampling temperature

    def gaps(self, other: Answers) -> tuple[float, float]:
        """Largest differences in nats: of the text, of what continues the prompt."""
        return _gap(self.scored, other.scored), _gap(self.continued, other.continued)


def read(answer: dict[str, Any]) -> Answers:
    """What the engine answered to `Probe.rows`."""
    return Answers(answer["ids"][1], torch.tensor(answer["prompt_logprobs"][0]), torch.tensor(answer["logprobs"][1]))


def score(model: LanguageModel, probe: Probe, drawn: list[int], temperature: float) -> Answers:
    """What the trainer's model gives the same tokens."""
    scored, _ = _score(model, probe.text[:1], probe.text[1:], 1.0)
    return Answers(drawn, scored, _score(model, probe.prompt, drawn, temperature)[0])


@torch.no_grad()
def _score(model: LanguageModel, prompt: list[int], response: list[int], temperature: float) -> tuple[Tensor, Tensor]:
    """([N] log-probs in nats of a response, [N, D] hidden states before its tokens)."""
    rows = Rows.of([prompt], [response]).to(model.device)
    with model.evaluating():
        logprobs, _, hidden = model.response_logprobs(rows, temperature=temperature, entropy=False)
    return logprobs.float().cpu(), hidden


def differing(
    model: LanguageModel, probe: Probe, engine: Answers, before: Answers | None, old: Path, was: int, bound: float
) -> str:
    """What is wrong with an engine whose answers are not the model's.

    before: the trainer's answers under the weights before, of version `was`, whose files are in `old`."""
    scored, hidden = _score(model, probe.text[:1], probe.text[1:], 1.0)
    if _gap(engine.scored, scored) <= bound:
        return (
            "A text that is read afresh scores right, so it reads cached keys of other weights where a prompt is "
            "continued, or its log-probs are not at sampling.temperature."
        )
    if before is None:
        return "These are the first weights that it was given: it computes another model."
    if _gap(engine.scored, before.scored) <= bound:
        return f"It still has the weights of version {was}."
    head = _head_in(old)
    if head is not None and not model.use_full_logits:
        with torch.no_grad(), model.autocast():
            kind = model.head() | {"weight": head.to(hidden)}
            stale, _ = token_logprobs(
                hidden, targets=torch.tensor(probe.text[1:]).to(hidden.device), entropy=False, **kind
            )
        if _gap(engine.scored, stale.float().cpu()) <= bound:
            return f"Its head is still that of version {was}; its layers are new."
    return "They are not those of the version before either: a part of them was not loaded."


def _head_in(directory: Path) -> Tensor | None:
    """The output head of a written model, where it is called as usual."""
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            if "lm_head.weight" in tensors.keys():  # noqa: SIM118  a safetensors file is not a dict
                head: Tensor = tensors.get_tensor("lm_head.weight")
                return head
    return None


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest |a - b|; infinite where one is not a number."""
    return float((a - b).abs().nan_to_num(nan=float("inf")).max()) if a.shape == b.shape else float("inf")
