"""Tiny random language models, and rows of tokens to run them on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ARCHITECTURES
from tether.data.scored import ScoredResponse
from tether.models.language_model import LanguageModel
from tether.models.loading import without_dropout
from tether.models.policy import Policy
from tether.types import Prompt, Rows

VOCABULARY = 40


def transformer(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model; its logits are spread, so that no two tokens are alike."""
    settings = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = AutoConfig.for_model(architecture, **settings | ARCHITECTURES[architecture] | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():  # norms, biases and embeddings too: zeros and ones would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return without_dropout(model)


def language_model(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> LanguageModel:
    return LanguageModel(transformer(architecture, seed=seed, **changes), torch.float32)


def policy_of(model: LanguageModel) -> Policy:
    """A policy whose value head says something."""
    policy = Policy(model)
    assert policy.value_head is not None
    randomize(policy.value_head)
    return policy.train()


def randomize(module: nn.Module, *, seed: int = 0, std: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def random_ids(lengths: Sequence[int], *, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]


def ragged_rows(prompts: Sequence[int] = (5, 1, 12), responses: Sequence[int] = (6, 14, 3), *, seed: int = 0) -> Rows:
    """Rows of random tokens; pad and stop ids among them, as ordinary tokens."""
    return Rows.of(random_ids(prompts, seed=seed), random_ids(responses, seed=seed + 1))


def ragged(values: Tensor, rows: Rows) -> list[Tensor]:
    """[B, R] -> for each row, what is inside its mask."""
    return [row[:length] for row, length in zip(values, rows.response_lengths.tolist(), strict=True)]


def prompts_of(lengths: Sequence[int], *, seed: int = 0) -> list[Prompt]:
    return [Prompt(tuple(ids), "…", row) for row, ids in enumerate(random_ids(lengths, seed=seed))]


def scored_answers() -> list[ScoredResponse]:
    """Four answers to three prompts, ragged; the last answers the first's prompt."""
    prompts, responses = random_ids([5, 1, 12, 5]), random_ids([6, 14, 3, 1], seed=1)
    prompts[3], numbers = prompts[0], [0, 1, 2, 0]
    return [
        ScoredResponse(Prompt(tuple(p), "…", n), r, "length", float(s))
        for p, r, n, s in zip(prompts, responses, numbers, [1.0, -2.0, 0.5, 3.0], strict=True)
    ]
