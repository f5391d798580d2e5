"""Peak memory by part: sizes worked out by hand on a tiny model, and one real run's resident memory."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tether.config import (
    DataConfig,
    DPOConfig,
    HeldOutConfig,
    InitModelConfig,
    LoraConfig,
    ModelConfig,
    PoolConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    QLearningSection,
    ReferencedModelConfig,
    RewardConfig,
    RewardSourceConfig,
    SamplingConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
)
from tether.diagnose import Memory, Part, predict
from tether.diagnose.memory import size
from tether.distributed.ranks import Ranks
from tether.errors import ConfigError
from tether.models.loading import model_config
from tether.samplers.vllm import plan_cache
from tether.train.held_out import PromptSets
from tether.train.ppo import engine_room
from tether.types import Prompt

BENCH = Path(__file__).parents[2] / "bench" / "memory_prediction.py"


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("llama")  # width 32, 2 layers, 4 heads, 2 of them for keys: head size 8


@pytest.fixture(scope="module")
def count(model) -> int:
    return AutoModelForCausalLM.from_pretrained(model).num_parameters()


def config(directory: Path, **changes) -> PPOConfig:
    return PPOConfig(
        run="run",
        model=replace(ModelConfig(str(directory), dtype="float32"), **changes.pop("model", {})),
        prompts=PromptsConfig("prompts.jsonl", max_tokens=20),
        ppo=PPOSection(batch=16, minibatch=8),
        sampling=SamplingConfig(max_new_tokens=12),
        evaluate=HeldOutConfig(every=0),
        **changes,
    )


def parts(memory: Memory) -> dict[str, int]:
    return {p.name: p.bytes for p in memory.parts}


def test_a_full_run_has_masters_gradients_two_moments_and_a_reference(model, count):
    found = parts(predict(config(model), device="cpu"))
    want = {"weights": 4, "gradients": 4, "optimizer": 8, "reference": 4}
    assert {name: found[name] for name in want} == {name: size * count for name, size in want.items()}
    # 2 (keys, values) · 2 layers · 16 slots · 2 heads · (20 + 12) tokens · 8 · 4 bytes
    assert found["key-value cache"] == 2 * 2 * 16 * 2 * 32 * 8 * 4
    assert "engine's copy of the policy" not in found  # fp32: it samples from the policy itself


def test_in_bfloat16_the_references_matrices_are_half_and_the_engine_needs_a_copy(model, count):
    found = parts(predict(config(model, model={"dtype": "bfloat16"}), device="cpu"))
    assert found["weights"] == 4 * count
    assert found["engine's copy of the policy"] == 2 * count
    # a table of 258 embeddings, and of 2 layers two norms each, and the last one, stay as wide as the policy's
    assert found["reference"] == 2 * count + 2 * (258 * 32 + 5 * 32)


def test_vllm_holds_weights_a_head_of_its_own_and_the_cache_instead_of_the_local_engine(model, count):
    engine = SamplingConfig("vllm", max_new_tokens=12)
    found = parts(predict(replace(config(model, model={"dtype": "bfloat16"}), sampling=engine), device="cpu"))
    assert found["vLLM's weights"] == 2 * (count + 258 * 32)  # the head is tied here, and apart there
    # of 16 slots, and one more: 2 · 2 layers · 2 heads · 8 · 2 bytes, 80 tokens in blocks of 128
    assert found["vLLM's key-value cache"] == 17 * 2 * 2 * 2 * 128 * 8 * 2
    assert found["vLLM's libraries"] > 0
    assert not {"key-value cache", "sampler's workspace", "engine's copy of the policy"} & set(found)


def test_beside_weights_in_parts_every_rank_keeps_a_whole_copy_for_vllm(model, count):
    run = replace(config(model), sampling=SamplingConfig("vllm", max_new_tokens=12))
    name = "copy that vLLM's weights are written from"
    assert parts(predict(run, device="cpu", ranks=2, shard="full"))[name] == 4 * count
    assert name not in parts(predict(run, device="cpu", ranks=2, shard="replicate"))


def test_a_ranks_vllm_has_room_for_its_own_part_of_a_cycle_and_that_is_what_is_predicted(model, tmp_path):
    base = replace(config(model), sampling=SamplingConfig("vllm", max_new_tokens=12))
    run = replace(base, ppo=PPOSection(batch=16, minibatch=8, responses_per_prompt=2))
    prompts = [Prompt((5,) * 20, "…", row) for row in range(9)]
    sets = PromptSets(prompts, prompts, [], None)
    room = engine_room(run, sets, SimpleNamespace(path=tmp_path), Ranks(0, 3))
    assert room.responses == 6  # of 8 prompts in 3 parts the largest has 3
    cache = plan_cache("auto", room.responses, room.tokens, model_config(str(model)), torch.float32, "cpu")
    assert parts(predict(run, device="cpu", ranks=3))["vLLM's key-value cache"] == cache.bytes
    evaluated = replace(run, evaluate=HeldOutConfig(every=1, samples=4))
    held_out = replace(sets, held_out=prompts[:5])
    assert engine_room(evaluated, held_out, SimpleNamespace(path=tmp_path), Ranks(0, 3)).responses == 8


def test_a_pool_on_this_machine_holds_a_copy_of_the_policy_for_each_worker(model, count, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    engine = SamplingConfig("pool", max_new_tokens=12, pool=PoolConfig(workers=3))
    found = parts(predict(replace(config(model), sampling=engine), device="cpu"))
    assert found["workers' copies of the policy"] == 3 * 4 * count
    assert found["weights on their way to the workers"] == 3 * 4 * count
    assert not {"key-value cache", "sampler's workspace", "engine's copy of the policy"} & set(found)
    cluster = replace(engine, pool=PoolConfig(workers=3, address="10.0.0.1:6379"))
    assert "workers' copies of the policy" not in parts(predict(replace(config(model), sampling=cluster), device="cpu"))


def test_sampling_ahead_needs_a_copy_and_the_engines_memory_beside_the_updates(model, count):
    plain = config(model)
    memory = predict(replace(plain, ppo=replace(plain.ppo, ahead=1)), device="cuda")
    assert parts(memory)["engine's copy of the policy"] == 4 * count
    phases = {p.name: p.phase for p in memory.parts}
    assert phases["key-value cache"] == phases["sampler's workspace"] == "always"


def test_lora_needs_neither_reference_nor_copy_and_trains_little(model, count):
    found = parts(predict(config(model, model={"dtype": "bfloat16", "lora": LoraConfig(rank=2)}), device="cpu"))
    assert not {"reference", "engine's copy of the policy"} & set(found)
    assert found["optimizer"] < 8 * count / 4
    named = parts(predict(config(model, model={"lora": LoraConfig(), "reference": str(model)}), device="cpu"))
    assert named["reference"] == 4 * count


def test_at_the_end_the_saved_model_is_loaded_again_and_adapters_are_merged_in_a_copy_first(model, count):
    whole, adapters = (predict(config(model, model={"lora": lora}), device="cpu") for lora in (None, LoraConfig()))
    assert [parts(m)["copies of the final model"] for m in (whole, adapters)] == [4 * count, 8 * count]
    assert "copies of the final model" not in parts(predict(config(model), device="cuda"))  # they are on the CPU


def test_a_separate_critic_is_a_second_trunk_with_gradients_and_moments(model, count):
    shared, own = (parts(predict(config(model, model={"critic": c}), device="cpu")) for c in ("shared", "separate"))
    trunk = AutoModelForCausalLM.from_pretrained(model).base_model.num_parameters()
    assert own["critic"] == 4 * trunk
    assert own["optimizer"] - shared["optimizer"] == 8 * trunk


def test_reward_models_are_counted(model, count):
    source = RewardSourceConfig(model=str(model), dtype="float32", name="kind")
    assert parts(predict(config(model, reward=[source]), device="cpu"))["reward model kind"] == pytest.approx(
        4 * count, rel=0.3
    )
    each = predict(config(model, reward=[source]), device="cpu", ranks=2).others
    assert "reward model kind" in parts(each)  # which scores its part of the rows


def test_longer_prompts_and_more_tokens_at_once_cost_more(model):
    def activations(prompt: int, **changes) -> int:
        base = config(model)
        return parts(predict(replace(base, ppo=replace(base.ppo, **changes)), prompt_tokens=prompt))["activations"]

    assert activations(80) > 2 * activations(20)
    assert activations(20, microbatch_tokens=64) < activations(20) / 2


def test_a_cpu_keeps_what_a_gpu_hands_on():
    phases = [Part("weights", 100), Part("cache", 30, "sampling"), Part("activations", 50, "updating")]
    assert Memory("cpu", phases).peak == 180
    assert Memory("cuda", phases).peak == 150
    assert Memory("cpu", [*phases, Part("copies", 70, "saving")]).peak == 180  # by then the others are free
    assert Memory("cpu", [*phases, Part("copies", 90, "saving")]).peak == 190
    assert Memory("cuda", phases).needed > 150


def test_on_a_gpu_the_optimizers_step_needs_room_for_one_more_copy(model, count):
    found = predict(config(model), device="cuda")
    step = sum(p.bytes for p in found.parts if p.phase == "stepping")
    assert step == 8 * count  # gradients, and the square roots that torch takes of all moments at once


def test_supervised_and_reward_training_are_predicted_too(model, count):
    base = SFTModelConfig(str(model), dtype="float32")
    sft = parts(predict(SFTConfig("run", base, DataConfig("data.jsonl", max_tokens=64)), device="cpu"))
    reward = parts(predict(RewardConfig("run", base, DataConfig("data.jsonl", max_tokens=64)), device="cpu"))
    assert sft["optimizer"] == reward["optimizer"] == 8 * count
    assert min(sft["activations"], reward["activations"]) > 0
    assert "reference" not in sft
    scratch = InitModelConfig(AutoModelForCausalLM.from_pretrained(model).config.to_diff_dict(), str(model))
    assert parts(predict(SFTConfig("run", SFTModelConfig(scratch), DataConfig("d"))))["weights"] == 4 * count


def test_dpo_needs_a_reference_only_where_one_is_named_and_then_only_before_the_first_step(model, count):
    base = ReferencedModelConfig(str(model), dtype="float32")
    dpo = DPOConfig("run", base, DataConfig("data.jsonl", max_tokens=64))
    found = parts(predict(dpo, device="cpu"))
    assert found["optimizer"] == 8 * count
    assert found["activations"] > 0
    assert "reference" not in found
    named = predict(replace(dpo, model=replace(base, reference=str(model))), device="cpu")
    assert parts(named)["reference"] == 4 * count
    assert named.peak == predict(dpo, device="cpu").peak


def test_q_learning_holds_a_reference_only_until_its_first_step_and_only_another_model(model, count):
    base = ModelConfig(str(model), dtype="float32")
    config = QLearningConfig("run", base, ScoredConfig("data.jsonl", max_tokens=64))
    alone = predict(config, device="cuda")
    assert "reference" not in parts(alone)  # the policy as it begins is its own
    assert parts(alone)["optimizer"] == 8 * count
    named = predict(replace(config, model=replace(base, reference=str(model))), device="cuda")
    assert parts(named)["reference"] == 4 * count
    assert named.peak - alone.peak <= max(0, 4 * count - parts(alone)["activations"])  # never beside the activations
    separate = predict(replace(config, model=replace(base, critic="separate")), device="cpu")
    assert parts(separate)["optimizer"] > 8 * count


def test_implicit_q_learning_holds_its_heads_and_their_targets(model, count):
    config = QLearningConfig("run", ModelConfig(str(model), dtype="float32"), ScoredConfig("data.jsonl", max_tokens=64))
    alone = predict(config, device="cpu")
    heads = predict(replace(config, qlearning=QLearningSection(loss="ilql")), device="cpu")
    architecture = AutoConfig.from_pretrained(model)
    d, v = architecture.hidden_size, architecture.vocab_size
    first = d * 2 * d + 2 * d
    value, q = first + 2 * d + 1, first + 2 * d * v + v
    assert parts(heads)["Q-learning heads"] == 4 * (value + 4 * q)
    assert parts(heads)["optimizer"] == 8 * (count + value + 2 * q)
    assert parts(heads)["gradients"] == 4 * (count + value + 2 * q)
    assert parts(heads)["activations"] > parts(alone)["activations"]


def test_replicas_hold_all_weights_and_share_the_rows(model, count):
    alone, two = (predict(config(model), device="cpu", ranks=n, shard="replicate") for n in (1, 2))
    for name in ("weights", "gradients", "optimizer", "reference"):
        assert parts(two)[name] == parts(alone)[name]
    assert parts(two)["key-value cache"] == parts(alone)["key-value cache"] / 2  # 8 of 16 responses
    assert parts(two)["activations"] < parts(alone)["activations"] * 0.6  # 4 of 8 rows
    assert parts(two)["gradients being summed"] == 4 * count
    assert parts(two.others)["Python and libraries"] < parts(alone)["Python and libraries"]
    assert not {"copies of the final model", "log and files"} & set(parts(two.others))  # rank 0 alone writes


def test_sharded_a_rank_holds_half_and_beside_it_a_copy_to_sample_from(model, count):
    two = predict(config(model), device="cpu", ranks=2, shard="full")
    found, root = parts(two), 258 * 32 + 32  # the table, tied, and the last norm
    assert {name: found[name] for name in ("weights", "gradients", "optimizer", "reference")} == {
        "weights": 2 * count, "gradients": 2 * count, "optimizer": 4 * count, "reference": 2 * count,
    }  # fmt: skip
    assert found["engine's copy of the policy"] == 4 * count
    assert found["embeddings and head, gathered"] == 4 * root
    layer = (count - root) / 2
    assert found["layers, gathered"] == 4 * 2 * layer
    assert found["gradients in flight"] == 4 * (root + 2 * layer)
    assert (found["copy to write from"], found["moments to write"]) == (4 * count, 8 * count)
    assert not {"copy to write from", "moments to write"} & set(parts(two.others))
    assert two.shard == "full"


def test_beside_a_gpu_what_rank_0_writes_from_is_in_the_hosts_memory(model, count):
    found = predict(config(model), device="cuda", ranks=2, shard="full")
    assert {p.name: p.bytes for p in found.parts if p.phase == "host"} == {
        "copy to write from": 4 * count, "moments to write": 8 * count,
    }  # fmt: skip
    assert found.peak == found.others.peak


def test_models_are_whole_on_every_rank_before_they_are_cut(model, count):
    """So many ranks that nothing is left of the parts: the peak is where policy, reference and copy are whole."""
    found = predict(config(model), device="cuda", ranks=10_000, shard="full")
    always = sum(p.bytes for p in found.parts if p.phase == "always")
    preparing = parts(found)["models before they are cut"]
    assert always + preparing == pytest.approx(3 * 4 * count, rel=0.01)


def test_by_default_only_what_is_large_is_cut(model):
    assert predict(config(model), device="cpu", ranks=2).shard == "replicate"


def test_what_only_knows_replicas_says_so(model):
    base = SFTConfig("run", SFTModelConfig(str(model), dtype="float32"), DataConfig("d", max_tokens=64))
    assert predict(base, device="cpu", ranks=2).shard == "replicate"
    with pytest.raises(ConfigError, match="tether sft keeps all weights on every process"):
        predict(base, device="cpu", ranks=2, shard="full")


def test_the_table_names_every_part_that_matters_and_the_peak():
    memory = Memory("cuda", [Part("weights", 3 * 2**30), Part("tiny", 10), Part("cache", 2**29, "sampling")])
    lines = memory.table().splitlines()
    assert [line.split()[0] for line in lines] == ["weights", "cache", "peak"]
    assert "3.50 GiB" in lines[-1]


def test_sizes_are_named_by_the_unit_that_they_are_counted_in():
    assert [size(n) for n in (5 * 2**10, 7 * 2**20, 3 * 2**29)] == ["5 KiB", "7 MiB", "1.50 GiB"]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("memory_prediction", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_prediction_is_within_a_fifth_of_a_real_runs_peak(bench):
    found = bench.measure("lora")
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.2)


@pytest.mark.slow
def test_so_it_is_for_each_of_two_processes(bench):
    found = bench.measure("narrow", ranks=2, shard="full")
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.2)
    assert found["others_predicted"] == pytest.approx(found["others_measured"], rel=0.2)
