"""A reward model reads its score at the last real token, and is exported so that plain transformers does too."""

import json
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from conftest import ARCHITECTURES
from tether.data.tokenizer import load_tokenizer
from tether.errors import ModelError
from tether.models.reward_model import (
    choose_pad_id,
    compare_with_stock,
    init_head,
    init_reward_model,
    load_reward_model,
    save_reward_model,
)

CPU = torch.device("cpu")
FLOAT = {"dtype": torch.float32, "device": CPU}
EOS, PAD = 1, 0
ROWS = [[5, 6, 7, EOS], [9, EOS], [40, 4, PAD, 2, EOS, EOS, 8, 9, 10], [3], [8, PAD]]


@pytest.fixture
def tokenizer_copy(tiny_model):
    return load_tokenizer(str(tiny_model()))


def fresh(path, seed=1):
    return init_reward_model(str(path), weights_dtype=torch.float32, seed=seed, **FLOAT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_score_does_not_depend_on_the_rows_beside_it(tiny_model, architecture):
    model = fresh(tiny_model(architecture))
    with torch.no_grad():
        together, alone = model(ROWS), torch.cat([model([row]) for row in ROWS])
    assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.std() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_score_is_the_head_on_the_last_hidden_state_of_the_row_alone(tiny_model, architecture):
    model = fresh(tiny_model(architecture))
    with torch.no_grad():
        for row in ROWS:  # no padding at all, and the stock trunk's own output
            hidden = model.classifier.base_model(torch.tensor([row])).last_hidden_state[0, -1]
            assert_close(model([row])[0], hidden @ model.head.weight[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_transformers_scores_an_export_as_we_do(tiny_model, tiny_tokenizer, tmp_path, architecture):
    model = fresh(tiny_model(architecture))
    model.mean, model.std = 0.25, 2.0
    save_reward_model(model, tiny_tokenizer, tmp_path, stop_id=EOS)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    rows = [row for row in ROWS if row[-1] != PAD]
    width = max(map(len, rows))
    padded = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    with torch.no_grad():
        theirs = stock(padded, attention_mask=(torch.arange(width) < torch.tensor([[len(r)] for r in rows])).long())
    assert_close(model(rows), theirs.logits[:, 0], atol=1e-5, rtol=0)
    reloaded = load_reward_model(str(tmp_path), **FLOAT)
    assert_close(reloaded.score(rows), (theirs.logits[:, 0] - 0.25) / 2.0, atol=1e-5, rtol=0)


def test_the_head_starts_with_deviation_one_over_the_root_of_width_plus_one(tiny_model):
    classifier = fresh(tiny_model()).classifier
    classifier.score = torch.nn.Linear(8191, 1)
    init_head(classifier, seed=3)
    weight = classifier.score.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(8192), rel=0.03)
    assert abs(weight.mean().item()) < 4 / 8192
    assert classifier.score.bias.item() == 0.0


def test_the_same_seed_gives_the_same_head_and_another_seed_another(tiny_model):
    path = tiny_model()
    first, again, other = (fresh(path, seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_training_can_go_on_from_a_reward_model_with_its_own_head(tiny_model, tiny_tokenizer, tmp_path):
    model = fresh(tiny_model(), seed=1)
    save_reward_model(model, tiny_tokenizer, tmp_path, stop_id=EOS)
    assert torch.equal(fresh(tmp_path, seed=2).head.weight, model.head.weight)


def test_a_tokenizer_that_pads_with_eos_is_exported_with_another_pad(
    tiny_model, tiny_tokenizer, tmp_path, tokenizer_copy
):
    tokenizer_copy.pad_token = "<eos>"
    save_reward_model(fresh(tiny_model()), tokenizer_copy, tmp_path, stop_id=EOS)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == PAD


def test_without_any_token_to_pad_with_stock_refuses_batches_rather_than_misreading_them(
    tiny_model, tokenizer_copy, tmp_path
):
    tokenizer_copy.pad_token = "<eos>"
    assert choose_pad_id(tokenizer_copy, stop_id=PAD, vocab_size=258) is None
    save_reward_model(fresh(tiny_model()), tokenizer_copy, tmp_path, stop_id=PAD)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="batch sizes > 1"):
        stock(torch.zeros(2, 3, dtype=torch.long))


def test_an_export_that_stock_pooling_would_score_differently_is_an_error(tiny_model, tiny_tokenizer, tmp_path):
    model = fresh(tiny_model())
    save_reward_model(model, tiny_tokenizer, tmp_path, stop_id=EOS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"pad_token_id": EOS}))  # the classic mistake
    with pytest.raises(ModelError, match=r"plain transformers scores a probe .* away.*pad_token_id=1"):
        compare_with_stock(model, tmp_path, stop_id=EOS)


def test_in_bfloat16_too_an_export_that_differs_by_no_more_than_rounding_is_noticed(
    tiny_model, tiny_tokenizer, tmp_path
):
    model = init_reward_model(str(tiny_model()), dtype=torch.bfloat16, weights_dtype=torch.float32, device=CPU, seed=1)
    with torch.no_grad():
        model.head.weight.mul_(10)
    save_reward_model(model, tiny_tokenizer, tmp_path, stop_id=EOS)
    with torch.no_grad():
        model.head.weight.mul_(1.01)
    with pytest.raises(ModelError, match="plain transformers scores a probe"):
        compare_with_stock(model, tmp_path, stop_id=EOS)


def test_remote_code_that_was_asked_for_is_trusted_when_the_export_is_checked(
    tiny_model, tiny_tokenizer, tmp_path, monkeypatch
):
    load, asked = AutoModelForSequenceClassification.from_pretrained, []

    def spy(*args, **kwargs):
        asked.append(kwargs["trust_remote_code"])
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", spy)
    for trust in (False, True):
        save_reward_model(
            fresh(tiny_model()), tiny_tokenizer, tmp_path / str(trust), stop_id=EOS, trust_remote_code=trust
        )
    assert asked[1::2] == [False, True]  # each time loaded to train, then reloaded


def test_a_language_model_is_not_taken_for_a_reward_model(tiny_model):
    with pytest.raises(ModelError, match=r"lacks score\.weight: its scores would be random"):
        load_reward_model(str(tiny_model(num_labels=1)), **FLOAT)
    with pytest.raises(ModelError, match=r"is a LlamaForCausalLM, a language model: .* `tether reward` trains one"):
        load_reward_model(str(tiny_model()), **FLOAT)
    two = tiny_model()
    told = (two / "config.json").read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification")
    (two / "config.json").write_text(told)
    with pytest.raises(ModelError, match="has 2 labels"):
        load_reward_model(str(two), **FLOAT)


def test_the_critics_head_says_the_normalized_score(tiny_model):
    model = fresh(tiny_model())
    model.mean, model.std = 0.5, 4.0
    hidden = torch.randn(3, 32)
    want = (hidden @ model.head.weight.T - 0.5) / 4.0
    assert_close(model.value_head()(hidden), want)


def test_scoring_in_small_batches_changes_neither_order_nor_scores(tiny_model):
    model = fresh(tiny_model())
    assert_close(model.score(ROWS, batch_tokens=1), model.score(ROWS), atol=1e-5, rtol=0)


def test_float64_stays_float64(tiny_model):
    model = fresh(tiny_model()).double()
    assert model(ROWS).dtype == torch.float64
