"""A step on tensors without data: counts against real models, and memory against what can be worked out by hand."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tether.config import LoraConfig
from tether.diagnose.simulate import Shape, _Meter, simulate
from tether.models.loading import add_lora

ARCHITECTURES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "cohere"]
SHAPE = Shape(rows=2, width=24, targets=16)


def config_of(directory: Path):
    return AutoConfig.from_pretrained(directory)


def test_the_meter_counts_what_is_alive_and_each_storage_once():
    x = torch.zeros(1000)  # 4,000 bytes, known before
    meter = _Meter([x])
    with meter:
        a = x + 1
        view = a[10:].view(-1, 2).T
        b = a * 2
        assert meter.now == 8_000
        del a, view
        assert meter.now == 4_000
        x.add_(b)  # in place: nothing new
        c = b.double()
        assert meter.now == 12_000
    del b, c
    assert (meter.now, meter.peak) == (0, 12_000)


def test_a_matrix_product_keeps_its_input_and_nothing_else_for_the_backward_pass():
    # y = relu(x·W); backward of the sum: y's gradient, then W's. x 64 x 32, W 32 x 16, all fp32
    x, w = torch.zeros(64, 32), torch.zeros(32, 16, requires_grad=True)
    w.grad = torch.zeros_like(w)
    meter = _Meter([x, w, w.grad])
    with meter:
        y = (x @ w).relu()
        assert meter.now == 64 * 16 * 4  # the product itself is gone: relu keeps its result
        y.sum().backward()
    assert meter.peak <= 3 * 64 * 16 * 4 + 32 * 16 * 4 + 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_simulated_and_has_as_many_weights_as_the_real_one(tiny_model, architecture):
    directory = tiny_model(architecture)
    real = AutoModelForCausalLM.from_pretrained(directory)
    step = simulate(config_of(directory), SHAPE, dtype=torch.float32)
    assert step.parameters == step.trained == sum(p.numel() for p in real.parameters())
    assert step.weights == 4 * step.parameters
    assert step.activations > 2 * 24 * 32 * 4 * 2  # a hidden state a layer, at the least


def test_under_lora_the_base_is_in_the_compute_precision_and_only_adapters_are_trained(tiny_model):
    directory = tiny_model("llama")
    real = add_lora(AutoModelForCausalLM.from_pretrained(directory), LoraConfig(rank=4), seed=0)
    adapters, everything = real.get_nb_trainable_parameters()
    step = simulate(config_of(directory), SHAPE, dtype=torch.bfloat16, lora=LoraConfig(rank=4))
    assert step.trained == adapters
    assert step.weights == 2 * (everything - adapters) + 4 * adapters


def test_on_a_gpu_the_heads_weight_stays_in_bfloat16_where_a_cpu_needs_it_in_fp32(tiny_model):
    config = config_of(tiny_model("llama"))
    config.vocab_size = 100_000  # width 32: the weight's copy is what matters
    cpu, gpu = (
        simulate(config, Shape(1, 4, 2), dtype=torch.bfloat16, lora=LoraConfig(rank=1), device=d).activations
        for d in ("cpu", "cuda")
    )
    assert cpu - gpu == pytest.approx(4 * 100_000 * 32, rel=0.05)


def test_on_a_gpu_logits_come_in_larger_chunks(tiny_model):
    config = config_of(tiny_model("llama"))
    config.vocab_size = 250_000  # more than is kept for the backward pass
    cpu, gpu = (
        simulate(config, Shape(2, 101, 100), dtype=torch.float32, device=d).activations for d in ("cpu", "cuda")
    )
    # fp32 logits of all 200 tokens at once, where a CPU has 32, the least; beside them at least their softmax
    assert gpu - cpu > 2 * 4 * 250_000 * (200 - 32)


def test_a_critic_of_its_own_is_counted_apart_and_has_activations_of_its_own(tiny_model):
    config = config_of(tiny_model("llama"))
    alone, both = (simulate(config, SHAPE, dtype=torch.float32, critic=c) for c in (None, config))
    assert both.trained == alone.trained
    assert both.critic == AutoModelForCausalLM.from_config(config).base_model.num_parameters()
    assert both.activations > alone.activations


def test_rows_cost_in_proportion_checkpointing_saves_and_nothing_real_is_allocated(tiny_model):
    config = config_of(tiny_model("llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=8))
    one, two = (simulate(config, Shape(rows, 100, 50), dtype=torch.float32).activations for rows in (8, 16))
    assert 1.6 < two / one < 2.1
    saved = simulate(config, Shape(16, 100, 50), dtype=torch.float32, checkpointing=True).activations
    assert saved < 0.6 * two
    half = simulate(config, Shape(16, 100, 50), dtype=torch.bfloat16).activations
    assert half < 0.8 * two
