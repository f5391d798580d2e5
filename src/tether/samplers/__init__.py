"""Samplers: from prompts to completions. `build_sampler` gives the one that a config names."""

from __future__ import annotations

from tether.config import SamplingConfig
from tether.models.language_model import LanguageModel
from tether.samplers.local import LocalSampler
from tether.types import Sampler


def build_sampler(
    model: LanguageModel, config: SamplingConfig, *, copied: bool = False, beside: bool = False
) -> tuple[Sampler, list[str]]:
    """(the sampler of `sampling.engine`, ready to sample from `model`; notes on the fallbacks, for the log).

    copied: from a copy of it, brought up to date by `load_weights`. beside: in a thread, while another trains."""
    sampler = LocalSampler(model, slots=config.slots, copied=copied, beside=beside)  # the only engine so far
    return sampler, [sampler.note] if sampler.note else []
