"""Scores from several reward models: their mean, lowered where they disagree, and how far they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tether.data.tokenizer import load_tokenizer
from tether.errors import ModelError
from tether.math import pessimistic_mean
from tether.rewards.model import ModelReward, same_tokens
from tether.types import Completions, Prompt


class EnsembleReward:
    """Reward models as one source of scores; each has its own normalization.

    They are scored one after the other: in one pass over stacked weights (torch.func.vmap) four models of 6.5 million
    weights took 0.84 to 1.04 of that time on a CPU.
    """

    def __init__(self, paths: Sequence[str], *, name: str, pessimism: float, **how: Any) -> None:
        """paths: directories or hub ids. pessimism: as in `pessimistic_mean`. how: as in `ModelReward`."""
        check_members(paths, name)
        self.members = [ModelReward(path, name=f"{name} ({path})", **how) for path in paths]
        self.pessimism = pessimism

    def check(self, prompts: Sequence[Prompt]) -> None:
        for member in self.members:
            member.check(prompts)

    def score(self, completions: Completions) -> list[float | None]:
        """B scores, in order."""
        return self.score_with_members(completions)[0]

    def score_with_members(self, completions: Completions) -> tuple[list[float | None], Tensor]:
        """(B scores, those of each member [K, B]), in reward units."""
        scores = torch.tensor([member.score(completions) for member in self.members], dtype=torch.float64)
        return pessimistic_mean(scores, pessimism=self.pessimism).tolist(), scores


def check_members(paths: Sequence[str], name: str) -> None:
    """Raise ModelError unless all members read a text alike. Reads tokenizers, no weights."""
    first = load_tokenizer(paths[0])
    for path in paths[1:]:
        if not same_tokens(first, load_tokenizer(path)):
            raise ModelError(
                f"reward {name}: {path} has another tokenizer or chat template than {paths[0]}, so they would disagree "
                "about what they read, not about what is good. List members that were trained from one model; "
                "`tether reward` with reward_model.members trains them."
            )
