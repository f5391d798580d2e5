"""The report on a reward model: numbers by hand or from tables, and verdicts that cannot be fooled."""

import errno
import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tether.data.pairs import Pair
from tether.errors import RunError
from tether.reports.page import _of_held_out_pairs
from tether.statistics import wilson_interval
from tether.train.preference_report import build_report, calibrate, clustered_interval


def pairs(lengths, group=None):
    """Pairs whose answers have these lengths: [(chosen, rejected), …]."""
    return [Pair([5], [7] * c, [8] * r, i, f"p{i}", group) for i, (c, r) in enumerate(lengths)]


def scores(chosen, rejected):
    return torch.tensor([*chosen, *rejected], dtype=torch.float64)


# Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_the_interval_is_wilsons(successes, n, low, high):
    assert wilson_interval(successes / n, n) == pytest.approx((low, high), abs=1e-4)


def test_pairs_that_succeed_and_fail_together_widen_the_interval():
    success = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0] * 10, dtype=torch.float64)
    apart = clustered_interval(success, [str(i) for i in range(80)])
    twins = clustered_interval(success, [str(i // 2) for i in range(80)])  # of 40 prompts, two pairs each, always alike
    assert (apart.low, apart.high) == wilson_interval(0.75, 80)
    assert (twins.low, twins.high) == pytest.approx(wilson_interval(0.75, 40))


def test_the_interval_covers_the_truth_as_often_as_it_says_where_pairs_hang_together():
    # 60 prompts of 1 to 5 pairs; a prompt is easy (.95) or hard (.45), so its pairs are alike. Truth: their average.
    draw, hits = random.Random(0), 0
    for _ in range(400):
        success, clusters = [], []
        for prompt in range(60):
            p = draw.choice((0.95, 0.45))
            for _ in range(draw.randint(1, 5)):
                success.append(float(draw.random() < p))
                clusters.append(str(prompt))
        found = clustered_interval(torch.tensor(success, dtype=torch.float64), clusters)
        hits += found.low <= 0.7 <= found.high
    assert 0.92 <= hits / 400 <= 0.98


def test_accuracy_loss_scale_and_length_baseline_by_hand():
    train = pairs([(3, 2), (4, 2), (1, 5)])  # the longer one wins two of three times
    test = pairs([(3, 2), (2, 4), (3, 3), (9, 1)])
    report = build_report(train, scores([1, 3, 5], [1, 1, 1]), test, scores([1, 0, 2, 0], [0, 1, 2, 1]))
    assert report.accuracy.value == 0.25  # one right, two wrong, and a tie is no success
    assert report.train_accuracy == pytest.approx(2 / 3)
    log_odds = [1, -1, 0, -1]
    assert report.loss == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in log_odds) / 4)
    assert report.length_prefers == "longer"
    assert report.length_accuracy.value == (1 + 0 + 0.5 + 1) / 4
    assert report.mean == pytest.approx(2.0)
    assert report.std == pytest.approx(math.sqrt((1 + 1 + 9 + 1 + 1 + 1) / 5))
    assert not report.learned


def test_ties_count_in_the_loss_and_nowhere_else():
    test = pairs([(3, 2), (2, 4)])
    tie = replace(pairs([(9, 1)])[0], probability=0.5)
    without = build_report(test, scores([1, 3], [0, 0]), test, scores([1, 0], [0, 1]))
    report = build_report([*test, tie], scores([1, 3, 5], [0, 0, 0]), [*test, tie], scores([1, 0, 2], [0, 1, 0]))
    assert (report.test_pairs, report.test_ties) == (2, 1)
    for name in ("accuracy", "train_accuracy", "length_prefers", "length_accuracy", "calibration"):
        assert getattr(report, name) == getattr(without, name), name
    both = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2
    assert report.loss == pytest.approx((2 * without.loss + both) / 3)


def test_without_held_out_pairs_the_report_claims_nothing(tmp_path):
    report = build_report(pairs([(3, 2), (2, 4)]), scores([1, 3], [0, 0]), [], scores([], []))
    assert (report.accuracy, report.loss, report.length_accuracy, report.calibration_error) == (None,) * 4
    assert (report.learned, report.calibration, report.train_accuracy) == (None, [], 1.0)
    assert "No pairs were held out: nothing is known" in report.text()
    report.write(tmp_path)
    assert json.loads((tmp_path / "reward_report.json").read_text())["accuracy"] is None
    assert not (tmp_path / "calibration.html").exists()


def test_held_out_pairs_that_are_all_ties_are_not_said_to_be_missing():
    tie = [replace(p, probability=0.5) for p in pairs([(3, 2), (2, 4)])]
    train = pairs([(3, 2), (2, 4)])
    for test, said, held_out in ((tie, scores([1, 0], [0, 1]), None), ([], scores([], []), 2)):
        text = build_report(train, scores([1, 3], [0, 0]), test, said, held_out=held_out).text()
        assert "No pairs were held out" not in text
        assert "None of the 2 held-out examples says which answer is better" in text


def test_without_a_decided_training_pair_the_training_accuracy_is_a_dash():
    test = pairs([(3, 2), (2, 4)])
    report = build_report([], scores([], []), test, scores([1, 0], [0, 1]))
    assert "training pairs –." in report.text()
    assert report.train_accuracy is None
    headlines, _ = _of_held_out_pairs(asdict(report))
    assert [h.value for h in headlines if h.label == "Training accuracy"] == ["–"]


@pytest.mark.filterwarnings("error")
def test_a_report_on_few_scores_or_none_is_valid_json(tmp_path):
    for train, said in (([], scores([], [])), (pairs([(3, 2)]), scores([1], [0]))):
        build_report(train, said, [], scores([], [])).write(tmp_path)
        json.loads((tmp_path / "reward_report.json").read_text(), parse_constant=pytest.fail)


def test_a_report_on_pairs_of_one_prompt_says_so_and_counts_each_pair():
    train, test = pairs([(3, 2)] * 20), pairs([(3, 2)] * 20)
    one = [replace(p, prompt_key="same") for p in train], [replace(p, prompt_key="same") for p in test]
    said = scores([1] * 20, [0] * 20)
    report = build_report(one[0], said, one[1], said)
    assert report.same_prompts
    assert "held out by their answers" in report.text()
    apart = build_report([replace(p, prompt_key=f"q{p.row}") for p in train], said, test, said)
    assert report.accuracy == apart.accuracy
    assert not apart.same_prompts


def test_a_constant_model_is_not_accurate_and_has_no_scale():
    train, test = pairs([(2, 1)] * 50), pairs([(2, 1)] * 50)
    report = build_report(train, torch.full((100,), 3.0), test, torch.full((100,), 3.0))
    assert report.accuracy.value == 0.0
    assert report.loss == pytest.approx(math.log(2))
    assert not report.learned
    assert "Nothing was learned" in report.text()
    assert (report.mean, report.std) == (3.0, 1.0)


def test_a_confidently_wrong_model_is_not_called_learned_however_often_it_is_right():
    test = pairs([(2, 1)] * 100)
    report = build_report(
        test, scores([1.0] * 100, [0.0] * 100), test, scores([1.0] * 80 + [-9.0] * 20, [0.0] * 80 + [9.0] * 20)
    )
    assert report.accuracy.low > 0.7
    assert report.loss > math.log(2)
    assert not report.learned
    assert "so sure of itself" in report.text()
    assert "Nothing was learned" not in report.text()


def test_a_model_that_only_counts_tokens_is_compared_with_the_length_only_baseline():
    lengths = [(5, 1)] * 80 + [(1, 5)] * 20
    by_length = scores([c for c, _ in lengths], [r for _, r in lengths])
    report = build_report(pairs(lengths), by_length / 4, pairs(lengths), by_length / 4)
    assert report.learned
    assert report.accuracy.value == report.length_accuracy.value == 0.8
    assert "no better than the length-only baseline" in report.text()


def test_calibration_puts_pairs_into_bins_by_confidence():
    # log-odds 0 → .5; ±log(.65/.35) → .65; ±log(.95/.05) → .95; and 30 → 1, which belongs to the last bin.
    odds = [math.log(0.65 / 0.35), math.log(0.95 / 0.05)]
    margin = torch.tensor([0.0, odds[0], -odds[0], odds[1], odds[1], -odds[1], 30.0], dtype=torch.float64)
    bins = calibrate(margin, [str(i) for i in range(7)])
    assert [b.pairs for b in bins] == [1, 2, 4]
    assert [b.confidence for b in bins] == [0.5, pytest.approx(0.65), pytest.approx((0.95 * 3 + 1) / 4)]
    assert [b.accuracy.value for b in bins] == [0.0, 0.5, 0.75]


@pytest.mark.parametrize(("sharpness", "calibrated"), [(1.0, True), (3.0, False)])
def test_only_a_model_whose_log_odds_are_true_is_calibrated(sharpness, calibrated):
    draw = random.Random(0)
    truth = [draw.gauss(0, 1.5) for _ in range(20000)]  # log-odds that the first answer wins
    first_wins = [draw.random() < 1 / (1 + math.exp(-t)) for t in truth]
    margin = [t if won else -t for t, won in zip(truth, first_wins, strict=True)]  # of the chosen over the other
    test, said = pairs([(1, 2)] * 20000), [sharpness * m for m in margin]
    report = build_report(test, scores(said, [0] * 20000), test, scores(said, [0] * 20000))
    assert (report.calibration_error < 0.015) == calibrated


def test_a_report_on_disk_is_the_old_one_or_the_new_one_never_half(tmp_path, monkeypatch):
    report = build_report(
        pairs([(2, 1)] * 4), scores([1, 2, 3, 4], [0] * 4), pairs([(1, 2)] * 2), scores([1, 2], [0, 0])
    )
    report.write(tmp_path)
    whole = (tmp_path / "reward_report.json").read_text()
    write = Path.write_text

    def full(path, text, **kwargs):
        write(path, text[:10], **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match=r"reward_report\.json cannot be written"):
        report.write(tmp_path)
    assert (tmp_path / "reward_report.json").read_text() == whole
