"""Supervised fine-tuning: imitate examples, from a checkpoint or from scratch.

The loss is the mean over the trained tokens of the whole optimizer step, however it is cut into microbatches. Which
examples a step sees follows from (seed, epoch) alone: a run that is continued ends with the same bits.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tether.config import DPOConfig, InitModelConfig, RewardConfig, SFTConfig, SFTModelConfig, check, check_warmup
from tether.data.examples import Example, load_examples
from tether.data.tokenizer import check_vocabulary, load_tokenizer, stop_token_ids
from tether.distributed.ranks import ALONE, Ranks, local_device, need_replicas
from tether.errors import ConfigError
from tether.math import nll_loss
from tether.models.export import save_model
from tether.models.ilql import heads_left_out
from tether.models.language_model import LanguageModel
from tether.models.loading import (
    add_lora,
    context_length,
    init_causal_lm,
    load_causal_lm,
    model_config,
    resolve_device,
    resolve_dtype,
    set_checkpointing,
)
from tether.runs import Run, hash_files
from tether.train.card import sft_card
from tether.train.optim import SHUFFLE, ScheduledOptimizer, build_optimizer, permutation, read_numbers
from tether.train.preamble import check_parts, open_run
from tether.train.state import TrainingState
from tether.types import LogSink

Row = list[Example]  # what stands in one row of tokens: one example, or several when packed


def sft(config: SFTConfig, *, sinks: Sequence[LogSink] = (), fresh: bool = False) -> Run:
    """Train, or continue the run in `config.run`; returns it, with the trained model in `.final`.

    sinks: get every step's metrics; see `tether.types.LogSink`. fresh: move a run that is there aside first.
    """
    check(config)
    check_parts(None, None, sinks)
    need_replicas(config.distributed.shard, "sft")
    inputs, device = input_hashes(config), local_device(resolve_device(config.device))
    with open_run(config, command="sft", fresh=fresh, inputs=inputs) as (run, signals, ranks):
        if run.finished:
            return Run.open(run.path)
        model, tokenizer, notes = load_model(config.model, device=device, seed=config.seed)
        stop_ids = stop_token_ids(tokenizer, model.hf_model.generation_config, None)
        stop_id, context = next(iter(stop_ids), None), context_length(model.config)
        examples = load_examples(config.data, tokenizer, stop_id=stop_id, train_on=config.sft.train_on, context=context)
        if config.sft.packing:
            check_packing(model)
        plan = plan_steps([len(e.ids) for e in examples], config)
        check_warmup(config.optim, len(plan))
        named = [(name, p) for name, p in model.lm.named_parameters() if p.requires_grad]
        optimizer = build_optimizer(config.optim, named, lora=config.model.lora is not None)
        steps = ScheduledOptimizer(optimizer, config.optim, len(plan), ranks)

        def learn(batch: list[list[int]]) -> dict[str, float]:
            rows = [[examples[i] for i in row] for row in batch]
            return accumulate(model, rows, config.sft.microbatch_tokens, ranks)

        state = TrainingState(run, {"policy": model.lm}, steps, tokenizer, ranks=ranks)
        state.run_steps(plan, learn, signals, sinks, notes)
        if not run.follows:
            save_model(model, tokenizer, run.path / "final", card=sft_card(Run(run.path), config), stop_ids=stop_ids)
    return Run.open(run.path)


def accumulate(
    model: LanguageModel, rows: Sequence[Row], microbatch_tokens: int, ranks: Ranks = ALONE
) -> dict[str, float]:
    """Add one optimizer step's gradients to the model's, microbatch by microbatch; no step. Returns its metrics.

    L = - Σ log π(token | what precedes it in its example) / trained tokens of the step
    """
    total = sum(sum(example.trained) for row in rows for example in row)
    losses: list[dict[str, Tensor]] = []
    for index, counts in ranks.deal([sum(len(e.ids) for e in row) for row in rows], microbatch_tokens):
        batch = Batch.of([rows[i] for i in index.tolist()], model.device)
        logprobs, _, _ = model.logprobs(batch.tokens, batch.before, batch.targets, **batch.positions)
        loss = nll_loss(logprobs, torch.ones_like(logprobs, dtype=torch.bool), denominator=total)
        (loss if counts else 0.0 * loss).backward()
        if counts:
            losses.append({"loss": loss.detach()})
    numbers = ranks.gather(read_numbers(losses))
    return {"loss": sum(number["loss"] for number in numbers), "tokens/trained": total}


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens padded on the right, and which of them are trained."""

    tokens: Tensor  # [B, T] int64
    before: tuple[Tensor, Tensor]  # ([N], [N]) row and column before each trained token
    targets: Tensor  # [N] int64
    positions: dict[str, Any]  # position_ids [B, T] where rows hold several examples, else nothing

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> Batch:
        """Position ids start over with every example: without an attention mask, transformers takes that as the border
        between sequences that must not see each other."""
        ids = [torch.tensor([token for example in row for token in example.ids]) for row in rows]
        tokens = pad_sequence(ids, batch_first=True)
        flags = [torch.tensor([flag for example in row for flag in example.trained]) for row in rows]
        row_index, column = pad_sequence(flags, batch_first=True).nonzero(as_tuple=True)
        positions = {}
        if any(len(row) > 1 for row in rows):
            counts = [torch.cat([torch.arange(len(example.ids)) for example in row]) for row in rows]
            positions["position_ids"] = pad_sequence(counts, batch_first=True).to(device)
        before = (row_index.to(device), column.to(device) - 1)
        return cls(tokens.to(device), before, tokens[row_index, column].to(device), positions)


def plan_steps(lengths: Sequence[int], config: SFTConfig) -> list[list[list[int]]]:
    """Every optimizer step of the run: its rows, each a list of examples; a function of the seed alone.

    lengths: tokens of each example. Every epoch sees every example once; its last step may be smaller.
    """
    section, plan = config.sft, []
    for epoch in range(section.epochs):
        order = permutation(len(lengths), seed=config.seed, stream=SHUFFLE, counter=(epoch,))
        rows = pack(order, lengths, config.data.max_tokens) if section.packing else [[i] for i in order]
        plan += [rows[start : start + section.batch] for start in range(0, len(rows), section.batch)]
    return plan


def pack(order: Sequence[int], lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of `width` tokens, filled in this order, each example into the fullest row that has room (best fit)."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row) of rows that are not full, ascending
    for i in order:
        place = bisect.bisect_left(room, (lengths[i], -1))
        if place == len(room):
            room.append((width, len(rows)))
            rows.append([])
        free, row = room.pop(place)
        rows[row].append(i)
        if free > lengths[i]:
            bisect.insort(room, (free - lengths[i], row))
    return rows


@torch.no_grad()
def check_packing(model: LanguageModel) -> None:
    """Raise ConfigError if this architecture lets packed examples see each other, found out on a probe."""
    ids = [i * 7919 % model.config.vocab_size for i in range(12)]
    row = [Example(ids[:5], [False] * 5, 0), Example(ids[5:], [False] * 7, 1)]
    batch = Batch.of([row], model.device)
    with model.full_precision():
        packed = model.hidden(batch.tokens, **batch.positions)[0, 5:]
        alone = model.hidden(batch.tokens[:, 5:])[0]
    if (packed - alone).abs().max() > 1e-3 * alone.abs().max():
        raise ConfigError(
            f"sft.packing=true, but {type(model.hf_model).__name__} lets examples in one row see each other: it would "
            "learn from borders that do not exist. Set sft.packing to false."
        )


def load_model(
    config: SFTModelConfig, *, device: torch.device, seed: int
) -> tuple[LanguageModel, PreTrainedTokenizerBase, list[str]]:
    """(model ready to train, its tokenizer, notes for the log). Trained weights are float32."""
    tokenizer, initial, dtype, where = resolve_start(config, device=device, seed=seed)
    lm: Any = initial
    lm = lm.to(device) if lm else load_causal_lm(dtype=dtype if config.lora else torch.float32, **where)
    check_vocabulary(tokenizer, lm.get_input_embeddings().weight.shape[0])
    if config.lora:
        lm = add_lora(lm, config.lora, seed=seed)
    set_checkpointing(config.gradient_checkpointing, device, lm)
    model = LanguageModel(lm, dtype)
    note = model.check_head()
    lm.train()
    return model, tokenizer, [*([note] if note else []), *heads_left_out(config.policy)]


def resolve_start(
    config: SFTModelConfig, *, device: torch.device, seed: int
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel | None, torch.dtype, dict[str, Any]]:
    """(tokenizer, the random model where `policy` is an init, compute precision, else arguments of what loads it)."""
    where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if isinstance(config.policy, InitModelConfig):
        tokenizer = load_tokenizer(config.policy.tokenizer, **where)
        initial = init_model(config.policy, tokenizer, seed=seed)
        return tokenizer, initial, resolve_dtype(config.dtype, device, initial.config), {}
    tokenizer = load_tokenizer(config.policy, **where)
    dtype = resolve_dtype(config.dtype, device, model_config(config.policy, **where))
    return tokenizer, None, dtype, {"path": config.policy, "device": device, **where}


def init_model(config: InitModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """A causal language model with random weights, made for `tokenizer`: its vocabulary, its special ids."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    model: PreTrainedModel = init_causal_lm(config.init, vocab_size=vocab_size, special=special, seed=seed)
    return model


def init_architecture(config: InitModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The transformers config that `init_model` builds, without a weight; raises what building it would."""
    with torch.device("meta"):
        return init_model(config, tokenizer, seed=0).config


def input_hashes(config: SFTConfig | RewardConfig | DPOConfig) -> dict[str, str]:
    """Hashes of what a run reads, by config key: it continues only on the same."""
    model, data = config.model, config.data
    if isinstance(model.policy, InitModelConfig):
        hashes = {"model.policy.tokenizer": hash_files(model.policy.tokenizer, model.revision)}
    else:
        hashes = {"model.policy": hash_files(model.policy, model.revision)}
    return hashes | {"data.path": hash_files(data.path, kind="dataset")}
