"""What a server of a reward model is asked, and the scores that it answers: those of the same model in the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tether.data.cells import as_answer, as_prompt, as_text
from tether.data.chat import encode_prompts
from tether.data.columns import encode_answers
from tether.data.tokenizer import load_tokenizer, stop_token_ids
from tether.errors import DataError
from tether.models.loading import context_length, resolve_device
from tether.rewards.model import ModelReward, tokens_hash
from tether.types import Completions, Prompt, Text


class ScoreRequest(BaseModel):
    """The body of `POST /score`: B answers to B prompts.

    prompts         texts, or chat messages that wait for an answer.
    completions     texts, without a stop token.
    finish_reasons  how each ended: only an answer that stopped gets its stop token. Left out: all stopped.
    tokenizer       hash of the tokenizer that the ids below are of, as `GET /health` has it. Where it is the model's
                    own, the ids are scored and nothing is tokenized twice; where it is another, the texts count.
    columns         of the data set; a reward model needs none of them.
    """

    model_config = ConfigDict(strict=True)  # further keys are of clients that know more than this server

    prompts: list[Any]
    completions: list[str]
    finish_reasons: list[Literal["stop", "length"]] | None = None
    columns: dict[str, list[Any]] = {}
    tokenizer: str | None = None
    prompt_ids: list[list[int]] | None = None
    completion_ids: list[list[int]] | None = None


def read_request(body: bytes, most_rows: int) -> ScoreRequest:
    """DataError where the body is no such request, or holds more rows than that."""
    try:
        asked = ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the body"
        raise DataError(f"{where}: {first['msg']}") from None
    rows = len(asked.prompts)
    if not 0 < rows <= most_rows:
        raise DataError(f"prompts has {rows} rows: this server takes 1 to {most_rows} in one request")
    named = [("completions", asked.completions), ("finish_reasons", asked.finish_reasons), *asked.columns.items()]
    named += [("prompt_ids", asked.prompt_ids), ("completion_ids", asked.completion_ids)]
    for name, values in named:
        if values is not None and len(values) != rows:
            raise DataError(f"{name} has {len(values)} rows and prompts {rows}: it is unclear which belong together")
    return asked


class ServedModel:
    """A reward model that answers `ScoreRequest`s."""

    def __init__(self, path: str, *, dtype: str, device: str) -> None:
        self.name = path.rstrip("/").rpartition("/")[2] or path
        self.tokenizer = load_tokenizer(path)
        self.reward = ModelReward(
            path, name=self.name, dtype=dtype, device=resolve_device(device), tokenizer=self.tokenizer, stop_ids=()
        )
        self.tokens = tokens_hash(self.tokenizer)
        config = self.reward.model.classifier.config
        self.stop_id = next(iter(stop_token_ids(self.tokenizer, config, None)), None)
        self.vocab_size: int = config.get_text_config().vocab_size
        self.context = context_length(config)

    def health(self) -> dict[str, Any]:
        """What a client may want to compare."""
        model = self.reward.model
        return {
            "status": "ok",
            "name": self.name,
            "normalization": {"mean": model.mean, "std": model.std},
            "tokenizer": self.tokens,
            "context": self.context,
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    def score(self, asked: ScoreRequest) -> list[float | None]:
        """One score for each row. DataError, RewardError or ModelError where a row cannot be scored."""
        count = len(asked.prompts)
        if asked.tokenizer == self.tokens and asked.prompt_ids is not None and asked.completion_ids is not None:
            sources: Sequence[Text] = asked.prompts
            prompt_ids, answer_ids = asked.prompt_ids, asked.completion_ids
        else:
            sources, prompt_ids, answer_ids = self._encode(asked)
        for i, row in enumerate(zip(prompt_ids, answer_ids, strict=True)):
            ids = [*row[0], *row[1]]
            if not ids:
                raise DataError(f"row {i}: prompt and completion are empty: there is no token to read a score at")
            if wrong := [x for x in ids if not 0 <= x < self.vocab_size]:
                raise DataError(f"row {i} holds the id {wrong[0]}: this model's are 0 to {self.vocab_size - 1}")
        prompts = [
            Prompt(tuple(ids), source, i) for i, (ids, source) in enumerate(zip(prompt_ids, sources, strict=True))
        ]
        unused: list[list[float]] = [[]] * count
        finish_reasons: list[str] = list(asked.finish_reasons or ["stop"] * count)
        return self.reward.score(Completions(prompts, answer_ids, unused, unused, finish_reasons))

    def _encode(self, asked: ScoreRequest) -> tuple[list[Text], list[list[int]], list[list[int]]]:
        """Prompts, their ids and those of the answers, as a local reward model encodes another tokenizer's texts."""
        sources, answers = [], []
        for i, (prompt, completion) in enumerate(zip(asked.prompts, asked.completions, strict=True)):
            with _at(i, "the prompt "):
                sources.append(as_prompt(prompt))
            with _at(i, "the completion "):
                answers.append(as_answer(sources[-1], as_text(completion)))
        cut = [reason == "length" for reason in asked.finish_reasons or ["stop"] * len(sources)]
        ids = encode_answers(sources, answers, self.tokenizer, self.stop_id, None, lambda i: _at(i, ""), cut=cut)
        return sources, encode_prompts(self.tokenizer, sources), ids


@contextmanager
def _at(row: int, what: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"row {row}: {what}{error}") from error
