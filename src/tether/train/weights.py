"""Weights in and out of a checkpoint: a Hugging Face directory, under LoRA an adapter's; of a head a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tether.errors import ModelError, first_line
from tether.models.loading import load_weights, quiet_transformers


def save_weights(model: Any, directory: Path) -> None:
    """Write a transformers model, or only the adapter of a peft model: its base is where the run began.

    Another module, a head, becomes one file, `directory` with the ending .safetensors.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not hasattr(model, "save_pretrained"):
        save_file(dict(model.state_dict()), directory.with_suffix(".safetensors"))
        return
    with quiet_transformers():
        model.save_pretrained(directory)


def restore_weights(model: Any, directory: Path) -> None:
    """Read back what `save_weights` wrote, in place and bit for bit."""
    if not hasattr(model, "save_pretrained"):
        model.load_state_dict(load_file(directory.with_suffix(".safetensors")))
        return
    if not hasattr(model, "peft_config"):
        load_weights(model, directory)
        return
    from peft import set_peft_model_state_dict

    file = directory / "adapter_model.safetensors"
    try:
        result: Any = set_peft_model_state_dict(model, load_file(file))
    except RuntimeError as error:  # of another shape
        raise ModelError(f"{file} does not fit the adapter: {first_line(error)}. Was it edited?") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for names, what in ((trained.intersection(result.missing_keys), "lacks"), (result.unexpected_keys, "has besides")):
        if names:
            raise ModelError(
                f"{file} does not fit the adapter: it {what} {min(names)}, and training would go on with other weights "
                "than it stopped with. Continue with the model and the model.lora that the run began with."
            )
