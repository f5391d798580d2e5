"""Log-probs read off hidden states against the model's own logits; and what happens where the two cannot agree."""

import types

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ARCHITECTURES
from tether.config import LoraConfig
from tether.models.language_model import LanguageModel
from tether.models.loading import add_lora, without_dropout
from tether.types import Rows
from tiny import language_model, policy_of, ragged_rows

TEMPERATURE = 0.7


def logprobs_of_own_logits(lm, rows: Rows) -> torch.Tensor:
    """[N] of the response tokens, from the whole logits of the transformers model."""
    log_p = torch.log_softmax(lm(input_ids=rows.tokens).logits.float() / TEMPERATURE, -1)
    row, t = rows.response_mask.nonzero(as_tuple=True)
    column = rows.prompt_lengths[row] + t
    return log_p[row, column - 1, rows.tokens[row, column]]


def response_logprobs(model: LanguageModel, rows: Rows) -> torch.Tensor:
    return model.response_logprobs(rows, temperature=TEMPERATURE, entropy=True)[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architectures_log_probs_are_those_of_its_own_logits_without_the_fallback(architecture):
    model, rows = language_model(architecture), ragged_rows()
    assert model.check_head() is None
    assert not model.use_full_logits
    assert_close(response_logprobs(model, rows), logprobs_of_own_logits(model.lm, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 3.0}),
        ("cohere2", {"logit_scale": 3.0}),
        ("gemma2", {"final_logit_softcapping": 0.5}),
    ],
)
def test_the_setting_that_changes_logits_after_the_head_matters_and_is_obeyed(architecture, changes):
    rows = ragged_rows()
    model, other = language_model(architecture, **changes), language_model(architecture)
    assert not torch.allclose(response_logprobs(model, rows), response_logprobs(other, rows), atol=1e-2)
    assert model.check_head() is None
    assert_close(response_logprobs(model, rows), logprobs_of_own_logits(model.lm, rows), atol=1e-5, rtol=0)


def test_a_head_with_a_bias_is_obeyed():
    config = AutoConfig.for_model(
        "phi", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    model = LanguageModel(without_dropout(AutoModelForCausalLM.from_config(config)), torch.float32)
    nn.init.normal_(model.lm.lm_head.bias)
    rows = ragged_rows()
    assert model.check_head() is None
    assert_close(response_logprobs(model, rows), logprobs_of_own_logits(model.lm, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_full_logits_give_the_same_results_and_gradients_as_chunks(architecture):
    rows, results = ragged_rows(), []
    for full in (False, True):
        policy = policy_of(language_model(architecture))
        policy.model.use_full_logits = full
        out = policy(rows, temperature=TEMPERATURE)
        weights = torch.linspace(-1, 1, out.values.numel()).view_as(out.values)
        ((out.logprobs + 0.3 * out.entropy + 0.2 * out.values) * weights).sum().backward()
        results.append((*out, *(p.grad for _, p in policy.policy_parameters() + policy.critic_parameters())))
    for chunked, whole in zip(*results, strict=True):
        assert_close(chunked, whole, atol=1e-4, rtol=1e-4)


def odd_model() -> LanguageModel:
    """A model that does to its logits what no key of its config tells."""
    model = language_model()
    forward = type(model.lm).forward

    def with_a_favorite(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        output.logits[..., 3] += 2.0
        return output

    model.lm.forward = types.MethodType(with_a_favorite, model.lm)
    return model


def test_a_head_that_ours_does_not_know_is_noticed_and_its_own_logits_are_used():
    model, rows = odd_model(), ragged_rows()
    assert not torch.allclose(response_logprobs(model, rows), logprobs_of_own_logits(model.lm, rows), atol=1e-2)
    assert "full logits" in (model.check_head() or "")
    assert model.use_full_logits
    assert_close(response_logprobs(model, rows), logprobs_of_own_logits(model.lm, rows), atol=1e-5, rtol=0)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_too_every_architectures_head_is_known(architecture, weights):
    model = LanguageModel(language_model(architecture).lm.to(weights), torch.bfloat16)
    assert model.check_head() is None


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16_too_a_change_after_the_head_that_is_no_larger_than_rounding_is_noticed(weights):
    model = LanguageModel(language_model().lm.to(weights), torch.bfloat16)
    forward = type(model.lm).forward

    def with_a_slight_favorite(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits[..., 3] += 0.2
        return output

    model.lm.forward = types.MethodType(with_a_slight_favorite, model.lm)
    assert "full logits" in (model.check_head() or "")


def test_a_head_that_is_more_than_a_linear_layer_gets_full_logits():
    model, rows = language_model(), ragged_rows()
    model.lm.lm_head = nn.Sequential(model.lm.lm_head, nn.Tanh())
    assert "full logits" in (model.check_head() or "")
    assert_close(response_logprobs(model, rows), logprobs_of_own_logits(model.lm, rows), atol=1e-5, rtol=0)


def test_an_adapter_on_the_head_is_used_and_learns():
    rows = ragged_rows()
    lora = LoraConfig(rank=2, targets=["lm_head", "q_proj"])
    model = LanguageModel(add_lora(language_model(tie_word_embeddings=False).lm, lora, seed=0), torch.float32)
    adapter = model.lm.get_output_embeddings().lora_B["default"].weight
    nn.init.normal_(adapter)
    assert "full logits" in (model.check_head() or "")
    logprobs = response_logprobs(model, rows)
    assert_close(logprobs, logprobs_of_own_logits(model.lm, rows), atol=1e-5, rtol=0)
    logprobs.sum().backward()
    assert adapter.grad is not None
    assert adapter.grad.abs().max() > 0


def test_tied_embeddings_get_the_gradient_of_both_their_uses():
    rows = ragged_rows()
    model = language_model(tie_word_embeddings=True)
    embedding = model.lm.get_input_embeddings().weight
    assert embedding is model.lm.get_output_embeddings().weight
    response_logprobs(model, rows).sum().backward()
    ours = embedding.grad.clone()
    embedding.grad = None
    logprobs_of_own_logits(model.lm, rows).sum().backward()
    assert_close(ours, embedding.grad, atol=1e-4, rtol=1e-4)
