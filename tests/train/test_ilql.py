"""Implicit Q-learning runs: gradients, metrics, and what their final model does where answers are sampled."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import tether
from tether.cli import main
from tether.config import (
    EvaluateConfig,
    ILQLSection,
    LogConfig,
    LoraConfig,
    ModelConfig,
    OptimConfig,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    SamplingConfig,
    ScoredConfig,
)
from tether.models.policy import load_policy
from tether.train.ilql import accumulate, build_heads
from tiny import randomize, scored_answers

CPU = torch.device("cpu")
SECTION = QLearningSection(loss="ilql", ilql=ILQLSection(tau=0.7, gamma=0.9, cql=0.3, awac=0.6))


def policy_and_heads(directory, **settings):
    policy, _ = load_policy(ModelConfig(str(directory), **settings), device=CPU, seed=0, with_critic=False)
    heads = build_heads(policy, seed=0)
    for i, part in enumerate(heads.children()):
        randomize(part, seed=i, std=0.2)
    return policy, heads


def test_the_metrics_and_gradients_of_a_step_are_those_of_a_slow_reference(tiny_model):
    # in float64, answer by answer, off the whole logits of transformers' own model and the whole outputs of the heads
    policy, heads = policy_and_heads(tiny_model())
    got = accumulate(policy, heads, scored_answers(), SECTION)
    model, slow = copy.deepcopy(policy.lm).double(), copy.deepcopy(heads).double()
    for p in (*model.parameters(), *slow.parameters()):
        p.grad = None
    tokens = sum(len(a.response_ids) for a in scored_answers())
    s, sums = SECTION.ilql, {"residual": 0.0, "expectile": 0.0, "cql": 0.0, "nll": 0.0, "advantage": 0.0, "value": 0.0}
    returns, values = [], []

    def of(head: nn.Module, h):
        return head.last(head.first(h).relu())

    for answer in scored_answers():
        ids, start, n = [*answer.prompt.ids, *answer.response_ids], len(answer.prompt.ids), len(answer.response_ids)
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        h, at = output.hidden_states[-1][0, start - 1 : start - 1 + n], torch.tensor(answer.response_ids)
        v = of(slow.value, h)[:, 0]
        target_q = torch.minimum(of(slow.target_q1, h), of(slow.target_q2, h))[range(n), at].detach()
        wanted = [answer.score if t == n - 1 else s.gamma * float(v[t + 1].detach()) for t in range(n)]
        for head in (slow.q1, slow.q2):
            q = of(head, h)
            sums["residual"] += sum((q[t, at[t]] - wanted[t]) ** 2 for t in range(n)) / tokens
            sums["cql"] += nn.functional.cross_entropy(q, at, reduction="sum") / tokens
        for t in range(n):
            weight = 1 - s.tau if target_q[t] < v[t] else s.tau
            sums["expectile"] += weight * (target_q[t] - v[t]) ** 2 / tokens
            returns.append(answer.score * s.gamma ** (n - 1 - t))
        logits = output.logits[0, start - 1 : start - 1 + n]
        sums["nll"] += nn.functional.cross_entropy(logits, at, reduction="sum") / tokens
        sums["advantage"] += float((target_q - v).sum()) / tokens
        values += v.tolist()
    loss = sums["residual"] + sums["expectile"] + s.cql * sums["cql"] + s.awac * sums["nll"]
    loss.backward()
    r, v = torch.tensor(returns), torch.tensor(values)
    assert got == {
        "qlearning/loss": pytest.approx(float(loss), rel=1e-5),
        "qlearning/residual": pytest.approx(float(sums["residual"] / 2) ** 0.5, rel=1e-5),
        "qlearning/expectile_loss": pytest.approx(float(sums["expectile"]), rel=1e-5),
        "qlearning/cql_loss": pytest.approx(float(sums["cql"]), rel=1e-5),
        "qlearning/nll": pytest.approx(float(sums["nll"]), rel=1e-5),
        "qlearning/advantage": pytest.approx(sums["advantage"], rel=1e-4),
        "value/mean": pytest.approx(float(v.mean()), rel=1e-4),
        "value/explained_variance": pytest.approx(float(1 - (r - v).var(correction=0) / r.var(correction=0)), rel=1e-4),
        "tokens/trained": float(tokens),
    }
    for ours, theirs in ((policy.lm, model), (heads, slow)):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if p.grad is None or q.grad is None:
                assert p.grad is q.grad is None, name
                assert name.startswith("target"), name
            else:
                assert_close(p.grad.double(), q.grad, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("settings", [{}, {"lora": LoraConfig(rank=2)}, {"gradient_checkpointing": True}], ids=str)
def test_microbatches_change_no_gradient(tiny_model, settings):
    policy, heads = policy_and_heads(tiny_model("qwen3"), **settings)
    found = []
    for tokens in (1, 20, 10_000):
        metrics = accumulate(policy, heads, scored_answers(), replace(SECTION, microbatch_tokens=tokens))
        named = [*policy.policy_parameters(), *heads.trained()]
        found.append((metrics, torch.cat([p.grad.flatten() for _, p in named])))
        for _, p in named:
            p.grad = None
    for metrics, gradient in found[1:]:
        assert metrics == pytest.approx(found[0][0], rel=1e-5)
        assert float((gradient - found[0][1]).norm() / found[0][1].norm()) <= 1e-6


# ---------------------------------------------------------------- runs


def bandit(tmp_path, model, **section) -> QLearningConfig:
    """One prompt, two answers: b, which scores 1, is in every fourth row; c, which scores 0, in the others."""
    rows = [{"prompt": "a", "completion": "b" if i % 4 == 0 else "c", "score": float(i % 4 == 0)} for i in range(32)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "tau": 0.9,
        "gamma": 1.0,
        "cql": 0.0,
        "polyak": 0.5,
        "sync_every": 2,
        "strength": 8.0,
        "top_k": 2,
    }  # b and c: without CQL, Q of others is a guess
    return QLearningConfig(
        run=str(tmp_path / "run"), device="cpu", model=ModelConfig(policy=str(model)),
        data=ScoredConfig(path=str(tmp_path / "scored.jsonl")), optim=OptimConfig(lr=2e-3, critic_lr=5e-3),
        qlearning=QLearningSection(loss="ilql", epochs=80, batch=16, ilql=ILQLSection(**settings | section)),
        log=LogConfig(tensorboard=False),
    )  # fmt: skip


def reward(prompts, completions):
    return [float(c.startswith("b")) for c in completions]


def test_the_final_model_imitates_the_data_and_its_heads_choose_the_better_answer(tiny_model, tmp_path, capsys):
    run = tether.qlearning(bandit(tmp_path, tiny_model()))
    assert not (run.path / "reference.safetensors").exists()  # no pass for a reference that nothing reads
    heads = load_file(run.final / "ilql" / "heads.safetensors")
    assert {name.split(".")[0] for name in heads} == {"value", "target_q1", "target_q2"}
    row = run.rollouts(run.rollout_cycles[-1]).to_pylist()[0]
    # V before the first token is the .9-expectile of a coin of ¼, and Q of b is 1
    assert row["value"][0] == pytest.approx(0.75, abs=0.1)
    assert row["q"][0] == pytest.approx(1.0, abs=0.1)
    assert row["advantage"][0] == pytest.approx(row["q"][0] - row["value"][0], abs=1e-6)

    def share(strength):
        found = tether.generate(run.final, ["a"], samples=200, max_new_tokens=2, strength=strength)
        return sum(reward(None, [g.completion for g in found])) / 200

    assert share(0.0) == pytest.approx(0.25, abs=0.1)
    assert share(None) > 0.95  # the strength it was saved with
    assert "sampled with its Q-learning heads, strength 8, top_k 2" in capsys.readouterr().err
    assert main(["generate", str(run.final), "--prompt", "a", "--strength", "0", "--max-new-tokens", "2"]) == 0

    config = EvaluateConfig(
        [str(run.final)], PromptsConfig(str(tmp_path / "scored.jsonl"), limit=4), baseline=str(tiny_model()),
        samples=32, device="cpu", sampling=SamplingConfig(max_new_tokens=2),
    )  # fmt: skip
    base, found = tether.evaluate(config, reward=reward).results
    assert found.score.mean > 0.95 > base.score.mean
    assert (base.strength, found.strength) == (None, 8.0)
    other = EvaluateConfig(
        [str(tiny_model(seed=1))], config.prompts, baseline=str(run.final), samples=32, device="cpu",
        sampling=config.sampling,
    )  # fmt: skip
    base, far = tether.evaluate(other, reward=reward).results
    assert base.kl.mean == 0
    assert far.kl is None
    assert "never come from the baseline's likeliest tokens" in far.note
    assert found.kl.mean > 0  # of what was sampled from, not of the language model alone

    exported = tether.export(run, tmp_path / "exported")
    assert not (exported / "ilql").exists()
    assert "is the language model alone" in capsys.readouterr().err
    assert "was exported without `ilql/`" in (exported / "README.md").read_text()
    page = tether.report(run).read_text()
    assert "Q-learning (ilql)" in page
    assert "min Q̄ − V" in page
    assert "where the clip cut" not in page  # there is none

    # whoever goes on from it is told what is left out
    _, notes = load_policy(ModelConfig(str(run.final)), device=CPU, seed=0)
    assert any("Q-learning heads (ilql/), which this run leaves out" in note for note in notes)


def test_targets_are_synced_by_the_count_of_steps(tiny_model, tmp_path, monkeypatch):
    from tether.models.ilql import ILQLHeads

    counts = []
    monkeypatch.setattr(ILQLHeads, "sync", lambda self, polyak: counts.append(polyak))
    config = bandit(tmp_path, tiny_model(), sync_every=3, polyak=0.25)
    tether.qlearning(replace(config, qlearning=replace(config.qlearning, epochs=4)))  # 8 steps
    assert counts == [1.0, 0.25, 0.25]  # the first as the heads are made


def test_a_strength_for_a_model_without_heads_is_refused(tiny_model):
    with pytest.raises(tether.ConfigError, match=r"has no heads of Q-learning \(ilql/\) beside it"):
        tether.generate(tiny_model(), ["a"], strength=1.0)
    with pytest.raises(tether.ConfigError, match=r"strength=-1 is not 0 or more"):
        tether.generate(tiny_model(), ["a"], strength=-1)
