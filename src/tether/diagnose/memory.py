"""Peak memory, predicted by part from a config: no weights are loaded and nothing is trained.

Weights and activations are counted by running the model's own code on tensors without data, see
`tether.diagnose.simulate`; the sampler's buffers follow from its shapes. What is left is the process itself, measured
once. How near the predictions come: bench/memory_prediction.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tether.config import (
    InitModelConfig,
    ModelConfig,
    PPOConfig,
    QLearningConfig,
    TrainingConfig,
    model_paths,
    source_name,
)
from tether.config.kinds import kind_of, resolve
from tether.config.reading import load_judge
from tether.data.tokenizer import load_tokenizer
from tether.diagnose.simulate import Shape, Step, simulate
from tether.models.language_model import freeze
from tether.models.loading import model_config, resolve_device, resolve_dtype
from tether.samplers.local import PREFILL_TOKENS, count_slots, slot_bytes
from tether.train.sft import init_architecture

KIB, MIB, GIB = 2**10, 2**20, 2**30

_PROCESS_CPU = 485 * MIB  # Python, torch, transformers, TensorBoard: resident before a weight is loaded
_CONTEXT_CUDA = 600 * MIB  # the CUDA context and its libraries, which no allocator counts


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that takes memory."""

    name: str
    bytes: int
    phase: str = "always"
    """always, preparing, sampling, updating, stepping or saving: parts of different phases are never in memory together
    on a GPU, whose allocator hands freed blocks on; a CPU's keeps them where they were, from the first step until the
    run ends and saves."""


@dataclass(frozen=True, slots=True)
class Memory:
    """A prediction, part by part."""

    device: str
    parts: list[Part]

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: on a GPU, as torch counts them; on a CPU, the process's resident set."""
        always = sum(p.bytes for p in self.parts if p.phase == "always")
        phases: dict[str, int] = {}
        for part in self.parts:
            if part.phase != "always":
                phases[part.phase] = phases.get(part.phase, 0) + part.bytes
        if self.device == "cpu":
            alone = max(phases.pop("preparing", 0), phases.pop("saving", 0))
            return always + max(alone, sum(phases.values()))
        return always + max(phases.values(), default=0)

    @property
    def needed(self) -> int:
        """Bytes that the device must have: on a GPU also the CUDA context, and a twentieth lost between blocks."""
        return self.peak if self.device == "cpu" else int(self.peak * 1.05) + _CONTEXT_CUDA

    def table(self) -> str:
        """The parts as lines of text, largest first."""
        rows = [(p.name, size(p.bytes), "" if p.phase == "always" else f"while {p.phase}")
                for p in sorted(self.parts, key=lambda p: -p.bytes) if p.bytes >= KIB]  # fmt: skip
        rows.append(("peak", size(self.peak), "resident memory" if self.device == "cpu" else "allocated on the GPU"))
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"  {name:<{width}}  {amount:>10}  {when}".rstrip() for name, amount, when in rows)


def size(count: float) -> str:
    """Bytes as people say them, in steps of 1024."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.0f} MiB" if count >= MIB else f"{count / KIB:.0f} KiB"


def predict(
    config: TrainingConfig, *, prompt_tokens: int | None = None, architecture: Any = None, device: str | None = None
) -> Memory:
    """What training with `config` will take at its peak.

    prompt_tokens: the longest prompt (for sft and reward: the longest example) if it is known; else the config's limit.
    architecture: a transformers config to assume for the model; None reads the one that config.model names.
    device: cpu or cuda to assume; None is where this config would run on this machine.
    """
    kind = device or resolve_device(config.device).type
    architecture = architecture or architecture_of(config)
    dtype = _dtype(config, kind, architecture)
    critic = _critic(config, architecture)
    q_heads = isinstance(config, QLearningConfig) and config.has_heads
    checkpointing = config.model.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = kind == "cuda" and _count(architecture) > 1e9
    step = simulate(
        architecture, Shape(*config.microbatch(prompt_tokens)), dtype=dtype, device=kind, lora=config.model.lora,
        checkpointing=bool(checkpointing), critic=critic, q_heads=q_heads,
    )  # fmt: skip
    trained = step.trained + step.critic + step.heads
    parts = [
        Part("weights", step.weights),
        Part("gradients", 4 * trained, "always" if kind == "cpu" else "updating"),
        Part("optimizer", 8 * trained),
        Part("critic", 4 * step.critic),
        Part("Q-learning heads", 4 * (step.heads + step.targets)),
        Part("activations", step.activations, "updating"),
    ]
    if kind == "cuda":  # torch steps all weights at once there, and needs room for one more copy of them
        parts += [Part("gradients ", 4 * trained, "stepping"), Part("optimizer's workspace", 4 * trained, "stepping")]
    else:
        parts.append(Part("Python and libraries", _PROCESS_CPU))
        copies = 1 if config.model.lora is None else 2  # what was saved is loaded again; adapters are merged in a copy
        parts.append(Part("copies of the final model", 4 * step.parameters * copies, "saving"))
    if beside := kind_of(config).memory:
        parts += resolve(beside)(Trained(config, step, architecture, dtype, prompt_tokens, kind))
    return Memory(kind, parts)


@dataclass(frozen=True, slots=True)
class Trained:
    """The model that a run trains, as far as the memory of what stands beside it depends on it."""

    config: Any
    step: Step
    architecture: Any  # transformers' config
    dtype: torch.dtype  # compute precision
    prompt_tokens: int | None  # of the longest prompt
    device: str  # cpu or cuda


def beside_policy(trained: Trained) -> list[Part]:
    """Of PPO: reference, engine, cache and reward models."""
    config: PPOConfig = trained.config
    step, architecture, dtype, kind = trained.step, trained.architecture, trained.dtype, trained.device
    text = architecture.get_text_config()
    ahead = bool(config.ppo.ahead)
    item, copied = dtype.itemsize, ahead or (dtype != torch.float32 and config.model.lora is None)
    parts = []
    if config.model.reference is not None or config.model.lora is None:
        frozen = architecture if config.model.reference is None else _read(config, config.model.reference)
        reference = freeze(_without_data(frozen), dtype, same_bits=config.model.lora is None)  # else as the base is
        parts.append(Part("reference", sum(p.numel() * p.element_size() for p in reference.parameters())))
    if copied:
        parts.append(Part("engine's copy of the policy", step.parameters * item))
    s, prompt = config.sampling, trained.prompt_tokens or config.prompts.max_tokens
    responses = max(config.ppo.batch, config.evaluate.count * config.evaluate.samples if config.evaluate.every else 0)
    width = prompt + s.max_new_tokens
    slots = count_slots(s.slots, responses, text, width, dtype, kind)
    cache, drawing = slot_bytes(text, width, dtype)
    when = "always" if ahead else "sampling"  # beside updating too
    parts.append(Part("key-value cache", slots * cache, when))
    rows = max(1, min(slots, PREFILL_TOKENS // prompt))
    scores = rows * text.num_attention_heads * prompt**2 * (8 + item) if _holds_scores(text) else 0
    parts.append(Part("sampler's workspace", max(scores, slots * drawing), when))
    for source in [*config.reward, *config.evaluate.gold]:
        held = 0
        for path in model_paths(source):
            other = _read(config, path)
            taken = resolve_dtype(source.dtype, torch.device("cpu"), other) if kind == "cpu" else dtype
            held += _count(other) * taken.itemsize
        if held:
            parts.append(Part(f"reward model {source_name(source)}", held))
        if source.judge is not None and (judge := load_judge(source.judge)).judge.base_url is None:
            other = model_config(judge.judge.model, trust_remote_code=judge.trust_remote_code)
            taken = resolve_dtype(judge.dtype, torch.device("cpu"), other) if kind == "cpu" else dtype
            parts.append(Part(f"judge {source_name(source)}", _count(other) * taken.itemsize))
    return parts


def named_reference(trained: Trained) -> list[Part]:
    """Of DPO and Q-learning: a reference that is not the policy as it begins; it is gone before the first step."""
    name = trained.config.model.reference
    if name is None:
        return []
    lora = trained.config.model.lora is not None
    frozen = freeze(_without_data(_read(trained.config, name)), trained.dtype, same_bits=not lora)
    held = sum(p.numel() * p.element_size() for p in frozen.parameters())
    return [Part("reference", held, "preparing")]


def _holds_scores(text: Any) -> bool:
    """Whether some layer's attention to a prompt holds its scores, see `SlotCache.attend`."""
    return bool(getattr(text, "sliding_window", None) or getattr(text, "attn_logit_softcapping", None))


# ---------------------------------------------------------------- what the config says


def architecture_of(config: TrainingConfig) -> Any:
    """The transformers config of the model that is trained."""
    policy = config.model.policy
    if isinstance(policy, InitModelConfig):
        m = config.model
        tokenizer = load_tokenizer(policy.tokenizer, revision=m.revision, trust_remote_code=m.trust_remote_code)
        return init_architecture(policy, tokenizer)
    return _read(config, policy)


def _read(config: TrainingConfig, path: str) -> Any:
    revision = config.model.revision if path == config.model.policy else None
    return model_config(path, revision=revision, trust_remote_code=config.model.trust_remote_code)


def _critic(config: TrainingConfig, architecture: Any) -> Any:
    """The config of a separate critic's trunk; None where it is a head on the policy's."""
    critic = config.model.critic if isinstance(config.model, ModelConfig) else "shared"
    if critic == "shared":
        return None
    return architecture if critic == "separate" else _read(config, critic)


def _dtype(config: TrainingConfig, kind: str, architecture: Any) -> torch.dtype:
    if kind == "cuda" and config.model.dtype == "auto":
        return torch.bfloat16  # as every GPU of the last years; asking torch would need one
    return resolve_dtype(config.model.dtype, torch.device("cpu"), architecture)


def _count(architecture: Any) -> int:
    """Number of weights, counted on a model without data."""
    return sum(p.numel() for p in _without_data(architecture).parameters())


def _without_data(architecture: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
