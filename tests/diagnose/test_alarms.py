"""What went wrong in a run: each rule on a curve made by hand, and silence on runs that are well."""

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

import tether
from tether.cli import main
from tether.config import (
    DataConfig,
    DPOConfig,
    DPOSection,
    KLConfig,
    ModelConfig,
    PPOConfig,
    PPOSection,
    PromptsConfig,
    QLearningConfig,
    ReferencedModelConfig,
    RewardConfig,
    RewardShapingConfig,
    SamplingConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
)
from tether.config.keys import keys
from tether.config.kinds import KINDS
from tether.diagnose import examine
from tether.diagnose.advice import ADVICE, guide_table
from tether.diagnose.alarms import alarms
from tether.diagnose.series import Curve
from tether.diagnose.state import state
from tether.errors import Interrupted, RunError
from tether.runs import RunDirectory
from tiny_ppo import id_score, tiny_config

ROOT = Path(__file__).parents[2]
PPO = PPOConfig("r", ModelConfig("m"), PromptsConfig("p"), ppo=PPOSection(cycles=200))
SFT = SFTConfig("r", SFTModelConfig("m"), DataConfig("d"))
REWARD = RewardConfig("r", SFTModelConfig("m"), DataConfig("d"))
DPO = DPOConfig("r", ReferencedModelConfig("m"), DataConfig("d"))
QLEARNING = QLearningConfig("r", ModelConfig("m"), ScoredConfig("d"))
CONFIG = {"ppo": PPO, "sft": SFT, "reward": REWARD, "dpo": DPO, "qlearning": QLEARNING}
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
DONE = {"state": "finished", "kind": "ppo", "heartbeat": NOW.isoformat()}


def healthy(kind="ppo", n=200, *, seed=None, **curves):
    """Metrics of a run that goes well; with a seed, with the noise of batches of 64. `curves` replace metrics: a value,
    or a function of how far the run is, from 0 to 1. Slashes are written as double underscores."""
    draw = np.random.default_rng(seed) if seed is not None else None

    def noise(scale):
        return 0.0 if draw is None else float(draw.normal(0, scale))

    rows = []
    for i in range(n):
        x = i / n
        learned = 1 - np.exp(-4 * x)
        if kind == "ppo":
            score = 2 * learned + noise(1 / 8)
            kl = 6 * learned
            row = {
                "cycle": i + 1, "reward/score_mean": score, "reward/score_std": 1 + noise(0.1),
                "reward/score_min": score - 2.5 + noise(0.3), "reward/score_max": score + 2.5 + noise(0.3),
                "reward/helpful_mean": score + noise(0.1), "reward/terse_mean": 0.3 + noise(0.05),
                "reward/total_mean": score - 0.05 * kl, "kl/ref_mean": kl + noise(np.sqrt(2 * kl / 64) + 0.005),
                "kl/coef": 0.05, "policy/loss": noise(0.02), "policy/entropy": 2 - learned + noise(0.1),
                "policy/kl_old_new": 0.005 * np.exp(noise(0.5)), "policy/clip_fraction": 0.05 * np.exp(noise(0.5)),
                "policy/optimality_gap": None, "value/loss": 0.3 * np.exp(noise(0.3)),
                "value/explained_variance": 0.75 * learned + noise(0.1), "response/length_mean": 40 + 8 * x + noise(3),
                "response/distinct_2": 0.6 - 0.1 * learned + noise(0.02),
                "response/shared_phrase": 0.2 + 0.1 * learned + noise(0.04),
                "response/truncated_fraction": min(1.0, abs(0.1 + noise(0.04))), "check/sampler_gap": 1e-6,
                "check/first_ratio_error": 1e-8, "optim/grad_norm": float(np.exp(noise(0.4))),
                "optim/skipped_steps": 0,
            }  # fmt: skip
            if (i + 1) % 10 == 0:
                row["eval/score_mean"] = 1.8 * learned + noise(0.05)
        elif kind == "sft":
            early = np.exp(-20 * x)
            row = {"step": i + 1, "loss": 0.5 + 3.5 * early + noise(0.05),
                   "optim/grad_norm": 0.3 + 1.5 * early * np.exp(noise(0.4)), "optim/skipped_steps": 0}  # fmt: skip
        elif kind == "dpo":
            row = {"step": i + 1, "dpo/loss": 0.69 - 0.2 * learned + noise(0.05),
                   "dpo/accuracy": 0.5 + 0.2 * learned + noise(0.08), "dpo/margin": learned + noise(0.2),
                   "dpo/chosen_logratio": -0.1 * learned + noise(0.05),
                   "dpo/rejected_logratio": -0.4 * learned + noise(0.08),
                   "optim/grad_norm": float(np.exp(noise(0.5))), "optim/skipped_steps": 0}  # fmt: skip
        elif kind == "qlearning":
            early = np.exp(-20 * x)
            row = {"step": i + 1, "qlearning/loss": (0.05 + 0.4 * early) * np.exp(noise(0.15)),
                   "qlearning/residual": 0.3 + 0.6 * early + noise(0.03), "qlearning/log_ratio": -2 * learned,
                   "value/explained_variance": 0.6 * learned + noise(0.1),
                   "optim/grad_norm": float(np.exp(noise(0.4))), "optim/skipped_steps": 0}  # fmt: skip
        else:
            row = {"step": i + 1, "reward_model/loss": 0.69 - 0.15 * learned + noise(0.05),
                   "reward_model/accuracy": 0.5 + 0.2 * learned + noise(0.08),
                   "reward_model/margin": learned + noise(0.2), "optim/grad_norm": float(np.exp(noise(0.5))),
                   "optim/skipped_steps": 0}  # fmt: skip
        for name, value in curves.items():
            key = name.replace("__", "/")
            row[key] = value(x) if callable(value) else value
        rows.append(row)
    return rows


def found(metrics, kind="ppo", *, config=None, events=(), status=DONE, **more):
    return alarms(kind, config or CONFIG[kind], metrics, list(events), status, **more)


def ppo(**sections):
    return replace(PPO, ppo=replace(PPO.ppo, **sections))


# ---------------------------------------------------------------- silence


@pytest.mark.parametrize("kind", CONFIG)
def test_a_healthy_run_raises_nothing(kind):
    assert found(healthy(kind), kind) == []


@pytest.mark.parametrize("kind", CONFIG)
@pytest.mark.parametrize("n", [60, 300])
def test_noise_raises_nothing_on_fifty_seeds(kind, n):
    for seed in range(50):
        rows = healthy(kind, n, seed=seed)
        assert found(rows, kind) == [], seed
        assert found(rows[: n // 3], kind) == [], seed  # nor while it goes on


def test_five_cycles_raise_nothing_whatever_they_show_unless_it_is_nan():
    wild = {
        "kl__ref_mean": -50.0, "policy__entropy": lambda x: 3 * (1 - x) ** 9, "policy__clip_fraction": 0.9,
        "value__explained_variance": -9.0, "reward__score_std": 0.0, "response__truncated_fraction": lambda x: x,
    }  # fmt: skip
    assert found(healthy(n=5, **wild)) == []
    (alarm,) = found(healthy(n=5, value__loss=lambda x: None if x == 0.4 else 1.0))
    assert (alarm.rule, alarm.first, alarm.last, alarm.metric) == ("not-finite", 3, 3, "value/loss")
    assert "critic_lr" in alarm.remedy


def test_a_few_odd_cycles_raise_nothing():
    rows = healthy()
    for row in rows[70:82]:
        row |= {"kl/ref_mean": -30.0, "policy/entropy": 0.0, "policy/clip_fraction": 1.0, "reward/score_std": 0.0,
                "response/truncated_fraction": 1.0, "policy/kl_old_new": 3.0}  # fmt: skip
    assert found(rows) == []


@pytest.mark.parametrize("kind", CONFIG)
def test_missing_and_null_metrics_and_no_metrics_at_all_raise_nothing(kind):
    unit = KINDS[kind].unit
    assert found([], kind) == []
    assert found([{unit: i} for i in range(1, 200)], kind) == []
    allowed = ["policy/optimality_gap", "reward/helpful_mean", "value/explained_variance", "eval/score_mean"]
    assert found([row | dict.fromkeys(allowed) for row in healthy(kind)], kind) == []


# ---------------------------------------------------------------- each rule on a curve of its own


def late(value, else_=None):
    """`value` in the second half of the run."""
    return lambda x: value if x >= 0.5 else else_


BROKEN = {
    "not-finite": {"policy__loss": late(None, 0.1)},
    "skipped-steps": {"optim__skipped_steps": late(2, 0)},
    "first-ratio": {"check__first_ratio_error": late(2e-2, 1e-8)},
    "sampler-gap": {"check__sampler_gap": late(0.2, 1e-6)},
    "negative-kl": {"kl__ref_mean": late(-0.4, 1.0)},
    "runaway-kl": {"kl__ref_mean": lambda x: 100 * x, "reward__score_mean": lambda x: min(2.0, 10 * x)},
    "entropy-collapse": {"policy__entropy": late(0.05, 2.0)},
    "long-steps": {"policy__kl_old_new": late(0.3, 0.005)},
    "clip-fraction": {"policy__clip_fraction": late(0.45, 0.05)},
    "repeated-phrase": {"response__shared_phrase": late(0.9, 0.2)},
    "length-runaway": {"response__length_mean": lambda x: 20 + 200 * x, "reward__score_mean": lambda x: 2 * x},
    "truncation-runaway": {"response__truncated_fraction": late(0.98, 0.1)},
    "dead-critic": {"value__explained_variance": lambda x: -0.2 * x},
    "reward-saturation": {"reward__score_std": late(0.0, 1.0)},
    "score-falling": {"reward__score_mean": lambda x: 3 * x if x < 0.5 else 3 - 3 * x},
    "second-opinion": {
        "reward__helpful_mean": lambda x: 4 * x * (1 - x), "reward__score_mean": lambda x: 5 * x,
        "reward__score_min": lambda x: 5 * x - 3, "reward__score_max": lambda x: 5 * x + 3,
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_a_broken_curve_raises_its_alarm_and_no_other(rule, seed):
    (alarm,) = found(healthy(seed=seed, **BROKEN[rule]))
    assert alarm.rule == rule
    assert 1 <= alarm.first < alarm.last <= 200
    assert alarm.metric is None or alarm.metric in healthy()[-1]


@pytest.mark.parametrize(
    "rule",
    [r for r in BROKEN if r not in ("runaway-kl", "length-runaway", "dead-critic", "score-falling", "second-opinion")],
)
def test_first_and_last_cycle_are_those_in_which_it_held(rule):
    (alarm,) = found(healthy(**BROKEN[rule]))
    assert (alarm.first, alarm.last) == (101, 200)


def test_a_kl_far_beyond_its_target_is_runaway_though_the_score_rises():
    curve = {"kl__ref_mean": lambda x: 40 * x}
    assert found(healthy(**curve)) == []
    (alarm,) = found(healthy(**curve), config=ppo(kl=KLConfig(target=6.0)))
    assert alarm.rule == "runaway-kl"
    assert "times its target of 6" in alarm.what
    assert "optim.lr" in alarm.remedy
    (slow,) = found(healthy(**curve), config=ppo(kl=KLConfig(target=6.0, horizon=10_000)))
    assert "ppo.kl.horizon to null" in slow.remedy
    assert found(healthy(kl__ref_mean=7.3), config=ppo(kl=KLConfig(target=6.0))) == []  # the peak of a published run


def test_a_high_kl_that_no_longer_grows_or_that_buys_score_is_no_runaway():
    assert found(healthy(kl__ref_mean=40.0, reward__score_mean=1.0)) == []
    assert found(healthy(kl__ref_mean=lambda x: 100 * x, reward__score_mean=lambda x: 3 * x)) == []


def test_a_negative_kl_names_truncated_sampling_where_that_is_on():
    rows = healthy(**BROKEN["negative-kl"])
    (plain,) = found(rows)
    (cut,) = found(rows, config=replace(PPO, sampling=SamplingConfig(top_p=0.9)))
    assert "check/sampler_gap" in plain.cause
    assert "top_p=0.9" in cut.what
    assert "sampling.top_p to 1" in cut.remedy
    assert found(healthy(kl__ref_mean=-0.05)) == []  # what noise makes of 0


def test_entropy_that_falls_slowly_is_convergence():
    assert found(healthy(policy__entropy=lambda x: 2 * 0.001**x)) == []
    assert found(healthy(policy__entropy=lambda x: 2 * (1 - x))) == []


def test_length_that_grows_without_the_score_or_answers_that_were_always_cut_are_no_alarm():
    assert found(healthy(response__length_mean=lambda x: 20 + 200 * x, reward__score_mean=1.0)) == []
    earlier = {"reward__score_mean": lambda x: min(1.0, 5 * x)}  # the score had risen before the length did
    assert found(healthy(response__length_mean=lambda x: 20 + max(0.0, 500 * (x - 0.7)), **earlier)) == []
    assert found(healthy(response__truncated_fraction=1.0)) == []


def test_a_critic_is_given_time_and_the_warm_up_of_the_config():
    assert found(healthy(value__explained_variance=lambda x: -0.5 if x < 0.1 else 0.3)) == []
    slow = healthy(value__explained_variance=lambda x: 0.0 if x < 0.5 else 0.3)
    assert [a.rule for a in found(slow)] == ["dead-critic"]
    assert found(slow, config=ppo(value_warmup_cycles=100)) == []
    (bad,) = found(healthy(value__explained_variance=-2.0))
    assert bad.severity == "serious"


def test_scores_at_their_maximum_are_saturated_and_a_clip_is_named():
    curves = {"reward__score_mean": late(1.999, 0.5), "reward__score_max": 2.0, "reward__score_min": -1.0,
                  "reward__score_std": 0.4}  # fmt: skip
    (alarm,) = found(healthy(**curves))
    assert (alarm.rule, alarm.first) == ("reward-saturation", 101)
    (clipped,) = found(healthy(**curves), config=replace(PPO, reward_shaping=RewardShapingConfig(clip=2.0)))
    assert "reward_shaping.clip is 2" in clipped.what
    assert "Raise reward_shaping.clip" in clipped.remedy


def test_a_reward_that_is_constant_from_the_start_is_serious():
    flat = dict.fromkeys(["reward__score_mean", "reward__score_min", "reward__score_max"], 1.0)
    (alarm,) = found(healthy(reward__score_std=0.0, **flat))
    assert (alarm.rule, alarm.severity) == ("reward-saturation", "serious")


def test_a_falling_score_names_the_kl_penalty_where_the_kl_fell_too_and_small_losses_are_none():
    hill = {"reward__score_mean": lambda x: 3 * x if x < 0.5 else 3 - 3 * x}
    (alarm,) = found(healthy(**hill))
    assert 70 <= alarm.first <= 110
    assert "optim.lr" in alarm.remedy
    (back,) = found(healthy(**hill, kl__ref_mean=lambda x: 4 * x if x < 0.5 else 4 - 4 * x))
    assert "ppo.kl.coef" in back.remedy
    assert found(healthy(reward__score_mean=lambda x: 2 * x if x < 0.9 else 1.8 - x / 9)) == []
    assert found(healthy(**hill, reward__score_std=4.0)) == []  # less than half of what one cycle's answers differ by


def test_the_held_out_score_is_a_second_opinion():
    rows = healthy()
    for row in rows:
        if "eval/score_mean" in row:
            x = row["cycle"] / 200
            row["eval/score_mean"] = 4 * x * (1 - x)
    (alarm,) = found(rows)
    assert (alarm.rule, alarm.metric, alarm.severity) == ("second-opinion", "eval/score_mean", "serious")
    assert 80 <= alarm.first <= 130
    assert alarm.last == 200
    assert [a.rule for a in found(rows[:60])] == []  # before the peak


def test_one_source_that_falls_under_a_score_that_falls_too_is_no_second_opinion():
    down = {"reward__score_mean": lambda x: 1 - x, "reward__helpful_mean": lambda x: 1 - x}
    assert [alarm.rule for alarm in found(healthy(**down))] == ["score-falling"]


def test_in_float32_the_stricter_bounds_hold():
    rows = healthy(check__sampler_gap=1e-3, check__first_ratio_error=1e-4)
    assert found(rows) == []  # auto: may be bfloat16
    precise = replace(PPO, model=ModelConfig("m", dtype="float32"))
    assert [a.rule for a in found(rows, config=precise)] == ["first-ratio", "sampler-gap"]


# ---------------------------------------------------------------- sft and reward


@pytest.mark.parametrize(
    ("kind", "rule", "curves"),
    [
        ("sft", "not-finite", {"loss": late(None, 1.0)}),
        ("sft", "skipped-steps", {"optim__skipped_steps": late(1, 0)}),
        ("sft", "loss-rising", {"loss": late(6.0, 1.0)}),
        ("sft", "gradient-norm", {"optim__grad_norm": late(40.0, 1.0)}),
        ("dpo", "not-finite", {"dpo__loss": late(None, 0.6)}),
        ("dpo", "loss-rising", {"dpo__loss": late(2.0, 0.6)}),
        ("dpo", "gradient-norm", {"optim__grad_norm": late(40.0, 1.0)}),
        ("dpo", "at-chance", {"dpo__accuracy": 0.5}),
        ("qlearning", "not-finite", {"qlearning__loss": late(None, 0.1)}),
        ("qlearning", "loss-rising", {"qlearning__loss": lambda x: 0.4 if x < 0.5 else 0.4 * np.exp(12 * (x - 0.5))}),
        ("qlearning", "gradient-norm", {"optim__grad_norm": late(40.0, 1.0)}),
        ("qlearning", "dead-critic", {"value__explained_variance": lambda x: -0.2 * x}),
        ("reward", "not-finite", {"reward_model__loss": late(None, 0.6)}),
        ("reward", "at-chance", {"reward_model__accuracy": 0.5}),
        ("reward", "margins-exploding", {"reward_model__margin": lambda x: 80 * x}),
    ],
)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_broken_curve_of_optimizer_steps_raises_its_alarm_and_no_other(kind, rule, curves, seed):
    (alarm,) = found(healthy(kind, seed=seed, **curves), kind)
    assert alarm.rule == rule
    (name,) = curves
    assert alarm.metric == name.replace("__", "/")
    assert "ppo." not in alarm.remedy


def report(**changes):
    share = {"value": 0.7, "low": 0.66, "high": 0.74}
    return {"train_pairs": 900, "test_pairs": 500, "accuracy": share, "train_accuracy": 0.75, "loss": 0.6,
            "learned": True, **changes}  # fmt: skip


def test_a_reward_model_is_judged_by_its_held_out_pairs():
    rows = healthy("reward")
    assert found(rows, "reward", reward_report=report()) == []
    (memory,) = found(rows, "reward", reward_report=report(train_accuracy=0.97))
    assert memory.rule == "memorized"
    assert "97.0%" in memory.what
    chance = report(learned=False, accuracy={"value": 0.51, "low": 0.47, "high": 0.55}, train_accuracy=0.55)
    (alarm,) = found(rows, "reward", reward_report=chance)
    assert (alarm.rule, alarm.severity) == ("at-chance", "serious")
    assert found(rows, "reward", reward_report=chance | {"test_pairs": 2}) == []  # too few to say so
    none = report(learned=None, accuracy=None, train_accuracy=0.5, loss=None, test_pairs=0)  # test_fraction: 0
    (alarm,) = found(healthy("reward", reward_model__accuracy=0.5), "reward", reward_report=none)
    assert (alarm.rule, alarm.severity) == ("at-chance", "warning")


def test_a_dpo_policy_is_judged_by_its_held_out_pairs_and_no_guesser_where_it_is_too_sure_alone():
    rows = healthy("dpo")
    assert found(rows, "dpo", reward_report=report()) == []
    (memory,) = found(rows, "dpo", reward_report=report(train_accuracy=0.97))
    assert (memory.rule, memory.metric) == ("memorized", "dpo/accuracy")
    assert "dpo.epochs" in memory.remedy
    chance = report(learned=False, accuracy={"value": 0.51, "low": 0.47, "high": 0.55}, train_accuracy=0.55)
    (alarm,) = found(rows, "dpo", reward_report=chance)
    assert (alarm.rule, alarm.severity, alarm.metric) == ("at-chance", "serious", "dpo/accuracy")
    assert found(rows, "dpo", reward_report=report(learned=False, loss=1.4)) == []  # its accuracy is 0.7 [0.66, 0.74]


def test_the_accuracy_on_single_answers_is_not_compared_with_that_of_guessing():
    rows = healthy("dpo", dpo__accuracy=0.4)  # of kto: right of all answers, nine in ten of which may be good
    assert [alarm.rule for alarm in found(rows, "dpo")] == ["at-chance"]
    assert found(rows, "dpo", config=replace(DPO, dpo=DPOSection(loss="kto"))) == []


def test_a_critic_of_q_learning_that_is_far_worse_than_a_constant_is_serious():
    (alarm,) = found(healthy("qlearning", value__explained_variance=lambda x: 0.5 if x < 0.5 else -4.0), "qlearning")
    assert (alarm.rule, alarm.severity, alarm.first) == ("dead-critic", "serious", 101)
    assert "optim.critic_lr" in alarm.remedy


def test_a_reward_model_that_was_still_rising_and_knows_no_pair_by_heart_could_have_learned_more():
    rising = healthy("reward", seed=0, reward_model__accuracy=lambda x: 0.5 + 0.3 * x**2)
    (alarm,) = found(rising, "reward", reward_report=report(train_accuracy=0.71))
    assert (alarm.rule, alarm.severity) == ("still-learning", "warning")
    assert found(healthy("reward", seed=0), "reward", reward_report=report(train_accuracy=0.71)) == []
    assert [a.rule for a in found(rising, "reward", reward_report=report(train_accuracy=0.97))] == ["memorized"]


# ---------------------------------------------------------------- events and status


def told(cycle, what, unit="cycle", rule=None):
    return {"time": NOW.isoformat(), "event": "alarm", unit: cycle, "what": what} | ({"rule": rule} if rule else {})


def test_what_the_trainer_recorded_is_folded_into_the_rule_of_its_kind():
    events = [
        told(2, "sampler gap 0.002 nats per token, above 0.0001", rule="sampler-gap"),
        told(4, "sampler gap 0.003 nats per token, above 0.0001", rule="sampler-gap"),
        told(3, "the first ratio is off 1 by 0.00012 on average, 0.3 at most", rule="first-ratio"),
        told(3, "optimizer step 33 skipped: its gradient is not finite", rule="skipped-steps"),
        {"time": "", "event": "resumed", "cycle": 3},
    ]
    by_rule = {a.rule: a for a in found(healthy(n=4), events=events)}
    assert set(by_rule) == {"sampler-gap", "first-ratio", "skipped-steps"}
    assert (by_rule["sampler-gap"].first, by_rule["sampler-gap"].last) == (2, 4)
    assert "0.003 nats per token" in by_rule["sampler-gap"].what
    assert by_rule["skipped-steps"].severity == "warning"  # one


def test_other_recorded_alarms_are_shown_once_a_kind_on_one_line():
    events = [told(i, f"the moon\nstood at {i} degrees") for i in range(1, 4)]
    (alarm,) = found(healthy(n=4), events=events)
    assert (alarm.rule, alarm.first, alarm.last) == ("recorded", 1, 3)
    assert alarm.what == "The moon stood at 3 degrees (3 times)."


def test_words_in_a_recorded_text_make_no_alarm_of_another_rule():
    (alarm,) = found(healthy(n=4), events=[told(2, "two rows were skipped, the sampler gap is fine")])
    assert (alarm.rule, alarm.what) == ("recorded", "Two rows were skipped, the sampler gap is fine.")


def test_recorded_alarms_beyond_twenty_are_counted():
    events = [told(i, f"odd {'x' * i}") for i in range(1, 26)]
    first, *others = found(healthy(n=30), events=events)
    assert first.what == "5 more alarms that differ in their words: see events.jsonl."
    assert (first.first, first.last) == (1, 5)
    assert [a.first for a in others] == list(range(6, 26))


def test_skipped_steps_are_counted_among_those_that_were_made():
    rows = [row | {"optim/steps": 2} for row in healthy(n=4)]
    (alarm,) = found(rows, events=[told(3, "skipped", rule="skipped-steps")])
    assert "1 optimizer step of 8 skipped" in alarm.what


def test_the_events_of_a_run_are_the_ones_that_rules_know(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("tether.train.rollout.SAMPLER_GAP", {"float32": 0.0, "bfloat16": 0.0})
    monkeypatch.setattr("tether.train.update.FIRST_RATIO_MEAN", {"float32": -1.0, "bfloat16": -1.0})
    run = tether.ppo(tiny_config(tmp_path / "run", tiny_model("llama"), ppo={"cycles": 2, "batch": 4, "minibatch": 4}),
                     reward=id_score)  # fmt: skip
    rules = [a.rule for a in alarms("ppo", run.config, run.metrics, run.events, run.status)]
    assert rules == ["first-ratio", "sampler-gap"]


def test_the_state_of_a_run_is_stale_when_it_says_running_and_is_silent():
    running = {"state": "running", "heartbeat": NOW.isoformat()}
    assert state(running, NOW + timedelta(minutes=9)) == "running"
    assert state(running, NOW - timedelta(minutes=9)) == "running"  # the clock of another machine
    assert state(running, NOW + timedelta(minutes=11)) == "stale"
    assert state(running, NOW + timedelta(minutes=11), patience_s=3600) == "running"
    assert state({"state": "running"}, NOW) == "stale"
    for said in ("finished", "stopped", "failed"):
        assert state({"state": said, "heartbeat": NOW.isoformat()}, NOW + timedelta(days=9)) == said


def test_a_stale_run_is_an_alarm_and_a_slow_one_is_not():
    running = DONE | {"state": "running", "pid": 7, "host": "gpu-1"}
    rows = healthy()
    assert found(rows, status=running, now=NOW + timedelta(minutes=9)) == []
    assert found(rows, status=running) == []  # no clock
    (alarm,) = found(rows, status=running, now=NOW + timedelta(minutes=90))
    assert (alarm.rule, alarm.metric, alarm.last) == ("stale", None, 200)
    assert "for 1 h 30 min (process 7 on gpu-1)" in alarm.what
    assert (
        found([row | {"time/rollout_s": 2000.0} for row in rows], status=running, now=NOW + timedelta(minutes=90)) == []
    )


def test_the_serious_come_first():
    rows = healthy(policy__clip_fraction=0.5, kl__ref_mean=late(-1.0, 1.0))
    assert [(a.rule, a.severity) for a in found(rows)] == [("negative-kl", "serious"), ("clip-fraction", "warning")]


# ---------------------------------------------------------------- the parts


def test_levels_are_medians_of_five_cycles_without_nulls():
    curve = Curve(range(1, 13), [1, 2, None, 9, 3, float("nan"), 0, 5, 5, 5, 5, 5])
    assert (curve.first, curve.last, curve.levels) == ([1, 8], [7, 12], [2, 5])


def test_noise_is_that_of_a_level_and_a_trend_is_none():
    draw = np.random.default_rng(0)
    values = [0.3 * i + float(v) for i, v in enumerate(draw.normal(0, 1, 5000))]
    assert Curve(range(5000), values).noise == pytest.approx(0.536, rel=0.1)  # deviation of the median of five
    assert Curve(range(100), [0.3 * i for i in range(100)]).noise == pytest.approx(0, abs=1e-9)


def test_a_hundred_thousand_cycles_are_read_quickly():
    rows = [row | {"cycle": i} for i, row in enumerate(healthy(n=2000, seed=0) * 50, 1)]
    best = 9.0
    for _ in range(3):
        began = time.process_time()
        found(rows)
        best = min(best, time.process_time() - began)
    assert best < 0.3


def test_a_fault_in_a_long_run_is_found():
    (alarm,) = found(healthy(n=20_000, **BROKEN["entropy-collapse"]))
    assert alarm.rule == "entropy-collapse"
    (skipped,) = found([row | {"optim/skipped_steps": int(row["cycle"] == 12_347)} for row in healthy(n=20_000)])
    assert (skipped.rule, skipped.first) == ("skipped-steps", 12_347)


def test_it_loads_no_torch():
    code = "from tether.diagnose import alarms, examine\nimport sys\nassert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def every_alarm():
    """One of each rule that a run can raise."""
    yield from (a for curves in BROKEN.values() for a in found(healthy(**curves)))
    yield from found(healthy("sft", loss=late(6.0, 1.0), optim__grad_norm=late(40.0, 1.0)), "sft")
    yield from found(healthy("reward", reward_model__accuracy=0.5, reward_model__margin=99.0), "reward")
    yield from found(healthy("reward"), "reward", reward_report=report(train_accuracy=0.97))
    yield from found(
        healthy("reward"), "reward", reward_report=report(accuracy={"value": 0.6, "low": 0.55, "high": 0.65})
    )
    yield from found(
        healthy("reward", reward_model__accuracy=lambda x: 0.5 + 0.3 * x**2),
        "reward",
        reward_report=report(train_accuracy=0.71),
    )
    yield from found(healthy("dpo", dpo__chosen_logratio=late(-0.8, -0.1)), "dpo")
    yield from found(healthy(), status={"state": "running"}, now=NOW)
    yield from found(healthy(), events=[told(1, "odd")])


def test_every_alarm_names_keys_that_exist_and_speaks_in_sentences():
    known = {key.name for kind in KINDS.values() for key in keys(kind.config)} | {
        "reward[].weight",
        "reward[].timeout_s",
    }
    sections = {name.partition(".")[0] for name in known if "." in name}
    for alarm in every_alarm():
        for text in (alarm.what, alarm.cause, alarm.remedy):
            assert not text[0].islower(), text
            assert text.endswith("."), text
        words = re.findall(r"\b([a-z_]+(?:\[\])?(?:\.[a-z_]+)+)", alarm.remedy)
        named = [w for w in words if w.partition(".")[0] in sections]
        assert [w for w in named if w not in known] == [], alarm.rule
        assert named or alarm.rule == "recorded", alarm.rule


def test_the_guide_shows_the_advice_as_it_is():
    assert guide_table() in (ROOT / "docs" / "guide.md").read_text(), "python -m tether.diagnose.advice prints it"
    assert {rule for rule, advice in ADVICE.items() if advice.meaning} == {a.rule for a in every_alarm()}


def test_chosen_answers_that_become_unlikely_are_an_alarm_whose_remedy_is_nll():
    falling = {"dpo__chosen_logratio": late(-0.8, -0.1), "dpo__rejected_logratio": late(-1.5, -0.3)}
    (alarm,) = found(healthy("dpo", **falling), "dpo")
    assert (alarm.rule, alarm.severity, alarm.metric) == ("chosen-falls", "warning", "dpo/chosen_logratio")
    assert (alarm.first, alarm.last) == (101, 200)
    assert "0.8 nats per token less likely" in alarm.what
    assert "rejected ones is -1.5" in alarm.what
    assert "dpo.nll" in alarm.remedy
    (alone,) = found(healthy("dpo", **falling | {"dpo__rejected_logratio": None}), "dpo")
    assert "rejected" not in alone.what
    assert found(healthy("dpo", dpo__rejected_logratio=-3.0), "dpo") == []
    assert found(healthy("dpo", n=10, **falling), "dpo") == []


def test_answers_that_end_in_one_phrase_are_an_alarm_and_serious_where_the_score_rose_with_them():
    phrase = {"response__shared_phrase": lambda x: min(0.95, 0.2 + 1.5 * x)}
    (alarm,) = found(healthy(**phrase, reward__score_mean=0.3))
    assert (alarm.rule, alarm.severity, alarm.metric) == ("repeated-phrase", "warning", "response/shared_phrase")
    rising = {"reward__score_mean": lambda x: min(1.5, 3 * x), "reward__score_max": 5.0, "reward__score_min": -4.0}
    (alarm,) = found(healthy(**phrase, **rising))
    assert alarm.severity == "serious"
    assert "correlation" in alarm.what
    (alarm,) = found(healthy(response__distinct_2=late(0.2, 0.6)))
    assert (alarm.rule, alarm.metric) == ("repeated-phrase", "response/distinct_2")
    assert found(healthy(response__shared_phrase=0.9)) == []  # it was so from the start: a form of the data


DEMO = json.loads((Path(__file__).parent / "demo_runs.json").read_text())  # curves of whole runs, four of the demo


@pytest.mark.parametrize(
    ("run", "alarmed"), [("seed 0, avx2", True), ("seed 0, plain", True), ("seed 4", False), ("seed 5", False)]
)
def test_the_demo_whose_score_rose_by_courtesies_is_told_from_the_one_that_learned(run, alarmed):
    """The first two ran with a reward model that was right on 60 % of held-out pairs (an earlier recipe: two passes,
    annotators who never tired of a courtesy): a judge preferred the result on 65 % and 73 %. The others: on 100 %."""
    rows = [row | {name: curve[i] for name, curve in DEMO[run].items()}
            for i, row in enumerate(healthy(n=len(DEMO[run]["reward/score_mean"]), seed=0))]  # fmt: skip
    alarms = [a for a in found(rows) if a.rule == "repeated-phrase"]
    assert [(a.severity, a.metric) for a in alarms] == [("serious", "response/shared_phrase")] * alarmed


def test_a_phrase_in_nearly_every_answer_is_seen_in_a_run_of_sixteen_cycles():
    """examples/loop without a KL target, seed 4: 20 nats, and "He liked to play with his friends." again and again."""
    loop = DEMO["loop, seed 4"]
    rows = [row | {name: curve[i] for name, curve in loop.items()} for i, row in enumerate(healthy(n=16, seed=0))]
    (alarm,) = [a for a in found(rows) if a.rule == "repeated-phrase"]
    assert alarm.severity == "serious"


@pytest.mark.parametrize(("held_out", "train", "alarmed"), [(0.597, 0.708, True), (0.606, 0.698, True),
                         (0.646, 0.7, True), (0.758, 0.804, False), (0.792, 0.82, False)])  # fmt: skip
def test_the_reward_models_of_these_runs_are_told_apart_as_well(held_out, train, alarmed):
    share = {"value": held_out, "low": held_out - 0.05, "high": held_out + 0.05}
    alarms = found(healthy("reward", seed=0), "reward", reward_report=report(accuracy=share, train_accuracy=train))
    assert [a.rule for a in alarms] == ["weak-reward-model"] * alarmed
    unsure = share | {"high": max(0.71, share["high"])}  # of few pairs
    alarms = found(healthy("reward", seed=0), "reward", reward_report=report(accuracy=unsure, train_accuracy=train))
    assert alarms == []


# ---------------------------------------------------------------- tether doctor RUN


def written(path, kind="ppo", rows=(), *, events=(), error=None):
    """A run directory with these metrics."""
    with suppress(Interrupted), RunDirectory.open(replace(CONFIG[kind], run=str(path)), command=kind) as run:
        for row in rows:
            run.append_metrics(row)
        for name, fields in events:
            run.event(name, **fields)
        if error:
            raise error
    return path


def test_doctor_names_what_went_wrong_and_the_knob(tmp_path, capsys):
    path = written(tmp_path / "run", rows=healthy(reward__score_mean=late(2.0, 1.0), **BROKEN["entropy-collapse"]))
    assert main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path}: PPO, finished, 200 of 200 cycles done" in out
    assert "\n  score     1 → 2\n" in out
    assert "nats per response" in out
    assert "held-out" in out
    assert "serious: entropy-collapse (cycle 101 to 200)" in out
    for label in ("what", "cause", "remedy"):
        assert f"\n  {label}" in out
    assert "optim.lr" in out
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_doctor_says_in_words_that_nothing_is_wrong(tmp_path, capsys):
    assert main(["doctor", str(written(tmp_path / "ppo", rows=healthy()))]) == 0
    assert f"nothing found: none of the {len(KINDS['ppo'].alarms)} rules holds" in capsys.readouterr().out
    assert main(["doctor", str(written(tmp_path / "sft", "sft", healthy("sft")))]) == 0
    assert "supervised fine-tuning, finished, 200 steps done" in capsys.readouterr().out
    cut = written(tmp_path / "cut", rows=healthy(n=3), error=Interrupted("stopped after cycle 3; go on"))
    assert main(["doctor", str(cut)]) == 0
    out = capsys.readouterr().out
    assert "stopped (stopped after cycle 3; go on), 3 of 200 cycles done" in out
    assert "3 cycles are few" in out


def test_doctor_of_a_run_that_has_done_nothing_yet(tmp_path):
    assert "0 of 200 cycles done" in examine(written(tmp_path / "run"))


def test_doctor_reads_the_report_of_a_reward_model(tmp_path):
    path = written(tmp_path / "rm", "reward", healthy("reward"))
    (path / "reward_report.json").write_text(json.dumps(report(train_accuracy=0.97)))
    text = examine(path)
    assert "memorized" in text
    assert "[0.66, 0.74] on 500 pairs" in text
    (path / "reward_report.json").write_text("{half")
    assert "nothing found" in examine(path)


def test_doctor_shows_hostile_text_and_does_not_act_on_it(tmp_path, capsys):
    path = written(tmp_path / "run", rows=healthy(n=3), events=[("alarm", {"cycle": 1, "what": "\x1b[2J\u202egone"})])
    assert main(["doctor", str(path)]) == 0
    out = capsys.readouterr().out
    assert "␛[2J⟨U+202E⟩gone" in out
    assert "\x1b" not in out


def test_doctor_refuses_a_directory_that_is_no_run(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("ppo: {}\n")
    assert main(["doctor", str(tmp_path)]) == 2
    assert "status.json cannot be read" in capsys.readouterr().err
    (tmp_path / "status.json").write_text('{"kind": "sorcery", "state": "finished"}')
    with pytest.raises(RunError, match="sorcery"):
        examine(tmp_path)


@pytest.mark.learning
def test_a_real_run_of_a_few_cycles_raises_nothing(tiny_model, tmp_path, capsys, seed):
    config = tiny_config(tmp_path / "run", tiny_model("llama", seed=seed), ppo={"cycles": 24})
    run = tether.ppo(replace(config, seed=seed), reward=id_score)
    assert alarms("ppo", run.config, run.metrics, run.events, run.status, now=datetime.now(UTC)) == []
    capsys.readouterr()
    assert main(["doctor", str(run.path)]) == 0
    assert "nothing found" in capsys.readouterr().out
