"""`tether revise`: answers criticized and rewritten under principles become rows for `tether sft`, chain included."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import tether
from scripted_judge import scripted_judge
from tether.cli import main
from tether.config import DataConfig
from tether.config.reading import load_config
from tether.data.examples import load_examples
from tether.feedback.chain_file import MARK
from tether.feedback.constitution import draw_principles


def section(asked: str, name: str) -> str:
    """What a question shows under [Name]."""
    return re.search(rf"\[{name}\]\n(.*)\n", asked)[1]


def write(body):
    """Says what it was asked: A(prompt), then C(answer), then R(answer, critique)."""
    asked = body["messages"][-1]["content"]
    if not asked.startswith("Principle: "):
        return f"A({asked})"
    if "[Critique]" not in asked:
        return f"C({section(asked, 'Answer')})"
    return f"R({section(asked, 'Answer')}, {section(asked, 'Critique')})"


@pytest.fixture
def server():
    with scripted_judge() as endpoint:
        endpoint.write = write
        yield endpoint


@pytest.fixture
def config(tmp_path, monkeypatch, server):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.txt").write_text("Be brief.\nBe kind.\nBe right.\n")
    rows = [{"prompt": f"Q{i}"} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "revise.yaml").write_text(
        f"revise: {{model: some/writer, base_url: '{server.url}', constitution: rules.txt}}\n"
        "data: {path: prompts.jsonl}\nto: runs/out.jsonl\n"
    )
    return "revise.yaml"


def rows(path="runs/out.jsonl"):
    return [json.loads(line) for line in Path(path).read_bytes().splitlines()]


def test_the_whole_chain_is_kept_and_its_last_revision_is_what_is_learned(config, server, capsys, tmp_path):
    assert main(["revise", config, "--revise.rounds", "2", "--data.limit", "2"]) == 0
    assert "runs/out.jsonl: 2 rows written; 10 requests and 1,000 tokens so far" in capsys.readouterr().out
    first, second = rows()
    assert (first["prompt"], second["prompt"]) == ("Q0", "Q1")
    answer, critique = "A(Q0)", "C(A(Q0))"
    revision = f"R({answer}, {critique})"
    final = f"R({revision}, C({revision}))"
    assert [(s["step"], s["text"]) for s in first["chain"]] == [
        ("answer", answer), ("critique", critique), ("revision", revision),
        ("critique", f"C({revision})"), ("revision", final),
    ]  # fmt: skip
    assert (first["completion"], first["revised"], first["given"]) == (final, True, False)
    principles = [s["principle"] for s in first["chain"]]
    assert principles[0] is None
    assert principles[1] == principles[2] != principles[3] == principles[4]
    asked = Counter(body["messages"][-1]["content"].split("\n")[0] for body in server.asked)
    assert asked[f"Principle: {principles[1]}"] >= 2
    assert {body["temperature"] for body in server.asked} == {1.0}
    assert len({body["seed"] for body in server.asked}) == 10


def test_sft_reads_the_rows(config, tiny_tokenizer):
    done = tether.revise(load_config(config))
    assert (done.rows, done.unchanged, done.failed.total()) == (12, 0, 0)
    examples = load_examples(DataConfig("runs/out.jsonl"), tiny_tokenizer, stop_id=tiny_tokenizer.eos_token_id)
    learned = [t for t, counted in zip(examples[3].ids, examples[3].trained, strict=True) if counted]
    assert tiny_tokenizer.decode(learned, skip_special_tokens=True).strip() == "R(A(Q3), C(A(Q3)))"


def test_an_answer_of_the_file_is_revised_as_it_stands(config, server, tmp_path):
    chat = [{"role": "system", "content": "Be nice."}, {"role": "user", "content": "Hey"}]
    given = [
        {"prompt": "Sum: ", "completion": " 3 \u2028apples"},
        {"prompt": chat, "completion": [{"role": "assistant", "content": "Go away"}]},
        {"prompt": chat, "completion": None},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    assert main(["revise", config]) == 0
    plain, said, sampled = rows()
    assert [r["given"] for r in rows()] == [True, True, False]
    assert plain["chain"][0]["text"] == " 3 \u2028apples"
    assert plain["completion"].startswith(" R(")  # after the same white space
    assert (said["prompt"], said["completion"]) == (chat, "R(Go away, C(Go away))")
    assert sampled["completion"] == "R(A(Hey), C(A(Hey)))"
    (first,) = [body["messages"] for body in server.asked if body["messages"][-1]["content"] == "Hey"]
    assert first == chat
    assert any("user: Hey" in body["messages"][-1]["content"] for body in server.asked)


def test_principles_of_a_chain_are_drawn_evenly_and_none_again_before_all_were():
    rules = ("a", "b", "c")
    drawn = [draw_principles(rules, seed=0, item=f"chain-{i}", count=4) for i in range(600)]
    assert all(set(d[:3]) == set(rules) and d[3] == d[0] for d in drawn)
    firsts = Counter(d[0] for d in drawn)
    assert all(150 < n < 250 for n in firsts.values())  # 200 each, 4 deviations of 12
    assert drawn[0] == draw_principles(rules, seed=0, item="chain-0", count=4)
    assert drawn != [draw_principles(rules, seed=1, item=f"chain-{i}", count=4) for i in range(600)]


# ---------------------------------------------------------------- resume


def test_a_rerun_asks_nothing_and_rows_that_were_lost_come_out_of_the_cache(config, server, capsys, tmp_path):
    assert main(["revise", config]) == 0
    asked, written = len(server.asked), (tmp_path / "runs" / "out.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["revise", config]) == 0
    assert "0 rows written; 12 were there before" in capsys.readouterr().out
    (tmp_path / "runs" / "out.jsonl").write_bytes(written[: len(written) // 2])  # half a line at the end
    assert main(["revise", config]) == 0
    assert (tmp_path / "runs" / "out.jsonl").read_bytes() == written
    assert len(server.asked) == asked == 36


def test_more_prompts_are_added_and_the_same_prompt_again_gets_a_chain_of_its_own(config, server, tmp_path):
    assert main(["revise", config, "--data.limit", "2"]) == 0
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "new"}\n{"prompt": "Q1"}\n{"prompt": "Q0"}\n{"prompt": "Q0"}\n')
    assert main(["revise", config]) == 0
    assert [row["prompt"] for row in rows()] == ["Q0", "Q1", "new", "Q0"]
    assert len({row["id"] for row in rows()}) == 4
    assert len({body["seed"] for body in server.asked if body["messages"][-1]["content"] == "Q0"}) == 2


def test_a_limit_that_is_reached_is_said_and_the_rest_follows_later(config, server, capsys):
    assert main(["revise", config, "--limits.requests", "10", "--limits.concurrency", "1"]) == 0
    told = capsys.readouterr().out
    assert "12 answers, 1 round of critique and revision, some/writer at http://127.0.0.1" in told
    assert "36 requests and about" in told
    assert "3 rows written" in told
    assert "9 still wait: a limit was reached; raise limits and run the same command again" in told
    assert main(["revise", config, "--limits.requests", "36"]) == 0
    assert "9 rows written; 3 were there before" in capsys.readouterr().out
    assert len(server.asked) == 36


def test_a_limit_that_comes_before_the_first_row_is_no_fault_of_the_model(config, server, capsys):
    server.fault = lambda n: "cut" if n == 0 else None
    assert main(["revise", config, "--limits.requests", "2"]) == 0
    said = capsys.readouterr().out
    assert "0 rows written; 1 without a row: a first answer was cut" in said
    assert "11 still wait: a limit was reached" in said


def test_rows_are_in_the_order_of_the_data_whatever_comes_first(config, server):
    def slow(body):
        if body["messages"][-1]["content"].endswith("Q1"):
            time.sleep(0.5)
        return write(body)

    server.write = slow
    assert main(["revise", config]) == 0
    assert [row["prompt"] for row in rows()] == [f"Q{i}" for i in range(12)]


def test_kill_9_and_the_same_command_again_give_the_same_file_and_pay_nothing_twice(config, server, tmp_path):
    assert main(["revise", config, "--to", "whole.jsonl"]) == 0
    server.asked.clear()
    server.delay_s = 0.05
    command = [sys.executable, "-m", "tether", "revise", config, "--limits.concurrency", "3"]
    for more in (5, 14):
        until, process = len(server.asked) + more, subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(server.asked) < until and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.kill()
        process.wait()
    assert main(["revise", config]) == 0
    assert rows() == rows("whole.jsonl")
    assert len(server.asked) <= 36 + 2 * 3  # in flight when a kill came: nobody can know whether they were answered


def test_ctrl_c_keeps_what_was_answered_and_exits_with_3(config, server, capsys):
    server.delay_s = 0.1
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert main(["revise", config, "--limits.concurrency", "2"]) == 3
    said = capsys.readouterr().err
    assert re.search(r"stopped by a signal: runs/out.jsonl: \d+ rows written; .* (\d+) still wait", said)
    asked = len(server.asked)
    assert 0 < asked < 36
    assert main(["revise", config]) == 0
    assert len(server.asked) == 36  # nothing was asked twice
    assert [row["prompt"] for row in rows()] == [f"Q{i}" for i in range(12)]


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("step", ["Q3", "[Answer]\nA(Q3)", "[Critique]\nC(A(Q3))"])
@pytest.mark.parametrize("fault", ["empty", "cut"])
def test_a_reply_that_is_empty_or_cut_gives_no_row(config, server, capsys, step, fault):
    def broken(body):
        asked = body["messages"][-1]["content"]
        last = re.sub(r"\n\n(Where does|Rewrite the).*", "", asked, flags=re.DOTALL)
        return " \n" if last.endswith(step) and fault == "empty" else write(body)

    def cut(number):
        asked = server.asked[number]["messages"][-1]["content"]
        last = re.sub(r"\n\n(Where does|Rewrite the).*", "", asked, flags=re.DOTALL)
        return "cut" if last.endswith(step) and fault == "cut" else None

    server.write, server.fault = broken, cut
    assert main(["revise", config]) == 0
    what = {"Q": "a first answer", "[A": "a critique", "[C": "a revision"}[step[: 1 if step[0] == "Q" else 2]]
    how = "empty" if fault == "empty" else "cut, filtered or refused"
    assert f"11 rows written; 1 without a row: {what} was {how}" in capsys.readouterr().out
    assert [row["prompt"] for row in rows()] == [f"Q{i}" for i in range(12) if i != 3]
    server.write, server.fault = write, lambda n: None
    assert main(["revise", config]) == 0
    assert len(rows()) == (11 if fault == "empty" else 12)  # what was whole is kept, and says the same


def test_of_a_reply_in_parts_the_text_is_learned_and_no_thought(config, server):
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "In"}]
    server.write = lambda body: [*parts, {"type": "text", "text": " parts."}]
    assert main(["revise", config, "--data.limit", "1"]) == 0
    (row,) = rows()
    assert [step["text"] for step in row["chain"]] == ["In parts."] * 3


def test_an_answer_that_comes_back_as_it_was_is_counted_and_marked(config, server, capsys):
    server.write = lambda body: write(body) if "[Critique]" not in str(body) else " A(Q0)\n"
    assert main(["revise", config, "--data.limit", "2"]) == 0
    assert "2 rows written; 1 of them end with the answer that they began with" in capsys.readouterr().out
    assert [row["revised"] for row in rows()] == [False, True]


def test_a_model_that_never_gives_a_row_is_named_after_a_trial(config, server, capsys, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Q{i}"}}\n' for i in range(60)))
    server.write = lambda body: ""
    assert main(["revise", config]) == 2
    said = capsys.readouterr().err
    assert re.search(r"revise.model=some/writer: none of \d+ chains gave a row \(\d+: a first answer was empty\)", said)
    assert len(server.asked) < 40
    assert not (tmp_path / "runs" / "out.jsonl").exists()


def test_an_endpoint_that_takes_no_such_request_is_named(config, server, capsys):
    server.fault = lambda n: 400
    assert main(["revise", config]) == 2
    assert "does not answer as an endpoint for some/writer (HTTP 400" in (said := capsys.readouterr().err)
    assert "nothing could be revised. Check revise.model" in said
    server.fault = lambda n: 404
    assert main(["revise", config]) == 2
    assert "Check the address, which mostly ends in /v1, and revise.model" in capsys.readouterr().err


def test_faults_that_pass_are_asked_again_within_the_budget(config, server, capsys):
    server.fault = lambda n: [429, 500, "half"][n // 5 % 3] if n % 5 == 3 else None
    assert main(["revise", config, "--limits.requests", "60"]) == 0
    assert "12 rows written" in capsys.readouterr().out
    assert len(server.asked) <= 60
    assert max(server.answered.values()) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--revise.rounds", "0"], "revise.rounds=0 is outside [1, 4]: a chain has 1 to 4 rounds"),
        (["--revise.rounds", "5"], "revise.rounds=5 is outside [1, 4]: a chain has 1 to 4 rounds"),
        (["--revise.constitution", "empty.txt"], "revise.constitution=empty.txt holds no principle"),
        (["--revise.constitution", "latin.txt"], "revise.constitution=latin.txt, line 1: not UTF-8"),
        (["--revise.constitution", "ruls.txt"], "revise.constitution=ruls.txt cannot be read"),
        (["--data.path", "empty.txt"], "empty.txt has no rows"),
        (["--data.path", "no.jsonl"], "no.jsonl does not exist"),
        (["--data.path", "text.jsonl"], "text.jsonl, line 1: there is no column 'prompt', only 'text'"),
        (["--data.path", "void.jsonl"], "void.jsonl, line 1, column 'completion': is empty, so there is nothing to"),
        (["--to", "prompts.jsonl"], "to=prompts.jsonl is data.path itself"),
        (["--to", "text.jsonl"], "to=text.jsonl, line 1: not a row that tether revise wrote"),
        (["--to", "out.parquet"], "to=out.parquet does not end in .jsonl"),
        (["--to", "rules.txt/out.jsonl"], "to=rules.txt/out.jsonl cannot be written"),
        (["--sampling.top_k", "5"], "sampling.top_k is set with revise.base_url"),
        (["--revise.key_env", "NO_SUCH_KEY"], "revise.key_env=NO_SUCH_KEY: there is no such variable"),
        (["--limits.tokens", "10"], "limits.tokens=10 is below the"),
        (["--fresh"], "--fresh: a revision has no run to start over"),
    ],
)
def test_what_cannot_be_revised_is_told_in_one_line(config, server, flags, said, capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"Sei h\xf6flich.")
    (tmp_path / "text.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "void.jsonl").write_text('{"prompt": "x", "completion": ""}\n')
    assert main(["revise", config, *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert server.asked == []


def test_rows_that_were_made_otherwise_are_not_mixed(config, server, capsys):
    assert main(["revise", config, "--data.limit", "1"]) == 0
    for flags, said in (
        (["--revise.rounds", "2"], "to=runs/out.jsonl holds rows made with rounds 1, now it is 2"),
        (["--revise.constitution", "honest"], "holds rows made with constitution"),
        (["--seed", "1"], "holds rows made with seed 0, now it is 1"),
    ):
        assert main(["revise", config, *flags]) == 2
        assert said in capsys.readouterr().err
        assert main(["revise", config, *flags, "--dry-run"]) == 2
        assert said in capsys.readouterr().err
    assert len(server.asked) == 3


def test_one_file_is_written_by_one_process(config, server, capsys):
    server.delay_s = 0.2
    first = threading.Thread(target=tether.revise, args=(load_config(config),))
    first.start()
    while not server.asked:
        time.sleep(0.01)
    assert main(["revise", config]) == 2
    assert "runs/out.jsonl is in use by another tether revise" in capsys.readouterr().err
    first.join()
    assert len(rows()) == 12


def test_a_dry_run_tells_what_it_would_take_and_asks_nothing(config, server, capsys, tmp_path):
    before = sorted(str(file) for file in tmp_path.rglob("*"))
    assert main(["revise", config, "--dry-run"]) == 0
    told = capsys.readouterr().out
    for part in ("12 prompts, 0 with a first answer", "3 principles", "36 requests and about", "first question\n  Q0"):
        assert part in told
    assert server.asked == []
    assert sorted(str(file) for file in tmp_path.rglob("*")) == before


def test_every_row_begins_as_the_studio_knows_it(config, tmp_path):
    assert main(["revise", config, "--data.limit", "1"]) == 0
    assert (tmp_path / "runs" / "out.jsonl").read_bytes().startswith(MARK)
