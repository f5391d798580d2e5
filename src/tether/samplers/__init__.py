"""Samplers: from prompts to completions. `build_sampler` gives the one that a config names."""

from __future__ import annotations

from tether.config import SamplingConfig
from tether.models.language_model import LanguageModel
from tether.samplers.local import LocalSampler
from tether.types import Sampler


def build_sampler(model: LanguageModel, config: SamplingConfig) -> tuple[Sampler, list[str]]:
    """(the sampler of `sampling.engine`, ready to sample from `model`; notes on the fallbacks, for the log)."""
    sampler = LocalSampler(model, slots=config.slots)  # the only engine so far
    return sampler, [sampler.note] if sampler.note else []
