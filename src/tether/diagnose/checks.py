"""`--dry-run` and `tether doctor`: what a run would do, and whether it can."""

from __future__ import annotations

import os
from pathlib import Path

from tether.config import Config, PPOConfig, TrainingConfig, check
from tether.config.kinds import KINDS, kind_of, resolve
from tether.config.reading import to_yaml
from tether.diagnose.inputs import Inputs
from tether.diagnose.machine import machine, memory_of
from tether.diagnose.memory import Memory, architecture_of, predict, size
from tether.distributed.world import world
from tether.errors import ConfigError, TetherError
from tether.models.export import vllm_note
from tether.models.loading import resolve_device
from tether.runs.resume import check_place, check_writable, continuation, has_something_to_continue


def dry_run(config: Config, *, fresh: bool = False) -> str:
    """The resolved config, the data check, one rendered row with its mask, the plan and peak memory by part.

    Trains nothing, loads no weights and writes no file. Raises what the run would raise about its config, directory,
    data, tokenizer and reward functions. fresh: what stands in the directory would be moved aside.
    """
    check(config)
    resolve_device(config.device)
    kind, hashes = kind_of(config), dict[str, str]()
    if not isinstance(config, TrainingConfig):
        if (run := getattr(config, "run", None)) is not None:
            check_writable(Path(run))
    else:
        check_place(Path(config.run))
        if not fresh and has_something_to_continue(Path(config.run)):  # hashing takes a second a gigabyte
            hashes = resolve(kind.hashes)(config)
            continuation(Path(config.run), kind.command, config, hashes)
    inputs: Inputs = resolve(kind.inputs)(config, hashes)
    parts = [f"config\n{_indented(to_yaml(config))}", _data(inputs)]
    if inputs.rendered:
        parts.append(f"one row, token by token (1: {inputs.counts})\n{_indented(inputs.rendered)}")
    plan = f"plan\n  {inputs.plan}"
    parts.append(plan + idle(config, world()[1]))
    if isinstance(config, TrainingConfig):
        parts.append(_memory(config, inputs, world()[1]))
    return "\n\n".join(parts)


def doctor(config: Config | None = None, *, ranks: int = 1) -> str:
    """What this machine has; with a config also its data check, peak memory by part, and whether that fits; of a judge
    whether it can be won with nothing.

    ranks: processes that torchrun would start.
    """
    text = f"machine\n{_indented(machine())}"
    if config is None:
        return text
    if probe := kind_of(config).probe:
        check(config)
        inputs = resolve(kind_of(config).inputs)(config, {})
        return "\n\n".join([text, _data(inputs), f"probe\n{_indented(resolve(probe)(config))}"])
    if not isinstance(config, TrainingConfig):
        *first, last = (kind.command for kind in KINDS.values() if kind.trains)
        raise ConfigError(
            f"tether doctor checks runs that train, and judges: give it a config of tether {', '.join(first)}, {last} "
            "or judge."
        )
    check(config)
    kind = kind_of(config)
    inputs = resolve(kind.inputs)(config, {})
    plan = f"plan\n  {inputs.plan}"
    if kind.final == "language model" and (note := vllm_note(architecture_of(config))):
        plan += f"\n  {note}"
    plan += idle(config, ranks)
    return "\n\n".join([text, _data(inputs), plan, _memory(config, inputs, ranks)])


def idle(config: Config, ranks: int) -> str:
    """A line where a step of PPO has no row for some of the processes; else nothing."""
    if not isinstance(config, PPOConfig) or config.ppo.minibatch >= ranks:
        return ""
    return (
        f"\n  ppo.minibatch={config.ppo.minibatch} on {ranks} processes: in every step "
        f"{ranks - config.ppo.minibatch} of them have no row, and only keep up. Set it to {ranks} or more."
    )


def _data(inputs: Inputs) -> str:
    return "data\n" + _indented("\n".join(inputs.facts))


def _memory(config: TrainingConfig, inputs: Inputs, ranks: int) -> str:
    try:
        memory = predict(config, prompt_tokens=inputs.longest, ranks=ranks)
        other = _other_layout(config, inputs, memory)
    except TetherError:
        raise
    except Exception as error:  # remote code may do what cannot be done without data
        return f"memory\n  cannot be predicted for this architecture ({type(error).__name__}: {error})"
    layout = f" of each of {ranks} processes, distributed.shard={memory.shard}" if ranks > 1 else ""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) if memory.device == "cpu" else 1
    lines = [memory.table(), f"  {verdict(memory, memory_of(memory.device), local=local)}"]
    if other is not None:
        lines.append(f"  with distributed.shard={other.shard} the largest would need {size(other.needed)}")
    return "\n".join([f"memory on {memory.device}{layout}, predicted", *lines])


def _other_layout(config: TrainingConfig, inputs: Inputs, memory: Memory) -> Memory | None:
    """The prediction for the layout that the config does not choose; None where there is none."""
    if memory.ranks == 1 or not isinstance(config, PPOConfig):
        return None
    shard = "replicate" if memory.shard == "full" else "full"
    return predict(config, prompt_tokens=inputs.longest, ranks=memory.ranks, shard=shard)


def verdict(memory: Memory, available: int, *, local: int = 1) -> str:
    """Whether it fits into `available` bytes, and if not, the knob that saves most.

    local: ranks that share these bytes, the first among them.
    """
    needed = memory.needed + (local - 1) * memory.others.needed
    who = f"{local} processes on one machine need" if local > 1 else "needs"
    if needed <= available:
        return f"fits: {who} {size(needed)} of {size(available)}"
    largest = max(memory.parts, key=lambda p: p.bytes).name.strip()
    return f"does not fit: {who} {size(needed)} of {size(available)}. {_REMEDY.get(largest, _SMALLER)}"


_SMALLER = "Use a smaller model, or model.lora."
_REMEDY = {
    "activations": "Lower the microbatch_tokens, or set model.gradient_checkpointing to true.",
    "key-value cache": "Lower sampling.slots.",
    "vLLM's key-value cache": "Lower sampling.slots.",
    "sampler's workspace": "Lower sampling.slots.",
    "optimizer": "Set model.lora: {}, which trains adapters only.",
    "gradients": "Set model.lora: {}, which trains adapters only.",
}


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.rstrip("\n").splitlines())
