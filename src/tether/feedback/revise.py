"""`tether revise`: a model criticizes and rewrites answers under principles; what comes out trains `tether sft`.

    prompts ── chains without a row yet ── answer, then rounds of critique and revision ── rows, in the data's order

What a chain is made of is in `chains`; who writes it in `reviser`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tether.config import ReviseConfig, check
from tether.errors import ConfigError, Interrupted, ModelError
from tether.feedback.chain_file import ChainFile, ids_of
from tether.feedback.chains import Chain, NoChain, read_chains
from tether.feedback.client import check_key
from tether.feedback.constitution import read_constitution
from tether.feedback.judge_cache import JudgeCache
from tether.feedback.progress import screen
from tether.feedback.reviser import EndpointReviser, LocalReviser, Outcome
from tether.runs import hash_files
from tether.train.log import say
from tether.train.signals import Signals

_TRIAL = 20  # chains after which a model of which none gave a row is given up
_SAMPLED = 64  # chains that the estimate looks at
_CHARACTERS_A_TOKEN = 4  # of English in today's tokenizers
_REPLY = 150  # tokens of an answer, critique or revision, as the estimate has it


@dataclass
class Revised:
    """What a revision did."""

    file: str
    rows: int = 0  # written now
    before: int = 0  # that stood there before
    unchanged: int = 0  # of those written now: the last revision is the first answer
    failed: Counter[str] = field(default_factory=Counter)  # chains that gave no row, by reason
    example: str = ""  # what the model said in one of them
    left: int = 0  # chains that still wait, where a limit was reached
    spent: str = ""  # requests and tokens since the first start, of an endpoint

    def __str__(self) -> str:
        parts = [f"{self.file}: {self.rows} rows written"]
        if self.before:
            parts.append(f"{self.before} were there before")
        if self.unchanged:
            parts.append(f"{self.unchanged} of them end with the answer that they began with (revised: false)")
        parts += [f"{count} without a row: {reason}" for reason, count in self.failed.most_common()]
        if self.spent:
            parts.append(self.spent)
        if self.left:
            parts.append(f"{self.left} still wait: a limit was reached; raise limits and run the same command again")
        return "; ".join(parts)


def revise(config: ReviseConfig, *, fresh: bool = False) -> Revised:
    """Revise every answer that has no row yet; rows and answers that were paid survive whatever ends the process."""
    check(config)
    if fresh:
        raise ConfigError(
            f"--fresh: a revision has no run to start over, and rows are only added to {config.to}. Set `to` to "
            "another file to have everything revised again."
        )
    principles = read_constitution(config.revise.constitution, "revise.constitution")
    chains = _chains(config, principles)
    with ChainFile(Path(config.to), _made_by(config, principles)) as file:
        waiting = [chain for chain in chains if chain.id not in file.ids]
        done = Revised(config.to, before=len(chains) - len(waiting))
        if waiting:
            say(describe_plan(config, waiting))
            with _reviser(config) as reviser:
                _revise(reviser, waiting, file, done, config)
    return done


def _revise(
    reviser: EndpointReviser | LocalReviser, waiting: Sequence[Chain], file: ChainFile, done: Revised,
    config: ReviseConfig,
) -> None:  # fmt: skip
    """Have all of them written, and write rows as they come, in the order of the data.

    One that comes before its predecessors waits for them: should we die, it is in the endpoint's cache.
    """
    order = [chain.number for chain in waiting]
    came: dict[int, Outcome] = {}
    following = 0  # place in `order` of the next row

    def write(*, all_of_them: bool = False) -> None:
        nonlocal following
        ready = []
        while following < len(order) and (order[following] in came or all_of_them):
            outcome = came.pop(order[following], None)
            following += 1
            if isinstance(outcome, NoChain):
                done.failed[outcome.reason] += 1
                done.example = done.example or outcome.reply
            elif outcome is not None:
                ready.append(outcome.row(file.made_by))
                outcome.texts = []  # a hundred thousand of them would not be small
        if ready:
            file.add(ready)
            done.rows += len(ready)
            done.unchanged += sum(not row["revised"] for row in ready)

    with Signals() as signals, screen(len(waiting), "answers") as progress:
        outcomes = reviser.revise(waiting)
        try:
            for outcome in outcomes:
                if outcome is not None:
                    came[outcome.number] = outcome
                    write()
                failed = done.failed.total()
                summary = [reviser.now(), reviser.cost(), f"{failed} without a row" if failed else ""]
                progress.show(following + len(came), "; ".join(filter(None, summary)))
                if failed >= _TRIAL and not done.before + done.rows:
                    break
                if signals.requested:
                    break
            else:
                write(all_of_them=True)
        finally:
            outcomes.close()
        done.spent = reviser.cost()
        done.left = len(waiting) - done.rows - done.failed.total()
        if signals.requested:
            left, done.left = done.left, 0
            raise Interrupted(f"stopped by a signal: {done}; {left} still wait. The same command goes on from there.")
    tried = done.failed.total() >= _TRIAL or not done.left  # else a limit came before the model could show what it can
    able = done.before + done.rows  # one that has revised before can: these rows are at fault
    if done.failed and tried and not able:
        raise _useless(done, config)


def _useless(done: Revised, config: ReviseConfig) -> ModelError:
    reason, count = done.failed.most_common(1)[0]
    said = f", as in {done.example[:80]!r}" if done.example else ""
    most = config.sampling.max_new_tokens
    remedy = "Use a model that can follow instructions"
    if "was cut" in reason:
        remedy += f" and ends its replies, or raise sampling.max_new_tokens={most}"
    elif "leaves no room" in reason:
        remedy = f"Lower sampling.max_new_tokens={most}, or use a model with a longer context"
    return ModelError(
        f"revise.model={config.revise.model}: none of {done.failed.total()} chains gave a row ({count}: {reason}"
        f"{said}). {remedy}."
    )


# ---------------------------------------------------------------- what is asked, of whom, and what it costs


def _chains(config: ReviseConfig, principles: tuple[str, ...]) -> list[Chain]:
    rounds = config.revise.rounds
    return list(read_chains(config.data.path, config.data.limit, principles, rounds=rounds, seed=config.seed))


def _made_by(config: ReviseConfig, principles: Sequence[str]) -> dict[str, Any]:
    """What rows depend on: in one file it must not change."""
    digest = hashlib.sha256("\n\n".join(principles).encode()).hexdigest()[:16]
    r, s = config.revise, config.sampling
    local = r.base_url is None and Path(r.model).is_dir()  # where another model may stand tomorrow
    return {
        "model": r.model, "weights": hash_files(r.model) if local else None, "constitution": digest,
        "rounds": r.rounds, "temperature": s.temperature, "top_k": s.top_k, "top_p": s.top_p,
        "max_new_tokens": s.max_new_tokens, "stop_token_ids": s.stop_token_ids, "seed": config.seed,
    }  # fmt: skip


def answers_path(file: str) -> Path:
    """revised.jsonl gives revised.answers.db: what an endpoint answered, and what that cost."""
    path = Path(file)
    return path.with_name(f"{path.stem}.answers.db")


@contextmanager
def _reviser(config: ReviseConfig) -> Iterator[EndpointReviser | LocalReviser]:
    """Whoever writes, with the cache of their answers open."""
    if config.revise.base_url is None:
        yield LocalReviser(config)
        return
    cache = JudgeCache(answers_path(config.to))
    try:
        yield EndpointReviser(config, cache)
    finally:
        cache.close()


def describe_plan(config: ReviseConfig, waiting: Sequence[Chain]) -> str:
    """What revising so many answers takes, told before the first request."""
    r, limits = config.revise, config.limits
    steps = sum(2 * r.rounds + (not chain.given) for chain in waiting)
    rounds = f"{r.rounds} round{'s' if r.rounds > 1 else ''} of critique and revision"
    who = f"{len(waiting)} answers, {rounds}, {r.model}"
    most = config.sampling.max_new_tokens
    if r.base_url is None:
        return f"{who}: {steps:,} replies of up to {most} tokens, in this process"
    sample = waiting[:_SAMPLED]
    tokens = sum(_expected_tokens(chain, most) for chain in sample) / max(1, len(sample)) * len(waiting)
    caps = [f"{n:,} {what}" for what, n in (("requests", limits.requests), ("tokens", limits.tokens)) if n is not None]
    return (
        f"{who} at {r.base_url}: {steps:,} requests and about {int(float(f'{tokens:.2g}')):,} tokens, answers that are "
        f"kept aside; limits: {' and '.join(caps) or 'none'}"
    )


def _expected_tokens(chain: Chain, most: int) -> float:
    """Tokens of a chain's questions and replies, were each reply of a usual length."""
    usual = min(most, _REPLY)
    imagined = Chain(chain.id, chain.number, chain.prompt, chain.principles, chain.given, list(chain.texts))
    tokens = 0.0
    while not imagined.done:
        tokens += usual + sum(len(m["content"]) for m in imagined.question()) / _CHARACTERS_A_TOKEN
        imagined.take("x" * usual * _CHARACTERS_A_TOKEN, whole=True)
    return tokens


def inputs(config: ReviseConfig, _: Mapping[str, str]) -> Any:
    """`Inputs` for --dry-run: the answers, the principles, and what it would take. Asks nothing and writes nothing."""
    from tether.diagnose.inputs import Inputs

    principles = read_constitution(config.revise.constitution, "revise.constitution")
    chains, file = _chains(config, principles), Path(config.to)
    known = ids_of(file, file.read_bytes(), _made_by(config, principles)) if file.is_file() else set()
    waiting = [chain for chain in chains if chain.id not in known]
    given = sum(chain.given for chain in chains)
    facts = [
        f"{config.data.path}: {len(chains)} prompts, {given} with a first answer",
        f"{config.to}: {len(chains) - len(waiting)} of them have their row",
        f"{config.revise.constitution}: {len(principles)} principles, one drawn for each round",
    ]
    sample, longest = waiting[:_SAMPLED], 0
    if config.revise.base_url is None:
        local = LocalReviser(config)
        longest = max((len(local.encode(chain)) for chain in sample), default=0)
        facts.append(f"first questions of up to {longest} tokens (of the first {len(sample)}), of {local.context}")
    else:
        check_key(config.revise, "revise")
    plan = describe_plan(config, waiting)
    if sample:
        shown = "\n\n".join(message["content"] for message in sample[0].question())
        plan = f"{plan}\n\nthe first question\n{shown}".replace("\n", "\n  ")
    return Inputs(facts, longest, plan)
