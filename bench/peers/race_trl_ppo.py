"""TRL 1.12's PPOTrainer in the race of bench/race.py: the reward function dressed as the model that it asks for."""

import json
import sys
import tempfile
from types import SimpleNamespace

import torch
from copies import Copies
from datasets import Dataset
from sentiment import sentiment
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer


class SentimentModel(torch.nn.Module):
    """Looks like a reward model to TRL: `score(backbone(ids).hidden_states[-1])` [B, T, 1]. It reads the response."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer, prompt_width: int) -> None:
        super().__init__()
        self.tokenizer, self.width = tokenizer, prompt_width

    def backbone(self, input_ids, **_):
        return SimpleNamespace(hidden_states=[input_ids])

    def score(self, ids):
        texts = self.tokenizer.batch_decode(ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor(sentiment(texts))[:, None, None].expand(*ids.shape, 1).clone()


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.manual_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"]) for _ in range(2))
    value = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(job["model"], num_labels=1))
    value.base_model.load_state_dict(policy.base_model.state_dict())
    torch.nn.init.zeros_(value.score.weight)
    ids = tokenizer(job["prompts"], padding=True)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, per_device_train_batch_size=job["batch"], num_mini_batches=job["minibatches"],
            num_ppo_epochs=job["epochs"], total_episodes=job["batch"] * job["cycles"], response_length=job["new"],
            temperature=1.0, local_rollout_forward_batch_size=job["batch"], num_sample_generations=0, report_to=[],
            disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
            learning_rate=job["lr"], lam=job["lam"], kl_coef=job["beta"], stop_token="eos", seed=job["seed"],
            logging_steps=10**9,
        )  # fmt: skip
        trainer = PPOTrainer(
            config, processing_class=tokenizer, model=policy, ref_model=reference,
            reward_model=SentimentModel(tokenizer, len(ids[0])), value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": ids * (1 + job["batch"] // len(ids))}),
            callbacks=[Copies(job["every"], job["to"])],
        )  # fmt: skip
        trainer.train()


if __name__ == "__main__":
    main()
