"""docs/metrics.md, what every number of metrics.jsonl means: `python -m tether.reports.metrics > docs/metrics.md`."""

from __future__ import annotations

from tether.config.kinds import KINDS
from tether.reports.curves import DPO, PPO, QLEARNING, REWARD, SFT

_CURVES = {"ppo": PPO, "sft": SFT, "reward": REWARD, "dpo": DPO, "qlearning": QLEARNING}
_OF_ALL = {
    "optim/lr": "Learning rate of the step.",
    "optim/grad_norm": "Norm of the gradient before clipping.",
    "optim/skipped_steps": "Optimizer steps that were skipped, because the gradient was not finite.",
    "time/update_s": "Seconds for the update.",
}
_SPEED = {"tokens_per_s/update": "Tokens per second that the update was trained on."}
_OTHERS = {  # command -> what has no curve of its own
    "ppo": {
        "reward/score_std": "Standard deviation of a cycle's scores.",
        "reward/score_min": "Lowest score.",
        "reward/score_max": "Highest score.",
        "reward/SOURCE_mean": "Mean answer of one reward source, before its weight and before clipping.",
        "reward/SOURCE_missing": "Responses to which an optional source gave no answer.",
        "reward/SOURCE_disagreement": "Of an ensemble: mean over responses of the deviation of its members' scores.",
        "reward/total_mean": "Mean over responses of the sum of per-token rewards: the score less what the KL cost.",
        "kl/ref_per_token": "KL to the reference, nats per token.",
        "policy/loss": "The clipped surrogate, as it is minimized, in units of the advantage.",
        "policy/ratio_mean": "Mean ratio of new to old probability of a token.",
        "policy/ratio_min": "Smallest ratio.",
        "policy/ratio_max": "Largest ratio.",
        "value/clip_fraction": "Share of tokens whose value the update wanted to change by more than the value clip.",
        "advantage/mean": "Mean advantage over tokens, before whitening, in reward units.",
        "advantage/std": "Standard deviation of the advantages, before whitening.",
        "advantage/dead_groups": "Prompts whose responses are all worth the same: they teach nothing. Of "
        "`ppo.advantage: group`.",
        "response/length_min": "Tokens of the shortest response.",
        "response/length_max": "Tokens of the longest response.",
        "response/distinct_2": "Different pairs of neighboring tokens over all pairs: it falls as answers repeat.",
        "check/first_ratio_error": "Mean |ratio - 1| over the first minibatch of a cycle: 0 but for rounding.",
        "check/sampler_gap": "Mean |log-probability of the trainer - of the sampler|, nats per token.",
        "check/truncated_mass": "Mean probability that top-k and top-p cut off.",
        "tokens/generated": "Tokens sampled in the cycle.",
        "ahead/kl": "KL(sampler‖policy), nats per token, of responses sampled one update before (`ppo.ahead: 1`).",
        "ahead/weight_mean": "Mean importance weight of their tokens: near 1.",
        "ahead/capped_fraction": "Share of their tokens whose weight is cut at `ppo.ahead_cap`.",
        "time/ahead_s": "Seconds that the update's end had to wait for the next cycle's responses.",
        "tokens_per_s/rollout": "Tokens sampled per second; none where they were sampled ahead.",
        "time/rollout_s": "Seconds for sampling.",
        "time/score_s": "Seconds of the reward sources; of other machines, which are asked before `time/forward_s`, "
        "what is left to wait for.",
        "time/forward_s": "Seconds for log-probabilities and values of what was sampled.",
        "optim/steps": "Optimizer steps made in the cycle, where `ppo.stop_epoch_at_kl` may end it early.",
        "memory/peak_mb": "Peak memory, MiB: what torch had on the GPU, or the process on a CPU.",
        "eval/*": "The same of the held-out prompts, where a cycle was evaluated: `score_*`, `total_mean`, "
        "`reward/SOURCE_mean`, `reward/SOURCE_disagreement`, `kl_ref_mean`, `length_mean`, `truncated_fraction`, "
        "`explained_variance`; and `gold/SOURCE_mean` of each source of `evaluate.gold`.",
        **_SPEED,
    },
    "sft": {"tokens/trained": "Tokens of the examples that the step was trained on.", **_SPEED},
    "reward": {},
    "dpo": {
        "dpo/chosen_logprob": "Log-probability of chosen (or good) answers, nats per token.",
        "dpo/rejected_logprob": "The same of rejected (or bad) answers.",
        "dpo/level": "Of unpaired: mean over a step's answers of V, the learned level of their prompts, in log-odds.",
        "dpo/kl": "Of kto: the point of reference z, from answers to other prompts, nats per answer; per token under "
        "`dpo.average`.",
        "tokens/trained": "Tokens of the answers that the step was trained on.",
        **_SPEED,
    },
    "qlearning": {
        "qlearning/loss": "What is minimized. bellman: half the mean squared residual. ilql: the squared residuals of "
        "both Q, V's expectile, and the two cross-entropies by their weights.",
        "qlearning/expectile_loss": "Of ilql: the loss of V, against the smaller of the two target Q.",
        "qlearning/cql_loss": "Of ilql: cross-entropy of the softmax of both Q at the data's tokens, nats per token, "
        "summed over the two.",
        "tokens/trained": "Tokens of the answers that the step was trained on.",
        **_SPEED,
    },
}


def page() -> str:
    """The page as Markdown: one table a command, the curves of the report first."""
    parts = [
        "# Metrics\n\nWhat the numbers of `metrics.jsonl` mean, one line a cycle (PPO) or step. What is not finite is "
        "null. Written by `python -m tether.reports.metrics > docs/metrics.md`; healthy ranges and remedies are in "
        "[algorithm.md](algorithm.md).\n"
    ]
    for command, curves in _CURVES.items():
        rows = {curve.metric: f"**{curve.title}.** {curve.says}" for curve in curves}
        rows |= {metric: text for metric, text in (_OTHERS[command] | _OF_ALL).items() if metric not in rows}
        cells = ((metric, text.replace("|", r"\|")) for metric, text in rows.items())
        table = "".join(f"| `{metric}` | {text} |\n" for metric, text in cells)
        parts.append(f"\n## {KINDS[command].heading}, `tether {command}`\n\n| metric | meaning |\n|---|---|\n{table}")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
