"""Ray's workers beside the local engine: the same tokens, from the weights of now, whoever is killed."""

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tether.config import PoolConfig, SamplingConfig
from tether.errors import ConfigError, TrainingError
from tether.models.language_model import LanguageModel
from tether.samplers import pool as pool_module
from tether.samplers.local import LocalSampler
from tether.samplers.pool import PoolSampler, address_of, check_pool
from tether.train.signals import Signals, StopRequested
from tether.types import Prompt, Sampling
from tiny import random_ids, transformer

SAMPLING = Sampling(max_new_tokens=12, stop_token_ids=tuple(range(40)), responses_per_prompt=3, seed=5)


def model_of(*, tied: bool = True, dtype: torch.dtype = torch.float32) -> LanguageModel:
    return LanguageModel(transformer("llama", seed=0, vocab_size=300, tie_word_embeddings=tied), dtype)


def perturb(model: LanguageModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.lm.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.05)


def prompts() -> list[Prompt]:
    return [Prompt(tuple(ids), "…", n) for n, ids in enumerate(random_ids([3, 17, 40, 1, 8, 2, 30], vocabulary=300))]


def pool_of(model: LanguageModel, workers: int, told: list[str] | None = None) -> PoolSampler:
    config = SamplingConfig("pool", pool=PoolConfig(workers))
    return PoolSampler(model, config, restarted=(told if told is not None else []).append)


def assert_same(pool: PoolSampler, local: LocalSampler, cycle: int) -> None:
    ours, theirs = (s.generate(prompts(), SAMPLING, cycle=cycle) for s in (pool, local))
    assert ours.response_ids == theirs.response_ids
    assert ours.finish_reasons == theirs.finish_reasons
    assert [p.row for p in ours.prompts] == [p.row for p in theirs.prompts]
    for name in ("sampler_logprobs", "truncated_mass"):
        for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True):
            assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("kind", ["tied", "untied", "lora", "bfloat16"])
def test_workers_draw_the_local_engines_tokens_after_every_update(ray, kind):
    model = model_of(tied=kind != "untied", dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "lora":
        adapted = get_peft_model(model.lm, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        model = replace(model, lm=adapted)
    pool, local = pool_of(model, 2), LocalSampler(model)
    try:
        seen = set()
        for version in range(3):
            perturb(model, version)
            for sampler in (pool, local):
                sampler.load_weights(model, version)
            assert_same(pool, local, cycle=1)
            seen.add(str(local.generate(prompts(), SAMPLING, cycle=1).response_ids))
        assert len(seen) == 3  # the updates showed
    finally:
        pool.close()


def test_more_workers_than_prompts_and_a_part_of_a_cycle(ray):
    model = model_of()
    pool, local = pool_of(model, 4), LocalSampler(model)
    try:
        pool.load_weights(model, 0)
        for asked, first in ((prompts()[:2], 0), (prompts()[3:], 9)):
            ours, theirs = (s.generate(asked, SAMPLING, cycle=2, first=first) for s in (pool, local))
            assert ours.response_ids == theirs.response_ids
    finally:
        pool.close()


def test_a_worker_that_dies_between_two_cycles_or_within_one_is_replaced_and_draws_the_same(ray):
    model, told = model_of(), []
    pool, local = pool_of(model, 2, told), LocalSampler(model)
    try:
        for sampler in (pool, local):
            sampler.load_weights(model, 0)
        assert_same(pool, local, cycle=1)
        perturb(model, 1)  # the one that takes its place must not have the weights that it once began with
        for sampler in (pool, local):
            sampler.load_weights(model, 1)
        os.kill(pool.pids[0], signal.SIGKILL)
        assert_same(pool, local, cycle=2)
        assert len(told) == 1
        assert "worker 0 of the pool" in told[0]

        long = replace(SAMPLING, max_new_tokens=80, stop_token_ids=(), responses_per_prompt=40)
        want = local.generate(prompts(), long, cycle=3)
        killer = threading.Timer(0.3, os.kill, (pool.pids[1], signal.SIGKILL))
        killer.start()
        began = time.monotonic()
        found = pool.generate(prompts(), long, cycle=3)
        assert time.monotonic() - began > 0.3, "it was done before the worker was killed"
        assert found.response_ids == want.response_ids
        assert len(told) == 2
    finally:
        pool.close()


def test_weights_of_the_same_version_are_loaded_again(ray):
    model = model_of()
    pool, local = pool_of(model, 1), LocalSampler(model)
    try:
        for seed in range(2):
            perturb(model, seed)
            pool.load_weights(model)
            assert_same(pool, local, cycle=1)
    finally:
        pool.close()


def test_a_signal_while_workers_sample_stops_the_phase(ray):
    model = model_of()
    pool = pool_of(model, 1)
    long = replace(SAMPLING, max_new_tokens=200, stop_token_ids=(), responses_per_prompt=200)
    try:
        pool.load_weights(model, 0)
        pool.generate(prompts(), SAMPLING, cycle=1)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with Signals() as signals, pytest.raises(StopRequested), signals.droppable():
            pool.generate(prompts(), long, cycle=2)
    finally:
        pool.close()


def test_a_node_without_our_packages_is_named_as_what_it_is(ray, monkeypatch):
    def broken(self, **_):
        raise ModuleNotFoundError("No module named 'tether'")

    monkeypatch.setattr(pool_module.PoolWorker, "__init__", broken)
    monkeypatch.setattr(pool_module.PoolWorker, "__module__", "__main__")  # else Ray imports the one of the file
    with pytest.raises(ConfigError, match=r"worker 0 of the pool does not start .*\(ModuleNotFoundError: No module"):
        pool_of(model_of(), 1)


def test_what_a_worker_raises_is_what_the_run_says(ray):
    model = model_of()
    pool = pool_of(model, 2)
    try:
        with torch.no_grad():
            next(model.lm.parameters()).fill_(float("nan"))
        pool.load_weights(model, 0)
        with pytest.raises(TrainingError) as ours:
            pool.generate(prompts(), SAMPLING, cycle=1)
        with pytest.raises(TrainingError) as theirs:
            LocalSampler(model).generate(prompts(), SAMPLING, cycle=1)
        assert str(ours.value) == str(theirs.value)
    finally:
        pool.close()


def test_without_room_the_run_says_so_and_takes_nothing(ray):
    with pytest.raises(ConfigError, match=r"no room for 5 workers with 1 CPU each: Ray has 4 CPU in all"):
        pool_of(model_of(), 5)
    pool = pool_of(model_of(), 4)  # nothing was kept of the first try
    pool.close()


def test_what_there_can_be_no_pool_with_is_refused(ray, monkeypatch):
    from tether.distributed.ranks import Ranks

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="each would start a Ray of its own"):
        check_pool(PoolConfig(2), Ranks(0, 2))
    with pytest.raises(ConfigError, match=r"workers=2 for 3 ranks"):
        check_pool(PoolConfig(2, address="auto"), Ranks(0, 3))
    with pytest.raises(ConfigError, match="would hand out the GPU that it trains on"):
        check_pool(PoolConfig(2, gpus=1))
    check_pool(PoolConfig(2, gpus=1, address="auto"), Ranks(0, 2))
    monkeypatch.setenv("RAY_ADDRESS", "local")  # what Ray itself takes for none
    assert address_of(PoolConfig(2)) is None
