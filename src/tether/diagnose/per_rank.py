"""What a rank holds of a model that lies on several: arithmetic on the shapes of its weights.

Under `full` FSDP cuts every weight along its first dimension, and puts together one unit at a time: a layer, or the
root, which is all that stands outside the layers (tether.distributed.shard). All sizes are those of the rank that has
most, which is rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Weight:
    """One tensor of a model."""

    shape: tuple[int, ...]
    itemsize: int  # bytes a number
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.itemsize

    def part(self, ranks: int) -> Weight:
        """The largest part of it: rows are cut into `ranks` parts of equal size, the last of which may be shorter."""
        return Weight((-(-self.shape[0] // ranks), *self.shape[1:]), self.itemsize, self.trained)


Unit = Sequence[Weight]  # what is put together at once


def weight_bytes(units: Sequence[Unit], ranks: int = 1) -> int:
    """Bytes of the weights that a rank holds; of 1 rank, of all."""
    return sum(w.part(ranks).bytes for unit in units for w in unit)


def trained_numbers(units: Sequence[Unit], ranks: int = 1) -> int:
    """Numbers that a rank's optimizer steps."""
    return sum(w.part(ranks).numel for unit in units for w in unit if w.trained)


def gathered_bytes(units: Sequence[Unit]) -> tuple[int, int]:
    """(root, layers) bytes that FSDP puts together beside the parts; units: the root first.

    The root stays from the beginning of a forward pass to the end of its backward pass. A layer is there while it runs,
    and with it the buffer into which the next one is gathered.
    """
    root, *layers = ([w.bytes for w in unit] for unit in units)
    return sum(root), 2 * max(map(sum, layers), default=0)


def gradient_bytes_in_flight(units: Sequence[Unit]) -> int:
    """Bytes of float32 gradients of whole units that are not yet summed and cut; units: the root first.

    The root's grow through the whole backward pass. Of layers there are two at a time: the gradients of one, and the
    buffer from which those of the one before are being summed.
    """
    root, *layers = (4 * sum(w.numel for w in unit if w.trained) for unit in units)
    return root + 2 * max(layers, default=0)


def largest_gradient_bytes(units: Sequence[Unit]) -> int:
    """Bytes of the float32 gradients of the largest unit."""
    return max(4 * sum(w.numel for w in unit if w.trained) for unit in units)


def bucket_bytes(numbers: Sequence[int], bucket: int) -> int:
    """Bytes of the largest copy of float32 gradients that replicas sum at once.

    numbers: of each trained weight, in order. bucket: numbers in a copy, unless it is of a single weight.
    """
    largest = size = 0
    for count in numbers:
        size = size + count if size + count <= bucket else count
        largest = max(largest, size)
    return 4 * largest


def wire_bytes(
    units: Sequence[Unit], reference: Sequence[Unit], ranks: int, *, sharded: bool, steps: int, passes: int, valued: int
) -> int:
    """Bytes of weights and gradients that a rank receives in a cycle of PPO, of which there are ring exchanges.

    units, reference: of the policy, and of the frozen model if there is one, the root first. steps: of the optimizer.
    passes, valued: a rank's microbatches with and without a backward pass.

        replicate   steps · 2·G
        full        passes · (root + 2·layers + G) + valued · layers + one copy to sample from

    G are the gradients in float32; `layers` of valued passes are those of policy and reference. A rank receives the
    share (ranks - 1) / ranks of each. The policy's root stays from the valued passes to the first of the others, the
    reference's for ever.
    """
    gradients = 4 * trained_numbers(units)
    if not sharded:
        return steps * 2 * gradients * (ranks - 1) // ranks
    root, total = weight_bytes(units[:1]), weight_bytes(units)
    layers = total - root
    learned = passes * (root + 2 * layers + gradients)
    forward = valued * (layers + weight_bytes(reference[1:]))
    return (learned + forward + total) * (ranks - 1) // ranks
