"""The model card of a final directory, filled from the run itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tether.config import DPOConfig, InitModelConfig, PPOConfig, QLearningConfig, RewardConfig, SFTConfig
from tether.runs import Run

_MOVED = {
    "reward/score_mean": "score",
    "kl/ref_mean": "KL to the reference, nats per response",
    "policy/entropy": "entropy, nats per token",
    "response/length_mean": "length, tokens",
    "response/truncated_fraction": "cut at the limit, share",
}


def ppo_card(
    name: str, metrics: Sequence[dict[str, Any]], config: PPOConfig, which: str, best: dict[str, Any] | None = None
) -> str:
    """A model card: what was trained, on what, how far it moved, and which evaluated cycle was the best.

    name: of the run. metrics: up to the cycle that the model is of. which: whose policy it is.
    best: what `Run.best` says.
    """
    first, last, s = metrics[0], metrics[-1], config.sampling
    table = [f"| | cycle {first['cycle']} | cycle {last['cycle']} |", "|---|---|---|"]
    table += [f"| {label} | {_shown(first[key])} | {_shown(last[key])} |" for key, label in _MOVED.items()]
    evaluated = [m["eval/score_mean"] for m in metrics if m.get("eval/score_mean") is not None]
    done = f"{last['cycle']} of " if last["cycle"] < config.ppo.cycles else ""
    compared = []
    if best and evaluated:
        compared.append(
            f"Best on the held-out prompts{' by gold' if 'gold' in best else ''}: cycle {best['cycle']} "
            f"(score {best['score']:.4g}), kept in the "
            f"run's `best/`; the last one scores {evaluated[-1]:.4g}."
        )
    return _card(
        name,
        config.model.policy,
        "ppo, rlhf",
        f"Trained with PPO by Tether from `{config.model.policy}`.\nThis is the policy of {which}.",
        "\n".join(table),
        *compared,
        f"Prompts: `{config.prompts.path}`. {done}{config.ppo.cycles} cycles of {config.ppo.batch} responses, "
        f"seed {config.seed}.\nSampled at temperature {s.temperature:g}, at most {s.max_new_tokens} new tokens; "
        "generation_config.json says the same.",
        "A score is what the reward sources say, not what people would: look at samples before you trust it.",
    )


def sft_card(run: Run, config: SFTConfig) -> str:
    """A model card: what was imitated, and how the loss fell."""
    metrics, policy = run.metrics, config.model.policy
    return _card(
        run.path.name,
        policy,
        "sft",
        f"Supervised fine-tuning by Tether from {_start(policy)} on `{config.data.path}`: epochs {config.sft.epochs}, "
        f"{len(metrics)} optimizer steps, seed {config.seed}.",
        f"Loss, nats per token: {_shown(metrics[0]['loss'])} before the first step, {_shown(metrics[-1]['loss'])} "
        "before the last.",
    )


def reward_card(run: Run, config: RewardConfig, report: str) -> str:
    """A model card: what the reward model learned, as its own report says, and how to read its scores."""
    return _card(
        run.path.name,
        config.model.policy,
        "reward-model",
        f"A reward model fitted by Tether from {_start(config.model.policy)} to the preferences in "
        f"`{config.data.path}`, seed {config.seed}.",
        report,
        "The score is read at the last token, stop token included. Plain transformers gives it raw; normalized it is "
        "(raw - tether_reward_mean) / tether_reward_std, both in config.json.",
        "It says what the people who labeled these pairs would prefer among answers like theirs, and nothing about "
        "others.",
    )


def dpo_card(run: Run, config: DPOConfig, report: str) -> str:
    """A model card: what the policy learned to prefer, as its own report says, and how far its answers moved."""
    last, section = run.metrics[-1], config.dpo
    against = f", against `{config.model.reference}`" if config.model.reference else ""
    return _card(
        run.path.name,
        config.model.policy,
        "dpo, rlhf",
        f"Trained by Tether from `{config.model.policy}` on the preferences in `{config.data.path}`{against}: loss "
        f"{section.loss}, β {section.beta:g}, epochs {section.epochs}, {len(run.metrics)} optimizer steps, seed "
        f"{config.seed}.",
        f"Its implicit reward, judged as a reward model would be:\n\n{report}",
        f"Log-ratio to the reference before the last step, nats per token: chosen answers "
        f"{_shown(last['dpo/chosen_logratio'])}, rejected {_shown(last['dpo/rejected_logratio'])}.",
        "It has learned what the people who labeled these pairs prefer among answers like theirs: look at samples "
        "before you trust it.",
    )


def qlearning_card(run: Run, config: QLearningConfig) -> str:
    """A model card: what it learned from, how far the residual fell, and what its optimum would be, if it has one."""
    metrics, section = run.metrics, config.qlearning
    residual = [_shown(m["qlearning/residual"]) for m in (metrics[0], metrics[-1])]
    if section.loss == "ilql":
        s = section.ilql
        learned = [
            f"Residual of Q, reward units: {residual[0]} before the first step, {residual[1]} before the last.",
            "The files here are a language model that imitates the data. What was learned of the scores is in "
            f"`ilql/`: heads that add {s.strength:g}·(min Q̄ − V) to the log-probs of "
            f"{f'the {s.top_k} likeliest tokens' if s.top_k else 'all tokens'}. `tether generate` and "
            "`tether evaluate` sample so; transformers and vLLM know the language model alone.",
        ]
    else:
        learned = [
            f"Residual, reward units: {residual[0]} before the first step, {residual[1]} before the last. At 0 this "
            f"would be the best policy for the score less {section.beta:g} per nat of KL to the reference, and "
            "`critic/` its value.",
        ]
    return _card(
        run.path.name,
        config.model.policy,
        "qlearning, rlhf",
        f"Trained by Q-learning ({section.loss}) with Tether from `{config.model.policy}` on the scored answers of "
        f"{', '.join(f'`{path}`' for path in config.data.paths)}: epochs {section.epochs}, {len(metrics)} optimizer "
        f"steps, seed {config.seed}.",
        *learned,
        "It has been told the scores of answers in the data, and of no others: look at samples before you trust it.",
    )


def _card(name: str, policy: str | InitModelConfig, tags: str, *paragraphs: str) -> str:
    base = "" if isinstance(policy, InitModelConfig) else f"base_model: {policy}\n"
    front = f"---\n{base}library_name: transformers\ntags: [tether, {tags}]\n---"
    return "\n\n".join([front, f"# {name}", *paragraphs]) + "\n"


def _start(policy: str | InitModelConfig) -> str:
    return "random weights" if isinstance(policy, InitModelConfig) else f"`{policy}`"


def _shown(value: float | None) -> str:
    """A metric in few digits; null in the run is what was not known, or not finite."""
    return "–" if value is None else f"{value:.4g}"
