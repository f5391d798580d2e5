"""The model card of a final directory, filled from the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tether.config import InitModelConfig, PPOConfig, RewardConfig, SFTConfig
from tether.runs import Run


def ppo_card(
    name: str, metrics: Sequence[dict[str, Any]], config: PPOConfig, which: str, best: dict[str, Any] | None = None
) -> str:
    """A model card: what was trained, on what, how far it moved, and which evaluated cycle was the best.

    name: of the run. metrics: up to the cycle that the model is of. which: whose policy it is.
    best: what `Run.best` says.
    """
    first, last = metrics[0], metrics[-1]
    evaluated = [m for m in metrics if m.get("eval/score_mean") is not None]
    lines = [
        "---",
        f"base_model: {config.model.policy}",
        "library_name: transformers",
        "tags: [tether, ppo, rlhf]",
        "---",
        "",
        f"# {name}",
        "",
        f"Trained with PPO by Tether from `{config.model.policy}`.",
        f"This is the policy of {which}.",
        "",
        f"| | cycle {first['cycle']} | cycle {last['cycle']} |",
        "|---|---|---|",
    ]
    for label, metric in (
        ("score", "reward/score_mean"), ("KL to the reference, nats per response", "kl/ref_mean"),
        ("entropy, nats per token", "policy/entropy"), ("length, tokens", "response/length_mean"),
        ("cut at the limit, share", "response/truncated_fraction"),
    ):  # fmt: skip
        lines.append(f"| {label} | {_shown(first[metric])} | {_shown(last[metric])} |")
    if best and evaluated:
        lines += ["", f"Best on the held-out prompts: cycle {best['cycle']} (score {best['score']:.4g}), kept in the "
                      f"run's `best/`; the last one scores {evaluated[-1]['eval/score_mean']:.4g}."]  # fmt: skip
    lines += [
        "",
        f"Prompts: `{config.prompts.path}`. {config.ppo.cycles} cycles of {config.ppo.batch} responses, "
        f"seed {config.seed}.",
        f"Sampled at temperature {config.sampling.temperature:g}, at most {config.sampling.max_new_tokens} new tokens; "
        "generation_config.json says the same.",
        "",
        "A score is what the reward sources say, not what people would: look at samples before you trust it.",
        "",
    ]
    return "\n".join(lines)


def sft_card(run: Run, config: SFTConfig) -> str:
    """A model card: what was imitated, and how the loss fell."""
    metrics, policy = run.metrics, config.model.policy
    scratch = isinstance(policy, InitModelConfig)
    start = "random weights" if isinstance(policy, InitModelConfig) else f"`{policy}`"
    lines = [
        "---",
        *([] if scratch else [f"base_model: {policy}"]),
        "library_name: transformers",
        "tags: [tether, sft]",
        "---",
        "",
        f"# {run.path.name}",
        "",
        f"Supervised fine-tuning by Tether from {start} on `{config.data.path}`: {config.sft.epochs} epochs, "
        f"{len(metrics)} optimizer steps, seed {config.seed}.",
        "",
        f"Loss, nats per token: {_shown(metrics[0]['loss'])} before the first step, {_shown(metrics[-1]['loss'])} "
        "before the last.",
        "",
    ]
    return "\n".join(lines)


def reward_card(run: Run, config: RewardConfig, report: str) -> str:
    """A model card: what the reward model learned, as its own report says, and how to read its scores."""
    policy = config.model.policy
    start = "random weights" if isinstance(policy, InitModelConfig) else f"`{policy}`"
    lines = [
        "---",
        *([] if isinstance(policy, InitModelConfig) else [f"base_model: {policy}"]),
        "library_name: transformers",
        "tags: [tether, reward-model]",
        "---",
        "",
        f"# {run.path.name}",
        "",
        f"A reward model fitted by Tether from {start} to the preferences in `{config.data.path}`, seed {config.seed}.",
        "",
        report,
        "",
        "The score is read at the last token, stop token included. Plain transformers gives it raw; normalized it is "
        "(raw - tether_reward_mean) / tether_reward_std, both in config.json.",
        "",
        "It says what the people who labeled these pairs would prefer among answers like theirs, and nothing about "
        "others.",
        "",
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    """A metric in few digits; one that was not finite is null in the run."""
    return "not finite" if value is None else f"{value:.4g}"
