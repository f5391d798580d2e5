"""A penalty for answers that come near the length limit: `reward: [{function: tether.rewards.overlong:overlong, …}]`"""

from __future__ import annotations

from collections.abc import Sequence


def overlong(completion_ids: Sequence[Sequence[int]], longest: int, buffer: int) -> list[float]:
    """0 up to longest - buffer tokens, from there on down to -1 at `longest`.

        -clip((length - (longest - buffer)) / buffer, 0, 1)

    A limit alone punishes an answer that is one token too long as a wrong one; a slope says where it comes from.
    Source: Yu et al. 2025, eq. 13, "soft overlong punishment" (arXiv:2503.14476): 20480 and 4096 there.

    completion_ids  ragged, the stop token included.
    longest         tokens: `sampling.max_new_tokens`, or what is to be the longest below it.
    buffer          tokens over which the penalty grows; 1 to `longest`.
    """
    if not 1 <= buffer <= longest:
        raise ValueError(
            f"buffer={buffer} is outside [1, longest={longest}]: the penalty would have no slope. Set `arguments` of "
            "this source, e.g. {longest: 1024, buffer: 256}"
        )
    return [-min(1.0, max(0.0, (len(ids) - (longest - buffer)) / buffer)) for ids in completion_ids]
