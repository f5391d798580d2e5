"""Everything that a run reads, checked as the run would, without loading a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.config import (
    DataConfig,
    EvaluateConfig,
    InitModelConfig,
    LabelsConfig,
    PairsConfig,
    PPOConfig,
    PromptsConfig,
    RewardConfig,
    SFTConfig,
    TrainingConfig,
    check_warmup,
    source_name,
)
from tether.data.examples import load_examples
from tether.data.pairs import load_pairs
from tether.data.split import share_prompts, split_pairs
from tether.data.table import read_rows
from tether.data.tokenizer import check_vocabulary, load_generation_config, load_tokenizer, stop_token_ids
from tether.models.loading import context_length, model_config
from tether.models.reward_model import check_one_label
from tether.rewards import FunctionReward, load_function
from tether.train.contexts import check_contexts
from tether.train.evaluate import load_inputs
from tether.train.held_out import load_prompt_sets
from tether.train.ppo import input_hashes as ppo_hashes
from tether.train.reward import input_hashes as reward_hashes
from tether.train.reward import plan_steps as plan_pairs
from tether.train.sft import init_architecture
from tether.train.sft import input_hashes as sft_hashes
from tether.train.sft import plan_steps as plan_examples
from tether.types import Prompt

_SHOWN = 24  # tokens of the rendered row, at either end


@dataclass(frozen=True)
class Inputs:
    """What the data check found."""

    facts: list[str]
    longest: int
    """Tokens of the longest prompt; for sft and reward, of the longest example."""
    plan: str
    """How much training that makes."""
    rendered: str
    """One row, token by token, with its mask."""


def what_it_reads(config: TrainingConfig) -> tuple[str, dict[str, str], str | None]:
    """(the command, the hashes of its inputs, what it reads of a store of labels) of a run that goes on."""
    if isinstance(config, PPOConfig):
        return "ppo", ppo_hashes(config), None
    if isinstance(config, SFTConfig):
        return "sft", sft_hashes(config.model, config.data), None
    assert isinstance(config, RewardConfig)
    hashes, pinned = reward_hashes(config, fresh=False)
    return "reward", hashes, pinned


def check_inputs(config: TrainingConfig, pinned: str | None = None) -> Inputs:
    """Read the data as the run would; raises what the run would raise. pinned: see `what_it_reads`."""
    policy = config.model.policy
    where: dict[str, Any] = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
    if isinstance(policy, InitModelConfig):
        tokenizer = load_tokenizer(policy.tokenizer, **where)
        architecture, generation = init_architecture(policy, tokenizer), None
    else:
        tokenizer, architecture = load_tokenizer(policy, **where), model_config(policy, **where)
        generation = load_generation_config(policy, config.model.revision)
        check_vocabulary(tokenizer, architecture.get_text_config().vocab_size)
    context = context_length(architecture)
    override = config.sampling.stop_token_ids if isinstance(config, PPOConfig) else None
    stops = stop_token_ids(tokenizer, generation, override)
    named = ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in stops) or "none: only the length ends one"
    facts = [f"stop tokens: {named}", f"context: {context or 'not limited'} tokens"]
    if isinstance(config, PPOConfig):
        return _ppo(config, tokenizer, context, stops, facts)
    stop = stops[0] if stops else None
    if isinstance(config, SFTConfig):
        return _sft(config, tokenizer, context, stop, facts)
    assert isinstance(config, RewardConfig)
    return _reward(config, tokenizer, context, stop, facts, pinned)


def check_evaluation(config: EvaluateConfig) -> Inputs:
    """Read the prompts as every model does, and ask every reward source whether it takes them."""
    sources, prompts = load_inputs(config)
    baseline, *others = sources
    asked, facts = prompts[baseline], []
    facts.append(_lengths(config.prompts, prompts=[len(p.ids) for p in asked]))
    for name, source in sources.items():
        stops = stop_token_ids(source.tokenizer, load_generation_config(name), config.sampling.stop_token_ids)
        told = _sources(config, prompts[name], source.tokenizer, stops)
        facts += told if name == baseline else []
    plan = (
        f"{len(asked)} prompts, {config.samples} responses to each, {len(sources)} models: "
        f"{len(asked) * config.samples * len(sources):,} responses"
    ) + (f"; compared with {baseline}: {', '.join(others)}" if others else "")
    return Inputs(facts, max(len(p.ids) for p in asked), plan, "")


def _ppo(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, context: int | None, stops: Sequence[int], facts: list[str]
) -> Inputs:
    new, p = config.sampling.max_new_tokens, config.ppo
    sets = load_prompt_sets(config, tokenizer, context)
    train, held_out, note = sets.train, sets.held_out, sets.note
    facts.append(_lengths(config.prompts, prompts=[len(x.ids) for x in sets.loaded]))
    facts.append(f"{len(train)} prompts to train on, {len(held_out)} to evaluate on{f' ({note})' if note else ''}")
    facts += _sources(config, train + held_out, tokenizer, stops)
    check_contexts(config, train + held_out, tokenizer)
    plan = (
        f"{p.cycles} cycles of {p.batch} responses ({p.batch // p.responses_per_prompt} prompts): "
        f"{p.cycles * p.batch:,} responses, {p.steps:,} optimizer steps of {p.minibatch}"
    )
    rendered = _render(tokenizer, list(train[0].ids), [False] * len(train[0].ids))
    end = " or ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in stops)
    rendered += f"\n  1  …  up to {new} sampled tokens" + (f", the last of them {end}" if end else "")
    longest = max(len(x.ids) for x in [*sets.loaded, *held_out])
    return Inputs(facts, longest, plan, f"prompt of row {train[0].row}, and its response\n{rendered}")


def _sft(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, context: int | None, stop: int | None, facts: list[str]
) -> Inputs:
    examples = load_examples(config.data, tokenizer, stop_id=stop, train_on=config.sft.train_on, context=context)
    lengths = [len(x.ids) for x in examples]
    trained = sum(sum(x.trained) for x in examples)
    facts.append(_lengths(config.data, examples=lengths))
    facts.append(f"{trained:,} of {sum(lengths):,} tokens are trained")
    steps = len(plan_examples(lengths, config))
    check_warmup(config.optim, steps)
    plan = f"{config.sft.epochs} epochs: {steps:,} optimizer steps of up to {config.sft.batch} rows"
    longest = config.data.max_tokens if config.sft.packing else max(lengths)
    first = examples[0]
    return Inputs(facts, longest, plan, f"row {first.row}\n{_render(tokenizer, first.ids, first.trained)}")


def _reward(
    config: RewardConfig, tokenizer: PreTrainedTokenizerBase, context: int | None, stop: int | None, facts: list[str],
    pinned: str | None,
) -> Inputs:  # fmt: skip
    pairs = load_pairs(config.data, tokenizer, stop_id=stop, context=context, pinned=pinned)
    lengths = [len(x.prompt_ids) + max(len(x.chosen_ids), len(x.rejected_ids)) for x in pairs]
    facts.append(_lengths(config.data, pairs=lengths))
    section = config.reward_model
    train, test = split_pairs(pairs, section.test_fraction, config.seed)
    together = "answer (all have one prompt)" if share_prompts(train, test) else "prompt"
    held_out = f"{len(test)} held out; pairs of one {together} or group stay together"
    facts.append(f"{len(train)} pairs to train on, {held_out if test else 'none held out: no accuracy will be known'}")
    steps = len(plan_pairs(len(train), config))
    check_warmup(config.optim, steps)
    plan = f"{section.epochs} epochs: {steps:,} optimizer steps of up to {section.batch} pairs"
    first, shown = train[0], []
    for name, ids in (("chosen", first.chosen_ids), ("rejected", first.rejected_ids)):
        mask = [False] * (len(first.prompt_ids) + len(ids) - 1) + [True]  # the score is read at the last token
        shown.append(f"row {first.row}, {name}\n{_render(tokenizer, first.prompt_ids + ids, mask)}")
    return Inputs(facts, max(lengths), plan, "\n".join(shown))


def _sources(
    config: PPOConfig | EvaluateConfig, prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]
) -> list[str]:
    """Import the functions and read the reward models' configs."""
    facts = []
    for source in config.reward:
        name = source_name(source)
        if source.function is not None:
            function = load_function(source.function)
            FunctionReward(function, name=name, tokenizer=tokenizer, stop_ids=stops).check(prompts)
            facts.append(f"reward {name}: {source.function}, weight {source.weight:g}")
            continue
        assert source.model is not None
        check_one_label(source.model, model_config(source.model))
        facts.append(f"reward {name}: model {source.model}, weight {source.weight:g}")
    return facts


def _lengths(data: PromptsConfig | DataConfig, **kept: list[int]) -> str:
    """Rows and lengths of what was kept."""
    ((what, lengths),) = kept.items()
    filtered = isinstance(data, PairsConfig) and data.labels != LabelsConfig()
    rows = len(lengths) if filtered else len(read_rows(data.path, data.split, (), data.limit))  # Limit tells its drops
    dropped = f"; {rows - len(lengths)} of {rows} rows dropped as too long" if rows > len(lengths) else ""
    middle = sorted(lengths)[len(lengths) // 2]
    return f"{data.path}: {len(lengths)} {what}, {min(lengths)} to {max(lengths)} tokens, half up to {middle}{dropped}"


def _render(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> str:
    """One token a line: whether it counts, its id, its text."""
    lines = [f"  {int(m)}  {i:>6}  {tokenizer.decode([i])!r}" for i, m in zip(ids, mask, strict=True)]
    if len(lines) > 2 * _SHOWN:
        lines[_SHOWN:-_SHOWN] = [f"  …  {len(lines) - 2 * _SHOWN} more tokens"]
    return "\n".join(lines)
