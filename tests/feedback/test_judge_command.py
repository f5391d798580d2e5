"""`tether judge`: from a store or a file of pairs to labels beside people's, which they join only when asked to."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

import tether
from scripted_judge import scripted_judge, sigmoid
from tether.cli import main
from tether.config import JudgeConfig, JudgedConfig, JudgeSection, LabelsConfig, PairsConfig, check
from tether.config.judge import CONSTITUTIONS
from tether.config.reading import load_config
from tether.data.snapshot import read_pairs
from tether.errors import ConfigError, DataError, StoreError
from tether.feedback.agreement import agreement
from tether.feedback.constitution import draw_principle, read_constitution
from tether.feedback.judge_cache import JudgeCache, cache_path, request_key
from tether.feedback.records import Answer, Filters, Item, Verdict
from tether.feedback.store import Store

WORTH = [(0.5, -0.5), (-1.0, 0.25), (0.75, 0.5), (-0.25, 1.0)]


@pytest.fixture
def server():
    with scripted_judge() as judge:
        yield judge


@pytest.fixture
def config(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judge.yaml").write_text(
        f"judge: {{model: some/critic, base_url: '{server.url}'}}\ndata: {{path: preferences.db}}\n"
    )
    return "judge.yaml"


@pytest.fixture
def labeled(config, tmp_path):
    """Four pairs of which Ada has labeled two, a gold one, and a ranking."""
    with Store("preferences.db", gold_fraction=0, repeat_fraction=0) as store:
        items = [Item(f"Q{i}", (Answer(f"worth {a}"), Answer(f"worth {b}"))) for i, (a, b) in enumerate(WORTH)]
        store.add_items([*items, Item("R", (Answer("1"), Answer("2"), Answer("3")))], overlap=0)
        store.add_items([Item("G", (Answer("worth 1"), Answer("worth -1")), gold=0)])
        store.add_annotator("Ada")
        given = 0
        while given < 2:
            task = store.next_task("Ada")
            choice = "b" if task.kind == "pair" else [2, 1, 0]
            store.record("Ada", task.item, key=str(task.item), choice=choice)
            given += task.kind == "pair"
    return "preferences.db"


def test_a_judges_labels_stand_beside_peoples_and_mix_only_when_asked_to(labeled, config, server, tmp_path, capsys):
    before = Store(labeled).overview()
    assert main(["judge", config]) == 0
    told = capsys.readouterr().out
    assert "5 pairs, both orders, judge:critic at http://127.0.0.1" in told
    assert "10 requests and about" in told
    assert (
        "preferences.db: 5 pairs labeled by judge:critic; 1 items of more than two answers left out; 10 requests "
        in told
    )
    with Store(labeled, create=False) as store:
        assert store.overview().remaining == before.remaining  # people are asked as many as before
        people, everybody = store.preference_rows(), store.preference_rows(Filters(judges=True))
        assert {row["annotator"] for row in people} == {"Ada"}
        soft = {row["prompt"]: row for row in everybody if row["annotator"] == "judge:critic"}
        assert len(soft) == 4  # gold trains nothing
        for i, (a, b) in enumerate(WORTH):
            row = soft[f"Q{i}"]
            assert row["chosen"] == f"worth {max(a, b)}"
            assert row["probability"] == pytest.approx(sigmoid(abs(a - b)), abs=1e-6)
        assert {label.annotator for label in store.labels()} == {"Ada"}
        assert [q.annotator for q in agreement(store.labels()).annotators] == ["Ada"]
        named = store.preference_rows(Filters(annotators=["judge:critic"]))
        assert {row["annotator"] for row in named} == {"judge:critic"}
        both = store.preference_rows(Filters(annotators=["Ada"], judges=True))
        assert {row["annotator"] for row in both} == {"Ada", "judge:critic"}
        assert store.next_task("Ada") is not None
    assert len(read_pairs(PairsConfig(labeled)).rows) == len(people)
    assert len(read_pairs(PairsConfig(labeled, labels=LabelsConfig(judges=True))).rows) == len(everybody)
    assert main(["label", "--to", labeled, "--export", "out"]) == 0
    assert len((tmp_path / "out" / "preferences.jsonl").read_text().splitlines()) == len(people)
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e["annotator"] == "judge:critic" and e["item"] == soft["Q0"]["item"]]
    assert event["principle"] in read_constitution("helpful")
    assert event["answers"][0]["reply"]["The"] == pytest.approx(-2.302585, abs=1e-5)
    assert main(["label", "--to", labeled, "--export", "out", "--judges"]) == 0
    assert len((tmp_path / "out" / "preferences.jsonl").read_text().splitlines()) == len(everybody)


def test_a_judge_behind_an_endpoint_does_not_load_transformers():
    code = "import sys, tether.feedback.judge; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_rerun_asks_nothing_and_labels_nothing(labeled, config, server, capsys):
    assert main(["judge", config]) == 0
    asked = len(server.asked)
    capsys.readouterr()
    assert main(["judge", config]) == 0
    assert len(server.asked) == asked
    assert "0 pairs labeled by judge:critic; 5 were labeled before" in capsys.readouterr().out


def test_labels_that_were_lost_come_out_of_the_cache(labeled, config, server):
    kept = Store(labeled)
    backup = sqlite3.connect("backup.db")
    sqlite3.connect(labeled).backup(backup)
    backup.close()
    kept.close()
    assert main(["judge", config]) == 0
    asked = len(server.asked)
    sqlite3.connect("backup.db").backup(sqlite3.connect(labeled))
    done = tether.judge(load_config(config))
    assert (done.labels, len(server.asked)) == (5, asked)


def test_a_limit_that_is_reached_is_said_and_the_rest_follows_later(labeled, config, server, capsys):
    assert main(["judge", config, "--limits.requests", "5", "--limits.concurrency", "1"]) == 0
    assert "2 pairs labeled by judge:critic" in (told := capsys.readouterr().out)
    assert "3 still wait: a limit was reached; raise limits and run the same command again" in told
    assert main(["judge", config, "--limits.requests", "10"]) == 0
    assert "3 pairs labeled by judge:critic; 2 were labeled before" in capsys.readouterr().out
    assert len(server.asked) == 10


def test_a_file_of_pairs_becomes_items_of_the_store(config, server, tmp_path, capsys):
    chat = {"prompt": [{"role": "user", "content": "Hey"}], "chosen": "worth 1", "rejected": "worth -0.5"}
    plain = {"prompt": "K", "a": "worth 0", "b": "worth 0.0"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (chat, plain)))
    Store("mine.db").add_items([Item("another", (Answer("worth 1"), Answer("worth 2")))])
    assert main(["judge", config, "--data.path", "pairs.jsonl", "--to", "mine.db", "--judge.name", "x"]) == 0
    assert "mine.db: 2 pairs labeled by judge:x" in capsys.readouterr().out
    rows = Store("mine.db").preference_rows(Filters(judges=True))
    assert sorted(row["probability"] for row in rows) == pytest.approx([0.5, sigmoid(1.5)], abs=1e-6)
    assert "user: Hey" in server.asked[0]["messages"][1]["content"] + server.asked[2]["messages"][1]["content"]


def test_a_dry_run_tells_what_it_would_take_and_asks_nothing(labeled, config, server, capsys, tmp_path):
    before = sorted(file.name for file in tmp_path.iterdir())
    assert main(["judge", config, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in ("5 pairs wait", "5 principles", "10 requests", "Principle: ", "[Answer A]\n  worth "):
        assert part in told
    assert server.asked == []
    assert sorted(file.name for file in tmp_path.iterdir()) == before


def test_a_dry_run_over_a_file_of_pairs_looks_at_the_store_that_is_there(config, server, tmp_path, capsys):
    rows = [{"prompt": f"Q{i}", "a": "worth 1", "b": "worth 0"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["judge", config, "--data.path", "pairs.jsonl", "--to", "mine.db"]
    assert main([*argv, "--dry-run"]) == 0
    assert "pairs.jsonl: 3 pairs wait, 0 are labeled by judge:critic in mine.db" in capsys.readouterr().out
    assert not (tmp_path / "mine.db").exists()
    assert main([*argv, "--data.limit", "2"]) == 0
    asked, before = len(server.asked), (tmp_path / "mine.db").read_bytes()
    capsys.readouterr()
    assert main([*argv, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "pairs.jsonl: 1 pairs wait, 2 are labeled by judge:critic in mine.db" in told
    assert "2 requests" in told
    assert (len(server.asked), (tmp_path / "mine.db").read_bytes()) == (asked, before)


def test_a_dry_run_leaves_a_store_of_the_first_schema_as_it_is(labeled, config, server, tmp_path, capsys):
    of_the_first_schema(labeled)
    before = (tmp_path / labeled).read_bytes()
    assert main(["judge", config, "--dry-run"]) == 0
    assert "5 pairs wait" in capsys.readouterr().out
    assert (tmp_path / labeled).read_bytes() == before
    (tmp_path / "empty.db").touch()
    with pytest.raises(StoreError, match=r"empty\.db is empty: it holds no labels"):
        Store("empty.db", create=False, upgrade=False)
    assert (tmp_path / "empty.db").read_bytes() == b""


# ---------------------------------------------------------------- what goes wrong


def test_a_model_that_answers_neither_letter_is_named(labeled, config, server, capsys):
    server.forms, server.mass = ("logprobs",), 0.3
    assert main(["judge", config, "--judge.answer", "logprobs"]) == 2
    said = capsys.readouterr().err
    assert "judge.model=some/critic: none of 5 comparisons gave a label (5: neither letter likely" in said


def test_another_judge_under_the_same_name_is_refused(labeled, config, capsys):
    assert main(["judge", config, "--data.limit", "1"]) == 0
    assert main(["judge", config, "--judge.constitution", "honest"]) == 2
    assert "judge:critic has labeled in preferences.db with another constitution" in capsys.readouterr().err
    assert main(["judge", config, "--judge.constitution", "honest", "--judge.name", "honest-critic"]) == 0


def test_a_store_that_is_missing_is_named(config, capsys):
    assert main(["judge", config]) == 2
    assert "preferences.db does not exist, so there are no labels to read" in capsys.readouterr().err


def test_a_signal_keeps_what_was_paid_and_exits_with_3(labeled, config, server, capsys):
    server.delay_s = 0.2

    def interrupt():
        while len(server.asked) < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["judge", config, "--limits.concurrency", "2"]) == 3
    said = capsys.readouterr().err
    assert "stopped by a signal: preferences.db: " in said
    assert "still wait. The same command goes on from there." in said
    asked = len(server.asked)
    assert 4 <= asked < 10
    assert main(["judge", config]) == 0
    assert len(server.asked) == 10  # none of them twice
    assert max(server.answered.values()) == 1


def test_kill_9_at_ten_moments_of_the_command_pays_nothing_twice_that_had_come(config, server):
    """The moments are ten numbers of requests, of 80, and waits after each: in flight, as it comes, as it is kept."""
    worth = {f"Q{i}": (i - 20) / 10 for i in range(40)}
    with Store("preferences.db", gold_fraction=0, repeat_fraction=0) as store:
        store.add_items([Item(q, (Answer(f"worth {w}"), Answer("worth 0"))) for q, w in worth.items()], overlap=0)
    judge, kept = load_config(config), set()
    file = cache_path("preferences.db", "judge:critic")
    for n, moment in enumerate((0, 1, 9, 18, 27, 36, 45, 54, 63, 72)):
        began = len(server.asked)
        child = os.fork()
        if child == 0:
            try:
                tether.judge(replace(judge, limits=replace(judge.limits, concurrency=4)))
            finally:
                os._exit(1)
        while len(server.asked) < moment and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(n / 500)
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])  # it was not done yet
        asked = [request_key(server.url, body, 0) for body in server.asked]
        assert not kept & set(asked[began:])
        cache = JudgeCache(file)
        kept = {key for key in asked if cache.answer(key)}
        assert cache.spent()[0] >= len(asked)
        cache.close()
    done = tether.judge(judge)
    assert done.before + done.labels == 40
    rows = Store("preferences.db").preference_rows(Filters(judges=True))
    assert {row["prompt"]: row["probability"] for row in rows} == pytest.approx(
        {q: sigmoid(abs(w)) for q, w in worth.items()}, abs=1e-6
    )
    assert len(rows) == 40
    assert len(server.asked) - 80 <= 10 * 4  # in flight when a kill came: nobody can know whether they were answered


def test_a_store_without_pairs_is_refused(config, capsys):
    Store("preferences.db").close()
    assert main(["judge", config]) == 2
    assert "preferences.db holds no pair of answers, so there is nothing to compare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no principle"), (b"# only\n\n", "no principle"), (b"a\nb\xff", "line 2: not UTF-8")],
)
def test_a_constitution_without_a_principle_or_not_in_utf8_is_named(tmp_path, content, said):
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_constitution(str(tmp_path / "c.txt"))


def test_a_missing_constitution_is_named():
    with pytest.raises(DataError, match=r"judge\.constitution=helpfull cannot be read"):
        read_constitution("helpfull")


@pytest.mark.parametrize("name", CONSTITUTIONS)
def test_every_shipped_constitution_has_five_principles(name):
    assert len(read_constitution(name)) == 5


def test_principles_are_lines_or_paragraphs(tmp_path):
    (tmp_path / "c.txt").write_text("# about\nBe kind.\n# more\nBe brief.\n")
    assert read_constitution(str(tmp_path / "c.txt")) == ("Be kind.", "Be brief.")
    (tmp_path / "c.txt").write_text("Be kind\n and warm.\n\n# more\n\nBe brief.\n")
    assert read_constitution(str(tmp_path / "c.txt")) == ("Be kind and warm.", "Be brief.")


def test_principles_are_drawn_alike_often_by_seed_and_item_alone():
    drawn = [draw_principle(("x", "y", "z"), seed=0, item=f"{i}") for i in range(3000)]
    assert drawn == [draw_principle(("x", "y", "z"), seed=0, item=f"{i}") for i in range(3000)]
    for principle in "xyz":
        assert 900 <= drawn.count(principle) <= 1100  # 1000 ± 26


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"base_url": "http://me:sk-secret@host/v1"}, "has more than scheme, host, port and path"),
        ({"base_url": "http://host/v1?key=sk-secret"}, "has more than scheme, host, port and path"),
        ({"base_url": "host:8000/sk"}, "is not the address of an endpoint"),
        ({"base_url": "http://host:port/v1"}, "is not the address of an endpoint"),
        ({"key_env": "KEY"}, "a local model takes no key"),
        ({"answer": "text"}, "a local model is asked for log-probs"),
        ({"answer_tokens": 1024}, "a local model is asked for log-probs"),
        ({"base_url": "http://host/v1", "answer_tokens": 1}, "judge.answer_tokens=1 is below 16: no verdict would fit"),
        ({"name": "a/b"}, "cannot be part of a file's name"),
        ({"votes": 0}, "judge.votes=0 is below 1"),
    ],
)
def test_a_judge_that_could_not_be_asked_is_refused(section, said):
    with pytest.raises(ConfigError, match=said) as error:
        check(JudgeConfig(JudgeSection("m", **section), JudgedConfig("d")))
    assert "secret" not in str(error.value)


def test_a_budget_below_one_request_is_refused(config, capsys):
    assert main(["judge", config, "--limits.requests", "0"]) == 2
    assert "limits.requests=0 is below 1: nothing could be asked" in capsys.readouterr().err


def test_a_token_budget_below_one_request_is_refused(labeled, config, server, capsys):
    assert main(["judge", config, "--limits.tokens", "300"]) == 2
    assert "tokens that one request can take: nothing could be asked" in capsys.readouterr().err
    assert server.asked == []


def test_nobody_can_call_themselves_a_judge(tmp_path):
    with pytest.raises(StoreError, match="begins like the name of a judge"):
        Store(tmp_path / "s.db").add_annotator("judge:me")


def test_nobody_labels_or_takes_back_a_label_in_a_judges_name(labeled, config):
    assert main(["judge", config]) == 0
    with Store(labeled, create=False) as store:
        with pytest.raises(StoreError, match="begins like the name of a judge"):
            store.undo("judge:critic", key="k")
        with pytest.raises(StoreError, match="begins like the name of a judge"):
            store.record("judge:critic", 1, key="k", choice="a")


def of_the_first_schema(path):
    """Make the store what it was before there were judges."""
    with contextlib.closing(sqlite3.connect(path)) as raw:
        raw.execute("DROP TABLE verdicts")
        raw.execute("DROP TABLE judges")
        raw.execute("PRAGMA user_version = 1")
        raw.commit()


def test_a_person_of_the_first_schema_who_is_called_like_a_judge_is_made_none(labeled, tmp_path):
    of_the_first_schema(labeled)
    with contextlib.closing(sqlite3.connect(labeled)) as raw:
        raw.execute("UPDATE annotators SET name = 'judge:Ada' WHERE name = 'Ada'")
        raw.commit()
    for _ in range(2):  # nothing was changed by the first
        with pytest.raises(StoreError, match=r"holds labels of somebody called 'judge:Ada'.*Rename the person"):
            Store(labeled, create=False)
    with contextlib.closing(sqlite3.connect(labeled)) as raw:
        assert raw.execute("PRAGMA user_version").fetchone() == (1,)
        raw.execute("UPDATE annotators SET name = 'Ada J' WHERE name = 'judge:Ada'")
        raw.commit()
    with Store(labeled, create=False) as store:
        assert {row["annotator"] for row in store.preference_rows()} == {"Ada J"}


def test_a_store_of_the_first_schema_takes_a_judges_labels(labeled):
    of_the_first_schema(labeled)
    with Store(labeled, create=False) as store:
        assert len(store.preference_rows()) >= 2
        store.add_judge("judge:x", {"model": "m"})
        item = next(number for number, kind, _ in store.judge_queue("judge:x") if kind == "pair")
        store.record_verdicts("judge:x", [Verdict(item, 0.5, (0, 1), "p", ()), Verdict(item, 0.9, (0, 1), "p", ())])
        (label,) = store.labels(Filters(annotators=["judge:x"]))
        assert (label.probability, label.choice) == (0.5, "tie")  # the second verdict changes nothing
        assert store.preferences(Filters(annotators=["judge:x"])).ties == 1


def test_the_doctor_says_which_answers_without_content_win_against_real_ones(labeled, config, server, capsys):
    server.empty = {":": 5.0, "Solution": -5.0, "Thought process:": -5.0, "Let's solve this problem step by step.": 0.1}
    assert main(["doctor", config]) == 0
    told = capsys.readouterr().out
    assert "':' beats a real answer in 5 of 5 [57 %, 100 %]" in told
    assert "'Solution' beats a real answer in 0 of 5 [0 %, 43 %]" in told
    # first answers are worth .5 -1 .75 -.25 and 1, in whatever place
    assert '"Let\'s solve this problem step by step." beats a real answer in 2 of 5' in told
    assert "It can be won with nothing: ':', " in told
    assert len(server.asked) == 5 * 4 * 2
    with Store(labeled, create=False) as store:
        assert list(store.labels(Filters(judges=True))) == list(store.labels())  # it left no label
    assert main(["doctor", config]) == 0
    assert len(server.asked) == 5 * 4 * 2  # nothing is paid for twice


def test_pairs_that_cannot_be_read_do_not_keep_a_judge_from_those_behind_them(config, server, capsys):
    mute = [Item(f"M{i}", (Answer("worth 1"), Answer("worth 0"))) for i in range(25)]
    with Store("preferences.db", gold_fraction=0, repeat_fraction=0) as store:
        store.add_items([Item("Q", (Answer("worth 1"), Answer("worth 0"))), *mute], overlap=0)
    server.fault = lambda n: "refuse" if "[Prompt]\nM" in server.asked[n]["messages"][-1]["content"] else None
    assert main(["judge", config, "--judge.answer", "logprobs", "--data.limit", "26"]) == 0
    assert "1 pairs labeled by judge:critic; 25 without an answer" in capsys.readouterr().out
    with Store("preferences.db") as store:
        store.add_items([Item("later", (Answer("worth 1"), Answer("worth 0")))], overlap=0)
    assert main(["judge", config, "--judge.answer", "logprobs"]) == 0
    assert "1 pairs labeled by judge:critic; 1 were labeled before; 25 without" in capsys.readouterr().out
    assert main(["judge", config, "--judge.answer", "logprobs"]) == 0  # nothing but those is left: no error either
    assert "0 pairs labeled by judge:critic; 2 were labeled before; 25 without" in capsys.readouterr().out


def test_a_judge_that_has_labeled_nothing_may_still_be_changed(labeled, config, server, capsys):
    assert main(["judge", config, "--judge.base_url", "http://127.0.0.1:9/v1", "--limits.retries", "0"]) == 2
    assert main(["judge", config, "--judge.constitution", "honest"]) == 0
    assert main(["judge", config]) == 2
    assert "judge:critic has labeled in preferences.db with another constitution" in capsys.readouterr().err


def test_a_name_stands_for_the_judge_that_labels_first(labeled, config, server):
    def another_starts(number):
        if number == 0:
            with Store(labeled) as store:
                store.add_judge("judge:critic", {"model": "another"})

    server.fault = another_starts
    assert main(["judge", config]) == 0
    with Store(labeled) as store, pytest.raises(StoreError, match=r"has labeled in .* with another model"):
        store.add_judge("judge:critic", {"model": "another"})
    assert main(["judge", config]) == 0


def test_half_a_character_is_asked_about_as_a_replacement(config, server, capsys):
    with Store("preferences.db", gold_fraction=0, repeat_fraction=0) as store:
        store.add_items([Item("Q\ud83d", (Answer("worth 1"), Answer("worth 0 \ude00")))], overlap=0)
    assert main(["judge", config, "--dry-run"]) == 0
    assert main(["judge", config]) == 0
    assert "1 pairs labeled" in capsys.readouterr().out
    asked = server.asked[0]["messages"][-1]["content"]
    assert "Q\ufffd\n" in asked
    assert "worth 0 \ufffd\n" in asked


def test_a_version_of_the_guidelines_is_asked_of_people_and_not_of_judges(labeled, config):
    assert main(["judge", config]) == 0
    with Store(labeled, create=False) as store:
        version = store.add_guidelines("Be fair.")
        found = store.labels(Filters(judges=True, guideline=version))
        assert {label.annotator for label in found} == {"judge:critic"}  # Ada's are older than the guidelines
        assert list(store.labels(Filters(guideline=version))) == []
