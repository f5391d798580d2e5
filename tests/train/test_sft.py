"""Supervised fine-tuning: the loss is what it says, packing changes nothing, and a killed run goes on as it was."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import tether
from conftest import ARCHITECTURES
from resume import launch, steady, wait_for_step
from tether.config import (
    CheckpointConfig,
    DataConfig,
    InitModelConfig,
    LogConfig,
    LoraConfig,
    OptimConfig,
    SFTConfig,
    SFTModelConfig,
    SFTSection,
)
from tether.config.reading import to_yaml
from tether.data.examples import Example
from tether.errors import ConfigError, TrainingError
from tether.models.language_model import LanguageModel
from tether.models.loading import load_causal_lm
from tether.train.sft import accumulate, check_packing, pack, plan_steps, sft

CPU = torch.device("cpu")
EOS = 1
EXAMPLES = [
    Example([5, 6, 7, 8, EOS], [False, False, True, True, True], 0),
    Example([9, EOS], [False, True], 1),
    Example([40, 41, 9, 9, 200, 7, 3, 12, EOS], [False] * 5 + [True] * 4, 2),
    Example([30, 31, 32], [False, True, False], 3),
]


def double(path) -> LanguageModel:
    """Weights large enough that attention matters, in float64, so that only the arithmetic can differ."""
    lm = load_causal_lm(str(path), dtype=torch.float64, device=CPU)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for p in lm.parameters():
            if p.dim() > 1:
                p.data.normal_(0, 0.2)
    return LanguageModel(lm, torch.float32)


def gradients(model, rows, microbatch_tokens=10**6):
    model.lm.zero_grad()
    metrics = accumulate(model, rows, microbatch_tokens)
    return {name: p.grad.clone() for name, p in model.lm.named_parameters()}, metrics


def by_hand(model):
    """Each example alone through transformers' own forward pass; mean over all trained tokens."""
    model.lm.zero_grad()
    losses = []
    for example in EXAMPLES:
        logprobs = model.hf_model(input_ids=torch.tensor([example.ids])).logits[0].log_softmax(-1)
        losses += [-logprobs[t - 1, example.ids[t]] for t in range(len(example.ids)) if example.trained[t]]
    loss = torch.stack(losses).mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.lm.named_parameters()}, loss.item()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_the_token_mean_that_transformers_gives_example_by_example(tiny_model, architecture):
    model = double(tiny_model(architecture))
    want, loss = by_hand(model)
    got, metrics = gradients(model, [[e] for e in EXAMPLES])
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["tokens/trained"] == 9
    for name in want:
        assert_close(got[name], want[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_examples_give_the_same_gradients_as_apart(tiny_model, architecture):
    model = double(tiny_model(architecture))
    want, loss = by_hand(model)
    got, metrics = gradients(model, [[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[3], EXAMPLES[2]]])
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    for name in want:
        assert_close(got[name], want[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("microbatch_tokens", [1, 12, 10**6])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_microbatches_and_gradient_checkpointing_change_no_gradient(tiny_model, microbatch_tokens, checkpointing):
    model = double(tiny_model("gemma2"))
    want, _ = by_hand(model)
    if checkpointing:
        model.lm.train()
        model.lm.gradient_checkpointing_enable({"use_reentrant": False})
    got, _ = gradients(model, [[e] for e in EXAMPLES], microbatch_tokens)
    for name in want:
        assert_close(got[name], want[name], atol=1e-6, rtol=0)


def test_packing_on_an_architecture_that_does_not_support_it_is_refused(tiny_model):
    model = double(tiny_model("llama"))
    check_packing(model)
    model.hidden = lambda tokens, position_ids=None: LanguageModel.hidden(model, tokens)  # blind to positions
    with pytest.raises(ConfigError, match=r"sft\.packing=true, but LlamaForCausalLM lets examples .* see each other"):
        check_packing(model)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_packing_is_probed_without_rounding_in_bfloat16_too(tiny_model, weights):
    model = LanguageModel(double(tiny_model("llama")).lm.to(weights), torch.bfloat16)
    check_packing(model)
    assert all(p.dtype == weights for p in model.lm.parameters())  # widened for the probe alone
    hidden = model.hidden
    model.hidden = lambda tokens, **packed: hidden(tokens, **packed) * (1.01 if packed else 1.0)
    with pytest.raises(ConfigError, match="see each other"):
        check_packing(model)


# ---------------------------------------------------------------- which examples a step sees


def config_for(run, model, data, **section) -> SFTConfig:
    return SFTConfig(
        run=str(run),
        model=SFTModelConfig(policy=str(model)),
        data=DataConfig(path=str(data), max_tokens=64),
        sft=SFTSection(**{"epochs": 2, "batch": 4, **section}),
        optim=OptimConfig(lr=1e-3),
        log=LogConfig(tensorboard=False),
    )


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_sees_every_example_once_and_the_next_in_another_order(packing):
    lengths = [3 + i * 7 % 40 for i in range(50)]
    config = config_for("r", "m", "d", packing=packing, epochs=2, batch=4)
    plan = plan_steps(lengths, config)
    epochs = [plan[: len(plan) // 2], plan[len(plan) // 2 :]]
    seen = [[i for step in epoch for row in step for i in row] for epoch in epochs]
    assert sorted(seen[0]) == sorted(seen[1]) == list(range(50))
    assert seen[0] != seen[1]
    assert all(len(step) == 4 for step in epochs[0][:-1])
    assert plan == plan_steps(lengths, config)
    assert plan != plan_steps(lengths, replace(config, seed=1))


def test_packed_rows_hold_at_most_max_tokens_and_waste_little():
    lengths = [3 + i * 7 % 40 for i in range(500)]
    rows = pack(range(500), lengths, 64)
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= 64
    assert sum(used) / (64 * len(rows)) > 0.95


def test_packing_by_hand():
    # 6 | 6 3 | then 4 fits neither row of 10: a new one; 1 goes where it fits best, beside 6 and 3
    assert pack([0, 1, 2, 3], [6, 3, 4, 1], 10) == [[0, 1, 3], [2]]


# ---------------------------------------------------------------- runs


@pytest.fixture
def data(tmp_path):
    """24 prompts, of which the last letter decides the answer."""
    file = tmp_path / "data.jsonl"
    answers = {"w": "1!", "x": "2", "y": "33", "z": ""}
    rows = [{"prompt": f"{a}{b}", "completion": answers[b]} for a in "abcdef" for b in answers]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def losses(run):
    return [m["loss"] for m in run.metrics]


@pytest.mark.learning
@pytest.mark.parametrize("packing", [False, True])
def test_a_tiny_model_learns_its_examples_and_to_stop(tiny_model, data, tmp_path, packing, seed, record_property):
    model = tiny_model(seed=seed)
    config = config_for(tmp_path / "run", model, data, epochs=40, batch=1 if packing else 12, packing=packing)
    run = sft(replace(config, seed=seed, optim=OptimConfig(lr=3e-2, schedule="cosine")))
    record_property("first loss", losses(run)[0])
    record_property("last loss", losses(run)[-1])
    assert losses(run)[0] == pytest.approx(math.log(258), abs=0.3)  # random weights know nothing
    assert losses(run)[-1] < 0.05  # over five seeds and two CPU paths: at most .0005
    model = AutoModelForCausalLM.from_pretrained(run.final)
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    for prompt, answer in (("aw", "1!"), ("cx", "2"), ("fy", "33"), ("bz", "")):
        ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
        assert tokenizer.decode(ids) == f"{prompt}{answer}<eos>"


@pytest.mark.learning
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_every_architecture_trains_and_its_export_gives_the_trained_logits(
    tiny_model, data, tmp_path, architecture, lora, seed, record_property
):
    # More embeddings than tokens, as many real models have; and weights so large that an adapter below the frozen head
    # can move its logits.
    padded = tiny_model(architecture, seed=seed, vocab_size=264, initializer_range=0.4)
    config = config_for(tmp_path / "run", padded, data, epochs=6, packing=True, batch=1)
    config = replace(config, seed=seed, model=replace(config.model, lora=lora), optim=OptimConfig(lr=3e-2))
    run = sft(config)  # the export compares its reloaded logits with the trained model's, and fails if they differ
    steps = len(losses(run)) // 6  # whole epochs are compared: a single row of examples may be an easy one
    share = sum(losses(run)[-steps:]) / sum(losses(run)[:steps])
    record_property("loss of the last epoch, of that of the first", share)
    assert share < 0.95  # with LoRA, over five seeds and two CPU paths: .02 to .79, the highest with granite
    assert not (run.final / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(run.final)


def test_from_scratch_takes_vocabulary_and_special_ids_from_the_tokenizer(tiny_model, data, tmp_path):
    config = config_for(tmp_path / "a", "", data, epochs=1)
    init = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    init |= {"num_attention_heads": 2, "vocab_size": 7}  # of which the tokenizer knows better
    config = replace(config, model=SFTModelConfig(policy=InitModelConfig(init=init, tokenizer=str(tiny_model()))))
    first, same, other = (
        sft(replace(config, run=str(tmp_path / name), seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    final = AutoModelForCausalLM.from_pretrained(first.final)
    assert final.config.vocab_size == 258
    assert (final.config.eos_token_id, final.config.pad_token_id) == (1, 0)
    assert final.generation_config.eos_token_id == 1
    assert losses(first) == losses(same)
    assert losses(first) != losses(other)


def test_gradients_that_stay_infinite_stop_the_run_after_a_few_skipped_steps(tiny_model, data, tmp_path):
    path = tiny_model()
    broken = AutoModelForCausalLM.from_pretrained(path)
    broken.model.norm.weight.data.fill_(float("inf"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "broken")
    with pytest.raises(TrainingError, match=r"5 optimizer steps in a row are not finite.*optim\.lr"):
        sft(config_for(tmp_path / "run", tmp_path / "broken", data))
    run = tether.Run.open(tmp_path / "run")
    assert [m["optim/skipped_steps"] for m in run.metrics] == [1] * 5
    assert run.status["state"] == "failed"


def test_skipped_steps_in_a_row_are_counted_on_over_a_resume_and_the_advice_says_fresh(tiny_model, data, tmp_path):
    path = tiny_model()
    broken = AutoModelForCausalLM.from_pretrained(path)
    broken.model.norm.weight.data.fill_(float("inf"))
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "broken")
    config = replace(config_for(tmp_path / "run", tmp_path / "broken", data), checkpoint=CheckpointConfig(every=2))
    for _ in range(2):  # the second goes on after step 4, of which four were skipped
        with pytest.raises(TrainingError, match=r"5 optimizer steps in a row.*lower optim\.lr.*--fresh"):
            sft(config)
        assert [m["step"] for m in tether.Run.open(tmp_path / "run").metrics] == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- stopping and continuing


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(tiny_model, data, tmp_path, lora):
    model = tiny_model("llama", num_hidden_layers=4, hidden_size=64)
    config = config_for(tmp_path / "whole", model, data, epochs=6, packing=False, batch=3)
    config = replace(config, checkpoint=CheckpointConfig(every=5), model=replace(config.model, lora=lora))
    whole = sft(config)
    config = replace(config, run=str(tmp_path / "killed"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    for step in (7, 23):
        process = launch("sft", tmp_path / "c.yaml")
        wait_for_step(tmp_path / "killed", step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    killed = sft(config)
    assert steady(killed) == steady(whole)
    assert len(steady(whole)) == 48
    weights = [(run.final / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]


def test_a_signal_saves_and_exits_with_3_and_the_same_command_goes_on(tiny_model, data, tmp_path):
    config = config_for(tmp_path / "run", tiny_model("llama", num_hidden_layers=4, hidden_size=64), data, epochs=40)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    process = launch("sft", tmp_path / "c.yaml")
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    run = tether.Run.open(tmp_path / "run")
    assert run.status["state"] == "stopped"
    done = len(run.metrics)
    assert 3 <= done < 240
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == [f"step-{done:06d}"]


def test_a_finished_run_is_left_alone_and_fresh_moves_it_aside(tiny_model, data, tmp_path, capsys):
    config = config_for(tmp_path / "run", tiny_model(), data, epochs=1)
    first = (sft(config).final / "model.safetensors").stat().st_mtime_ns
    assert (sft(config).final / "model.safetensors").stat().st_mtime_ns == first
    assert "is finished" in capsys.readouterr().out
    sft(config, fresh=True)
    assert (tmp_path / "run.old-1" / "final").is_dir()
