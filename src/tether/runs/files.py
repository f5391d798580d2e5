"""Files that a killed process cannot leave half-written.

A process may be killed at any instruction, and the power may fail. Whole files and directories are therefore written
beside, fsynced and renamed, here and nowhere else; lines are appended, and half a line at the end of a file is what a
killed process leaves: no reader counts it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tether.errors import RunError

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 1
_MODEL_FILES = {".json", ".safetensors", ".model", ".txt", ".jinja", ".py"}  # weights, configs, tokenizer, code


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def wrap_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError (disk full, no permission) into a RunError that names the file and says what to do."""
    try:
        yield
    except Exception as error:
        if not is_os_error(error):
            raise
        number, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, None)
        full = number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
        remedy = "Free some space" if full else "Make it writable"
        failure = RunError(
            f"{path} cannot be written ({reason or error}): what the run does next would be lost. {remedy} and "
            "run the same command again: it continues from the last checkpoint."
        )
        if full:
            failure.exit_code = 1  # the machine's state, not a mistake in what the user typed
        raise failure from error


def is_os_error(error: Exception) -> bool:
    """Whether the system refused: an OSError, or what the Rust libraries (safetensors, tokenizers) make of one."""
    return isinstance(error, OSError) or "os error" in str(error)


# ---------------------------------------------------------------- whole files


def read_status(folder: Path) -> dict[str, Any]:
    """status.json."""
    return read_json(folder / "status.json", kind=str, state=str)


def read_environment(folder: Path) -> dict[str, Any]:
    """environment.json."""
    return read_json(folder / "environment.json", id=str, inputs=dict, versions=dict, hardware=dict)


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader sees the old file or the new one, never half. RunError where it cannot."""
    with wrap_os_errors(path), replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; takes its place when the block ends well, and is removed when it does not.

    The content is on the disk before the name points to it: a power failure leaves the old file or the new one.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` to fill; like `replacing`, but for a whole directory.

    A directory cannot be renamed over another: for an instant the old one stands under a hidden name and `path` does
    not exist, so a process killed in it leaves no `path`. Where the rename fails, the old one comes back.
    """
    partial, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "replaced"))
    try:
        _remove(partial, old)
        partial.mkdir(parents=True)
        yield partial
        for entry in [*partial.rglob("*"), partial]:
            sync(entry)
        if path.exists():
            path.replace(old)
        try:
            partial.replace(path)
        except OSError:
            if old.exists():
                old.replace(path)
            raise
        sync(path.parent)
    finally:
        _remove(partial, old)


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a directory; nothing where there is none."""
    if not path.exists():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path, **wanted: type) -> dict[str, Any]:
    """A JSON object of a run directory; RunError if it is missing, damaged or lacks one of the `wanted` keys' types."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds {type(value).__name__}, not an object")
        for key, kind in wanted.items():
            if not isinstance(value.get(key), kind):
                raise ValueError(f"its {key} is {json.dumps(value.get(key))[:60]}")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}): it is unclear what this run is. Restore the file, or add --fresh to "
            "move the run aside and start over."
        ) from error
    return value


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """A Parquet file, with types from the values; per-token lists of numbers take 32 bits each."""
    import pyarrow as pa
    import pyarrow.parquet

    narrow = {pa.float64(): pa.float32(), pa.int64(): pa.int32()}
    arrays = {}
    for name, values in columns.items():
        array = pa.array(values)
        if pa.types.is_null(array.type):
            array = array.cast(pa.float64())  # nothing but None: a score that no row has
        elif pa.types.is_list(array.type) and pa.types.is_null(array.type.value_type):
            array = array.cast(pa.list_(pa.bool_() if name == "clipped" else pa.float32()))  # as of an update
        elif pa.types.is_list(array.type) and array.type.value_type in narrow:
            array = array.cast(pa.list_(narrow[array.type.value_type]))
        arrays[name] = array
    with wrap_os_errors(path), replacing(path) as partial:
        pyarrow.parquet.write_table(pa.table(arrays), partial)


def read_table(path: Path, columns: list[str] | None = None) -> pyarrow.Table:
    """A Parquet file that `write_table` wrote; columns: only these."""
    from pyarrow.parquet import ParquetFile  # its read_table would load pandas first, for half a second

    with ParquetFile(path) as file:
        return file.read(columns)


# ---------------------------------------------------------------- lines


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one JSON object, in one write."""
    line = json_line(value).encode("utf-8", "backslashreplace")  # of half a character: \ud800, as JSON writes it
    with wrap_os_errors(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(end)  # half a line would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def json_line(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that `append_line` wrote; half a line at its end is not one yet."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    values = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise ValueError(f"it holds {type(value).__name__}")
            values.append(value)
        except ValueError as error:
            raise RunError(
                f"{path}:{number} is not a JSON object ({error}): the file was damaged after it was written, and its "
                "curves would have a hole. Delete that line to go on without it."
            ) from error
    return values


def drop_half_line(path: Path) -> None:
    """Cut what a killed process left at the end, so that the next line begins on its own."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def to_plain(value: Any) -> Any:
    """What JSON can hold: tensors and numpy scalars become numbers, numbers that are not finite become null."""
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


# ---------------------------------------------------------------- hashes

SUMS = "SHA256SUMS"
"""Checksums of a model directory, as `sha256sum --check` reads them; no part of the model's own hash."""


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file below `folder`, by its path there."""
    return {str(f.relative_to(folder)): sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}


def write_sums(folder: Path) -> None:
    """SHA256SUMS of every file in `folder` but its card, which people edit; the last thing to be written there."""
    lines = (f"{digest}  {name}\n" for name, digest in file_hashes(folder).items() if name != "README.md")
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a directory that `write_sums` sealed, in a few words; None if it is whole."""
    if not folder.is_dir():
        return "it does not exist"
    if not (folder / SUMS).is_file():
        return f"{SUMS} is missing"
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines:
        return f"{SUMS} is empty"
    return damaged_file(folder, {name: digest for digest, _, name in (line.partition("  ") for line in lines)})


def damaged_file(folder: Path, wanted: dict[str, str]) -> str | None:
    """The first file that is missing or whose sha256 is not the wanted one, in words; None if all are well."""
    for name, digest in wanted.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"the checksum of {name} does not match"
    return None


def hash_files(path: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model") -> str:
    """What a model or a data file is, in a few characters: equal exactly if the content is.

    A file: its sha256. A directory: the sha256 of the names and contents of the files a model is made of (weights,
    configs, tokenizer, its own code), or of those of a data set's tables. Anything else is a hub id, which stands for
    itself at a commit; kind: what it is.
    """
    place = Path(path)
    if place.is_dir():
        suffixes = _MODEL_FILES if kind == "model" else {".parquet"}
        parts = sorted(file for file in place.iterdir() if file.suffix in suffixes)
        digest = hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in parts).encode()).hexdigest()
    elif place.is_file():
        digest = sha256(place)
    else:
        return f"{path}@{hub_commit(path, revision or 'main', kind)}"
    return f"sha256:{digest[:16]}"


def hub_commit(name: str, revision: str, kind: str) -> str:
    """The commit that a branch or tag of a hub repository stands for: as the hub says, or offline as the cache does;
    `revision` itself where neither knows, and loading will say what is wrong."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants  # a tenth of a second: only where it is needed

    with contextlib.suppress(Exception):  # offline, unreachable, gated, missing
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10).sha)
    ref = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / revision
    return ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision


def sha256(path: Path) -> str:
    """The file's sha256, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
