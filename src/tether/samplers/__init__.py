"""Samplers: from prompts to completions. `build_sampler` gives the one that a config names."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from tether.config import SamplingConfig
from tether.distributed.ranks import ALONE, Ranks
from tether.models.language_model import LanguageModel
from tether.samplers.local import LocalSampler
from tether.samplers.pool import PoolSampler
from tether.samplers.vllm import Room, VLLMSampler
from tether.types import Sampler


def build_sampler(
    model: LanguageModel, config: SamplingConfig, *, copied: bool = False, beside: bool = False,
    room: Room | None = None, ranks: Ranks = ALONE, opened: ExitStack | None = None,
    restarted: Callable[[str], None] = lambda why: None,
) -> tuple[Sampler, list[str]]:  # fmt: skip
    """(the sampler of `sampling.engine`, ready to sample from `model`; notes on the fallbacks, for the log).

    copied: from a copy of it, brought up to date by `load_weights`. beside: in a thread, while another trains.
    room, ranks, opened, restarted: of an engine with processes of its own: its limits, whose they are, what ends them,
    and who hears of their end.
    """
    if config.engine == "pool":
        assert opened is not None
        pool = PoolSampler(model, config, ranks, restarted=restarted)
        opened.callback(pool.close)
        return pool, pool.notes
    if config.engine == "vllm":
        assert room is not None
        assert opened is not None
        engine = VLLMSampler(model, config, room, copied=copied, restarted=restarted)
        opened.callback(engine.close)
        return engine, engine.notes
    sampler = LocalSampler(model, slots=config.slots, copied=copied, beside=beside)
    return sampler, [sampler.note] if sampler.note else []
