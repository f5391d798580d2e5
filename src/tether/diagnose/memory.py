"""Peak memory, predicted by part from a config: no weights are loaded and nothing is trained.

Weights and activations are counted by running the model's own code on tensors without data, see
`tether.diagnose.simulate`; the sampler's buffers follow from its shapes. What is left is the process itself, measured
once. What each of several ranks holds follows from the shapes of the weights, see `tether.diagnose.per_rank`. How near
the predictions come: bench/memory_prediction.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from tether.diagnose.per_rank import (
    Weight,
    bucket_bytes,
    gathered_bytes,
    gradient_bytes_in_flight,
    largest_gradient_bytes,
    trained_numbers,
    weight_bytes,
)
from tether.diagnose.simulate import Shape, Step, simulate, units_of
from tether.distributed.ranks import BUCKET, need_replicas
from tether.distributed.shard import cuts
from tether.models.language_model import freeze
from tether.models.loading import model_config, resolve_device, resolve_dtype
from tether.samplers.local import PREFILL_TOKENS, count_slots, slot_bytes
from tether.samplers.pool import address_of
from tether.samplers.vllm import plan_cache
from tether.train.sft import init_architecture

KIB, MIB, GIB = 2**10, 2**20, 2**30

_PROCESS_CPU = 485 * MIB  # Python, torch, transformers, TensorBoard: resident before a weight is loaded
_FOLLOWER_CPU = 395 * MIB  # of a rank that writes nothing
_RAY, _WORKER = 340 * MIB, 320 * MIB  # Ray's own processes; one that has torch and transformers, and no model
_VLLM_CPU = 650 * MIB  # vLLM's process on a CPU: resident with a model of next to no weights
_CONTEXT_CUDA = 600 * MIB  # the CUDA context and its libraries, which no allocator counts


@dataclass(frozen=True, slots=True)
class Part:
    """One thing that takes memory."""

    name: str
    bytes: int
    phase: str = "always"
    """always, preparing, sampling, updating, stepping, writing (a checkpoint) or saving: parts of different phases are
    never in memory together on a GPU, whose allocator hands freed blocks on; a CPU's keeps them where they were, from
    the first step until the run ends and saves. host: beside a GPU, in the memory of its host."""
    first: bool = False
    """Of several ranks, rank 0 alone has it."""

    @property
    def when(self) -> str:
        """In words; empty for all the time and on every rank."""
        phase = {"always": "", "host": "in the host's memory"}.get(self.phase, f"while {self.phase}")
        return ", ".join(filter(None, [phase, "on rank 0 alone" if self.first else ""]))


@dataclass(frozen=True, slots=True)
class Memory:
    """A prediction, part by part."""

    device: str
    parts: list[Part]
    ranks: int = 1
    shard: str = "replicate"
    """replicate or full: how the weights lie on several ranks."""

    @property
    def others(self) -> Memory:
        """What every rank but the first has."""
        return replace(self, parts=[p for p in self.parts if not p.first])

    @property
    def peak(self) -> int:
        """Bytes at the worst moment: on a GPU, as torch counts them; on a CPU, the process's resident set. Of several
        ranks, of the first."""
        always = sum(p.bytes for p in self.parts if p.phase == "always")
        phases: dict[str, int] = {}
        for part in self.parts:
            if part.phase not in ("always", "host"):
                phases[part.phase] = phases.get(part.phase, 0) + part.bytes
        if self.device == "cpu":
            alone = max(phases.pop(phase, 0) for phase in ("preparing", "writing", "saving"))
            return always + max(alone, sum(phases.values()))
        return always + max(phases.values(), default=0)

    @property
    def needed(self) -> int:
        """Bytes that the device must have: on a GPU also the CUDA context, and a twentieth lost between blocks."""
        return self.peak if self.device == "cpu" else int(self.peak * 1.05) + _CONTEXT_CUDA

    def table(self) -> str:
        """The parts as lines of text, largest first."""
        rows = [(p.name, size(p.bytes), p.when)
                for p in sorted(self.parts, key=lambda p: -p.bytes) if p.bytes >= KIB]  # fmt: skip
        where = "resident memory" if self.device == "cpu" else "allocated on the GPU"
        if self.ranks == 1 or self.peak == self.others.peak:
            rows.append(("peak" if self.ranks == 1 else "peak of each rank", size(self.peak), where))
        else:
            rows.append(("peak of rank 0", size(self.peak), where))
            rows.append(("peak of each other", size(self.others.peak), where))
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(f"  {name:<{width}}  {amount:>10}  {when}".rstrip() for name, amount, when in rows)


def size(count: float) -> str:
    """Bytes as people say them, in steps of 1024."""
    if count >= GIB:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.0f} MiB" if count >= MIB else f"{count / KIB:.0f} KiB"


def predict(
    config: TrainingConfig, *, prompt_tokens: int | None = None, architecture: Any = None, device: str | None = None,
    ranks: int = 1, shard: str | None = None, step: Step | None = None,
) -> Memory:  # fmt: skip
    """What training with `config` will take at its peak, on each of `ranks` processes.

    prompt_tokens: the longest prompt (for sft and reward: the longest example) if it is known; else the config's limit.
    architecture: a transformers config to assume for the model; None reads the one that config.model names.
    device: cpu or cuda to assume; None is where this config would run on this machine.
    shard: how the weights lie on several ranks; None: as config.distributed.shard says. step: one with the same
    microbatch that was simulated before.
    """
    kind = device or resolve_device(config.device).type
    architecture = architecture or architecture_of(config)
    dtype = _dtype(config, kind, architecture)
    critic = _critic(config, architecture)
    q_heads = isinstance(config, QLearningConfig) and config.has_heads
    checkpointing = config.model.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = kind == "cuda" and _count(architecture) > 1e9
    step = step or simulate(
        architecture, Shape(*config.microbatch(prompt_tokens, ranks)), dtype=dtype, device=kind, lora=config.model.lora,
        checkpointing=bool(checkpointing), critic=critic, q_heads=q_heads,
    )  # fmt: skip
    sharded = _is_sharded(config, step, ranks, shard or config.distributed.shard)
    parts, cut_into = _trained_parts(step, kind, ranks if sharded else 1), ranks if sharded else 1
    if kind == "cpu":
        parts.append(Part("Python and libraries", _PROCESS_CPU if ranks == 1 else _FOLLOWER_CPU))
        copies = 1 if config.model.lora is None else 2  # what was saved is loaded again; adapters are merged in a copy
        parts.append(Part("copies of the final model", 4 * step.parameters * copies, "saving", first=ranks > 1))
    if ranks > 1:
        parts += _of_several(step, kind, sharded)
    if beside := kind_of(config).memory:
        parts += resolve(beside)(Trained(config, step, architecture, dtype, prompt_tokens, kind, ranks, cut_into))
    return Memory(kind, parts, ranks, "full" if sharded else "replicate")


def _is_sharded(config: TrainingConfig, step: Step, ranks: int, shard: str) -> bool:
    """Whether each rank has a part of the weights. Raises what the run would raise."""
    if not isinstance(config, PPOConfig):
        need_replicas(shard, kind_of(config).command, ranks)
        return False
    return cuts(shard, weight_bytes(step.all_units) + 12 * trained_numbers(step.all_units), ranks)


def _trained_parts(step: Step, kind: str, cut_into: int) -> list[Part]:
    """Weights, gradients, moments and activations of what is trained; cut_into: the parts of which a rank has one."""
    trained = trained_numbers(step.all_units, cut_into) + step.heads
    parts = [
        Part("weights", weight_bytes(step.units, cut_into)),
        Part("gradients", 4 * trained, "always" if kind == "cpu" else "updating"),
        Part("optimizer", 8 * trained),
        Part("critic", weight_bytes(step.critic_units, cut_into)),
        Part("Q-learning heads", 4 * (step.heads + step.targets)),
        Part("activations", step.activations, "updating"),
    ]
    if kind == "cuda":  # torch steps all weights at once there, and needs room for one more copy of them
        parts += [Part("gradients ", 4 * trained, "stepping"), Part("optimizer's workspace", 4 * trained, "stepping")]
    return parts


def _of_several(step: Step, kind: str, sharded: bool) -> list[Part]:
    """What it takes that there are several ranks."""
    parts = [Part("log and files", _PROCESS_CPU - _FOLLOWER_CPU, first=True)] if kind == "cpu" else []
    if not sharded:
        trained = [w.numel for unit in step.all_units for w in unit if w.trained]
        return [*parts, Part("gradients being summed", bucket_bytes(trained, BUCKET), "stepping")]
    root, running = gathered_bytes(step.all_units)
    if kind == "cpu":  # gloo sums in a copy, and receives into one, beside the buffer that FSDP gives it
        parts.append(Part("gradients being summed", largest_gradient_bytes(step.all_units), "updating"))
        parts.append(Part("weights being gathered", 2 * root, "updating"))
    written = "writing" if kind == "cpu" else "host"
    return [
        *parts,
        Part("embeddings and head, gathered", root),
        Part("layers, gathered", running, "updating"),
        Part("gradients in flight", gradient_bytes_in_flight(step.all_units), "updating"),
        Part("copy to write from", weight_bytes(step.all_units), "always" if kind == "cpu" else "host", first=True),
        Part("moments to write", 8 * trained_numbers(step.all_units), written, first=True),
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Trained:
    """The model that a run trains, as far as the memory of what stands beside it depends on it."""

    config: Any
    step: Step
    architecture: Any  # transformers' config
    dtype: torch.dtype  # compute precision
    prompt_tokens: int | None  # of the longest prompt
    device: str  # cpu or cuda
    ranks: int = 1
    cut_into: int = 1  # parts, of which each rank has one


def beside_policy(trained: Trained) -> list[Part]:
    """Of PPO: reference, engine, cache and reward models."""
    config: PPOConfig = trained.config
    step, architecture, dtype, kind = trained.step, trained.architecture, trained.dtype, trained.device
    text = architecture.get_text_config()
    sharded, ranks = trained.cut_into > 1, trained.ranks
    item, copied = dtype.itemsize, sharded or config.ppo.ahead or (dtype != torch.float32 and config.model.lora is None)
    parts, reference = [], list[list[Weight]]()
    if config.model.reference is not None or config.model.lora is None:
        frozen = architecture if config.model.reference is None else _read(config, config.model.reference)
        reference = units_of(
            freeze(_without_data(frozen), dtype, same_bits=config.model.lora is None)
        )  # as the base is
        parts.append(Part("reference", weight_bytes(reference, trained.cut_into)))
    if sharded:
        parts += _before_cutting(trained, reference)
    s, p, prompt = config.sampling, config.ppo, trained.prompt_tokens or config.prompts.max_tokens
    responses = -(-p.batch // p.responses_per_prompt // ranks) * p.responses_per_prompt
    if config.evaluate.every:
        responses = max(responses, -(-config.evaluate.count // ranks) * config.evaluate.samples)
    width = prompt + s.max_new_tokens
    if s.engine == "vllm":
        parts += _of_vllm(trained, responses, width)
    elif s.engine == "pool":
        parts += _of_pool(trained, responses, width) if kind == "cpu" and address_of(s.pool) is None else []
    else:
        if copied:
            parts.append(Part("engine's copy of the policy", sum(w.numel for unit in step.units for w in unit) * item))
        slots = count_slots(s.slots, responses, text, width, dtype, kind)
        cache, drawing = slot_bytes(text, width, dtype)
        when = "always" if p.ahead else "sampling"  # which then goes on beside all else
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
            parts.append(Part(f"judge {source_name(source)}", _count(other) * taken.itemsize, first=ranks > 1))
    return parts


def _before_cutting(trained: Trained, reference: list[list[Weight]]) -> list[Part]:
    """What the reference's embeddings and head take while they are whole; and all models, which are loaded whole."""
    step, parts = trained.step, trained.cut_into
    root = gathered_bytes(reference)[0] if reference else 0
    moments = 8 + (4 if trained.device == "cpu" else 0)  # and gradients: not there yet either
    later = weight_bytes([*step.all_units, *reference], parts) + moments * trained_numbers(step.all_units, parts)
    later += root + gathered_bytes(step.all_units)[0]
    return [
        Part("reference's embeddings and head, gathered", root),
        Part("models before they are cut", max(0, weight_bytes([*step.all_units, *reference]) - later), "preparing"),
    ]


def _of_vllm(trained: Trained, responses: int, width: int) -> list[Part]:
    """What vLLM's process holds all the time; how much of a GPU it takes besides is up to it."""
    sampling, text = trained.config.sampling, trained.architecture.get_text_config()
    dtype = trained.dtype if sampling.vllm.dtype == "auto" else getattr(torch, sampling.vllm.dtype)
    head = text.vocab_size * text.hidden_size if text.tie_word_embeddings else 0  # its own there
    cache = plan_cache(sampling.slots, responses, width, trained.architecture, dtype, trained.device)
    parts = [
        Part("vLLM's weights", (sum(w.numel for unit in trained.step.units for w in unit) + head) * dtype.itemsize),
        Part("vLLM's key-value cache", cache.bytes),
    ]
    if trained.cut_into > 1:
        where = "always" if trained.device == "cpu" else "host"
        parts.append(Part("copy that vLLM's weights are written from", weight_bytes(trained.step.units), where))
    return [*parts, Part("vLLM's libraries", _VLLM_CPU if trained.device == "cpu" else _CONTEXT_CUDA)]


def _of_pool(trained: Trained, responses: int, width: int) -> list[Part]:
    """What a Ray that the run starts and its workers hold all the time, on this machine's CPU."""
    s, text = trained.config.sampling, trained.architecture.get_text_config()
    workers, item = s.pool.workers, trained.dtype.itemsize
    weights = [w for unit in trained.step.units for w in unit]
    whole = sum(w.numel for w in weights) * item
    sent = sum(w.numel for w in weights if w.trained) * item
    slots = count_slots(s.slots, -(-responses // workers), text, width, trained.dtype, "cpu")
    return [
        Part("workers' copies of the policy", workers * whole),
        # Those that are trained: gathered, stored, and stored before; the others are stored once.
        Part("weights on their way to the workers", 3 * sent + whole - sent),
        Part("workers' key-value caches and workspace", workers * slots * sum(slot_bytes(text, width, trained.dtype))),
        Part("libraries of Ray and the workers", _RAY + workers * _WORKER),
    ]


def named_reference(trained: Trained) -> list[Part]:
    """Of DPO and Q-learning: a reference that is not the policy as it begins; it is gone before the first step."""
    name = trained.config.model.reference
    if name is None:
        return []
    lora = trained.config.model.lora is not None
    frozen = freeze(_without_data(_read(trained.config, name)), trained.dtype, same_bits=not lora)
    held = sum(p.numel() * p.element_size() for p in frozen.parameters())
    return [Part("reference", held, "preparing", first=trained.ranks > 1)]


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
