"""Reward models: the loss is Bradley–Terry's, scores come out on a known scale, and a killed run goes on."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tether
from conftest import ARCHITECTURES
from resume import launch, steady, wait_for_step
from tether.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    RewardConfig,
    RewardModelSection,
    SFTModelConfig,
)
from tether.config.reading import to_yaml
from tether.data.pairs import Pair
from tether.diagnose import dry_run, examine
from tether.errors import DataError, TrainingError
from tether.models.reward_model import init_reward_model, load_reward_model
from tether.train.optim import shuffled_batches
from tether.train.reward import accumulate, finish, reward_model

CPU = torch.device("cpu")
EOS = 1
PAIRS = [
    Pair([5, 6], [7, 8, EOS], [9, EOS], 0, "a"),
    Pair([10], [11, EOS], [12, 13, 14, 15, 16, EOS], 1, "b"),
    Pair([20, 21, 22, 23, 24], [EOS], [25, EOS], 2, "c"),
]


def double(path):
    """Weights large enough that everything matters, in float64, so that only the arithmetic can differ."""
    model = init_reward_model(str(path), dtype=torch.float32, weights_dtype=torch.float64, device=CPU, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in model.parameters():
            if p.dim() > 1:
                p.data.normal_(0, 0.2)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("microbatch_tokens", [1, 20, 10**6])
def test_gradients_are_those_of_the_mean_over_pairs_scored_one_by_one(tiny_model, microbatch_tokens):
    model = double(tiny_model("qwen3"))

    def raw(ids):  # transformers alone: last hidden state times the head
        return model.head(model.trunk(input_ids=torch.tensor([ids])).last_hidden_state[0, -1])[0]

    w = [raw(p.prompt_ids + p.chosen_ids) for p in PAIRS]
    l = [raw(p.prompt_ids + p.rejected_ids) for p in PAIRS]  # noqa: E741
    loss = sum(torch.log1p(torch.exp(b - a)) + 0.1 * (a + b) ** 2 for a, b in zip(w, l, strict=True)) / 3
    loss.backward()
    want = gradients(model)
    model.zero_grad()
    metrics = accumulate(model, PAIRS, 0.1, microbatch_tokens)
    got = gradients(model)
    assert got.keys() == want.keys()
    for name in want:
        assert_close(got[name], want[name], atol=1e-6, rtol=0)
    preference = sum(math.log1p(math.exp(b - a)) for a, b in zip(w, l, strict=True)) / 3
    assert metrics["reward_model/loss"] == pytest.approx(preference)
    assert metrics["reward_model/accuracy"] == pytest.approx(sum(a > b for a, b in zip(w, l, strict=True)).item() / 3)


def test_a_tie_makes_the_gradient_of_both_orders_and_no_accuracy(tiny_model):
    model = double(tiny_model())
    tie = replace(PAIRS[0], probability=0.5)
    metrics = accumulate(model, [tie], 0.0, 10**6)
    got = gradients(model)
    model.zero_grad()
    accumulate(
        model,
        [PAIRS[0], replace(tie, chosen_ids=tie.rejected_ids, rejected_ids=tie.chosen_ids, probability=1)],
        0.0,
        10**6,
    )
    for name, want in gradients(model).items():
        assert_close(got[name], want, atol=1e-6, rtol=0)  # as above: the trunk computes in float32
    assert metrics["reward_model/accuracy"] is None


def test_swapping_a_pair_flips_its_margin(tiny_model):
    model = double(tiny_model())
    swapped = [replace(p, chosen_ids=p.rejected_ids, rejected_ids=p.chosen_ids) for p in PAIRS]
    margins = [accumulate(model, pairs, 0.0, 10**6)["reward_model/margin"] for pairs in (PAIRS, swapped)]
    assert margins[0] == pytest.approx(-margins[1])
    assert margins[0] != 0


def test_after_training_the_training_answers_score_mean_0_and_deviation_1(tiny_model):
    model = double(tiny_model())
    finish(model, PAIRS, PAIRS[:1])
    answers = [p.prompt_ids + ids for p in PAIRS for ids in (p.chosen_ids, p.rejected_ids)]
    scores = model.score(answers)
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------- runs


@pytest.fixture
def data(tmp_path):
    """96 pairs: an answer that ends with ! is preferred to one that ends with ?, whatever its length."""
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"{a}{b}:", "chosen": f"{a * (i % 3)}!", "rejected": f"{b * (i % 4)}?"}
        for i, (a, b) in enumerate((a, b) for a in "abcdefghijkl" for b in "stuvwxyz")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def config_for(run, model, data, *, lora=None, lr=1e-2, **section) -> RewardConfig:
    return RewardConfig(
        run=str(run),
        model=SFTModelConfig(policy=str(model), lora=lora),
        data=DataConfig(path=str(data), max_tokens=64),
        reward_model=RewardModelSection(**{"epochs": 3, "batch": 8, "test_fraction": 0.25, **section}),
        optim=OptimConfig(lr=lr, critic_lr=lr),
        log=LogConfig(tensorboard=False),
    )


@pytest.mark.learning
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_every_architecture_learns_what_is_preferred_and_its_export_scores_as_it_does(
    tiny_model, data, tmp_path, architecture, lora, seed, record_property
):
    padded = tiny_model(architecture, seed=seed, vocab_size=264)  # more embeddings than tokens, as many real models
    run = reward_model(replace(config_for(tmp_path / "run", padded, data, lora=lora, epochs=6), seed=seed))
    report = json.loads((run.path / "reward_report.json").read_text())
    record_property("loss", report["loss"])
    record_property("accuracy", report["accuracy"]["value"])
    record_property("accuracy, low end", report["accuracy"]["low"])
    assert report["learned"]  # the interval lies above chance; a few held-out pairs may still go wrong
    assert report["loss"] < 0.3  # with LoRA, over five seeds and two CPU paths: at most .05
    # In plain transformers (which knows Granite and Cohere as classifiers once Tether has been imported):
    stock = AutoModelForSequenceClassification.from_pretrained(run.final)
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    rows = [[*tokenizer.encode(text), EOS] for text in ("as:aa!", "as:?", "lz:!", "lz:zz?")]
    padded = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    with torch.no_grad():
        raw = stock(**padded).logits[:, 0]
    record_property("smaller margin", min(raw[0] - raw[1], raw[2] - raw[3]).item())
    assert raw[0] > raw[1]
    assert raw[2] > raw[3]
    ours = load_reward_model(str(run.final), dtype=torch.float32, device=CPU)
    assert_close(ours.score(rows), (raw - stock.config.tether_reward_mean) / stock.config.tether_reward_std,
                 atol=1e-4, rtol=0)  # fmt: skip


def test_pairs_of_one_prompt_are_trained_on_and_so_are_all_pairs_and_every_page_says_what_is_not_known(
    tiny_model, tmp_path, capsys
):
    file = tmp_path / "one.jsonl"
    rows = [{"prompt": "Say it", "chosen": f"{i}!", "rejected": f"{i}?"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_for(tmp_path / "run", tiny_model(), file, epochs=1)
    assert "answer (all have one prompt)" in dry_run(config)
    reward_model(config)
    assert "12 pairs have one prompt: 3 are held out by their answers" in capsys.readouterr().err
    config = config_for(tmp_path / "all", tiny_model(), file, epochs=1, test_fraction=0)
    assert "none held out" in dry_run(config)
    run = reward_model(config)
    claim = "No pairs were held out: nothing is known about pairs that it was not trained on."
    assert claim in capsys.readouterr().out
    assert claim in (run.final / "README.md").read_text()
    assert "no pairs were held out" in tether.report(run.path).read_text()
    assert "nothing is known about pairs" in examine(run.path)


def test_groups_are_held_out_whole_and_the_report_says_how_many(tiny_model, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps(row | {"group": row["prompt"][0]}) + "\n" for row in rows))
    run = reward_model(config_for(tmp_path / "run", tiny_model(), data, epochs=1))
    report = json.loads((run.path / "reward_report.json").read_text())
    assert (report["train_pairs"], report["test_pairs"]) == (72, 24)  # 3 of the 12 groups of 8
    assert "<html" in (run.path / "calibration.html").read_text()
    assert f"{report['accuracy']['value']:.3f}" in (run.final / "README.md").read_text()


def test_pairs_that_all_hang_together_cannot_be_tested_and_are_refused(tiny_model, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "chosen": c, "rejected": "x"}) + "\n" for c in "bcd"))
    with pytest.raises(DataError, match="all 3 pairs hang together"):
        reward_model(config_for(tmp_path / "run", tiny_model(), file))


def test_an_epoch_sees_every_example_once_and_the_next_in_another_order():
    plan = shuffled_batches(20, batch=8, epochs=2, seed=0)
    assert [len(step) for step in plan] == [8, 8, 4] * 2
    epochs = [[i for step in steps for i in step] for steps in (plan[:3], plan[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert plan == shuffled_batches(20, batch=8, epochs=2, seed=0)
    assert plan != shuffled_batches(20, batch=8, epochs=2, seed=1)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(tiny_model, data, tmp_path, lora):
    model = tiny_model("llama", num_hidden_layers=4, hidden_size=64)
    config = config_for(tmp_path / "whole", model, data, lora=lora, epochs=5, batch=8)
    config = replace(config, checkpoint=CheckpointConfig(every=5))
    whole = reward_model(config)
    config = replace(config, run=str(tmp_path / "killed"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    for step in (7, 23):
        process = launch("reward", tmp_path / "c.yaml")
        wait_for_step(tmp_path / "killed", step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    killed = reward_model(config)
    assert len(steady(whole)) == 45
    assert steady(killed) == steady(whole)
    for name in ("final/model.safetensors", "final/config.json", "reward_report.json"):
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes()


def test_skipped_steps_in_a_row_are_counted_on_over_a_resume_and_the_advice_says_fresh(tiny_model, data, tmp_path):
    path = tiny_model()
    broken = AutoModelForCausalLM.from_pretrained(path)
    broken.model.norm.weight.data.fill_(float("inf"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "broken")
    config = config_for(tmp_path / "run", tmp_path / "broken", data, epochs=5, batch=8)
    for _ in range(2):  # the second goes on after step 4, of which four were skipped
        with pytest.raises(TrainingError, match=r"5 optimizer steps in a row.*lower optim\.lr.*--fresh"):
            reward_model(replace(config, checkpoint=CheckpointConfig(every=2)))
        assert [m["step"] for m in tether.Run.open(tmp_path / "run").metrics] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- real preferences


@pytest.mark.slow
@pytest.mark.learning
def test_polite_and_rude_answers_are_told_apart_by_a_small_real_model(
    stories260k, shared, tmp_path, seed, record_property
):
    config = config_for(
        tmp_path / "run", stories260k, shared / "data/preferences/polite_style.jsonl.gz", lr=1e-3,
        epochs=6, batch=16, test_fraction=0.2,
    )  # fmt: skip
    run = reward_model(replace(config, seed=seed, data=replace(config.data, max_tokens=512)))
    report = json.loads((run.path / "reward_report.json").read_text())
    record_property("accuracy", report["accuracy"]["value"])
    record_property("length accuracy", report["length_accuracy"]["value"])
    assert report["accuracy"]["value"] >= 0.90  # .936 on one seed; after three epochs .904 and .917 on two
    assert report["length_accuracy"]["value"] < 0.6
    assert report["learned"]
