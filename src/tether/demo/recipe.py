"""The three configs of the demo, as a user would write them in YAML for `tether sft`, `tether reward` and `tether ppo`;
each run directory holds its own as config.yaml."""

from __future__ import annotations

from pathlib import Path

from tether.config import (
    CheckpointConfig,
    DataConfig,
    HeldOutConfig,
    InitModelConfig,
    KLConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PairsConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    RewardConfig,
    RewardModelSection,
    RewardSourceConfig,
    SamplingConfig,
    SFTConfig,
    SFTModelConfig,
    SFTSection,
)

MAX_NEW_TOKENS = 48  # the town's longest answers; a clerk who never stops is cut there

ARCHITECTURE = {  # half a million weights: small enough for two CPU cores, large enough for one town
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,  # of 32: vLLM serves no heads of 24
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def sft_config(to: Path, seed: int) -> SFTConfig:
    """Step 2: a language model from random weights, that talks like the town's texts."""
    return SFTConfig(
        run=str(to / "sft"),
        seed=seed,
        model=SFTModelConfig(policy=InitModelConfig(init=ARCHITECTURE, tokenizer=str(to / "tokenizer"))),
        data=DataConfig(path=str(to / "texts.jsonl")),
        sft=SFTSection(epochs=4, batch=32),
        optim=OptimConfig(lr=3e-3, warmup=30),
        checkpoint=CheckpointConfig(every=250),
    )


def reward_config(to: Path, seed: int) -> RewardConfig:
    """Step 4: the same model with a head that says one number, fitted to who was preferred."""
    return RewardConfig(
        run=str(to / "reward"),
        seed=seed,
        model=SFTModelConfig(policy=str(to / "sft" / "final")),
        data=PairsConfig(path=str(to / "pairs.jsonl")),
        # Habits of an answer are learned in some 300 steps, what is true in 300 to 850 (docs/evidence.md). Two passes
        # (660 steps) end in the middle of that, where rounding decides how much was learned.
        reward_model=RewardModelSection(epochs=4, batch=32, microbatch_tokens=1024),
        optim=OptimConfig(lr=1e-3, critic_lr=1e-3, warmup=20),
        checkpoint=CheckpointConfig(every=100),
    )


def ppo_config(to: Path, seed: int) -> PPOConfig:
    """Step 5: improve the model against the reward model, on a leash to where it began."""
    return PPOConfig(
        run=str(to / "ppo"),
        seed=seed,
        model=ModelConfig(policy=str(to / "sft" / "final")),
        prompts=PromptsConfig(path=str(to / "prompts.jsonl")),
        reward=[RewardSourceConfig(model=str(to / "reward" / "final"))],
        sampling=SamplingConfig(max_new_tokens=MAX_NEW_TOKENS),
        ppo=PPOSection(cycles=40, batch=128, responses_per_prompt=2, epochs=2, minibatch=64, kl=KLConfig(coef=0.15)),
        optim=OptimConfig(lr=7e-4, critic_lr=2e-3, warmup=16),
        log=LogConfig(rollouts_every=10),
        checkpoint=CheckpointConfig(every=20),
        evaluate=HeldOutConfig(every=10, prompts=str(to / "held_out.jsonl"), samples=2),
    )
