"""Memory of each GPU and bytes over the wire, predicted: PPO of 0.5B to 72B weights on 1 to 512 GPUs.

    python bench/scale.py     the tables of docs/scaling.md, in Markdown: about a minute on one core

Shapes are those of Qwen2.5 and Qwen3 (8B), written out here: nothing is downloaded. Of each GPU: 64 answers a cycle, 16
of them an optimizer step, one epoch; prompts of up to 512 tokens, answers of up to 256; bfloat16, gradient
checkpointing, 8,192 padded tokens at once, a reward function. A model of L layers is not run: what a layer takes is the
difference between models of two and of four.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tether.config import PPOConfig
from tether.diagnose.memory import GIB, Memory, predict
from tether.diagnose.per_rank import wire_bytes
from tether.diagnose.simulate import Shape, Step, simulate, units_of
from tether.models.language_model import freeze
from what_fits import DEFAULT, MODELS, architecture

MODELS |= {
    "14B": (5120, 13824, 48, 40, 8, False),
    "32B": (5120, 27648, 64, 40, 8, False),
    "72B": (8192, 29568, 80, 64, 8, False),
}
SHOWN = ("0.5B", "1.5B", "3B", "8B", "14B", "32B", "72B")
GPUS = (8, 32, 128, 512)
ANSWERS, TOGETHER = 64, 16  # of a GPU: a cycle, an optimizer step


def config(gpus: int) -> PPOConfig:
    return replace(
        DEFAULT, model=replace(DEFAULT.model, gradient_checkpointing=True),
        ppo=replace(DEFAULT.ppo, batch=ANSWERS * gpus, minibatch=TOGETHER * gpus, epochs=1),
    )  # fmt: skip


def step_of(model: Any, config: PPOConfig, ranks: int) -> Step:
    """What `predict` would simulate of the transformers config, from models of two and four layers."""
    shape = Shape(*config.microbatch(None, ranks))
    few, more = (
        simulate(_with_layers(model, n), shape, dtype=torch.bfloat16, device="cuda", checkpointing=True) for n in (2, 4)
    )
    pairs = (model.num_hidden_layers - 2) / 2

    def extended(name: str) -> int:
        first, second = getattr(few, name), getattr(more, name)
        return int(first + pairs * (second - first))

    root, layer, *_ = few.units
    numbers = {name: extended(name) for name in ("parameters", "weights", "trained", "activations")}
    return replace(few, **numbers, units=[root, *[layer] * model.num_hidden_layers])


def _with_layers(model: Any, layers: int) -> Any:
    kinds = ["full_attention"] * layers
    return type(model)(**{**model.to_diff_dict(), "num_hidden_layers": layers, "layer_types": kinds})


def received(model: Any, step: Step, ranks: int, *, sharded: bool) -> int:
    """Bytes of weights and gradients that a GPU receives in a cycle."""
    rows = config(ranks).microbatch(None, ranks)[0]
    steps = ANSWERS // TOGETHER
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        frozen = freeze(AutoModelForCausalLM.from_config(_with_layers(model, 2), dtype=torch.float32), torch.bfloat16,
                        same_bits=True)  # fmt: skip
    root, layer, _ = units_of(frozen)
    return wire_bytes(
        step.units, [root, *[layer] * model.num_hidden_layers], ranks, sharded=sharded, steps=steps,
        passes=steps * -(-TOGETHER // rows), valued=-(-ANSWERS // rows),
    )  # fmt: skip


def once_cut(memory: Memory) -> Memory:
    """Without what it takes to begin, when every GPU still has all models whole."""
    return replace(memory, parts=[p for p in memory.parts if p.phase != "preparing"])


def starting(memory: Memory) -> Memory:
    """Only that."""
    return replace(memory, parts=[p for p in memory.parts if p.phase in ("always", "preparing")])


def tables() -> str:
    """Markdown: memory, then bytes over the wire."""
    head = "".join(f" `full`, {n} |" for n in GPUS)
    memory = [f"| model | 1 GPU, or `replicate` |{head} to begin with `full` | rank 0's host |"]
    memory.append("|---|" + "--:|" * (len(GPUS) + 3))
    wire = [f"| model | `replicate`, 8 or more |{head}", "|---|" + "--:|" * (len(GPUS) + 1)]
    for name in SHOWN:
        model = architecture(name)
        step = step_of(model, config(8), 8)
        given: dict[str, Any] = {"architecture": model, "device": "cuda", "step": step}
        whole = predict(config(8), ranks=8, shard="replicate", **given)
        cut = [predict(config(n), ranks=n, shard="full", **given) for n in GPUS]
        host = sum(p.bytes for p in cut[0].parts if p.phase == "host")
        cells = [whole.needed, *(once_cut(m).needed for m in cut), starting(cut[-1]).needed, host]
        memory.append(f"| {name} | " + " | ".join(f"{b / GIB:,.0f} GiB" for b in cells) + " |")
        sent = [received(model, step, 8, sharded=False), *(received(model, step, n, sharded=True) for n in GPUS)]
        wire.append(f"| {name} | " + " | ".join(f"{b / 1e9:,.0f} GB" for b in sent) + " |")
    return "\n".join([*memory, "", *wire])


if __name__ == "__main__":
    print(tables())
