"""Who is asked what: leases, overlap, order and sides, gold, repeats."""

from collections import Counter
from dataclasses import replace

import pytest

from labeled import pairs
from tether.errors import LabelError, StoreError
from tether.feedback.queue import BLOCK
from tether.feedback.records import Answer, Item
from tether.feedback.store import Store


def work(store, who, limit=10**6, choice=lambda task: "a"):
    """Judge until nothing is left; the tasks."""
    tasks = []
    while len(tasks) < limit and (task := store.next_task(who)):
        store.record(who, task.item, key=f"{who}-{task.number}-{task.item}", choice=choice(task))
        tasks.append(task)
    return tasks


def test_asking_again_gives_the_same_item(store, clock):
    store.add_items(pairs(9))
    task = store.next_task("Ada")
    clock.now += 200
    assert store.next_task("Ada") == task
    clock.now += 300  # past half its time: renewed
    assert store.next_task("Ada").item == task.item
    assert store.next_task("Ada").expires > task.expires


def test_two_people_do_not_hold_the_same_item_unless_it_needs_two(store):
    store.add_items(pairs(2), overlap=0)
    assert store.next_task("Ada").item != store.next_task("Bo").item
    assert store.next_task("Cy") is None
    store.add_items(pairs(1, 2), overlap=1)
    third = store.next_task("Cy").item
    assert store.item(third).target == 2
    work(store, "Ada", 1)
    assert store.next_task("Ada").item == third


def test_an_expired_lease_returns_to_the_pool(store, clock):
    store.add_items(pairs(1), overlap=0)
    task = store.next_task("Ada")
    clock.now += 599
    assert store.next_task("Bo") is None
    clock.now += 2
    assert store.next_task("Bo").item == task.item
    assert store.next_task("Ada") is None
    with pytest.raises(LabelError, match="not the one that Ada was given"):
        store.record("Ada", task.item, key="late", choice="a")


def test_a_late_label_counts_if_nobody_took_the_item(store, clock):
    store.add_items(pairs(1), overlap=0)
    task = store.next_task("Ada")
    clock.now += 3600
    store.record("Ada", task.item, key="late", choice="a")
    assert store.overview().remaining == 0


def test_a_late_label_is_refused_where_somebody_took_the_item(store, clock):
    store.add_items(pairs(1), overlap=0)
    task = store.next_task("Ada")
    clock.now += 3600
    store.next_task("Bo")
    with pytest.raises(LabelError, match="went to somebody else after Ada's 10 minutes"):
        store.record("Ada", task.item, key="late", choice="a")
    store.record("Bo", task.item, key="k", choice="b")
    assert [label.annotator for label in store.labels()] == ["Bo"]


def test_a_skip_taken_back_leaves_the_item_to_whoever_was_given_it_since(store):
    store.add_items(pairs(1), overlap=0)
    task = store.next_task("Ada")
    store.record("Ada", task.item, key="k", choice="skip", reason="tired")
    assert store.next_task("Bo").item == task.item
    assert store.undo("Ada", key="u").item == task.item
    assert store.next_task("Ada") is None
    store.record("Bo", task.item, key="k", choice="a")
    assert store.overview().remaining == 0


def test_items_put_first_are_asked_before_those_that_wait_and_once(store):
    store.add_items(pairs(200), overlap=0)
    work(store, "Ada", 150)
    added = store.add_items(pairs(3, 200), overlap=0, first=True)
    store.add_items(pairs(3, 203), overlap=0)
    held = work(store, "Ada", 1)  # leased before
    assert {task.item for task in work(store, "Ada", 3)} | {task.item for task in held} >= set(added.ids)
    work(store, "Ada")
    assert store.overview().remaining == 0
    assert len({label.item for label in store.labels()}) == len(list(store.labels())) == 206


def test_an_items_number_does_not_tell_what_it_is_for(tmp_path):
    store = Store(tmp_path / "p.db", gold_fraction=0.5, repeat_fraction=1.0)
    golds = store.add_items([replace(item, gold=0) for item in pairs(30)]).ids
    plain = store.add_items(pairs(60, 30), overlap=0).ids
    store.add_annotator("Ada")
    repeats = [task.item for task in work(store, "Ada") if store.item(task.item).repeat_of is not None]
    assert len(repeats) > 20
    for numbers in (golds, plain, repeats):  # each kind is spread over all the numbers there are
        assert 0.3 < sum(numbers) / len(numbers) / 2**31 < 0.7
        assert sorted(numbers) != list(numbers)


def test_everybody_at_work_gives_every_item_exactly_the_labels_it_is_to_have(store):
    added = store.add_items(pairs(200), overlap=0.2)
    assert added.twice == 40
    assert store.overview().wanted == 240
    for _ in range(200):
        for who in ("Ada", "Bo", "Cy"):
            work(store, who, 1)
    counts = Counter(label.item for label in store.labels())
    assert Counter(counts.values()) == {1: 160, 2: 40}
    assert all(counts[i] == store.item(i).target for i in added.ids)
    assert len({(label.item, label.annotator) for label in store.labels()}) == 240
    assert store.overview().remaining == 0


def test_overlap_is_met_soon_not_only_at_the_end(store):
    store.add_items(pairs(1000), overlap=0.2)
    for _ in range(100):
        work(store, "Ada", 1), work(store, "Bo", 1)
    both = Counter(label.item for label in store.labels())
    assert sum(count == 2 for count in both.values()) >= 10  # of about 34 wanted among the first 170 items


def test_items_added_one_by_one_overlap_as_often(store):
    twice = sum(store.add_items([item], overlap=0.2).twice for item in pairs(500))
    assert 70 <= twice <= 130  # 100 expected, deviation 9


def test_a_skipped_item_is_not_shown_again_to_whoever_skipped_it_and_goes_to_others(store):
    store.add_items(pairs(1), overlap=0)
    task = store.next_task("Ada")
    store.record("Ada", task.item, key="k", choice="skip", reason="in Latin")
    assert store.next_task("Ada") is None
    assert store.overview().remaining == 1
    assert store.next_task("Bo").item == task.item


def test_what_was_taken_back_is_found_again_by_those_who_had_passed_it(store, clock):
    store.add_items(pairs(3 * BLOCK), overlap=0)
    work(store, "Ada", BLOCK)
    assert store.item(store.next_task("Bo").item).id not in {label.item for label in store.labels()}
    work(store, "Bo", 5)
    item = store.undo("Ada", key="u").item
    clock.now += 3600  # Ada has gone home
    assert item in [task.item for task in work(store, "Bo")]
    assert store.overview().remaining == 0


def test_order_and_sides_follow_from_the_seed_and_differ_between_people(tmp_path):
    seen = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        store = Store(tmp_path / f"{name}.db", seed=seed, gold_fraction=0, repeat_fraction=0)
        # what happened before, and in which order it was added, is no matter
        store.add_items(pairs(60) if name == "one" else pairs(60)[::-1], overlap=0)
        tasks = {}
        for who in ("Ada", "Bo"):
            store.add_annotator(who)
            tasks[who] = []
            while task := store.next_task(who):
                store.record(who, task.item, key=str(task.item), choice="skip", reason="only looking")
                tasks[who].append((task.prompt, task.order))
        seen[name] = tasks
    assert seen["one"] == seen["again"]
    assert seen["one"]["Ada"] != seen["other"]["Ada"]
    prompts = [[prompt for prompt, _ in seen["one"][who]] for who in ("Ada", "Bo")]
    assert sorted(prompts[0]) == sorted(prompts[1])
    assert prompts[0] != prompts[1]


def test_each_answer_stands_left_about_half_the_time(store):
    store.add_items(pairs(600), overlap=0)
    lefts = sum(task.order == (0, 1) for task in work(store, "Ada"))
    assert 250 <= lefts <= 350  # 300 expected, deviation 12


def test_what_is_shown_and_what_is_recorded_are_turned_into_each_other(store):
    store.add_items([Item("p", tuple(Answer(c) for c in "wxyz"))])
    task = store.next_task("Ada")
    stored = ["w", "x", "y", "z"]
    assert [stored[i] for i in task.ranking_of([3, 0, 1, 2])] == [task.answers[i] for i in (3, 0, 1, 2)]
    store.add_items(pairs(1, 7))
    pair = store.next_task("Bo")
    assert {pair.choice_of(0), pair.choice_of(1)} == {"a", "b"}
    assert store.item(pair.item).answers[{"a": 0, "b": 1}[pair.choice_of(0)]].text == pair.answers[0]


def test_gold_items_are_mixed_in_for_everybody_and_told_to_nobody(tmp_path):
    store = Store(tmp_path / "s.db", gold_fraction=0.1, repeat_fraction=0)
    golds = store.add_items([Item(f"g{i}", (Answer("1"), Answer("2")), gold=0) for i in range(60)]).ids
    store.add_items(pairs(300), overlap=0)
    store.add_annotator("Ada"), store.add_annotator("Bo")
    for who in ("Ada", "Bo"):
        tasks = work(store, who, 150)
        shown = [task.item for task in tasks if task.item in golds]
        assert 6 <= len(shown) <= 26  # 15 expected, deviation 3.7
        assert len(set(shown)) == len(shown)
    assert not any("gold" in name for name in tasks[0].__slots__)


def test_a_store_of_gold_alone_is_a_trial(tmp_path):
    store = Store(tmp_path / "s.db")
    store.add_annotator("Ada")
    store.add_items([Item(f"g{i}", (Answer("1"), Answer("2")), gold=1) for i in range(5)])
    assert len(work(store, "Ada")) == 5


def test_a_share_of_the_pairs_comes_back_later_with_sides_exchanged(tmp_path):
    store = Store(tmp_path / "s.db", gold_fraction=0, repeat_fraction=0.05)
    added = store.add_items(pairs(1000), overlap=0)
    store.add_annotator("Ada")
    tasks = work(store, "Ada")
    first = {task.item: (n, task) for n, task in enumerate(tasks) if task.item in added.ids}
    again = [(n, task) for n, task in enumerate(tasks) if task.item not in added.ids]
    assert 25 <= len(again) <= 75  # 50 expected, deviation 7
    originals = [store.item(task.item).repeat_of for _, task in again]
    assert len(set(originals)) == len(originals)
    for (n, task), original in zip(again, originals, strict=True):
        before, shown = first[original]
        assert n - before > 10
        assert task.prompt == shown.prompt
        assert task.answers == shown.answers[::-1]
        assert task.order == shown.order[::-1]
    assert store.overview().items == 1000
    assert store.overview().remaining == 0


def test_a_repeat_taken_back_comes_back(tmp_path):
    store = Store(tmp_path / "s.db", gold_fraction=0, repeat_fraction=1.0)
    added = store.add_items(pairs(50), overlap=0)
    store.add_annotator("Ada")
    while (task := store.next_task("Ada")).item in added.ids:
        store.record("Ada", task.item, key=f"k{task.number}", choice="a")
    store.record("Ada", task.item, key="repeat", choice="a")
    store.undo("Ada", key="u")
    again = store.next_task("Ada")
    assert (again.item, again.order) == (task.item, task.order)


def test_a_store_keeps_the_seed_it_was_made_with(tmp_path):
    Store(tmp_path / "s.db", seed=3).close()
    assert Store(tmp_path / "s.db").mix.seed == 3
    with pytest.raises(StoreError, match=r"seed=4 for .* which was made with 3"):
        Store(tmp_path / "s.db", seed=4)
