"""How the weights of a run lie on its ranks: a replica on each, or a part on each (FSDP2)."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this rank has a part; every rank calls. One that is whole is returned itself."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
