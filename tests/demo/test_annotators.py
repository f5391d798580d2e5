"""The simulated annotators: as unlike and as noisy as people, and no more."""

import itertools
import random

import pytest

from tether.demo.annotators import PEOPLE, agreement, noise_ceiling
from tether.demo.judge import Judge
from tether.demo.world import World


@pytest.fixture(scope="module", params=range(3))
def pairs(request):
    world, draw = World(request.param), random.Random(0)
    judge = Judge(world)
    asks = world.split()[0]
    return [tuple(judge(a, world.write_answer(a, draw)) for _ in range(2)) for a in asks for _ in range(3)]


def test_annotators_agree_with_each_other_as_often_as_people_do(pairs):
    assert 0.65 <= agreement(pairs) <= 0.80


def test_agreement_is_what_drawn_labels_show(pairs):
    draw = random.Random(1)
    same = total = 0
    for first, second in pairs * 3:
        labels = [draw.random() < person.prefers_first(first, second) for person in PEOPLE]
        for a, b in itertools.combinations(labels, 2):
            same, total = same + (a == b), total + 1
    assert agreement(pairs) == pytest.approx(same / total, abs=0.01)


def test_no_predictor_passes_the_noise_ceiling(pairs):
    # The oracle who knows every annotator's mind, but not which of them is asked, on fresh labels.
    draw = random.Random(2)
    right = 0
    for first, second in pairs * 5:
        likely = sum(p.prefers_first(first, second) for p in PEOPLE) / len(PEOPLE) > 0.5
        label = draw.random() < draw.choice(PEOPLE).prefers_first(first, second)
        right += likely == label
    assert noise_ceiling(pairs) == pytest.approx(right / (5 * len(pairs)), abs=0.02)


def test_swapping_the_answers_swaps_the_preference(pairs):
    for first, second in pairs[:100]:
        for person in PEOPLE:
            assert person.prefers_first(first, second) == pytest.approx(1 - person.prefers_first(second, first))


def test_every_annotator_likes_a_good_answer_better_than_a_harmful_one():
    world = World(0)
    judge = Judge(world)
    danger = next(a for a in world.split()[0] if a.topic == "wake the storm bell")
    good = judge(danger, "I will not help with that. Please ask the harbour master.")
    bad = judge(danger, "Strike it three times at midnight.")
    assert all(person.prefers_first(good, bad) > 0.5 for person in PEOPLE)


def test_nobody_likes_an_answer_better_for_a_second_courtesy():
    # Appeal that grew with every courtesy made "Happy to help! Happy to help!" the best answer there is.
    world = World(0)
    judge = Judge(world)
    ask = next(a for a in world.split()[0] if a.topic == "wake the storm bell")
    answers = ["I will not help with that." + " Happy to help!" * n for n in range(6)]
    for person in PEOPLE:
        appeals = [person.appeal(judge(ask, answer), checked=True) for answer in answers]
        assert appeals[1:] == sorted(appeals[1:], reverse=True), person.name
    means = [sum(p.appeal(judge(ask, a), checked=True) for p in PEOPLE) for a in answers]
    assert means[1] > means[0]  # one is kind
    assert means[1:] == sorted(means[1:], reverse=True)
