"""The model card of a final directory, filled from the run itself."""

from __future__ import annotations

from tether.config import PPOConfig
from tether.runs import Run


def ppo_card(run: Run, config: PPOConfig) -> str:
    """A model card: what was trained, on what, how far it moved, and which evaluated cycle was the best."""
    metrics = run.metrics
    first, last = metrics[0], metrics[-1]
    evaluated = [m for m in metrics if m.get("eval/score_mean") is not None]
    lines = [
        "---",
        f"base_model: {config.model.policy}",
        "library_name: transformers",
        "tags: [tether, ppo, rlhf]",
        "---",
        "",
        f"# {run.path.name}",
        "",
        f"Trained with PPO by Tether from `{config.model.policy}`.",
        f"This is the policy of the last cycle, {last['cycle']}.",
        "",
        "| | first cycle | last cycle |",
        "|---|---|---|",
    ]
    for label, name in (
        ("score", "reward/score_mean"), ("KL to the reference, nats a response", "kl/ref_mean"),
        ("entropy, nats a token", "policy/entropy"), ("length, tokens", "response/length_mean"),
        ("cut at the limit, share", "response/truncated_fraction"),
    ):  # fmt: skip
        lines.append(f"| {label} | {first[name]:.4g} | {last[name]:.4g} |")
    if evaluated:
        best = max(evaluated, key=lambda m: m["eval/score_mean"])
        lines += ["", f"Best on the held-out prompts: cycle {best['cycle']} (score {best['eval/score_mean']:.4g}); "
                      f"the last one scores {evaluated[-1]['eval/score_mean']:.4g}."]  # fmt: skip
    lines += [
        "",
        f"Prompts: `{config.prompts.path}`. {config.ppo.cycles} cycles of {config.ppo.batch} responses, seed {config.seed}.",
        f"Sampled at temperature {config.sampling.temperature:g}, at most {config.sampling.max_new_tokens} new tokens; "
        "generation_config.json says the same.",
        "",
        "A score is what the reward sources say, not what people would: look at samples before you trust it.",
        "",
    ]
    return "\n".join(lines)
