"""DPO: gradients are those of each loss worked out answer by answer, the reference is where it began, runs resume."""

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
    DPOConfig,
    DPOSection,
    LogConfig,
    LoraConfig,
    OptimConfig,
    PairsConfig,
    ReferencedModelConfig,
)
from tether.config.reading import to_yaml
from tether.data.labeled import Labeled, pair_labels, preferred_first
from tether.data.pairs import Pair
from tether.diagnose import dry_run, examine
from tether.errors import DataError, ModelError
from tether.models.language_model import LanguageModel
from tether.models.policy import zero_head
from tether.train.dpo import (
    Item,
    accumulate,
    load,
    mismatch,
    training_sample,
)
from tiny import randomize, transformer

LOSSES = ("sigmoid", "ipo", "simpo", "orpo", "unpaired", "kto")
PAIRS = [
    Pair([5, 6], [7, 8, 1], [9, 1], 0, "a", weight=2.0),
    Pair([10], [11, 1], [12, 13, 14, 15, 16, 1], 1, "b", probability=0.8),
    Pair([20, 21, 22, 23, 24], [1], [25, 1], 2, "c", probability=0.5),
]
SINGLES = [
    Labeled([5, 6], [7, 8, 1], 0, "a", weight=2.0),
    Labeled([10], [12, 13, 14, 15, 16, 1], 1, "b", probability=0.1),
    Labeled([20, 21, 22, 23, 24], [25, 1], 2, "c", probability=0.0),
    Labeled([10], [11, 1], 3, "b", probability=0.5),
]
OTHERS = [replace(one, answer_ids=other.answer_ids) for one, other in zip(SINGLES, SINGLES[1:] + SINGLES[:1],
                                                                          strict=True)]  # fmt: skip


def double(seed):
    return LanguageModel(transformer(seed=seed).double(), torch.float32)


def answer_logprobs(model, x, k=0):
    """[R] from transformers' own logits."""
    answer = x.answers[k]
    logits = model.hf_model(input_ids=torch.tensor([x.prompt_ids + answer])).logits[0].double()
    at = torch.arange(len(answer)) + len(x.prompt_ids) - 1
    return logits[at].log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]


def with_reference(examples, reference):
    with torch.no_grad():
        return [Item(x, tuple(answer_logprobs(reference, x, k) for k in range(len(x.answers)))) for x in examples]


def slow_loss(model, level, items, section, others):
    """The same objective, one answer after the other, in the words of the papers."""
    total = sum(i.example.weight for i in items)
    loss, nll, tokens = 0.0, 0.0, 0.0
    z = None
    if section.loss == "kto":
        ratios = [answer_logprobs(model, o.example) - o.ref_logprobs[0] for o in others]
        each = [x.mean() if section.average else x.sum() for x in ratios]  # in the units of l
        z = max(0.0, float(sum(each).detach() / len(each)))
    for item in items:
        x = item.example
        p, w = x.probability, x.weight
        t = p * (1 - section.smoothing) + (1 - p) * section.smoothing
        t = (t - section.flipped) / (1 - 2 * section.flipped)
        logp = [answer_logprobs(model, x, k) for k in range(len(x.answers))]
        l = [(a - b).mean() if section.average else (a - b).sum() for a, b in zip(logp, item.ref_logprobs, strict=True)]  # noqa: E741
        beta = section.beta
        if section.loss == "sigmoid":
            m = beta * (l[0] - l[1])
            part = t * torch.log1p((-m).exp()) + (1 - t) * torch.log1p(m.exp())
        elif section.loss == "ipo":
            h = l[0] - l[1]
            part = t * (h - 1 / (2 * beta)) ** 2 + (1 - t) * (h + 1 / (2 * beta)) ** 2
        elif section.loss == "simpo":
            m = beta * (logp[0].mean() - logp[1].mean())
            part = t * torch.log1p((section.gamma - m).exp()) + (1 - t) * torch.log1p((section.gamma + m).exp())
        elif section.loss == "orpo":
            p0, p1 = logp[0].mean().exp(), logp[1].mean().exp()
            o = (p0 / (1 - p0)).log() - (p1 / (1 - p1)).log()
            part = beta * (t * torch.log1p((-o).exp()) + (1 - t) * torch.log1p(o.exp()))
        elif section.loss == "unpaired":
            hidden = model.hf_model.base_model(input_ids=torch.tensor([x.prompt_ids])).last_hidden_state[0, -1]
            m = beta * l[0] + level(hidden.detach().to(level.weight.dtype))[0]
            part = t * torch.log1p((-m).exp()) + (1 - t) * torch.log1p(m.exp())
        else:
            u = beta * (l[0] - z)
            part = t * (1 - torch.sigmoid(u)) + (1 - t) * (1 - torch.sigmoid(-u))
        loss = loss + w * part / total
        if p > 0.5:
            nll, tokens = nll - w * logp[0].sum(), tokens + w * len(logp[0])
    weight = 1.0 if section.loss == "orpo" else section.nll
    return loss + weight * nll / tokens, float(loss.detach())


def gradients(model, level):
    named = [*model.lm.named_parameters(), *(level.named_parameters() if level else ())]
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    for _, p in named:
        p.grad = None
    return found


@pytest.mark.parametrize("knobs", [{}, {"nll": 0.5, "smoothing": 0.1}, {"average": True, "flipped": 0.1}],
                         ids=["plain", "nll, smoothing", "average, flipped"])  # fmt: skip
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_the_loss_worked_out_answer_by_answer_whatever_the_microbatch(loss, knobs):
    section = DPOSection(loss=loss, beta=0.7, **knobs)
    if loss == "simpo":
        section = replace(section, gamma=0.3)
    model, reference = double(0), double(1)
    level = None
    if loss == "unpaired":
        level = zero_head(32, torch.device("cpu")).double()
        randomize(level)
    examples = PAIRS if section.has_pairs else SINGLES
    items = with_reference(examples, reference)
    others = with_reference(OTHERS, reference) if loss == "kto" else []
    value, preference = slow_loss(model, level, items, section, others)
    value.backward()
    want = gradients(model, level)
    for microbatch_tokens in (1, 20, 10**6):
        metrics = accumulate(model, level, items, replace(section, microbatch_tokens=microbatch_tokens), others=others)
        got = gradients(model, level)
        assert metrics["dpo/loss"] == pytest.approx(preference, rel=1e-6)
        assert got.keys() == want.keys()
        for name in want:
            assert_close(got[name], want[name], atol=1e-6 * float(want[name].abs().max() + 1), rtol=0)


def test_metrics_are_per_token_of_the_preferred_and_of_the_other_answers():
    model, reference = double(0), double(1)
    items = with_reference(PAIRS, reference)
    found = accumulate(model, None, items, DPOSection(beta=0.7), others=[])
    sides = {"chosen": 0, "rejected": 1}
    with torch.no_grad():
        for side, k in sides.items():  # the tie is neither
            own = [answer_logprobs(model, x, k) for x in PAIRS[:2]]
            ratios = torch.cat([a - item.ref_logprobs[k] for a, item in zip(own, items, strict=False)])
            assert found[f"dpo/{side}_logratio"] == pytest.approx(ratios.mean().item(), abs=1e-5)
            assert found[f"dpo/{side}_logprob"] == pytest.approx(torch.cat(own).mean().item(), abs=1e-5)
        h = [
            sum((answer_logprobs(model, x, k) - item.ref_logprobs[k]).sum() * (1 - 2 * k) for k in (0, 1))
            for x, item in zip(PAIRS[:2], items, strict=False)
        ]
    assert found["dpo/margin"] == pytest.approx(0.7 * float(sum(h)) / 2, abs=1e-5)
    assert found["dpo/accuracy"] == sum(float(x) > 0 for x in h) / 2
    assert found["tokens/trained"] == 3 + 2 + 2 + 6 + 1 + 2


def test_of_ties_alone_and_of_good_answers_alone_what_is_not_known_is_null():
    model = double(0)
    tie = accumulate(model, None, with_reference(PAIRS[2:], model), DPOSection(), others=[])
    assert tie["dpo/accuracy"] is tie["dpo/chosen_logratio"] is tie["dpo/margin"] is None
    assert tie["dpo/loss"] == pytest.approx(math.log(2), abs=1e-6)
    good = with_reference(SINGLES[:1], model)
    found = accumulate(model, None, good, DPOSection(loss="kto"), others=with_reference(OTHERS[:1], model))
    assert found["dpo/rejected_logratio"] is found["dpo/margin"] is None
    assert found["dpo/chosen_logratio"] == pytest.approx(0, abs=1e-6)


def test_a_pair_whose_rejected_answer_is_the_likelier_winner_is_swapped():
    pair = replace(PAIRS[0], probability=0.3)
    swapped = preferred_first(pair)
    assert (swapped.chosen_ids, swapped.rejected_ids) == (pair.rejected_ids, pair.chosen_ids)
    assert swapped.probability == pytest.approx(0.7)
    assert preferred_first(PAIRS[1]) == PAIRS[1]


def test_ktos_point_of_reference_is_measured_on_answers_to_other_prompts():
    config = config_for("r", "m", "d", loss="kto")
    for seed in range(5):
        found = mismatch(SINGLES, replace(config, seed=seed), None)
        for one, other in zip(SINGLES, found, strict=True):
            assert other.prompt_ids == one.prompt_ids
            owners = {x.prompt_key for x in SINGLES if x.answer_ids == other.answer_ids}
            assert one.prompt_key not in owners
    short = mismatch(SINGLES, config, 7)
    assert max(len(x.prompt_ids) + len(x.answer_ids) for x in short) <= 7
    with pytest.raises(DataError, match="all of the data has one prompt"):
        mismatch([SINGLES[1], SINGLES[3]], config, None)


def test_labeled_answers_are_compared_with_others_to_the_same_prompt_where_there_are_any():
    assert pair_labels(SINGLES) == ([0, 0], [1, 2])  # no prompt has both
    bad = replace(SINGLES[0], probability=0.0, answer_ids=[3])
    assert pair_labels([*SINGLES, bad]) == ([0], [4])
    assert pair_labels(SINGLES[1:]) == ([], [])


def labeled(count, *, good, prompts=None):
    """Labeled answers, all of them different: the first `good` are good. prompts: of each; None: each has its own."""
    return [Labeled([5], [6, 7 + i], i, str(prompts[i] if prompts else i), probability=float(i < good))
            for i in range(count)]  # fmt: skip


def test_every_label_of_a_prompt_meets_one_other_not_all_of_them():
    good, bad = pair_labels(labeled(4000, good=1000, prompts=["same"] * 4000))
    assert len(good) == len(bad) == 3000
    assert (set(good), set(bad)) == (set(range(1000)), set(range(1000, 4000)))


def test_rare_labels_are_among_the_training_examples_that_are_judged():
    config = config_for("r", "m", "d")
    for examples in (labeled(2000, good=1999), labeled(2000, good=1)):
        found = training_sample(examples, 10, config)
        assert len(found) == 256
        assert {x.probability for x in found} == {0.0, 1.0}
        assert len({x.row for x in found}) == 256
    ties = [replace(PAIRS[2], row=i) for i in range(1000)]
    assert PAIRS[0] in training_sample([*ties, PAIRS[0]], 10, config)
    assert training_sample(labeled(30, good=7), 10, config) == labeled(30, good=7)


def test_an_answer_to_another_prompt_is_another_answer_too_where_there_is_one():
    config = config_for("r", "m", "d", loss="kto")
    yes_or_no = [Labeled([i + 2], [1 if i % 10 else 0], i, str(i)) for i in range(200)]  # nine of ten say yes
    for one, other in zip(yes_or_no, mismatch(yes_or_no, config, None), strict=True):
        assert other.answer_ids != one.answer_ids
    alike = [replace(x, answer_ids=[1]) for x in yes_or_no]
    assert len(mismatch(alike, config, None)) == 200


def test_answers_to_other_prompts_are_found_where_nearly_all_have_one_prompt_or_one_text():
    prompts = ["big"] * 10_000 + ["a", "b"]
    many = labeled(10_002, good=1, prompts=prompts)
    config = config_for("r", "m", "d", loss="kto")
    found = mismatch(many, config, None)  # seconds where it is linear, hours where it is not
    mismatch([replace(x, prompt_key=str(i), answer_ids=[1 if i else 2]) for i, x in enumerate(many)], config, None)
    assert {tuple(x.answer_ids) for x in found[:-2]} == {tuple(x.answer_ids) for x in many[-2:]}
    for one, other in zip(many[-2:], found[-2:], strict=True):
        assert other.answer_ids != one.answer_ids


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


@pytest.fixture
def labels(data):
    """The same as single answers with labels."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    file = data.with_name("labels.jsonl")
    singles = [(row["prompt"], row[k], k == "chosen") for row in rows for k in ("chosen", "rejected")]
    file.write_text("".join(json.dumps(dict(zip(("prompt", "completion", "label"), s, strict=True))) + "\n"
                            for s in singles))  # fmt: skip
    return file


def config_for(run, model, data, *, lr=1e-3, **settings) -> DPOConfig:
    of_model = {k: settings.pop(k) for k in ("lora", "dtype", "reference", "gradient_checkpointing") if k in settings}
    return DPOConfig(
        run=str(run),
        device="cpu",
        model=ReferencedModelConfig(policy=str(model), **of_model),
        data=PairsConfig(path=str(data), max_tokens=64),
        dpo=DPOSection(**{"epochs": 1, "batch": 8, "test_fraction": 0.25, **settings}),
        optim=OptimConfig(lr=lr),
        log=LogConfig(tensorboard=False),
    )


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_the_first_loss_is_log_2(tiny_model, data, tmp_path, dtype, bound, lora, checkpointing):
    model = tiny_model()
    config = config_for(tmp_path / "run", model, data, batch=36, dtype=dtype, lora=lora,
                        gradient_checkpointing=checkpointing)  # fmt: skip
    run = tether.dpo(config)
    assert run.metrics[0]["dpo/loss"] == pytest.approx(math.log(2), abs=bound)
    assert run.metrics[0]["dpo/chosen_logratio"] == pytest.approx(0, abs=10 * bound)
    assert run.metrics[1]["dpo/loss"] < math.log(2)
    if not checkpointing:
        named = tether.dpo(replace(config, run=str(tmp_path / "named"),
                                   model=replace(config.model, reference=str(model))))  # fmt: skip
        assert named.metrics[0]["dpo/loss"] == pytest.approx(math.log(2), abs=bound)


def test_a_reference_of_its_own_is_what_log_ratios_are_measured_to(tiny_model, data, tmp_path):
    config = config_for(tmp_path / "run", tiny_model(), data, reference=str(tiny_model(seed=1)))
    assert abs(tether.dpo(config).metrics[0]["dpo/loss"] - math.log(2)) > 1e-4
    other = replace(config, model=replace(config.model, reference=str(tiny_model(vocab_size=300))))
    for refused in (tether.dpo, dry_run):
        with pytest.raises(ModelError, match="has a vocabulary of 300 tokens, the policy one of 258"):
            refused(replace(other, run=str(tmp_path / "other")))


@pytest.mark.learning
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_every_architecture_learns_what_is_preferred_and_its_export_prefers_it_too(
    tiny_model, data, tmp_path, architecture, lora, seed, record_property
):
    padded = tiny_model(architecture, seed=seed, vocab_size=264)
    config = config_for(tmp_path / "run", padded, data, lora=lora, epochs=2, lr=1e-2)
    run = tether.dpo(replace(config, seed=seed))
    report = json.loads((run.path / "dpo_report.json").read_text())
    record_property("accuracy", report["accuracy"]["value"])
    assert report["learned"]
    assert run.metrics[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not [e for e in run.events if e["event"] == "fallback"]
    # In plain transformers: log-probs of the end that was preferred, against where it began.
    old, new = (AutoModelForCausalLM.from_pretrained(path) for path in (padded, run.final))
    tokenizer = AutoTokenizer.from_pretrained(run.final)
    ids = [torch.tensor([tokenizer.encode(text)]) for text in ("as:!", "as:?")]
    with torch.no_grad():
        ratios = [float(m(input_ids=x[:, :-1]).logits[0, -1].log_softmax(-1)[x[0, -1]]) for m in (new, old)
                  for x in ids]  # fmt: skip
    record_property("margin", (ratios[0] - ratios[2]) - (ratios[1] - ratios[3]))
    assert ratios[0] - ratios[2] > ratios[1] - ratios[3]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_learns_is_reported_and_examined(tiny_model, data, tmp_path, capsys, loss):
    beta = {"simpo": 2.0, "orpo": 1.0}.get(loss, 0.5)
    config = config_for(tmp_path / "run", tiny_model(), data, loss=loss, beta=beta, epochs=3, lr=1e-2)
    assert "a token whose log-prob counts" in dry_run(config)
    run = tether.dpo(config)
    report = json.loads((run.path / "dpo_report.json").read_text())
    assert report["accuracy"]["value"] >= 0.9
    printed = f"Held-out accuracy {report['accuracy']['value']:.3f}"
    assert printed in capsys.readouterr().out
    assert printed in (run.final / "README.md").read_text()
    assert f"{report['accuracy']['value']:.1%}" in tether.report(run.path).read_text()
    assert "held-out" in examine(run.path)


@pytest.mark.parametrize("loss", ["unpaired", "kto"])
def test_single_answers_with_labels_are_learned_from_too(tiny_model, labels, tmp_path, loss):
    config = config_for(tmp_path / "run", tiny_model(), labels, loss=loss, beta=0.5, epochs=3, lr=1e-2)
    assert "192 answers" in dry_run(config)
    run = tether.dpo(config)
    report = json.loads((run.path / "dpo_report.json").read_text())
    assert report["accuracy"]["value"] >= 0.9
    assert ("dpo/kl" in run.metrics[0]) == (loss == "kto")


def test_data_of_one_prompt_and_data_without_a_held_out_part_are_learned_from(tiny_model, tmp_path, capsys):
    file = tmp_path / "one.jsonl"
    rows = [{"prompt": "Say it", "chosen": f"{i}!", "rejected": f"{i}?"} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tether.dpo(config_for(tmp_path / "run", tiny_model(), file))
    assert "it is held out by its answers" in capsys.readouterr().err
    run = tether.dpo(config_for(tmp_path / "all", tiny_model(), file, test_fraction=0))
    assert "No pairs were held out" in (run.final / "README.md").read_text()
    assert "no pairs were held out" in tether.report(run.path).read_text()


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_one_bad_label_among_many_good_ones_is_learned_from_and_reported(tiny_model, tmp_path):
    rows = [{"prompt": f"{i}", "completion": f"{i}!", "label": i != 7} for i in range(40)]
    file = write(tmp_path / "labels.jsonl", rows)
    config = config_for(tmp_path / "run", tiny_model(), file, loss="unpaired", test_fraction=0.1)
    run = tether.dpo(replace(config, seed=1))  # the bad one is among those that are trained on
    assert "None of the 4 held-out examples says which answer is better" in (run.final / "README.md").read_text()
    assert "NaN" not in (run.path / "dpo_report.json").read_text()
    assert "none of 4 held-out examples says" in tether.report(run.path).read_text()
    assert "no pairs" not in examine(run.path)


@pytest.mark.parametrize(("rows", "loss", "told"), [
    ([{"prompt": f"{i}", "completion": "x", "label": True} for i in range(8)], "unpaired", "have the label 1,"),
    ([{"prompt": f"{i}", "completion": "x", "label": 0} for i in range(8)], "kto", "have the label 0,"),
    ([{"prompt": f"{i}", "completion": "x", "label": 0.5} for i in range(8)], "unpaired", "have the label 0.5,"),
    ([{"prompt": f"{i}", "chosen": "x", "rejected": "y", "probability": 0.5} for i in range(8)], "sigmoid", "ties"),
    ([{"prompt": f"{i}", "chosen": "x", "rejected": "y", "probability": 0.5} for i in range(8)], "kto", "ties"),
])  # fmt: skip
def test_data_that_prefers_nothing_is_refused(tiny_model, tmp_path, rows, loss, told):
    config = config_for(tmp_path / "run", tiny_model(), write(tmp_path / "data.jsonl", rows), loss=loss)
    for refused in (dry_run, tether.dpo):
        with pytest.raises(DataError, match=told):
            refused(config)


def test_a_dry_run_refuses_kto_on_one_prompt_as_the_run_does(tiny_model, tmp_path):
    rows = [{"prompt": "same", "completion": f"{i}", "label": i % 2} for i in range(8)]
    config = config_for(tmp_path / "run", tiny_model(), write(tmp_path / "labels.jsonl", rows), loss="kto")
    for refused in (dry_run, tether.dpo):
        with pytest.raises(DataError, match="all of the data has one prompt"):
            refused(config)


@pytest.mark.parametrize(("row", "loss", "told"), [
    ({"completion": "x", "label": True}, "sigmoid", "labeled answers.*Set dpo.loss to unpaired or kto"),
    ({"completion": "x", "label": True, "score": 0.5}, "ipo", "tether qlearning"),
    ({"completion": "x", "score": 0.5}, "sigmoid", "tether qlearning"),
    ({"completion": "x", "score": 0.5}, "kto", "tether qlearning"),
])  # fmt: skip
def test_single_answers_under_a_loss_that_cannot_read_them_are_told_which_can(tiny_model, tmp_path, row, loss, told):
    rows = [{"prompt": f"{i}"} | row for i in range(8)]
    config = config_for(tmp_path / "run", tiny_model(), write(tmp_path / "data.jsonl", rows), loss=loss)
    with pytest.raises(DataError, match=told):
        dry_run(config)


def test_pairs_that_have_a_column_label_too_are_pairs(tiny_model, data, tmp_path):
    rows = [json.loads(line) | {"label": "helpful"} for line in data.read_text().splitlines()]
    said = dry_run(config_for(tmp_path / "run", tiny_model(), write(tmp_path / "more.jsonl", rows), loss="unpaired"))
    assert "pairs to train on" in said


@pytest.mark.parametrize("loss", ["sigmoid", "unpaired"])
def test_pairs_are_read_once(tiny_model, data, tmp_path, monkeypatch, loss):
    read, seen = tether.data.table._read_file, []
    monkeypatch.setattr(tether.data.table, "_read_file", lambda *args: seen.append(args) or read(*args))
    config = config_for(tmp_path / "run", tiny_model(), data, loss=loss)
    load(config, AutoTokenizer.from_pretrained(config.model.policy), stop_id=None, context=None, pinned=None)
    assert len(seen) == 1


def test_a_step_of_single_answers_has_as_many_rows_as_answers():
    base = config_for("r", "m", "d", batch=3)
    rows = [replace(base, dpo=replace(base.dpo, loss=loss)).microbatch(16)[0] for loss in ("sigmoid", "unpaired")]
    assert rows == [6, 3]


def test_the_mean_level_of_prompts_is_logged_under_unpaired_alone():
    model, level = double(0), zero_head(32, torch.device("cpu")).double()
    torch.nn.init.constant_(level.weight, 0.1)
    items = with_reference(SINGLES, model)
    with torch.no_grad():
        hidden = [model.hf_model.base_model(input_ids=torch.tensor([x.prompt_ids])).last_hidden_state[0, -1]
                  for x in SINGLES]  # fmt: skip
        want = sum(float(0.1 * h.double().sum()) for h in hidden) / len(SINGLES)
    for microbatch_tokens in (1, 10**6):
        section = DPOSection(loss="unpaired", microbatch_tokens=microbatch_tokens)
        assert accumulate(model, level, items, section)["dpo/level"] == pytest.approx(want, abs=1e-5)
    assert "dpo/level" not in accumulate(model, None, items, DPOSection(loss="kto"), others=items)


@pytest.mark.parametrize(("row", "told"), [
    ({"prompt": "a", "completion": "b", "label": 2}, "is the number 2, which is not a label: write true or false"),
    ({"prompt": "a", "completion": "b", "label": "good"}, "which is not a label"),
    ({"prompt": "a", "label": True}, "completion"),
])  # fmt: skip
def test_a_label_that_is_none_names_its_row(tiny_model, tmp_path, row, told):
    file = tmp_path / "labels.jsonl"
    file.write_text(json.dumps({"prompt": "x", "completion": "y", "label": 0.3}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=told) as error:
        dry_run(config_for(tmp_path / "run", tiny_model(), file, loss="unpaired"))
    assert "2" in str(error.value)


@pytest.mark.parametrize("settings", [
    {}, {"lora": LoraConfig(rank=4)}, {"dtype": "bfloat16"}, {"loss": "unpaired"},
    {"loss": "kto", "lora": LoraConfig()},
], ids=["full", "lora", "bfloat16", "unpaired", "kto lora"])  # fmt: skip
def test_a_run_that_is_killed_twice_ends_with_the_same_bits(tiny_model, data, tmp_path, settings):
    model = tiny_model("llama", num_hidden_layers=4, hidden_size=64)
    config = config_for(tmp_path / "whole", model, data, epochs=3, **settings)
    config = replace(config, checkpoint=CheckpointConfig(every=5))
    whole = tether.dpo(config)
    config = replace(config, run=str(tmp_path / "killed"))
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    for step in (7, 18):
        process = launch("dpo", tmp_path / "c.yaml")
        wait_for_step(tmp_path / "killed", step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if step == 7:  # a damaged file costs time and nothing else
            file = tmp_path / "killed" / "reference.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
    killed = tether.dpo(config)
    assert len(whole.metrics) == (54 if settings.get("loss") else 27)
    assert steady(killed) == steady(whole)
    for name in ("final/model.safetensors", "dpo_report.json"):
        assert (killed.path / name).read_bytes() == (whole.path / name).read_bytes()
