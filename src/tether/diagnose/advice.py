"""What every alarm means, what it usually comes from, and which key to turn: said once.

The rules (`tether.diagnose.rules`) take cause and remedy from here, the studio's notes under a curve and the table in
docs/guide.md are made from it (`python -m tether.diagnose.advice` prints the table).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Advice:
    """The text of one alarm, or of one case of it (`negative-kl/truncated`)."""

    metric: str | None  # the curve that it shows in; None if in none
    meaning: str  # what the alarm says, for the table of the guide; empty for a case of an alarm
    cause: str  # what it likely comes from
    remedy: str  # the config key to turn, and in which direction


_DTYPE = "Set model.dtype to float32. If it stays, please report it."

ADVICE: dict[str, Advice] = {
    "not-finite": Advice(
        None, "a loss is NaN or infinite",
        "A learning rate that is too high, a score or an example that is extreme, or an overflow in the compute dtype.",
        "Lower optim.lr, or set model.dtype to float32; bound a run's scores with reward_shaping.clip.",
    ),
    "not-finite/critic": Advice(
        "value/loss", "", "The critic's values or returns overflow.",
        "Lower optim.critic_lr, or bound the scores with reward_shaping.clip.",
    ),
    "skipped-steps": Advice(
        "optim/skipped_steps", "gradients were not finite; the weights stayed as they were",
        "An extreme score or example, a learning rate that is too high, or an overflow in the compute dtype.",
        "Lower optim.lr, or set model.dtype to float32.",
    ),
    "first-ratio": Advice(
        "check/first_ratio_error", "old and new policy differ before anything is learned: two arithmetics",
        "Old and new log-probs come from different arithmetic: a kernel that depends on the shape of its batch, "
        "dropout in a module of the model's own, or a fault in the mask or the temperature.",
        _DTYPE,
    ),
    "sampler-gap": Advice(
        "check/sampler_gap", "sampler and trainer disagree on the same tokens",
        "The engine has other weights, another temperature or another position of the tokens than the trainer; or an "
        "architecture whose cache loses precision.",
        _DTYPE,
    ),
    "negative-kl": Advice(
        "kl/ref_mean", "the KL to the reference is below 0, so the samples are not the policy's",
        "The samples are not the policy's: an engine with other weights or another temperature (see "
        "check/sampler_gap), a mask that counts what was not sampled, or a reference that is not the initial model "
        "(model.reference).",
        "Set model.dtype to float32, and model.reference to null; if it stays, please report it.",
    ),
    "negative-kl/truncated": Advice(
        "kl/ref_mean", "",
        "Samples come from a truncated distribution (sampling.top_k, sampling.top_p) and are weighted by the whole.",
        "Set sampling.top_k to 0 and sampling.top_p to 1.",
    ),
    "runaway-kl": Advice(
        "kl/ref_mean", "the KL is three times its target, or above 20 nats and growing while the score is not",
        "The policy finds score where the reward was never right (over-optimization), or the updates are so large that "
        "it drifts.",
        "Raise ppo.kl.coef, or set ppo.kl.target; or lower optim.lr.",
    ),
    "runaway-kl/target": Advice(
        "kl/ref_mean", "",
        "The updates are so large that the policy drifts whatever β is, or a critic on the policy's trunk shakes it "
        "while it learns the penalty.",
        "Lower optim.lr, or set model.critic to separate.",
    ),
    "runaway-kl/horizon": Advice(
        "kl/ref_mean", "",
        "β adapts more slowly than the policy moves. The policy finds score where the reward was never right "
        "(over-optimization), or the updates are so large that it drifts.",
        "Set ppo.kl.horizon to null, or lower it; or raise ppo.kl.coef, where β starts; or lower optim.lr.",
    ),
    "entropy-collapse": Advice(
        "policy/entropy", "entropy fell to a tenth within a few cycles: one answer to everything",
        "Updates that are too large, or a reward that one kind of answer wins whatever the prompt.",
        "Lower optim.lr or ppo.epochs; raise ppo.kl.coef; or set ppo.entropy_coef to 0.001 to 0.01.",
    ),
    "repeated-phrase": Advice(
        "response/shared_phrase", "most answers contain one and the same phrase, or their variety halved",
        "One phrase wins score in any answer: the reward pays for it, whatever was asked.",
        "Read the samples; raise ppo.kl.coef or set ppo.kl.target; or train the reward model on pairs in which the "
        "phrase loses.",
    ),
    "long-steps": Advice(
        "policy/kl_old_new", "one cycle moves the policy by more than 0.1 nats per token",
        "A learning rate that is too high, or too many epochs over the same responses.",
        "Lower optim.lr or ppo.epochs, or set ppo.stop_epoch_at_kl to 0.02.",
    ),
    "clip-fraction": Advice(
        "policy/clip_fraction", "more than 30 % of the tokens have their gradient cut",
        "A learning rate that is too high, or too many epochs over the same responses.",
        "Lower optim.lr or ppo.epochs.",
    ),
    "length-runaway": Advice(
        "response/length_mean", "answers are three times as long, and the score grew with them",
        "The reward prefers longer answers, and that is the easiest way up.",
        "Add a reward source that costs length, or set reward_shaping.missing_eos and lower "
        "sampling.max_new_tokens; raise ppo.kl.coef.",
    ),
    "truncation-runaway": Advice(
        "response/truncated_fraction", "nearly every answer is cut at the limit, few were at the start",
        "The reward prefers longer answers, or does not see that one is cut.",
        "Set reward_shaping.missing_eos, e.g. to {set: -1.0}; or raise sampling.max_new_tokens.",
    ),
    "dead-critic": Advice(
        "value/explained_variance", "explained variance stays at 0 or below",
        "A critic that learns too slowly from its start at zero, or too fast to stay behind the returns; or "
        "returns that nothing in the text foretells.",
        "Change optim.critic_lr (up where it has hovered at 0 from the start, down where it fell below); or raise "
        "ppo.value_warmup_cycles; or set model.critic to separate.",
    ),
    "dead-critic/step": Advice(
        "value/explained_variance", "",
        "A critic that learns too slowly from its start at zero, or too fast to stay behind the returns; or "
        "returns that nothing in the text foretells.",
        "Change optim.critic_lr (up where it has hovered at 0 from the start, down where it fell below); or, under "
        "bellman, set model.critic to separate.",
    ),
    "reward-saturation": Advice(
        "reward/score_mean", "scores do not tell answers apart, or are all at the maximum",
        "The task is solved, or the policy has found what the reward cannot tell from a good answer.",
        "Read the samples; then end the run here (ppo.cycles), or use a reward with more to say.",
    ),
    "reward-saturation/constant": Advice(
        "reward/score_std", "",
        "The reward does not depend on the response.",
        "Fix the reward function.",
    ),
    "reward-saturation/alike": Advice(
        "reward/score_std", "",
        "The task is solved, or the policy has found one answer that the reward cannot tell from others.",
        "End the run here (ppo.cycles), or use a reward with more to say; raise ppo.kl.coef if the answers are all "
        "alike.",
    ),
    "reward-saturation/clipped": Advice(
        "reward/score_mean", "",
        "Nearly every score is above the clip.",
        "Raise reward_shaping.clip.",
    ),
    "score-falling": Advice(
        "reward/score_mean", "the score fell from its peak by half of what the responses of a cycle differ by",
        "Steps too long for what the advantages say: the policy, or the critic behind them, has gone astray.",
        "Lower optim.lr and ppo.epochs, or raise ppo.batch; see value/explained_variance.",
    ),
    "score-falling/held-back": Advice(
        "reward/score_mean", "",
        "The KL penalty pulls the policy back: the KL has fallen to less than half as well.",
        "Lower ppo.kl.coef, or raise ppo.kl.target.",
    ),
    "second-opinion": Advice(
        None, "the score rises while another source, or the score on held-out prompts, falls",
        "Over-optimization: the policy finds what one source likes and the other does not.",
        "Raise ppo.kl.coef, or set ppo.kl.target; change the weights of the sources (reward[].weight).",
    ),
    "second-opinion/held-out": Advice(
        "eval/score_mean", "",
        "The policy has learned the prompts that it is trained on, or the reward's flaws on them.",
        "Raise ppo.kl.coef, or set ppo.kl.target; use more prompts, or fewer ppo.cycles.",
    ),
    "loss-rising": Advice(
        "loss", "sft, dpo, qlearning: the loss climbs back",
        "A learning rate that is too high for what the model already knew.",
        "Lower optim.lr, or raise optim.warmup.",
    ),
    "gradient-norm": Advice(
        "optim/grad_norm", "sft, reward, dpo, qlearning: ten times what was usual",
        "A learning rate that is too high, or a stretch of odd examples.",
        "Lower optim.lr; look at the examples of these steps.",
    ),
    "at-chance": Advice(
        "reward_model/accuracy", "reward, dpo: accuracy cannot be told from guessing",
        "Labels that nothing in the text explains, columns that are swapped in some rows, or too few steps.",
        "Check that chosen and rejected are not swapped; then raise optim.lr, or reward_model.epochs (of dpo: "
        "dpo.epochs).",
    ),
    "weak-reward-model": Advice(
        "reward_model/accuracy", "reward: right on less than 65 % of held-out pairs",
        "Training that ended before more than habits of the answers was learned, a model that is too small, too few "
        "pairs, or labels that contradict each other.",
        "Look at how far people agree (tether studio, agreement). If they do: more reward_model.epochs at a lower "
        "optim.lr, a larger model, or more pairs.",
    ),
    "still-learning": Advice(
        "reward_model/accuracy", "reward: it ended while its accuracy was still rising",
        "Too few steps, or steps that are too small: what the pairs teach was not yet learned.",
        "Raise reward_model.epochs or optim.lr, until the held-out accuracy stops rising.",
    ),
    "memorized": Advice(
        "reward_model/accuracy", "reward, dpo: far better on its training pairs than on held-out ones",
        "It has learned single pairs by heart.",
        "Lower reward_model.epochs (of dpo: dpo.epochs; 1 is usual) or optim.lr, or use more pairs.",
    ),
    "margins-exploding": Advice(
        "reward_model/margin", "reward: a mean margin above 20, sure beyond reason",
        "A learning rate that is too high, too many epochs, or pairs that one word gives away.",
        "Lower optim.lr or reward_model.epochs, or set reward_model.center to 0.01.",
    ),
    "chosen-falls": Advice(
        "dpo/chosen_logratio", "dpo: the chosen answers' own log-prob falls, along with the rejected ones'",
        "The loss sees differences alone; where both answers share most of their tokens, both fall.",
        "Set dpo.nll to 1, or raise it; raise dpo.beta; or lower optim.lr or dpo.epochs.",
    ),
    "stale": Advice(
        None, "the run says that it is running, without a sign of life for ten minutes",
        "The process was killed (out of memory, perhaps), the machine went down, or a reward source hangs.",
        "Run the same command again: it continues from the last checkpoint. Where a reward source hangs, lower "
        "reward[].timeout_s; where memory ran out, lower the microbatch_tokens.",
    ),
    "recorded": Advice(
        None, "something else that the run itself recorded in `events.jsonl`",
        "The run recorded it while it went on.",
        "See events.jsonl, and the other curves at that time.",
    ),
}  # fmt: skip


def notes_on(metric: str) -> list[str]:
    """What may take a curve where it should not be, and the remedy: one note for each alarm that shows in it."""
    return [
        f"{a.meaning[0].upper()}{a.meaning[1:]}: {a.remedy[0].lower()}{a.remedy[1:]}"
        for a in ADVICE.values()
        if a.metric == metric and a.meaning
    ]


def guide_table() -> str:
    """The table of docs/guide.md, Markdown: one row for each alarm."""
    rows = [f"| `{rule}` | {a.meaning} | {a.remedy} |" for rule, a in ADVICE.items() if a.meaning]
    return "\n".join(["| alarm | what it means | remedy |", "|---|---|---|", *rows])


if __name__ == "__main__":
    print(guide_table())
