"""What is written is loaded again before anyone relies on it; here each thing that could be wrong with it is."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tether.errors import ModelError
from tether.models.export import check_reload, vllm_note


@pytest.fixture
def plain(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model("qwen2", tie_word_embeddings=False)).eval()


def test_a_directory_that_holds_the_model_is_accepted_in_either_precision(plain, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = plain.to(dtype)
        model.save_pretrained(tmp_path / str(dtype))
        check_reload(model, tmp_path / str(dtype))


def test_one_weight_that_no_probe_would_read_is_named(plain, tmp_path):
    unread = next(i for i in range(258) if i not in {k * 7919 % 258 for k in range(8)})
    plain.save_pretrained(tmp_path)
    with torch.no_grad():
        plain.model.embed_tokens.weight[unread, 3] += 1e-6
    with pytest.raises(ModelError, match=r"model\.embed_tokens\.weight is not what was trained"):
        check_reload(plain, tmp_path)


def test_weights_that_lost_precision_are_not_what_was_trained(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    coarse = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    coarse.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is not what was trained"):
        check_reload(plain, tmp_path)


def test_the_right_weights_under_another_config_give_other_logits(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    with pytest.raises(ModelError, match="gives other logits than the trained model"):
        check_reload(plain, tmp_path)


def test_the_reloaded_model_stays_on_the_cpu(plain, tmp_path, monkeypatch):
    # the device that trained the model may have no room for it twice
    plain.save_pretrained(tmp_path)
    moved = []
    monkeypatch.setattr(type(plain), "to", lambda self, *args, **kwargs: moved.append(args) or self)
    check_reload(plain, tmp_path)
    assert moved == []


@pytest.mark.parametrize(
    ("size", "refused"), [(24, ["on a CPU"]), (32, []), (128, []), (60, ["on a CPU", "on a GPU"]), (512, ["on a GPU"])]
)
def test_a_head_size_that_vllm_refuses_is_told(size, refused):
    note = vllm_note(AutoConfig.for_model("llama", hidden_size=4 * size, num_attention_heads=4)) or ""
    assert [place for place in ("on a CPU", "on a GPU") if place in note] == refused
    assert (f"heads have {size} dimensions" in note) == bool(refused)
