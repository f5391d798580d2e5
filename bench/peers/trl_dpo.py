"""The newest TRL's DPOTrainer as its users run it. One optimizer step each time it is told to (see bench/peer.py)."""

import json
import sys
import tempfile

import torch
from datasets import Dataset
from told import WaitToBeTold
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def main() -> None:
    job = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in job["pairs"]]
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder, per_device_train_batch_size=len(rows), gradient_accumulation_steps=1, max_steps=1000,
            learning_rate=1e-12, beta=0.1, precompute_ref_log_probs=job["precompute"], max_length=None, report_to=[],
            disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
            logging_steps=10**9,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model, args=config, processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
            callbacks=[WaitToBeTold(job["tokens"])],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
