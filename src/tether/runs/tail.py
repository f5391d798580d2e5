"""Reading a long metrics.jsonl without reading all of it: some lines of the whole, or those that came since."""

from __future__ import annotations

import contextlib
import json
import mmap
from pathlib import Path
from typing import Any


def sample_lines(path: Path, most: int) -> tuple[list[dict[str, Any]], int]:
    """(at most about `most` lines, evenly spread by bytes, the first and the last among them; bytes of whole lines).

    Lines are looked up, not averaged, so each is one cycle exactly; its cost does not grow with the file. The second
    number is the cursor from which `lines_since` goes on.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            end = data.rfind(b"\n") + 1
            if end == 0:
                return [], 0
            last = data.rfind(b"\n", 0, end - 1) + 1  # where the last line begins
            starts = {last}
            for i in range(max(1, most - 1)):
                at = last * i // max(1, most - 1)
                starts.add(data.rfind(b"\n", 0, at) + 1)
            return _parsed(data[start : data.find(b"\n", start)] for start in sorted(starts)), end
    except (FileNotFoundError, ValueError):  # not written yet; nothing to map
        return [], 0


def lines_since(path: Path, cursor: int) -> tuple[list[dict[str, Any]], int] | None:
    """(whole lines from byte `cursor` on, the next cursor); None if the file was cut back behind the cursor.

    A run that goes on from a checkpoint forgets what came after it: whoever had read that must begin again.
    """
    try:
        with path.open("rb") as file:
            if cursor:
                file.seek(cursor - 1)
                if file.read(1) != b"\n":
                    return None
            data = file.read()
    except FileNotFoundError:
        return ([], 0) if cursor == 0 else None
    end = data.rfind(b"\n") + 1
    return _parsed(data[:end].split(b"\n")[:-1]), cursor + end


def _parsed(lines: Any) -> list[dict[str, Any]]:
    """The objects among `lines`: a damaged line is a hole in a curve, which `tether report` refuses and names."""
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict):
                found.append(value)
    return found
