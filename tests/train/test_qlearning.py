"""Q-learning runs: gradients, metrics, what they leave behind, and that they go on as if nothing had happened."""

import copy
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import tether
from resume import launch, steady, wait_for_step
from tether.config import (
    CheckpointConfig,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    QLearningConfig,
    QLearningSection,
    ScoredConfig,
)
from tether.config.reading import to_yaml
from tether.data.scored import load_scored
from tether.models.policy import build_policy
from tether.train.bellman import accumulate
from tether.types import Rows
from tiny import randomize, scored_answers

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))
import exact

CPU = torch.device("cpu")
SECTION = QLearningSection(beta=0.5, lam=0.9)


def policy_and_references(directory, **settings):
    """A policy whose value head says something and whose weights have left the reference, and log-probs of that."""
    policy, reference, _ = build_policy(ModelConfig(str(directory), **settings), device=CPU, seed=0)
    found = scored_answers()
    rows = Rows.of([a.prompt.ids for a in found], [a.response_ids for a in found])
    refs = reference.logprobs(rows, temperature=1.0)
    randomize(policy.critic.head if policy.critic else policy.value_head)
    with torch.no_grad():
        for _, p in policy.policy_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    return policy, [row[:n] for row, n in zip(refs, rows.response_lengths.tolist(), strict=True)]


def test_the_metrics_of_a_step_are_those_of_a_slow_reference(tiny_model):
    # in float64, token by token, off the whole logits of transformers' own model
    policy, references = policy_and_references(tiny_model())
    got = accumulate(policy, scored_answers(), references, SECTION)
    model, head = copy.deepcopy(policy.lm).double(), copy.deepcopy(policy.value_head).double()
    residuals, values, log_ratios = [], [], []
    for answer, ref in zip(scored_answers(), references, strict=True):
        ids, start, n = [*answer.prompt.ids, *answer.response_ids], len(answer.prompt.ids), len(answer.response_ids)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
            logprobs = output.logits[0].log_softmax(-1)
            v = [float(head(output.hidden_states[-1][0, start + t - 1])) for t in range(n)] + [0.0]
        ratio = [float(logprobs[start + t - 1, ids[start + t]]) - float(ref[t]) for t in range(n)]
        r = [-SECTION.beta * x for x in ratio]
        r[-1] += answer.score
        after = 0.0
        for t in reversed(range(n)):
            after = r[t] + v[t + 1] - v[t] + SECTION.lam * after
            residuals.append(after)
            values.append(v[t])
        log_ratios.append(sum(ratio))
    tokens = len(residuals)
    returns = torch.tensor(residuals) + torch.tensor(values)
    g = [a.score - SECTION.beta * x for a, x in zip(scored_answers(), log_ratios, strict=True)]
    assert got == {
        "qlearning/loss": pytest.approx(sum(a * a for a in residuals) / 2 / tokens, rel=1e-5),
        "qlearning/residual": pytest.approx(math.sqrt(sum(a * a for a in residuals) / tokens), rel=1e-5),
        "qlearning/g_std": pytest.approx(abs(g[0] - g[3]) / math.sqrt(2), rel=1e-5),  # one prompt has two answers
        "qlearning/log_ratio": pytest.approx(sum(log_ratios) / 4, rel=1e-4),
        "value/mean": pytest.approx(sum(values) / tokens, rel=1e-5),
        "value/explained_variance": pytest.approx(
            float(1 - torch.tensor(residuals).var(correction=0) / returns.var(correction=0)), rel=1e-4
        ),
        "tokens/trained": 24.0,
    }


@pytest.mark.parametrize("settings", [{}, {"critic": "separate"}, {"lora": LoraConfig(rank=2)}], ids=str)
def test_microbatches_change_no_gradient(tiny_model, settings):
    policy, references = policy_and_references(tiny_model("qwen3"), **settings)
    found = []
    for tokens in (1, 20, 10_000):
        metrics = accumulate(policy, scored_answers(), references, replace(SECTION, microbatch_tokens=tokens))
        named = [*policy.policy_parameters(), *policy.critic_parameters()]
        found.append((metrics, torch.cat([p.grad.flatten() for _, p in named])))
        for _, p in named:
            p.grad = None
    for metrics, gradient in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5)
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) <= 1e-6


# ---------------------------------------------------------------- runs


@pytest.fixture
def data(tmp_path):
    """24 answers to three prompts; those that hold an x are the better ones."""
    rows = [
        {"prompt": p, "completion": c, "score": c.count("x") - 0.5, "finish_reason": "stop" if i % 3 else "length"}
        for p in ("a", "bc", "def") for i, c in enumerate(["x", "xy", "yx", "yy", "y", "zzzz", "xzx", "zx"])
    ]  # fmt: skip
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_for(run, model, data, **section) -> QLearningConfig:
    return QLearningConfig(
        run=str(run), device="cpu", model=ModelConfig(policy=str(model)), data=ScoredConfig(path=str(data)),
        qlearning=QLearningSection(**{"epochs": 2, "batch": 4, **section}), optim=OptimConfig(lr=1e-3),
        log=LogConfig(tensorboard=False),
    )  # fmt: skip


VARIANTS = {
    "full": {},
    "LoRA": {"lora": LoraConfig(rank=2)},
    "separate critic": {"critic": "separate"},
    "bfloat16": {"dtype": "bfloat16"},
}
IMPLICIT = {  # with heads, their targets, and the steps since these were synced
    "ilql": {},
    "ilql, LoRA": {"lora": LoraConfig(rank=2)},
    "ilql, bfloat16": {"dtype": "bfloat16"},
    "ilql, checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_leaves_a_plain_model_with_its_critic_and_every_number_of_its_tokens(tiny_model, data, tmp_path, variant):
    model = tiny_model("qwen3", vocab_size=264)
    config = config_for(tmp_path / "run", model, data)
    config = replace(config, model=replace(config.model, **VARIANTS[variant]))
    run = tether.qlearning(config)
    first = run.metrics[0]
    assert len(run.metrics) == 12
    # the policy as it begins is the reference, but for the order in which other batches are summed
    assert abs(first["qlearning/log_ratio"]) <= (2e-2 if variant == "bfloat16" else 1e-5)
    assert first["value/mean"] == 0
    assert not (run.final / "adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(run.final).generation_config.eos_token_id == 1
    # rollouts/ of the last step hold what final/ and its critic say
    separate = variant == "separate critic"
    last = ModelConfig(str(run.final), critic=str(run.final / "critic") if separate else "shared", dtype="float32")
    policy, _, _ = build_policy(last, device=CPU, seed=0)
    if not separate:
        policy.load_critic(run.final / "critic")
    rows = run.rollouts(12).to_pylist()
    assert len(rows) == 24
    tolerance = 0.1 if variant == "bfloat16" else 1e-4
    for row in rows[:6]:
        tokens = Rows.of([row["prompt_token_id"]], [row["token_id"]])
        with torch.no_grad():
            output = policy(tokens, temperature=1.0)
        assert_close(torch.tensor([row["value"]]), output.values, atol=tolerance, rtol=0)
        assert_close(torch.tensor([row["old_logprob"]]), output.logprobs, atol=tolerance, rtol=0)
        assert sum(row["reward"]) == pytest.approx(row["score"] - config.qlearning.beta * row["kl"], abs=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    assert {tokenizer.decode(row["token_id"]) for row in rows} >= {"xy<eos>", "yy"}  # stopped, and cut


@pytest.mark.parametrize("variant", IMPLICIT)
def test_an_implicit_run_leaves_a_plain_model_with_its_heads_and_every_number(tiny_model, data, tmp_path, variant):
    config = config_for(tmp_path / "run", tiny_model("qwen3", vocab_size=264), data, loss="ilql")
    run = tether.qlearning(replace(config, model=replace(config.model, **IMPLICIT[variant])))
    assert len(run.metrics) == 12
    assert run.metrics[0]["value/mean"] == 0
    assert not (run.final / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(run.final)
    heads = load_file(run.final / "ilql" / "heads.safetensors")
    tolerance = 0.1 if variant == "ilql, bfloat16" else 1e-4
    for row in run.rollouts(12).to_pylist()[:6]:
        n, ids = row["length"], [*row["prompt_token_id"], *row["token_id"]]
        before, chosen = slice(len(ids) - n - 1, len(ids) - 1), (range(n), row["token_id"])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0, before]

        def outputs(name, hidden=hidden):
            features = hidden @ heads[f"{name}.first.weight"].T + heads[f"{name}.first.bias"]
            return features.relu() @ heads[f"{name}.last.weight"].T + heads[f"{name}.last.bias"]

        value, q = outputs("value")[:, 0], torch.minimum(outputs("target_q1"), outputs("target_q2"))[chosen]
        logprobs = output.logits[0, before].log_softmax(-1)[chosen]
        for column, want in (("value", value), ("q", q), ("advantage", q - value), ("old_logprob", logprobs)):
            assert_close(torch.tensor(row[column]), want, atol=tolerance, rtol=0)
        assert row["reward"] == [0.0] * (n - 1) + [row["score"]]
        assert row["kl"] is None


@pytest.mark.parametrize("variant", [*VARIANTS, *IMPLICIT])
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(tiny_model, data, tmp_path, variant):
    model = tiny_model("llama", num_hidden_layers=4, hidden_size=64)
    loss = "ilql" if variant in IMPLICIT else "bellman"
    config = config_for(tmp_path / "whole", model, data, epochs=4, batch=4, loss=loss)
    settings = replace(config.model, **(VARIANTS | IMPLICIT)[variant])
    config = replace(config, checkpoint=CheckpointConfig(every=5), model=settings)
    whole = tether.qlearning(config)
    config = replace(config, run=str(tmp_path / "killed"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    for step in (7, 13):
        process = launch("qlearning", tmp_path / "c.yaml")
        wait_for_step(tmp_path / "killed", step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    killed = tether.qlearning(config)
    assert steady(killed) == steady(whole)
    assert len(steady(whole)) == 24
    names = ["model.safetensors", "ilql/heads.safetensors" if loss == "ilql" else "critic/value_head.safetensors"]
    names += ["critic/model.safetensors"] if variant == "separate critic" else []
    for name in names:
        assert (killed.final / name).read_bytes() == (whole.final / name).read_bytes()
    rollouts = [run.rollouts(24).drop_columns("sampler_logprob") for run in (killed, whole)]  # NaN: nobody knows them
    assert rollouts[0].equals(rollouts[1])


def test_a_run_is_not_continued_on_other_rollouts(tiny_model, data, tmp_path):
    from tiny_ppo import id_score, tiny_config

    model = tiny_model()
    sampled = tether.ppo(tiny_config(tmp_path / "ppo", model, evaluate={"every": 0}), reward=id_score)
    config = config_for(tmp_path / "run", model, data, epochs=1)
    config = replace(config, data=ScoredConfig([str(data), str(sampled.path)]))
    run = tether.qlearning(config)
    assert set(run.environment["inputs"]) == {"model.policy", "data.path[0]", "data.path[1]"}
    (sampled.path / "rollouts" / "cycle-000004.parquet").unlink()
    with pytest.raises(tether.RunError, match=r"data\.path\[1\] has other content"):
        tether.qlearning(config)


def test_the_stop_tokens_of_a_replayed_run_end_the_answers_of_the_model_that_learned_from_it(tiny_model, tmp_path):
    from tiny_ppo import STOPS, id_score, tiny_config

    model = tiny_model()
    sampled = tether.ppo(tiny_config(tmp_path / "ppo", model, evaluate={"every": 0}), reward=id_score)
    cycles = [sampled.rollouts(cycle).to_pylist() for cycle in sampled.rollout_cycles]
    told = {tuple(row["token_id"]): row for rows in cycles for row in rows}
    ended = sorted({ids[-1] for ids, row in told.items() if row["finish_reason"] == "stop"})
    assert len(ended) > 1
    assert set(ended) <= set(STOPS)
    run = tether.qlearning(config_for(tmp_path / "run", model, sampled.path, epochs=1))
    assert AutoModelForCausalLM.from_pretrained(run.final).generation_config.eos_token_id == [1, *ended]  # 1: <eos>
    (cycle,) = run.rollout_cycles
    rows = run.rollouts(cycle).to_pylist()
    assert len(rows) == 32
    for row in rows:
        theirs = told[tuple(row["token_id"])]
        assert (row["text"], row["completion"]) == (theirs["text"], theirs["completion"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    again = load_scored(ScoredConfig(str(run.path)), tokenizer, stop_id=1)
    assert [answer.response_ids for answer in again] == [row["token_id"] for row in rows]


def test_another_models_vocabulary_is_refused_as_a_reference(tiny_model, data, tmp_path):
    config = config_for(tmp_path / "run", tiny_model(), data)
    config = replace(config, model=replace(config.model, reference=str(tiny_model(vocab_size=300))))
    with pytest.raises(tether.ModelError, match="has a vocabulary of 300 tokens, the policy one of 258"):
        tether.qlearning(config)


@pytest.mark.learning
def test_from_uniform_data_the_bandits_optimum_is_learned_with_its_value(seed, record_property):
    result = exact.run_bellman("E1 β=.5", seed=seed, cycles=8)
    for name in ("kl_to_optimum", "value_rmse"):
        record_property(name, result[name])
    assert result["kl_to_optimum"] <= 0.005
    assert result["value_rmse"] <= 0.05
