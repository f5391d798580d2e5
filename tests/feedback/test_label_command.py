"""`tether label` makes the queue from files, runs and models, and says what it did."""

import contextlib
import json
import sqlite3

import pytest

import tether
from tether.cli import main
from tether.feedback.store import Store
from tether.runs.files import write_table

ROWS = [
    {"prompt": "Hi", "a": "x", "b": "y", "group": 7},
    {"prompt": [{"role": "user", "content": "Hey"}], "chosen": "good", "rejected": "bad"},
    {"prompt": "K", "answers": ["1", "2", {"text": "3", "source": {"model": "m"}, "finish_reason": "length"}]},
    {
        "chosen": "\n\nHuman: Hi\n\nAssistant: Hello",
        "rejected": "\n\nHuman: Hi\n\nAssistant: Go away",
        "rejected_finish_reason": "length",
    },
]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write


def stored(path="preferences.db"):
    with Store(path, create=False) as store, contextlib.closing(sqlite3.connect(path)) as c:
        return [store.item(i) for (i,) in c.execute("SELECT id FROM items")]


def test_every_form_of_a_row_becomes_an_item(write, capsys):
    assert main(["label", "--from", write("p.jsonl", ROWS), "--overlap", "0.5"]) == 0
    assert capsys.readouterr().out == "p.jsonl: 4 items added to preferences.db, 2 of them for two people\n"
    items = sorted(stored(), key=lambda item: item.source["row"])
    assert [item.kind for item in items] == ["pair", "pair", "rank", "pair"]
    assert [[a.text for a in item.answers] for item in items] == [
        ["x", "y"], ["good", "bad"], ["1", "2", "3"], [" Hello", " Go away"],
    ]  # fmt: skip
    assert {item.gold for item in items} == {None}  # what was preferred there is told to nobody
    assert items[0].group == "7"
    assert items[1].prompt == [{"role": "user", "content": "Hey"}]
    assert items[2].answers[2].source == {"model": "m"}
    assert [[a.finish_reason for a in item.answers] for item in items] == [
        ["stop", "stop"], ["stop", "stop"], ["stop", "stop", "length"], ["stop", "length"],
    ]  # fmt: skip
    assert main(["label", "--from", "p.jsonl"]) == 0
    assert "0 items added to preferences.db, 0 of them for two people; 4 were there already" in capsys.readouterr().out


def test_gold_knows_the_better_answer(write, capsys):
    rows = [ROWS[1], ROWS[0] | {"gold": "b"}, ROWS[2] | {"gold": 2}]
    assert main(["label", "--gold", write("g.jsonl", rows)]) == 0
    assert sorted((item.prompt if isinstance(item.prompt, str) else "chat", item.gold) for item in stored()) == [
        ("Hi", 1), ("K", 2), ("chat", 0),
    ]  # fmt: skip
    assert {item.target for item in stored()} == {None}


def rollouts(folder, **cycles):
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text("run: r\n")
    for name, completions in cycles.items():
        number = int(name[1:])
        rows = [(p, k, text) for p, answers in enumerate(completions) for k, text in enumerate(answers)]
        columns = {
            "prompt_index": [p for p, _, _ in rows],
            "response_index": [k for _, k, _ in rows],
            "prompt": [f"p{p}" if p else '[{"role": "user", "content": "Hi"}]' for p, _, _ in rows],
            "completion": [text for _, _, text in rows],
            "finish_reason": ["length" if text == "z" else "stop" for _, _, text in rows],
        }
        write_table(folder / "rollouts" / f"cycle-{number:06d}.parquet", columns)


def test_pairs_of_a_run_are_answers_to_one_prompt_that_differ(write, tmp_path, capsys):
    rollouts(tmp_path / "run", c1=[["x", "y"], ["same", "same"]], c3=[["z", "x"], ["same", "else"]])
    assert main(["label", "--from-run", "run", "--cycle", "1"]) == 0
    assert "1 items added" in (out := capsys.readouterr().out)
    assert "1 prompts left out, whose answers are too few or all the same" in out
    (item,) = stored()
    assert item.prompt == [{"role": "user", "content": "Hi"}]
    assert sorted(a.text for a in item.answers) == ["x", "y"]
    assert item.answers[0].source.keys() == {"run", "cycle", "prompt_index", "response_index"}
    assert main(["label", "--from-run", "run", "--to", "all.db"]) == 0  # across cycles
    assert {frozenset(a.text for a in item.answers) for item in stored("all.db")} >= {frozenset({"same", "else"})}
    assert main(["label", "--from-run", "run", "--limit", "1", "--to", "one.db"]) == 0
    (one,) = stored("one.db")
    assert one.prompt in [item.prompt for item in stored("all.db")]
    assert main(["label", "--from-run", "run", "--per-prompt", "3", "--to", "k.db"]) == 0
    (ranked,) = stored("k.db")
    assert sorted((a.text, a.finish_reason) for a in ranked.answers) == [("x", "stop"), ("y", "stop"), ("z", "length")]


def test_a_model_answers_on_the_spot(write, tiny_model, capsys):
    prompts = write("prompts.jsonl", [{"prompt": "ab"}, {"prompt": "cd"}])
    argv = ["--sample", str(tiny_model()), "--prompts", prompts, "--answers", "3", "--max-new-tokens", "8"]
    assert main(["label", *argv]) == 0
    assert "2 items added" in capsys.readouterr().out
    first = stored()
    assert {item.kind for item in first} == {"rank"}
    again = tether.generate(argv[1], ["ab", "cd"], samples=3, max_new_tokens=8)
    assert {(a.text, a.finish_reason) for item in first for a in item.answers} == {
        (g.completion, g.finish_reason) for g in again
    }
    assert {g.finish_reason for g in again} >= {"length"}
    assert main(["label", *argv, "--to", "again.db"]) == 0
    assert stored("again.db") == first  # same seed, same answers
    assert main(["label", *argv, "--seed", "1"]) == 0  # other answers, into the store that is there
    assert len(stored()) == 4


def test_the_rest_of_a_project_is_set_up_and_looked_at(write, tmp_path, capsys):
    (tmp_path / "g.md").write_text("# Be kind")
    argv = [
        "label",
        "--from",
        write("p.jsonl", ROWS),
        "--guidelines",
        "g.md",
        "--annotator",
        "Ada",
        "--annotator",
        "Bo",
    ]
    assert main([*argv, "--export", "out", "--status", "--seed", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "g.md: version 1 of the guidelines, in force",
        "Ada is registered",
        "Bo is registered",
        "out: 0 pairs in preferences.jsonl, 0 events, 4 items",
        "preferences.db: 0 of 5 labels (0%) on 4 items; 0 gold items; guidelines version 1",
        "  Ada  0 labels, 0 skips",
        "  Bo   0 labels, 0 skips",
    ]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "nothing to do"),
        (["--status"], "preferences.db does not exist"),
        (["--from", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--from", "bad.jsonl"], "bad.jsonl, line 1: the columns 'prompt', 'text' hold no answers"),
        (["--from", "twice.jsonl"], "twice.jsonl, line 1, column 'answers': an item has the answer 'x' twice"),
        (["--gold", "p.jsonl"], "p.jsonl, line 1, column 'gold': is null"),
        (["--from", "p.jsonl", "--overlap", "2"], "overlap=2.0"),
        (["--from", "p.jsonl", "--from-run", "r"], "not allowed with"),
        (["--from-run", "p.jsonl"], "is not a run directory"),
        (["--from-run", "r", "--limit", "0"], "--limit 0: no pair would be asked about"),
        (["--from", "p.jsonl", "--limit", "-3"], "--limit -3: no pair would be asked about"),
        (["--gold", "p.jsonl", "--limit", "3"], "--limit 3 goes with --from, --from-run or --sample"),
        (["--from", "p.jsonl", "--cycle", "2"], "--cycle goes with --from-run RUN, which is not given"),
        (["--from-run", "r", "--answers", "3"], "--answers goes with --sample MODEL, which is not given"),
        (["--from", "p.jsonl", "--temperature", "2"], "--temperature goes with --sample MODEL"),
        (["--from", "p.jsonl", "--uncertain"], "--uncertain goes with --from-run RUN"),
        (["--from-run", "r", "--uncertain", "--per-prompt", "3"], "--uncertain chooses pairs"),
        (["--sample", "m"], "go together"),
        (["--sample", "m", "--prompts", "p.jsonl", "--answers", "1"], "--answers 1: there would be nothing to compare"),
        (["--guidelines", "missing.md"], "missing.md cannot be read"),
        (["--status", "--to", "p.jsonl"], "damaged or no store of labels"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_store(write, tmp_path, capsys, argv, says):
    write("p.jsonl", ROWS)
    write("bad.jsonl", [{"prompt": "p", "text": "x"}])
    write("twice.jsonl", [{"prompt": "p", "answers": ["x", "x"]}])
    assert main(["label", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tether: error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "preferences.db").exists()
