"""What a worker of the pool is: a local engine with a copy of the policy, somewhere on a cluster."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tether.models.language_model import LanguageModel
from tether.samplers.local import LocalSampler
from tether.types import Prompt, Sampling

Array = npt.NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Stored:
    """Where in Ray's store it lies."""

    model: Any  # without the weights that are trained
    weights: Any  # those, in the order of `packed`
    load: int  # how many there were so far


@dataclass(frozen=True, slots=True)
class Part:
    """The responses to some of a cycle's prompts, and who drew them."""

    pid: int
    node: str
    response_ids: list[list[int]]
    sampler_logprobs: list[list[float]]
    truncated_mass: list[list[float]]
    finish_reasons: list[str]


class PoolWorker:
    """Answers one request at a time. It is made without anything: where one dies, Ray makes another in its place, and
    that may be when what the first was made of is gone (ray#53727)."""

    def __init__(self, *, slots: int | str, threads: int, device: str) -> None:
        torch.set_num_threads(threads)
        self._slots, self._device = slots, device
        self._model: LanguageModel | None = None
        self._sampler: LocalSampler | None = None
        self._loaded: int | None = None

    def versions(self) -> dict[str, str]:
        """Of what the tokens depend on."""
        return versions()

    def generate(
        self, policy: Stored, prompts: Sequence[Sequence[int]], sampling: Sampling, cycle: int, first: int
    ) -> Part:  # fmt: skip
        """`LocalSampler.generate`, under weights that are fetched where this worker has others or none."""
        sampler = self._up_to_date(policy)
        asked = [Prompt(tuple(ids), "", row) for row, ids in enumerate(prompts)]
        found = sampler.generate(asked, sampling, cycle=cycle, first=first)
        return Part(os.getpid(), platform.node(), found.response_ids, found.sampler_logprobs, found.truncated_mass,
                    found.finish_reasons)  # fmt: skip

    def _up_to_date(self, policy: Stored) -> LocalSampler:
        import ray

        if self._model is None:
            model = ray.get(policy.model)
            self._model = replace(model, lm=model.lm.to(self._device))
        if self._loaded != policy.load:
            load(self._model, ray.get(policy.weights))
            self._loaded = policy.load
        if self._sampler is None:
            self._sampler = LocalSampler(self._model, slots=self._slots)
        return self._sampler


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("tether", "torch", "transformers")}


def load(model: LanguageModel, weights: Sequence[Array]) -> None:
    """Put `weights` where the model's are, in the order of `packed`."""
    ours = [p for p in model.lm.parameters() if p.requires_grad]
    with torch.no_grad():
        for p, array in zip(ours, weights, strict=True):
            tensor = unpacked(array, p.dtype)
            if p.shape == tensor.shape:
                p.copy_(tensor)
            else:  # the first time
                p.data = tensor.to(p.device, copy=True)


def packed(tensor: torch.Tensor) -> Array:
    """As Ray hands it on without copying. NumPy has no bfloat16: its bits travel as integers."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    array: Array = tensor.contiguous().numpy()
    return array


def unpacked(array: Array, dtype: torch.dtype) -> torch.Tensor:
    tensor = torch.from_numpy(array.copy())  # Ray's memory is read-only
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor
