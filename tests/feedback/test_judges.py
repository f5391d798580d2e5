"""A judge beside people, on figures worked out by hand."""

import math

import pytest

from labeled import label
from tether.feedback.judges import judge_quality
from tether.feedback.records import Answer, Filters, Item, Verdict


def judged(item, probability, **changes):
    choice = "tie" if probability == 0.5 else "a" if probability > 0.5 else "b"
    return label(item, "judge:m", choice, probability=probability, **changes)


def test_a_judge_is_compared_with_what_most_people_chose():
    people = [
        *(label(0, name, choice) for name, choice in (("p", "a"), ("q", "a"), ("r", "b"))),  # a
        *(label(1, name, choice) for name, choice in (("p", "b"), ("q", "both_bad"))),  # b
        *(label(2, name, choice) for name, choice in (("p", "a"), ("q", "b"))),  # tie
        label(3, "p", "b"), label(4, "p", "skip"),
    ]  # fmt: skip
    labels = [judged(0, 0.9), judged(1, 0.7), judged(2, 0.5), judged(3, 0.2), judged(4, 0.6), judged(5, 0.8)]
    (found,) = judge_quality(people + labels)
    assert found.quality.annotator == "judge:m"
    assert (found.quality.labels, found.quality.ties, found.shared) == (6, 1, 4)  # a skip is no judgment
    assert (found.agreement.value, found.agreement.count) == (2 / 3, 3)  # items 0 and 3 of 0, 1 and 3
    # judge a a tie b, people a b tie b: 3 of 4 the same; by chance (2·1 + 1·2 + 1·1) / 16
    assert found.kappa == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16))
    assert (found.wins.value, found.wins.count) == (4 / 5, 5)  # 0, 1, 4 and 5 of all but the tie


def test_how_sure_a_judge_is_is_held_against_how_often_people_say_the_same():
    probabilities = [0.95, 0.97, 0.05, 0.65, 0.35, 1.0]
    people = [label(i, "p", choice) for i, choice in enumerate("abbabb")]
    (found,) = judge_quality([*people, *(judged(i, p) for i, p in enumerate(probabilities))])
    sure, unsure = reversed(found.calibration)
    assert unsure.sure == pytest.approx(0.65)
    assert (unsure.right.value, unsure.right.count) == (1.0, 2)
    assert sure.sure == pytest.approx((0.95 + 0.97 + 0.95 + 1.0) / 4)
    assert (sure.right.value, sure.right.count) == (0.5, 4)  # items 0 and 2


def test_the_longer_answer_is_the_baseline_and_gold_and_repeats_have_measures_of_their_own():
    people = [label(i, "p", choice, longer=longer) for i, (choice, longer) in enumerate([("a", 0), ("b", 0), ("b", 1)])]
    people += [label(3, "p", "a", longer=0, gold=0), label(4, "p", "a", longer=0, repeat_of=0)]
    labels = [judged(i, 0.9, longer=longer) for i, longer in enumerate([0, 0, 1])]
    (found,) = judge_quality([*people, *labels, judged(3, 0.9, longer=0, gold=0)])
    assert (found.by_length.value, found.by_length.count) == (2 / 3, 3)
    assert (found.quality.longer.value, found.quality.longer.count) == (2 / 3, 3)
    assert (found.quality.gold.value, found.quality.gold.count) == (1.0, 1)
    assert found.shared == 3


def test_the_share_of_wins_is_corrected_by_the_errors_on_what_people_decided():
    # of 10 pairs in which a is better the judge says so in 9, of 10 in which b is, in 8: q₁ = .9, q₀ = .8; of all 120
    # it calls a the better one in 9 + 2 + 49 = 60, so θ = (.5 + .8 − 1) / (.8 + .9 − 1) = 3/7
    people = [label(i, "p", "a" if i < 10 else "b") for i in range(20)]
    says_a = [i < 9 or i in (10, 11) or 20 <= i < 69 for i in range(120)]
    (found,) = judge_quality([*people, *(judged(i, 0.9 if a else 0.1) for i, a in enumerate(says_a))])
    assert found.wins.value == 0.5
    assert found.true_wins.value == pytest.approx(3 / 7)
    assert found.true_wins.low < 3 / 7 < found.true_wins.high


def test_a_judge_alone_or_without_a_judge_has_nothing_to_be_compared_with():
    assert judge_quality([label(0, "p")]) == ()
    (found,) = judge_quality([judged(0, 0.9)])
    assert (found.shared, found.agreement, found.kappa, found.by_length, found.true_wins) == (0, None, None, None, None)
    assert found.calibration == ()


def test_the_liking_for_what_is_shown_first_is_read_from_the_answers_in_both_orders(store):
    store.add_items([Item("q", (Answer("yes"), Answer("no")))])
    store.add_judge("judge:m", {})
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    answers = ({"order": [0, 1], "probability": sigmoid(3)}, {"order": [1, 0], "probability": sigmoid(1)})
    (waiting,) = store.judge_queue("judge:m")
    store.record_verdicts("judge:m", [Verdict(waiting[0], sigmoid(1), (0, 1), "be kind", answers)])
    (found,) = judge_quality(store.labels(Filters(judges=True)))
    assert found.first == pytest.approx((sigmoid(3) + sigmoid(1)) / 2)
    assert list(store.labels()) == []  # nobody asked for judges
