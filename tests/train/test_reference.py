"""The reference's log-probs: of the model that a run began from, kept with it, and never those of anything else."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from tether.config import LoraConfig, ModelConfig
from tether.errors import ModelError
from tether.models.policy import build_policy
from tether.runs import RunDirectory
from tether.train.reference import FILE, reference_logprobs
from tether.types import Rows
from tiny import random_ids, randomize
from tiny_ppo import tiny_config

CPU = torch.device("cpu")
RESPONSES = list(zip(random_ids([5, 1, 12, 3]), random_ids([6, 14, 3, 1], seed=1), strict=True))
TEMPERATURE = 0.7


@pytest.fixture
def run(tiny_model, tmp_path):
    with RunDirectory.open(tiny_config(tmp_path / "run", tiny_model()), command="ppo") as run:
        yield run


def ask(run, model, config, *, inputs=None, responses=RESPONSES, temperature=TEMPERATURE, tokens=30):
    return reference_logprobs(
        run, model, config, responses, inputs or {"model.policy": "a"}, temperature=temperature,
        microbatch_tokens=tokens,
    )  # fmt: skip


def build(directory, **settings):
    """(config, policy as a run begins with it, live reference)."""
    config = ModelConfig(policy=str(directory), **settings)
    policy, reference, _ = build_policy(config, device=CPU, seed=0)
    return config, policy, reference


@pytest.mark.parametrize("other", [False, True], ids=["as it begins", "another model"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "LoRA"])
def test_they_are_those_of_transformers_alone_and_of_the_live_reference(tiny_model, run, lora, other):
    directory, named = tiny_model("qwen3"), tiny_model("qwen3", seed=1)
    config, policy, live = build(directory, lora=lora, reference=str(named) if other else None)
    if lora:
        for name, parameter in policy.policy_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)  # which the reference must not see
    got = ask(run, policy.model, config)
    plain = AutoModelForCausalLM.from_pretrained(named if other else directory)
    rows = Rows.of([p for p, _ in RESPONSES], [r for _, r in RESPONSES])
    theirs = live.logprobs(rows, temperature=TEMPERATURE)
    for i, (prompt, response) in enumerate(RESPONSES):
        log_p = torch.log_softmax(plain(input_ids=torch.tensor([[*prompt, *response]])).logits[0] / TEMPERATURE, -1)
        want = torch.stack([log_p[len(prompt) + t - 1, token] for t, token in enumerate(response)])
        assert_close(got[i], want, atol=1e-5, rtol=0)
        assert_close(got[i], theirs[i, : len(response)], atol=1e-6, rtol=0)


def test_they_are_read_back_to_the_bit_once_the_policy_has_moved(tiny_model, run):
    config, policy, _ = build(tiny_model())
    first = ask(run, policy.model, config)
    randomize(policy.lm, std=0.2)
    assert all(torch.equal(a, b) for a, b in zip(ask(run, policy.model, config, tokens=10**6), first, strict=True))


@pytest.mark.parametrize("change", ["weights", "reference", "ids", "border", "temperature", "dtype"])
def test_what_they_depend_on_has_another_key(tiny_model, run, change):
    config, policy, _ = build(tiny_model())
    first = ask(run, policy.model, config)
    moved = copy.copy(policy.model)
    randomize(policy.lm, std=0.2)
    prompt, response = RESPONSES[0]
    changes = {
        "weights": {"inputs": {"model.policy": "b"}},
        "reference": {"inputs": {"model.policy": "a", "model.reference": "c"}},
        "ids": {"responses": [(prompt, [*response[:-1], response[-1] ^ 1]), *RESPONSES[1:]]},
        "border": {"responses": [(prompt[:-1], [prompt[-1], *response]), *RESPONSES[1:]]},
        "temperature": {"temperature": 1.0},
        "dtype": {},
    }
    if change == "dtype":
        moved.dtype = torch.bfloat16
    again = ask(run, moved, config, **changes[change])
    assert not torch.equal(again[1], first[1])


@pytest.mark.parametrize("damage", ["a byte", "half of it", "another file"])
def test_a_damaged_file_is_computed_again_and_that_is_said(tiny_model, run, capsys, damage):
    config, policy, _ = build(tiny_model())
    first, file = ask(run, policy.model, config), run.path / FILE
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes({"a byte": data, "half of it": data[: len(data) // 2], "another file": b"{}"}[damage])
    assert all(torch.equal(a, b) for a, b in zip(ask(run, policy.model, config), first, strict=True))
    assert "damaged" in capsys.readouterr().out
    randomize(policy.lm, std=0.2)
    assert torch.equal(ask(run, policy.model, config)[0], first[0])  # it was written again


def test_a_reference_with_another_vocabulary_is_refused(tiny_model, run):
    config, policy, _ = build(tiny_model())
    other = ModelConfig(policy=config.policy, reference=str(tiny_model(vocab_size=300)))
    with pytest.raises(ModelError, match=r"model\.reference=.* has a vocabulary of 300 tokens, the policy one of 258"):
        ask(run, policy.model, other)


def test_a_reference_whose_head_is_not_ours_is_told_as_ppo_tells_it(tiny_model, run, capsys):
    # its logits are capped by a key of its own: log-probs come from full logits
    odd = tiny_model(
        "recurrent_gemma", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        lru_width=32, block_types=["recurrent", "attention"], attention_window_size=16, logits_soft_cap=0.05,
    )  # fmt: skip
    config = ModelConfig(policy=str(tiny_model()), reference=str(odd))
    policy, _, notes = build_policy(config, device=CPU, seed=0)
    (note,) = notes
    assert "full logits" in note
    ask(run, policy.model, config)
    assert note in capsys.readouterr().out
    events = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [event["what"] for event in events if event["event"] == "fallback"] == [note]
