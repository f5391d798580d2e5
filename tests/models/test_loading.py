"""Model directories that must not be used, and odd ones that may."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tether.config import LoraConfig, ModelConfig
from tether.data.tokenizer import load_tokenizer
from tether.errors import ConfigError, ModelError
from tether.models.loading import (
    check_directory,
    init_causal_lm,
    load_causal_lm,
    load_weights,
    resolve_device,
    resolve_dtype,
)
from tether.models.policy import build_policy

CPU = torch.device("cpu")


@pytest.fixture
def directory(tiny_model, tmp_path):
    """A copy of a good model directory, to spoil."""
    shutil.copytree(tiny_model("llama", tie_word_embeddings=False), tmp_path / "model")
    return tmp_path / "model"


def load(path, **settings):
    return load_causal_lm(str(path), dtype=torch.float32, device=CPU, **settings)


def test_pickled_weights_are_refused(directory):
    weights = load_file(directory / "model.safetensors")
    torch.save(weights, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only pickle weights \(pytorch_model.bin\).*safetensors"):
        load(directory)


def test_a_missing_weight_is_an_error_not_a_random_number(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .* model.layers.1.mlp.up_proj.weight first"):
        load(directory)


def test_a_weight_of_another_shape_is_an_error(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model"):
        load(directory)


def test_half_a_weight_file_is_an_error(directory):
    whole = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "model.safetensors").unlink(), r"has no \*\.safetensors"),
        (lambda d: (d / "config.json").unlink(), "has no config.json"),
        (lambda d: (d / "config.json").write_text("{half"), "no usable config.json"),
        (lambda d: (d / "config.json").write_text('{"model_type": "nonsuch"}'), "no usable config.json"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_what_is_wrong_with_a_directory_is_said(directory, spoil, message):
    spoil(directory)
    with pytest.raises(ModelError, match=message):
        load(directory)


@pytest.mark.parametrize("path", ["/no/where", "./no", "a/b/c", "here/missing", "~/model"])
def test_model_and_tokenizer_agree_on_what_is_a_missing_directory_and_no_hub_id(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for load_it in (check_directory, load_tokenizer):
        with pytest.raises(ModelError, match=r"does not exist.*a model on the hub is named owner/name"):
            load_it(path)


@pytest.mark.parametrize("path", ["gpt2", "owner/name", "Owner-1/name_2.0"])
def test_a_name_or_an_owner_and_a_name_is_a_hub_id(path):
    check_directory(path)


def test_a_file_is_not_a_model(directory):
    with pytest.raises(ModelError, match="is a file"):
        load(directory / "config.json")


def test_eos_may_be_bos_and_pad_may_be_missing(tiny_model):
    directory = tiny_model("llama", eos_token_id=1, bos_token_id=1, pad_token_id=None)
    policy, _, notes = build_policy(ModelConfig(policy=str(directory)), device=CPU, seed=0)
    assert not notes
    assert policy.model.config.pad_token_id is None


def test_a_trunk_loads_without_its_head(tiny_model, tmp_path):
    whole = load(tiny_model("llama", tie_word_embeddings=False))
    whole.base_model.save_pretrained(tmp_path / "trunk")
    with pytest.raises(ModelError, match="lacks 1 weights"):
        load(tmp_path / "trunk")
    trunk = load(tmp_path / "trunk", trunk_only=True)
    tokens = torch.arange(9)[None]
    assert torch.equal(trunk(tokens).last_hidden_state, whole.base_model(tokens).last_hidden_state)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_come_back_bit_for_bit_also_in_several_files(tiny_model, tmp_path, tied):
    model = load(tiny_model("llama", tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    other = load(tiny_model("llama", tie_word_embeddings=tied, seed=1))
    load_weights(other, tmp_path)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_whose_names_in_the_file_are_others_come_back_too(tmp_path):
    """A mixture of experts: one parameter for all experts, one tensor an expert in the file."""
    settings = {"model_type": "mixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    model, other = (init_causal_lm(settings, vocab_size=40, special={}, seed=s) for s in (0, 1))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) != set(model.state_dict())
    load_weights(other, tmp_path)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_of_another_model_are_not_put_in(tiny_model, tmp_path):
    load(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not fit the model"):
        load_weights(load(tiny_model("llama", num_hidden_layers=3)), tmp_path)


def test_a_model_from_scratch_follows_from_its_seed_and_leaves_torchs_alone():
    settings = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 2}  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b, c = (init_causal_lm(settings, vocab_size=40, special={}, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.lm_head.weight, b.lm_head.weight)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"hidden_size": 16}, "no model_type"), ({"model_type": "lama"}, "does not describe a lama model")],
)
def test_an_impossible_model_from_scratch_is_the_configs_mistake(settings, message):
    with pytest.raises(ConfigError, match=message):
        init_causal_lm(settings, vocab_size=40, special={}, seed=0)


def test_adapters_for_layers_that_do_not_exist_are_the_configs_mistake(tiny_model):
    config = ModelConfig(policy=str(tiny_model()), lora=LoraConfig(targets=["nonsuch"]))
    with pytest.raises(ConfigError, match=r"model\.lora\.targets=\['nonsuch'\] fits no layer"):
        build_policy(config, device=CPU, seed=0)


def test_an_impossible_device_is_the_configs_mistake():
    with pytest.raises(ConfigError, match="'gpu' is not a device"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no usable GPU"):
            resolve_device("cuda")
    if not torch.backends.mps.is_available():
        with pytest.raises(ConfigError, match="no Apple GPU"):
            resolve_device("mps")


def test_a_gpu_beyond_those_that_are_there_is_the_configs_mistake(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match=r"'cuda:2', but this machine has 2 .* Set device: cuda:1"):
        resolve_device("cuda:2")
    with pytest.raises(ConfigError, match=r"Set device: cpu:0"):
        resolve_device("cpu:3")


def test_a_run_directory_given_as_a_model_is_answered_with_the_model_in_it(tiny_model, tmp_path):
    (tmp_path / "config.yaml").touch()
    tiny_model().rename(tmp_path / "final")
    for load in (check_directory, load_tokenizer):
        with pytest.raises(ModelError, match=f"Did you mean {tmp_path}/final"):
            load(str(tmp_path))


def test_small_models_compute_in_float32_on_a_cpu():
    narrow = AutoConfig.for_model("llama", hidden_size=64)
    assert resolve_dtype("auto", CPU, narrow) == torch.float32
    assert resolve_dtype("bfloat16", CPU, narrow) == torch.bfloat16
