"""A reward model: a causal trunk and one number, read at the last real token.

The model is transformers' sequence classifier with one label, read at the last token by length. The stock forward pass
looks for the last token that is not the pad id instead, and skips a final stop token where pad and eos are the same;
`save_reward_model` chooses a pad id with which both agree, and checks that they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from tether.errors import ModelError
from tether.models.loading import autocast, check_complete, model_config, quiet_transformers, without_dropout
from tether.runs.files import replacing_directory, wrap_os_errors, write_sums
from tether.types import microbatches

BATCH_TOKENS = 16384  # padded, that are scored at once


class RewardModel(nn.Module):
    """Scores sequences of tokens. `forward` is what is trained; `score` is what is used: normalized, no gradient."""

    def __init__(self, classifier: PreTrainedModel, *, dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.dtype = dtype  # compute precision; the weights may be float32 masters
        self.mean, self.std = mean, std  # of the raw scores of reference responses

    @property
    def trunk(self) -> PreTrainedModel:
        """The transformer without its head: tokens in, hidden states out."""
        trunk = self.classifier.base_model
        assert isinstance(trunk, PreTrainedModel)
        return trunk

    @property
    def head(self) -> nn.Linear:
        head = self.classifier.score
        assert isinstance(head, nn.Linear)
        return head

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def value_head(self) -> nn.Linear:
        """A linear layer that says the normalized score of a hidden state: a critic's head to start from."""
        head = nn.Linear(self.head.in_features, 1, device=self.device)
        with torch.no_grad():
            head.weight.copy_(self.head.weight / self.std)
            bias = self.head.bias if self.head.bias is not None else torch.zeros(1, device=self.device)
            head.bias.copy_((bias - self.mean) / self.std)
        return head

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Raw scores [B] of B ragged sequences of ids, float32 or wider; padded right, they need no attention mask."""
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        with autocast(self.dtype, self.device):
            hidden = self.trunk(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        pooled = hidden[torch.arange(len(rows), device=self.device), lengths - 1]
        wide = torch.promote_types(pooled.dtype, torch.float32)  # a sum over the whole width is too coarse in bfloat16
        bias = self.head.bias.to(wide) if self.head.bias is not None else None
        return nn.functional.linear(pooled.to(wide), self.head.weight.to(wide), bias).squeeze(-1)

    @torch.no_grad()
    def score(self, rows: Sequence[Sequence[int]], *, batch_tokens: int = BATCH_TOKENS) -> Tensor:
        """Normalized scores [B] float32 on the CPU, in the order of `rows`; batch_tokens: padded tokens at once."""
        scores = torch.empty(len(rows))
        for index in microbatches([len(row) for row in rows], batch_tokens):
            scores[index] = self([rows[i] for i in index.tolist()]).float().cpu()
        return (scores - self.mean) / self.std


def load_reward_model(path: str, *, dtype: torch.dtype, device: torch.device, **where: Any) -> RewardModel:
    """A trained reward model with its normalization; weights in `dtype`, dropout 0. where: as in `load_causal_lm`."""
    config = model_config(path, **where)
    check_one_label(path, config)
    classifier, missing = _load_classifier(path, config, dtype, **where)
    if missing:
        raise ModelError(
            f"{path} lacks {missing[0]}: its scores would be random. It is a language model, or an incomplete copy; "
            "train a reward model from it with `tether reward`."
        )
    mean, std = getattr(config, "tether_reward_mean", 0.0), getattr(config, "tether_reward_std", 1.0)
    return RewardModel(classifier.to(device), dtype=dtype, mean=mean, std=std)


def check_one_label(path: str, config: PretrainedConfig) -> None:
    """Raise ModelError unless a model of this transformers config gives one number."""
    kind = (config.architectures or [""])[0]
    if config.num_labels != 1 and kind and "Classification" not in kind:
        raise ModelError(
            f"{path} is a {kind}, a language model: it predicts tokens and has no score to give. Name a reward model: "
            "`tether reward` trains one from it."
        )
    if config.num_labels != 1:
        raise ModelError(
            f"{path} has {config.num_labels} labels: a reward model has one number to give. Name a sequence "
            "classifier with num_labels=1, such as `tether reward` writes."
        )


def init_reward_model(
    path: str, *, dtype: torch.dtype, weights_dtype: torch.dtype, device: torch.device, seed: int, **where: Any
) -> RewardModel:
    """A reward model to train: the trunk of a language model and a fresh head, or a reward model with its own head.

    dtype: compute precision. weights_dtype: float32 for masters, the compute precision for a frozen base.
    """
    config = model_config(path, **where)
    config.num_labels = 1
    classifier, missing = _load_classifier(path, config, weights_dtype, **where)
    check_complete(path, classifier, [name for name in missing if not name.startswith("score.")])
    if missing:
        init_head(classifier, seed)
    return RewardModel(classifier.to(device), dtype=dtype)


def reward_model_from_config(config: PretrainedConfig, *, dtype: torch.dtype, seed: int) -> RewardModel:
    """A reward model of random float32 weights; same seed, same weights."""
    config.num_labels = 1
    _ensure_classifier(config)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    init_head(classifier, seed)
    return RewardModel(without_dropout(classifier), dtype=dtype)


def init_head(classifier: PreTrainedModel, seed: int) -> None:
    """Head weights from N(0, 1/(d+1)), bias 0: first scores then have a spread of about 1, whatever the width d.

    Source: Ziegler et al. 2019 and its code; "The N+ Implementation Details" (arXiv:2403.17031).
    """
    head: Any = classifier.score
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1)
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.zero_()


def _load_classifier(path: str, config: PretrainedConfig, dtype: torch.dtype, **where: Any) -> tuple[Any, list[str]]:
    """(classifier, names of the weights that the directory did not have)."""
    _ensure_classifier(config)
    where = {"trust_remote_code": False, **where}  # where it is left out, transformers asks at the terminal
    with quiet_transformers():
        try:
            classifier, info = AutoModelForSequenceClassification.from_pretrained(
                path, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
            )
        except Exception as error:
            raise ModelError(f"{path} cannot be loaded as a sequence classifier: {error}") from error
    if not isinstance(getattr(classifier, "score", None), nn.Linear):
        raise ModelError(
            f"{path} is a {type(classifier).__name__}, which does not read its score at the last token: Tether's "
            "reward models are causal, with a head named `score`. Train one with `tether reward`."
        )
    return without_dropout(classifier), sorted(info["missing_keys"])


def _ensure_classifier(config: PretrainedConfig) -> None:
    """Teach transformers a classifier for a decoder that has none (Cohere, Granite): its own generic one on that trunk.

    Tether loads such a reward model; plain transformers does so after the same registration.
    """
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or kind not in MODEL_MAPPING:
        return
    trunk: Any = MODEL_MAPPING[kind]
    name = trunk.__name__.removesuffix("Model") + "ForSequenceClassification"
    classifier = type(name, (GenericForSequenceClassification, trunk.__bases__[0]), {"config_class": kind})
    AutoModelForSequenceClassification.register(kind, classifier, exist_ok=True)


def save_reward_model(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, directory: Path,
    *, stop_id: int | None, card: str = "", trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Write a Hugging Face directory that the stock classifier scores as we do, normalization in its config.json.

    stop_id: the token that ended the sequences it was trained on. A directory appears whole or not at all, with the
    checksums of its files. Raises ModelError where the reloaded stock model scores a probe differently.
    """
    config = model.classifier.config
    pad_id = choose_pad_id(tokenizer, stop_id=stop_id, vocab_size=config.get_text_config().vocab_size)
    config.pad_token_id = config.get_text_config().pad_token_id = pad_id
    config.tether_reward_mean, config.tether_reward_std = model.mean, model.std
    config.eos_token_id = stop_id
    tokenizer.pad_token = None if pad_id is None else tokenizer.convert_ids_to_tokens(pad_id)
    with wrap_os_errors(directory), replacing_directory(directory) as partial:
        with quiet_transformers():
            model.classifier.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        compare_with_stock(model, partial, stop_id=stop_id, trust_remote_code=trust_remote_code)
        write_sums(partial)


def choose_pad_id(tokenizer: PreTrainedTokenizerBase, *, stop_id: int | None, vocab_size: int) -> int | None:
    """A pad id that no scored sequence ends with: the tokenizer's own, else unk, else another special token.

    None if there is no such token: the stock model then refuses padded batches, and reads none one token too early.
    """
    special = sorted(token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special)
    ends = {stop_id, tokenizer.eos_token_id}
    candidates: list[int | None] = [tokenizer.pad_token_id, tokenizer.unk_token_id, *special]
    return next((c for c in candidates if c is not None and c not in ends and c < vocab_size), None)


def compare_with_stock(
    model: RewardModel, directory: Path, *, stop_id: int | None, trust_remote_code: bool = False
) -> None:
    """Reload `directory` in plain transformers and compare raw scores on a padded batch with rows that end with a stop.

    Both compute in the precision of the weights: rounding would hide a small difference. Raises ModelError.
    """
    weights = model.head.weight.dtype
    with quiet_transformers():
        stock = AutoModelForSequenceClassification.from_pretrained(
            directory, dtype=weights, trust_remote_code=trust_remote_code
        )
    stock = stock.to(model.device).eval()
    config = stock.config.get_text_config()
    pad_id = config.pad_token_id
    stop = [] if stop_id is None else [stop_id]
    ordinary = [i for i in range(min(config.vocab_size, 64)) if i not in (pad_id, stop_id)] or stop
    rows = [ordinary[:9] + stop, ordinary[:5], ordinary[-3:] + stop]
    with torch.no_grad():
        ours = RewardModel(model.classifier, dtype=weights)(rows)
        if pad_id is None:
            theirs = torch.cat([stock(torch.tensor([row], device=model.device)).logits[:, 0] for row in rows])
        else:
            tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
            mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
            theirs = stock(tokens.to(model.device), attention_mask=mask.to(model.device)).logits[:, 0]
    gap = (ours - theirs.to(ours.dtype)).abs().max().item()
    allowed = (5e-2 if weights == torch.bfloat16 else 1e-3) * max(1.0, ours.abs().max().item())
    if not gap <= allowed:
        raise ModelError(
            f"{directory}: plain transformers scores a probe {gap:.2g} away from Tether's own score: whoever loads it "
            f"would rank answers differently. {type(stock).__name__} pools at the last token that is not "
            f"pad_token_id={pad_id}; give the tokenizer a pad token that is not its stop token, or use an "
            "architecture of transformers' own."
        )
