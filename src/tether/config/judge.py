"""What `tether judge` takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal
from urllib.parse import urlsplit

from tether.config.keys import Section, at_least, positive
from tether.config.sections import Config, Dtype, Seed
from tether.errors import ConfigError

CONSTITUTIONS = ("helpful", "harmless", "honest")  # shipped, see tether/feedback/constitutions
NOT_IN_NAMES = r"[^\w.-]"


@dataclass(frozen=True)
class JudgedConfig(Section):
    """Which pairs of answers are compared."""

    path: str
    """A store of labels (preferences.db), of which every pair is compared that this judge has not labeled yet; or JSONL
    (.jsonl.gz) or Parquet with prompt, a, b or prompt, chosen, rejected, whose pairs are added to the store `to`."""
    limit: Annotated[int | None, at_least(1, "nothing would be compared; null takes all")] = None
    """Compare only the first so many pairs of those that wait; null: all."""


@dataclass(frozen=True)
class AskedModelConfig(Section):
    """A model that is asked: behind an endpoint, or in this process."""

    model: str
    """What the endpoint calls the model; without base_url a model directory or hub id, asked in this process."""
    base_url: str | None = None
    """An OpenAI-compatible endpoint, as http://127.0.0.1:8000/v1; null: `model` is a local model."""
    key_env: str | None = None
    """The environment variable that holds the endpoint's key; null: it needs none. The key is written nowhere."""

    def check(self, key: str) -> None:
        if self.base_url is None:
            if self.key_env is not None:
                raise ConfigError(
                    f"{key}.key_env is set, but {key}.base_url is null: a local model takes no key. Leave "
                    f"{key}.key_env out, or name the endpoint."
                )
            return
        try:
            url = urlsplit(self.base_url)
            usable = url.scheme in ("http", "https") and bool(url.hostname) and (url.port or True)
        except ValueError:  # a port that is none
            usable = False
        if not usable:
            raise ConfigError(
                f"{key}.base_url={_without_secrets(self.base_url)!r} is not the address of an endpoint: nobody could "
                "be asked. Write it like http://127.0.0.1:8000/v1."
            )
        if url.username or url.password or url.query or url.fragment:
            raise ConfigError(
                f"{key}.base_url={_without_secrets(self.base_url)!r} has more than scheme, host, port and path: a key "
                f"in it would stand in files. Put the key into an environment variable and name it in {key}.key_env."
            )


@dataclass(frozen=True)
class JudgeSection(AskedModelConfig):
    """Who judges, by what, and how its answers are read."""

    name: str | None = None
    """Its labels are those of annotator judge:NAME; null: the last part of `model`
    (of runs/mine/final: mine). Labels under one name come from one
    judge: with another model, constitution, orders or votes it needs another."""
    constitution: str = "helpful"
    """What is asked for: a text file with one principle a line or a paragraph (# begins a comment), of which one is
    drawn for each pair; or helpful, harmless, honest, which come with tether."""
    orders: Literal["both", "one"] = "both"
    """both: each answer is shown first once, and the liking for a place is taken out; one: half the cost, and it
    stays in."""
    votes: Annotated[int, at_least(1, "nobody would have an opinion")] = 1
    """Answers to each question where they are read as text or JSON, drawn at temperature 1 (one alone at 0); log-probs
    tell a probability at once."""
    answer: Literal["auto", "logprobs", "json", "text"] = "auto"
    """How a verdict is read: from log-probs of the letters A and B, from JSON under a schema, or from the last line
    VERDICT: A. auto: the first of these that the endpoint can do. A local model gives log-probs."""

    answer_tokens: Annotated[int, at_least(16, "no verdict would fit")] = 512
    """Longest answer where it is read as text or JSON, reasons included: a few sentences are a quarter of 512, a model
    that thinks before it answers needs some thousands. Each request reserves as many of limits.tokens."""

    def check(self, key: str) -> None:
        if self.name is not None and (re.search(NOT_IN_NAMES, self.name) or len(self.name) > 80):
            raise ConfigError(
                f"{key}.name={self.name[:80]!r} cannot be part of a file's name, and its answers are kept in one. "
                "Use up to 80 letters, digits, dots, dashes and underscores."
            )
        given = {
            "answer": self.answer in ("json", "text"),
            "answer_tokens": self.answer_tokens != type(self).answer_tokens,
        }
        for name in [name for name, set_ in given.items() if set_ and self.base_url is None]:
            raise ConfigError(
                f"{key}.{name} is set, but {key}.base_url is null: a local model is asked for log-probs. Leave "
                f"{key}.{name} out, or name the endpoint."
            )
        super().check(key)

    @property
    def annotator(self) -> str:
        """Whose labels they are."""
        parts = [part for part in self.model.split("/") if part not in ("", "final", "best")]
        return f"judge:{self.name or re.sub(NOT_IN_NAMES, '-', parts[-1] if parts else self.model)}"


def _without_secrets(url: str) -> str:
    """What may be shown of an address: nothing before @, nothing after ? or #."""
    scheme, _, rest = url.partition("://") if "://" in url else ("", "", url)
    rest = rest.partition("?")[0].partition("#")[0].rpartition("@")[2]
    return f"{scheme}://{rest}" if scheme else rest


@dataclass(frozen=True)
class LimitsConfig(Section):
    """What an endpoint may be asked for. Requests and tokens are counted over every start of the command."""

    requests: Annotated[int | None, at_least(1, "nothing could be asked; null asks for all")] = None
    """Most requests that are sent, those that failed and those sent again included; null: no limit."""
    tokens: Annotated[int | None, at_least(1, "nothing could be asked; null asks for all")] = None
    """Most tokens that are paid, of questions and answers; before a request is sent the most that it can take is
    reserved. null: no limit."""
    concurrency: Annotated[int, at_least(1, "nothing would be asked")] = 8
    """Requests in flight at once."""
    timeout_s: Annotated[float, positive("every request would time out")] = 60.0
    """Seconds that a request may take."""
    retries: Annotated[int, at_least(0, "0 already never asks again")] = 5
    """Times that a request is sent again after a connection error, a timeout or the status 408, 429 or 5xx."""


@dataclass(frozen=True)
class JudgeConfig(Config):
    """Everything of a judge: who, by what principles, of which pairs, within which limits."""

    judge: JudgeSection
    data: JudgedConfig
    to: str | None = None
    """The store that labels go into; null: data.path where that is a store, else preferences.db."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    seed: Seed = 0
    """Seed of the principles that are drawn, and of which answer is shown first under orders: one."""
    device: str = "auto"
    """Of a local model. auto: cuda, else mps, else cpu."""
    dtype: Dtype = "auto"
    """Compute precision of a local model."""
    trust_remote_code: bool = False
    """Run Python code that comes with a local model."""
