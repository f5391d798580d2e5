"""The newest TRL's RLOOTrainer in the race of bench/race.py."""

import json
import sys
import tempfile

import torch
from copies import Copies
from datasets import Dataset
from sentiment import sentiment
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig, RLOOTrainer


def reward(completions, **_):
    return sentiment(completions)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(job["model"])
    steps = job["cycles"] * job["iterations"]
    with tempfile.TemporaryDirectory() as folder:
        config = RLOOConfig(
            output_dir=folder, per_device_train_batch_size=job["batch"], num_generations=job["generations"],
            num_iterations=job["iterations"], max_completion_length=job["new"], max_steps=steps, beta=job["beta"],
            learning_rate=job["lr"], temperature=1.0, report_to=[], disable_tqdm=True, save_strategy="no",
            use_cpu=True, bf16=False, gradient_checkpointing=False, seed=job["seed"], logging_steps=10**9,
        )  # fmt: skip
        trainer = RLOOTrainer(
            model=policy, reward_funcs=reward, args=config, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": job["prompts"]}),
            callbacks=[Copies(job["every"] * job["iterations"], job["to"])],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
