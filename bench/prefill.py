"""Encoding prompts into the slot cache: scaled_dot_product_attention beside scores that are held in memory.

    python bench/prefill.py

Each round encodes the same prompts both ways, one after the other; ratios are medians over rounds, of CPU seconds,
which other work on the machine leaves alone. The second way is what layers with a sliding window or a soft cap still
take; here a window as long as the prompt less one forces it.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tether.models.language_model import LanguageModel
from tether.samplers import slots
from tether.samplers.slots import SlotCache


@torch.no_grad()
def cpu_seconds(model: LanguageModel, tokens: torch.Tensor) -> float:
    rows, width = tokens.shape
    cache = SlotCache(model, slots=rows, width=width)
    began = time.process_time()
    cache.prefill(tokens, torch.full((rows,), width), 0, torch.arange(rows))
    return time.process_time() - began


def main() -> None:
    config = AutoConfig.for_model(
        "llama", vocab_size=4096, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval(), torch.float32)
    attend = slots.SlotCache.attend
    for width in (128, 512, 1024, 2048):
        tokens = torch.randint(4096, (2, width))
        ratios = []
        for round_ in range(6):
            fused = cpu_seconds(model, tokens)
            slots.SlotCache.attend = lambda *a, window, limit=width - 1, **k: attend(*a, window=limit, **k)
            try:
                held = cpu_seconds(model, tokens)
            finally:
                slots.SlotCache.attend = attend
            if round_:  # the first warms up
                ratios.append(held / fused)
        print(
            f"{len(tokens)} × {width}: {statistics.median(ratios):.1f} × as fast  [{min(ratios):.1f}–{max(ratios):.1f}]"
        )


if __name__ == "__main__":
    main()
