"""The three configs of the demo, as a user would write them in YAML for `tether sft`, `tether reward` and `tether ppo`;
each run directory holds its own as config.yaml."""

from __future__ import annotations

from pathlib import Path

from tether import config

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


def sft_config(to: Path, seed: int) -> config.SFTConfig:
    """Step 2: a language model from random weights, that talks like the town's texts."""
    return config.SFTConfig(
        run=str(to / "sft"),
        seed=seed,
        model=config.SFTModelConfig(policy=config.InitModelConfig(init=ARCHITECTURE, tokenizer=str(to / "tokenizer"))),
        data=config.DataConfig(path=str(to / "texts.jsonl")),
        sft=config.SFTSection(epochs=4, batch=32),
        optim=config.OptimConfig(lr=3e-3, warmup=30),
        checkpoint=config.CheckpointConfig(every=250),
    )


def reward_config(to: Path, seed: int) -> config.RewardConfig:
    """Step 4: the same model with a head that says one number, fitted to who was preferred."""
    return config.RewardConfig(
        run=str(to / "reward"),
        seed=seed,
        model=config.SFTModelConfig(policy=str(to / "sft" / "final")),
        data=config.PairsConfig(path=str(to / "pairs.jsonl")),
        # Habits of an answer are learned in some 300 steps, what is true in 300 to 850 (docs/evidence.md). Two passes
        # (660 steps) end in the middle of that, where rounding decides how much was learned.
        reward_model=config.RewardModelSection(epochs=4, batch=32, microbatch_tokens=1024),
        optim=config.OptimConfig(lr=1e-3, critic_lr=1e-3, warmup=20),
        checkpoint=config.CheckpointConfig(every=100),
    )


def ppo_config(to: Path, seed: int) -> config.PPOConfig:
    """Step 5: improve the model against the reward model, on a leash to where it began."""
    return config.PPOConfig(
        run=str(to / "ppo"),
        seed=seed,
        model=config.ModelConfig(policy=str(to / "sft" / "final")),
        prompts=config.PromptsConfig(path=str(to / "prompts.jsonl")),
        reward=[config.RewardSourceConfig(model=str(to / "reward" / "final"))],
        sampling=config.SamplingConfig(max_new_tokens=MAX_NEW_TOKENS),
        ppo=config.PPOSection(
            cycles=40, batch=128, responses_per_prompt=2, epochs=2, minibatch=64, kl=config.KLConfig(coef=0.15)
        ),
        optim=config.OptimConfig(lr=7e-4, critic_lr=2e-3, warmup=16),
        log=config.LogConfig(rollouts_every=10),
        checkpoint=config.CheckpointConfig(every=20),
        evaluate=config.HeldOutConfig(every=10, prompts=str(to / "held_out.jsonl"), samples=2),
    )
