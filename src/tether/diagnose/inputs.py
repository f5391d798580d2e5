"""Everything that a run reads, checked as the run would, without loading a weight: a function for each kind of run,
which its row in `tether.config.kinds` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from tether.config import (
    DataConfig,
    DPOConfig,
    EvaluateConfig,
    LabelsConfig,
    PairsConfig,
    PPOConfig,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    RewardConfig,
    RewardSourceConfig,
    SFTConfig,
    TrainingConfig,
    check_warmup,
    model_paths,
    source_name,
)
from tether.data.examples import load_examples
from tether.data.labeled import singles
from tether.data.pairs import load_pairs
from tether.data.scored import all_stop_ids, load_scored
from tether.data.split import share_prompts, split_pairs
from tether.data.table import read_rows
from tether.data.tokenizer import check_vocabulary, load_generation_config, load_tokenizer, stop_token_ids
from tether.diagnose.memory import architecture_of
from tether.models.loading import context_length, model_config
from tether.models.policy import companions
from tether.models.reward_model import check_one_label
from tether.rewards import FunctionReward, judge_reward, load_function, url_reward
from tether.rewards.ensemble import check_members
from tether.rewards.judge import describe_judge
from tether.samplers.pool import address_of, check_pool
from tether.samplers.vllm import check_vllm
from tether.train.contexts import check_contexts
from tether.train.dpo import load as load_preferences
from tether.train.dpo import mismatch
from tether.train.evaluate import load_inputs
from tether.train.held_out import load_prompt_sets
from tether.train.optim import shuffled_batches
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
    rendered: str = ""
    """One row, token by token, with its mask, see `render`; empty where none is shown."""
    counts: str = ""
    """What 1 in the mask means."""


@dataclass(frozen=True)
class Start:
    """The model that a run trains, without a weight of it."""

    tokenizer: PreTrainedTokenizerBase
    context: int | None
    stops: tuple[int, ...]
    facts: list[str]

    @classmethod
    def of(cls, config: TrainingConfig, stop_token_override: Sequence[int] | None = None) -> Start:
        """Raises what the run would raise."""
        policy, revision = config.model.policy, config.model.revision
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": config.model.trust_remote_code}
        named = policy if isinstance(policy, str) else policy.tokenizer
        tokenizer, architecture = load_tokenizer(named, **where), architecture_of(config)
        check_vocabulary(tokenizer, architecture.get_text_config().vocab_size)
        generation = load_generation_config(policy, revision) if isinstance(policy, str) else None
        stops = stop_token_ids(tokenizer, generation, stop_token_override)
        told = _tokens(tokenizer, stops)
        context = context_length(architecture)
        facts = [
            f"stop tokens: {told or 'none: only the length ends one'}",
            f"context: {context or 'not limited'} tokens",
        ]
        return cls(tokenizer, context, stops, facts)

    @property
    def stop(self) -> int | None:
        """What ends an example."""
        return self.stops[0] if self.stops else None


def of_evaluation(config: EvaluateConfig, _: Mapping[str, str]) -> Inputs:
    """The prompts as every model reads them, and whether every reward source takes them."""
    sources, prompts = load_inputs(config)
    baseline, *others = sources
    asked = prompts[baseline]
    facts = [_lengths(config.prompts, prompts=[len(p.ids) for p in asked])]
    for name, source in sources.items():
        stops = stop_token_ids(source.tokenizer, load_generation_config(name), config.sampling.stop_token_ids)
        told = _sources(config.reward, prompts[name], source.tokenizer, stops)
        facts += told if name == baseline else []
    plan = (
        f"{len(asked)} prompts, {config.samples} responses to each, {len(sources)} models: "
        f"{len(asked) * config.samples * len(sources):,} responses"
    ) + (f"; compared with {baseline}: {', '.join(others)}" if others else "")
    return Inputs(facts, max(len(p.ids) for p in asked), plan)


def of_ppo(config: PPOConfig, _: Mapping[str, str]) -> Inputs:
    """Prompts, reward sources, and the models beside the policy."""
    start, p = Start.of(config, config.sampling.stop_token_ids), config.ppo
    tokenizer, stops = start.tokenizer, start.stops
    sets = load_prompt_sets(config, tokenizer, start.context)
    train, held_out, note = sets.train, sets.held_out, sets.note
    facts = [
        *start.facts,
        _lengths(config.prompts, prompts=[len(x.ids) for x in sets.loaded]),
        f"{len(train)} prompts to train on, {len(held_out)} to evaluate on{f' ({note})' if note else ''}",
        *_sources(config.reward, train + held_out, tokenizer, stops),
        *_sources(config.evaluate.gold, held_out, tokenizer, stops, kind="gold"),
        *_engine(config),
    ]
    check_contexts(config, train + held_out, tokenizer)
    plan = (
        f"{p.cycles} cycles of {p.batch} responses ({p.batch // p.responses_per_prompt} prompts): "
        f"{p.cycles * p.batch:,} responses, {p.steps:,} optimizer steps of {p.minibatch}"
    )
    rendered = render(tokenizer, list(train[0].ids), [False] * len(train[0].ids))
    end = " or ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in stops)
    rendered += f"\n  1  …  up to {config.sampling.max_new_tokens} sampled tokens"
    rendered += f", the last of them {end}" if end else ""
    longest = max(len(x.ids) for x in [*sets.loaded, *held_out])
    shown = f"prompt of row {train[0].row}, and its response\n{rendered}"
    return Inputs(facts, longest, plan, shown, "a response token, which the loss counts")


def of_examples(config: SFTConfig, _: Mapping[str, str]) -> Inputs:
    """Examples, and the steps that they make."""
    start = Start.of(config)
    on = config.sft.train_on
    examples = load_examples(config.data, start.tokenizer, stop_id=start.stop, train_on=on, context=start.context)
    lengths = [len(x.ids) for x in examples]
    trained = sum(sum(x.trained) for x in examples)
    facts = [
        *start.facts,
        _lengths(config.data, examples=lengths),
        f"{trained:,} of {sum(lengths):,} tokens are trained",
    ]
    steps = len(plan_examples(lengths, config))
    check_warmup(config.optim, steps)
    plan = f"{config.sft.epochs} epochs: {steps:,} optimizer steps of up to {config.sft.batch} rows"
    longest = config.data.max_tokens if config.sft.packing else max(lengths)
    shown = f"row {examples[0].row}\n{render(start.tokenizer, examples[0].ids, examples[0].trained)}"
    return Inputs(facts, longest, plan, shown, "a token that is learned")


def of_pairs(config: RewardConfig, hashes: Mapping[str, str]) -> Inputs:
    """Pairs, how they are split, and the steps that they make."""
    start, section, pinned = Start.of(config), config.reward_model, hashes.get("data.path")
    pairs = load_pairs(config.data, start.tokenizer, stop_id=start.stop, context=start.context, pinned=pinned)
    lengths = [len(x.prompt_ids) + max(len(x.chosen_ids), len(x.rejected_ids)) for x in pairs]
    train, test = split_pairs(pairs, section.test_fraction, config.seed)
    together = "answer (all have one prompt)" if share_prompts(train, test) else "prompt"
    held_out = f"{len(test)} held out; pairs of one {together} or group stay together"
    facts = [
        *start.facts,
        _lengths(config.data, pairs=lengths),
        f"{len(train)} pairs to train on, {held_out if test else 'none held out: no accuracy will be known'}",
    ]
    steps = len(shuffled_batches(len(train), batch=section.batch, epochs=section.epochs, seed=config.seed))
    check_warmup(config.optim, steps)
    plan = f"{section.epochs} epochs: {steps:,} optimizer steps of up to {section.batch} pairs"
    plan += f", for each of {section.members} reward models" if section.members else ""
    first, shown = train[0], []
    for name, ids in (("chosen", first.chosen_ids), ("rejected", first.rejected_ids)):
        mask = [False] * (len(first.prompt_ids) + len(ids) - 1) + [True]  # the score is read at the last token
        shown.append(f"row {first.row}, {name}\n{render(start.tokenizer, first.prompt_ids + ids, mask)}")
    return Inputs(facts, max(lengths), plan, "\n".join(shown), "where the score is read")


def of_preferences(config: DPOConfig, hashes: Mapping[str, str]) -> Inputs:
    """Pairs or labeled answers, how they are split, and the steps that they make."""
    start, section, pinned = Start.of(config), config.dpo, hashes.get("data.path")
    companions(config.model)
    train, test = load_preferences(config, start.tokenizer, stop_id=start.stop, context=start.context, pinned=pinned)
    lengths = [len(x.prompt_ids) + max(map(len, x.answers)) for x in [*train, *test]]
    what = "pairs" if len(train[0].answers) == 2 else "answers"
    facts = [
        *start.facts,
        _lengths(config.data, **{what: lengths}),
        f"{len(train)} {what} to train on, " + (f"{len(test)} held out" if test else "none held out"),
    ]
    examples = train if section.has_pairs else singles(train)
    if section.loss == "kto":
        mismatch(examples, config, start.context)
    steps = len(shuffled_batches(len(examples), batch=section.batch, epochs=section.epochs, seed=config.seed))
    check_warmup(config.optim, steps)
    learned = "pairs" if section.has_pairs else "answers"
    plan = f"{section.epochs} epochs: {steps:,} optimizer steps of up to {section.batch} {learned}"
    first, shown = train[0], []
    for number, ids in enumerate(first.answers, start=1):
        mask = [False] * len(first.prompt_ids) + [True] * len(ids)
        shown.append(f"row {first.row}, answer {number}\n{render(start.tokenizer, first.prompt_ids + ids, mask)}")
    return Inputs(facts, max(lengths), plan, "\n".join(shown), "a token whose log-prob counts")


def of_scored(config: QLearningConfig, _: Mapping[str, str]) -> Inputs:
    """Scored answers, and the steps that they make."""
    start, section = Start.of(config), config.qlearning
    companions(config.model)
    size, context = architecture_of(config).get_text_config().vocab_size, start.context
    answers = load_scored(config.data, start.tokenizer, stop_id=start.stop, context=context, vocab_size=size)
    lengths = [len(x.prompt.ids) + len(x.response_ids) for x in answers]
    scores, prompts = [x.score for x in answers], len({x.prompt.row for x in answers})
    others = all_stop_ids(start.stops, answers)[len(start.stops) :]
    facts = [
        *start.facts,
        *([f"stop tokens of the runs that are read, besides: {_tokens(start.tokenizer, others)}"] if others else []),
        f"{', '.join(config.data.paths)}: {len(answers)} answers to {prompts} prompts, {min(lengths)} to "
        f"{max(lengths)} tokens, half up to {sorted(lengths)[len(lengths) // 2]}",
        f"scores {min(scores):g} to {max(scores):g}, mean {sum(scores) / len(scores):.4g}",
        *_unheld(section),
    ]
    steps = len(shuffled_batches(len(answers), batch=section.batch, epochs=section.epochs, seed=config.seed))
    check_warmup(config.optim, steps)
    plan = f"{section.epochs} epochs: {steps:,} optimizer steps of up to {section.batch} answers"
    first = answers[0]
    mask = [False] * len(first.prompt.ids) + [True] * len(first.response_ids)
    rendered = render(start.tokenizer, [*first.prompt.ids, *first.response_ids], mask)
    shown = f"the first answer, score {first.score:g}\n{rendered}"
    return Inputs(facts, max(lengths), plan, shown, "a token of the answer, which has a residual")


def _unheld(section: QLearningSection) -> list[str]:
    """Said where implicit Q-learning may choose a token for a Q that nothing was learned of."""
    if section.loss != "ilql" or section.ilql.cql or section.ilql.top_k == 1:
        return []
    of = "every token" if not section.ilql.top_k else f"the {section.ilql.top_k} likeliest tokens"
    return [
        f"qlearning.ilql.cql=0 and sampling among {of} (top_k={section.ilql.top_k}): Q of a token that the data never "
        "holds is whatever the heads began with, and may be chosen for it. Set cql to 0.1, or top_k to the number of "
        "tokens that the data holds in one place."
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids)


def _sources(
    sources: Sequence[RewardSourceConfig], prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase,
    stops: Sequence[int], kind: str = "reward",
) -> list[str]:  # fmt: skip
    """Import the functions, read the reward models' configs and the judges' files, ask the servers."""
    facts = []
    for source in sources:
        name = source_name(source)
        weight = f", weight {source.weight:g}" if kind != "gold" else ""  # gold is never summed
        if source.function is not None:
            function = load_function(source.function)
            FunctionReward(function, name=name, tokenizer=tokenizer, stop_ids=stops, fixed=source.arguments).check(
                prompts
            )
            facts.append(f"{kind} {name}: {source.function}{weight}")
            continue
        if source.url is not None:
            url_reward(source, tokenizer, stops).check(prompts)
            answers = "it answers" if source.probe else "not asked: probe is off"
            facts.append(f"{kind} {name}: {source.url}{weight}; {answers}{_in_clear(source)}")
            continue
        if source.judge is not None:
            judge = judge_reward(source, tokenizer, stops)
            judge.check(prompts)
            facts.append(
                f"{kind} {name}: {describe_judge(judge.config, judge.form)}, {len(judge.principles)} principles, one "
                f"drawn for each prompt, weight {source.weight:g}"
            )
            continue
        for path in model_paths(source):
            check_one_label(path, model_config(path))
        if source.models is not None:
            check_members(source.models, name)
            facts.append(
                f"{kind} {name}: {len(source.models)} models, {', '.join(source.models)}, pessimism "
                f"{source.pessimism:g}{weight}"
            )
            continue
        facts.append(f"{kind} {name}: model {source.model}{weight}")
    return facts


def _engine(config: PPOConfig) -> list[str]:
    """Ask the other environment for its vLLM, and whether that serves the policy; look for Ray."""
    if config.sampling.engine == "local":
        return []
    if config.sampling.engine == "pool":
        pool = config.sampling.pool
        check_pool(pool)
        place = address_of(pool)
        return [f"sampling: {pool.workers} workers of {f'the Ray at {place}' if place else 'a Ray on this machine'}"]
    found = check_vllm(config.sampling, architecture_of(config))
    return [f"sampling: vLLM {found.version}{' for CPUs' if found.on_cpu else ''} of {found.python}"]


def _in_clear(source: RewardSourceConfig) -> str:
    """Said where a key travels so that others can read it."""
    host = urlsplit(source.url or "").hostname
    if source.key_env is None or str(source.url).startswith("https:") or host in ("127.0.0.1", "localhost", "::1"):
        return ""
    return f"; its key and all answers travel to {host} unencrypted (http): use https, or a tunnel (ssh -L)"


def _lengths(data: PromptsConfig | DataConfig, **kept: list[int]) -> str:
    """Rows and lengths of what was kept."""
    ((what, lengths),) = kept.items()
    filtered = isinstance(data, PairsConfig) and data.labels != LabelsConfig()
    rows = len(lengths) if filtered else len(read_rows(data.path, data.split, (), data.limit))  # Limit tells its drops
    dropped = f"; {rows - len(lengths)} of {rows} rows dropped as too long" if rows > len(lengths) else ""
    middle = sorted(lengths)[len(lengths) // 2]
    return f"{data.path}: {len(lengths)} {what}, {min(lengths)} to {max(lengths)} tokens, half up to {middle}{dropped}"


def render(tokenizer: PreTrainedTokenizerBase, ids: list[int], mask: list[bool]) -> str:
    """One token a line: whether it counts, its id, its text."""
    lines = [f"  {int(m)}  {i:>6}  {tokenizer.decode([i])!r}" for i, m in zip(ids, mask, strict=True)]
    if len(lines) > 2 * _SHOWN:
        lines[_SHOWN:-_SHOWN] = [f"  …  {len(lines) - 2 * _SHOWN} more tokens"]
    return "\n".join(lines)
