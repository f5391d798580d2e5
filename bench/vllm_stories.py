"""The stories of examples/stories, sampled by the local engine and by vLLM: do both reach the same?

stories260K has heads of 8 dimensions, and vLLM on a CPU serves 32 or more. So the run begins with the same function in
heads of 32: the pair of dimensions i of 8 becomes the pair 4i of 32, which rotary embeddings turn as fast, the others
are 0 and stay 0 (each one's gradient is a multiple of another that is 0), and queries are doubled since scores are now
divided by √32.

    bench/peers/setup.sh vllm
    python bench/vllm_stories.py --model DIR [--seeds 0 1 2] [--cycles 42] [--engines local vllm]

The seeds of both engines are the same numbers, and their tokens are not: what is compared are ranges.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import tether
from tether.config import VLLMConfig

ROOT = Path(__file__).resolve().parent.parent
PYTHON = ROOT / ".peers" / "vllm" / "bin" / "python"
HEAD = 32


def widen_heads(source: str, target: Path) -> None:
    """The Llama in `source` as one with heads of 32 dimensions that gives the same logits."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = model.config.to_dict() | {"head_dim": HEAD}
    wide = LlamaForCausalLM(LlamaConfig(**config))
    heads, kept, size = config["num_attention_heads"], config["num_key_value_heads"], model.config.head_dim
    spread, half = HEAD // size, torch.arange(size // 2)
    places = torch.cat([half * spread, half * spread + HEAD // 2])  # of the old dimensions in a new head
    state = model.state_dict()
    for name, tensor in state.items():
        layer = name.split(".")[-2]
        if layer in ("q_proj", "k_proj", "v_proj"):
            count = heads if layer == "q_proj" else kept
            new = torch.zeros(count, HEAD, tensor.shape[1])
            new[:, places] = tensor.view(count, size, -1) * ((HEAD / size) ** 0.5 if layer == "q_proj" else 1)
            state[name] = new.flatten(0, 1)
        elif layer == "o_proj":
            new = torch.zeros(tensor.shape[0], heads, HEAD)
            new[..., places] = tensor.view(-1, heads, size)
            state[name] = new.flatten(1)
    wide.load_state_dict(state)
    tokens = torch.arange(64)[None] * 7 % config["vocab_size"]
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, wide(tokens).logits, atol=1e-4)
    wide.generation_config = model.generation_config
    wide.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="directory of stories260K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cycles", type=int, help="fewer than the example's, to try it")
    parser.add_argument("--engines", nargs="+", choices=["local", "vllm"], default=["local", "vllm"])
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model = Path(args.model).resolve()
    os.chdir(ROOT / "examples" / "stories")
    config = tether.load_config("ppo.yaml")
    ppo = replace(config.ppo, cycles=args.cycles or config.ppo.cycles)
    print("engine  seed  score before  after    KL  sampler gap  minutes")
    with tempfile.TemporaryDirectory() as folder:
        widen_heads(str(model), Path(folder) / "model")
        for engine in args.engines:
            for seed in args.seeds:
                vllm = VLLMConfig(str(PYTHON)) if engine == "vllm" else VLLMConfig()
                began = time.monotonic()
                run = tether.ppo(
                    replace(
                        config, run=f"{folder}/{engine}-{seed}", seed=seed, ppo=ppo,
                        model=replace(config.model, policy=f"{folder}/model"),
                        sampling=replace(config.sampling, engine=engine, vllm=vllm),
                    )
                )  # fmt: skip
                first, last = run.metrics[0], run.metrics[-1]
                gap = max(line["check/sampler_gap"] for line in run.metrics)
                row = f"{first['reward/score_mean']:12.3f}  {last['eval/score_mean']:5.3f}  {last['kl/ref_mean']:4.1f}"
                minutes = (time.monotonic() - began) / 60
                print(f"{engine:6}  {seed:4}  {row}  {gap:11.1e}  {minutes:7.1f}", flush=True)


if __name__ == "__main__":
    main()
