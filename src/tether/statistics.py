"""Statistics that every room may use, without torch."""

from __future__ import annotations

import math

_Z = 1.959964  # two-sided 95 %


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """(low, high) of Wilson's 95 % score interval for a share among `count`, which need not be whole.

    It stays within [0, 1], and has a width at 0 and 1 too. Source: Wilson 1927.
    """
    center = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    low = 0.0 if share == 0 else max(0.0, center - half)  # exactly, whatever rounding makes of it
    high = 1.0 if share == 1 else min(1.0, center + half)
    return low, high
