"""The table of docs/scaling.md: models that are too large to run are put together from small ones."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tether.config import LoraConfig, ModelConfig, PromptsConfig
from tether.diagnose import predict

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale():
    sys.path.insert(0, str(ROOT / "bench"))
    import scale

    yield scale
    sys.path.remove(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def tiny(scale):
    model = scale.architecture("0.5B")
    kinds = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    return type(model)(**{**model.to_diff_dict(), "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
                          "num_key_value_heads": 2, "vocab_size": 512, **kinds})  # fmt: skip


def test_a_model_of_five_layers_is_predicted_from_two_and_four(scale, tiny):
    config = scale.config(8)
    want = predict(config, architecture=tiny, device="cuda", ranks=8, shard="full")
    step = scale.step_of(tiny, config, 8)
    assert predict(config, architecture=tiny, device="cuda", ranks=8, shard="full", step=step) == want


def test_the_rule_on_the_page_is_what_is_predicted(scale):
    """In bytes a weight, of a model whose embeddings are few, beside activations."""
    model = scale.architecture("0.5B")
    model = type(model)(**{**model.to_diff_dict(), "vocab_size": 512, "num_hidden_layers": 4,
                           "layer_types": ["full_attention"] * 4})  # fmt: skip
    config = replace(scale.config(8), model=ModelConfig("m", dtype="bfloat16"))
    config = replace(config, ppo=replace(config.ppo, microbatch_tokens=1), sampling=replace(config.sampling, slots=1),
                     prompts=PromptsConfig("p", max_tokens=1))  # fmt: skip
    for shard, cut in (("replicate", 1), ("full", 8)):
        found = predict(config, architecture=model, device="cuda", ranks=8, shard=shard)
        sizes = {p.name.strip() + p.phase: p.bytes for p in found.parts}
        p = sizes["engine's copy of the policyalways"] / 2
        assert sizes["weightsalways"] + sizes["optimizeralways"] == pytest.approx(12 * p / cut, rel=0.01)
        assert sizes["referencealways"] == pytest.approx(2 * p / cut, rel=0.05)
        assert sizes["gradientsupdating"] == pytest.approx(4 * p / cut, rel=0.01)
        stepping = sum(x.bytes for x in found.parts if x.phase == "stepping" and "summed" not in x.name)
        assert stepping == pytest.approx(8 * p / cut, rel=0.01)
    begin = scale.starting(found).peak
    assert begin == pytest.approx(8 * p, rel=0.05)
    assert sum(x.bytes for x in found.parts if x.phase == "host") == pytest.approx(12 * p, rel=0.01)
    adapters = replace(config, model=replace(config.model, lora=LoraConfig()))
    whole = predict(adapters, architecture=model, device="cuda", ranks=8, shard="replicate")
    assert {x.name: x.bytes for x in whole.parts}["weights"] == pytest.approx(2 * p, rel=0.1)


def test_the_page_has_every_model_of_the_command(scale):
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert [re.findall(rf"^\| {name} \|", page, re.M) != [] for name in scale.SHOWN] == [True] * len(scale.SHOWN)
