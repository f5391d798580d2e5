"""The command line from outside: what it prints, where, and with which exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tether.cli import COMMANDS, main
from tether.config.keys import keys
from tether.config.kinds import KINDS
from tether.config.reading import load_config
from tether.runs.files import write_sums

TETHER = Path(sys.executable).parent / "tether"
FILE = "run: r\nmodel: {policy: m}\nprompts: {path: p}\nreward: [{function: a.py:f}]\nppo: {cycles: 7}\n"


def run(*argv, **env):
    return subprocess.run(
        [TETHER, *argv], capture_output=True, text=True, encoding="utf-8", env=os.environ | {"COLUMNS": "100"} | env
    )


def main_with(command, **env):
    """The command line, with one command that does `command`."""
    code = (
        f"import sys, tether as t, tether.cli as c\ndef f(argv): {command}\n"
        "c.COMMANDS['demo'] = f\nsys.exit(c.main(['demo']))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(FILE)
    return str(path)


def test_help_names_every_command():
    bare, asked = run(), run("--help")
    assert bare.returncode == asked.returncode == 0
    assert bare.stdout == asked.stdout
    assert [name for name in (*COMMANDS, *KINDS) if f"\n  {name} " not in asked.stdout] == []


@pytest.mark.parametrize("command", dict.fromkeys((*COMMANDS, *KINDS)))
def test_every_command_has_help(command):
    got = run(command, "--help")
    assert got.returncode == 0, got.stderr
    assert f"usage: tether {command}" in got.stdout
    assert got.stderr == ""


@pytest.mark.parametrize("kind", KINDS)
def test_help_shows_every_key(kind):
    printed = run(kind, "--help").stdout
    missing = [
        key.name
        for key in keys(KINDS[kind].config)
        if f"\n  {key.name}  (" not in printed and f"\n{key.name}: " not in printed
    ]
    assert missing == []


def test_help_shows_type_default_unit_and_reason():
    printed = " ".join(run("ppo", "--help").stdout.split())
    assert "ppo.kl.coef (a number; default 0.05) β: reward units per nat. With a target, only the start." in printed
    assert "ppo.value_clip (a number or null; default 0.2)" in printed
    assert "run (text; required) The run directory." in printed
    assert "model.lora.rank (a whole number; default 16)" in printed
    assert "reward[].weight (a number; default 1.0)" in printed
    assert "prompts.overlong (error or cut_left or drop; default error)" in printed


def test_version():
    assert run("--version").stdout == "tether 0.1.0\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["poo"], "unknown command poo: did you mean ppo?"),
        (["--verison"], "unknown command --verison: did you mean --version?"),
        (["frobnicate"], "unknown command frobnicate: the commands are sft, reward, ppo"),
        (["ppo", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["ppo", "--ppo.kl.coeff", "1"], "did you mean ppo.kl.coef?"),
        (["ppo"], "run and model.policy and prompts.path are missing"),
        (["ppo", "FILE", "--ppo.minibatch", "24"], "ppo.minibatch=24 does not divide ppo.batch=64"),
        (["sft", "FILE"], "unknown key prompts for tether sft: it is one of tether ppo"),
        (["doctor", "--run", "r"], "none of the sections"),
        (["generate"], "required: MODEL"),
        (["generate", "m"], "no prompt: there is nothing to answer"),
        (["generate", "m", "--prompt", "hi", "--samples", "many"], "invalid int value: 'many'"),
        (["export", "r"], "required: --to"),
        (["report"], "required: RUN"),
        (["demo", "--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_exit_2(file, argv, message):
    got = run(*[file if word == "FILE" else word for word in argv])
    assert got.returncode == 2
    assert got.stdout == ""
    assert got.stderr.startswith("tether: error: ")
    assert message in got.stderr
    assert got.stderr.count("\n") == 1


def test_a_bad_file_is_named_with_its_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: r\n\tseed: 1\n")
    got = run("ppo", str(path))
    assert (got.returncode, got.stdout) == (2, "")
    assert got.stderr == f"tether: error: {path}, line 2: not YAML: a tab indents here; use spaces.\n"


def test_print_config_prints_what_would_run_and_runs_nothing(file, tmp_path):
    got = run("ppo", "--ppo.kl.coef", "0.02", file, "--print-config")
    assert (got.returncode, got.stderr) == (0, "")
    (tmp_path / "printed.yaml").write_text(got.stdout)
    config = load_config(tmp_path / "printed.yaml")
    assert (config.ppo.cycles, config.ppo.kl.coef, config.ppo.batch) == (7, 0.02, 64)
    assert "lora: null\n" in got.stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [("ConfigError", 2), ("DataError", 2), ("RunError", 2), ("TrainingError", 1)],
)
def test_our_errors_give_their_exit_code_and_no_traceback(error, code):
    got = main_with(f"raise t.{error}('why')")
    assert (got.returncode, got.stderr) == (code, "tether: error: why\n")


def test_a_stop_that_was_asked_for_is_no_error_and_exit_3():
    got = main_with("raise t.Interrupted('stopped after cycle 28')")
    assert (got.returncode, got.stderr) == (3, "tether: stopped after cycle 28\n")


LONG = "Once upon a time " * 30


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["ppo", "FILE", "--prompts.path", LONG], "prompts.path has 509 bytes"),
        (["ppo", "FILE", "--prompts.path", LONG, "--dry-run"], "prompts.path has 509 bytes"),
        (["ppo", "FILE", "--run", "runs/" + "x" * 300], "run has 305 bytes"),
        (["ppo", LONG], "a path of 5"),
        (["generate", LONG, "--prompt", "Hi"], "a path of 5"),
        (["export", LONG, "--to", "there"], "a path of 5"),
        (["report", LONG], "a path of 5"),
    ],
)
def test_a_text_in_place_of_a_path_is_one_message(file, argv, says, capsys):
    assert main([file if word == "FILE" else word for word in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"tether: error: {says}")
    assert "Is it the text itself?" in err
    assert err.count("\n") == 1


def test_a_directory_that_cannot_be_exported_to_is_one_message(tiny_model, tmp_path, capsys):
    done = tmp_path / "run"
    done.mkdir()
    (done / "config.yaml").write_text(FILE)
    (done / "status.json").write_text('{"schema": 1, "kind": "ppo", "state": "finished"}')
    tiny_model("llama").rename(done / "final")
    write_sums(done / "final")
    (tmp_path / "file").touch()
    assert main(["export", str(done), "--to", str(tmp_path / "file" / "foo")]) == 2
    assert "cannot be exported to" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1


def test_the_traceback_is_there_for_those_who_ask():
    got = main_with("raise t.ConfigError('why')", TETHER_DEBUG="1")
    assert got.returncode == 2
    assert "Traceback" in got.stderr
    assert got.stderr.endswith("tether: error: why\n")


def test_what_nobody_foresaw_is_exit_1_with_its_traceback():
    got = main_with("1 / 0")
    assert got.returncode == 1
    assert "ZeroDivisionError" in got.stderr


def test_ctrl_c_outside_training_is_exit_1_without_traceback():
    got = main_with("raise KeyboardInterrupt")
    assert (got.returncode, got.stderr) == (1, "tether: interrupted\n")


@pytest.mark.parametrize("argv", [["--help"], ["ppo", "--help"]])  # written at exit, and before
def test_a_reader_that_leaves_early_is_no_crash(argv):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([TETHER, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
