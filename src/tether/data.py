"""Data sets: rows out of JSONL, Parquet or the hub; prompts, examples and pairs out of rows.

Column names are the ecosystem's: `prompt`; `prompt, chosen, rejected`, or whole transcripts in `chosen, rejected`;
`messages`, `prompt, completion`, or `text`. A prompt or completion is text or a list of chat messages.

Nothing is skipped silently. What cannot be used raises DataError with file, line, column and what to write instead;
what the user asked to drop or cut is counted on stderr.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from tether.batch import Prompt, Text
from tether.config import DataConfig, PromptsConfig
from tether.errors import ConfigError, DataError
from tether.preferences import Pair, split_transcripts
from tether.tokens import (
    Messages,
    common_prefix,
    did_you_mean,
    did_you_mean_path,
    encode_chat,
    encode_prompt,
    encode_prompts,
    encode_texts,
    first_line,
    looks_local,
)

Row = dict[str, Any]

# ---------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of a data set, and where each stands, so that an error can say so."""

    path: str
    rows: list[Row]
    lines: list[int] | None = None  # line of each row in a text file, from 1; None where rows are not lines

    def __len__(self) -> int:
        return len(self.rows)

    def place(self, row: int) -> str:
        return f"{self.path}, " + (f"line {self.lines[row]}" if self.lines else f"row {row} (from 0)")

    def error(self, row: int, column: str, problem: str) -> DataError:
        return DataError(f"{self.place(row)}, column {column!r}: {problem}")

    @contextmanager
    def at(self, row: int, column: str) -> Iterator[None]:
        """Say where, in a DataError that does not know."""
        try:
            yield
        except DataError as error:
            raise self.error(row, column, str(error)) from error

    def require(self, columns: Sequence[str], example: str) -> None:
        """Raise DataError at the first row that lacks one of `columns`; example: a row as it should be."""
        for i, row in enumerate(self.rows):
            for column in columns:
                if column not in row:
                    raise DataError(
                        f"{self.place(i)}: there is no column {column!r}, only {_listed(row)}."
                        f"{did_you_mean(column, row)} Write {example}."
                    )


def read_rows(path: str, split: str = "train", limit: int | None = None) -> Table:
    """The rows of a JSONL (plain or gzipped) or Parquet file, or of a split of a hub data set; the first `limit`."""
    file = Path(path)
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.suffix in _SUFFIXES)
        holds = f" (it holds {', '.join(inside[:5])})" if inside else ""
        raise DataError(
            f"{path} is a directory{holds}, where a data set is one file. Name a .jsonl, .jsonl.gz or .parquet."
        )
    if not file.exists() and (looks_local(path) or file.suffix in _SUFFIXES):
        raise DataError(
            f"{path} does not exist, so there is nothing to read.{did_you_mean_path(path)} "
            "Check the path; relative ones start at the working directory."
        )
    if not file.exists():
        table = _read_hub(path, split, limit)
    else:
        try:
            with file.open("rb") as stream:
                magic = stream.read(4)
            if magic == b"PAR1":
                table = Table(path, _read_parquet(path, limit))
            elif file.suffix == ".parquet" and magic:
                raise DataError(
                    f"{path} is not Parquet: it begins with {magic!r} instead of b'PAR1'. Write it anew, or rename "
                    "it if it is JSONL."
                )
            else:
                table = _read_jsonl(path, limit, gzipped=magic[:2] == b"\x1f\x8b")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror or error}). Check its permissions.") from error
    if not table.rows:
        raise DataError(f"{path} has no rows: there is nothing to train on. Was it written to the end?")
    return table


_SUFFIXES = {".jsonl", ".json", ".ndjson", ".gz", ".parquet", ".csv", ".tsv", ".txt"}
_ONE_A_LINE = 'Write one JSON object a line, like {"prompt": "Once upon a time"}'


def _read_jsonl(path: str, limit: int | None, *, gzipped: bool) -> Table:
    rows: list[Row] = []
    lines: list[int] = []
    for number, line in _lines(path, gzipped=gzipped):
        if limit is not None and len(rows) == limit:
            break
        rows.append(_parse(f"{path}, line {number}", line, first=number == 1))
        lines.append(number)
    return Table(path, rows, lines)


def _lines(path: str, *, gzipped: bool) -> Iterator[tuple[int, bytes]]:
    """(number, line) of lines that hold anything. Only line feeds end a line: JSON text may hold U+2028 as it is."""
    number = 0
    try:
        with gzip.open(path) if gzipped else Path(path).open("rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    raise DataError(f"{path} is UTF-16, where JSON is UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip stream breaks off or is damaged after line {number} ({first_line(error)}). "
            "Copy or write the file again."
        ) from error


def _parse(place: str, line: bytes, *, first: bool) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8: byte {line[error.start]:#04x} at position {error.start}. Save the file as UTF-8, "
            "e.g. iconv -f LATIN1 -t UTF-8."
        ) from error
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        if first and text.strip() in ("[", "{"):
            raise DataError(
                f"{place} is only {text.strip()!r}: the file is one JSON document spread over lines. {_ONE_A_LINE} "
                "(jq -c '.[]' makes that of a list)."
            ) from error
        if not text.endswith("\n"):
            raise DataError(
                f"{place}, the last, is not whole JSON ({error}): was its writer interrupted? Remove the line or write "
                "the file again."
            ) from error
        raise DataError(f"{place} is not JSON ({error}). {_ONE_A_LINE}.") from error
    if not isinstance(row, dict):
        remedy = " (jq -c '.[]' makes that of a list)" if isinstance(row, list) else ""
        raise DataError(f"{place} is {_kind(row)}, where a row is an object. {_ONE_A_LINE}{remedy}.")
    return row


def _read_parquet(path: str, limit: int | None) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            return list(islice(rows, limit))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is damaged or only half written Parquet ({first_line(error)}). Copy or write the file again."
        ) from error


def _read_hub(path: str, split: str, limit: int | None) -> Table:
    import datasets  # takes seconds

    try:
        data = datasets.load_dataset(path, split=split)
    except Exception as error:  # its many ways to be unreachable, missing, gated, or without that split
        raise DataError(
            f"{path} is no file here, and the hub gave no data set of that name with a split {split!r} "
            f"({first_line(error)}). Check path and split; offline, give a .jsonl or .parquet file, or fetch it once "
            f"while online: python -c \"import datasets; datasets.load_dataset('{path}')\"."
        ) from error
    return Table(path, data.select(range(min(limit or len(data), len(data)))).to_list())


# ---------------------------------------------------------------- what a cell may hold


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"is {_kind(value)}, where a text belongs. Write it in quotes.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"holds {value[error.start]!r}, half a character, which no UTF-8 text can hold. Write it whole."
            ) from error
    return value


def _text_or_messages(value: Any) -> Text:
    if isinstance(value, list):
        return _messages(value)
    if isinstance(value, str):
        return _text(value)
    raise DataError(
        f"is {_kind(value)}, where a text or a list of messages belongs. "
        'Write "…" or [{"role": "user", "content": "…"}].'
    )


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"is {_kind(value)}, where a list of messages belongs. Write "
            '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].'
        )
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f'message {i} is {_kind(message)}. Write {{"role": "user", "content": "…"}}.')
        message = {k: v for k, v in message.items() if v is not None}  # Parquet fills in every key that any message has
        if not isinstance(message.get("role"), str):
            raise DataError(
                f"message {i} has no 'role', only {_listed(message)}.{did_you_mean('role', message)} "
                'Write {"role": "user", "content": "…"}.'
            )
        content = message.get("content")
        if isinstance(content, str):
            _text(content)
        elif not isinstance(content, list) and "tool_calls" not in message:
            raise DataError(
                f"message {i}: its 'content' is {_kind(content)}, where a text belongs. Write it in quotes."
            )
        messages.append(message)
    return messages


def _kind(value: Any) -> str:
    """A value as an error names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"{value}".lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _listed(row: Iterable[str]) -> str:
    return ", ".join(map(repr, row)) or "none at all"


# ---------------------------------------------------------------- prompts


_REWARD_ARGUMENTS = {"prompts", "completions", "completion_ids"}


def load_prompts(
    config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, *, context: int | None, max_new_tokens: int
) -> list[Prompt]:
    """Every prompt of a data set, tokenized.

    context: tokens that the model has positions for, None for no limit; a prompt leaves max_new_tokens of them free.
    """
    table = read_rows(config.path, config.split, config.limit)
    table.require(["prompt"], '{"prompt": "…"}')
    names = dict.fromkeys(name for row in table.rows for name in row if name != "prompt")
    for name in names:
        if name in _REWARD_ARGUMENTS:
            raise DataError(
                f"{table.path} has a column {name!r}, and reward functions get something else by that name. Rename it."
            )
    sources = []
    for i, row in enumerate(table.rows):
        with table.at(i, "prompt"):
            sources.append(_prompt(row["prompt"]))
    ids = _encode_prompts(table, sources, tokenizer, config.chat_template_kwargs)
    limit = _Limit.of_prompts(config, context, max_new_tokens)
    kept = limit.apply(table, "prompt", [len(x) for x in ids])
    return [
        Prompt(
            ids=tuple(_keep_right(ids[i], limit.tokens, tokenizer)),
            source=sources[i],
            row=i,
            columns={name: table.rows[i].get(name) for name in names},
        )
        for i in kept
    ]


def _prompt(value: Any) -> Text:
    source = _text_or_messages(value)
    if not isinstance(source, str) and source[-1]["role"] == "assistant":
        raise DataError(
            "ends with the assistant's message, so there is nothing left to answer. Remove that message, or move it to "
            "the column that holds the answer."
        )
    return source


def _encode_prompts(
    table: Table, sources: Sequence[Text], tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]
) -> list[list[int]]:
    try:
        encoded = encode_prompts(tokenizer, sources, kwargs)
    except DataError:  # all at once is fast, one by one tells which
        for i, source in enumerate(sources):
            with table.at(i, "prompt"):
                encode_prompt(tokenizer, source, kwargs)
        raise
    for i, ids in enumerate(encoded):
        if not ids:
            bos = f", such as {tokenizer.bos_token!r}" if tokenizer.bos_token else ""
            raise table.error(
                i,
                "prompt",
                "is empty and the tokenizer adds no token of its own, so the first token of a response would follow "
                f"nothing. Write at least one token{bos}.",
            )
    return encoded


# ---------------------------------------------------------------- too long


@dataclass(frozen=True, slots=True)
class _Limit:
    """How many tokens a row may have, where that comes from, and what happens to a longer one."""

    tokens: int
    reason: str
    overlong: str
    section: str  # of the config, as the user writes it

    @classmethod
    def of_prompts(cls, config: PromptsConfig, context: int | None, max_new_tokens: int) -> _Limit:
        room = config.max_tokens if context is None else context - max_new_tokens
        if room < 1:
            raise ConfigError(
                f"sampling.max_new_tokens={max_new_tokens} leaves no room for a prompt in the model's context of "
                f"{context} tokens. Set it below {context}."
            )
        if room < config.max_tokens:
            reason = f"the model's context of {context} less sampling.max_new_tokens={max_new_tokens}"
        else:
            reason = f"prompts.max_tokens={config.max_tokens}"
        return cls(min(room, config.max_tokens), reason, config.overlong, "prompts")

    @classmethod
    def of_data(cls, config: DataConfig, context: int | None) -> _Limit:
        if context is not None and context < config.max_tokens:
            return cls(context, f"the model's context of {context}", config.overlong, "data")
        return cls(config.max_tokens, f"data.max_tokens={config.max_tokens}", config.overlong, "data")

    def apply(self, table: Table, column: str, lengths: list[int]) -> list[int]:
        """The rows to keep. Says on stderr how many are dropped or cut; raises where neither was asked for."""
        over = [i for i, length in enumerate(lengths) if length > self.tokens]
        if not over:
            return list(range(len(lengths)))
        how_many = f"{len(over)} of {len(lengths)} rows are longer than {self.tokens} tokens ({self.reason})"
        if self.overlong == "error":
            raise table.error(
                over[0],
                column,
                f"has {lengths[over[0]]} tokens; {how_many}, the longest has {max(lengths)}. Shorten them, raise the "
                f"limit, or set {self.section}.overlong to cut_left or drop.",
            )
        if self.overlong == "cut_left":
            print(f"{table.path}: {how_many}: cut on the left", file=sys.stderr)
            return list(range(len(lengths)))
        if len(over) == len(lengths):
            raise DataError(
                f"{table.path}: {how_many}, and {self.section}.overlong is drop: nothing would be left. Raise the "
                "limit or set cut_left."
            )
        print(f"{table.path}: {how_many}: dropped", file=sys.stderr)
        gone = set(over)
        return [i for i in range(len(lengths)) if i not in gone]


def _keep_right(ids: list[int], tokens: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last `tokens` ids; a bos stays in front, where the model has always seen one."""
    if len(ids) <= tokens:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and tokens > 1 else []
    return head + ids[len(ids) - tokens + len(head) :]


# ---------------------------------------------------------------- examples to imitate


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence to imitate in part."""

    ids: list[int]
    trained: list[bool]  # as long as ids; never the first, which nothing predicts; True at least once
    row: int  # its row in the data set, from 0


def load_examples(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    stop_id: int | None,
    train_on: str = "completion",
    context: int | None = None,
) -> list[Example]:
    """Every example of a data set, tokenized, in the first of the forms messages · prompt, completion · text.

    stop_id: appended to what is learned, and learned, where it does not stand there yet; None leaves it off.
    train_on: completion, or all for every token.
    context: tokens that the model has positions for, None for no limit.
    """
    table = read_rows(config.path, config.split, config.limit)
    columns = table.rows[0]
    if "messages" in columns:
        column, encoded = "messages", _encode_conversations(table, config, tokenizer, stop_id)
    elif "prompt" in columns and "completion" in columns:
        column, encoded = "completion", _encode_prompt_completion(table, config, tokenizer, stop_id)
    elif "text" in columns:
        column, encoded = "text", _encode_whole_texts(table, tokenizer, stop_id)
    else:
        near = (
            did_you_mean("messages", columns) or did_you_mean("completion", columns) or did_you_mean("prompt", columns)
        )
        raise DataError(
            f"{table.path} has the columns {_listed(columns)}, none of them to imitate.{near} Write "
            '{"messages": […]}, {"prompt": "…", "completion": "…"} or {"text": "…"}.'
        )
    limit = _Limit.of_data(config, context)
    examples = []
    for i in limit.apply(table, column, [len(ids) for ids, _ in encoded]):
        ids, trained = encoded[i]
        ids = _keep_right(ids, limit.tokens, tokenizer)
        trained = [True] * len(ids) if train_on == "all" else trained[len(trained) - len(ids) :]
        trained[0] = False
        if True not in trained:
            raise table.error(i, column, "holds nothing to learn: no token follows another. Write a text.")
        examples.append(Example(ids, trained, i))
    return examples


Encoded = list[tuple[list[int], list[bool]]]  # ids and trained, of every row


def _encode_conversations(
    table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_id: int | None
) -> Encoded:
    table.require(
        ["messages"], '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    )
    encoded = []
    for i, row in enumerate(table.rows):
        with table.at(i, "messages"):
            messages = _messages(row["messages"])
            encoded.append(encode_chat(tokenizer, messages, stop_id=stop_id, kwargs=config.chat_template_kwargs))
    return encoded


def _encode_prompt_completion(
    table: Table, config: DataConfig, tokenizer: PreTrainedTokenizerBase, stop_id: int | None
) -> Encoded:
    table.require(["prompt", "completion"], '{"prompt": "…", "completion": "…"}')
    prompts, completions = [], []
    for i, row in enumerate(table.rows):
        with table.at(i, "prompt"):
            prompts.append(_prompt(row["prompt"]))
        with table.at(i, "completion"):
            completions.append(_answer(prompts[i], row["completion"]))
    prompt_ids = _encode_prompts(table, prompts, tokenizer, config.chat_template_kwargs)
    answers = _encode_answers(table, "completion", prompts, completions, prompt_ids, config, tokenizer, stop_id)
    return [(p + a, [False] * len(p) + [True] * len(a)) for p, a in zip(prompt_ids, answers, strict=True)]


def _encode_whole_texts(table: Table, tokenizer: PreTrainedTokenizerBase, stop_id: int | None) -> Encoded:
    table.require(["text"], '{"text": "…"}')
    texts = []
    for i, row in enumerate(table.rows):
        with table.at(i, "text"):
            texts.append(_text(row["text"]))
    stopped = [_stopped(ids, stop_id) for ids in encode_texts(tokenizer, texts, special=True)]
    return [(ids, [True] * len(ids)) for ids in stopped]


def _answer(prompt: Text, value: Any) -> Text:
    """An answer in its prompt's form: text to text, one assistant message (or its bare text) to messages."""
    answer = _text_or_messages(value)
    if isinstance(prompt, str):
        return _text(answer)
    messages: Messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise DataError(
            f"is {len(messages)} messages by {', '.join(m['role'] for m in messages)}, where one answer of the "
            'assistant belongs. Write [{"role": "assistant", "content": "…"}], and what precedes it in the prompt.'
        )
    return messages


def _encode_answers(
    table: Table,
    column: str,
    prompts: Sequence[Text],
    answers: Sequence[Text],
    prompt_ids: Sequence[list[int]],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    stop_id: int | None,
) -> list[list[int]]:
    """The ids of each answer up to its stop token, as if they had been sampled after prompt_ids."""
    texts = iter(encode_texts(tokenizer, [a for a in answers if isinstance(a, str)], special=False))
    encoded = []
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if isinstance(prompt, str) or isinstance(answer, str):
            encoded.append(_stopped(next(texts), stop_id))
            continue
        with table.at(i, column):
            ids, _ = encode_chat(
                tokenizer,
                prompt + answer,
                stop_id=stop_id,
                kwargs=config.chat_template_kwargs,
                first=len(prompt),
                as_sampled=True,
            )
        encoded.append(ids[len(prompt_ids[i]) :])
    return encoded


def _stopped(ids: list[int], stop_id: int | None) -> list[int]:
    return ids if stop_id is None or ids[-1:] == [stop_id] else [*ids, stop_id]


# ---------------------------------------------------------------- pairs to prefer


def load_pairs(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, stop_id: int | None, context: int | None = None
) -> list[Pair]:
    """Every preference of a data set, tokenized; stop_id and context as in `load_examples`."""
    table = read_rows(config.path, config.split, config.limit)
    table.require(["chosen", "rejected"], '{"prompt": "…", "chosen": "…", "rejected": "…"}')
    triples = [_triple(table, i) for i in range(len(table))]
    prompts, chosen, rejected = (list(column) for column in zip(*triples, strict=True))
    prompt_ids = _encode_prompts(table, prompts, tokenizer, config.chat_template_kwargs)
    chosen_ids, rejected_ids = (
        _encode_answers(table, name, prompts, answers, prompt_ids, config, tokenizer, stop_id)
        for name, answers in (("chosen", chosen), ("rejected", rejected))
    )
    limit = _Limit.of_data(config, context)
    answer_lengths = [max(len(c), len(r)) for c, r in zip(chosen_ids, rejected_ids, strict=True)]
    pairs = []
    for i in limit.apply(table, "chosen", [len(p) + n for p, n in zip(prompt_ids, answer_lengths, strict=True)]):
        if chosen_ids[i] == rejected_ids[i]:
            raise table.error(
                i, "rejected", "has the same tokens as chosen, so there is nothing to prefer. Remove the row."
            )
        prompt = _keep_right(prompt_ids[i], max(1, limit.tokens - answer_lengths[i]), tokenizer)
        room = limit.tokens - len(prompt)  # an answer that is too long by itself loses its beginning as well
        group = table.rows[i].get("group")
        pairs.append(
            Pair(
                prompt_ids=prompt,
                chosen_ids=chosen_ids[i][-room:],
                rejected_ids=rejected_ids[i][-room:],
                row=i,
                prompt_key=hashlib.sha256(json.dumps(prompts[i], sort_keys=True).encode()).hexdigest()[:32],
                group=None if group is None else str(group),
            )
        )
    return pairs


def _triple(table: Table, row: int) -> tuple[Text, Text, Text]:
    """(prompt, chosen, rejected) of a row; without a prompt, or with whole conversations, from what the two share."""
    cells = table.rows[row]
    with table.at(row, "chosen"):
        chosen = _text_or_messages(cells["chosen"])
    with table.at(row, "rejected"):
        rejected = _text_or_messages(cells["rejected"])
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise DataError(f"is {_kind(rejected)}, but chosen is {_kind(chosen)}. Write both in the same form.")
        if chosen == rejected:
            raise DataError("equals chosen, so there is nothing to prefer. Remove the row.")
    prompt = cells.get("prompt")
    if isinstance(chosen, str) and isinstance(rejected, str) and prompt is None:
        with table.at(row, "chosen"):
            return split_transcripts(chosen, rejected)
    if not isinstance(chosen, str) and not isinstance(rejected, str):
        if chosen[0]["role"] != "assistant":
            shared = common_prefix(chosen, rejected)
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        elif isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
    with table.at(row, "prompt"):
        prompt = _prompt(prompt)
    with table.at(row, "chosen"):
        chosen = _answer(prompt, chosen)
    with table.at(row, "rejected"):
        rejected = _answer(prompt, rejected)
    return prompt, chosen, rejected
