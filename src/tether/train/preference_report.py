"""What a reward model learned, told so that nobody is fooled: interval, baselines, calibration.

An accuracy alone says little. People agree with each other on 63–77 % of such pairs, so that is a ceiling; longer
answers are often preferred, so length alone is a baseline; and a model may rank well while its probabilities are far
off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from tether.data.pairs import Pair
from tether.data.split import share_prompts
from tether.runs.files import write_atomically
from tether.statistics import wilson_interval


@dataclass(frozen=True, slots=True)
class Share:
    """A share of pairs with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Bin:
    """Held-out pairs about whose winner the model was equally sure."""

    pairs: int
    confidence: float  # mean σ(|r_w - r_l|): the probability that the model gave its favorite
    accuracy: Share  # how often the favorite was the chosen one


@dataclass(frozen=True, slots=True)
class PreferenceReport:
    """How well scores agree with people on held-out pairs, and the scale of the scores."""

    train_pairs: int
    test_pairs: int  # held out, and decided: of ties only the loss knows
    test_ties: int
    same_prompts: bool  # held-out pairs have prompts that are trained on: pairs were held out by their answers
    accuracy: Share | None  # strictly higher score for the chosen one; equal scores are no success
    train_accuracy: float | None
    loss: float | None  # nats per held-out pair; knowing nothing is log 2 = 0.693
    length_prefers: str  # "longer" or "shorter": what wins more often among the training pairs
    length_accuracy: Share | None  # of that rule on the held-out pairs, ties half
    calibration_error: float | None  # mean |confidence - accuracy| over the bins, weighted by pairs
    calibration: list[Bin]
    mean: float  # of the raw scores of the answers that were trained on
    std: float
    learned: bool | None  # the interval lies above chance, and the loss below log 2; None, as above: nothing decided
    held_out: int = 0  # pairs, or labeled answers, whether or not they are decided
    members: list[Share | None] = field(default_factory=list)  # accuracy of each model of an ensemble; else empty

    def text(self) -> str:
        """A few lines for the console and the model card."""
        if self.accuracy is None or self.length_accuracy is None:
            trained = "" if self.train_accuracy is None else f" Training pairs: {self.train_accuracy:.3f} right."
            why = "No pairs were held out"
            if self.held_out:
                why = f"None of the {self.held_out} held-out examples says which answer is better"
            return f"{why}: nothing is known about pairs that it was not trained on.{trained}"
        trained = "–" if self.train_accuracy is None else f"{self.train_accuracy:.3f}"
        lines = [
            f"Held-out accuracy {self.accuracy} on {self.test_pairs} pairs (95 % interval); training pairs {trained}.",
            f"Preferring the {self.length_prefers} answer alone: {self.length_accuracy}. People agree with each other "
            "on 0.63 to 0.77 of such pairs.",
            f"Loss {self.loss:.4f} nats per pair (knowing nothing: 0.6931); calibration error "
            f"{self.calibration_error:.3f}.",
        ]
        if known := [member for member in self.members if member is not None]:  # of ties alone no accuracy is
            alone = ", ".join(f"{member.value:.3f}" for member in known)
            lines.insert(1, f"It is that of the mean of {len(self.members)} reward models; of each alone: {alone}.")
        if self.same_prompts:
            lines.append(
                "All pairs have the same prompt, so they were held out by their answers: the figures are for this "
                "prompt alone."
            )
        if self.test_ties:
            lines.append(f"{self.test_ties} held-out ties count in the loss alone.")
        if self.accuracy.low <= 0.5:
            lines.append("Nothing was learned that can be told from chance: do not use this model.")
        elif not self.learned:
            lines.append(
                "It ranks answers better than chance, but is so sure of itself that its loss is above that of knowing "
                "nothing: use no probability of it. Fewer epochs or a lower learning rate hold it back."
            )
        elif self.accuracy.low <= self.length_accuracy.value:
            lines.append("It is no better than the length-only baseline.")
        return "\n".join(lines)

    def write(self, run: Path, name: str = "reward_report.json") -> None:
        """File `name`, and calibration.html to look at."""
        write_atomically(run / name, json.dumps(asdict(self), indent=2) + "\n")
        if self.calibration:
            write_atomically(run / "calibration.html", calibration_plot(self))


def build_report(
    train: Sequence[Pair], train_scores: Tensor, test: Sequence[Pair], test_scores: Tensor,
    *, scored: Sequence[Pair] | None = None, held_out: int | None = None,
) -> PreferenceReport:  # fmt: skip
    """The report from raw scores: [2B] for B pairs, first of every chosen answer, then of every rejected one.

    scored: the training pairs that have scores; None: all of them. held_out: how many examples the test pairs were
    made of; None: they are the pairs themselves.
    """
    scored = train if scored is None else scored
    decided = _preferred(test) != 0
    margin = (_margin(test_scores) * _preferred(test))[decided]
    prefers = "longer" if (_length_sign(train) * _preferred(train)).sum() >= 0 else "shorter"
    by_length = ((_length_sign(test) * _preferred(test))[decided] * (1 if prefers == "longer" else -1) + 1) / 2
    same_prompts = share_prompts(train, test)
    clusters = [
        pair.group or (str(pair.row) if same_prompts else pair.prompt_key) for pair in test if pair.probability != 0.5
    ]
    accuracy = clustered_interval((margin > 0).double(), clusters) if clusters else None
    loss = _loss(test, test_scores) if test else None
    bins = calibrate(margin, clusters)
    error = sum(b.pairs * abs(b.confidence - b.accuracy.value) for b in bins)
    trained = (_margin(train_scores) * _preferred(scored))[_preferred(scored) != 0]
    std = train_scores.std().item() if len(train_scores) > 1 else 0.0
    return PreferenceReport(
        train_pairs=len(train),
        test_pairs=len(margin),
        test_ties=len(test) - len(margin),
        same_prompts=same_prompts,
        accuracy=accuracy,
        train_accuracy=(trained > 0).double().mean().item() if len(trained) else None,
        loss=loss,
        length_prefers=prefers,
        length_accuracy=clustered_interval(by_length, clusters) if clusters else None,
        calibration_error=error / len(margin) if bins else None,
        calibration=bins,
        mean=train_scores.mean().item() if len(train_scores) else 0.0,
        std=std if std > 1e-6 else 1.0,  # a constant model has no scale to bring to 1
        learned=None if accuracy is None or loss is None else accuracy.low > 0.5 and loss < math.log(2),
        held_out=len(test) if held_out is None else held_out,
    )


def clustered_interval(success: Tensor, clusters: Sequence[str]) -> Share:
    """Mean of success [N] in [0, 1], with Wilson's 95 % interval.

    Pairs of one cluster (a prompt, a group) succeed and fail together, so they count as fewer: the number of pairs is
    divided by the design effect, the variance of the mean over clusters by that over independent pairs.
    """
    n, p = len(success), success.mean().item()
    sums: dict[str, float] = {}
    for cluster, value in zip(clusters, success.tolist(), strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + value - p
    independent = p * (1 - p) * n
    effect = sum(s * s for s in sums.values()) / independent if independent > 0 else n / len(sums)
    return Share(p, *wilson_interval(p, n / max(1.0, effect)))


def calibrate(margin: Tensor, clusters: Sequence[str], bins: int = 5) -> list[Bin]:
    """Pairs by how sure the model was, from σ(0) = 0.5 to 1 in equal steps; bins without pairs are left out."""
    confidence = torch.sigmoid(margin.abs())
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    found = []
    for i in range(bins):
        inside = (place == i).nonzero().flatten().tolist()
        if inside:
            right = clustered_interval((margin[inside] > 0).double(), [clusters[k] for k in inside])
            found.append(Bin(len(inside), confidence[inside].mean().item(), right))
    return found


def calibration_plot(report: PreferenceReport) -> str:
    """A page of its own: confidence against accuracy, with intervals, and the diagonal where they agree."""
    import plotly.graph_objects as go

    bins = report.calibration
    figure = go.Figure()
    figure.add_scatter(x=[0.5, 1], y=[0.5, 1], mode="lines", name="calibrated", line={"dash": "dash", "color": "gray"})
    figure.add_scatter(
        x=[b.confidence for b in bins],
        y=[b.accuracy.value for b in bins],
        error_y={
            "array": [b.accuracy.high - b.accuracy.value for b in bins],
            "arrayminus": [b.accuracy.value - b.accuracy.low for b in bins],
        },
        mode="lines+markers+text",
        text=[f"{b.pairs}" for b in bins],
        textposition="bottom right",
        name="held-out pairs",
    )
    figure.update_layout(
        title=f"Calibration on {report.test_pairs} held-out pairs (numbers: pairs; bars: 95 % intervals)",
        xaxis={"title": "probability that the model gives its favorite", "range": [0.48, 1.02]},
        yaxis={"title": "how often the favorite was chosen", "range": [0, 1.05]},
    )
    return str(figure.to_html(include_plotlyjs=True, full_html=True))


def _margin(scores: Tensor) -> Tensor:
    half = len(scores) // 2  # nothing may be held out
    return scores[:half] - scores[half:]


def _preferred(pairs: Sequence[Pair]) -> Tensor:
    """[B] 1 where the chosen answer is preferred, -1 where the rejected one is (probability below 0.5), 0 for a tie."""
    return torch.tensor([pair.probability - 0.5 for pair in pairs], dtype=torch.float64).sign()


def _loss(pairs: Sequence[Pair], scores: Tensor) -> float:
    """Nats per pair, ties included: the training loss without weights and centering."""
    margin, target = _margin(scores), torch.tensor([pair.probability for pair in pairs], dtype=torch.float64)
    return -(target * logsigmoid(margin) + (1 - target) * logsigmoid(-margin)).mean().item()


def _length_sign(pairs: Sequence[Pair]) -> Tensor:
    """[B] 1 where the chosen answer is the longer one, -1 where it is the shorter, 0 where neither."""
    return torch.tensor([float(len(p.chosen_ids) - len(p.rejected_ids)) for p in pairs], dtype=torch.float64).sign()
