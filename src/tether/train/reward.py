"""Fitting a reward model to human preferences: Bradley–Terry on pairs, then an honest look at what it learned."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tether.config import RewardConfig, SFTModelConfig, check, check_warmup
from tether.data.pairs import Pair, load_pairs
from tether.data.snapshot import pin_labels
from tether.data.split import share_prompts, split_pairs
from tether.data.tokenizer import check_vocabulary, load_generation_config, stop_token_ids
from tether.math import bradley_terry_loss
from tether.models.loading import add_lora, context_length, resolve_device, set_checkpointing
from tether.models.reward_model import RewardModel, init_reward_model, reward_model_from_config, save_reward_model
from tether.runs import Run, recorded_inputs
from tether.train import sft
from tether.train.card import reward_card
from tether.train.optim import ScheduledOptimizer, build_optimizer, read_numbers, shuffled_batches
from tether.train.preamble import check_parts, open_run
from tether.train.preference_report import PreferenceReport, build_report
from tether.train.state import TrainingState
from tether.types import LogSink, microbatches


def reward_model(config: RewardConfig, *, sinks: Sequence[LogSink] = (), fresh: bool = False) -> Run:
    """Train, or continue the run in `config.run`; returns it, with the reward model in `.final`.

    What it learned is printed, and written to reward_report.json and calibration.html in the run directory.

    sinks: get every step's metrics; see `tether.types.LogSink`. fresh: move a run that is there aside first.
    """
    check(config)
    check_parts(None, None, sinks)
    section, device = config.reward_model, resolve_device(config.device)
    inputs = input_hashes(config, fresh=fresh)
    with open_run(config, command="reward", fresh=fresh, inputs=inputs) as (run, signals):
        if run.finished:
            return Run.open(run.path)
        model, adapter, tokenizer = load_model(config.model, device=device, seed=config.seed)
        stop_id = stop_token(config.model, tokenizer)
        context = context_length(model.classifier.config)
        pairs = load_pairs(config.data, tokenizer, stop_id=stop_id, context=context, pinned=inputs["data.path"])
        train, test = split_pairs(pairs, section.test_fraction, config.seed)
        if share_prompts(train, test):
            print(f"all {len(pairs)} pairs have one prompt: {len(test)} are held out by their answers", file=sys.stderr)
        plan = shuffled_batches(len(train), batch=section.batch, epochs=section.epochs, seed=config.seed)
        check_warmup(config.optim, len(plan))
        named = [(name, p) for name, p in model.classifier.named_parameters() if p.requires_grad]
        trunk = [(name, p) for name, p in named if not name.startswith("score.")]
        head = [(name, p) for name, p in named if name.startswith("score.")]  # learns faster
        optimizer = build_optimizer(config.optim, trunk, head, lora=adapter is not None)
        steps = ScheduledOptimizer(optimizer, config.optim, len(plan))
        parts = {"policy": adapter or model.classifier, "head": model.head}  # an adapter does not hold the head

        def learn(batch: list[int]) -> dict[str, float | None]:
            return accumulate(model, [train[i] for i in batch], section.center, section.microbatch_tokens)

        TrainingState(run, parts, steps, tokenizer).run_steps(plan, learn, signals, sinks)
        if adapter is not None:
            # In place: the classifier's own layers are whole again. In float32: bfloat16 would lose a small update.
            adapter.float().merge_and_unload()
        report = finish(model, train, test)
        report.write(run.path)
        print(report.text())
        card = reward_card(Run(run.path), config, report.text())
        trust = config.model.trust_remote_code
        save_reward_model(model, tokenizer, run.path / "final", stop_id=stop_id, card=card, trust_remote_code=trust)
    return Run.open(run.path)


def accumulate(
    model: RewardModel, pairs: Sequence[Pair], center: float, microbatch_tokens: int
) -> dict[str, float | None]:
    """Add one optimizer step's gradients to the model's, microbatch by microbatch; no step. Returns its metrics."""
    widths = [2 * (len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))) for p in pairs]
    total, decided = sum(pair.weight for pair in pairs), sum(pair.probability != 0.5 for pair in pairs)
    found: list[dict[str, torch.Tensor]] = []
    for index in microbatches(widths, microbatch_tokens):
        part = [pairs[i] for i in index.tolist()]
        chosen, rejected = model(rows_of(part)).chunk(2)
        targets, weights = chosen.new_tensor([(p.probability, p.weight) for p in part]).unbind(1)
        loss, sums = bradley_terry_loss(
            chosen, rejected, targets, weights, center=center, denominator=total, decided=max(1, decided)
        )
        loss.backward()
        found.append(sums)
    numbers = read_numbers(found)
    metrics: dict[str, float | None] = {name: sum(sums[name] for sums in numbers) for name in found[0]}
    if not decided:  # of ties alone no accuracy is known
        metrics["reward_model/accuracy"] = None
    return metrics


def rows_of(pairs: Sequence[Pair]) -> list[list[int]]:
    """2B sequences of B pairs: first every chosen one, then every rejected one."""
    return [p.prompt_ids + p.chosen_ids for p in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]


def finish(model: RewardModel, train: Sequence[Pair], test: Sequence[Pair]) -> PreferenceReport:
    """Judge the model on the held-out pairs, and normalize it: the answers it was trained on score mean 0, deviation 1.

    Source of the normalization: Ziegler et al. 2019. It makes β, clips and the score of a missing stop token mean the
    same whatever the reward model; differences times the deviation are still Bradley–Terry's log-odds.
    """
    model.mean, model.std = 0.0, 1.0
    raw = model.score(rows_of(train)).double()
    held_out = model.score(rows_of(test)).double()
    report = build_report(train, raw, test, held_out)
    model.mean, model.std = report.mean, report.std
    return report


def input_hashes(config: RewardConfig, *, fresh: bool = False) -> dict[str, str]:
    """Hashes of what a run reads, by config key; of labels what `pin_labels` gives: a run that is continued reads those
    that it began on. fresh: a run that is there is moved aside."""
    pinned = pin_labels(config.data, {} if fresh else recorded_inputs(config.run))
    return sft.input_hashes(config) | ({"data.path": pinned} if pinned else {})


def stop_token(config: SFTModelConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that a policy grown from this model would end answers with."""
    generation = load_generation_config(config.policy, config.revision) if isinstance(config.policy, str) else None
    return next(iter(stop_token_ids(tokenizer, generation, None)), None)


def load_model(
    config: SFTModelConfig, *, device: torch.device, seed: int
) -> tuple[RewardModel, Any | None, PreTrainedTokenizerBase]:
    """(model ready to train, its peft adapter under LoRA, its tokenizer). Trained weights are float32."""
    tokenizer, initial, dtype, where = sft.resolve_start(config, device=device, seed=seed)
    if initial is not None:
        model = reward_model_from_config(initial.config, dtype=dtype, seed=seed).to(device)
    else:
        weights = dtype if config.lora else torch.float32
        model = init_reward_model(dtype=dtype, weights_dtype=weights, seed=seed, **where)
    embeddings: Any = model.classifier.get_input_embeddings()
    check_vocabulary(tokenizer, embeddings.weight.shape[0])
    adapter = None
    if config.lora:
        adapter = add_lora(model.trunk, config.lora, seed=seed, task="FEATURE_EXTRACTION")
        model.head.float()
    set_checkpointing(config.gradient_checkpointing, device, model.classifier)
    return model.train(), adapter, tokenizer
