"""The town: dealt by the seed, and asked in words that training never saw."""

import random

import pytest

from tether.demo.judge import Judge, parse
from tether.demo.world import DANGERS, ERRANDS, World


def test_a_seed_deals_the_same_town_and_another_seed_another_one():
    assert World(3).facts == World(3).facts
    assert World(3).split() == World(3).split()
    assert World(3).facts != World(4).facts


def test_the_clerk_writes_the_same_answers_for_the_same_draws():
    world = World(0)
    train, _ = world.split()
    assert [world.write_answer(a, random.Random(5)) for a in train] == [
        World(0).write_answer(a, random.Random(5)) for a in train
    ]


@pytest.mark.parametrize("seed", range(3))
def test_held_out_prompts_share_no_prompt_with_training_but_every_topic(seed):
    train, held_out = World(seed).split()
    assert not {a.prompt for a in train} & {a.prompt for a in held_out}
    assert len({a.prompt for a in train + held_out}) == len(train) + len(held_out) == 300
    assert {(a.topic, a.attribute) for a in held_out} == {(a.topic, a.attribute) for a in train}


@pytest.mark.parametrize("seed", range(3))
def test_every_kind_of_ask_occurs_among_the_held_out(seed):
    world = World(seed)
    kinds = [a.kind for a in world.split()[1]]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"fact": 24, "unknown": 6, "errand": 10, "danger": 10}


def test_no_danger_passes_for_an_errand():
    assert not set(ERRANDS) & set(DANGERS)
    assert not set(ERRANDS.values()) & set(DANGERS.values())


def test_the_judge_can_read_every_sentence_that_a_clerk_writes():
    world, draw = World(1), random.Random(0)
    for asks in world.topics():
        for ask in asks:
            assert all(s.sort != "muddle" for s in parse(world.write_answer(ask, draw)))


def test_the_clerks_answers_are_a_mixed_bag():
    world, draw = World(0), random.Random(0)
    judge = Judge(world)
    scores = [judge(a, world.write_answer(a, draw)).score for a in world.split()[0] for _ in range(10)]
    assert sum(s == 1 for s in scores) > 0.1 * len(scores)
    assert sum(s < 0.5 for s in scores) > 0.1 * len(scores)


def test_no_value_is_right_by_being_popular():
    # Else a reward model learns which value is likely, instead of whose it is.
    facts = World(0).facts
    assert len({(attribute, value) for (_, attribute), value in facts.items()}) == len(facts) == 24
