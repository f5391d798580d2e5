"""`tether judge`: a model compares the pairs of a store, and its labels stand beside people's.

    store ── pairs without its label ── a principle for each ── both orders ── the model ── P(a is better) ── store

What a label takes is in `verdict`; who is asked is in `local_judge` (a model directory) or `endpoint`.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tether.config import JudgeConfig, check
from tether.errors import ConfigError, Interrupted, ModelError, StoreError
from tether.feedback.client import check_key
from tether.feedback.constitution import draw_principle, read_constitution
from tether.feedback.endpoint import Endpoint
from tether.feedback.judge_cache import JudgeCache, cache_path
from tether.feedback.progress import screen
from tether.feedback.queue import display_order, fingerprint
from tether.feedback.records import Item, StoredItem, Verdict
from tether.feedback.schema import is_store
from tether.feedback.store import Store
from tether.feedback.verdict import Comparison
from tether.train.log import say
from tether.train.signals import Signals

if TYPE_CHECKING:  # they load transformers, which takes seconds, and an endpoint's judge of a store does not need it
    from tether.feedback.items import ItemBatch
    from tether.feedback.local_judge import LocalJudge

_SAVE_EVERY_S = 2.0  # labels wait so long for others, to be written together
_TRIAL = 20  # comparisons after which a judge of which none could be read is given up
_AT_ONCE = 64  # items that are read from the store together
_SAMPLED = 64  # pairs that the estimate looks at
_CHARACTERS_A_TOKEN = 4  # of English in today's tokenizers
_REASONS = 120  # tokens of an answer with reasons


@dataclass
class Judged:
    """What a judge did."""

    store: str
    judge: str
    labels: int = 0  # given now
    before: int = 0  # that it had given before
    rankings: int = 0  # items of more than two answers: left out
    failed: Counter[str] = field(default_factory=Counter)  # comparisons that gave no label, by reason
    example: str = ""  # what the model said in one of them
    left: int = 0  # pairs that still wait, where a limit was reached
    spent: str = ""  # requests and tokens since the judge's first start, of an endpoint

    def __str__(self) -> str:
        parts = [f"{self.store}: {self.labels} pairs labeled by {self.judge}"]
        if self.before:
            parts.append(f"{self.before} were labeled before")
        parts += [f"{count} without an answer: {reason}" for reason, count in self.failed.most_common()]
        if self.rankings:
            parts.append(f"{self.rankings} items of more than two answers left out")
        if self.spent:
            parts.append(self.spent)
        if self.left:
            parts.append(f"{self.left} still wait: a limit was reached; raise limits and run the same command again")
        return "; ".join(parts)


def judge(config: JudgeConfig, *, fresh: bool = False) -> Judged:
    """Label every pair that waits; labels and answers that were paid survive whatever ends the process."""
    check(config)
    if fresh:
        raise ConfigError(
            f"--fresh: a judge has no run to start over, and the labels of {config.judge.annotator} stay in the store. "
            "Set judge.name to another name to have every pair asked about again."
        )
    principles = read_constitution(config.judge.constitution, "judge.constitution")
    source = None if is_store_path(config.data.path) else _read_pairs(config.data.path)
    with Store(store_path(config), create=source is not None) as store:
        among = None if source is None else set(store.add_items(source.items).ids)
        queue = Queue(store, config, principles, among)
        store.add_judge(config.judge.annotator, _made_of(config, principles))
        done = Judged(str(store.path), config.judge.annotator, before=queue.labeled, rankings=queue.rankings)
        if queue.waiting:
            say(_estimate(config, queue))
            with asker(config) as asked:
                _label(asked, queue, store, done)
    return done


def _label(asked: Endpoint | LocalJudge, queue: Queue, store: Store, done: Judged) -> None:
    """Ask about everything that waits, and write labels as they come."""
    pending: list[Verdict] = []
    made_of = _made_of(queue.config, queue.principles)
    saved = time.monotonic()

    def save() -> None:
        nonlocal saved
        if pending:  # again: until the first label, another process may have changed what the name stands for
            store.add_judge(done.judge, made_of)
        store.record_verdicts(done.judge, pending)
        done.labels += len(pending)
        pending.clear()
        saved = time.monotonic()

    with Signals() as signals, screen(len(queue.waiting), "pairs") as progress:
        outcomes = asked.compare(queue.comparisons())
        try:
            for outcome in outcomes:
                if isinstance(outcome, Verdict):
                    pending.append(outcome)
                elif outcome is not None:
                    done.failed[outcome.reason] += 1
                    done.example = done.example or outcome.reply
                if time.monotonic() - saved > _SAVE_EVERY_S:
                    save()
                failed = done.failed.total()
                summary = [asked.cost(), f"{failed} without an answer" if failed else ""]
                progress.show(done.labels + len(pending) + failed, "; ".join(filter(None, summary)))
                if failed >= _TRIAL and not done.before + done.labels + len(pending):
                    break
                if signals.requested:
                    break
        finally:
            outcomes.close()
            save()
        done.spent = asked.cost()
        done.left = len(queue.waiting) - done.labels - done.failed.total()
        if signals.requested:
            left, done.left = done.left, 0
            raise Interrupted(f"stopped by a signal: {done}; {left} still wait. The same command goes on from there.")
    if done.failed and not done.before + done.labels:  # one that has labeled before can: these pairs are at fault
        raise _unreadable(done, queue.config)


def _unreadable(done: Judged, config: JudgeConfig) -> ModelError:
    reason, count = done.failed.most_common(1)[0]
    said = f", as in {done.example[:80]!r}" if done.example else ""
    return ModelError(
        f"judge.model={config.judge.model}: none of {done.failed.total()} comparisons gave a label ({count}: "
        f"{reason}{said}). Use a model that can follow instructions, or one that was trained to answer with a letter."
    )


# ---------------------------------------------------------------- what is asked


class Queue:
    """The pairs that wait for a judge, read from the store one by one."""

    def __init__(self, store: Store, config: JudgeConfig, principles: tuple[str, ...], among: set[int] | None) -> None:
        self.store, self.config, self.principles = store, config, principles
        self.rankings = self.labeled = 0
        self.waiting = array("q")  # eight bytes each: there may be very many
        for number, kind, labeled in store.judge_queue(config.judge.annotator):
            if among is None or number in among:
                self.rankings += kind != "pair"
                self.labeled += kind == "pair" and labeled
                if kind == "pair" and not labeled:
                    self.waiting.append(number)
        if not self.labeled and not self.waiting:
            raise StoreError(
                f"{store.path} holds no pair of answers, so there is nothing to compare. Add some: tether label --from "
                f"pairs.jsonl --to {store.path}."
            )
        self.waiting = self.waiting[: config.data.limit]

    def comparisons(self) -> Iterator[Comparison]:
        for start in range(0, len(self.waiting), _AT_ONCE):
            numbers = self.waiting[start : start + _AT_ONCE]
            for number, item in zip(numbers, self.store.items(numbers), strict=True):
                yield comparison(item, number, self.config, self.principles)


def comparison(item: Item | StoredItem, number: int, config: JudgeConfig, principles: tuple[str, ...]) -> Comparison:
    """The question about an item: its principle and, under orders: one, its order follow from the seed."""
    mark = item.fingerprint if isinstance(item, StoredItem) else fingerprint(item)
    if config.judge.orders == "both":
        orders: tuple[tuple[int, ...], ...] = ((0, 1), (1, 0))
    else:
        orders = (display_order(config.seed, mark, config.judge.annotator, 2),)
    principle = draw_principle(principles, seed=config.seed, item=mark)
    return Comparison(number, item.prompt, (item.answers[0].text, item.answers[1].text), principle, orders)


def store_path(config: JudgeConfig) -> str:
    """Where labels go."""
    path = config.data.path
    if not is_store_path(path):
        return config.to or "preferences.db"
    if config.to is not None and Path(config.to).absolute() != Path(path).absolute():
        raise ConfigError(
            f"to={config.to}, but data.path={path} is a store itself: labels of its pairs belong into it. Leave `to` "
            "out."
        )
    return path


def _read_pairs(path: str) -> ItemBatch:
    from tether.feedback.items import read_items

    return read_items(path)


def is_store_path(path: str) -> bool:
    """Whether it is a store, or named like one: a store that is missing is no data set of the hub."""
    file = Path(path)
    return is_store(file) if file.is_file() else file.suffix == ".db"


def _made_of(config: JudgeConfig, principles: Sequence[str]) -> dict[str, Any]:
    """What labels depend on: under one name it must not change."""
    digest = hashlib.sha256("\n\n".join(principles).encode()).hexdigest()[:16]
    j = config.judge
    return {"model": j.model, "constitution": digest, "orders": j.orders, "votes": j.votes, "seed": config.seed}


# ---------------------------------------------------------------- who is asked, and what it costs


@contextmanager
def asker(config: JudgeConfig) -> Iterator[Endpoint | LocalJudge]:
    """Whoever answers the questions, with the cache of its answers open."""
    if config.judge.base_url is None:
        from tether.feedback.local_judge import LocalJudge

        yield LocalJudge(config)
        return
    cache = JudgeCache(cache_path(store_path(config), config.judge.annotator))
    try:
        yield Endpoint(config.judge, config.limits, cache)
    finally:
        cache.close()


def _estimate(config: JudgeConfig, queue: Queue) -> str:
    return describe_plan(config, len(queue.waiting), list(islice(queue.comparisons(), _SAMPLED)))


def describe_plan(config: JudgeConfig, pairs: int, sample: Sequence[Comparison]) -> str:
    """What comparing so many pairs takes, told before the first is asked about; sample: some of them."""
    j, limits = config.judge, config.limits
    orders = 2 if j.orders == "both" else 1
    who = f"{pairs} pairs, {'both orders' if orders == 2 else 'one order'}, {j.annotator}"
    if j.base_url is None:
        return f"{who}: {pairs * orders:,} questions to {j.model}, in this process"
    characters = sum(len(m["content"]) for c in sample for m in c.question(c.orders[0], "text"))
    tokens = characters / max(1, len(sample)) / _CHARACTERS_A_TOKEN
    soft = pairs * orders
    cost = {"log-probs": (soft, soft * (tokens + 1)), "text": (soft * j.votes, soft * j.votes * (tokens + _REASONS))}
    if j.answer != "auto":
        cost.pop("text" if j.answer == "logprobs" else "log-probs")
    told = " or ".join(f"{n:,} requests and about {_rounded(t):,} tokens ({form})" for form, (n, t) in cost.items())
    caps = [f"{n:,} {what}" for what, n in (("requests", limits.requests), ("tokens", limits.tokens)) if n is not None]
    return f"{who} at {j.base_url}: {told}, answers that are kept aside; limits: {' and '.join(caps) or 'none'}"


def _rounded(tokens: float) -> int:
    """To two digits: it is an estimate."""
    return int(float(f"{tokens:.2g}"))


def inputs(config: JudgeConfig, _: Mapping[str, str]) -> Any:
    """`Inputs` for --dry-run: the pairs, the principles, and what it would take. Asks nothing and writes nothing."""
    from tether.diagnose.inputs import Inputs

    principles = read_constitution(config.judge.constitution, "judge.constitution")
    path = store_path(config)
    if is_store_path(config.data.path):
        with Store(path, create=False, upgrade=False) as store:
            queue = Queue(store, config, principles, None)
            pairs, sample = len(queue.waiting), list(islice(queue.comparisons(), _SAMPLED))
            facts = [f"{path}: {pairs} pairs wait, {queue.labeled} are labeled by {config.judge.annotator}"]
    else:
        read = [item for item in _read_pairs(config.data.path).items if item.kind == "pair"]
        labeled = _labeled(path, config.judge.annotator, read)
        waiting = [item for item, done in zip(read, labeled, strict=True) if not done][: config.data.limit]
        pairs = len(waiting)
        sample = [comparison(item, 0, config, principles) for item in waiting[:_SAMPLED]]
        facts = [
            f"{config.data.path}: {pairs} pairs wait, {sum(labeled)} are labeled by {config.judge.annotator} in {path}"
        ]
    facts.append(f"{config.judge.constitution}: {len(principles)} principles, one drawn for each pair")
    longest = 0
    if config.judge.base_url is None:
        from tether.feedback.local_judge import LocalJudge

        local = LocalJudge(config)
        longest = max((len(local.encode(c, order)) for c in sample for order in c.orders), default=0)
        facts.append(f"questions of up to {longest} tokens (of the first {len(sample)} pairs), of {local.context}")
    else:
        check_key(config.judge, "judge")
    shown = ""
    if sample:
        shown = "\n\n".join(m["content"] for m in sample[0].question(sample[0].orders[0], "logprobs"))
    plan = f"{describe_plan(config, pairs, sample)}\n\nthe first question\n{shown}"
    return Inputs(facts, longest, plan.replace("\n", "\n  "))


def _labeled(path: str, judge: str, items: Sequence[Item]) -> list[bool]:
    """Whether each of these items is in the store with a label of this judge; the store need not be there."""
    if not Path(path).exists() or not Path(path).stat().st_size:
        return [False] * len(items)
    with Store(path, create=False, upgrade=False) as store:
        done = {number for number, _, labeled in store.judge_queue(judge) if labeled}
        return [store.number_of(item) in done for item in items]
