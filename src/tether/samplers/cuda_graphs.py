"""Decode steps recorded once and replayed, as CUDA graphs.

A step of a model that fits a GPU well is hundreds of small kernels; launching them one by one from Python takes several
times as long as running them. A recording launches them all at once. Its shapes are fixed, so rows are rounded up to
slots / 2^k and the reach of attention to a multiple of 128: few recordings serve a whole `generate`.

Left out: keeping recordings from one `generate` to the next, which would keep the cache's memory through the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_REACH = 128  # keys: attention over up to 127 masked ones costs less than another recording

Step = Callable[[Tensor, Tensor, int], Tensor]


class CudaGraphRunner:
    """A step, recorded for each shape it is called with: recorded(step, tokens, at, reach) == step(tokens, at, reach).

    step: (tokens [n], at [n], reach) -> hidden [n, D]: token i becomes number at[i] of slot i and attends to no key
    beyond `reach`. It must not read a number off the device; always the same one.
    slots, width: rows of the cache behind it, and tokens of each. On a CPU nothing is recorded.
    """

    def __init__(self, *, slots: int, width: int, device: torch.device) -> None:
        self._slots, self._width = slots, width
        self._tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self._at = torch.zeros(slots, dtype=torch.long, device=device)
        self._recordings: dict[tuple[int, int], Callable[[], Tensor]] = {}

    def __call__(self, step: Step, tokens: Tensor, at: Tensor, reach: int) -> Tensor:
        n = len(tokens)
        rows, reach = self._rounded(n, reach)
        # Rows beyond n are free slots. What is written at their first place is overwritten when a prompt moves in.
        self._tokens[:n], self._at[:n] = tokens, at
        self._at[n:rows] = 0
        if self._tokens.device.type != "cuda":
            return step(self._tokens[:rows], self._at[:rows], reach)[:n]
        if (rows, reach) not in self._recordings:
            self._recordings[rows, reach] = self._record(step, rows, reach)
        return self._recordings[rows, reach]()[:n]  # the recording's own memory: good until its next replay

    def _rounded(self, n: int, reach: int) -> tuple[int, int]:
        rows = self._slots
        while rows // 2 >= n:
            rows //= 2
        return rows, min(self._width, -(-reach // _REACH) * _REACH)

    def _record(self, step: Step, rows: int, reach: int) -> Callable[[], Tensor]:
        tokens, at = self._tokens[:rows], self._at[:rows]
        # Once outside the recording, on a stream of its own: libraries set themselves up at their first call. The step
        # writes the same keys to the same places every time, so running it twice changes nothing.
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # a weight cast outside the recording would be gone at its replay
        try:
            with torch.cuda.stream(aside):
                step(tokens, at, reach)
            torch.cuda.current_stream().wait_stream(aside)
            # Other threads may allocate meanwhile: torch's default would break off the capture for it.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                hidden = step(tokens, at, reach)
        finally:
            torch.set_autocast_cache_enabled(caching)
            torch.cuda.set_stream(here)  # a capture that failed leaves its own behind

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay
