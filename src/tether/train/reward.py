"""Fitting a reward model to human preferences: Bradley–Terry on pairs, then an honest look at what it learned."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tether.config import RewardConfig, SFTModelConfig, check, check_warmup
from tether.data.pairs import Pair, load_pairs
from tether.data.snapshot import pin_labels
from tether.data.split import resample, share_prompts, split_pairs
from tether.data.tokenizer import check_vocabulary, load_generation_config, stop_token_ids
from tether.distributed.ranks import ALONE, Ranks, local_device, need_replicas
from tether.math import bradley_terry_loss
from tether.models.loading import (
    add_lora,
    context_length,
    model_config,
    resolve_device,
    resolve_dtype,
    set_checkpointing,
)
from tether.models.reward_model import (
    RewardModel,
    init_reward_model,
    load_reward_model,
    reward_model_from_config,
    save_reward_model,
)
from tether.runs import Run, RunDirectory, recorded_inputs
from tether.runs.files import damage, replacing_directory, wrap_os_errors, write_sums
from tether.train import sft
from tether.train.card import reward_card
from tether.train.checkpoint import latest
from tether.train.optim import ScheduledOptimizer, build_optimizer, read_numbers, shuffled_batches
from tether.train.preamble import check_parts, open_run
from tether.train.preference_report import PreferenceReport, build_report
from tether.train.signals import Signals
from tether.train.state import TrainingState
from tether.types import LogSink


def reward_model(config: RewardConfig, *, sinks: Sequence[LogSink] = (), fresh: bool = False) -> Run:
    """Train, or continue the run in `config.run`; returns it, with the reward model in `.final`.

    What it learned is printed, and written to reward_report.json and calibration.html in the run directory.

    sinks: get every step's metrics; see `tether.types.LogSink`. fresh: move a run that is there aside first.
    """
    check(config)
    check_parts(None, None, sinks)
    need_replicas(config.distributed.shard, "reward")
    section, device = config.reward_model, local_device(resolve_device(config.device))
    inputs = input_hashes(config, fresh=fresh)
    with open_run(config, command="reward", fresh=fresh, inputs=inputs) as (run, signals, ranks):
        if run.finished:
            return Run.open(run.path)
        ended = section.members is not None and ranks.first(lambda: damage(run.path / "final") is None)
        if ended:  # stopped while tidying up after it
            if not run.follows:
                shutil.rmtree(run.path / "members", ignore_errors=True)
            return Run.open(run.path)
        seeds = config.member_seeds
        model, adapter, tokenizer = load_model(config.model, device=device, seed=seeds[0])
        stop_id = stop_token(config.model, tokenizer)
        context = context_length(model.classifier.config)
        pairs = load_pairs(config.data, tokenizer, stop_id=stop_id, context=context, pinned=inputs["data.path"])
        train, test = split_pairs(pairs, section.test_fraction, config.seed)
        if share_prompts(train, test):
            print(f"all {len(pairs)} pairs have one prompt: {len(test)} are held out by their answers", file=sys.stderr)
        plans = [shuffled_batches(len(train), batch=section.batch, epochs=section.epochs, seed=s) for s in seeds]
        length, places = len(plans[0]), [run.path / "final"]
        check_warmup(config.optim, length)
        if section.members is not None:
            places = [run.path / "members" / f"member-{k + 1}" for k in range(section.members)]
        for k, (seed, plan, place) in enumerate(zip(seeds, plans, places, strict=True)):
            if section.members is not None and ranks.first(partial(is_done, run, place, (k + 1) * length)):
                continue
            if k:
                model, adapter, tokenizer = load_model(config.model, device=device, seed=seed)
            drawn = train if section.members is None else resample(train, seed)
            fit(model, adapter, tokenizer, drawn, plan, run, config, signals, sinks, ranks, first=k * length,
                total=len(plans) * length)  # fmt: skip
            if not run.follows:
                report = finish(model, train, test)
                save(model, tokenizer, place, run, config, report, stop_id=stop_id)
        if run.follows:
            return Run.open(run.path)
        if section.members is not None:
            del model, adapter
            report = finish_ensemble(places, config, train, test, device)
        report.write(run.path)
        if section.members is not None:
            gather_members(run, config, report)  # last: where final/ stands, the rest does
        print(report.text())
    return Run.open(run.path)


def fit(
    model: RewardModel, adapter: Any | None, tokenizer: PreTrainedTokenizerBase, train: Sequence[Pair],
    plan: Sequence[list[int]], run: RunDirectory, config: RewardConfig, signals: Signals, sinks: Sequence[LogSink],
    ranks: Ranks, *, first: int, total: int,
) -> None:  # fmt: skip
    """Train a model on `train`, batch by batch of `plan`, from where the run stopped; an adapter is merged after.

    first, total: steps of the run before the model's, and of all its models.
    """
    section = config.reward_model
    named = [(name, p) for name, p in model.classifier.named_parameters() if p.requires_grad]
    trunk = [(name, p) for name, p in named if not name.startswith("score.")]
    head = [(name, p) for name, p in named if name.startswith("score.")]  # learns faster
    optimizer = build_optimizer(config.optim, trunk, head, lora=adapter is not None)
    steps = ScheduledOptimizer(optimizer, config.optim, len(plan), ranks)
    parts = {"policy": adapter or model.classifier, "head": model.head}  # an adapter does not hold the head

    def learn(batch: list[int]) -> dict[str, float | None]:
        return accumulate(model, [train[i] for i in batch], section.center, section.microbatch_tokens, ranks)

    state = TrainingState(run, parts, steps, tokenizer, ranks=ranks)
    state.run_steps(plan, learn, signals, sinks, first=first, total=total)
    if adapter is not None:
        # In place: the classifier's own layers are whole again. In float32: bfloat16 would lose a small update.
        adapter.float().merge_and_unload()


def save(
    model: RewardModel, tokenizer: PreTrainedTokenizerBase, place: Path, run: RunDirectory, config: RewardConfig,
    report: PreferenceReport, *, stop_id: int | None,
) -> None:  # fmt: skip
    """Write the model with its card."""
    card = reward_card(Run(run.path), config, report.text())
    trust = config.model.trust_remote_code
    save_reward_model(model, tokenizer, place, stop_id=stop_id, card=card, trust_remote_code=trust)


def is_done(run: RunDirectory, place: Path, steps: int) -> bool:
    """Whether the model in `place` was written, and the newest intact checkpoint is of so many steps."""
    found = latest(run.path, lambda _: None)
    return place.exists() and found is not None and int(found[1][run.unit]) >= steps


def accumulate(
    model: RewardModel, pairs: Sequence[Pair], center: float, microbatch_tokens: int, ranks: Ranks = ALONE
) -> dict[str, float | None]:
    """Add one optimizer step's gradients to the model's, microbatch by microbatch; no step. Returns its metrics."""
    widths = [2 * (len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids))) for p in pairs]
    total, decided = sum(pair.weight for pair in pairs), sum(pair.probability != 0.5 for pair in pairs)
    found: list[dict[str, torch.Tensor]] = []
    for index, counts in ranks.deal(widths, microbatch_tokens):
        part = [pairs[i] for i in index.tolist()]
        chosen, rejected = model(rows_of(part)).chunk(2)
        targets, weights = chosen.new_tensor([(p.probability, p.weight) for p in part]).unbind(1)
        loss, sums = bradley_terry_loss(
            chosen, rejected, targets, weights, center=center, denominator=total, decided=max(1, decided)
        )
        (loss if counts else 0.0 * loss).backward()
        if counts:
            found.append(sums)
    numbers = ranks.gather(read_numbers(found))
    metrics: dict[str, float | None] = {name: sum(sums[name] for sums in numbers) for name in numbers[0]}
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


def finish_ensemble(
    places: Sequence[Path], config: RewardConfig, train: Sequence[Pair], test: Sequence[Pair], device: torch.device
) -> PreferenceReport:
    """Judge the mean of the members' raw scores on the held-out pairs, and each member beside it.

    All members are normalized on the same answers, those that any of them may have been trained on, so that what they
    disagree about is on one scale.
    """
    raw, held_out = [], []
    for place in places:
        dtype = resolve_dtype(config.model.dtype, device, model_config(str(place)))
        where = {"trust_remote_code": config.model.trust_remote_code}
        member = load_reward_model(str(place), dtype=dtype, device=device, **where)
        member.mean, member.std = 0.0, 1.0
        raw.append(member.score(rows_of(train)).double())
        held_out.append(member.score(rows_of(test)).double())
    alone = [build_report(train, a, test, b) for a, b in zip(raw, held_out, strict=True)]
    whole = build_report(train, torch.stack(raw).mean(0), test, torch.stack(held_out).mean(0))
    return replace(whole, members=[report.accuracy for report in alone])


def gather_members(run: RunDirectory, config: RewardConfig, report: PreferenceReport) -> None:
    """final/ of the trained members, all or none, in the place of members/."""
    members = run.path / "members"
    with wrap_os_errors(run.path / "final"), replacing_directory(run.path / "final") as partial:
        shutil.copytree(members, partial, dirs_exist_ok=True)
        (partial / "README.md").write_text(reward_card(Run(run.path), config, report.text()), encoding="utf-8")
        write_sums(partial)
    shutil.rmtree(members)


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
