"""Rows out of JSONL, Parquet or the hub, and where each stands."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tether.data.tokenizer import looks_local
from tether.errors import DataError, did_you_mean, did_you_mean_path, first_line
from tether.feedback.schema import is_store
from tether.feedback.store import Store

Row = dict[str, Any]
Cell = TypeVar("Cell")


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

    def cells(self, column: str, read: Callable[[Any], Cell]) -> list[Cell]:
        """What `read` makes of each row's cell of `column`; what it raises says where."""
        found = []
        for i, row in enumerate(self.rows):
            with self.at(i, column):
                found.append(read(row[column]))
        return found

    def require(self, columns: Sequence[str], example: str = "") -> None:
        """Raise DataError at the first row that lacks one of `columns`; example: a row as it should be."""
        example = example or "{" + ", ".join(f'"{column}": "…"' for column in columns) + "}"
        for i, row in enumerate(self.rows):
            for column in columns:
                if column not in row:
                    raise DataError(
                        f"{self.place(i)}: there is no column {column!r}, only {listed(row)}."
                        f"{did_you_mean(column, row)} Write {example}."
                    )


def read_rows(path: str, split: str = "train", columns: Sequence[str] = (), limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a data set, each with at least `columns`."""
    table = read_table(path, split, limit)
    table.require(columns)
    return table.rows


def read_table(path: str, split: str = "train", limit: int | None = None) -> Table:
    """The first `limit` rows of a JSONL (plain or gzipped) or Parquet file, of a store of labels (the preferences in
    it), or of a split of a hub data set."""
    file = Path(path)
    try:
        if file.exists():
            table = _read_file(path, limit)
        elif file.suffix in _SUFFIXES or looks_local(path):
            raise DataError(
                f"{path} does not exist, so there is nothing to read.{did_you_mean_path(path)} "
                "Check the path; a relative one starts at the working directory."
            )
        else:
            table = Table(path, _read_hub(path, split, limit))
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}). Check path and permissions.") from error
    if not table.rows:
        raise DataError(f"{path} has no rows: there is nothing to train on. Was it written to the end?")
    return table


_SUFFIXES = {".jsonl", ".json", ".ndjson", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".db"}
_ONE_A_LINE = 'Write one JSON object a line, like {"prompt": "Once upon a time"}'


def _read_file(path: str, limit: int | None) -> Table:
    """By what the file holds; its name decides only what is said when that is wrong."""
    file = Path(path)
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.suffix in _SUFFIXES)
        holds = f" (it holds {', '.join(inside[:5])})" if inside else ""
        raise DataError(
            f"{path} is a directory{holds}, where a data set is one file. Name a .jsonl, .jsonl.gz or .parquet."
        )
    with file.open("rb") as stream:
        magic = stream.read(4)
    if is_store(file):
        with Store(file, create=False) as store:
            return Table(path, store.preference_rows()[:limit])
    if magic == b"PAR1":
        return Table(path, _read_parquet(path, limit))
    if file.suffix == ".parquet" and magic:
        raise DataError(
            f"{path} is not Parquet: it begins with {magic!r} instead of b'PAR1'. Write it again, or rename it if it "
            "is JSONL."
        )
    return _read_jsonl(path, limit, gzipped=magic[:2] == b"\x1f\x8b")


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
            f"{place} is not UTF-8: it holds {line[error.start]:#04x} as its byte {error.start + 1}. Save the file as "
            "UTF-8, e.g. iconv -f LATIN1 -t UTF-8."
        ) from error
    try:
        row = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        at = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else None
        why = at or first_line(error)
        if first and text.strip() in ("[", "{"):
            raise DataError(
                f"{place} is only {text.strip()!r}: the file is one JSON document spread over lines. {_ONE_A_LINE} "
                f"(jq -c {'.[]' if text.strip() == '[' else '.'} makes that of it)."
            ) from error
        if text.startswith("{") and not text.endswith("\n"):
            raise DataError(
                f"{place}, the last, is not whole JSON ({why}): was its writer interrupted? Remove the line or write "
                "the file again."
            ) from error
        raise DataError(f"{place} is not JSON ({why}). {_ONE_A_LINE}.") from error
    if not isinstance(row, dict):
        remedy = " (jq -c .[] makes that of a list)" if isinstance(row, list) else ""
        raise DataError(f"{place} is {kind(row)}, where a row is an object. {_ONE_A_LINE}{remedy}.")
    return row


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """A JSON object; a key given twice is an error, where json would keep the last without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} is given twice")
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


def _read_hub(path: str, split: str, limit: int | None) -> list[Row]:
    import datasets  # takes seconds

    try:
        data = datasets.load_dataset(path, split=split)
    except Exception as error:  # its many ways to be unreachable, missing, gated, or without that split
        raise DataError(
            f"{path} is not a file here, and the hub gave no data set of that name with a split {split!r} "
            f"({first_line(error)}). Check path and split; offline, give a .jsonl or .parquet file, or fetch it once "
            f"while online: python -c \"import datasets; datasets.load_dataset('{path}')\"."
        ) from error
    rows: list[Row] = data.select(range(min(limit or len(data), len(data)))).to_list()
    return rows


def kind(value: Any) -> str:
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


def listed(row: Iterable[str]) -> str:
    return ", ".join(map(repr, row)) or "none at all"
