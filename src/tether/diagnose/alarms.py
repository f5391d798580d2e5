"""What went wrong in a run, why, and which knob to turn: rules over its metrics, events and status.

    for alarm in alarms("ppo", config, metrics, events, status, now=datetime.now(UTC)):
        print(alarm.what, alarm.cause, alarm.knob)

Each rule is a function below, with the reason for its threshold in its docstring; the rows of
tether.config.kinds name those that a run is judged by.
Thresholds stand well outside what healthy runs show, and a curve's condition must hold for 15 cycles or longer: an
alarm is rather missed for a few cycles than raised by noise. Only what is no matter of noise (a loss that is not a
number, a self-check of the run's own, a run without a sign of life) is told at once. Loads no torch.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from tether.config import Config, PPOConfig, RewardConfig, TrainingConfig
from tether.config.kinds import KINDS, Kind
from tether.diagnose.series import Curve, Series, correlation, median
from tether.runs.bounds import FIRST_RATIO_MEAN, FIRST_RATIO_STOP, SAMPLER_GAP, Precision

PATIENCE_S = 600.0
"""A running run writes its heartbeat at every phase of a cycle. None for this long: the process is gone or hangs."""

_PERSIST = 3  # levels of 5 cycles: 15 cycles in a row
_LATELY = 20  # cycles whose phases say how long the next may take


@dataclass(frozen=True, slots=True)
class Alarm:
    """One thing that went wrong."""

    rule: str
    """Short name, the same in every run: negative-kl."""
    metric: str | None
    """The curve that it shows in; None if in none."""
    first: int
    """First cycle (sft, reward: step) in which it held."""
    last: int
    """Last one: where it is the run's last, it may still hold."""
    severity: Literal["warning", "serious"]
    """serious: what is trained now is not what was meant, or nothing is."""
    what: str
    """One sentence with the numbers."""
    cause: str
    """What it likely comes from."""
    knob: str
    """The config key to turn, and to which side."""


def alarms(
    kind: str, config: Config, metrics: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]],
    status: dict[str, Any], *, now: datetime | None = None, reward_report: dict[str, Any] | None = None,
) -> list[Alarm]:  # fmt: skip
    """What went wrong, the serious first, then in order of appearance. Pure: reads no file and no clock.

    kind: the run's command. metrics, events, status: as a run directory holds them (`Run.metrics` and so on).
    now: with it, a run that gives no sign of life is an alarm. reward_report: what reward_report.json holds, of a
    reward model that is trained. Metrics may be missing, null, or thinned to some of the cycles.
    """
    row = KINDS[kind]
    view = View(row, config, Series(row.unit, metrics), events, status, now, reward_report)
    found = [alarm for rule in row.alarms for alarm in RULES[rule](view)]
    return sorted(found, key=lambda a: (a.severity != "serious", a.first))


def state(
    status: dict[str, Any], now: datetime, *, patience_s: float = PATIENCE_S
) -> Literal["running", "finished", "stopped", "failed", "stale"]:
    """The run's state; stale where it says `running`, and its last heartbeat is older than `patience_s`."""
    said = status.get("state")
    if said != "running":
        return said if said in ("finished", "stopped", "failed") else "stale"  # type: ignore[return-value]
    age = silence_s(status, now)
    return "running" if age is not None and age <= patience_s else "stale"


def silence_s(status: dict[str, Any], now: datetime) -> float | None:
    """Seconds since the last heartbeat; None if there never was one."""
    try:
        beat = datetime.fromisoformat(str(status.get("heartbeat")))
    except ValueError:
        return None
    return (now - (beat if beat.tzinfo else beat.replace(tzinfo=UTC))).total_seconds()


@dataclass(frozen=True, slots=True)
class View:
    """A run, as rules see it."""

    kind: Kind
    config: Config
    series: Series
    events: Sequence[dict[str, Any]]
    status: dict[str, Any]
    now: datetime | None
    reward_report: dict[str, Any] | None

    @property
    def unit(self) -> str:
        return self.series.unit

    def curve(self, name: str) -> Curve:
        return self.series.curve(name)

    def recorded(self) -> list[tuple[int, str]]:
        """(cycle, text) of the alarms that the trainer raised while it ran."""
        return [
            (e[self.unit] if isinstance(e.get(self.unit), int) else self.series.done, str(e.get("what", "")))
            for e in self.events
            if e.get("event") == "alarm"
        ]


Rule = Callable[[View], Iterator[Alarm]]


# ---------------------------------------------------------------- numbers that are none, and the run's own checks


def not_finite(view: View) -> Iterator[Alarm]:
    """A loss that is NaN or infinite, which the run directory holds as null. One is enough: no sound run has any.
    (Beyond 4,000 cycles some are read; the steps that NaN makes the optimiser skip are counted in all.)"""
    found = {name: at for name in view.kind.losses if (at := view.series.nulls(name))}
    if not found:
        return
    cycles = sorted({c for at in found.values() for c in at})
    critic = list(found) == ["value/loss"]
    yield Alarm(
        "not-finite", next(iter(found)), cycles[0], cycles[-1], "serious",
        f"Not finite in {_count(len(cycles), view.unit)}: {', '.join(found)}.",
        "The critic's values or returns overflow." if critic else
        "A learning rate that is too high, a score or an example that is extreme, or an overflow in the compute dtype.",
        "Lower optim.critic_lr, or bound the scores with reward_shaping.clip." if critic else
        "Lower optim.lr, or set model.dtype to float32" + ("; bound the scores with reward_shaping.clip."
                                                           if isinstance(view.config, PPOConfig) else "."),
    )  # fmt: skip


def skipped_steps(view: View) -> Iterator[Alarm]:
    """Optimiser steps whose gradient was not finite: the weights stay, the data is lost. One in a hundred is bad luck
    that costs little; more is a run that has lost its footing (five in a row stop it)."""
    steps = view.series.points("optim/skipped_steps", zeros=False)
    told = [c for c, text in view.recorded() if "skipped" in text]
    cycles = sorted({*steps, *told})
    if not cycles:
        return
    total = max(int(sum(steps.values())), len(told))
    taken = max(1, view.series.done)
    if isinstance(view.config, PPOConfig):
        taken *= view.config.ppo.epochs * max(1, view.config.ppo.batch // view.config.ppo.minibatch)
    yield Alarm(
        "skipped-steps", "optim/skipped_steps" if steps else "optim/grad_norm", cycles[0], cycles[-1],
        "serious" if total > max(1, 0.01 * taken) else "warning",
        f"{_count(total, 'optimiser step')} of {taken:,} skipped: the gradient was not finite.",
        "An extreme score or example, a learning rate that is too high, or an overflow in the compute dtype.",
        "Lower optim.lr, or set model.dtype to float32.",
    )  # fmt: skip


def first_ratio(view: View) -> Iterator[Alarm]:
    """Before a cycle's first step old and new log-probs are the same function of the same weights: ratio 1 up to
    rounding (tether.runs.bounds). With model.dtype auto the looser bound is read here, and the trainer, which knows the
    precision, has recorded what was above the stricter one."""
    bound = FIRST_RATIO_MEAN[_precision(view.config)]
    yield from _self_check(
        view, "first-ratio", "check/first_ratio_error", "first ratio", bound,
        f"The first ratio of a cycle is off 1 by {{worst:.2g}} on average (bound {bound:g}; {FIRST_RATIO_STOP:g} stops "
        "the run)",
        "Old and new log-probs come from different arithmetic: a kernel that depends on the shape of its batch, "
        "dropout in a module of the model's own, or a fault in the mask or the temperature.",
        "Set model.dtype to float32. If it stays, please report it.",
    )  # fmt: skip


def sampler_gap(view: View) -> Iterator[Alarm]:
    """The engine that sampled and the trainer differ by numerics alone (tether.runs.bounds): more, and the policy is
    trained on samples of another one."""
    bound = SAMPLER_GAP[_precision(view.config)]
    yield from _self_check(
        view, "sampler-gap", "check/sampler_gap", "sampler gap", bound,
        f"Sampler and trainer give the same tokens log-probs that differ by {{worst:.2g}} nats on average (bound "
        f"{bound:g})",
        "The engine has other weights, another temperature or another position of the tokens than the trainer; or an "
        "architecture whose cache loses precision.",
        "Set model.dtype to float32. If it stays, please report it.",
    )  # fmt: skip


def _self_check(
    view: View, rule: str, metric: str, word: str, bound: float, what: str, cause: str, knob: str
) -> Iterator[Alarm]:
    """A bound that holds cycle by cycle. What the trainer recorded counts at once; beside it, three cycles above."""
    told = [(c, text) for c, text in view.recorded() if word in text]
    above = {c: v for c, v in zip(view.series.at, view.series.values(metric), strict=True) if v and v > bound}
    cycles = sorted({*(above if len(above) >= _PERSIST else []), *(c for c, _ in told)})
    if not cycles:
        return
    where = _count(len(cycles), view.unit)
    said = f"{_sentence(told[-1][1])[:-1]}; recorded in {where}." if told else ""
    worst = max((above.get(c, 0.0) for c in cycles), default=0.0)
    yield Alarm(
        rule, metric, cycles[0], cycles[-1], "serious",
        f"{what.format(worst=worst)}, in {where}." if worst > bound else said, cause, knob,
    )  # fmt: skip


# ---------------------------------------------------------------- ppo: the leash


def negative_kl(view: View) -> Iterator[Alarm]:
    """kl/ref_mean is the mean of log(policy/reference) over samples of the policy, so its expectation is not below 0.
    Of B responses at a true KL of κ nats it scatters by about √(2κ/B), so a level reaches -1.3/B at three deviations,
    whatever κ is; -(0.1 + 2/B) leaves room for heavy tails. (TRL warns below -1, for one batch.)"""
    assert isinstance(view.config, PPOConfig)
    bound = -(0.1 + 2 / view.config.ppo.batch)
    held = view.curve("kl/ref_mean").held(lambda kl: kl < bound, least=_PERSIST)
    if held is None:
        return
    s = view.config.sampling
    cut = s.top_k > 0 or s.top_p < 1
    yield Alarm(
        "negative-kl", "kl/ref_mean", held.first, held.last, "serious",
        f"The KL to the reference is {median(held.levels):.3g} nats a response, and a KL is never below 0: the penalty "
        "pays for distance.",
        f"Samples come from a truncated distribution (top_k={s.top_k}, top_p={s.top_p:g}) and are weighed by the whole."
        if cut else
        "The samples are not the policy's: an engine of other weights or temperature (see check/sampler_gap), "
        "a mask that counts what was not sampled, or a reference that is not the initial model (model.reference).",
        "Set sampling.top_k to 0 and sampling.top_p to 1." if cut else
        "Set model.dtype to float32, and model.reference to null; if it stays, please report it.",
    )  # fmt: skip


def runaway_kl(view: View) -> Iterator[Alarm]:
    """With a target: three times that, for 20 cycles. (Ziegler et al. 2019 held 6 and peaked at 7.3.) In any case: more
    than 20 nats a response, still growing, under a score that rises no more. Half the seeds of "The N+ Implementation
    Details of RLHF with PPO" (2403.17031) collapsed at 50 to 85."""
    assert isinstance(view.config, PPOConfig)
    kl, coef = view.curve("kl/ref_mean"), view.config.ppo.kl
    cause = (
        "The policy finds score where the reward was never right (over-optimisation), or the updates are so large that "
        "it drifts."
    )
    target = coef.target
    if target and (held := kl.held(lambda x: x > 3 * target, least=_PERSIST + 1)):
        yield Alarm(
            "runaway-kl", "kl/ref_mean", held.first, held.last, "serious",
            f"The KL to the reference is {median(held.levels):.3g} nats a response, {median(held.levels) / target:.1f} "
            f"times its target of {target:g}.",
            "β adapts more slowly than the policy moves. " + cause,
            "Lower ppo.kl.horizon or raise ppo.kl.coef, where β starts; or lower optim.lr.",
        )  # fmt: skip
        return
    held = kl.held(lambda x: x > 20, least=_PERSIST + 1)
    score = view.curve("reward/score_mean")
    if held is None or not len(score):
        return
    half = len(held.blocks) // 2
    scores = [_level_at(score, kl.last[i]) for i in held.blocks]
    rise = median(scores[half:]) - median(scores[:half])
    before, after = median(held.levels[:half]), median(held.levels[half:])
    if after > 1.25 * before and rise <= score.noise:
        yield Alarm(
            "runaway-kl", "kl/ref_mean", held.first, held.last, "serious",
            f"The KL to the reference went from {before:.3g} to {after:.3g} nats a response, while the score went from "
            f"{median(scores[:half]):.3g} to {median(scores[half:]):.3g}.",
            cause, "Raise ppo.kl.coef, or set ppo.kl.target; or lower optim.lr. An earlier checkpoint may be the "
            "better model.",
        )  # fmt: skip


# ---------------------------------------------------------------- ppo: the policy


def entropy_collapse(view: View) -> Iterator[Alarm]:
    """From a half of its start to a tenth within 15 cycles, or within a tenth of the run if that is longer; and it
    stays there. A policy that converges gets there too, but takes a fifth of the run or longer for that part of the
    way: an exponential fall to a thousandth takes 23 %."""
    assert isinstance(view.config, PPOConfig)
    entropy = view.curve("policy/entropy")
    if not len(entropy) or (start := entropy.levels[0]) < 0.05:
        return
    held = entropy.held(lambda h: h < 0.1 * start, least=_PERSIST)
    if held is None:
        return
    high = max(i for i in range(held.blocks[0]) if entropy.levels[i] >= 0.5 * start)
    took = held.first - entropy.last[high]
    if held.blocks[0] - high <= _PERSIST or took <= 0.1 * view.config.ppo.cycles:
        yield Alarm(
            "entropy-collapse", "policy/entropy", held.first, held.last, "serious",
            f"Entropy fell from {start:.3g} to {median(held.levels):.3g} nats a token, from a half of that within "
            f"{_count(took, 'cycle')}: the policy says nearly the same to everything.",
            "Updates that are too large, or a reward that one kind of answer wins whatever the prompt.",
            "Lower optim.lr or ppo.epochs; raise ppo.kl.coef; or set ppo.entropy_coef to 0.001 to 0.01.",
        )  # fmt: skip


def long_steps(view: View) -> Iterator[Alarm]:
    """KL(old‖new) of a cycle above 0.1 nats a token. Healthy runs show 5e-4 (Ziegler et al. 2019) to 8e-3 (Pythia-160m
    after 4 epochs, 2403.17031): this is more than ten times as much."""
    held = view.curve("policy/kl_old_new").held(lambda kl: kl > 0.1, least=_PERSIST)
    if held:
        yield Alarm(
            "long-steps", "policy/kl_old_new", held.first, held.last, "warning",
            f"One cycle's update moves the policy by {median(held.levels):.2g} nats a token; healthy is up to 0.01.",
            "A learning rate that is too high, or too many epochs over the same responses.",
            "Lower optim.lr or ppo.epochs, or set ppo.stop_epoch_at_kl to 0.02.",
        )  # fmt: skip


def clip_fraction(view: View) -> Iterator[Alarm]:
    """Above 0.3. Healthy runs show less than .01 (Ziegler et al. 2019) to .07 (Pythia-160m after 4 epochs, 2403.17031).
    With a third of the tokens cut, an update's direction is that of the others."""
    held = view.curve("policy/clip_fraction").held(lambda f: f > 0.3, least=_PERSIST)
    if held:
        yield Alarm(
            "clip-fraction", "policy/clip_fraction", held.first, held.last, "warning",
            f"{median(held.levels):.0%} of the tokens have their gradient cut; healthy is up to 10 %.",
            "A learning rate that is too high, or too many epochs over the same responses.",
            "Lower optim.lr or ppo.epochs.",
        )  # fmt: skip


def length_runaway(view: View) -> Iterator[Alarm]:
    """Three times the length of the start and 16 tokens more, with a score that went along (correlation above 0.7 since
    the start). Length is the commonest thing that a reward model rewards instead of what was meant (Singhal et al.
    2023, 2310.03716). Longer answers may be right: hence a warning, and the look at the samples."""
    length, score = view.curve("response/length_mean"), view.curve("reward/score_mean")
    if not len(length) or not len(score):
        return
    start = length.levels[0]
    held = length.held(lambda n: n > max(3 * start, start + 16), least=_PERSIST)
    if held is None:
        return
    until = held.blocks[-1] + 1
    scores = [_level_at(score, c) for c in length.last[:until]]
    together = correlation(length.levels[:until], scores)
    if together > 0.7 and scores[-1] > scores[0]:
        yield Alarm(
            "length-runaway", "response/length_mean", held.first, held.last, "warning",
            f"Responses grew from {start:.3g} to {length.levels[until - 1]:.3g} tokens, and the score with them "
            f"(correlation {together:.2f}).",
            "The reward prefers longer answers, and that is the easiest way up.",
            "Add a reward source that costs length, or set reward_shaping.missing_eos and lower "
            "sampling.max_new_tokens; raise ppo.kl.coef.",
        )  # fmt: skip


def truncation_runaway(view: View) -> Iterator[Alarm]:
    """More than nine in ten responses cut at the limit, where fewer than half were at the start. (A model that never
    knew how to end is no alarm of its run.)"""
    cut = view.curve("response/truncated_fraction")
    if not len(cut) or (start := cut.levels[0]) >= 0.5:
        return
    held = cut.held(lambda f: f > 0.9, least=_PERSIST)
    if held:
        yield Alarm(
            "truncation-runaway", "response/truncated_fraction", held.first, held.last, "serious",
            f"{median(held.levels):.0%} of the responses run into the length limit, {start:.0%} did at the start: the "
            "policy has unlearned to end.",
            "The reward prefers longer answers, or does not see that one is cut.",
            "Set reward_shaping.missing_eos, e.g. to {set: -1.0}; or raise sampling.max_new_tokens.",
        )  # fmt: skip


# ---------------------------------------------------------------- ppo: the critic and the reward


def dead_critic(view: View) -> Iterator[Alarm]:
    """Explained variance at most 0.02 for 30 cycles, the first 20 (and ppo.value_warmup_cycles) left out: by then
    critics of healthy runs see something, 0.1 and more, and end at about 0.75 (Ziegler et al. 2019). At 0 its baseline
    is no better than a constant; below -1 it adds more noise to the advantages than there was, which is serious."""
    assert isinstance(view.config, PPOConfig)
    after = max(20, view.config.ppo.value_warmup_cycles + 10)
    curve = view.curve("value/explained_variance")
    worse = curve.held(lambda v: v < -1, least=_PERSIST, after=after)
    held = worse or curve.held(lambda v: v <= 0.02, least=2 * _PERSIST, after=after)
    if held:
        yield Alarm(
            "dead-critic", "value/explained_variance", held.first, held.last, "serious" if worse else "warning",
            f"The critic's explained variance is {median(held.levels):.2g}: "
            + ("worse than a constant would be." if median(held.levels) < 0 else "no better than a constant would be."),
            "A critic that learns too slowly from its start at zero, or too fast to stay behind the returns; or "
            "returns that nothing in the text foretells.",
            "Change optim.critic_lr (up where it has hovered at 0 from the start, down where it fell below); or raise "
            "ppo.value_warmup_cycles; or set model.critic to separate.",
        )  # fmt: skip


def reward_saturation(view: View) -> Iterator[Alarm]:
    """Scores that tell no answers apart: their standard deviation is below a fiftieth of the start's, or their mean
    within 1 % of the highest (of the range of all scores that the run has seen). Advantages vanish there, and whitening
    blows up what is left, which is noise (2403.17031 names it for the end of training)."""
    assert isinstance(view.config, PPOConfig)
    spread = view.curve("reward/score_std")
    if len(spread):
        start = spread.levels[0]
        held = spread.held(lambda s: s <= max(1e-6, 0.02 * start), least=_PERSIST)
        if held:
            never = start <= 1e-6
            yield Alarm(
                "reward-saturation", "reward/score_std", held.first, held.last, "serious" if never else "warning",
                "Every response has the same score" + (" from the start" if never else "")
                + f" (standard deviation {median(held.levels):.2g}): there is nothing to learn from.",
                "The reward does not depend on the response." if never else
                "The task is solved, or the policy has found one answer that the reward cannot tell from others.",
                "Mend the reward function." if never else "End the run here (ppo.cycles), or use a reward with more to "
                "say; raise ppo.kl.coef if the answers are all alike.",
            )  # fmt: skip
            return
    mean, low, high = (view.curve(f"reward/score_{name}") for name in ("mean", "min", "max"))
    if not (len(mean) == len(low) == len(high) and len(mean)):
        return
    seen = max(high.levels) - min(low.levels)
    top = dict(zip(mean.first, high.levels, strict=True))
    gap = Curve((), ())
    gap.first, gap.last = mean.first, mean.last
    gap.levels = [top[c] - m for c, m in zip(mean.first, mean.levels, strict=True)]
    held = gap.held(lambda g: g <= 0.01 * seen, least=_PERSIST) if seen > 1e-6 else None
    if held:
        level, clip = mean.levels[held.blocks[-1]], view.config.reward_shaping.clip
        clipped = clip is not None and level >= 0.99 * clip
        yield Alarm(
            "reward-saturation", "reward/score_mean", held.first, held.last, "warning",
            f"The mean score, {level:.3g}, is at the highest that there is, {high.levels[held.blocks[-1]]:.3g}: there "
            "is little left to learn from.",
            "Nearly every score is above the clip." if clipped else
            "The task is solved, or the policy has found what the reward cannot tell from a good answer.",
            f"Raise reward_shaping.clip above {clip:g}." if clipped else
            "Read the samples; then end the run here (ppo.cycles), or use a reward with more to say.",
        )  # fmt: skip


def score_falling(view: View) -> Iterator[Alarm]:
    """The score went up and came down again, or only down: since its peak it has lost half of what the responses of a
    cycle differ by (their standard deviation), and seven times its noise. Readings are medians over twentieths of the
    run, so that a peak is not one lucky cycle."""
    score, spread = view.curve("reward/score_mean").coarse(), view.curve("reward/score_std")
    if len(score) < 8 or not len(spread):
        return
    smooth, peak = _smooth_and_peak(score)
    then, fall = score.last[peak + 1], smooth[peak] - smooth[-1]
    if then < score.last[-2] and fall > max(7 * score.noise, 0.5 * median(spread.levels), 1e-9):
        kl = view.curve("kl/ref_mean")
        held_back = len(kl) > 0 and _level_at(kl, score.last[-1]) < 0.5 * _level_at(kl, then)
        yield Alarm(
            "score-falling", "reward/score_mean", then, score.last[-1], "serious",
            f"Since cycle {then} the score fell from {smooth[peak]:.3g} to {smooth[-1]:.3g}.",
            "The KL penalty pulls the policy back: the KL has fallen to less than half as well." if held_back else
            "Steps too long for what the advantages say: the policy, or the critic behind them, has gone astray.",
            ("Lower ppo.kl.coef, or raise ppo.kl.target." if held_back else
             "Lower optim.lr and ppo.epochs, or raise ppo.batch; see value/explained_variance.")
            + f" The checkpoint nearest cycle {then} may be the better model.",
        )  # fmt: skip


def second_opinion(view: View) -> Iterator[Alarm]:
    """The score rises while another reading falls: a reward source of its own, or the score on held-out prompts. A gold
    score rises with the proxy, peaks and falls (Gao et al. 2022, 2210.10760). Asked for: since its peak the reading has
    lost seven times its noise and a fifth of the range that it had gone through, and the score has won three times its
    own. Readings are medians over twentieths of the run, so that a peak is not one lucky cycle."""
    score = view.curve("reward/score_mean")
    sums = ("reward/score_mean", "reward/total_mean")
    sources = [n for n in view.series.names if re.fullmatch(r"reward/.*_mean", n) and n not in sums]
    for name in [*sources, "eval/score_mean"]:
        held_out = name.startswith("eval/")
        reading = (view.series.sparse(name) if held_out else view.curve(name)).coarse()
        if len(reading) < 8 or len(score) < 8:
            continue
        smooth, peak = _smooth_and_peak(reading)
        fall, went = smooth[peak] - smooth[-1], max(smooth) - min(smooth)
        then, now = reading.last[peak + 1], reading.last[-2]  # the middles of the three
        scores = [median([_level_at(score, c) for c in reading.last[i : i + 3]]) for i in (peak, len(smooth) - 1)]
        rise = scores[1] - scores[0]
        whose = "the score on held-out prompts" if held_out else f"the source {name[len('reward/') : -len('_mean')]}"
        if then < now and fall > max(7 * reading.noise, 0.2 * went, 1e-9) and rise > max(3 * score.noise, 1e-9):
            yield Alarm(
                "second-opinion", name, then, reading.last[-1], "serious",
                f"Since cycle {then} {whose} fell from {smooth[peak]:.3g} to {smooth[-1]:.3g}, while the score rose "
                f"from {scores[0]:.3g} to {scores[1]:.3g}.",
                "The policy has learned the prompts that it is trained on, or the reward's flaws on them."
                if held_out else
                "Over-optimisation: the policy finds what one source likes and the other does not.",
                "Raise ppo.kl.coef, or set ppo.kl.target"
                + ("; use more prompts, or fewer ppo.cycles." if held_out else
                   "; weigh the sources anew (reward[].weight).")
                + f" The checkpoint nearest cycle {then} may be the better model.",
            )  # fmt: skip


# ---------------------------------------------------------------- sft and reward


def loss_rising(view: View) -> Iterator[Alarm]:
    """The loss is above the lowest so far by half of all that had been won, by a tenth of its start and by five times
    its noise, for 15 steps. A fall that levels off never does that; a run that diverges does within a few steps."""
    loss = view.curve("loss")
    if not len(loss):
        return
    start, lowest, limit = loss.levels[0], loss.levels[0], {}
    for first, level in zip(loss.first, loss.levels, strict=True):
        limit[first] = lowest + max(0.5 * (start - lowest), 0.1 * start, 5 * loss.noise)
        lowest = min(lowest, level)
    above = Curve((), ())
    above.first, above.last = loss.first, loss.last
    above.levels = [level - limit[c] for c, level in zip(loss.first, loss.levels, strict=True)]
    held = above.held(lambda x: x > 0, least=_PERSIST)
    if held:
        level = loss.levels[held.blocks[-1]]
        yield Alarm(
            "loss-rising", "loss", held.first, held.last, "serious",
            f"The loss rose from {min(loss.levels[: held.blocks[-1]]):.3g} to {level:.3g} nats a token.",
            "A learning rate that is too high for what the model already knew.",
            "Lower optim.lr, or raise optim.warmup.",
        )  # fmt: skip


def gradient_norm(view: View) -> Iterator[Alarm]:
    """Ten times the median of the first quarter and above optim.max_grad_norm, for 15 steps: every step is then cut to
    its direction alone, and the loss has become steep. Single spikes are single odd examples."""
    assert isinstance(view.config, TrainingConfig)
    norm, most = view.curve("optim/grad_norm"), view.config.optim.max_grad_norm
    usual = median(norm.levels[: max(_PERSIST, len(norm) // 4)])
    held = norm.held(lambda g: g > max(10 * usual, most), least=_PERSIST)
    if held:
        yield Alarm(
            "gradient-norm", "optim/grad_norm", held.first, held.last, "warning",
            f"The gradient norm is {median(held.levels):.3g}, where {usual:.3g} was usual; steps are cut at {most:g}.",
            "A learning rate that is too high, or a stretch of odd examples.",
            "Lower optim.lr; look at the examples of these steps.",
        )  # fmt: skip


def at_chance(view: View) -> Iterator[Alarm]:
    """Once judged on 50 held-out pairs or more: `learned` is false, that is, the interval of the accuracy reaches down
    to 0.5 or the loss is not below log 2. Before: over the last half of the steps, with 1,000 pairs or more in it, the
    training accuracy is within two standard errors of 0.5."""
    assert isinstance(view.config, RewardConfig)
    report, accuracy = view.reward_report, view.curve("reward_model/accuracy")
    knob = "Check that chosen and rejected are not swapped; then raise optim.lr or reward_model.epochs."
    cause = "Labels that nothing in the text explains, columns that are swapped in some rows, or too few steps."
    if report is not None:
        if not report["learned"] and report["test_pairs"] >= 50:
            found = report["accuracy"]
            yield Alarm(
                "at-chance", "reward_model/accuracy", view.series.done, view.series.done, "serious",
                f"Held-out accuracy is {found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}] and the loss "
                f"{report['loss']:.3f} nats a pair (knowing nothing: 50 %, 0.693): nothing can be said to be learned.",
                cause, knob,
            )  # fmt: skip
        return
    half = accuracy.levels[len(accuracy) // 2 :]
    values = [v for v in view.series.values("reward_model/accuracy") if v is not None]
    values = values[len(values) // 2 :]
    pairs = len(values) * view.config.reward_model.batch
    if not half or pairs < 1000:
        return
    mean, error = sum(values) / len(values), 0.5 / math.sqrt(pairs)
    if mean <= 0.5 + 2 * error:
        yield Alarm(
            "at-chance", "reward_model/accuracy", accuracy.first[len(accuracy) // 2], view.series.done, "warning",
            f"Training accuracy is {mean:.1%} over the last {pairs:,} pairs: that cannot be told from guessing.",
            cause, knob,
        )  # fmt: skip


def memorised(view: View) -> Iterator[Alarm]:
    """The held-out accuracy's 95 % interval lies a tenth or more below the training accuracy. A few points apart is
    usual; more is memory of single pairs, for people themselves agree on 63 to 77 % of them."""
    report = view.reward_report
    if report and report["train_accuracy"] - report["accuracy"]["high"] > 0.1:
        yield Alarm(
            "memorised", "reward_model/accuracy", view.series.done, view.series.done, "warning",
            f"The model is right on {report['train_accuracy']:.1%} of the pairs that it was trained on, and on "
            f"{report['accuracy']['value']:.1%} of {report['test_pairs']} held-out ones.",
            "It has learned single pairs by heart.",
            "Lower reward_model.epochs (1 is usual) or optim.lr, or use more pairs.",
        )  # fmt: skip


def margins_exploding(view: View) -> Iterator[Alarm]:
    """A mean margin above 20 for 15 steps. The margin is the log-odds that the chosen answer is the better one: 20 is
    one error in half a billion, 1.2 is what people's agreement of 77 % is worth. Cleanly separable pairs reach 10."""
    held = view.curve("reward_model/margin").held(lambda m: m > 20, least=_PERSIST)
    if held:
        yield Alarm(
            "margins-exploding", "reward_model/margin", held.first, held.last, "warning",
            f"Chosen and rejected answers are {median(held.levels):.3g} apart on average: the model is sure beyond "
            "all reason, and its scores are dominated by a few extremes.",
            "A learning rate that is too high, too many epochs, or pairs that one word gives away.",
            "Lower optim.lr or reward_model.epochs, or set reward_model.center to 0.01.",
        )  # fmt: skip


# ---------------------------------------------------------------- any run


def stale(view: View) -> Iterator[Alarm]:
    """Says `running`, without a sign of life for ten minutes, or for three times the longest phase so far."""
    if view.now is None or view.status.get("state") != "running":
        return
    patience = patience_s(view.series.tail(_LATELY))
    if state(view.status, view.now, patience_s=patience) == "stale":
        age = silence_s(view.status, view.now)
        since = "at all" if age is None else f"for {_duration(age)}"
        yield Alarm(
            "stale", None, view.series.done, view.series.done, "serious",
            f"The run says that it is running, but gave no sign of life {since} (process {view.status.get('pid')} on "
            f"{view.status.get('host')}).",
            "The process was killed (out of memory, perhaps), the machine went down, or a reward source hangs.",
            "Run the same command again: it continues from the last checkpoint. Where a reward source hangs, lower "
            "reward[].timeout_s; where memory ran out, lower the microbatch_tokens.",
        )  # fmt: skip


def patience_s(metrics: Sequence[dict[str, Any]]) -> float:
    """How long a run may be silent: three times the longest phase of its last cycles, and ten minutes at least."""
    phases = [v for m in metrics[-_LATELY:] for name, v in m.items() if name.startswith("time/") and v is not None]
    return max([PATIENCE_S, *(3 * p for p in phases)])


def recorded(view: View) -> Iterator[Alarm]:
    """What the trainer recorded and no rule above has told already; texts that differ in their numbers are one."""
    told: dict[str, list[tuple[int, str]]] = {}
    for cycle, text in view.recorded():
        if not any(word in text for word in ("skipped", "first ratio", "sampler gap")):
            told.setdefault(re.sub(r"\d[\d.,e+-]*", "#", text), []).append((cycle, text))
    for found in list(told.values())[-20:]:
        often = f" ({len(found)} times)" if len(found) > 1 else ""
        yield Alarm(
            "recorded", None, min(c for c, _ in found), max(c for c, _ in found), "warning",
            _sentence(found[-1][1] + often), "The run recorded it while it went on.",
            "See events.jsonl, and the other curves at that time.",
        )  # fmt: skip


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        not_finite, skipped_steps, first_ratio, sampler_gap, negative_kl, runaway_kl, entropy_collapse, long_steps,
        clip_fraction, length_runaway, truncation_runaway, dead_critic, reward_saturation, score_falling,
        second_opinion, loss_rising, gradient_norm, at_chance, memorised, margins_exploding, stale, recorded,
    )
}  # fmt: skip


# ---------------------------------------------------------------- words and numbers


def _precision(config: Config) -> Precision:
    """The compute precision; auto may be either, and is read as the coarser one."""
    assert isinstance(config, PPOConfig)
    return "float32" if config.model.dtype == "float32" else "bfloat16"


def _smooth_and_peak(curve: Curve) -> tuple[list[float], int]:
    """Medians of three levels in a row, and which of them is the highest."""
    smooth = [median(curve.levels[i : i + 3]) for i in range(len(curve) - 2)]
    return smooth, max(range(len(smooth)), key=smooth.__getitem__)


def _level_at(curve: Curve, cycle: int) -> float:
    """The level of the block that ends at `cycle`, or of the last one before; of the first block if there is none."""
    return curve.levels[max(0, bisect_right(curve.last, cycle) - 1)]


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def _sentence(text: str) -> str:
    """`text` on one line, with a capital and a full stop."""
    line = " ".join(text.split()).rstrip(".")
    return f"{line[:1].upper()}{line[1:]}."


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
