"""A random model that vLLM serves, prompts for it, and what the trainer makes of its answers."""

import torch

from tether.models.language_model import LanguageModel
from tether.types import Completions, Prompt, Sampling
from tiny import random_ids, transformer

VOCABULARY = 300
LONGEST = 160  # more than a block of cached keys, which is 128 on a CPU
SAMPLING = Sampling(max_new_tokens=12, stop_token_ids=tuple(range(40)), responses_per_prompt=3, seed=5)


def model_of(*, tied: bool, seed: int = 0, **changes) -> LanguageModel:
    """A random Llama that vLLM serves: its heads have 32 dimensions."""
    lm = transformer(
        "llama", seed=seed, vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=256, tie_word_embeddings=tied, **changes,
    )  # fmt: skip
    return LanguageModel(lm, torch.float32)


def perturb(model: LanguageModel, seed: int) -> None:
    """Other weights, by far more than the probe overlooks and by little enough to stay a language model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.lm.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)


def prompts() -> list[Prompt]:
    """Some share their beginning, and one is longer than a block of the cache."""
    ids = random_ids([3, 17, 140, 1, 60], vocabulary=VOCABULARY)
    ids.append([*ids[2][:130], 7])
    return [Prompt(tuple(row), "…", n) for n, row in enumerate(ids)]


def trained(model: LanguageModel, found: Completions, temperature: float = 1.0) -> list[float]:
    """The trainer's log-probs of all tokens, from whole forward passes."""
    values = []
    for prompt, ids in zip(found.prompts, found.response_ids, strict=True):
        with torch.no_grad():
            logits = model.lm(torch.tensor([[*prompt.ids, *ids]]), use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits / temperature, -1)
        values += [float(logprobs[len(prompt.ids) - 1 + t, i]) for t, i in enumerate(ids)]
    return values


def gap(model: LanguageModel, found: Completions, temperature: float = 1.0) -> float:
    said = [x for row in found.sampler_logprobs for x in row]
    return max(abs(a - b) for a, b in zip(said, trained(model, found, temperature), strict=True))
