"""A judge that is a model directory: its letters' log-probs, both orders, and labels beside people's."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.cli import main
from tether.config import JudgeConfig, JudgedConfig, JudgeSection
from tether.feedback.local_judge import LocalJudge, opening_token
from tether.feedback.records import Filters
from tether.feedback.store import Store
from tether.feedback.verdict import Comparison, question

PRINCIPLE = "Choose the answer that is shorter."


@pytest.fixture
def judge_model(tiny_model, tiny_tokenizer):
    """A random GPT-2 that says A or B nearly always: its last norm has a bias, and both letters read it."""
    path = tiny_model("gpt2", n_positions=1024, tie_word_embeddings=False, seed=3)
    model = AutoModelForCausalLM.from_pretrained(path)
    letters = [tiny_tokenizer.convert_tokens_to_ids(letter) for letter in "AB"]
    with torch.no_grad():
        bias = torch.ones(32)
        model.transformer.ln_f.bias.copy_(bias)
        model.lm_head.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(5))
        model.lm_head.weight[letters] += 12 * bias / 32
    model.save_pretrained(path)
    return path


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.txt").write_text(PRINCIPLE)
    rows = [{"prompt": f"Say {i}", "a": f"It is {i}", "b": "no" * i} for i in range(1, 6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def command(model, *more):
    return ["judge", "--judge.model", str(model), "--judge.constitution", "rules.txt", "--judge.name", "tiny",
            "--data.path", "pairs.jsonl", "--device", "cpu", *more]  # fmt: skip


def probability_of_first(path, messages):
    """By transformers alone: P(A) among the tokens A and B after the chat template's rendering."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        p = model(ids).logits[0, -1].softmax(-1)
    a, b = (float(p[tokenizer.convert_tokens_to_ids(letter)]) for letter in "AB")
    assert a + b > 0.5
    assert 0.01 < a / (a + b) < 0.99  # not clamped
    return a / (a + b)


def test_labels_of_a_local_model_are_its_letters_debiased(judge_model, pairs, capsys):
    assert main(command(judge_model)) == 0
    assert "preferences.db: 5 pairs labeled by judge:tiny" in capsys.readouterr().out
    store = Store("preferences.db", create=False)
    labels = list(store.labels(Filters(judges=True)))
    assert len(labels) == 5
    for label in labels:
        item = store.item(label.item)
        a, b = (answer.text for answer in item.answers)
        first = probability_of_first(judge_model, question(PRINCIPLE, item.prompt, a, b))
        second = probability_of_first(judge_model, question(PRINCIPLE, item.prompt, b, a))
        q = (math.log(first / (1 - first)) - math.log(second / (1 - second))) / 2
        assert label.probability == pytest.approx(1 / (1 + math.exp(-q)), abs=1e-5)
        assert label.choice == ("a" if q > 0 else "b")
    assert main(command(judge_model, "--dry-run", "--judge.name", "other")) == 0
    told = capsys.readouterr().out
    assert "5 pairs, both orders, judge:other: 10 questions to" in told
    assert "questions of up to" in told
    event = next(iter(store.events()))
    assert event["annotator"] == "judge:tiny"
    assert event["principle"] == PRINCIPLE
    assert [answer["order"] for answer in event["answers"]] == [[0, 1], [1, 0]]


def test_a_local_model_that_names_neither_letter_gives_no_label(tiny_model, pairs, capsys):
    assert main(command(tiny_model("gpt2", n_positions=1024))) == 2
    assert "none of 5 comparisons gave a label (5: neither letter likely" in capsys.readouterr().err
    with Store("preferences.db", create=False) as store:
        assert list(store.labels(Filters(judges=True))) == []


def test_a_signal_can_be_heeded_after_every_forward_pass(judge_model, pairs, monkeypatch):
    monkeypatch.setattr("tether.feedback.local_judge._FORWARD_TOKENS", 1)  # a pass for each of 2 × 2 questions
    config = JudgeConfig(JudgeSection(str(judge_model)), JudgedConfig("pairs.jsonl"), device="cpu")
    asked = [Comparison(i, f"Say {i}", ("It is", "no"), PRINCIPLE, ((0, 1), (1, 0))) for i in range(2)]
    assert [x if x is None else x.item for x in LocalJudge(config).compare(asked)] == [None] * 4 + [0, 1]


def test_questions_longer_than_the_model_give_no_label(tiny_model, pairs, capsys):
    assert main(command(tiny_model("gpt2", n_positions=64))) == 2
    assert "5: longer than the model's 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("symbols", ["AB", "0123456789"])
@pytest.mark.parametrize(("name", "opening"), [("stories260K", ["▁"]), ("imdb-6M", [])])
def test_what_a_judge_says_is_summed_over_every_way_to_write_it(shared, name, opening, symbols):
    # SentencePiece opens a text with a space: one token with B for stories260K, but with A and the digits two
    path = str(shared / "models" / name)
    config = JudgeConfig(JudgeSection(path), JudgedConfig("p.db"), device="cpu")
    said = {}

    class Asked(Comparison):
        lead = "It is number"

        def read_logprobs(self, logprobs):
            for token, x in logprobs.items():
                said[token.strip()] = said.get(token.strip(), 0) + math.exp(x)
            return 0.5

    judge = LocalJudge(config, symbols)
    assert judge.tokenizer.convert_ids_to_tokens(opening_token(judge.tokenizer, symbols)) == opening
    asked = Asked(0, "Say", ("It is", "no"), PRINCIPLE, ((0, 1),))
    list(judge.compare([asked]))
    ids = judge.encode(asked, (0, 1))
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    written = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]

    def following(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].softmax(-1)

    first = following(ids)
    wanted = {s: sum(float(first[i]) for i, token in enumerate(written) if token.strip("▁Ġ") == s) for s in symbols}
    if opening:
        space = written.index("▁")
        second = following([*ids, space])
        for s in symbols:
            behind = sum(float(second[i]) for i, token in enumerate(written) if token.strip("▁Ġ") == s)
            wanted[s] += float(first[space]) * behind
    assert said == pytest.approx(wanted, rel=1e-4)
