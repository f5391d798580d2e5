"""Sampling from several threads at once: the same tokens as one after the other."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import tether
from tether.samplers.local import LocalSampler
from tether.types import Sampling
from tiny import language_model, prompts_of


@pytest.fixture(autouse=True)
def _threads_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(*calls: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("shared_model", [False, True])
def test_two_threads_sample_what_each_would_alone(shared_model):
    one = language_model(seed=0)
    other = one if shared_model else language_model("qwen2", seed=1)
    prompts = [prompts_of([4, 9, 2], seed=1), prompts_of([11, 3, 3, 6], seed=2)]
    samplers = [LocalSampler(model, slots=2) for model in (one, other)]

    def sample(which: int) -> list[list[int]]:
        return samplers[which].generate(prompts[which], Sampling(max_new_tokens=24), cycle=1).response_ids

    want = [sample(0), sample(1)]
    for _ in range(4):
        assert together(lambda: sample(0), lambda: sample(1)) == want


def test_probes_of_a_shared_model_in_two_threads_agree_and_leave_it_as_it_was():
    model = language_model("gemma2")
    implementation = model.config._attn_implementation
    for _ in range(4):
        samplers = together(lambda: LocalSampler(model), lambda: LocalSampler(model))
        assert [s.note for s in samplers] == [None, None]
    assert model.config._attn_implementation == implementation


def test_generate_in_two_threads_gives_what_it_gives_in_one(tiny_model):
    models = [tiny_model("llama", seed=1), tiny_model("qwen3", seed=2)]

    def ask(which: int) -> list[list[int]]:
        found = tether.generate(models[which], ["Once", "why not?"], max_new_tokens=16, device="cpu")
        return [g.token_ids for g in found]

    want = [ask(0), ask(1)]
    for _ in range(3):
        assert together(lambda: ask(0), lambda: ask(1)) == want
