"""Agreement is what the textbooks say it is, on their own examples."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labeled import label
from tether.feedback.agreement import (
    _alpha_of,
    _coincidences,
    agreement,
    cohen_kappa,
    cohen_kappas,
    krippendorff_alpha,
    wilson,
)

# Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", section C: 4 observers, 12 units, values missing
RELIABILITY = {
    "A": "1 2 3 3 2 1 4 1 2 . . .",
    "B": "1 2 3 3 2 2 4 1 2 5 . 3",
    "C": ". 3 3 3 2 3 4 2 2 5 1 .",
    "D": "1 2 3 3 2 4 4 1 2 5 1 .",
}


def published():
    units = {}
    for observer, row in RELIABILITY.items():
        for unit, value in enumerate(row.split()):
            if value != ".":
                units.setdefault((unit, 0, 1), {})[observer] = value
    return units


def test_alpha_of_krippendorffs_published_example():
    alpha = krippendorff_alpha(published())
    assert round(alpha.value, 3) == 0.743
    assert alpha.count == 11  # the twelfth was seen by one observer alone
    assert alpha.low < 0.743 < alpha.high


def test_the_bootstrap_is_seeded_and_its_interval_is_that_of_drawing_items():
    units = published()
    one, again, other = (krippendorff_alpha(units, seed=seed) for seed in (0, 0, 1))
    assert one == again
    assert (one.low, one.high) != (other.low, other.high)
    rng = np.random.default_rng(5)
    table = [[list(said.values()).count(v) for v in "12345"] for said in units.values() if len(said) > 1]
    drawn = [np.array(table)[rng.integers(len(table), size=len(table))] for _ in range(1000)]
    slow = [alpha_by_pairs(t) for t in drawn]  # the slow way: draw units, and compute each α from its pairs
    assert np.quantile(slow, [0.025, 0.975]) == pytest.approx([one.low, one.high], abs=0.05)


def alpha_by_pairs(table) -> float:
    """α by its definition, 1 - D_o/D_e, from every ordered pair of values: within a unit, and in all."""
    units = [[value for value, count in enumerate(counts) for _ in range(count)] for counts in table]
    units = [values for values in units if len(values) > 1]
    n = sum(map(len, units))
    observed = sum(sum(a != b for a, b in permutations(values, 2)) / (len(values) - 1) for values in units) / n
    totals = Counter(value for values in units for value in values)
    expected = sum(totals[a] * totals[b] for a, b in permutations(totals, 2)) / (n * (n - 1))
    return 1 - observed / expected


@given(
    st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(lambda c: sum(c) > 1), min_size=1, max_size=20)
)
@settings(max_examples=50, deadline=None)
def test_alpha_of_coincidences_is_that_of_all_pairs(table):
    if (np.array(table).sum(0) > 0).sum() < 2:
        return
    got = _alpha_of(sum(_coincidences(np.array(counts)) for counts in table)[None])
    assert got[0] == pytest.approx(alpha_by_pairs(table))


@pytest.mark.parametrize(
    ("first", "second", "alpha"),
    [
        # Krippendorff 2011, section A: binary data, two observers (Meg, Owen), ten units
        ("0100000010", "1110010000", 0.095),
        # section B: nominal data, two observers (Ben, Gerry), twelve units
        ("aabbdcccedda", "babbbccceddd", 0.692),
    ],
)
def test_alpha_of_two_observers_as_krippendorff_published_it(first, second, alpha):
    units = {(i, 0, 1): {"first": a, "second": b} for i, (a, b) in enumerate(zip(first, second, strict=True))}
    assert round(krippendorff_alpha(units).value, 3) == alpha


@pytest.mark.parametrize(
    ("counts", "kappa"),
    [
        # both yes, yes/no, no/yes, both no. The two tables of the usual textbook comparison, 60 % agreement in each:
        ((45, 15, 25, 15), 0.1304),  # chance 0.6·0.7 + 0.4·0.3 = 0.54: 0.06/0.46
        ((25, 35, 5, 35), 0.2593),  # chance 0.6·0.3 + 0.4·0.7 = 0.46: 0.14/0.54
    ],
)
def test_kappa_of_published_tables(counts, kappa):
    pairs = [pair for pair, n in zip(("yy", "yn", "ny", "nn"), counts, strict=True) for _ in range(n)]
    assert round(cohen_kappa(pairs), 4) == kappa


def test_kappa_worked_by_hand():
    # both a 20, a/b 5, b/a 10, both b 15: observed 35/50 = 0.7; chance 0.5·0.6 + 0.5·0.4 = 0.5; (0.7 - 0.5)/0.5 = 0.4
    said = ["aa"] * 20 + ["ab"] * 5 + ["ba"] * 10 + ["bb"] * 15
    (kappa,) = cohen_kappas({(i, 0, 1): {"Ada": a, "Bo": b} for i, (a, b) in enumerate(said)})
    assert (kappa.first, kappa.second, kappa.items, kappa.agreement) == ("Ada", "Bo", 50, 0.7)
    assert kappa.value == pytest.approx(0.4)


def test_wilson_worked_by_hand():
    # 8 of 10, z = 1.96: center (0.8 + 3.8415/20)/(1 + 0.38415) = 0.71674,
    # half 1.96/1.38415·√(0.8·0.2/10 + 3.8415/400) = 0.22658
    rate = wilson(8, 10)
    assert (rate.value, rate.count) == (0.8, 10)
    assert (rate.low, rate.high) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    assert (wilson(0, 10).low, wilson(10, 10).high) == (0.0, 1.0)
    assert wilson(0, 10).high == pytest.approx(0.27753, abs=1e-5)
    assert wilson(0, 0) is None


def test_with_too_little_data_there_is_no_number():
    nothing = agreement([])
    assert (nothing.alpha, nothing.kappas, nothing.annotators) == (None, (), ())
    assert nothing.overall.left is nothing.overall.gold is nothing.overall.seconds is None
    alone = agreement([label(i, "Ada") for i in range(9)])
    assert (alone.alpha, alone.kappas) == (None, ())
    of_one_mind = agreement([label(i, who) for i in range(9) for who in ("Ada", "Bo")])
    assert (of_one_mind.alpha, of_one_mind.kappas) == (None, ())  # 0/0: chance would agree as well


def test_perfect_agreement_is_1_and_ties_are_a_category():
    said = ["a", "b", "both_good", "both_bad"]
    found = agreement([label(i, who, c) for i, c in enumerate(said) for who in ("Ada", "Bo")])
    assert found.alpha.value == found.kappas[0].value == 1.0
    mixed = agreement(
        [label(0, "Ada", "both_good"), label(0, "Bo", "both_bad"), label(1, "Ada", "a"), label(1, "Bo", "a")]
    )
    assert mixed.alpha.value == 1.0  # good or bad, neither is better


def test_rankings_agree_on_the_pairs_that_they_order_alike():
    ranked = lambda who, order: label(0, who, "ranking", kind="rank", ranking=order, order=(2, 0, 1))  # noqa: E731
    other = [label(1, who, "b") for who in ("Ada", "Bo")]
    found = agreement([ranked("Ada", (0, 1, 2)), ranked("Bo", (1, 0, 2)), *other])
    assert found.kappas[0].items == 4  # 01 differs; 02 and 12 are alike, and so is the pair
    assert found.kappas[0].agreement == 0.75
    assert found.alpha.count == 2


def test_rates_of_one_person_counted_by_hand():
    labels = [
        label(1, "Ada", "a", longer=0, seconds=2.0),  # left, longer
        label(2, "Ada", "a", order=(1, 0), longer=1, seconds=4.0),  # right, shorter
        label(3, "Ada", "b", order=(1, 0), seconds=9.0),  # left, as long
        label(4, "Ada", "both_good", longer=0),
        label(5, "Ada", "skip", seconds=100.0),
        label(6, "Ada", "b", gold=1, order=(1, 0), longer=1),  # gold: right, and no habit
        label(7, "Ada", "both_bad", gold=0),  # gold: wrong
        label(8, "Ada", "a", repeat_of=1, order=(1, 0), longer=0),  # as before
        label(9, "Ada", "a", repeat_of=3),  # was b
        label(10, "Ada", "a", repeat_of=99),  # whose first label was taken back
    ]
    ada = agreement(labels).annotators[0]
    assert (ada.labels, ada.skips, ada.ties) == (9, 1, 2)
    assert (ada.left.value, ada.left.count) == (2 / 3, 3)
    assert (ada.longer.value, ada.longer.count) == (1 / 2, 2)
    assert (ada.gold.value, ada.gold.count) == (1 / 2, 2)
    assert (ada.consistency.value, ada.consistency.count) == (1 / 2, 2)
    assert ada.seconds == 4.0


def test_gold_items_and_repeats_do_not_raise_agreement():
    noise = [label(i, who, "ab"[(i + j) % 2]) for i in range(6) for j, who in enumerate(("Ada", "Bo"))]
    easy = [label(100 + i, who, "a", gold=0) for i in range(50) for who in ("Ada", "Bo")]
    assert agreement(noise + easy).alpha == agreement(noise).alpha
    assert agreement(noise).alpha.value < 0


def test_whoever_always_presses_left_agrees_by_chance(store, say):
    from labeled import pairs

    store.add_items(pairs(400), overlap=1)
    for who in ("Ada", "Bo"):
        while task := store.next_task(who):
            store.record(who, task.item, key=f"{task.item}", choice=task.choice_of(0))
    found = agreement(store.labels())
    assert found.overall.left.value == 1.0
    assert abs(found.alpha.value) < 3 / math.sqrt(400)
    assert found.alpha.low < 0 < found.alpha.high
