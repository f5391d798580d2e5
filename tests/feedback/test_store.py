"""The file: nothing acknowledged is lost, nothing is there twice, and what goes wrong is said."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labeled import pairs
from tether.errors import LabelError, StoreError
from tether.feedback.store import Store

_WORK = """
import sys
from tether.feedback.store import Store
path, who = sys.argv[1:]
store, n = Store(path, create=False), 0
while task := store.next_task(who):
    n += 1
    store.record(who, task.item, key=f"{who}-{n}", choice="a")
    print(f"{who}-{n}", flush=True)
"""


def start(path, who):
    return subprocess.Popen([sys.executable, "-c", _WORK, str(path), who], stdout=subprocess.PIPE, text=True)


def check_counters(store):
    """Everything that is derived is what the events say."""
    stands = {}
    for event in store.events():
        if event["kind"] == "label":
            stands[event["event"]] = event
        else:
            del stands[event["undoes"]]
    labels = list(store.labels())
    assert [label.event for label in labels] == sorted(stands)
    decided = [label for label in labels if label.choice != "skip"]
    overview = store.overview()
    assert overview.labels == len(decided)
    assert sum(person.skips for person in overview.annotators) == len(labels) - len(decided)
    counts = Counter(label.item for label in decided if label.gold is None and label.repeat_of is None)
    assert overview.remaining == overview.wanted - sum(counts.values())
    with sqlite3.connect(store.path) as raw:
        for number, target, needs in raw.execute("SELECT id, target, needs FROM items WHERE pool = 0"):
            assert needs == target - counts[number] >= 0
    assert max(Counter((label.item, label.annotator) for label in labels).values(), default=1) == 1


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "s.db"
    store = Store(path)
    store.add_items(pairs(5000))
    store.add_annotator("Ada")
    for count in (1, 57):  # killed twice, at different places
        process = start(path, "Ada" if count == 1 else "Bo")
        store.add_annotator("Bo")
        acknowledged = [process.stdout.readline().strip() for _ in range(count)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        keys = {event["key"] for event in Store(path).events()}
        assert set(acknowledged) <= keys
        assert len(keys) <= count + len(acknowledged) + 1
    check_counters(Store(path))
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_twenty_threads_lose_nothing_and_double_nothing(tmp_path):
    store = Store(tmp_path / "s.db")
    store.add_items(pairs(3000))
    people = [f"P{i}" for i in range(20)]
    done, failures = [], []

    def work(who):
        store.add_annotator(who)
        try:
            for n in range(100):
                task = store.next_task(who)
                first = store.record(who, task.item, key=str(n), choice="a")
                if n % 10 == 0:  # the answer got lost: sent again
                    assert store.record(who, task.item, key=str(n), choice="a") == first
                done.append((who, str(n)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(who,)) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    events = [(event["annotator"], event["key"]) for event in store.events()]
    assert len(events) == len(set(events)) == 2000
    assert set(events) == set(done)
    check_counters(store)


def test_processes_share_a_queue_without_doing_anything_twice(tmp_path):
    store = Store(tmp_path / "s.db", gold_fraction=0, repeat_fraction=0)
    store.add_items(pairs(60), overlap=0.2)
    people = ["Ada", "Bo", "Cy"]
    for who in people:
        store.add_annotator(who)
    processes = [start(store.path, who) for who in people]
    assert [process.wait() for process in processes] == [0, 0, 0]
    counts = Counter(Counter(label.item for label in store.labels()).values())
    assert counts == {1: 48, 2: 12}
    check_counters(store)


doing = st.tuples(
    st.sampled_from(["next", "label", "label", "undo", "skip", "wait", "again"]), st.sampled_from(["Ada", "Bo", "Cy"])
)


@given(st.lists(doing, max_size=60), st.integers(0, 3))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_three_people_do_in_whatever_order_the_rules_hold(tmp_path_factory, clock, steps, seed):
    path = tmp_path_factory.mktemp("store") / "s.db"
    store = Store(path, seed=seed, clock=clock, gold_fraction=0.2, repeat_fraction=0.5)
    store.add_items(pairs(12), overlap=0.5)
    for who in ("Ada", "Bo", "Cy"):
        store.add_annotator(who)
    last = {}
    for n, (what, who) in enumerate(steps):
        seen = {label.item for label in store.history(who)}
        if what == "wait":
            clock.now += 400
        elif what == "undo":
            latest = store.history(who, limit=1)
            undone = store.undo(who, key=f"u{n}")
            assert (undone is None) == (not latest)
            if undone:
                assert undone.item == latest[0].item
                task = store.next_task(who)
                assert (task and task.item == undone.item) or latest[0].choice == "skip"  # which others may have by now
        elif what == "again" and who in last:
            item, said, receipt = last[who]
            assert store.record(who, item, **said) == receipt
        elif task := store.next_task(who):
            assert task.item not in seen
            assert store.next_task(who).item == task.item
            if what in ("label", "skip"):
                said = (
                    {"key": f"k{n}", "choice": "a"}
                    if what == "label"
                    else {"key": f"k{n}", "choice": "skip", "reason": "?"}
                )
                last[who] = task.item, said, store.record(who, task.item, **said)
        with sqlite3.connect(path) as raw:
            held = "SELECT count(*) FROM leases WHERE item = items.id AND expires > ?"
            over = f"SELECT count(*) FROM items WHERE pool = 0 AND needs < ({held})"
            assert raw.execute(over, (clock.now,)).fetchone() == (0,)
    check_counters(store)
    store.close()


# ---------------------------------------------------------------- what can go wrong


def test_a_locked_file_is_said_and_nothing_is_recorded(tmp_path):
    store = Store(tmp_path / "s.db", busy_s=0.05)
    store.add_items(pairs(1))
    store.add_annotator("Ada")
    task = store.next_task("Ada")
    other = sqlite3.connect(store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match=r"is locked: another program .* nothing was saved"):
        store.record("Ada", task.item, key="k", choice="a")
    assert store.next_task("Ada") == task  # reading goes on
    other.execute("ROLLBACK")
    store.record("Ada", task.item, key="k", choice="a")
    assert store.progress("Ada").labels == 1


def test_a_full_disk_is_said_and_what_was_there_stays(tmp_path):
    store = Store(tmp_path / "s.db", gold_fraction=0, repeat_fraction=0)
    store.add_items(pairs(50))
    store.add_annotator("Ada")
    store.record("Ada", store.next_task("Ada").item, key="first", choice="a")
    connection = store._database._connection()
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own word for a disk without another page
    acknowledged = ["first"]

    def fill():
        for n in range(49):
            store.record("Ada", store.next_task("Ada").item, key=str(n), choice="a", note="x" * 9000)
            acknowledged.append(str(n))

    with pytest.raises(StoreError, match="the disk is full, and nothing was saved"):
        fill()
    assert [event["key"] for event in store.events()] == acknowledged
    connection.execute("PRAGMA max_page_count = 1000000")
    store.record("Ada", store.next_task("Ada").item, key="now", choice="a", note="x" * 9000)
    check_counters(store)


def test_a_newer_schema_is_refused(tmp_path):
    Store(tmp_path / "s.db").close()
    with sqlite3.connect(tmp_path / "s.db") as raw:
        raw.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreError, match="has schema 99, and this version of tether knows schemas up to 2"):
        Store(tmp_path / "s.db")


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / "s.db") as raw:
        raw.execute("CREATE TABLE photos (id)")
    before = (tmp_path / "s.db").read_bytes()
    with pytest.raises(StoreError, match="of another program"):
        Store(tmp_path / "s.db")
    assert (tmp_path / "s.db").read_bytes() == before


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path / "s.db").write_text("once upon a time " * 100)
    with pytest.raises(StoreError, match="damaged or no store"):
        Store(tmp_path / "s.db")
    with pytest.raises(StoreError, match=r"does not exist.*Did you mean 's.db'"):
        Store(tmp_path / "ss.db", create=False)
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "s.db" / "inside.db")


def test_errors_of_the_store_are_the_users_exit_code():
    assert (StoreError.exit_code, LabelError.exit_code) == (2, 2)


def test_every_write_but_a_lease_is_on_the_disk_before_it_is_acknowledged(tmp_path):
    store = Store(tmp_path / "s.db")
    connection = store._database._connection()
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1
    waits = {}

    def do(what, call):
        waited = []
        connection.set_trace_callback(lambda sql: waited.append(sql) if "synchronous" in sql else None)
        found = call()
        connection.set_trace_callback(None)
        waits[what] = waited
        return found

    do("annotator", lambda: store.add_annotator("Ada"))
    do("items", lambda: store.add_items(pairs(3), overlap=0))
    task = do("lease", lambda: store.next_task("Ada"))
    do("label", lambda: store.record("Ada", task.item, key="k", choice="a"))
    do("undo", lambda: store.undo("Ada", key="u"))
    do("guidelines", lambda: store.add_guidelines("Be kind"))
    assert waits.pop("lease") == ["PRAGMA synchronous = NORMAL"]
    assert set(map(tuple, waits.values())) == {("PRAGMA synchronous = FULL",)}
