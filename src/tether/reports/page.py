"""From a run directory to the page: what is said of each kind of run, and the file itself."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tether.config import DPOConfig, InitModelConfig, PPOConfig, QLearningConfig, RewardConfig, SFTConfig
from tether.config.kinds import Kind, resolve
from tether.config.ppo import PPOSection
from tether.config.reading import to_yaml
from tether.diagnose.alarms import alarms
from tether.diagnose.diagnosis import preference_report
from tether.errors import RunError
from tether.reports.curves import curves, sources_of
from tether.reports.held_out import Evaluation, Law, best_of, fit_law, win_share
from tether.reports.html import safe_json, templates
from tether.reports.plots import Plot, calibration, frontier, overoptimization, points
from tether.reports.signals import SIGNALS, Scale, surprise, tokens_of, value_curve
from tether.reports.text import prompt_text
from tether.runs import Run, to_plain
from tether.runs.durations import format_duration
from tether.runs.files import replacing

_MOST_PROMPTS = 24  # shown before and after
_MOST_TOKENS = 500  # of a response that is shown token by token


@dataclass(frozen=True)
class Headline:
    """One figure that the run is judged by."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Figure:
    """A plot with its title and a sentence on how to read it."""

    title: str
    says: str
    plot: Plot


@dataclass(frozen=True)
class Look:
    """One response, token by token."""

    title: str
    row: dict[str, Any]
    prompt: str
    tokens: list[dict[str, Any]]  # colored by advantage; see `tokens_of`
    curve: Markup  # V(t), with the score at its end


@dataclass(frozen=True)
class Page:
    """What is particular to one kind of run."""

    lede: str  # one sentence: what was trained, from what, on what
    headlines: list[Headline]
    figures: list[Figure] = field(default_factory=list)
    before: Evaluation | None = None
    after: Evaluation | None = None
    looks: list[Look] = field(default_factory=list)
    tokens_say: str = (
        "Colored by advantage, around the cycle's mean: training made blue tokens likelier, orange ones less likely; "
        "underlined where the clip cut the gradient."
    )
    evaluated: bool = False  # whether it answers held-out prompts as it goes; the page says where it did not


def report(run: str | Path | Run, to: str | Path | None = None) -> Path:
    """Write one self-contained HTML file about a run; returns its path.

    run: a run directory of any trainer; it may still be going.
    to: the file; None is report.html in the run directory. An existing file is replaced.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    target = run.path / "report.html" if to is None else Path(to)
    html = render(run)
    try:
        with replacing(target) as partial:
            partial.write_text(html, encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"{target} cannot be written ({error.strerror or error}): there is no report. Name a file in a directory "
            "that exists and is writable: --to FILE."
        ) from error
    return target


def render(run: Run) -> str:
    """The page as HTML."""
    from plotly.offline import get_plotlyjs

    kind, config, status, metrics = run.kind, run.config, run.status, run.metrics
    page = resolve(kind.page)(run, config, metrics) if kind.page else _any_page(kind, metrics)
    figures = page.figures + [Figure(c.title, c.says, plot) for c, plot in curves(kind.command, config, metrics)]
    here = Path(__file__).parent
    script, style = (
        "".join((here / name).read_text(encoding="utf-8") for name in names)
        for names in (("static/paint.js", "page.js"), ("page.css", "static/tokens.css"))
    )
    scripts = [get_plotlyjs(), script]
    template = templates(here, number=_number).get_template("page.html.j2")
    return template.render(
        name=run.path.resolve().name,
        page=page,
        figures=figures,
        status=status,
        config=to_yaml(config),
        checks=_checks(metrics),
        alarms=alarms(
            kind.command,
            config,
            metrics,
            run.events,
            status,
            now=datetime.now(UTC),
            reward_report=preference_report(run),
        ),
        kind=kind,
        facts=_facts(run, metrics),
        events=run.events,
        pairs=_pairs(page),
        plots=safe_json(to_plain({f"plot-{i}": figure.plot for i, figure in enumerate(figures)})),
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        hashes=[f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts],
    )


# ---------------------------------------------------------------- kinds of run


def _any_page(kind: Kind, metrics: Sequence[dict[str, Any]]) -> Page:
    """For a kind without a page of its own: its headline, from the first tenth to the last."""
    headlines = [
        Headline(label, _change(*_ends(metrics, name)), note)
        for label, name, note in kind.headline
        if any(m.get(name) is not None for m in metrics)
    ]
    return Page(f"{kind.heading}.", headlines)


def ppo_page(run: Run, config: PPOConfig, metrics: Sequence[dict[str, Any]]) -> Page:
    evaluations = [Evaluation.read(run, cycle) for cycle in run.evaluation_cycles]
    before, after = (evaluations[0], evaluations[-1]) if evaluations else (None, None)
    done = metrics[-1]["cycle"] if metrics else 0
    sources = sources_of(metrics[-1:])
    lora = " with LoRA" if config.model.lora else ""
    lede = (
        f"PPO on {config.model.policy}{lora}: {done} of {config.ppo.cycles} cycles of {config.ppo.batch} responses "
        f"to the prompts of {config.prompts.path}" + (f", scored by {', '.join(sources)}." if sources else ".")
    )
    headlines: list[Headline] = []
    figures: list[Figure] = []
    if before and after:
        first, last = before.mean(), after.mean()
        note = f"95 % interval at the end {_interval(last.low, last.high)}"
        headlines.append(Headline("Score on held-out prompts", _change(first.mean, last.mean), note))
        share = win_share(before, after) if after.cycle > before.cycle else None
        if share:
            doubt = f"; 95 % interval {_interval(share.low, share.high, '.0%')}" if share.low < share.high else ""
            note = f"of {len(after.answers)} held-out prompts answered better than at the start, ties half{doubt}"
            headlines.append(Headline("Win share", f"{share.mean:.0%}", note))
        kl = _number(after.mean("kl").mean)
        headlines.append(Headline("KL spent", f"{kl} nats", "a response, to the reference, held-out prompts"))
        figures += _held_out_figures(run, evaluations)
    elif metrics:
        score = [m["reward/score_mean"] for m in metrics]
        headlines.append(Headline("Score", _change(score[0], score[-1]), "mean of the first and the last cycle"))
        kl = _number(metrics[-1]["kl/ref_mean"])
        headlines.append(Headline("KL spent", f"{kl} nats", "a response, to the reference"))
    if metrics:
        entropy = [m["policy/entropy"] for m in metrics]
        headlines.append(Headline("Entropy", _change(entropy[0], entropy[-1]), "nats per token"))
    return Page(lede, headlines, figures, before, after, _looks(run, config.ppo), evaluated=True)


def _held_out_figures(run: Run, evaluations: Sequence[Evaluation]) -> list[Figure]:
    cycles = [e.cycle for e in evaluations]
    score = [e.mean() for e in evaluations]
    kl = [e.mean("kl").mean for e in evaluations]
    means = [s.mean for s in score]
    chosen = best_of(evaluations[0]) if evaluations[0].cycle == 0 else []
    prompts, best = len(evaluations[-1].answers), run.best
    by = " by gold" if best and "gold" in best else ""
    return [
        Figure(
            "Held-out score",
            f"{prompts} {run.held_out_claim}, with the same draws each time; bars are 95 % intervals over "
            "prompts. It should follow the training score: where it stays behind, the model has learned the prompts."
            + (f" The best policy{by}, of cycle {best['cycle']}, is kept in best/." if best else ""),
            points(cycles, means, unit="cycle", low=[s.low for s in score], high=[s.high for s in score]),
        ),
        Figure(
            "Score for KL",
            "What each nat of distance bought, evaluation by evaluation; dotted: choosing the best of n answers of the "
            "start model. A line that turns flat or falls while it runs to the right is over-optimization.",
            frontier(kl, means, [f"cycle {c}" for c in cycles], chosen if len(chosen) > 1 else []),
        ),
        *([_gold_figure(evaluations)] if evaluations[-1].gold else []),
    ]


def _gold_figure(evaluations: Sequence[Evaluation]) -> Figure:
    """Proxy and gold over √KL, with Gao's laws where there are points enough."""
    columns = evaluations[-1].gold
    asked = [e for e in evaluations if columns[0] in e.gold]
    distance = [math.sqrt(max(0.0, e.mean("kl").mean)) for e in asked]
    golds = [[e.mean(column).mean for e in asked] for column in columns]
    start = asked[0] if asked[0].cycle == 0 else None
    chosen = [(math.sqrt(max(0.0, kl)), gold) for _, kl, gold in best_of(start, columns[0])] if start else []
    laws: list[Law] = []
    says = (
        f"What is trained on, and gold ({', '.join(c.removeprefix('gold/') for c in columns)}), which is not. "
        "Where gold falls while the score rises, the policy pleases the score alone."
    )
    if start:
        for what, found, rl in (
            ("this run, d(α − β·log d)", list(zip(distance, golds[0], strict=True)), True),
            ("best of n, d(α − β·d)", chosen, False),
        ):
            law = fit_law([d for d, _ in found], [g for _, g in found], golds[0][0], rl=rl)
            if law is not None:
                laws.append(law)
                fit = f"α {_number(law.alpha)}, β {_number(law.beta)}, R² {_number(law.r_squared)}"
                says += f" Dotted, Gao's law of {what}: {fit}."
    plot = overoptimization(
        distance, [e.mean().mean for e in asked], golds, chosen if len(chosen) > 1 else [],
        [(law.distance, law.gold) for law in laws],
    )  # fmt: skip
    return Figure("Score and gold over distance", says, plot)


def _looks(run: Run, ppo: PPOSection) -> list[Look]:
    """The best, the worst and the most surprising response of the last cycle that was written."""
    if not run.rollout_cycles:
        return []
    cycle = run.rollout_cycles[-1]
    rows = [row for row in run.rollouts(cycle).to_pylist() if row["score"] is not None]
    if not rows:
        return []
    signal = SIGNALS["advantage"]
    scale = Scale.of(signal, rows)
    score = itemgetter("score")
    chosen = {"the best": max(rows, key=score), "the worst": min(rows, key=score)}
    if "value" in rows[0]:
        chosen["the one that surprised the critic most"] = max(rows, key=surprise)
    return [
        Look(
            title=f"{run.kind.unit.capitalize()} {cycle}, {which}",
            row=row,
            prompt=prompt_text(row["prompt"]),
            tokens=tokens_of(row, [scale.step(v) for v in signal.of(row)[:_MOST_TOKENS]], ppo),
            curve=value_curve(row, _MOST_TOKENS),
        )
        for which, row in chosen.items()
    ]


def sft_page(run: Run, config: SFTConfig, metrics: Sequence[dict[str, Any]]) -> Page:
    lede = f"Supervised fine-tuning of {_model_name(config)} on {config.data.path}, epochs {config.sft.epochs}."
    headlines = []
    if metrics:
        loss = _ends(metrics, "loss")
        trained = sum(m.get("tokens/trained") or 0 for m in metrics)
        headlines = [
            Headline("Loss", _change(*loss), "nats per token, first and last tenth of the steps"),
            Headline("Steps", f"{metrics[-1]['step']:,}", f"of {config.sft.batch} examples"),
            Headline("Trained tokens", f"{trained:,.0f}", "seen in all epochs"),
        ]
    return Page(lede, headlines)


def reward_page(run: Run, config: RewardConfig, metrics: Sequence[dict[str, Any]]) -> Page:
    lede = (
        f"Reward model from {_model_name(config)}, fitted to the preferences of {config.data.path}, "
        f"epochs {config.reward_model.epochs}."
    )
    found = preference_report(run)
    if found is None:
        change = _change(*_ends(metrics, "reward_model/loss"))
        loss = Headline("Loss", change, "nats per pair, first and last tenth of the steps")
        return Page(lede, [loss] if metrics else [])
    return Page(lede, *_of_held_out_pairs(found))


def dpo_page(run: Run, config: DPOConfig, metrics: Sequence[dict[str, Any]]) -> Page:
    section = config.dpo
    lede = (
        f"DPO on {_model_name(config)}: the preferences of {config.data.path}, loss {section.loss}, "
        f"β {section.beta:g}, epochs {section.epochs}."
    )
    headlines: list[Headline] = []
    figures: list[Figure] = []
    if (found := preference_report(run)) is not None:
        headlines, figures = _of_held_out_pairs(found)
    for label, name in (("Chosen answers", "dpo/chosen_logratio"), ("Rejected answers", "dpo/rejected_logratio")):
        if metrics:
            headlines.append(Headline(label, _change(*_ends(metrics, name)), "log-ratio, nats per token"))
    return Page(lede, headlines, figures)


def _of_held_out_pairs(found: dict[str, Any]) -> tuple[list[Headline], list[Figure]]:
    """What a preference report says."""
    accuracy, length = found["accuracy"], found["length_accuracy"]
    right = "–" if found["train_accuracy"] is None else f"{found['train_accuracy']:.1%}"
    if accuracy is None:
        held_out = found.get("held_out")
        why = f"none of {held_out} held-out examples says which answer is better" if held_out else ""
        headlines = [
            Headline(
                "Held-out accuracy", "none", f"{why or 'no pairs were held out'}: nothing is known about other pairs"
            ),
            Headline("Training accuracy", right, f"on {found['train_pairs']} pairs; people agree on 63 to 77 %"),
        ]
        return headlines, []
    verdict = ""
    if accuracy["low"] <= 0.5:
        verdict = " Nothing was learned that can be told from chance."
    elif not found["learned"]:
        verdict = " It is so sure of itself that its loss is above that of knowing nothing."
    if found.get("same_prompts"):
        verdict += " Held out by answers: all pairs have one prompt, and the figure is for it alone."
    sure = _interval(accuracy["low"], accuracy["high"], ".1%")
    prefers, train_pairs = found["length_prefers"], found["train_pairs"]
    headlines = [
        Headline("Held-out accuracy", f"{accuracy['value']:.1%}", f"{sure} on {found['test_pairs']} pairs.{verdict}"),
        Headline("Length alone", f"{length['value']:.1%}", f"right by always preferring the {prefers} answer"),
        Headline("Training accuracy", right, f"on {train_pairs} pairs; people agree on 63 to 77 %"),
        Headline("Held-out loss", f"{found['loss']:.3f}", "nats per pair; knowing nothing is 0.693"),
        Headline("Calibration error", f"{found['calibration_error']:.3f}", "mean gap of confidence and accuracy"),
    ]
    if members := [member for member in found.get("members", []) if member]:  # of ties alone no accuracy is known
        alone = ", ".join(f"{member['value']:.1%}" for member in members)
        note = f"held-out accuracy of each of the {len(members)} reward models; the other figures are of their mean"
        headlines.insert(1, Headline("Members alone", alone, note))
    figure = Figure(
        "Calibration",
        "Held-out pairs by how sure the model was; bars are 95 % intervals. On the dashed line it is right as often as "
        "it says; below, it is too sure of itself.",
        calibration(found["calibration"]),
    )
    return headlines, [figure]


def qlearning_page(run: Run, config: QLearningConfig, metrics: Sequence[dict[str, Any]]) -> Page:
    lora = " with LoRA" if config.model.lora else ""
    lede = (
        f"Q-learning ({config.qlearning.loss}) on {config.model.policy}{lora} from the scored answers of "
        f"{', '.join(config.data.paths)}, epochs {config.qlearning.epochs}."
    )
    headlines = []
    if metrics:
        implicit = config.has_heads
        residual = _ends(metrics, "qlearning/residual")
        what = "of Q, noise in the scores included" if implicit else "0 at the best policy"
        name, label, note = (
            ("nll", "Imitation", "per token of the data") if implicit
            else ("log_ratio", "Log-ratio", "per answer of the data, to the reference")
        )  # fmt: skip
        headlines = [
            Headline("Residual", _change(*residual), f"reward units, first and last tenth; {what}"),
            Headline(label, f"{_number(_ends(metrics, f'qlearning/{name}')[1])} nats", note),
            Headline("Steps", f"{metrics[-1]['step']:,}", f"of {config.qlearning.batch} answers"),
        ]
    says = "Colored by advantage, around the mean: blue tokens turned out better than V said, orange ones worse."
    return Page(lede, headlines, looks=_looks(run, config.as_ppo), tokens_say=says)


# ---------------------------------------------------------------- parts


def _pairs(page: Page) -> list[dict[str, Any]]:
    """The prompts to show: each with its answers before and after, in the order of the data."""
    if page.after is None or page.before is None:
        return []
    old, new = page.before.means(), page.after.means()
    return [
        {
            "prompt": prompt_text(rows[0]["prompt"]),
            "before": page.before.answers.get(i, []) if page.before.cycle < page.after.cycle else [],
            "after": rows,
            "before_mean": old.get(i),
            "after_mean": new[i],
        }
        for i, rows in sorted(page.after.answers.items())[:_MOST_PROMPTS]
    ]


def _checks(metrics: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The run's self-checks at their worst."""
    wanted: dict[str, tuple[str, str, Callable[[list[float]], float]]] = {
        "check/first_ratio_error": ("first ratio of a cycle, off 1 by", "{:.1e}", max),
        "check/sampler_gap": ("sampler against trainer, nats per token", "{:.1e}", max),
        "check/truncated_mass": ("probability that top-k and top-p cut off", "{:.2%}", max),
        "optim/skipped_steps": ("optimizer steps skipped", "{:.0f}", sum),
        "memory/peak_mb": ("peak memory, MB", "{:,.0f}", max),
    }
    found = {}
    for name, (label, form, worst) in wanted.items():
        values = [m[name] for m in metrics if m.get(name) is not None]
        if values:
            found[label] = form.format(worst(values))
    return found


def _facts(run: Run, metrics: Sequence[dict[str, Any]]) -> dict[str, str]:
    environment = run.environment
    hardware, versions = environment["hardware"], environment["versions"]
    seconds: dict[str, float] = {}
    for m in metrics:
        for name, value in m.items():
            if name.startswith("time/") and value is not None:
                part = name.removeprefix("time/").removesuffix("_s")
                seconds[part] = seconds.get(part, 0.0) + value
    total = sum(seconds.values())
    shares = ", ".join(f"{part} {s / total:.0%}" for part, s in seconds.items()) if total else ""
    return {
        "seed": str(environment["seed"]),
        "began": environment["created"],
        "time": format_duration(total) + (f" ({shares})" if len(seconds) > 1 else "") if total else "–",
        "machine": ", ".join(
            [hardware["cpu"], f"{hardware['cpus']} cores", f"{hardware['memory_gb']} GB", *hardware["gpus"]]
        ),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": environment["command"],
    }


def _model_name(config: SFTConfig | RewardConfig | DPOConfig) -> str:
    policy = config.model.policy
    if isinstance(policy, InitModelConfig):
        return f"a new {policy.init.get('model_type')} model"
    return policy + (" with LoRA" if config.model.lora else "")


def _ends(metrics: Sequence[dict[str, Any]], name: str) -> tuple[float, float]:
    """Means over the first and the last tenth: single steps are noisy."""
    values = [m[name] for m in metrics if m.get(name) is not None] or [float("nan")]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def _interval(low: float, high: float, form: str = ".3g") -> str:
    return f"[{low:{form}}, {high:{form}}]"


def _change(first: float | None, last: float | None) -> str:
    return f"{_number(first)} → {_number(last)}"


def _number(value: float | None, form: str = ".3g") -> str:
    """A metric in few digits; null in the run is what was not known, or not finite."""
    return "–" if value is None or not math.isfinite(value) else f"{value:{form}}"
