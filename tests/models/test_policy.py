"""Policy, reference and critic as a config asks for them: which weights, in which precision, and who learns."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from conftest import ARCHITECTURES
from tether.config import LoraConfig, ModelConfig
from tether.errors import ModelError
from tether.models.policy import build_policy
from tether.models.reward_model import init_reward_model, save_reward_model
from tiny import ragged, ragged_rows, randomize

CPU = torch.device("cpu")


def build(directory, **settings):
    policy, reference, notes = build_policy(ModelConfig(policy=str(directory), **settings), device=CPU, seed=0)
    whole_critic = bool(settings.get("lora")) and settings.get("critic", "shared") != "shared"
    assert ["separate critic's own trunk is trained whole, in float32" in note for note in notes] == [
        True
    ] * whole_critic
    return policy, reference


def randomize_adapter(policy) -> None:
    for name, parameter in policy.policy_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)


# ---------------------------------------------------------------- reference


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_the_reference_stays_what_the_policy_was_however_far_that_has_gone(tiny_model, lora):
    directory, rows = tiny_model("qwen3"), ragged_rows()
    policy, reference = build(directory, lora=lora)
    start = policy(rows, temperature=0.7).logprobs
    if lora:
        randomize_adapter(policy)
    else:
        randomize(policy.lm, std=0.2)
    assert not torch.allclose(policy(rows, temperature=0.7).logprobs, start, atol=1e-2)

    plain = AutoModelForCausalLM.from_pretrained(directory)
    log_p = torch.log_softmax(plain(input_ids=rows.tokens).logits / 0.7, -1)
    got = ragged(reference.logprobs(rows, temperature=0.7), rows)
    for row, (p, r) in enumerate(zip(rows.prompt_lengths.tolist(), rows.response_lengths.tolist(), strict=True)):
        want = [log_p[row, p + t - 1, rows.tokens[row, p + t]] for t in range(r)]
        assert_close(got[row], torch.stack(want), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_asking_the_reference_leaves_the_policy_learning(tiny_model, lora):
    policy, reference = build(tiny_model(), lora=lora)
    before = [name for name, _ in policy.policy_parameters()]
    logprobs = policy(ragged_rows(), temperature=1.0).logprobs
    reference.logprobs(ragged_rows(), temperature=1.0)  # between forward and backward, as in a cycle
    logprobs.sum().backward()
    assert [name for name, _ in policy.policy_parameters()] == before
    assert policy.lm.training
    learning = [name for name, p in policy.policy_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert learning
    assert not any(p.grad is not None for name, p in policy.lm.named_parameters() if f"lm.{name}" not in before)


def test_a_reference_of_its_own_is_loaded(tiny_model):
    rows = ragged_rows()
    policy, reference = build(tiny_model(seed=0), reference=str(tiny_model(seed=1)))
    other, _ = build(tiny_model(seed=1))
    assert_close(reference.logprobs(rows, temperature=1.0), other(rows, temperature=1.0).logprobs.detach())
    assert not torch.allclose(reference.logprobs(rows, temperature=1.0), policy(rows, temperature=1.0).logprobs)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("how", ["copied", "named", "lora"])
def test_in_bfloat16_the_first_log_ratios_are_exactly_zero(tiny_model, architecture, how):
    directory = tiny_model(architecture, initializer_range=0.3)
    settings = {"copied": {}, "named": {"reference": str(directory)}, "lora": {"lora": LoraConfig(rank=2)}}[how]
    policy, reference = build(directory, dtype="bfloat16", **settings)
    rows = ragged_rows()
    with torch.no_grad():
        ratios = policy(rows, temperature=0.7).logprobs - reference.logprobs(rows, temperature=0.7)
    assert ratios.abs().max() == 0


def test_a_reference_with_another_vocabulary_is_refused(tiny_model):
    with pytest.raises(ModelError, match=r"model\.reference=.* vocabulary of 300 tokens, the policy one of 258"):
        build(tiny_model(), reference=str(tiny_model(vocab_size=300)))


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_trained_is_float32_and_what_is_frozen_is_in_the_compute_precision(tiny_model, dtype):
    compute = getattr(torch, dtype)
    for lora in (None, LoraConfig(rank=2)):
        policy, reference = build(tiny_model(), lora=lora, dtype=dtype, critic="separate")
        assert {p.dtype for _, p in policy.policy_parameters() + policy.critic_parameters()} == {torch.float32}
        frozen = [p for p in policy.lm.parameters() if not p.requires_grad]
        if reference.frozen:  # its embeddings and norms are as the policy's: see the first log-ratios
            embedding = reference.frozen.lm.get_input_embeddings().weight
            frozen += [p for p in reference.frozen.lm.parameters() if p.ndim > 1 and p is not embedding]
        assert {p.dtype for p in frozen} == {compute}
        assert not any(p.requires_grad for p in (reference.frozen.lm.parameters() if reference.frozen else ()))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_bfloat16_stays_near_float32_and_its_log_probs_and_values_are_float32(tiny_model, lora):
    directory, rows = tiny_model(), ragged_rows()
    exact, _ = build(directory, lora=lora)
    policy, reference = build(directory, lora=lora, dtype="bfloat16")
    for p in (exact, policy):
        randomize(p.value_head)
    want, got = exact(rows, temperature=1.0), policy(rows, temperature=1.0)
    assert {x.dtype for x in got} == {torch.float32}
    for a, b in zip(got, want, strict=True):
        assert 0 < (a - b).abs().max() < 0.1
    assert (reference.logprobs(rows, temperature=1.0) - want.logprobs).abs().max() < 0.1


# ---------------------------------------------------------------- critic


def test_a_new_critic_says_zero_of_everything(tiny_model):
    for critic in ("shared", "separate"):
        policy, _ = build(tiny_model(), critic=critic)
        assert policy(ragged_rows(), temperature=1.0).values.eq(0).all()


def test_a_separate_critic_has_a_trunk_of_its_own_that_begins_as_the_policys(tiny_model):
    rows = ragged_rows()
    policy, _ = build(tiny_model(), critic="separate")
    theirs = policy.critic.trunk.state_dict()
    for name, weight in policy.lm.base_model.state_dict().items():
        assert torch.equal(theirs[name], weight)
        assert theirs[name].data_ptr() != weight.data_ptr()
    randomize(policy.critic.head)
    policy(rows, temperature=1.0).values.sum().backward()
    assert all(p.grad is None for p in policy.lm.parameters())
    assert all(p.grad is not None for p in policy.critic.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_a_critic_from_a_reward_model_says_its_normalized_score_of_every_prefix(
    architecture, tiny_model, tiny_tokenizer, tmp_path
):
    directory, rows = tiny_model(architecture), ragged_rows()
    scorer = init_reward_model(str(directory), dtype=torch.float32, weights_dtype=torch.float32, device=CPU, seed=3)
    scorer.mean, scorer.std = 0.5, 2.0
    save_reward_model(scorer, copy.deepcopy(tiny_tokenizer), tmp_path / "rm", stop_id=1)
    policy, _ = build(directory, critic=str(tmp_path / "rm"))
    values = policy(rows, temperature=1.0).values

    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    for row, (p, r) in enumerate(zip(rows.prompt_lengths.tolist(), rows.response_lengths.tolist(), strict=True)):
        for t in range(r):
            prefix = rows.tokens[row : row + 1, : p + t]
            hidden = stock.base_model(input_ids=prefix).last_hidden_state[:, -1]
            assert_close(values[row, t], (stock.score(hidden)[0, 0] - 0.5) / 2.0, atol=1e-5, rtol=1e-5)


def test_a_critic_can_be_another_runs_critic(tiny_model, tmp_path):
    directory, rows = tiny_model(), ragged_rows()
    policy, _ = build(directory, critic="separate")
    randomize(policy.critic, std=0.2)
    policy.save_critic(tmp_path / "critic")
    other, _ = build(directory, critic=str(tmp_path / "critic"))
    assert_close(other(rows, temperature=1.0).values, policy(rows, temperature=1.0).values)


def test_a_critic_with_another_vocabulary_is_refused(tiny_model):
    with pytest.raises(ModelError, match=r"model\.critic=.* vocabulary of 300 tokens, the policy one of 258"):
        build(tiny_model(), critic=str(tiny_model(vocab_size=300)))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_critic_comes_back_bit_for_bit(tiny_model, tmp_path, critic):
    policy, _ = build(tiny_model(), critic=critic)
    for name, parameter in policy.critic_parameters():
        torch.nn.init.normal_(parameter)
        assert name.startswith("critic.")
    policy.save_critic(tmp_path)
    other, _ = build(tiny_model(), critic=critic)
    other.load_critic(tmp_path)
    for (_, a), (_, b) in zip(policy.critic_parameters(), other.critic_parameters(), strict=True):
        assert torch.equal(a, b)
    assert "weight" in load_file(tmp_path / "value_head.safetensors")


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_go_on_every_linear_layer_but_the_head(tiny_model, architecture):
    policy, _ = build(tiny_model(architecture), lora=LoraConfig(rank=2))
    adapted = [name for name, _ in policy.policy_parameters() if "lora_A" in name]
    assert len(adapted) >= 2 * 4
    assert not any("head" in name or "embed" in name for name in adapted)
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.lm.named_parameters())


def test_the_same_seed_gives_the_same_adapter(tiny_model):
    directory = tiny_model()
    a, b = (build(directory, lora=LoraConfig(rank=2))[0].policy_parameters() for _ in range(2))
    for (_, x), (_, y) in zip(a, b, strict=True):
        assert torch.equal(x, y)
