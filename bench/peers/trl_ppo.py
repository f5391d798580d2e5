"""TRL 1.12's PPOTrainer as its users run it: policy, reference, reward model and value model, four of them.

One cycle each time it is told to (see bench/peer.py).
"""

import json
import sys
import tempfile

import torch
from datasets import Dataset
from told import WaitToBeTold
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


def main() -> None:
    job = json.loads(sys.argv[1])
    dtype, batch = getattr(torch, job["dtype"]), len(job["prompts"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(job["reward"], num_labels=1, dtype=dtype) for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, per_device_train_batch_size=batch, num_mini_batches=job["minibatches"],
            num_ppo_epochs=job["epochs"], total_episodes=batch * 1000, response_length=job["new"], temperature=1.0,
            local_rollout_forward_batch_size=batch, num_sample_generations=0, report_to=[], disable_tqdm=True,
            save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False, logging_steps=10**9,
            learning_rate=1e-5,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
            value_model=value, train_dataset=Dataset.from_dict({"input_ids": job["prompts"]}),
            callbacks=[WaitToBeTold(batch * job["new"])],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
