"""The real files: people's preferences and reviews, read with real tokenizers."""

import pytest
from transformers import PreTrainedTokenizerFast

from tether.config import DataConfig, PairsConfig, PromptsConfig
from tether.data.examples import load_examples
from tether.data.pairs import load_pairs
from tether.data.prompts import load_prompts
from tether.data.split import split_pairs


@pytest.fixture(scope="module")
def tokenizer(stories260k):
    return PreTrainedTokenizerFast.from_pretrained(stories260k)


def test_polite_style_gives_prompts_and_pairs(shared, tokenizer):
    path = str(shared / "data/preferences/polite_style.jsonl.gz")
    prompts = load_prompts(PromptsConfig(path, limit=300), tokenizer, context=512, max_new_tokens=64)
    assert len(prompts) == 300
    assert prompts[0].columns["group"] == "rasbt/0"
    assert all(prompt.ids[0] == tokenizer.bos_token_id for prompt in prompts)

    pairs = load_pairs(PairsConfig(path, limit=300), tokenizer, stop_id=1)
    assert [tuple(pair.prompt_ids) for pair in pairs] == [prompt.ids for prompt in prompts]
    assert tokenizer.decode(pairs[1].chosen_ids) == "He goes to the park every day.<s>"
    train, test = split_pairs(pairs, 0.2, seed=0)
    assert len(train) + len(test) == 300
    assert 55 <= len(test) <= 65


def test_harmless_transcripts_are_split_and_cut_and_none_is_lost(shared, tokenizer, capsys):
    path = str(shared / "data/preferences/hh_harmless_original.jsonl.gz")
    pairs = load_pairs(PairsConfig(path, max_tokens=256, overlong="cut_left", limit=400), tokenizer, stop_id=1)
    assert [pair.row for pair in pairs] == list(range(400))
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    assert longest == 256
    assert "rows are longer than 256 tokens (data.max_tokens=256): cut on the left" in capsys.readouterr().err
    whole = next(pair for pair in pairs if len(pair.prompt_ids) > 100)
    assert tokenizer.decode(whole.prompt_ids).endswith("\n\nAssistant:")


def test_pairs_of_one_question_stay_on_one_side(shared, tokenizer):
    path = str(shared / "data/preferences/qa_feedback.jsonl.gz")
    pairs = load_pairs(PairsConfig(path, max_tokens=256, overlong="cut_left", limit=200), tokenizer, stop_id=1)
    train, test = split_pairs(pairs, 0.1, seed=0)
    assert not {pair.group for pair in train} & {pair.group for pair in test}


def test_reviews_are_imitated_whole(shared):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "models/imdb-6M")
    config = DataConfig(str(shared / "data/imdb/val.jsonl.gz"), overlong="drop", limit=100)
    examples = load_examples(config, tokenizer, stop_id=1)
    assert all(example.trained == [False] + [True] * (len(example.ids) - 1) for example in examples)
    assert all(example.ids[-1] == 1 for example in examples)
