"""Models on disk: on which device and in which precision they are loaded, and what is refused.

Model code is transformers': any architecture, by directory or hub id, from safetensors alone and without dropout.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from tether.config import LoraConfig
from tether.data.tokenizer import is_directory
from tether.errors import ConfigError, ModelError, did_you_mean_final, first_line, last_line

transformers_logging.disable_progress_bar()

# ---------------------------------------------------------------- device and precision


def resolve_device(device: str) -> torch.device:
    """`auto` is cuda, else mps, else cpu; anything else is torch's own name for it."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not a device: torch knows cpu, cuda, cuda:N, mps. Set one.") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}, but this machine has no usable GPU. Set device: auto or cpu.")
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={device!r}, but this machine has no Apple GPU to use. Set device: auto or cpu.")
    count = torch.cuda.device_count() if resolved.type == "cuda" else 1
    if (resolved.index or 0) >= count:
        raise ConfigError(
            f"device={device!r}, but this machine has {count} of that kind, counted from 0. Set device: "
            f"{resolved.type}:{count - 1}, or auto."
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device, config: Any) -> torch.dtype:
    """`auto`: bfloat16 on a GPU, and on a CPU with bfloat16 arithmetic once matrices are large enough to gain from it.

    config: of transformers. Below a width of about 512, casting the weights costs more than the faster matmul gives
    back.
    """
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast and config.get_text_config().hidden_size >= 512 else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 matmuls over float32 masters; nothing to do in float32 (or float64)."""
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


# ---------------------------------------------------------------- loading


def model_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model directory or hub id, without its weights."""
    check_directory(path, revision)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no usable config.json: {first_line(error)}") from error


def check_directory(path: str, revision: str | None = None) -> None:
    """Raise ModelError where `path` is neither a directory with a model that we would load nor one on the hub."""
    if not is_directory(path, revision):
        return
    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json: it is not a model directory."
            f"{did_you_mean_final(path) or ' Name the one that holds it.'}"
        )
    if not any(directory.glob("*.safetensors")) and not (directory / "adapter_config.json").exists():
        pickles = sorted(p.name for p in [*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")])
        if pickles:
            raise ModelError(
                f"{path} has only pickle weights ({pickles[0]}): loading them can run any code. Convert them to "
                "safetensors (transformers: model.save_pretrained(DIR)) and name that directory."
            )
        raise ModelError(f"{path} has no *.safetensors: there are no weights to load. Check that the copy is complete.")


def load_causal_lm(
    path: str, *, dtype: torch.dtype, device: torch.device, trunk_only: bool = False, **where: Any
) -> PreTrainedModel:
    """A causal language model from a directory or hub id; safetensors only, every dropout 0.

    trunk_only: without its head, and from a directory that need not have one. where: revision and trust_remote_code.
    Raises ModelError where it cannot be loaded, or where weights are missing (they would be random).
    """
    where = {"trust_remote_code": False, **where}  # where it is left out, transformers asks at the terminal
    model_config(path, **where)
    auto: Any = AutoModel if trunk_only else AutoModelForCausalLM
    with quiet_transformers():
        try:
            model, info = auto.from_pretrained(
                path, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
        except Exception as error:
            raise ModelError(f"{path} cannot be loaded as a causal language model: {first_line(error)}") from error
    check_complete(path, model, sorted(info["missing_keys"]))
    return without_dropout(model.to(device))


def check_complete(path: str, model: PreTrainedModel, missing: list[str]) -> None:
    """Raise ModelError if the directory of `model` did not have all its weights."""
    if missing:
        raise ModelError(
            f"{path} lacks {len(missing)} weights of {type(model).__name__}, {missing[0]} first: they would be random. "
            "Name a directory that holds a whole model."
        )


def init_causal_lm(settings: dict[str, Any], *, vocab_size: int, special: dict[str, int | None], seed: int) -> Any:
    """A causal language model with random float32 weights; same seed, same weights.

    settings: keys of a transformers config, `model_type` among them. special: bos, eos and pad ids of the tokenizer.
    """
    values = {**settings, **{k: v for k, v in special.items() if v is not None}, "vocab_size": vocab_size}
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ConfigError("model.policy.init has no model_type: no architecture is chosen. Add model_type: llama, say.")
    try:
        config = AutoConfig.for_model(model_type, **values)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ConfigError(f"model.policy.init does not describe a {model_type} model: {first_line(error)}") from error
    return without_dropout(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Every dropout at 0: two passes over the same tokens must agree, or the ratio would not begin at 1.

    A rate may be in the config, in a module's attribute, or in a module of torch's own; all go by a name with `drop`.
    """
    for holder in (model.config, model.config.get_text_config(), *model.modules()):
        for name, value in list(vars(holder).items()):
            if "drop" in name and isinstance(value, float):
                setattr(holder, name, 0.0)
        if isinstance(holder, nn.Dropout):
            holder.p = 0.0
    return model


def add_lora(model: PreTrainedModel, lora: LoraConfig, *, seed: int, task: str = "CAUSAL_LM") -> Any:
    """Wrap `model` in a peft adapter; the base is frozen, the adapter float32. Seeded: A is random, B zero.

    task: peft's word for what the model returns; FEATURE_EXTRACTION for a trunk without a head.
    """
    import peft

    targets = lora.targets
    alpha: Any = lora.alpha  # peft takes any number and declares int
    config = peft.LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, task_type=task)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(f"model.lora.targets={targets!r} fits no layer: {first_line(error)}") from error


def set_checkpointing(setting: str | bool, device: torch.device, model: Any, *others: Any) -> None:
    """Recompute activations of all these in the backward pass if asked to; auto: for a `model` above 1B on a GPU."""
    big = sum(p.numel() for p in model.parameters()) > 1e9 and device.type == "cuda"
    if setting is True or (setting == "auto" and big):
        for module in (model, *others):
            checkpoint_activations(module)


def checkpoint_activations(model: Any) -> None:
    """Keep only what goes into each layer, and compute the rest again in the backward pass."""
    new_name = getattr(model, "activation_checkpointing_enable", None)
    enable = new_name or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def context_length(config: Any) -> int | None:
    """Longest sequence in tokens that the model has positions for; None if it does not say."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def head_size(config: Any) -> int:
    """Dimensions of an attention head; config: the text config."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


_loading = threading.RLock()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Missing weights become our ModelError: transformers' table of them would only be noise beside it.

    One thread at a time: while it loads, transformers changes torch's default dtype and initializers for all of them.
    """
    with _loading:
        before = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(before)


def load_weights(model: PreTrainedModel, directory: Path) -> None:
    """Read back what save_pretrained wrote, in place and bit for bit.

    By way of from_pretrained: the names in the files are not always the parameters' own (mixtures of experts).
    """
    kind: Any = type(model)
    with quiet_transformers():
        saved, info = kind.from_pretrained(
            directory, dtype=next(model.parameters()).dtype, use_safetensors=True, output_loading_info=True
        )
    try:
        if info["missing_keys"]:
            raise RuntimeError(f"{min(info['missing_keys'])} is missing")
        model.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise ModelError(f"{directory} does not fit the model: {last_line(error)}. Was it edited?") from error
