"""Which prompts PPO trains on and which it is evaluated on: a prompt that is held out is never trained on.

Fewer than four prompts are too few to hold any out; a run says so wherever it speaks of its evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from tether.config import HeldOutConfig, PPOConfig
from tether.data.prompts import load_prompts
from tether.errors import ConfigError, DataError
from tether.runs import RunDirectory
from tether.train.optim import HELD_OUT, permutation
from tether.types import Prompt

# All of six fall by chance once in 64 times; of five once in 32, which is more often than the interval's 2.5 %.
_LEAST_FOR_GOLD = 6


@dataclass(frozen=True, slots=True)
class PromptSets:
    loaded: list[Prompt]  # every row of `prompts.path` that is short enough
    train: list[Prompt]
    held_out: list[Prompt]  # to evaluate on
    note: str | None  # what is not as the config asks

    def record(self, run: RunDirectory) -> None:
        """An event of how many prompts there are, and how many of those that are evaluated on are trained on too."""
        both = len(self.held_out) - len(without(self.held_out, self.train))
        run.event("prompts", train=len(self.train), held_out=len(self.held_out), trained_on=both)


def load_prompt_sets(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, context: int | None) -> PromptSets:
    """Read and split the prompts. context: tokens that the model has positions for, None for no limit."""
    limit, e = config.sampling.max_new_tokens, config.evaluate
    prompts = load_prompts(config.prompts, tokenizer, context=context, max_new_tokens=limit)
    if e.prompts is None:
        sets = PromptSets(prompts, *hold_out(prompts, e.count if e.every else 0, config.seed))
        _check_enough(sets.held_out, e)
        return sets
    other = replace(config.prompts, path=e.prompts, limit=None)
    held_out = load_prompts(other, tokenizer, context=context, max_new_tokens=limit)[: e.count]
    _check_enough(held_out, e)
    train = without(prompts, held_out)
    if not train:
        raise DataError(
            f"evaluate.prompts={e.prompts} holds every prompt of prompts.path={config.prompts.path}: what is evaluated "
            "on is not trained on, so nothing would be left. Lower evaluate.count, or evaluate on other prompts."
        )
    dropped = len(prompts) - len(train)
    note = f"{dropped} of {len(prompts)} rows are evaluated on: not trained on" if dropped else None
    return PromptSets(prompts, train, held_out, note)


def _check_enough(held_out: list[Prompt], evaluate: HeldOutConfig) -> None:
    if evaluate.stop_when_gold_falls is not None and len(held_out) < _LEAST_FOR_GOLD:
        raise ConfigError(
            f"evaluate.stop_when_gold_falls={evaluate.stop_when_gold_falls} with {len(held_out)} held-out prompts: so "
            f"few may all fall by chance, and the run would end for nothing. Hold {_LEAST_FOR_GOLD} or more out with "
            "evaluate.count (a quarter of the prompts at most) or evaluate.prompts, 64 if you can; or leave it out."
        )


def hold_out(prompts: list[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt], str | None]:
    """(prompts to train on, prompts to evaluate on, a note): never more than a quarter is held out.

    Rows with the same prompt stand or fall together: one of them is evaluated on, or all are trained on.
    """
    if count == 0:
        return prompts, [], None
    first: dict[tuple[int, ...], Prompt] = {}
    for p in prompts:
        first.setdefault(p.ids, p)
    distinct = list(first.values())
    if len(distinct) < 4:
        return prompts, prompts, f"only {len(distinct)} prompts: evaluation uses the ones that are trained on"
    chosen = permutation(len(distinct), seed=seed, stream=HELD_OUT)[: min(count, len(distinct) // 4)]
    held_out = [distinct[i] for i in sorted(chosen)]
    train = without(prompts, held_out)
    notes = []
    if len(held_out) < count:
        notes.append(f"only {len(distinct)} prompts: {len(held_out)} are held out, not {count}")
    if repeats := len(prompts) - len(train) - len(held_out):
        notes.append(f"{repeats} rows repeat a held-out prompt: not trained on")
    return train, held_out, "; ".join(notes) or None


def without(prompts: list[Prompt], held_out: list[Prompt]) -> list[Prompt]:
    """The rows whose prompt is none of the held-out ones, as the model reads it."""
    taken = {p.ids for p in held_out}
    return [p for p in prompts if p.ids not in taken]
