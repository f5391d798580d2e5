"""Counted randomness: every draw is a function of what it is for, never of when it happens.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a key and a counter into random bits.
The key is (seed, stream), the counter (cycle, row, token), so the uniform behind token t of response i in cycle c does
not depend on batch size, slot, worker, or on what was drawn before: a resumed run draws what an uninterrupted one
would.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt


def uniforms(seed: int, stream: int, cycle: int, row: int, count: int) -> npt.NDArray[np.float64]:
    """[count] uniforms in [0, 1) behind tokens 0 … count-1 of response `row` in `cycle`."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, row, cycle, 0])).random(count)


def request_seed(seed: int, stream: int, cycle: int, row: int) -> int:
    """[0, 2^63) for an engine that seeds each request with one number: as different for every response."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {stream} {cycle} {row}".encode(), digest_size=8).digest()) >> 1
