"""What `tether revise` takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tether.config.judge import AskedModelConfig, LimitsConfig
from tether.config.keys import Section, at_least, within
from tether.config.sections import Config, Dtype, SamplingConfig, Seed, check_local_engine
from tether.errors import ConfigError


@dataclass(frozen=True)
class RevisedDataConfig(Section):
    """Which answers are revised."""

    path: str
    """JSONL (or .jsonl.gz) or Parquet file, or a hub dataset id, with a column `prompt` (text or messages). Where a row
    has a `completion` too, that is the first answer; else the model writes it."""
    limit: Annotated[int | None, at_least(1, "nothing would be revised; null takes all")] = None
    """Use only the first so many rows; null: all."""


@dataclass(frozen=True)
class ReviseSection(AskedModelConfig):
    """Who answers, criticizes and rewrites, by what, and how often."""

    constitution: str = "harmless"
    """What is asked for: a text file with one principle a line or a paragraph (# begins a comment), of which one is
    drawn for each round; or helpful, harmless, honest, which come with tether."""
    rounds: Annotated[int, within(1, 4, "a chain has 1 to 4 rounds of critique and revision", "Set e.g. 1.")] = 1
    """Rounds of critique and revision, each under another principle as long as there are any; most of the change comes
    with the first (Bai et al. 2022)."""


@dataclass(frozen=True)
class RevisedSamplingConfig(SamplingConfig):
    """How answers, critiques and revisions are drawn. Filters in this order: temperature, top-k, top-p."""

    max_new_tokens: Annotated[int, at_least(1, "every reply would be empty")] = 512
    """Longest answer, critique or revision, in tokens. One that reaches it is cut, and its prompt gives no row."""


@dataclass(frozen=True)
class ReviseConfig(Config):
    """Everything of a revision: who revises, by what principles, which answers, within which limits."""

    revise: ReviseSection
    data: RevisedDataConfig
    to: str = "runs/revised.jsonl"
    """The file of rows for `tether sft`, each with its whole chain; rows are added to it, never changed. The studio
    shows it where it is below the studio's folder."""
    sampling: RevisedSamplingConfig = field(default_factory=RevisedSamplingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    seed: Seed = 0
    """Seed of the principles that are drawn, and of everything that is sampled."""
    device: str = "auto"
    """Of a local model. auto: cuda, else mps, else cpu."""
    dtype: Dtype = "auto"
    """Compute precision of a local model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a local model."""

    def check(self, key: str) -> None:
        super().check(key)
        if Path(self.to).suffix != ".jsonl":
            raise ConfigError(
                f"to={self.to} does not end in .jsonl, and the studio would not find it. Name a file such as "
                "runs/revised.jsonl."
            )
        if Path(self.to).absolute() == Path(self.data.path).absolute():
            raise ConfigError(f"to={self.to} is data.path itself: it would grow by its own rows. Name another file.")
        check_local_engine(self.sampling, "tether revise")
        if self.revise.base_url is not None:
            for name in ("top_k", "stop_token_ids", "slots"):
                if getattr(self.sampling, name) != getattr(SamplingConfig, name):
                    raise ConfigError(
                        f"sampling.{name} is set with revise.base_url: an endpoint knows no such thing, and it would "
                        "be ignored. Leave it out."
                    )
