"""Which curves a report shows, and what to say of each: what it is, and what is healthy.

Healthy ranges: docs/algorithm.md, "Healthy". They are what good published runs showed, not limits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tether.config import Config, PPOConfig
from tether.config.kinds import KINDS, resolve
from tether.diagnose.advice import notes_on
from tether.reports.plots import Plot, line

Metrics = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One metric over the run."""

    metric: str
    title: str
    says: str  # what it is and how it should look
    healthy: tuple[float, float] | None = None  # range to shade
    spread: tuple[str, str] | None = None  # metrics of the band's lower and upper edge
    mark: float | None = None  # a level to draw: a target
    shows: tuple[float, ...] = ()  # levels that the axis always reaches, so that small changes look small

    @property
    def notes(self) -> list[str]:
        """What may take the curve where it should not be, and the remedy."""
        return notes_on(self.metric)


PPO = [
    Curve("reward/score_mean", "Score",
          "Mean score of a cycle's responses, with a band of one standard deviation. It should rise, then level off."),
    Curve("kl/ref_mean", "KL to the reference",
          "How far the policy has moved from where it began, in nats per response: the price of the score. The classic "
          "sentiment run held it at 6; tens of nats under a score that rises no more are over-optimization.",
          shows=(0,)),
    Curve("policy/entropy", "Entropy",
          "Freedom in the choice of the next token, in nats. It should fall slowly; a sudden fall is collapse.",
          shows=(0,)),
    Curve("policy/clip_fraction", "Clip fraction",
          "Share of tokens that an update wanted to change by more than the trust region allows. Healthy up to about "
          "0.1; above it, lower the learning rate or the epochs.", healthy=(0, 0.1), shows=(0, 0.1)),
    Curve("policy/kl_old_new", "Size of an update",
          "KL between the policy before and after a cycle's update, in nats per token. Healthy up to about 0.01.",
          healthy=(0, 0.01), shows=(0, 0.01)),
    Curve("value/loss", "Value loss",
          "Half the critic's squared error. It moves with the size of the returns, so read it beside the next one.",
          shows=(0,)),
    Curve("value/explained_variance", "Explained variance",
          "How much of the returns' spread the critic foresaw: 1 is all, 0 no more than a constant would. Good critics "
          "come to about 0.75; well below 0, the critic misleads the policy.", healthy=(0.5, 1), shows=(0, 1)),
    Curve("response/length_mean", "Length",
          "Tokens a response, with the shortest and the longest. A score that grows only as answers do has found "
          "length.",
          spread=("response/length_min", "response/length_max"), shows=(0,)),
    Curve("response/truncated_fraction", "Cut at the limit",
          "Share of responses that ran into the length limit. They are scored as they stand: where it is near 1, the "
          "model never gets to say that it is done.", shows=(0, 1)),
    Curve("response/shared_phrase", "Shared phrase",
          "Share of a cycle's responses that contain the phrase of four tokens that most of them contain. A score that "
          "grows only as this does has found a phrase.", shows=(0, 1)),
    Curve("kl/coef", "Weight of the KL, β",
          "Reward units per nat; adapted so that the KL comes to its target."),
    Curve("policy/optimality_gap", "Optimality gap",
          "Estimated KL, in nats per response, to the best policy for this score and β. It falls to 0 as training "
          "converges; a collapsed policy reads 0 too, so read it beside entropy.", shows=(0,)),
]  # fmt: skip

SFT = [
    Curve("loss", "Loss", "Negative log-likelihood of the examples, nats per token. It should fall, then level off."),
    Curve("optim/grad_norm", "Gradient norm",
          "Before clipping. Spikes are single odd examples; steady growth is a learning rate that is too high."),
    Curve("optim/lr", "Learning rate", "As the schedule set it."),
]  # fmt: skip

REWARD = [
    Curve("reward_model/loss", "Loss",
          "Bradley–Terry loss in nats per pair, on the pairs of each step. Knowing nothing is 0.693, the dotted line.",
          mark=0.6931, shows=(0,)),
    Curve("reward_model/accuracy", "Training accuracy",
          "Share of a step's pairs whose chosen answer scores higher. People agree with each other on 63 to 77 % of "
          "such pairs: far more than that on noisy labels is memory.", healthy=(0.6, 1), shows=(0.5, 1)),
    Curve("reward_model/margin", "Margin",
          "Mean distance between the scores of chosen and rejected. It grows as the model gets surer."),
    *SFT[1:],
]  # fmt: skip

DPO = [
    Curve("dpo/loss", "Loss",
          "Of the preferences of each step, without dpo.nll. Under sigmoid and unpaired knowing nothing is 0.693; "
          "under ipo it is 1/(4β²), under kto 0.5.", shows=(0,)),
    Curve("dpo/accuracy", "Training accuracy",
          "Share of a step's pairs whose chosen answer has the higher implicit reward. Far more than people agree on, "
          "63 to 77 %, is memory.", healthy=(0.6, 1), shows=(0.5, 1)),
    Curve("dpo/margin", "Margin",
          "Mean implicit reward of chosen answers less that of rejected ones, in log-odds. It grows as the policy gets "
          "surer."),
    Curve("dpo/chosen_logratio", "Chosen: log-ratio",
          "How much more likely chosen answers are than under the reference, nats per token. Near 0 or above it is "
          "well: the loss is content with a fall as well, as long as rejected answers fall further.",
          healthy=(-0.2, 1), shows=(-0.5, 0)),
    Curve("dpo/rejected_logratio", "Rejected: log-ratio",
          "The same of rejected answers. It should fall, and stay well above what makes text break: several nats.",
          shows=(-0.5, 0)),
    *SFT[1:],
]  # fmt: skip

QLEARNING = [
    Curve("qlearning/residual", "Residual",
          "Root mean square of the residual over the tokens of a step, in reward units: how far policy and critic are "
          "from agreeing with the scores. Under bellman it falls to 0 at the best policy. Under ilql it is of both Q, "
          "against the reward and V of what follows, and what the scores have of noise stays.", shows=(0,)),
    Curve("qlearning/g_std", "Spread of g",
          "Deviation, among answers to one prompt, of the score less what the KL costs, in reward units. All are equal "
          "at the best policy; where no step holds two answers to a prompt there is none.", shows=(0,)),
    Curve("qlearning/log_ratio", "Log-ratio on the data",
          "Mean log(π/ref) of an answer of the data, in nats: below 0 where the policy leaves what the data holds, as "
          "it should leave bad answers. It is no KL: the policy did not write these answers."),
    Curve("qlearning/nll", "Imitation",
          "Of ilql: how badly the language model predicts the data, nats per token. It falls to the data's own "
          "entropy; far below, the data is known by heart."),
    Curve("qlearning/advantage", "Mean advantage of the data",
          "Of ilql: mean of min Q̄ - V over the data's tokens, in reward units. Below 0, as V is of the better ones.",
          shows=(0,)),
    Curve("value/explained_variance", "Explained variance",
          "How much of the returns' spread the critic foresees: 1 is all, 0 no more than a constant would. Under ilql "
          "a return is the discounted score.", (0.5, 1), shows=(0, 1)),
    Curve("value/mean", "Mean value",
          "Mean of V over the tokens, in reward units. Under bellman it ends, before an answer's first token, at what "
          "the best policy is worth: its score, less its KL's price. Under ilql it is the expectile of Q."),
    *SFT[1:],
]  # fmt: skip


def curves(kind: str, config: Config, metrics: Metrics) -> list[tuple[Curve, Plot]]:
    """The curves of a run that has the numbers for them."""
    return [(c, _plot(c, KINDS[kind].unit, metrics)) for c in shown(kind, config, metrics)]


def shown(kind: str, config: Config, metrics: Metrics) -> list[Curve]:
    """Which curves there are, without their plots."""
    row = KINDS[kind]
    wanted = resolve(row.curves) if row.curves else [Curve(name, label, note) for label, name, note in row.headline]
    if callable(wanted):
        wanted = wanted(config, metrics)
    return [c for c in wanted if any(m.get(c.metric) is not None for m in metrics)]


def ppo_curves(config: PPOConfig, metrics: Metrics) -> list[Curve]:
    """The KL's target drawn into its curve, β only where it moves, and every source where there are several."""
    target = config.ppo.kl.target
    found = [replace(c, mark=target) if c.metric == "kl/ref_mean" else c for c in PPO]
    if target is None:
        found = [c for c in found if c.metric != "kl/coef"]
    sources = sources_of(metrics)
    if len(sources) > 1:
        says = "Mean answer of this reward source, before its weight and before clipping."
        found += [Curve(f"reward/{name}_mean", f"Source: {name}", says) for name in sources]
    says = (
        "Mean deviation of the reward models' scores of one response. It grows as the policy leaves what they were "
        "trained on: a score that rises with it is not to be trusted."
    )
    ensembles = dict.fromkeys(name for m in metrics for name in m if re.fullmatch(r"reward/.*_disagreement", name))
    found += [
        Curve(name, f"Disagreement: {name[len('reward/') : -len('_disagreement')]}", says, shows=(0,))
        for name in ensembles
    ]
    return found


def sources_of(metrics: Metrics) -> list[str]:
    """Names of the reward sources that have a mean in `metrics`."""
    means = (re.fullmatch(r"reward/(.*)_mean", name) for name in dict.fromkeys(name for m in metrics for name in m))
    return [mean[1] for mean in means if mean and mean[1] not in ("score", "total")]


def _plot(curve: Curve, unit: str, metrics: Metrics) -> Plot:
    x = [m[unit] for m in metrics]
    y = [m.get(curve.metric) for m in metrics]
    low, high = ([m.get(name) for m in metrics] for name in curve.spread) if curve.spread else ([], [])
    if curve.metric == "reward/score_mean":
        spread = [(m.get("reward/score_std") or 0.0) for m in metrics]
        low, high = ([None if v is None else v + sign * s for v, s in zip(y, spread, strict=True)] for sign in (-1, 1))
    return line(x, y, unit=unit, low=low, high=high, healthy=curve.healthy, mark=curve.mark, shows=curve.shows)
