"""`ppo.ahead: 1`: the responses of the next cycle are sampled while this one is learned from.

    cycle   c                                 c + 1
    learn   ─ score, value ─ update ───       ─ score, value ─ update ───
    sample  ─ cycle c + 1 ─────────────────│  ─ cycle c + 2 ─────────────────│

So what is learned from was sampled by the policy of one update before; `tether.math.importance_weights` corrects that.
The first cycle is sampled before anything else. The responses that wait are part of every checkpoint: the weights that
they were drawn with are gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tether.background import in_thread
from tether.distributed.ranks import Ranks
from tether.errors import EngineError, TrainingError
from tether.train.rollout import Metrics, gather_responses, sample_part
from tether.types import Completions, Prompt, Sampler, Sampling

FILE = "ahead.safetensors"
_REASONS = ("stop", "length")


@dataclass(slots=True)
class Ahead:
    """What is there when the cycle has been learned from."""

    completions: Completions | None = None  # of the next cycle
    metrics: Metrics = field(default_factory=dict)


class AheadSampler:
    """Samples the next cycle's responses in a thread, one cycle at a time.

    Left, however that is, nothing samples any more: the next run may load weights into the same sampler, and torch
    aborts where the interpreter goes away under a thread that computes.
    """

    def __init__(self, sampler: Sampler, sampling: Sampling, ranks: Ranks, progress: Callable[[str], None]) -> None:
        self.sampler, self.sampling, self.ranks, self.progress = sampler, sampling, ranks, progress
        self._drawn: Future[Completions] | None = None

    def __enter__(self) -> AheadSampler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._drawn is not None:
            wait([self._drawn])

    @contextmanager
    def beside(self, prompts: Sequence[Prompt], cycle: int) -> Iterator[Ahead]:
        """Sample the responses of `cycle` while what stands in the `with` computes, and wait for them at its end; where
        that fails or is stopped, leave it at once. Without prompts nothing is sampled.

        The sampler's weights must not change meanwhile. What ranks say to each other is said in the main thread.
        """
        ahead = Ahead()
        if not prompts:
            yield ahead
            return
        draw = partial(sample_part, prompts, self.sampler, self.sampling, cycle=cycle, ranks=self.ranks)
        self._drawn = in_thread(draw, "sampling")
        yield ahead
        self.progress("sampling")
        began = time.perf_counter()
        try:
            drawn = self._drawn.result()
        except EngineError as error:  # the policy has moved on: it must not be saved as that of the cycle before
            raise TrainingError(str(error)) from error
        ahead.completions = gather_responses(drawn, prompts, self.sampling, self.ranks)
        ahead.metrics["time/ahead_s"] = time.perf_counter() - began


def write_ahead(file: Path, completions: Completions) -> None:
    """All of it but the prompts, which follow from the cycle; every number as it is, in float64."""
    numbers = {"logprobs": completions.sampler_logprobs, "truncated": completions.truncated_mass}
    tensors = {
        name: torch.tensor([x for row in rows for x in row], dtype=torch.float64) for name, rows in numbers.items()
    }
    tensors["ids"] = torch.tensor([token for ids in completions.response_ids for token in ids])
    tensors["lengths"] = torch.tensor(completions.lengths)
    tensors["reasons"] = torch.tensor([_REASONS.index(reason) for reason in completions.finish_reasons])
    save_file(tensors, file)


def read_ahead(file: Path, prompts: Sequence[Prompt]) -> Completions:
    """prompts: of each response."""
    found = load_file(file)
    lengths = found["lengths"].tolist()
    ids, logprobs, truncated = (
        [part.tolist() for part in found[name].split(lengths)] for name in ("ids", "logprobs", "truncated")
    )
    return Completions(list(prompts), ids, logprobs, truncated, [_REASONS[i] for i in found["reasons"].tolist()])
