"""Bounds of the self-checks that a run makes of itself: trainers warn and stop by them, readers judge by them.

By compute precision. float32: rounding alone is left, so a thousandth of a nat is a bug. bfloat16: 8 bits of mantissa,
summed in another order by the sampler than by the trainer.
"""

from __future__ import annotations

from typing import Literal

Precision = Literal["float32", "bfloat16"]

# Mean of |ρ - 1| over the first minibatch of a cycle, before anything is learned.
FIRST_RATIO_MEAN: dict[Precision, float] = {"float32": 1e-5, "bfloat16": 1e-2}
FIRST_RATIO_MAX_FLOAT32 = 1e-4  # its largest, in float32
FIRST_RATIO_STOP = 5e-2  # a mean above this stops the run, whatever the precision: the objective would be another
# Mean |log-probability of the trainer - of the sampler|, nats per token.
SAMPLER_GAP: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 5e-2}
# Largest |log-probability of the trainer - of a foreign engine| on its probe, nats: tokens that nobody would say there,
# of far lower log-probability than sampled ones. In bfloat16 both sides round in every layer, at other places.
PROBE_GAP: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 0.5}
