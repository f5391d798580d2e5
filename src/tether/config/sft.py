"""What `tether sft` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tether.config.keys import Section, at_least
from tether.config.sections import DataConfig, MicrobatchTokens, TrainingConfig


@dataclass(frozen=True)
class SFTSection(Section):
    """Supervised fine-tuning."""

    epochs: Annotated[int, at_least(1, "nothing would be trained")] = 1
    """Passes over the data."""
    batch: Annotated[int, at_least(1, "an optimizer step would have no examples")] = 32
    """Examples (or, packed, rows of max_tokens) in an optimizer step."""
    microbatch_tokens: MicrobatchTokens = 8192
    """Padded tokens in memory at once; never changes the result."""
    packing: bool = False
    """Several examples in one row of max_tokens; attention never crosses from one to the next."""
    train_on: Literal["completion", "all"] = "completion"
    """completion: loss on the answer and its stop token alone. all: on the prompt too."""


@dataclass(frozen=True)
class SFTConfig(TrainingConfig):
    """Everything of a supervised fine-tuning run."""

    data: DataConfig
    sft: SFTSection = field(default_factory=SFTSection)

    def microbatch(self, longest: int | None, ranks: int = 1) -> tuple[int, int, int]:
        width = longest or self.data.max_tokens
        return min(-(-self.sft.batch // ranks), max(1, self.sft.microbatch_tokens // width)), width, width - 1
