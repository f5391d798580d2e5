"""The same bits on every run, on a GPU too: what torch has to be told, and told no longer when the run ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch takes no algorithm whose result depends on timing, if that is wanted; after, all is as before.

    To enter before the run's first matmul: cuBLAS reads how much workspace it has once, when it starts, and only with
    an amount of its own for each stream are its sums in a fixed order. A fixed amount that is set already is left.
    """
    if not wanted:
        yield
        return
    mode, workspace = torch.get_deterministic_debug_mode(), os.environ.get(_CUBLAS)
    if workspace not in (":4096:8", ":16:8"):
        os.environ[_CUBLAS] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        if workspace is None:
            del os.environ[_CUBLAS]
        else:
            os.environ[_CUBLAS] = workspace
