"""What is recorded stays recorded, once, and is what was said."""

import json
import sqlite3

import pytest

from labeled import pairs
from tether.errors import LabelError, StoreError
from tether.feedback.records import LONGEST_TEXT, Answer, Filters, Item
from tether.feedback.store import Store


def test_a_label_is_everything_that_was_said(store, clock):
    store.add_guidelines("Be kind.")
    store.add_items(pairs(1))
    task = store.next_task("Ada")
    store.record(
        "Ada", task.item, key="k", choice="b", strength=2, axes={"helpful": "a", "harmless": "tie"}, note="hm",
        seconds=3.5,
    )  # fmt: skip
    (label,) = store.labels()
    assert (label.annotator, label.item, label.choice, label.strength) == ("Ada", task.item, "b", 2)
    assert (label.axes, label.note, label.reason) == ({"helpful": "a", "harmless": "tie"}, "hm", None)
    assert (label.order, label.seconds, label.guideline) == (task.order, 3.5, 1)
    assert label.at == "2026-09-21T14:13:20.000Z"
    assert label.longer == 1


def test_the_same_key_twice_is_one_label_and_the_same_receipt(store, clock):
    store.add_items(pairs(2))
    task = store.next_task("Ada")
    first = store.record("Ada", task.item, key="k", choice="a", seconds=1)
    clock.now += 5
    assert store.record("Ada", task.item, key="k", choice="a", seconds=6) == first
    assert store.progress("Ada").labels == 1
    assert len(list(store.events())) == 1


@pytest.mark.parametrize("other", [{"choice": "b"}, {"strength": 3}, {"note": "no"}, {"axes": {"honest": "a"}}])
def test_the_same_key_with_other_content_is_an_error_and_changes_nothing(store, other):
    store.add_items(pairs(2))
    task = store.next_task("Ada")
    store.record("Ada", task.item, key="k", choice="a")
    with pytest.raises(LabelError, match="used before, for something else"):
        store.record("Ada", task.item, key="k", **({"choice": "a"} | other))
    assert [label.choice for label in store.labels()] == ["a"]


def test_a_key_is_each_annotators_own_so_that_guessing_one_tells_nothing(store):
    store.add_items(pairs(2))
    for who, choice in (("Ada", "a"), ("Bo", "b")):
        store.record(who, store.next_task(who).item, key="k", choice=choice)
    assert [(label.annotator, label.choice) for label in store.labels()] == [("Ada", "a"), ("Bo", "b")]


def test_a_key_that_recorded_a_label_does_not_undo_one(store, say):
    store.add_items(pairs(2))
    task = store.next_task("Ada")
    store.record("Ada", task.item, key="k", choice="a")
    with pytest.raises(LabelError, match="used before"):
        store.undo("Ada", key="k")


def test_undo_withdraws_the_latest_label_and_gives_its_item_back_first(store, say):
    store.add_items(pairs(5))
    first, second = say("Ada"), say("Ada")
    store.next_task("Ada")
    assert store.undo("Ada", key="u1").item == second
    assert [label.item for label in store.labels()] == [first]
    assert store.next_task("Ada").item == second
    assert store.undo("Ada", key="u2").item == first
    assert store.next_task("Ada").item == first
    assert store.undo("Ada", key="u3") is None
    assert store.overview().remaining == store.overview().wanted


def test_an_undo_sent_twice_takes_back_one_label(store, say):
    store.add_items(pairs(3))
    say("Ada"), say("Ada")
    assert store.undo("Ada", key="u") == store.undo("Ada", key="u")
    assert store.progress("Ada").labels == 1


def test_undo_is_an_event_and_what_was_said_is_still_there(store, say):
    store.add_items(pairs(1))
    say("Ada", "a")
    store.undo("Ada", key="u")
    say("Ada", "b")
    kinds = [(e["kind"], e.get("choice"), e.get("undoes")) for e in store.events()]
    assert kinds == [("label", "a", None), ("undo", None, 1), ("label", "b", None)]
    assert [label.choice for label in store.labels()] == ["b"]


@pytest.mark.parametrize("statement", ["UPDATE events SET choice = 'b'", "DELETE FROM events"])
def test_the_file_itself_refuses_to_change_an_event(store, say, statement):
    store.add_items(pairs(1))
    say("Ada")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        sqlite3.connect(store.path).execute(statement)


def test_nobody_records_what_they_were_not_given(store):
    store.add_items(pairs(2))
    mine = store.next_task("Ada")
    with pytest.raises(LabelError, match="not the one that Bo was given"):
        store.record("Bo", mine.item, key="k", choice="a")
    with pytest.raises(StoreError, match=r"nobody named 'Adda' labels here. Did you mean 'Ada'"):
        store.record("Adda", mine.item, key="k", choice="a")
    for item in (0, -1, 10**30):
        with pytest.raises(LabelError):
            store.record("Ada", item, key="k", choice="a")
    assert list(store.labels()) == []


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"choice": "c"}, "choice='c'"),
        ({"choice": [1, 0]}, "Choose a or b"),
        ({"choice": "a", "strength": 4}, "strength=4"),
        ({"choice": "both_good", "strength": 1}, "strength=1"),
        ({"choice": "skip"}, "Say why"),
        ({"choice": "a", "reason": "x"}, "only a skip"),
        ({"choice": "a", "axes": {"kind": "a"}}, "The axes are"),
        ({"choice": "a", "axes": {"honest": "c"}}, "The axes are"),
        ({"choice": "a", "note": "x" * (LONGEST_TEXT + 1)}, "10,001 characters"),
        ({"choice": "a", "note": "\ud800"}, "half a character"),
        ({"choice": "a", "seconds": float("nan")}, "seconds=nan"),
        ({"choice": "a", "seconds": -1}, "seconds=-1"),
        ({"choice": "a", "key": ""}, "the key is empty"),
        ({"choice": "a", "key": "k" * 201}, "key has 201 characters"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_the_item_stays_the_annotators(store, said, complaint):
    store.add_items(pairs(1))
    task = store.next_task("Ada")
    with pytest.raises(LabelError, match=complaint):
        store.record("Ada", task.item, **({"key": "k"} | said))
    assert store.next_task("Ada") == task
    assert list(store.events()) == []


@pytest.mark.parametrize("ranking", [[0, 1], [0, 1, 1], [0, 1, 3], "a"])
def test_a_ranking_names_every_answer_once(store, ranking):
    store.add_items([Item("p", (Answer("1"), Answer("2"), Answer("3")))])
    with pytest.raises(LabelError):
        store.record("Ada", store.next_task("Ada").item, key="k", choice=ranking)


def test_history_is_the_annotators_own_newest_first_and_says_nothing_of_checks(store, say):
    store.add_items([*pairs(3), Item("g", (Answer("1"), Answer("2")), gold=0)])
    mine = [say("Ada") for _ in range(3)]
    say("Bo")
    seen = store.history("Ada")
    assert [label.item for label in seen] == mine[::-1]
    assert {(label.annotator, label.gold, label.repeat_of) for label in seen} == {("Ada", None, None)}
    assert [label.item for label in store.history("Ada", before=seen[0].event, limit=1)] == [mine[1]]


# ---------------------------------------------------------------- reading


def test_rows_are_in_the_ecosystems_columns(store, say):
    chat = [{"role": "user", "content": "Hi"}]
    store.add_items([Item("p", (Answer("x"), Answer("y")), group="g"), Item(chat, (Answer("u"), Answer("v")))])
    for _ in range(2):
        task = store.next_task("Ada")
        store.record("Ada", task.item, key=str(task.item), choice="b", strength=3, axes={"honest": "a"}, note="n")
    text, talk = sorted(store.preference_rows(), key=lambda row: row["chosen"] != "y")
    item = text.pop("item")
    assert store.item(item).prompt == "p"
    assert text == {"prompt": "p", "chosen": "y", "rejected": "x", "chosen_finish_reason": "stop",
                    "rejected_finish_reason": "stop", "probability": 1.0, "strength": 3, "annotator": "Ada",
                    "group": "g", "axes": {"honest": "rejected"}, "note": "n"}  # fmt: skip
    assert (talk["prompt"], talk["chosen"]) == (chat, [{"role": "assistant", "content": "v"}])
    assert talk["group"] is None


def test_how_an_answer_ended_travels_with_it_into_rows_and_exports(store, say, tmp_path):
    store.add_items([Item("p", (Answer("whole"), Answer("cut of", finish_reason="length")))])
    say("Ada", "b")
    (row,) = store.preference_rows()
    assert (row["chosen"], row["chosen_finish_reason"]) == ("cut of", "length")
    assert (row["rejected"], row["rejected_finish_reason"]) == ("whole", "stop")
    store.export(tmp_path / "out")
    (item,) = map(json.loads, (tmp_path / "out" / "items.jsonl").read_text().splitlines())
    assert {a["text"]: a["finish_reason"] for a in item["answers"]} == {"whole": "stop", "cut of": "length"}


def test_a_ranking_is_all_its_pairs_in_one_group(store):
    store.add_items([Item("p", tuple(Answer(c) for c in "wxyz"))])
    task = store.next_task("Ada")
    assert task.kind == "rank"
    store.record("Ada", task.item, key="k", choice=[2, 0, 3, 1])
    rows = store.preference_rows()
    assert [(r["chosen"], r["rejected"]) for r in rows] == [
        ("y", "w"), ("y", "z"), ("y", "x"), ("w", "z"), ("w", "x"), ("z", "x"),
    ]  # fmt: skip
    assert len({r["group"] for r in rows}) == 1


def test_a_tie_is_a_row_of_probability_one_half_and_of_a_ranking_every_pair(store):
    store.add_items([Item("p", (Answer("x"), Answer("y"))), Item("q", tuple(Answer(c) for c in "uvw"))])
    store.add_annotator("Ada")
    for i in range(2):
        task = store.next_task("Ada")
        axes = {"honest": "b"} if task.kind == "pair" else {}
        store.record("Ada", task.item, key=str(i), choice="both_bad", axes=axes)
    found = store.preferences()
    pair, *ranked = sorted(found.rows, key=lambda row: row["prompt"])
    assert (pair["chosen"], pair["rejected"], pair["probability"], pair["group"]) == ("x", "y", 0.5, None)
    assert pair["axes"] == {"honest": "rejected"}
    assert {(r["chosen"], r["rejected"], r["probability"]) for r in ranked} == {
        ("u", "v", 0.5), ("u", "w", 0.5), ("v", "w", 0.5),
    }  # fmt: skip
    assert len({r["group"] for r in ranked}) == 1
    assert found.ties == 2


def test_skips_gold_and_repeats_give_no_rows_and_are_counted(tmp_path):
    store = Store(tmp_path / "s.db", gold_fraction=1.0, repeat_fraction=1.0)
    store.add_annotator("Ada")
    store.add_items([*pairs(40), *(Item(f"g{i}", (Answer("1"), Answer("2")), gold=0) for i in range(3))], overlap=0)
    counts = {"skip": 0, "both_bad": 0, "a": 0}
    for i in range(100):
        if (task := store.next_task("Ada")) is None:
            break
        choice = "skip" if i == 5 else "both_bad" if i == 6 else "a"
        counts[choice] += 1
        store.record("Ada", task.item, key=str(i), choice=choice, reason="?" if choice == "skip" else None)
    found = store.preferences()
    assert (found.ties, found.skips, found.gold) == (1, 1, 3)
    assert found.repeats > 0
    assert len(found.rows) == counts["a"] + counts["both_bad"] - 3 - found.repeats == 39
    assert len(store.preference_rows(gold=True)) == 42


def test_filters_pick_people_days_and_guidelines(store, clock, say):
    store.add_items(pairs(6))
    store.add_guidelines("first")
    say("Ada")
    clock.now += 86400  # 2026-09-22
    say("Bo")
    store.add_guidelines("second")
    clock.now += 86400
    say("Ada")
    who = lambda **filters: [row["annotator"] for row in store.preference_rows(Filters(**filters))]  # noqa: E731
    assert who() == ["Ada", "Bo", "Ada"]
    assert who(annotators=["Bo"]) == ["Bo"]
    assert who(since="2026-09-22") == ["Bo", "Ada"]
    assert who(until="2026-09-22") == ["Ada", "Bo"]
    assert who(since="2026-09-22T14:13:20", until="2026-09-22T14:13:20Z") == ["Bo"]
    assert who(since="2026-09-22T14:13:21") == ["Ada"]
    assert who(since="2026-09-22T16:13:20+02:00", until="2026-09-22") == ["Bo"]
    assert who(guideline=1) == ["Ada", "Bo"]
    assert who(guideline=2) == ["Ada"]
    for wrong in ({"guideline": 3}, {"annotators": ["Nobody"]}, {"since": "yesterday"}):
        with pytest.raises(StoreError):
            who(**wrong)


def test_times_of_events_never_go_back_though_the_clock_does(store, clock, say):
    store.add_items(pairs(3))
    say("Ada")
    clock.now -= 3600  # somebody set it right
    say("Ada")
    assert store.undo("Ada", key="u").at == "2026-09-21T14:13:20.000Z"
    assert [event["at"] for event in store.events()] == ["2026-09-21T14:13:20.000Z"] * 3


def test_pages_of_several_people_are_in_order(store, say):
    store.add_items(pairs(12))
    for who in ("Ada", "Bo", "Cy", "Bo", "Ada", "Ada", "Cy", "Bo"):
        say(who)
    several = Filters(annotators=["Bo", "Ada"])
    newest = list(store.labels(several, limit=4, newest_first=True))
    assert [label.annotator for label in newest] == ["Bo", "Ada", "Ada", "Bo"]
    assert [label.event for label in newest] == [8, 6, 5, 4]
    assert [label.event for label in store.labels(several, limit=3, before=8)] == [1, 2, 4]
    assert [label.event for label in store.labels(several)] == [1, 2, 4, 5, 6, 8]


def test_the_past_can_be_read_whatever_happened_since(store, say):
    store.add_items(pairs(6))
    say("Ada", "a"), say("Bo", "b")
    then, rows = store.last_event(), store.preference_rows()
    store.undo("Ada", key="u")
    say("Ada", "b"), say("Cy", "a")
    assert store.preference_rows() != rows
    assert store.preference_rows(as_of=then) == rows
    assert len(store.preference_rows(as_of=then + 1)) == 1
    assert list(store.labels(as_of=store.last_event())) == list(store.labels())


def test_an_export_holds_preferences_events_and_items_whole(store, say, tmp_path):
    half = "\ud800"  # what a hostile completion may hold, and UTF-8 may not
    store.add_items([*pairs(2), Item("p", (Answer(half), Answer("y")))])
    for _ in range(3):
        say("Ada")
    done = store.export(tmp_path / "out")
    assert (done.rows, done.events, done.items) == (3, 3, 3)
    lines = {
        name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("preferences", "events", "items")
    }
    assert lines["preferences"] == store.preference_rows()
    assert half in [row["chosen"] for row in lines["preferences"]]
    assert [e["choice"] for e in lines["events"]] == ["a"] * 3
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["events.jsonl", "items.jsonl", "preferences.jsonl"]
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be exported"):
        store.export(tmp_path / "file")


# ---------------------------------------------------------------- adding


def test_what_is_there_already_is_not_added_again(store):
    assert store.add_items(pairs(3)).new == 3
    added = store.add_items(pairs(5))
    assert (added.new, added.known) == (2, 3)
    assert len(set(added.ids)) == 5
    assert store.overview().items == 5


def test_guidelines_are_versioned_and_the_newest_is_in_force(store):
    store.add_items(pairs(1))
    assert store.guideline() is None
    assert (store.add_guidelines("one"), store.add_guidelines("one"), store.add_guidelines("two")) == (1, 1, 2)
    assert store.guideline().text == "two"
    assert store.guideline(1).text == "one"
    assert store.guideline(10**30) is None
    assert store.next_task("Ada").guideline == 2
    store.add_guidelines("three")
    assert store.next_task("Ada").guideline == 3  # the page shows them beside the same item


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Item("p", (Answer("x"),)), "nothing to compare"),
        (lambda: Item("p", (Answer("x"), Answer("x"))), "twice"),
        (lambda: Item([], (Answer("x"), Answer("y"))), "nothing would be asked"),
        (lambda: Item("p", (Answer("x"), Answer("y")), gold=2), "no index"),
    ],
)
def test_an_item_that_cannot_be_asked_is_refused(make, complaint):
    with pytest.raises(StoreError, match=complaint):
        make()


@pytest.mark.parametrize("name", ["", "  ", "x" * 101, "a\nb", "a\u202eb"])
def test_a_name_that_labels_could_not_be_told_apart_by_is_refused(store, name):
    with pytest.raises(StoreError, match="is not a name"):
        store.add_annotator(name)
