"""The models that speed is measured on: random weights in the shapes of the table, written once to a directory."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

SHAPES = {  # name: (width, layers, heads, feed-forward, vocabulary)
    "7M": (288, 6, 6, 768, 4096),
    "100M": (768, 12, 12, 2048, 32_000),
    "50k": (64, 2, 4, 256, 50_000),
}


def build(name: str, folder: Path) -> Path:
    """The directory of a random Llama of this shape, with a tokenizer of as many words; made if it is not there."""
    path = folder / name
    if (path / "tokenizer_config.json").exists():
        return path
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    width, layers, heads, feed_forward, vocabulary = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=feed_forward,
        vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    words = {"<end>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(path)
    return path


def prompts(name: str, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` token ids, the same ones every time."""
    vocabulary = SHAPES[name][-1]
    return [[2 + (i * 7919 + t * 104_729) % (vocabulary - 2) for t in range(length)] for i in range(count)]


def matmul_weights(name: str) -> list[tuple[int, int]]:
    """(in, out) of every weight that a token is multiplied with, the head included."""
    width, layers, _, feed_forward, vocabulary = SHAPES[name]
    layer = [(width, width)] * 4 + [(width, feed_forward)] * 2 + [(feed_forward, width)]
    return layer * layers + [(width, vocabulary)]


def words(ids: list[int]) -> str:
    """The text that the tokenizer of `build` turns into these ids."""
    return " ".join(f"w{i}" for i in ids)


def build_reward(name: str, folder: Path) -> Path:
    """The directory of a random reward model of this shape; made if it is not there."""
    path = folder / f"{name}-reward"
    if (path / "tokenizer_config.json").exists():
        return path
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    policy = build(name, folder)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(policy, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(policy).save_pretrained(path)
    return path
