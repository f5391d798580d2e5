"""A model's weights in and out of a checkpoint: a Hugging Face directory, under LoRA an adapter's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tether.loading import load_weights, quiet_transformers


def save_weights(model: Any, directory: Path) -> None:
    """Write a transformers model, or only the adapter of a peft model: its base is where the run began."""
    with quiet_transformers():
        model.save_pretrained(directory)


def restore_weights(model: Any, directory: Path) -> None:
    """Read back what `save_weights` wrote, in place and bit for bit."""
    if not hasattr(model, "peft_config"):
        load_weights(model, directory)
        return
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(directory / "adapter_model.safetensors"))
