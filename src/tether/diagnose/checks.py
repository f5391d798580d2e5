"""`--dry-run` and `tether doctor`: what a run would do, and whether it can."""

from __future__ import annotations

from pathlib import Path

from tether.config import Config, EvaluateConfig, PPOConfig, RewardConfig, SFTConfig, TrainingConfig, check
from tether.config.reading import to_yaml
from tether.diagnose.inputs import Inputs, check_evaluation, check_inputs, what_it_reads
from tether.diagnose.machine import machine, memory_of
from tether.diagnose.memory import Memory, architecture_of, predict, size
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
    if isinstance(config, EvaluateConfig):
        return _dry_evaluation(config)
    assert isinstance(config, TrainingConfig)
    check_place(Path(config.run))
    pinned = None
    if not fresh and has_something_to_continue(Path(config.run)):  # hashing takes a second a gigabyte
        command, hashes, pinned = what_it_reads(config)
        continuation(Path(config.run), command, config, hashes)
    inputs = check_inputs(config, pinned)
    return "\n\n".join(
        [
            f"config\n{_indented(to_yaml(config))}",
            _data(inputs),
            f"one row, token by token (1: {_MASK[type(config)]})\n{_indented(inputs.rendered)}",
            f"plan\n  {inputs.plan}",
            _memory(config, inputs),
        ]
    )


def _dry_evaluation(config: EvaluateConfig) -> str:
    if config.run is not None:
        check_writable(Path(config.run))
    inputs = check_evaluation(config)
    return "\n\n".join([f"config\n{_indented(to_yaml(config))}", _data(inputs), f"plan\n  {inputs.plan}"])


def doctor(config: Config | None = None) -> str:
    """What this machine has; with a config also its data check, peak memory by part, and whether that fits."""
    text = f"machine\n{_indented(machine())}"
    if config is None:
        return text
    if not isinstance(config, TrainingConfig):
        raise ConfigError("tether doctor checks runs that train: give it a config of tether ppo, sft or reward.")
    check(config)
    inputs = check_inputs(config)
    plan = f"plan\n  {inputs.plan}"
    if not isinstance(config, RewardConfig) and (note := vllm_note(architecture_of(config))):
        plan += f"\n  {note}"
    return "\n\n".join([text, _data(inputs), plan, _memory(config, inputs)])


_MASK = {
    PPOConfig: "a response token, which the loss counts",
    SFTConfig: "a token that is learned",
    RewardConfig: "where the score is read",
}


def _data(inputs: Inputs) -> str:
    return "data\n" + _indented("\n".join(inputs.facts))


def _memory(config: TrainingConfig, inputs: Inputs) -> str:
    try:
        memory = predict(config, prompt_tokens=inputs.longest)
    except TetherError:
        raise
    except Exception as error:  # remote code may do what cannot be done without data
        return f"memory\n  cannot be predicted for this architecture ({type(error).__name__}: {error})"
    return f"memory on {memory.device}, predicted\n{memory.table()}\n  {verdict(memory, memory_of(memory.device))}"


def verdict(memory: Memory, available: int) -> str:
    """Whether it fits into `available` bytes, and if not, the knob that saves most."""
    if memory.needed <= available:
        return f"fits: needs {size(memory.needed)} of {size(available)}"
    largest = max(memory.parts, key=lambda p: p.bytes).name.strip()
    return f"does not fit: needs {size(memory.needed)} of {size(available)}. {_REMEDY.get(largest, _SMALLER)}"


_SMALLER = "Use a smaller model, or model.lora."
_REMEDY = {
    "activations": "Lower the microbatch_tokens, or set model.gradient_checkpointing to true.",
    "key-value cache": "Lower sampling.slots.",
    "sampler's workspace": "Lower sampling.slots.",
    "optimizer": "Set model.lora: {}, which trains adapters only.",
    "gradients": "Set model.lora: {}, which trains adapters only.",
}


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" if line else "" for line in text.rstrip("\n").splitlines())
