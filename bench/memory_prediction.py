"""Is the peak memory that `--dry-run` and `tether doctor` predict the peak that a run then has?

Each case is a real PPO run of two cycles in a process of its own, on a Llama of random weights; measured is the largest
resident set that the process ever had, from its imports to its export. Predicted is `tether.diagnose.memory.predict`,
made in this process from the config alone.

    python bench/memory_prediction.py             all cases: about ten minutes on two cores
    python bench/memory_prediction.py wide lora   some of them
    python bench/memory_prediction.py --ranks 2   the same on two processes, for either layout: a row for the first and
                                                  one for the largest of the others
    python bench/memory_prediction.py --json …    the same for a program

Linux, CPU. On a GPU the same parts are predicted; there torch's own counter is what `memory/peak_mb` reports.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tether.config import (
    DistributedConfig,
    HeldOutConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    SamplingConfig,
)

PROMPT = "Tell me about number {:03d}, please."  # a token a byte: 34 tokens


# (width, layers, vocabulary), (batch, minibatch, new tokens), changes to the model's config
CASES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int], dict[str, Any]]] = {
    "tiny": ((64, 2, 300), (16, 8, 32), {}),
    "narrow": ((256, 4, 2_000), (16, 8, 48), {}),
    "long": ((256, 4, 2_000), (16, 16, 400), {}),
    "wide": ((512, 8, 32_000), (8, 4, 24), {}),
    "wide, more tokens": ((512, 8, 32_000), (16, 8, 64), {}),
    "checkpointing": ((512, 8, 32_000), (16, 8, 64), {"gradient_checkpointing": True}),
    "lora": ((512, 8, 32_000), (8, 4, 24), {"lora": LoraConfig()}),
    "separate critic": ((512, 8, 32_000), (8, 4, 24), {"critic": "separate"}),
    "bfloat16": ((512, 8, 32_000), (8, 4, 24), {"dtype": "bfloat16"}),
    "wider": ((768, 8, 32_000), (4, 4, 24), {}),
}


def config(name: str, work: Path, shard: str = "replicate") -> PPOConfig:
    """The case's config; its model and prompts are in `work`."""
    _, (batch, minibatch, new), changes = CASES[name]
    return PPOConfig(
        run=str(work / "run"),
        model=replace(ModelConfig(policy=str(work / "model"), dtype="float32"), **changes),
        prompts=PromptsConfig(str(work / "prompts.jsonl")),
        sampling=SamplingConfig(max_new_tokens=new, stop_token_ids=[]),
        ppo=PPOSection(cycles=2, batch=batch, minibatch=minibatch, epochs=1),
        evaluate=HeldOutConfig(every=0),
        distributed=DistributedConfig(shard=shard),
    )


def prepare(name: str, work: Path) -> None:
    """Write a random model with a tokenizer of bytes, and prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    (width, layers, vocabulary), _, _ = CASES[name]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<eos>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(work / "model")
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=2048,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(work / "model")
    lines = (json.dumps({"prompt": PROMPT.format(i)}) + "\n" for i in range(100))
    (work / "prompts.jsonl").write_text("".join(lines))


def train(name: str, work: Path, shard: str) -> None:
    """The child: a run, and then the peak of this process in bytes, in a file."""
    import tether
    from peers.peak import peak_mb

    tether.ppo(config(name, work, shard), reward=lambda prompts, completions, completion_ids: [0.0] * len(prompts))
    (work / f"peak.{os.environ.get('RANK', 0)}").write_text(str(peak_mb() * 2**20))


def measure(name: str, ranks: int = 1, shard: str = "replicate") -> dict[str, Any]:
    """Predict and run one case: bytes, of rank 0 and of the largest of the others."""
    from tether.diagnose.memory import predict

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, __file__, "--prepare", folder, name], check=True, capture_output=True)
        memory = predict(config(name, work, shard), prompt_tokens=len(PROMPT.format(0)), ranks=ranks)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", "localhost:0"]  # fmt: skip
        command = [
            sys.executable,
            *(torchrun if ranks > 1 else []),
            __file__,
            "--child",
            folder,
            "--shard",
            shard,
            name,
        ]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            raise SystemExit(child.stderr)
        first, *others = (int((work / f"peak.{rank}").read_text()) for rank in range(ranks))
    parts = {part.name.strip(): part.bytes for part in memory.parts}
    found = {"case": name, "predicted": memory.peak, "measured": first, "parts": parts}
    if ranks == 1:
        return found
    return found | {"shard": shard, "others_predicted": memory.others.peak, "others_measured": max(others)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--ranks", metavar="N", type=int, default=1, help="processes, by torchrun (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--prepare", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard", default="replicate", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no case {unknown.pop()!r}; there are {', '.join(CASES)}")
    if args.prepare:
        prepare(args.cases[0], args.prepare)
        return
    if args.child:
        train(args.cases[0], args.child, args.shard)
        return
    if not args.json:
        print(f"{'case':<40}{'predicted':>12}{'measured':>12}{'off by':>9}")
    for name in args.cases or CASES:
        for shard in ("replicate", "full")[: 1 if args.ranks == 1 else 2]:
            found = measure(name, args.ranks, shard)
            if args.json:
                print(json.dumps(found), flush=True)
                continue
            show(name if args.ranks == 1 else f"{name}, {shard}, rank 0", found["predicted"], found["measured"])
            if args.ranks > 1:
                show(f"{name}, {shard}, others", found["others_predicted"], found["others_measured"])


def show(what: str, predicted: int, measured: int) -> None:
    print(
        f"{what:<40}{predicted / 2**20:>9,.0f} MiB{measured / 2**20:>9,.0f} MiB{predicted / measured - 1:>+9.1%}",
        flush=True,
    )


if __name__ == "__main__":
    main()
