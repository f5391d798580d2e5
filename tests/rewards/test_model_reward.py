"""Reward models as a source: the policy's own tokens where they mean the same, else the same text in theirs."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.testing import assert_close
from transformers import PreTrainedTokenizerFast

from tether.config import PairsConfig, RewardShapingConfig, RewardSourceConfig
from tether.data.pairs import load_pairs
from tether.data.tokenizer import load_tokenizer
from tether.errors import RewardError
from tether.models.reward_model import init_reward_model, load_reward_model, save_reward_model
from tether.rewards import build_reward
from tether.rewards.model import same_tokens
from tether.types import Completions, Prompt

CPU = torch.device("cpu")
EOS = 1


def completions_of(tokenizer, texts, cut=(), chat=False):
    sources = [[{"role": "user", "content": f"p{i}"}] if chat else f"p{i}" for i in range(len(texts))]
    ids = [tokenizer.encode(t) + ([] if i in cut else [EOS]) for i, t in enumerate(texts)]
    prompts = [
        Prompt(tuple(tokenizer.apply_chat_template(s, tokenize=True, add_generation_prompt=True)["input_ids"])
               if chat else tuple(tokenizer.encode(s)), s, i)
        for i, s in enumerate(sources)
    ]  # fmt: skip
    floats = [[0.0] * len(row) for row in ids]
    return Completions(prompts, ids, floats, floats, ["length" if i in cut else "stop" for i in range(len(texts))])


@pytest.fixture
def reward_model(tiny_model, tiny_tokenizer, tmp_path):
    """Directory of a random reward model with the policy's tokenizer, mean .5 and std 2."""

    def make(tokenizer=tiny_tokenizer, stop_id=EOS, **changes):
        model = init_reward_model(
            str(tiny_model(**changes)), dtype=torch.float32, weights_dtype=torch.float32, device=CPU, seed=0
        )
        model.mean, model.std = 0.5, 2.0
        save_reward_model(model, tokenizer, tmp_path / "rm", stop_id=stop_id)
        return tmp_path / "rm"

    return make


@pytest.fixture(scope="module")
def other_tokenizer(tiny_tokenizer):
    """The same bytes under other ids, a bos in front of text, <end> instead of <eos>, and another chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {token: i for i, token in enumerate([*alphabet, "<none>", "<end>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<none>", eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role[0] }}] {% if m.role == 'assistant' %}(thinks) {{ m.content }}<end>\n"
        "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}[a] {% endif %}"
    )
    return tokenizer


def score(path, tokenizer, completions):
    source = RewardSourceConfig(model=str(path))
    rewards = build_reward([source], RewardShapingConfig(), tokenizer, (EOS,), CPU)
    return rewards.score(completions).scores


def test_the_policys_ids_go_straight_through_when_the_tokenizers_are_equal(reward_model, tiny_tokenizer):
    path = reward_model()
    batch = completions_of(tiny_tokenizer, ["good", "bad", ""], cut=(1,))
    # Ids that no text encodes to: a stop token in the prompt, a pad inside the answer. Decoding would lose them.
    batch.response_ids[0].insert(2, tiny_tokenizer.pad_token_id)
    rows = [[*p.ids, *ids] for p, ids in zip(batch.prompts, batch.response_ids, strict=True)]
    raw = load_reward_model(str(path), dtype=torch.float32, device=CPU)(rows)
    assert_close(score(path, tiny_tokenizer, batch), ((raw - 0.5) / 2.0).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("chat", [False, True])
def test_another_tokenizer_sees_the_same_text_in_its_own_tokens(reward_model, tiny_tokenizer, other_tokenizer, chat):
    path = reward_model(other_tokenizer, stop_id=other_tokenizer.eos_token_id)
    batch = completions_of(tiny_tokenizer, ["good", "bad"], cut=(1,), chat=chat)
    # By hand: what the model's template and tokenizer make of it; its stop token only after the answer that stopped.
    texts = ["[u] p0\n[a] (thinks) good", "[u] p1\n[a] (thinks) bad"] if chat else ["p0good", "p1bad"]
    rows = [other_tokenizer.encode(text) for text in texts]
    rows[0].append(other_tokenizer.eos_token_id)
    raw = load_reward_model(str(path), dtype=torch.float32, device=CPU)(rows)
    assert_close(score(path, tiny_tokenizer, batch), ((raw - 0.5) / 2.0).double(), atol=1e-6, rtol=0)


def test_a_chat_answer_is_read_in_the_ids_that_reward_training_gives_it(
    reward_model, tiny_tokenizer, other_tokenizer, tmp_path
):
    path = reward_model(other_tokenizer, stop_id=other_tokenizer.eos_token_id)
    batch = completions_of(tiny_tokenizer, ["good"], chat=True)
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": batch.prompts[0].source, "chosen": "good", "rejected": "bad"}))
    (pair,) = load_pairs(PairsConfig(str(data)), other_tokenizer, stop_id=other_tokenizer.eos_token_id)
    raw = load_reward_model(str(path), dtype=torch.float32, device=CPU)([pair.prompt_ids + pair.chosen_ids])
    assert_close(score(path, tiny_tokenizer, batch), ((raw - 0.5) / 2.0).double(), atol=1e-6, rtol=0)


def test_of_a_prompt_that_was_cut_the_model_sees_what_the_policy_saw(reward_model, tiny_tokenizer, other_tokenizer):
    path = reward_model(other_tokenizer, stop_id=other_tokenizer.eos_token_id)
    whole = completions_of(tiny_tokenizer, ["good"])
    long = Prompt(tuple(tiny_tokenizer.encode("é p0"))[1:], "Once, é p0", 0, cut=True)  # cut through the é's two bytes
    cut = replace(whole, prompts=[long])
    seen = replace(whole, prompts=[Prompt(tuple(tiny_tokenizer.encode(" p0")), " p0", 0)])
    assert score(path, tiny_tokenizer, cut) == score(path, tiny_tokenizer, seen) != score(path, tiny_tokenizer, whole)


def test_half_a_conversation_is_refused_before_sampling_where_it_would_need_another_template(
    reward_model, tiny_tokenizer, other_tokenizer
):
    def rewards(tokenizer):
        path = reward_model(tokenizer, stop_id=tokenizer.eos_token_id)
        return build_reward([RewardSourceConfig(model=str(path))], RewardShapingConfig(), tiny_tokenizer, (EOS,), CPU)

    cut = [replace(p, cut=True, row=7) for p in completions_of(tiny_tokenizer, ["good"], chat=True).prompts]
    rewards(tiny_tokenizer).check(cut)  # the same tokens: they go straight through
    with pytest.raises(RewardError, match=r"messages in row 7 .* were cut.*Set prompts.overlong: drop"):
        rewards(other_tokenizer).check(cut)


def test_a_chat_that_the_models_template_refuses_is_named_with_its_row(reward_model, tiny_tokenizer, other_tokenizer):
    picky = copy.deepcopy(other_tokenizer)
    picky.chat_template = "{{ 'asked' if add_generation_prompt else 'answered' }}"  # no beginning of the answered one
    path = reward_model(picky, stop_id=picky.eos_token_id)
    with pytest.raises(
        RewardError, match=r"reward model rm cannot read row 0 .*the chat template ends the prompt with"
    ):
        score(path, tiny_tokenizer, completions_of(tiny_tokenizer, ["good"], chat=True))


def test_tokenizers_are_the_same_only_if_ids_template_and_encoding_agree(tiny_model, tiny_tokenizer, other_tokenizer):
    copy = load_tokenizer(str(tiny_model()))
    assert same_tokens(tiny_tokenizer, copy)
    copy.pad_token = "<eos>"
    assert same_tokens(tiny_tokenizer, copy)  # which token pads is of no consequence
    copy.chat_template = "{{ messages }}"
    assert not same_tokens(tiny_tokenizer, copy)
    assert not same_tokens(tiny_tokenizer, other_tokenizer)


def test_a_sequence_longer_than_the_models_context_is_refused_with_its_row(reward_model, tiny_tokenizer):
    path = reward_model(max_position_embeddings=8)
    with pytest.raises(RewardError, match=r"positions for 8 tokens, but row 1 .* are 13: .*max_new_tokens"):
        score(path, tiny_tokenizer, completions_of(tiny_tokenizer, ["good", "a long one"]))


def test_a_reward_model_that_answers_nan_is_refused_with_its_row(reward_model, tiny_tokenizer):
    path = reward_model()
    config = (path / "config.json").read_text().replace('"tether_reward_std": 2.0', '"tether_reward_std": 0.0')
    (path / "config.json").write_text(config)
    with pytest.raises(RewardError, match=r"reward model rm gives .*inf for row 0"):
        score(path, tiny_tokenizer, completions_of(tiny_tokenizer, ["good"]))
