"""What fits on which GPU: predicted peak memory of PPO for four sizes of model, trained whole or by LoRA.

    python bench/what_fits.py     the table of docs/what-fits.md, in Markdown: about three minutes on one core

Shapes are those of Qwen2.5 (0.5B, 1.5B, 3B) and Qwen3 (8B), written out here: nothing is downloaded. Prompts of up to
512 tokens, responses of up to 256, a reward function; everything else as `tether ppo` has it by default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import Qwen2Config

from tether.config import (
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    SamplingConfig,
)
from tether.diagnose.memory import GIB, Memory, predict

# width, width of the MLP, layers, heads, key-value heads, embeddings tied
MODELS: dict[str, tuple[int, int, int, int, int, bool]] = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "8B": (4096, 12288, 36, 32, 8, False),
}
CARDS = {24: 23.5, 48: 47.5, 80: 79.2}  # by the GB in a card's name, the GiB that CUDA has to give on it

DEFAULT = PPOConfig(
    run="runs/fits",
    model=ModelConfig("model", dtype="bfloat16"),
    prompts=PromptsConfig("prompts.jsonl", max_tokens=512),
    sampling=SamplingConfig(max_new_tokens=256),
    ppo=PPOSection(),
)
TIGHT = replace(
    DEFAULT,
    model=replace(DEFAULT.model, gradient_checkpointing=True),
    ppo=replace(DEFAULT.ppo, microbatch_tokens=768),
    sampling=replace(DEFAULT.sampling, slots=16),
)


def architecture(name: str) -> Any:
    width, mlp, layers, heads, kv_heads, tied = MODELS[name]
    return Qwen2Config(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=151_936, tie_word_embeddings=tied, max_position_embeddings=32_768,
    )  # fmt: skip


def needed(name: str, base: PPOConfig, *, lora: bool) -> Memory:
    """The prediction for one model, on a GPU."""
    model = replace(base.model, lora=LoraConfig() if lora else None)
    return predict(replace(base, model=model), architecture=architecture(name), device="cuda")


def cell(card: int, default: Memory, tight: Memory) -> str:
    """Whether a card of that name is enough."""
    room = CARDS[card] * GIB
    return "yes" if default.needed <= room else "tight" if tight.needed <= room else "–"


def table() -> str:
    """Markdown."""
    lines = [
        f"| model | trained | needs | at least | {' | '.join(f'{card} GB' for card in CARDS)} |",
        f"|---|---|--:|--:|{'---|' * len(CARDS)}",
    ]
    for name in MODELS:
        for lora in (False, True):
            default, tight = needed(name, DEFAULT, lora=lora), needed(name, TIGHT, lora=lora)
            cells = " | ".join(cell(card, default, tight) for card in CARDS)
            lines.append(
                f"| {name} | {'LoRA' if lora else 'whole'} | {default.needed / GIB:.0f} GiB "
                f"| {tight.needed / GIB:.0f} GiB | {cells} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
