"""An adapter's weights come back from a checkpoint whole, or not at all."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tether.config import LoraConfig
from tether.errors import ModelError
from tether.models.loading import add_lora
from tether.train.checkpoint import restore_weights, save_weights
from tiny import language_model


def adapter(seed: int):
    return add_lora(language_model().lm, LoraConfig(rank=2), seed=seed)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_an_adapter_comes_back_bit_for_bit(tmp_path):
    saved, other = adapter(0), adapter(1)
    save_weights(saved, tmp_path)
    restore_weights(other, tmp_path)
    want = trained(saved)
    assert all(torch.equal(p, want[name]) for name, p in trained(other).items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(min(t)), "it lacks"),
        (lambda t: t.update({min(t).replace("layers.0", "layers.9"): t[min(t)].clone()}), "it has besides"),
        (lambda t: t.update({min(t): t[min(t)][:1].clone()}), "size mismatch|Error"),
    ],
)
def test_an_adapter_file_that_does_not_fit_is_an_error_that_names_it(tmp_path, spoil, message):
    save_weights(adapter(0), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"adapter_model\.safetensors does not fit the adapter: .*({message})"):
        restore_weights(adapter(1), tmp_path)
