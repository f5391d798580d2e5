"""The file that `tether revise` writes: rows for `tether sft`, each with its whole chain. Needs no torch: the studio
reads it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tether.errors import RunError

ID = "chain-"  # how every row's id begins
MARK = f'{{"id": "{ID}'.encode()  # and so every row


class ChainFile:
    """The file that rows are added to, by one process at a time; half a line at its end, of a killed one, is cut."""

    def __init__(self, path: Path, made_by: Mapping[str, Any]) -> None:
        self.path, self.made_by = path, made_by
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise self._error(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.exists() or os.fstat(self._file.fileno()).st_ino != path.stat().st_ino:
                raise BlockingIOError  # another process, which wrote no row, removed it while we were opening it
            self._file.seek(0)
            content = self._file.read()
            self.ids = ids_of(path, content, made_by)
            self._file.truncate(content.rfind(b"\n") + 1)
        except BlockingIOError:
            self._file.close()
            raise RunError(
                f"to={path} is in use by another tether revise: both would ask for the same rows. Wait for it, or set "
                "`to` to another file."
            ) from None
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ChainFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Have the disk hold what was written, and let go; a file without a row is none."""
        try:
            os.fsync(self._file.fileno())
            if not self.ids:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._error(error) from error
        finally:
            self._file.close()

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows, in one write."""
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            data = lines.encode("utf-8", "backslashreplace")
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise self._error(error) from error
        self.ids.update(row["id"] for row in rows)

    def _error(self, error: OSError) -> RunError:
        return RunError(
            f"to={self.path} cannot be written ({error.strerror or error}): the rows would be lost. Make the place "
            "writable, free some space, or name another file, and run the same command again."
        )


def ids_of(path: Path, content: bytes, made_by: Mapping[str, Any]) -> set[str]:
    """The chains that a file holds; half a line at its end is not one yet. RunError where it is another program's
    file, or holds rows that were made otherwise."""
    ids = set()
    *lines, half = content.split(b"\n")
    if half and not half.startswith(MARK[: len(half)]):
        lines.append(half)  # nothing that we began
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            mark, theirs = row["id"], dict(row["made_by"])
            if not line.startswith(MARK):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"to={path}, line {number}: not a row that tether revise wrote, and rows would be added to it. Set "
                "`to` to another file."
            ) from None
        differ = next((name for name in made_by if theirs.get(name) != made_by[name]), None)
        if differ is not None:
            raise RunError(
                f"to={path} holds rows made with {differ} {theirs.get(differ)!r}, now it is {made_by[differ]!r}: two "
                "kinds of revisions would be mixed. Set `to` to another file."
            )
        ids.add(mark)
    return ids


# ---------------------------------------------------------------- reading


def is_chain_file(path: Path) -> bool:
    """Whether it begins as a file of chains does; False where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(len(MARK)) == MARK
    except OSError:
        return False


def starts(path: Path) -> list[int]:
    """Where each row begins, in bytes, and after them where the last one ends; half a line at the end is no row."""
    found = [0]
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                found.append(found[-1] + len(line))
    return found


def read(path: Path, places: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The rows between the first and the last of `places` (`starts`); {} for one that is damaged."""
    with path.open("rb") as file:
        file.seek(places[0])
        for size in (b - a for a, b in pairwise(places)):
            yield _whole(file.read(size))


def _whole(line: bytes) -> dict[str, Any]:
    """A row whose chain can be shown, else {}."""
    try:
        row = json.loads(line)
        known = isinstance(row["prompt"], str | list) and isinstance(row["completion"], str) and row["chain"]
        for step in row["chain"]:
            known = known and isinstance(step["step"], str) and isinstance(step["text"], str)
    except (ValueError, KeyError, TypeError):
        return {}
    return row if known else {}
