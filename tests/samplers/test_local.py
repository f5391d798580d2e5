"""The local engine against the plainest sampler there is: one response at a time, one whole forward pass a token."""

import gc
import itertools
import math
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import ARCHITECTURES
from tether.config import LoraConfig
from tether.errors import TrainingError
from tether.models.language_model import LanguageModel
from tether.models.loading import add_lora, checkpoint_activations
from tether.models.policy import Policy
from tether.samplers.cuda_graphs import CudaGraphRunner
from tether.samplers.local import LocalSampler, _why_not_recorded, count_slots, slot_bytes
from tether.samplers.slots import SlotCache
from tether.types import EVALUATE, Prompt, Sampling
from tiny import language_model, prompts_of, randomize

STOPS = tuple(range(8))  # a fifth of the vocabulary: responses end early and unevenly


@torch.no_grad()
def one_by_one(lm, prompts: Sequence[Prompt], s: Sampling, *, cycle: int):
    """[(ids, log-probs, truncated masses, finish reason)] of each response, with numpy and no batch, cache or slot."""
    found = []
    for i in range(len(prompts) * s.responses_per_prompt):
        prompt = prompts[i // s.responses_per_prompt].ids
        chance = np.random.Generator(np.random.Philox(key=[s.seed, s.stream], counter=[0, i, cycle, 0]))
        ids, logprobs, masses, reason = [], [], [], "length"
        for u in chance.random(s.max_new_tokens):
            logits = lm(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].double()
            p = torch.softmax(logits / s.temperature, -1).numpy()
            kept = np.zeros_like(p)
            order = np.argsort(-p, kind="stable")[: s.top_k or None]
            needed = 1 + np.searchsorted(np.cumsum(p[order]) / p[order].sum(), s.top_p) if s.top_p < 1 else len(order)
            kept[order[:needed]] = p[order[:needed]]
            token = int(np.searchsorted(np.cumsum(kept), u * kept.sum(), side="right"))
            ids.append(token)
            logprobs.append(math.log(p[token]))
            masses.append(1 - kept.sum())
            if token in s.stop_token_ids:
                reason = "stop"
                break
        found.append((ids, logprobs, masses, reason))
    return found


def assert_same(completions, expected) -> None:
    assert completions.response_ids == [ids for ids, *_ in expected]
    assert completions.finish_reasons == [reason for *_, reason in expected]
    for name, place in (("sampler_logprobs", 1), ("truncated_mass", 2)):
        for got, want in zip(getattr(completions, name), (row[place] for row in expected), strict=True):
            assert_close(torch.tensor(got), torch.tensor(want, dtype=torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_samples_through_the_cache_what_it_would_without(architecture):
    model = language_model(architecture)
    sampler = LocalSampler(model, slots=2)
    assert sampler.note is None
    prompts = prompts_of([1, 12, 3, 17, 6])
    sampling = Sampling(0.7, max_new_tokens=16, stop_token_ids=(2, 3), seed=4)  # longer than the sliding window of 8
    got = sampler.generate(prompts, sampling, cycle=3)
    assert max(got.lengths) > 10
    assert len(set(got.lengths)) > 1
    assert_same(got, one_by_one(model.lm, prompts, sampling, cycle=3))
    ours = Policy(model)(got.rows(), temperature=0.7).logprobs  # and the training path agrees
    for row, sampled in zip(ours, got.sampler_logprobs, strict=True):
        assert_close(row[: len(sampled)], torch.tensor(sampled), atol=1e-4, rtol=0)


SMALL = language_model(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1)  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    slots=st.one_of(st.just("auto"), st.integers(1, 5)),
    responses=st.integers(1, 3),
    limit=st.integers(1, 6),
    filters=st.sampled_from([(0, 1.0), (3, 1.0), (0, 0.6), (5, 0.8)]),
    stops=st.sampled_from([(), (0,), STOPS]),
    cycle=st.integers(0, 3),
)
def test_any_mix_of_prompts_and_slots_gives_the_same_as_one_by_one(
    lengths, slots, responses, limit, filters, stops, cycle
):
    prompts = prompts_of(lengths, seed=len(lengths))
    sampling = Sampling(1.3, *filters, limit, stops, responses, seed=11, stream=EVALUATE)
    got = LocalSampler(SMALL, slots=slots).generate(prompts, sampling, cycle=cycle)
    assert_same(got, one_by_one(SMALL.lm, prompts, sampling, cycle=cycle))


def test_the_responses_to_a_prompt_stand_together_in_the_prompts_order():
    prompts = prompts_of([4, 2, 7])
    got = LocalSampler(SMALL).generate(prompts, Sampling(max_new_tokens=8, responses_per_prompt=2), cycle=1)
    assert got.prompts == [prompts[0]] * 2 + [prompts[1]] * 2 + [prompts[2]] * 2
    for k in range(0, 6, 2):
        assert got.response_ids[k] != got.response_ids[k + 1]  # draws of their own


def test_a_response_does_not_depend_on_the_rows_after_it():
    prompts, sampling = prompts_of([4, 2, 7, 5]), Sampling(max_new_tokens=8, stop_token_ids=STOPS)
    whole = LocalSampler(SMALL).generate(prompts, sampling, cycle=1)
    part = LocalSampler(SMALL, slots=1).generate(prompts[:2], sampling, cycle=1)
    assert part.response_ids == whole.response_ids[:2]


def test_a_part_of_the_prompts_gets_the_draws_that_it_has_in_the_whole():
    prompts, sampling = prompts_of([4, 2, 7, 5]), Sampling(max_new_tokens=8, responses_per_prompt=2)
    whole = LocalSampler(SMALL).generate(prompts, sampling, cycle=1)
    part = LocalSampler(SMALL, slots=1).generate(prompts[2:], sampling, cycle=1, first=4)
    assert part.response_ids == whole.response_ids[4:]


def test_responses_may_have_any_numbers_of_their_own():
    prompts, sampling = prompts_of([3, 9, 6]), Sampling(max_new_tokens=8, stop_token_ids=STOPS, seed=3)
    whole = LocalSampler(SMALL).generate(prompts, sampling, cycle=1)
    for batch in LocalSampler(SMALL).steps([prompts[2], prompts[0]], sampling, cycle=1, numbers=[2, 0]):  # noqa: B007
        pass
    assert batch.completions().response_ids == [whole.response_ids[2], whole.response_ids[0]]


def test_seed_stream_and_cycle_each_give_other_responses():
    def sample(cycle: int = 1, **changes):
        return LocalSampler(SMALL).generate(prompts_of([5]), Sampling(max_new_tokens=20, **changes), cycle=cycle)

    seen = [sample(), sample(cycle=2), sample(seed=1), sample(stream=EVALUATE)]
    assert len({tuple(c.response_ids[0]) for c in seen}) == 4
    assert sample().response_ids == seen[0].response_ids


# ---------------------------------------------------------------- how responses end


def always(*path: int) -> LanguageModel:
    """A model that all but surely says path[t+1] after path[t]: embeddings are one-hot, the layers do nothing."""
    model = language_model(hidden_size=40, num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False)
    randomize(model.lm, std=0.0)
    with torch.no_grad():
        torch.nn.init.eye_(model.lm.get_input_embeddings().weight)
        model.lm.base_model.norm.weight.fill_(1.0)
        for now, then in itertools.pairwise(path):
            model.lm.lm_head.weight[then, now] = 100.0
    return model


@pytest.mark.parametrize(
    ("stops", "limit", "ids", "reason"),
    [
        ((9,), 10, [5, 0, 7, 9], "stop"),  # 0 is the pad id: a token like any other
        ((9,), 4, [5, 0, 7, 9], "stop"),  # a stop at the very limit is a stop
        ((9,), 3, [5, 0, 7], "length"),
        ((), 5, [5, 0, 7, 9, 11], "length"),  # [] : nothing stops
        ((0,), 10, [5, 0], "stop"),
        ((1, 7), 10, [5, 0, 7], "stop"),
        ((3,), 5, [5, 0, 7, 9, 11], "length"),  # 3 ends the prompt: only response tokens stop
    ],
)
def test_a_response_ends_at_its_first_stop_token_or_at_the_limit(stops, limit, ids, reason):
    prompt = Prompt((2, 3), "…", 0)
    sampling = Sampling(max_new_tokens=limit, stop_token_ids=stops)
    got = LocalSampler(always(3, 5, 0, 7, 9, 11, 12)).generate([prompt], sampling, cycle=1)
    assert got.response_ids == [ids]
    assert got.finish_reasons == [reason]
    assert len(got.sampler_logprobs[0]) == len(got.truncated_mass[0]) == len(ids)


# ---------------------------------------------------------------- models that the cache does not fit


def test_attention_that_the_cache_does_not_know_is_recomputed_and_right():
    config = AutoConfig.for_model("bloom", vocab_size=40, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None)
    model = LanguageModel(AutoModelForCausalLM.from_config(config), torch.float32)
    sampler = LocalSampler(model, slots=2)
    assert "recomputes every token" in (sampler.note or "")
    prompts, sampling = prompts_of([3, 1, 6]), Sampling(0.9, max_new_tokens=6, stop_token_ids=STOPS)
    assert_same(sampler.generate(prompts, sampling, cycle=1), one_by_one(model.lm, prompts, sampling, cycle=1))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_in_bfloat16_too_every_architecture_decodes_through_the_cache(architecture, weights):
    model = LanguageModel(language_model(architecture).lm.to(weights), torch.bfloat16)
    kept = {p.data_ptr() for p in model.lm.parameters()}
    assert LocalSampler(model).note is None
    assert {p.data_ptr() for p in model.lm.parameters()} == kept  # widened for the probe alone


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_in_bfloat16_too_a_cache_that_is_off_by_no_more_than_rounding_is_noticed(monkeypatch, weights):
    step = SlotCache.step
    monkeypatch.setattr(SlotCache, "step", lambda self, tokens: step(self, tokens) * 1.005)
    model = LanguageModel(language_model().lm.to(weights), torch.bfloat16)
    assert "does not decode through our cache (off by 0.00" in (LocalSampler(model).note or "")


def test_layers_of_a_kind_that_the_cache_does_not_know_are_recomputed():
    model = language_model("qwen2")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert "layers of chunked_attention" in (LocalSampler(model).note or "")


def test_a_sliding_window_that_only_the_mask_knows_is_recomputed_and_right():
    # longer than the probe; the mask applies it, and attention is not told
    settings = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "norm_topk_prob": True,
                "shared_expert_intermediate_size": 16, "use_sliding_window": True, "max_window_layers": 2}  # fmt: skip
    config = AutoConfig.for_model("qwen2_moe", vocab_size=40, **ARCHITECTURES["qwen2"], **settings, sliding_window=12)
    model = LanguageModel(AutoModelForCausalLM.from_config(config), torch.float32)
    randomize(model.lm, std=0.3)
    sampler = LocalSampler(model, slots=2)
    assert "does not tell it its sliding window" in (sampler.note or "")
    prompts, sampling = prompts_of([15, 3]), Sampling(0.9, max_new_tokens=16)
    assert_same(sampler.generate(prompts, sampling, cycle=1), one_by_one(model.lm, prompts, sampling, cycle=1))


@pytest.mark.parametrize("lora", [False, True])
def test_a_head_that_is_not_ours_is_recomputed_and_right(lora):
    model = language_model(tie_word_embeddings=False)
    if lora:
        model.lm = add_lora(model.lm, LoraConfig(rank=2, targets=["lm_head"]), seed=0)
        torch.nn.init.normal_(model.hf_model.lm_head.lora_B["default"].weight)
    else:
        model.lm.lm_head = torch.nn.Sequential(model.lm.lm_head, torch.nn.Tanh())
    assert model.check_head() is not None
    sampler = LocalSampler(model, slots=2)
    assert "recomputes every token" in (sampler.note or "")
    prompts, sampling = prompts_of([3, 1, 6]), Sampling(0.9, max_new_tokens=6, stop_token_ids=STOPS)
    assert_same(sampler.generate(prompts, sampling, cycle=1), one_by_one(model.lm, prompts, sampling, cycle=1))


# ---------------------------------------------------------------- whose weights


def test_in_float32_the_policys_very_weights_are_sampled_from():
    model = language_model()
    sampler = LocalSampler(model)
    sampling = Sampling(max_new_tokens=12)
    before = sampler.generate(prompts_of([5]), sampling, cycle=1)
    randomize(model.lm, std=0.3)
    after = sampler.generate(prompts_of([5]), sampling, cycle=1)
    assert_same(after, one_by_one(model.lm, prompts_of([5]), sampling, cycle=1))
    assert after.response_ids != before.response_ids


def test_in_bfloat16_a_copy_is_sampled_from_that_load_weights_refreshes():
    model = LanguageModel(language_model().lm, torch.bfloat16)
    sampler = LocalSampler(model)
    prompts, sampling = prompts_of([5, 3, 9]), Sampling(max_new_tokens=12)

    def gap() -> float:
        got = sampler.generate(prompts, sampling, cycle=1)
        ours = Policy(model)(got.rows(), temperature=1.0).logprobs.detach()
        sampled = torch.tensor(got.sampler_logprobs)
        return float((ours - sampled).abs().mean())

    assert gap() < 5e-2
    randomize(model.lm, std=0.3)
    assert gap() > 5e-1
    sampler.load_weights(model)
    assert gap() < 5e-2
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.lm.parameters())


def test_adapters_are_sampled_with():
    model = LanguageModel(add_lora(language_model().lm, LoraConfig(rank=2), seed=0), torch.float32)
    for name, parameter in model.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    prompts, sampling = prompts_of([5, 3]), Sampling(max_new_tokens=12)
    got = LocalSampler(model).generate(prompts, sampling, cycle=1)
    assert_same(got, one_by_one(model.lm, prompts, sampling, cycle=1))


def test_sampling_leaves_no_trace_in_the_model_or_in_torchs_generator():
    model = language_model()
    model.lm.train()
    sampler = LocalSampler(model)
    implementation, state = model.config._attn_implementation, torch.get_rng_state()
    sampler.generate(prompts_of([5, 3]), Sampling(max_new_tokens=4), cycle=1)
    torch.nn.init.constant_(model.lm.get_input_embeddings().weight, torch.nan)
    with pytest.raises(TrainingError, match="not finite"):  # nor when it breaks off
        sampler.generate(prompts_of([5, 3]), Sampling(max_new_tokens=4), cycle=1)
    assert model.config._attn_implementation == implementation
    assert model.lm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad for p in model.lm.parameters())


def test_sampling_does_not_checkpoint_activations_and_leaves_training_as_it_was():
    model = language_model()
    checkpoint_activations(model.lm)
    model.lm.train()
    model.hf_model.model.layers[1].eval()  # modes are put back module by module
    calls = []
    for layer in model.hf_model.model.layers:
        layer._gradient_checkpointing_func = lambda f, *args, **kwargs: calls.append(1) or f(*args, **kwargs)
    modes = [m.training for m in model.lm.modules()]
    prompts, sampling = prompts_of([5, 3]), Sampling(max_new_tokens=4)
    got = LocalSampler(model).generate(prompts, sampling, cycle=1)
    assert calls == []
    assert [m.training for m in model.lm.modules()] == modes
    assert_same(got, one_by_one(language_model().lm, prompts, sampling, cycle=1))
    model.hidden(torch.zeros(1, 4, dtype=torch.long))
    assert calls == [1]  # in training it does


def test_auto_takes_more_slots_while_they_are_small_and_never_fewer_than_64():
    # Qwen2.5-0.5B: 24 layers, 2 key heads of 64, vocabulary 151,936. A slot of 1,000 tokens in bfloat16 holds
    # 2·24·2·64·1,000·2 = 12,288,000 bytes; drawing a token takes 151,936·28 = 4,254,208 more.
    small = AutoConfig.for_model(
        "qwen2",
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        hidden_size=896,
        vocab_size=151_936,
    )
    assert slot_bytes(small, 1000, torch.bfloat16) == (12_288_000, 4_254_208)
    assert count_slots("auto", 1000, small, 1000, torch.bfloat16, "cuda") == 2 * 2**30 // 16_542_208 == 129
    assert count_slots("auto", 1000, small, 1000, torch.bfloat16, "cpu") == 64
    assert count_slots("auto", 1000, small, 10, torch.bfloat16, "cuda") == 256
    assert count_slots("auto", 16, small, 10, torch.bfloat16, "cuda") == 16
    assert count_slots(300, 1000, small, 1000, torch.bfloat16, "cpu") == 300


# ---------------------------------------------------------------- recorded steps


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_recorded_steps_sample_what_steps_one_by_one_do(architecture):
    # 40 prompts in 16 slots: rows come and go, so that shapes of 16, 8, 4, 2 and 1 rows are all run
    model = language_model(architecture)
    sampler = LocalSampler(model, slots=16)
    prompts = prompts_of([1 + 5 * i % 17 for i in range(40)])
    sampling = Sampling(0.9, max_new_tokens=16, stop_token_ids=STOPS, responses_per_prompt=2)
    plain = sampler.generate(prompts, sampling, cycle=2)
    sampler.recorded = True
    recorded = sampler.generate(prompts, sampling, cycle=2)
    assert recorded.response_ids == plain.response_ids
    for got, want in zip(recorded.sampler_logprobs, plain.sampler_logprobs, strict=True):
        assert_close(torch.tensor(got), torch.tensor(want))


@pytest.mark.parametrize("recorded", [False, True])
def test_a_cache_is_gone_as_soon_as_nobody_holds_it(recorded):
    # a circle would keep keys and values through the update, until Python looks for circles
    cache = SlotCache(SMALL, slots=2, width=8, recorded=recorded)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with torch.no_grad():
        cache.prefill(ids, torch.full((2,), 3), 0, torch.arange(2))
        cache.step(ids[:, 0])
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_probe_finds_recorded_steps_right(architecture):
    assert _why_not_recorded(language_model(architecture)) is None


def test_the_probe_finds_recorded_steps_that_are_wrong(monkeypatch):
    call = CudaGraphRunner.__call__
    monkeypatch.setattr(CudaGraphRunner, "__call__", lambda *args: call(*args) * 1.05)
    assert "a replay is off by 0.05" in (_why_not_recorded(SMALL) or "")


def test_the_probe_compares_steps_that_a_recording_returns_in_one_buffer(monkeypatch):
    call, buffers = CudaGraphRunner.__call__, {}

    def replay(self, step, *args):  # as a graph does: every replay writes to the memory of the first
        hidden = call(self, step, *args)
        return buffers.setdefault(id(self), hidden.clone()).copy_(hidden)

    monkeypatch.setattr(CudaGraphRunner, "__call__", replay)
    assert _why_not_recorded(language_model()) is None
    assert buffers


def test_recordings_are_few_and_as_narrow_as_they_may_be():
    runner = CudaGraphRunner(slots=96, width=300, device=torch.device("cpu"))
    asked = [(96, 1), (49, 128), (48, 129), (25, 256), (24, 257), (1, 300)]
    assert [runner._rounded(*shape) for shape in asked] == [
        (96, 128), (96, 128), (48, 256), (48, 256), (24, 300), (1, 300),
    ]  # fmt: skip


def test_a_decode_step_compiles_without_leaving_the_graph_or_reading_the_device():
    # what can be traced whole can be recorded; explain() would show each break, fullgraph raises at the first
    model = language_model()
    cache = SlotCache(model, slots=4, width=32)
    ids = torch.arange(12).view(4, 3) % 40
    with torch.no_grad():
        cache.prefill(ids, torch.full((4,), 3), 0, torch.arange(4))
        at = cache.lengths.clone()
        want = cache._run(ids[:, 0], at, 16)
        traced = torch.compile(cache._run, fullgraph=True, backend="aot_eager", dynamic=False)
        assert_close(traced(ids[:, 0], at, 16), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_steps_are_recorded_and_agree_with_the_training_path(dtype):
    model = language_model()
    model.lm.to("cuda")
    model = LanguageModel(model.lm, dtype)
    sampler = LocalSampler(model, slots=16)
    assert sampler.recorded
    prompts, sampling = prompts_of([1 + 5 * i % 17 for i in range(40)]), Sampling(max_new_tokens=16)
    got = sampler.generate(prompts, sampling, cycle=1)
    again = sampler.generate(prompts, sampling, cycle=1)
    assert got.response_ids == again.response_ids
    ours = Policy(model)(got.rows().to("cuda"), temperature=1.0).logprobs.detach().cpu()
    gap = (ours - torch.tensor(got.sampler_logprobs)).abs()
    assert gap.mean() < (1e-4 if dtype == torch.float32 else 5e-2)
