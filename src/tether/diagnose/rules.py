"""The rules: each a function with the reason for its threshold in its docstring, or a row of THRESHOLDS.

Thresholds stand well outside what healthy runs show, and a curve's condition must hold for 15 cycles or longer: an
alarm is rather missed for a few cycles than raised by noise. Only what is not a matter of noise (a loss that is not a
number, a self-check of the run's own, a run without a sign of life) is reported at once. Texts of cause and remedy are
in `advice`. Loads no torch.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tether.config import PPOConfig
from tether.diagnose.series import Curve, Held, correlation, median
from tether.diagnose.state import RECENT, patience_s, silence_s, state
from tether.diagnose.view import Alarm, Severity, View, alarm
from tether.runs.bounds import FIRST_RATIO_MEAN, FIRST_RATIO_STOP, SAMPLER_GAP, Precision
from tether.runs.durations import format_duration

_PERSIST = 3  # levels of 5 cycles: 15 cycles in a row

Rule = Callable[[View], Iterator[Alarm]]


@dataclass(frozen=True, slots=True)
class Threshold:
    """A metric above a bound for 15 cycles in a row is an alarm."""

    rule: str
    metric: str
    bound: float
    severity: Severity
    what: str
    """The sentence, with {level}: the median of what was above, and {start}: the level at the start of the run."""
    reason: str
    """Why this bound: what healthy runs show."""
    start_below: float = math.inf
    """Runs that start at this level or above have no alarm: they were never otherwise."""

    def __call__(self, view: View) -> Iterator[Alarm]:
        curve = view.curve(self.metric)
        if not len(curve) or curve.levels[0] >= self.start_below:
            return
        if held := curve.held(lambda level: level > self.bound, least=_PERSIST):
            what = self.what.format(level=median(held.levels), start=curve.levels[0])
            yield alarm(self.rule, held, self.severity, what)


long_steps = Threshold(
    "long-steps", "policy/kl_old_new", 0.1, "warning",
    "One cycle's update moves the policy by {level:.2g} nats per token; healthy is up to 0.01.",
    reason="Healthy runs show 5e-4 (Ziegler et al. 2019) to 8e-3 (Pythia-160m after 4 epochs, 2403.17031): this is "
    "more than ten times as much.",
)  # fmt: skip
clip_fraction = Threshold(
    "clip-fraction", "policy/clip_fraction", 0.3, "warning",
    "{level:.0%} of the tokens have their gradient cut; healthy is up to 10 %.",
    reason="Healthy runs show less than .01 (Ziegler et al. 2019) to .07 (Pythia-160m after 4 epochs, 2403.17031). "
    "With a third of the tokens cut, an update's direction is that of the others.",
)  # fmt: skip
truncation_runaway = Threshold(
    "truncation-runaway", "response/truncated_fraction", 0.9, "serious",
    "{level:.0%} of the responses run into the length limit, {start:.0%} did at the start: the policy no longer "
    "ends its answers.",
    reason="A model that never knew how to end is not an alarm of its run.",
    start_below=0.5,
)  # fmt: skip
margins_exploding = Threshold(
    "margins-exploding", "reward_model/margin", 20, "warning",
    "Chosen and rejected answers are {level:.3g} apart on average: the model is far too sure, and its "
    "scores are dominated by a few extremes.",
    reason="The margin is the log-odds that the chosen answer is the better one: 20 is one error in half a billion, "
    "1.2 is what people's agreement of 77 % is worth. Cleanly separable pairs reach 10.",
)  # fmt: skip


def _better(view: View) -> str:
    """Where a better policy than the last one is; checkpoints of that time are gone."""
    kept = [event for event in view.events if event.get("event") == "best"]
    if not kept:
        return "An earlier policy may have been better: with evaluate.every above 0 a run keeps the best one in best/."
    return f"best/ holds the policy of cycle {kept[-1]['cycle']}, the best on the held-out prompts."


# ---------------------------------------------------------------- numbers that are not finite, and the run's own checks


def not_finite(view: View) -> Iterator[Alarm]:
    """A loss that is NaN or infinite, which the run directory holds as null. One is enough: no sound run has any.
    (Beyond 4,000 cycles some are read; the steps that NaN makes the optimizer skip are counted in all.)"""
    found = {name: at for name in view.kind.losses if (at := view.series.nulls(name))}
    if not found:
        return
    cycles = sorted({c for at in found.values() for c in at})
    critic = list(found) == ["value/loss"]
    yield alarm(
        "not-finite/critic" if critic else "not-finite", (cycles[0], cycles[-1]), "serious",
        f"Not finite in {_count(len(cycles), view.unit)}: {', '.join(found)}.", metric=next(iter(found)),
    )  # fmt: skip


def skipped_steps(view: View) -> Iterator[Alarm]:
    """Optimizer steps whose gradient was not finite: the weights stay, the data is lost. One in a hundred is bad luck
    that costs little; more is a run that diverges (five in a row stop it)."""
    steps = {c: n for c, n in view.series.points("optim/skipped_steps").items() if n}
    recorded = [c for c, _ in view.recorded("skipped-steps")]
    cycles = sorted({*steps, *recorded})
    if not cycles:
        return
    total = max(int(sum(steps.values())), len(recorded))
    made = view.series.points("optim/steps").values()  # where epochs may be left out
    taken = round((view.series.done or 1) * (sum(made) / len(made) if made else view.config.steps_per_unit))
    yield alarm(
        "skipped-steps", (cycles[0], cycles[-1]), "serious" if total > max(1, 0.01 * taken) else "warning",
        f"{_count(total, 'optimizer step')} of {taken:,} skipped: the gradient was not finite.",
        metric="optim/skipped_steps" if steps else "optim/grad_norm",
    )  # fmt: skip


def first_ratio(view: View) -> Iterator[Alarm]:
    """Before a cycle's first step old and new log-probs are the same function of the same weights: ratio 1 up to
    rounding (tether.runs.bounds). With model.dtype auto the looser bound is read here, and the trainer, which knows the
    precision, has recorded what was above the stricter one."""
    bound = FIRST_RATIO_MEAN[_precision(view.config)]
    yield from _self_check(
        view, "first-ratio", "check/first_ratio_error", bound,
        f"The first ratio of a cycle is off 1 by {{worst:.2g}} on average (bound {bound:g}; {FIRST_RATIO_STOP:g} stops "
        "the run)",
    )  # fmt: skip


def sampler_gap(view: View) -> Iterator[Alarm]:
    """The engine that sampled and the trainer differ by numerics alone (tether.runs.bounds): more, and the policy is
    trained on samples of another one."""
    bound = SAMPLER_GAP[_precision(view.config)]
    yield from _self_check(
        view, "sampler-gap", "check/sampler_gap", bound,
        f"Sampler and trainer give the same tokens log-probs that differ by {{worst:.2g}} nats on average (bound "
        f"{bound:g})",
    )  # fmt: skip


def _self_check(view: View, rule: str, metric: str, bound: float, what: str) -> Iterator[Alarm]:
    """A bound that holds cycle by cycle. What the trainer recorded counts at once; beside it, three cycles above."""
    recorded = view.recorded(rule)
    above = {c: v for c, v in zip(view.series.at, view.series.values(metric), strict=True) if v and v > bound}
    cycles = sorted({*(above if len(above) >= _PERSIST else []), *(c for c, _ in recorded)})
    if not cycles:
        return
    where = _count(len(cycles), view.unit)
    text = f"{_sentence(recorded[-1][1])[:-1]}; recorded in {where}." if recorded else ""
    worst = max((above.get(c, 0.0) for c in cycles), default=0.0)
    what = f"{what.format(worst=worst)}, in {where}." if worst > bound else text
    yield alarm(rule, (cycles[0], cycles[-1]), "serious", what)


# ---------------------------------------------------------------- ppo: the leash


def negative_kl(view: View) -> Iterator[Alarm]:
    """kl/ref_mean is the mean of log(policy/reference) over samples of the policy, so its expectation is not below 0.
    Of B responses at a true KL of κ nats it scatters by about √(2κ/B), so a level reaches -1.3/B at three deviations,
    whatever κ is; -(0.1 + 2/B) leaves room for heavy tails. (TRL warns below -1, for one batch.)"""
    bound = -(0.1 + 2 / view.config.ppo.batch)
    held = view.curve("kl/ref_mean").held(lambda kl: kl < bound, least=_PERSIST)
    if held is None:
        return
    s = view.config.sampling
    truncated = s.top_k > 0 or s.top_p < 1
    yield alarm(
        "negative-kl/truncated" if truncated else "negative-kl", held, "serious",
        f"The KL to the reference is {median(held.levels):.3g} nats per response, and a KL is never below 0: the "
        "penalty pays for distance." + (f" top_k={s.top_k}, top_p={s.top_p:g}." if truncated else ""),
    )  # fmt: skip


def runaway_kl(view: View) -> Iterator[Alarm]:
    """With a target: three times that, for 20 cycles. (Ziegler et al. 2019 held 6 and peaked at 7.3.) In any case: more
    than 20 nats per response, still growing, under a score that rises no more. Half the seeds of "The N+ Implementation
    Details of RLHF with PPO" (2403.17031) collapsed at 50 to 85."""
    kl, target, horizon = view.curve("kl/ref_mean"), view.config.ppo.kl.target, view.config.ppo.kl.horizon
    if target and (held := kl.held(lambda x: x > 3 * target, least=_PERSIST + 1)):
        yield alarm(
            "runaway-kl/target" if horizon is None else "runaway-kl/horizon", held, "serious",
            f"The KL to the reference is {median(held.levels):.3g} nats per response, "
            f"{median(held.levels) / target:.1f} times its target of {target:g}.",
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
        yield alarm(
            "runaway-kl", held, "serious",
            f"The KL to the reference went from {before:.3g} to {after:.3g} nats per response, while the score went "
            f"from {median(scores[:half]):.3g} to {median(scores[half:]):.3g}.",
            then=_better(view),
        )  # fmt: skip


# ---------------------------------------------------------------- ppo: the policy


def entropy_collapse(view: View) -> Iterator[Alarm]:
    """From a half of its start to a tenth within 15 cycles, or within a tenth of the run if that is longer; and it
    stays there. A policy that converges gets there too, but takes a fifth of the run or longer for that part of the
    way: an exponential fall to a thousandth takes 23 %."""
    entropy = view.curve("policy/entropy")
    if not len(entropy) or (start := entropy.levels[0]) < 0.05:
        return
    held = entropy.held(lambda h: h < 0.1 * start, least=_PERSIST)
    if held is None:
        return
    high = max(i for i in range(held.blocks[0]) if entropy.levels[i] >= 0.5 * start)
    took = held.first - entropy.last[high]
    if held.blocks[0] - high <= _PERSIST or took <= 0.1 * view.config.ppo.cycles:
        yield alarm(
            "entropy-collapse", held, "serious",
            f"Entropy fell from {start:.3g} to {median(held.levels):.3g} nats per token, from a half of that within "
            f"{_count(took, 'cycle')}: the policy says nearly the same to everything.",
        )  # fmt: skip


def repeated_phrase(view: View) -> Iterator[Alarm]:
    """One phrase of four tokens in more than 60 % of the answers and in 30 % more of them than at the start, for ten
    cycles (in a loop of 16 cycles it was in 92 % at the end); or in more than a third and half as often again, for 15
    cycles, where the score went along (correlation above 0.7): it rose by that. Or the
    share of distinct pairs of tokens below half of the start's. A policy that becomes surer says the same more often,
    but healthy runs keep 80 % of their pairs, and in the demo's no phrase stays in a third of the answers. It did in
    two of three runs whose reward model had learned courtesies and no facts."""
    phrase, variety = view.curve("response/shared_phrase"), view.curve("response/distinct_2")
    score = view.curve("reward/score_mean")
    if not len(phrase) or not len(variety):
        return
    start, first = phrase.levels[0], variety.levels[0]

    def with_score(curve: Curve, held: Held) -> float:
        until = held.blocks[-1] + 1
        return correlation(curve.levels[:until], [_level_at(score, c) for c in curve.last[:until]]) if score else 0.0

    shared = phrase.held(lambda share: share > max(0.6, start + 0.3), least=2)
    if shared is None:
        often = phrase.held(lambda share: share > max(1 / 3, 1.5 * start), least=_PERSIST)
        shared = often if often and with_score(phrase, often) > 0.7 else None
    poorer = variety.held(lambda distinct: distinct < 0.5 * first, least=_PERSIST)
    held = shared or poorer
    if held is None:
        return
    what = (
        f"{median(held.levels):.0%} of the answers contain one and the same phrase, {start:.0%} did at the start"
        if shared
        else f"Distinct pairs of tokens fell from {first:.0%} to {median(held.levels):.0%} of all"
    )
    together = with_score(phrase if shared else variety, held)
    along = (together > 0.7) if shared else (together < -0.7)
    yield alarm(
        "repeated-phrase", held, "serious" if along else "warning",
        f"{what}{f', and the score rose with it (correlation {together:.2f})' if along else ''}.",
        metric="response/shared_phrase" if shared else "response/distinct_2",
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
        yield alarm(
            "length-runaway", held, "warning",
            f"Responses grew from {start:.3g} to {length.levels[until - 1]:.3g} tokens, and the score with them "
            f"(correlation {together:.2f}).",
        )  # fmt: skip


# ---------------------------------------------------------------- the critic, and ppo's reward


def dead_critic(view: View) -> Iterator[Alarm]:
    """Explained variance at most 0.02 for 30 cycles: the critic predicts returns no better than a constant does. Below
    -1 for 15 cycles is serious: it adds more noise to the advantages than it takes away. The first 20 cycles (or
    ppo.value_warmup_cycles and 10) do not count: a critic starts at zero. After them, critics of healthy runs explain
    0.1 and more, and end at about 0.75 (Ziegler et al. 2019). In Q-learning a cycle is a step."""
    is_ppo = isinstance(view.config, PPOConfig)
    after = max(20, view.config.ppo.value_warmup_cycles + 10) if is_ppo else 20
    curve = view.curve("value/explained_variance")
    worse = curve.held(lambda v: v < -1, least=_PERSIST, after=after)
    held = worse or curve.held(lambda v: v <= 0.02, least=2 * _PERSIST, after=after)
    if held:
        yield alarm(
            "dead-critic" if is_ppo else "dead-critic/step", held, "serious" if worse else "warning",
            f"The critic's explained variance is {median(held.levels):.2g}: "
            + ("worse than a constant would be." if median(held.levels) < 0 else "no better than a constant would be."),
        )  # fmt: skip


def reward_saturation(view: View) -> Iterator[Alarm]:
    """Scores that tell no answers apart: their standard deviation is below a fiftieth of the start's, or their mean
    within 1 % of the highest (of the range of all scores that the run has seen). Advantages vanish there, and whitening
    blows up what is left, which is noise (2403.17031 names it for the end of training)."""
    spread = view.curve("reward/score_std")
    if len(spread):
        start = spread.levels[0]
        held = spread.held(lambda s: s <= max(1e-6, 0.02 * start), least=_PERSIST)
        if held:
            never = start <= 1e-6
            yield alarm(
                "reward-saturation/constant" if never else "reward-saturation/alike", held,
                "serious" if never else "warning",
                "Every response has the same score" + (" from the start" if never else "")
                + f" (standard deviation {median(held.levels):.2g}): there is nothing to learn from.",
            )  # fmt: skip
            return
    mean, low, high = (view.curve(f"reward/score_{name}") for name in ("mean", "min", "max"))
    if not (len(mean) == len(low) == len(high) and len(mean)):
        return
    seen = max(high.levels) - min(low.levels)
    top = dict(zip(mean.first, high.levels, strict=True))
    gap = mean.like([top[c] - m for c, m in zip(mean.first, mean.levels, strict=True)])
    held = gap.held(lambda g: g <= 0.01 * seen, least=_PERSIST) if seen > 1e-6 else None
    if held:
        level, clip = mean.levels[held.blocks[-1]], view.config.reward_shaping.clip
        clipped = clip is not None and level >= 0.99 * clip
        yield alarm(
            "reward-saturation/clipped" if clipped else "reward-saturation", held, "warning",
            f"The mean score, {level:.3g}, is at the highest that there is, {high.levels[held.blocks[-1]]:.3g}: there "
            "is little left to learn from." + (f" reward_shaping.clip is {clip:g}." if clipped else ""),
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
        yield alarm(
            "score-falling/held-back" if held_back else "score-falling", (then, score.last[-1]), "serious",
            f"Since cycle {then} the score fell from {smooth[peak]:.3g} to {smooth[-1]:.3g}.",
            then=_better(view),
        )  # fmt: skip


def second_opinion(view: View) -> Iterator[Alarm]:
    """The score rises while another reading falls: a reward source of its own, or the score on held-out prompts. A gold
    score rises with the proxy, peaks and falls (Gao et al. 2022, 2210.10760). Asked for: since its peak the reading has
    lost seven times its noise and a fifth of the range that it had gone through, and the score has won three times its
    own. Readings are medians over twentieths of the run, so that a peak is not one lucky cycle."""
    score = view.curve("reward/score_mean")
    sums = ("reward/score_mean", "reward/total_mean")
    sources = [n for n in view.series.names if re.fullmatch(r"reward/.*_mean", n) and n not in sums]
    gold = [n for n in view.series.names if re.fullmatch(r"eval/gold/.*_mean", n)]
    for name in [*sources, *gold, "eval/score_mean"]:
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
        whose = f"gold {name[len('eval/gold/') : -len('_mean')]} on held-out prompts" if name in gold else whose
        if then < now and fall > max(7 * reading.noise, 0.2 * went, 1e-9) and rise > max(3 * score.noise, 1e-9):
            yield alarm(
                "second-opinion/held-out" if held_out else "second-opinion", (then, reading.last[-1]), "serious",
                f"Since cycle {then} {whose} fell from {smooth[peak]:.3g} to {smooth[-1]:.3g}, while the score rose "
                f"from {scores[0]:.3g} to {scores[1]:.3g}.",
                metric=name, then=_better(view),
            )  # fmt: skip


# ---------------------------------------------------------------- sft, reward, dpo and qlearning


def loss_rising(view: View) -> Iterator[Alarm]:
    """The loss (of several, the kind's first) is above the lowest so far by half of all that had been won, by a tenth
    of its start and by five times its noise, for 15 steps. A fall that levels off never does that; a run that diverges
    does within a few steps."""
    loss = view.curve(metric := view.kind.losses[0])
    if not len(loss):
        return
    start, lowest, limit = loss.levels[0], loss.levels[0], {}
    for first, level in zip(loss.first, loss.levels, strict=True):
        limit[first] = lowest + max(0.5 * (start - lowest), 0.1 * start, 5 * loss.noise)
        lowest = min(lowest, level)
    above = loss.like([level - limit[c] for c, level in zip(loss.first, loss.levels, strict=True)])
    held = above.held(lambda x: x > 0, least=_PERSIST)
    if held:
        low, level = min(loss.levels[: held.blocks[-1]]), loss.levels[held.blocks[-1]]
        yield alarm("loss-rising", held, "serious", f"The loss rose from {low:.3g} to {level:.3g}.", metric=metric)


def gradient_norm(view: View) -> Iterator[Alarm]:
    """Ten times the median of the first quarter and above optim.max_grad_norm, for 15 steps: every step is then cut to
    its direction alone, and the loss has become steep. Single spikes are single odd examples."""
    norm, most = view.curve("optim/grad_norm"), view.config.optim.max_grad_norm
    usual = median(norm.levels[: max(_PERSIST, len(norm) // 4)])
    held = norm.held(lambda g: g > max(10 * usual, most), least=_PERSIST)
    if held:
        yield alarm(
            "gradient-norm", held, "warning",
            f"The gradient norm is {median(held.levels):.3g}, where {usual:.3g} was usual; steps are cut at {most:g}.",
        )  # fmt: skip


def at_chance(view: View) -> Iterator[Alarm]:
    """Once judged on 50 held-out pairs or more: `learned` is false, that is, the interval of the accuracy reaches down
    to 0.5 or the loss is not below log 2. (Of DPO the accuracy alone counts: a policy that is too sure of its errors
    has such a loss and has learned for all that.) Before: over the last half of the steps, with 1,000 pairs or more in
    it, the training accuracy is within two standard errors of 0.5; not of single answers, which may be nearly all good,
    so that half is not what guessing gives."""
    report, section = view.reward_report, getattr(view.config, view.kind.section)
    accuracy = view.curve(metric := f"{view.kind.section}/accuracy")
    if report is not None and report["test_pairs"] >= 50:
        found = report["accuracy"]
        if found["low"] <= 0.5 or (report["learned"] is False and view.kind.command == "reward"):
            yield alarm(
                "at-chance", (view.series.done, view.series.done), "serious",
                f"Held-out accuracy is {found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}] and the loss "
                f"{report['loss']:.3f} nats per pair (knowing nothing: 50 %, 0.693): nothing can be said to be "
                "learned.", metric=metric,
            )  # fmt: skip
        return
    half = accuracy.levels[len(accuracy) // 2 :]
    values = [v for v in view.series.values(metric) if v is not None]
    values = values[len(values) // 2 :]
    pairs = len(values) * section.batch
    if not half or pairs < 1000 or not getattr(section, "has_pairs", True):
        return
    mean, error = sum(values) / len(values), 0.5 / math.sqrt(pairs)
    if mean <= 0.5 + 2 * error:
        yield alarm(
            "at-chance", (accuracy.first[len(accuracy) // 2], view.series.done), "warning",
            f"Training accuracy is {mean:.1%} over the last {pairs:,} pairs: that cannot be told from guessing.",
            metric=metric,
        )  # fmt: skip


def still_learning(view: View) -> Iterator[Alarm]:
    """It is no better on its own training pairs than on held-out ones, and was still rising when it ended: the training
    accuracy of the last quarter of the steps is above that of the quarter before by three standard errors. A model that
    has learned what its pairs teach has stopped rising there, or has begun to learn single pairs by heart."""
    values = [v for v in view.series.values("reward_model/accuracy") if v is not None]
    quarter = len(values) // 4
    pairs = quarter * view.config.reward_model.batch
    report = view.reward_report
    if report is None or not report["learned"] or report["train_accuracy"] is None or pairs < 500:
        return
    before, after = (sum(part) / quarter for part in (values[-2 * quarter : -quarter], values[-quarter:]))
    error = math.sqrt((before * (1 - before) + after * (1 - after)) / pairs)
    if after - before > 3 * error and report["train_accuracy"] - report["accuracy"]["value"] < 0.05:
        yield alarm(
            "still-learning", (view.series.done, view.series.done), "warning",
            f"Training accuracy went from {before:.1%} to {after:.1%} in the last quarter of the steps, and the model "
            f"is right on {report['accuracy']['value']:.1%} of the held-out pairs: it could have learned more.",
        )  # fmt: skip


def weak_reward_model(view: View) -> Iterator[Alarm]:
    """Better than chance, but right on less than 65 % of the held-out pairs, and surely on less than 70 %: the upper
    end of its 95 % interval lies below. People agree with each other on 63 to 77 %. Often only habits of the answers
    have been learned, and a policy trained against them becomes polite, not right: in the demo, reward models at 60 to
    65 % gave policies that a judge preferred on 65 and 73 % of the questions, those above 74 % on 96 % and more."""
    report = view.reward_report
    if not report or not report["learned"] or report["train_accuracy"] is None:
        return
    if report["accuracy"]["value"] >= 0.65 or report["accuracy"]["high"] >= 0.7:
        return
    yield alarm(
        "weak-reward-model", (view.series.done, view.series.done), "warning",
        f"The model is right on {report['accuracy']['value']:.1%} of the held-out pairs, and on "
        f"{report['train_accuracy']:.1%} of those that it was trained on.",
    )  # fmt: skip


def memorized(view: View) -> Iterator[Alarm]:
    """The held-out accuracy's 95 % interval lies a tenth or more below the training accuracy. A few points apart is
    usual; more is memory of single pairs, for people themselves agree on 63 to 77 % of them."""
    report = view.reward_report
    if not report or report["accuracy"] is None or report["train_accuracy"] is None:  # nothing was held out
        return
    if report["train_accuracy"] - report["accuracy"]["high"] > 0.1:
        yield alarm(
            "memorized", (view.series.done, view.series.done), "warning",
            f"The model is right on {report['train_accuracy']:.1%} of the pairs that it was trained on, and on "
            f"{report['accuracy']['value']:.1%} of {report['test_pairs']} held-out ones.",
            metric=f"{view.kind.section}/accuracy",
        )  # fmt: skip


# ---------------------------------------------------------------- dpo


def chosen_falls(view: View) -> Iterator[Alarm]:
    """The preferred answers' own log-prob is half a nat per token below the reference's for 15 steps in a row: a loss
    of differences is content with that, as long as the rejected ones fall further. Healthy runs stay within 0.2; at 0.5
    an answer of 30 tokens is e^15 times less likely than before, and what took its place, nobody has judged."""
    chosen, rejected = view.curve("dpo/chosen_logratio"), view.curve("dpo/rejected_logratio")
    if held := chosen.held(lambda level: level < -0.5, least=_PERSIST):
        others = (
            f"; the log-ratio of the rejected ones is {median(rejected.levels[-3:]):.2g}" if rejected.levels else ""
        )
        yield alarm(
            "chosen-falls", held, "warning",
            f"The chosen answers are {-median(held.levels):.2g} nats per token less likely than under the reference"
            f"{others}.",
        )  # fmt: skip


# ---------------------------------------------------------------- any run


def stale(view: View) -> Iterator[Alarm]:
    """Says `running`, without a sign of life for ten minutes, or for three times the longest phase so far."""
    if view.now is None or view.status.get("state") != "running":
        return
    patience = patience_s(view.series.tail(RECENT))
    if state(view.status, view.now, patience_s=patience) == "stale":
        age = silence_s(view.status, view.now)
        since = "at all" if age is None else f"for {format_duration(age)}"
        yield alarm(
            "stale", (view.series.done, view.series.done), "serious",
            f"The run says that it is running, but gave no sign of life {since} (process {view.status.get('pid')} on "
            f"{view.status.get('host')}).",
        )  # fmt: skip


def recorded(view: View) -> Iterator[Alarm]:
    """What the trainer recorded and no rule above has told already; texts that differ in their numbers are one."""
    texts: dict[str, list[tuple[int, str]]] = {}
    for cycle, text in view.recorded(None):
        texts.setdefault(re.sub(r"\d[\d.,e+-]*", "#", text), []).append((cycle, text))
    kinds = list(texts.values())
    told = [(found, found[-1][1] + (f" ({len(found)} times)" if len(found) > 1 else "")) for found in kinds[-20:]]
    if earlier := kinds[:-20]:
        told.insert(0, ([entry for found in earlier for entry in found],
                        f"{len(earlier)} more alarms that differ in their words: see events.jsonl"))  # fmt: skip
    for found, what in told:
        cycles = [cycle for cycle, _ in found]
        yield alarm("recorded", (min(cycles), max(cycles)), "warning", _sentence(what))


RULES: dict[str, Rule] = {
    rule.rule.replace("-", "_") if isinstance(rule, Threshold) else rule.__name__: rule
    for rule in (
        not_finite, skipped_steps, first_ratio, sampler_gap, negative_kl, runaway_kl, entropy_collapse,
        repeated_phrase, long_steps, clip_fraction, length_runaway, truncation_runaway, dead_critic,
        reward_saturation, score_falling, second_opinion, loss_rising, gradient_norm, at_chance, weak_reward_model,
        still_learning, memorized, margins_exploding, chosen_falls, stale, recorded,
    )
}  # fmt: skip


# ---------------------------------------------------------------- words and numbers


def _precision(config: PPOConfig) -> Precision:
    """The compute precision; auto may be either, and is read as the coarser one."""
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
