"""Direct preference optimization and variants: learn from preferences without a reward model (Rafailov et al. 2023).

The policy's own log-ratio to the reference is the reward: β·Σ log(π/ref) of an answer. What the reference gives every
answer is computed once, before the first step; then each step is a classification of its pairs (or single answers).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tether.config import DPOConfig, DPOSection, check, check_warmup
from tether.data.labeled import (
    Labeled,
    Preference,
    as_pairs,
    load_pairs_or_labeled,
    pair_labels,
    preferred_first,
    singles,
)
from tether.data.pairs import Pair
from tether.data.snapshot import pin_labels
from tether.data.split import share_prompts, split_pairs
from tether.data.tokenizer import stop_token_ids
from tether.distributed.ranks import ALONE, Ranks, local_device, need_replicas
from tether.errors import DataError
from tether.math import (
    ipo_loss,
    kto_loss,
    kto_point,
    log_odds,
    noisy_targets,
    orpo_loss,
    sigmoid_loss,
    simpo_loss,
    sum_answers,
    unpaired_loss,
)
from tether.models.export import save_model
from tether.models.ilql import heads_left_out
from tether.models.language_model import LanguageModel
from tether.models.loading import context_length, resolve_device
from tether.models.policy import read_values, zero_head
from tether.runs import Run, RunDirectory, hash_files, recorded_inputs
from tether.train import sft
from tether.train.card import dpo_card
from tether.train.optim import (
    MISMATCH,
    SHUFFLE,
    ScheduledOptimizer,
    build_optimizer,
    permutation,
    read_numbers,
    shuffled_batches,
)
from tether.train.preamble import check_parts, open_run
from tether.train.preference_report import PreferenceReport, build_report
from tether.train.reference import reference_logprobs
from tether.train.state import TrainingState
from tether.types import LogSink, Rows, microbatches

LR, LR_LORA = 1e-6, 1e-5  # a tenth of the other trainers': every step pushes the same answers apart
REPORT = "dpo_report.json"


def dpo(config: DPOConfig, *, sinks: Sequence[LogSink] = (), fresh: bool = False) -> Run:
    """Train, or continue the run in `config.run`; returns it, with the trained model in `.final`.

    What the implicit reward says of held-out pairs is printed, and written to dpo_report.json and calibration.html.

    sinks: get every step's metrics; see `tether.types.LogSink`. fresh: move a run that is there aside first.
    """
    check(config)
    check_parts(None, None, sinks)
    need_replicas(config.distributed.shard, "dpo")
    section, inputs = config.dpo, input_hashes(config, fresh=fresh)
    device = local_device(resolve_device(config.device))
    with open_run(config, command="dpo", fresh=fresh, inputs=inputs) as (run, signals, ranks):
        if run.finished:
            return Run.open(run.path)
        model, tokenizer, notes = sft.load_model(config.model, device=device, seed=config.seed)
        notes += heads_left_out(config.model.reference)
        stop_ids = stop_token_ids(tokenizer, model.hf_model.generation_config, None)
        context, pinned = context_length(model.config), inputs["data.path"]
        stop_id = next(iter(stop_ids), None)
        train, test = load(config, tokenizer, stop_id=stop_id, context=context, pinned=pinned)
        if share_prompts(train, test):
            print("all of the data has one prompt: it is held out by its answers", file=sys.stderr)
        examples = train if section.has_pairs else singles(train)
        others = mismatch(examples, config, context) if section.loss == "kto" else []
        plan = shuffled_batches(len(examples), batch=section.batch, epochs=section.epochs, seed=config.seed)
        check_warmup(config.optim, len(plan))
        named = [(name, p) for name, p in model.lm.named_parameters() if p.requires_grad]
        level = zero_head(model.config.hidden_size, model.device) if section.loss == "unpaired" else None
        head = [(f"level.{name}", p) for name, p in level.named_parameters()] if level else []
        optimizer = build_optimizer(config.optim, named, head, lora=config.model.lora is not None, lr=(LR, LR_LORA))
        steps = ScheduledOptimizer(optimizer, config.optim, len(plan), ranks)
        parts = {"policy": model.lm} | ({"level": level} if level else {})
        state = TrainingState(run, parts, steps, tokenizer, ranks=ranks)
        with state.saved_when_stopped(), signals.droppable():
            sets = examples, others, training_sample(train, len(test), config), test
            learned, mismatched, seen, held_out = add_reference(run, model, config, sets, inputs, ranks)

        def learn(batch: list[int]) -> dict[str, float | None]:
            beside = [mismatched[i] for i in batch] if mismatched else []
            return accumulate(model, level, [learned[i] for i in batch], section, others=beside, ranks=ranks)

        state.run_steps(plan, learn, signals, sinks, notes)
        if run.follows:
            return Run.open(run.path)
        report = report_preferences(model, level, train, seen, held_out, section)
        report.write(run.path, REPORT)
        print(report.text())
        card = dpo_card(Run(run.path), config, report.text())
        save_model(model, tokenizer, run.path / "final", card=card, stop_ids=stop_ids)
    return Run.open(run.path)


# ---------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Item:
    """A pair or a labeled answer, with what the reference gives its answers."""

    example: Preference
    ref_logprobs: tuple[Tensor, ...]  # [R] nats, of each answer


def load(
    config: DPOConfig, tokenizer: Any, *, stop_id: int | None, context: int | None, pinned: str | None
) -> tuple[list[Preference], list[Preference]]:
    """(train, test): pairs, the preferred answer first; or labeled answers, where the data and the loss are of such.

    DataError where nothing that is trained on says that one answer is better than another.
    """
    section, seed = config.dpo, config.seed
    found: Any = load_pairs_or_labeled(
        config.data, tokenizer, stop_id=stop_id, context=context, pinned=pinned,
        pairs_for=section.loss if section.has_pairs else None,
    )  # fmt: skip
    train, test = split_pairs(found, section.test_fraction, seed, section="dpo")
    check_sides(train, config.data.path)
    return [preferred_first(x) for x in train], [preferred_first(x) for x in test]


def check_sides(train: Sequence[Preference], path: str) -> None:
    """Raise DataError where all pairs are ties, or where all answers have one label."""
    if isinstance(train[0], Pair):
        if all(x.probability == 0.5 for x in train):
            raise DataError(
                f"{path}: all {len(train)} pairs to train on are ties (probability 0.5), so none says which answer is "
                "better: there is nothing to learn. Add pairs of which one answer was preferred."
            )
        return
    if len({x.probability for x in train}) == 1:
        raise DataError(
            f"{path}: all {len(train)} labeled answers to train on have the label {train[0].probability:g}, so nothing "
            "says which answers are better than others. Add answers with other labels, or imitate the good ones with "
            "tether sft."
        )


def mismatch(examples: Sequence[Any], config: DPOConfig, context: int | None) -> list[Preference]:
    """For each labeled answer, one to another prompt in its place; cut where the two would be too long.

    Its text differs too, where an answer to another prompt does: the same "yes" to two prompts would measure nothing.
    """
    count, rank = len(examples), permutation(len(examples), seed=config.seed, stream=MISMATCH)
    of_prompt: dict[str, list[int]] = {}
    for i, x in enumerate(examples):
        of_prompt.setdefault(x.prompt_key, []).append(i)
    if len(of_prompt) < 2:
        raise DataError(
            "dpo.loss=kto measures the KL on answers to other prompts, and all of the data has one prompt. Add others, "
            "or set dpo.loss to unpaired."
        )
    circle = [i for group in of_prompt.values() for i in group]  # prompt by prompt: after one all the others follow
    texts = [tuple(examples[i].answer_ids) for i in circle]
    ahead = [count] * count  # steps to the next answer with another text
    for place in reversed(range(2 * count)):  # twice around: the last ones look beyond the end
        here, after = place % count, (place + 1) % count
        ahead[here] = 1 if texts[here] != texts[after] else min(count, ahead[after] + 1)
    limit = min(config.data.max_tokens, context or config.data.max_tokens)
    found: list[Any] = [None] * count
    end = 0
    for group in of_prompt.values():
        end, others = end + len(group), count - len(group)
        for i in group:
            text = tuple(examples[i].answer_ids)
            drawn = rank[i] * others // count  # uniform among the others, counted from the prompt's end
            steps = [k + (ahead[(end + k) % count] if texts[(end + k) % count] == text else 0) for k in (drawn, 0)]
            step = next((k for k in steps if k < others), drawn)
            answer = examples[circle[(end + step) % count]].answer_ids
            found[i] = replace(examples[i], answer_ids=answer[: limit - len(examples[i].prompt_ids)])
    return found


def training_sample(examples: Sequence[Preference], count: int, config: DPOConfig) -> list[Preference]:
    """As many of the training examples as are held out, to compare with: all of them would take long.

    Good and bad labels (or pairs and ties) in equal numbers, as far as there are any: by chance alone a rare side might
    be missing, and then nothing could be compared.
    """
    seen: Counter[bool | None] = Counter()
    turns = []
    for i in permutation(len(examples), seed=config.seed, stream=SHUFFLE, counter=(0, 1)):
        side = None if examples[i].probability == 0.5 else examples[i].probability > 0.5
        turns.append((seen[side], i))
        seen[side] += 1
    turns.sort(key=lambda turn: turn[0])
    return [examples[i] for i in sorted(i for _, i in turns[: max(count, 256)])]


def add_reference(
    run: RunDirectory, model: LanguageModel, config: DPOConfig, sets: Sequence[Sequence[Preference]],
    inputs: dict[str, str], ranks: Ranks,
) -> list[list[Item]]:  # fmt: skip
    """Each set with the reference's log-probs of every answer, computed once where it stands in several places."""
    places = [[[(tuple(x.prompt_ids), tuple(a)) for a in x.answers] for x in part] for part in sets]
    answers = list(dict.fromkeys(place for part in places for item in part for place in item))
    tokens = config.dpo.microbatch_tokens
    logprobs = reference_logprobs(run, model, config.model, answers, inputs, microbatch_tokens=tokens, ranks=ranks)
    found = dict(zip(answers, logprobs, strict=True))
    return [
        [Item(x, tuple(found[place] for place in item)) for x, item in zip(part, keys, strict=True)]
        for part, keys in zip(sets, places, strict=True)
    ]


def input_hashes(config: DPOConfig, *, fresh: bool = False) -> dict[str, str]:
    """Hashes of what a run reads, by config key; of a store of labels what `pin_labels` gives."""
    pinned = pin_labels(config.data, {} if fresh else recorded_inputs(config.run))
    hashes = sft.input_hashes(config) | ({"data.path": pinned} if pinned else {})
    return hashes | ({"model.reference": hash_files(config.model.reference)} if config.model.reference else {})


# ---------------------------------------------------------------- a step


@dataclass(frozen=True, slots=True)
class Answers:
    """What the policy and the reference give the answers of some items: first every item's first, then their second."""

    logprobs: Tensor  # [B, R] nats; carries the gradient
    ref_logprobs: Tensor  # [B, R] nats
    mask: Tensor  # [B, R]
    levels: Tensor | None  # [B] log-odds: V of each answer's prompt

    @classmethod
    def of(cls, model: LanguageModel, level: nn.Linear | None, items: Sequence[Item]) -> Answers:
        """One forward pass."""
        count = len(items[0].example.answers)
        whole = [(item.example, k, item.ref_logprobs[k]) for k in range(count) for item in items]
        rows = Rows.of([x.prompt_ids for x, _, _ in whole], [x.answers[k] for x, k, _ in whole]).to(model.device)
        logprobs, _, hidden = model.response_logprobs(rows, temperature=1.0, entropy=False)
        mask = rows.response_mask
        zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=model.device)
        reference = torch.cat([ref for _, _, ref in whole]).to(zeros)
        levels = None
        if level is not None:  # read before the answer's first token; the policy does not learn from it
            first = rows.response_lengths.cumsum(0) - rows.response_lengths
            levels = read_values(level, hidden[first.to(hidden.device)].detach()).to(zeros)
        return cls(zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, reference), mask, levels)

    def log_ratios(self, *, average: bool) -> Tensor:
        """[B] l: log-ratio of each answer, nats."""
        return sum_answers(self.logprobs - self.ref_logprobs, self.mask, average=average)

    def rewards(self, section: DPOSection) -> Tensor:
        """[B] implicit reward of each answer, log-odds but for a constant of its prompt."""
        if section.has_reference:
            rewards = section.beta * self.log_ratios(average=section.average)
            return rewards if self.levels is None else rewards + self.levels
        means = sum_answers(self.logprobs, self.mask, average=True)
        return section.beta * means if section.loss == "simpo" else log_odds(means)


def accumulate(
    model: LanguageModel, level: nn.Linear | None, items: Sequence[Item], section: DPOSection,
    *, others: Sequence[Item] = (), ranks: Ranks = ALONE,
) -> dict[str, float | None]:  # fmt: skip
    """Add one optimizer step's gradients to the model's, microbatch by microbatch; no step. Returns its metrics.

    others: of kto, answers to other prompts, one for each item.
    """
    size = section.microbatch_tokens
    kl = measure_kl(model, others, section, ranks) if others else torch.zeros((), device=model.device)
    totals = Totals.of(items)
    found: list[dict[str, Tensor]] = []
    for index, counts in ranks.deal([width(item) for item in items], size):
        part = [items[i] for i in index.tolist()]
        answers = Answers.of(model, level, part)
        loss, sums = loss_of(answers, part, section, kl, totals)
        (loss if counts else 0.0 * loss).backward()
        if counts:
            found.append(sums)
    numbers = ranks.gather(read_numbers(found))
    metrics: dict[str, float | None] = {name: sum(sums[name] for sums in numbers) for name in numbers[0]}
    if not totals.decided:  # of ties alone no accuracy is known
        metrics["dpo/accuracy"] = None
    for side, tokens in (("chosen", totals.chosen_tokens), ("rejected", totals.rejected_tokens)):
        if not tokens:
            metrics |= {f"dpo/{side}_logratio": None, f"dpo/{side}_logprob": None, "dpo/margin": None}
    if others:
        metrics["dpo/kl"] = float(kl)
    return metrics | {"tokens/trained": sum(len(answer) for item in items for answer in item.example.answers)}


def width(item: Item) -> int:
    """Padded tokens of an item's rows."""
    return len(item.example.answers) * (len(item.example.prompt_ids) + max(map(len, item.example.answers)))


@dataclass(frozen=True, slots=True)
class Totals:
    """What a whole optimizer step is divided by."""

    weight: float
    answers: int
    decided: int  # items that are no ties
    chosen_tokens: int  # of preferred or good answers; a tie has none, and none that is rejected
    rejected_tokens: int
    chosen_weight: float  # tokens, each with its item's weight
    good: int  # answers
    bad: int

    @classmethod
    def of(cls, items: Sequence[Item]) -> Totals:
        each = [(s, len(a), i.example.weight) for i in items for s, a in zip(sides(i), i.example.answers, strict=True)]
        return cls(
            weight=sum(item.example.weight for item in items),
            answers=len(each),
            decided=sum(item.example.probability != 0.5 for item in items),
            chosen_tokens=sum(n for side, n, _ in each if side > 0),
            rejected_tokens=sum(n for side, n, _ in each if side < 0),
            chosen_weight=sum(n * w for side, n, w in each if side > 0),
            good=sum(side > 0 for side, _, _ in each),
            bad=sum(side < 0 for side, _, _ in each),
        )


def sides(item: Item) -> tuple[int, ...]:
    """Of each answer: 1 if it is preferred or good, -1 if it is the other, 0 if that is open."""
    sign = (item.example.probability > 0.5) - (item.example.probability < 0.5)
    return (sign, -sign)[: len(item.example.answers)]


def loss_of(
    answers: Answers, items: Sequence[Item], section: DPOSection, kl: Tensor, totals: Totals
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss [], metrics) of a microbatch; both add up to those of the step."""
    x = answers.logprobs
    labels, weights = x.new_tensor([(i.example.probability, i.example.weight) for i in items]).unbind(1)
    targets = noisy_targets(labels, smoothing=section.smoothing, flipped=section.flipped)
    loss = preference_loss(answers, targets, weights, section, kl, totals.weight)
    side = x.new_tensor([sides(item)[k] for k in range(len(items[0].example.answers)) for item in items])
    metrics = {"dpo/loss": loss.detach()} | metrics_of(answers, side, section, kl, totals)
    if (nll := 1.0 if section.loss == "orpo" else section.nll) and totals.chosen_weight:
        sums = sum_answers(x, answers.mask, average=False)
        of_chosen = weights.repeat(len(sums) // len(weights)) * (side > 0)
        loss = loss - nll * (of_chosen * sums).sum() / totals.chosen_weight
    return loss, metrics


def preference_loss(
    answers: Answers, targets: Tensor, weights: Tensor, section: DPOSection, kl: Tensor, denominator: float
) -> Tensor:
    """The chosen loss, []."""
    rest: dict[str, Any] = {"denominator": denominator, "beta": section.beta}
    if section.has_reference:
        ratios = answers.log_ratios(average=section.average)
        if section.loss == "kto":
            return kto_loss(ratios, kl.to(ratios), targets, weights, **rest)
        if section.loss == "unpaired":
            assert answers.levels is not None
            return unpaired_loss(ratios, answers.levels, targets, weights, **rest)
        chosen, rejected = ratios.chunk(2)
        return (ipo_loss if section.loss == "ipo" else sigmoid_loss)(chosen, rejected, targets, weights, **rest)
    chosen, rejected = sum_answers(answers.logprobs, answers.mask, average=True).chunk(2)
    if section.loss == "simpo":
        return simpo_loss(chosen, rejected, targets, weights, gamma=section.gamma, **rest)
    return section.beta * orpo_loss(chosen, rejected, targets, weights, denominator=denominator)


@torch.no_grad()
def metrics_of(answers: Answers, side: Tensor, section: DPOSection, kl: Tensor, totals: Totals) -> dict[str, Tensor]:
    """Sums over a microbatch, divided by what belongs to the step. side: [B], see `sides`."""
    rewards = answers.rewards(section)
    if section.has_pairs:
        right = (rewards * side).view(2, -1).sum(0) > 0  # strictly: a constant model is right about nothing
    else:
        right = (rewards - (section.beta * kl if section.loss == "kto" else 0.0)) * side > 0
    up, down = (side > 0).to(rewards), (side < 0).to(rewards)
    log_ratios, logprobs = answers.log_ratios(average=False), sum_answers(answers.logprobs, answers.mask, average=False)
    chosen, rejected = max(1, totals.chosen_tokens), max(1, totals.rejected_tokens)
    level = {} if answers.levels is None else {"dpo/level": answers.levels.sum() / totals.answers}
    return level | {
        "dpo/accuracy": right.sum() / max(1, totals.decided),
        "dpo/margin": (rewards * up).sum() / max(1, totals.good) - (rewards * down).sum() / max(1, totals.bad),
        "dpo/chosen_logratio": (log_ratios * up).sum() / chosen,  # nats per token
        "dpo/rejected_logratio": (log_ratios * down).sum() / rejected,
        "dpo/chosen_logprob": (logprobs * up).sum() / chosen,
        "dpo/rejected_logprob": (logprobs * down).sum() / rejected,
    }


@torch.no_grad()
def measure_kl(model: LanguageModel, others: Sequence[Item], section: DPOSection, ranks: Ranks = ALONE) -> Tensor:
    """KTO's z of the whole step: by microbatch it would be another number for every one.

    Nats per answer, or per token where the log-ratios that it is held against are (`average`).
    """
    found = list[float]()
    for index, counts in ranks.deal([width(item) for item in others], section.microbatch_tokens):
        answers = Answers.of(model, None, [others[i] for i in index.tolist()])
        if counts:
            found += answers.log_ratios(average=section.average).tolist()
    return kto_point(torch.tensor(ranks.gather(found), device=model.device))


# ---------------------------------------------------------------- afterwards


def report_preferences(
    model: LanguageModel, level: nn.Linear | None, train: Sequence[Preference], seen: Sequence[Item],
    held_out: Sequence[Item], section: DPOSection,
) -> PreferenceReport:  # fmt: skip
    """How often the implicit reward prefers what people do, on held-out pairs and on as many that were trained on.

    Of labeled answers, a good one is compared with a bad one, to the same prompt where there is one.
    """
    seen_pairs, seen_scores = implicit_rewards(model, level, seen, section)
    test_pairs, test_scores = implicit_rewards(model, level, held_out, section)
    return build_report(
        as_pairs(train), seen_scores, test_pairs, test_scores, scored=seen_pairs, held_out=len(held_out)
    )


def implicit_rewards(
    model: LanguageModel, level: nn.Linear | None, items: Sequence[Item], section: DPOSection
) -> tuple[list[Pair], Tensor]:
    """(pairs, [2B] implicit rewards: first of every chosen answer, then of every rejected one)."""
    rewards: list[Tensor] = [torch.empty(0)] * len(items)
    with torch.no_grad(), model.evaluating():
        for index in microbatches([width(item) for item in items], section.microbatch_tokens):
            part = [items[i] for i in index.tolist()]
            found = Answers.of(model, level, part).rewards(section).double().cpu()
            for i, reward in zip(index.tolist(), found.view(-1, len(part)).T, strict=True):
                rewards[i] = reward
    if not items:
        return [], torch.empty(0, dtype=torch.float64)
    if isinstance(items[0].example, Pair):
        pairs = [item.example for item in items if isinstance(item.example, Pair)]
        return pairs, torch.stack(rewards).T.flatten()
    good, bad = pair_labels([item.example for item in items if isinstance(item.example, Labeled)])
    scores = torch.cat(rewards)
    return as_pairs([item.example for item in items]), torch.cat([scores[good], scores[bad]])
