"""The run directory: who may write, what is in it, what a killed process leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from huggingface_hub import HfApi, constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tether.config import DataConfig, PromptsConfig, SFTConfig, SFTModelConfig
from tether.config.reading import to_yaml
from tether.errors import Interrupted, RewardError, RunError
from tether.runs import Run, RunDirectory, hash_files
from tether.runs.files import write_sums
from tether.train.ppo import input_hashes

HOLD = """
import sys
from tether.config.reading import load_config
from tether.runs import RunDirectory
with RunDirectory.open(load_config(sys.argv[1]), command="ppo") as run:
    run.append_metrics({"cycle": 1, "reward/score_mean": 0.5})
    print("open")
    sys.stdin.read()
"""


def hold(config, start) -> subprocess.Popen:
    """A process that opens the run of `config`, says so, and stays."""
    file = Path(f"{config.run}.yaml")
    file.write_text(to_yaml(config))
    return start(HOLD, file)


def status(path) -> dict:
    return json.loads((Path(path) / "status.json").read_text())


# ---------------------------------------------------------------- what is in it


def test_a_new_run_holds_the_files_of_schema_1(config):
    with RunDirectory.open(config, command="ppo", inputs={"model.policy": "sha256:00"}) as run:
        run.append_metrics({"cycle": 1})
        assert status(run.path)["state"] == "running"
    path = run.path
    assert yaml.safe_load((path / "config.yaml").read_text())["ppo"]["kl"]["coef"] == 0.05
    environment = json.loads((path / "environment.json").read_text())
    assert environment["inputs"] == {"model.policy": "sha256:00"}
    assert environment["seed"] == 0
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["hardware"]["cpus"] == os.cpu_count()
    assert status(path) == {
        "schema": 1,
        "kind": "ppo",
        "state": "finished",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "heartbeat": status(path)["heartbeat"],
        "exit_reason": "done",
        "exit_code": 0,
    }


def test_a_reader_gets_back_what_the_trainer_wrote(config):
    with RunDirectory.open(config, command="ppo") as run:
        run.append_metrics({"cycle": 1, "reward/score_mean": 0.1})
        run.append_metrics({"cycle": 2, "reward/score_mean": torch.tensor(0.5), "policy/ratio_max": np.float32(1.5)})
        run.event("alarm", what="KL", value=float("inf"))
    got = Run.open(config.run)
    assert got.config == config
    assert got.metrics == [
        {"cycle": 1, "reward/score_mean": 0.1},
        {"cycle": 2, "reward/score_mean": 0.5, "policy/ratio_max": 1.5},
    ]
    assert [event["event"] for event in got.events] == ["created", "alarm"]
    assert got.events[1]["value"] is None
    assert got.final == Path(config.run) / "final"


def test_reading_a_directory_that_is_no_run_says_so(tmp_path):
    with pytest.raises(RunError, match=r"is not a run directory: it has no config\.yaml"):
        Run.open(tmp_path)


finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = finite | st.integers(-(2**53), 2**53) | st.none() | st.booleans() | st.text()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.dictionaries(st.text(), numbers, max_size=4), max_size=4))
def test_metrics_come_back_bit_for_bit(tmp_path_factory, config, lines):
    config = replace(config, run=str(tmp_path_factory.mktemp("metrics") / "run"))
    with RunDirectory.open(config, command="ppo") as run:
        for line in lines:
            run.append_metrics(line)
    assert Run.open(config.run).metrics == lines


def test_numbers_that_are_not_finite_are_null_because_json_has_none(config):
    with RunDirectory.open(config, command="ppo") as run:
        run.append_metrics({"cycle": 1, "a": float("nan"), "b": torch.tensor(float("-inf")), "c": [np.nan, 1.0]})
    assert "NaN" not in (run.path / "metrics.jsonl").read_text()
    assert Run.open(config.run).metrics == [{"cycle": 1, "a": None, "b": None, "c": [None, 1.0]}]


def test_rollouts_are_parquet_with_per_token_lists_of_32_bits(config):
    columns = {
        "cycle": [3, 3],
        "prompt": ["Say é", "Hi"],
        "score": [1.0, None],
        "score/none": [None, None],
        "token_id": [[5, 1], [2]],
        "text": [["a", ""], ["b"]],
        "old_logprob": [[-0.5, -1.0], [0.0]],
        "new_logprob": [None, None],
        "clipped": [[True, False], [False]],
    }
    with RunDirectory.open(config, command="ppo") as run:
        run.write_rollouts(3, columns)
        run.write_evaluation(0, columns)
    table = pq.read_table(run.path / "rollouts" / "cycle-000003.parquet")
    assert table.to_pydict() == columns
    assert table.schema.field("token_id").type == pa.list_(pa.int32())
    assert table.schema.field("old_logprob").type == pa.list_(pa.float32())
    assert table.schema.field("clipped").type == pa.list_(pa.bool_())
    assert table.schema.field("text").type == pa.list_(pa.string())
    assert table.schema.field("score/none").type == pa.float64()
    got = Run.open(config.run)
    assert got.rollout_cycles == [3]
    assert got.evaluation_cycles == [0]
    assert got.rollouts(3) == table
    with pytest.raises(RunError, match=r"written of these cycles: 3\. Ask"):
        got.rollouts(4)


def test_an_evaluations_columns_without_values_have_the_types_of_a_rollouts(config):
    rollout = {"new_logprob": [[-0.5, -1.0], [0.0]], "ratio": [[1.0, 1.5], [2.0]], "clipped": [[True, False], [False]]}
    with RunDirectory.open(config, command="ppo") as run:
        run.write_rollouts(1, rollout)
        run.write_evaluation(1, {name: [[None, None], [None]] for name in rollout})
    got = Run.open(config.run)
    assert got.evaluations(1).schema == got.rollouts(1).schema


@pytest.mark.parametrize(
    ("error", "state"),
    [(Interrupted("stopped by SIGINT"), "stopped"), (KeyboardInterrupt(), "stopped"), (RewardError("row 3"), "failed"),
     (ZeroDivisionError("by zero"), "failed")],
)  # fmt: skip
def test_the_status_says_how_the_run_ended(config, error, state):
    with pytest.raises(type(error)), RunDirectory.open(config, command="ppo"):
        raise error
    assert status(config.run)["state"] == state
    assert str(error) in status(config.run)["exit_reason"]


# ---------------------------------------------------------------- one writer


def test_a_second_process_is_refused_and_told_who_has_the_run(config, start):
    holder = hold(config, start)
    assert holder.stdout.readline() == "open\n"
    before = (Path(config.run) / "metrics.jsonl").read_bytes()
    for fresh in (False, True):
        with pytest.raises(RunError, match=rf"in use by pid {holder.pid} on {socket.gethostname()}") as refused:
            RunDirectory.open(config, command="ppo", fresh=fresh)
        assert refused.value.exit_code == 2
    assert (Path(config.run) / "metrics.jsonl").read_bytes() == before
    assert not Path(f"{config.run}.old-1").exists()


def test_a_killed_process_lets_go_of_its_run(config, start):
    holder = hold(config, start)
    assert holder.stdout.readline() == "open\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert status(config.run)["state"] == "running"  # it had no time to say otherwise
    with RunDirectory.open(config, command="ppo") as run:
        assert run.resumed
        assert not run.finished


def test_a_forked_worker_that_outlives_the_trainer_does_not_hold_its_lock(config):
    with RunDirectory.open(config, command="ppo") as run:
        worker = os.fork()
        if worker == 0:
            signal.pause()
        (run.path / "final").mkdir()
        (run.path / "final" / "config.json").touch()
        write_sums(run.path / "final")
    try:
        RunDirectory.open(config, command="ppo").__exit__(None, None, None)
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_the_lock_is_kept_when_a_forked_worker_ends(config):
    with RunDirectory.open(config, command="ppo"):
        worker = os.fork()
        if worker == 0:
            os._exit(0)
        os.waitpid(worker, 0)
        with pytest.raises(RunError, match="in use"):
            RunDirectory.open(config, command="ppo")


# ---------------------------------------------------------------- what a killed process leaves


def test_half_a_line_of_metrics_is_no_line(config):
    with RunDirectory.open(config, command="ppo") as run:
        run.append_metrics({"cycle": 1, "a": 0.1})
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run.path / name).open("a") as file:
            file.write('{"cycle": 2, "a": 0.')
    (run.path / "status.json").write_text((run.path / "status.json").read_text().replace("finished", "running"))
    assert Run.open(config.run).metrics == [{"cycle": 1, "a": 0.1}]
    with RunDirectory.open(config, command="ppo") as run:
        run.append_metrics({"cycle": 2, "a": 0.2})
        assert [line["cycle"] for line in run.metrics()] == [1, 2]
    assert Run.open(config.run).events[0]["event"] == "created"


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(config):
    with RunDirectory.open(config, command="ppo") as run:
        run.append_metrics({"cycle": 1})
    metrics = run.path / "metrics.jsonl"
    metrics.write_text('{"cycle": 1}\n{"cyc\n{"cycle": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is not a JSON object"):
        _ = Run.open(config.run).metrics


def test_cutting_back_leaves_each_cycle_up_to_the_checkpoint_once(config):
    run = RunDirectory.open(config, command="ppo")
    for cycle in range(1, 6):
        run.append_metrics({"cycle": cycle, "a": cycle / 10})
        run.write_rollouts(cycle, {"cycle": [cycle]})
        run.write_evaluation(cycle, {"cycle": [cycle]})
    (run.path / "rollouts" / ".cycle-000006.parquet.partial").write_bytes(b"half")
    run.__exit__(Interrupted, Interrupted(), None)
    with RunDirectory.open(config, command="ppo") as run:
        run.truncate_after(3)
        assert [line["cycle"] for line in run.metrics()] == [1, 2, 3]
    got = Run.open(config.run)
    assert got.rollout_cycles == got.evaluation_cycles == [1, 2, 3]
    assert len(list((run.path / "rollouts").iterdir())) == 3
    assert (got.events[-1]["event"], got.events[-1]["cycle"]) == ("resumed", 3)


def test_a_process_killed_before_the_config_was_written_leaves_no_run(config):
    path = Path(config.run)
    path.mkdir()
    for name in ("lock", "events.jsonl", "metrics.jsonl", "environment.json", ".status.json.partial"):
        (path / name).write_text("half")
    with RunDirectory.open(config, command="ppo") as run:
        assert not run.resumed
    assert Run.open(path).metrics == []


# ---------------------------------------------------------------- bad directories


def test_a_directory_with_other_files_is_left_alone(config):
    path = Path(config.run)
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(RunError, match=r"not empty and not a run directory \(it holds thesis.tex"):
            RunDirectory.open(config, command="ppo", fresh=fresh)
    assert [file.name for file in path.iterdir()] == ["thesis.tex"]


def test_a_file_in_place_of_the_directory_is_refused(config):
    Path(config.run).write_text("x")
    with pytest.raises(RunError, match="is a file, and a run needs a directory"):
        RunDirectory.open(config, command="ppo")


def test_a_parent_that_is_a_file_is_refused(config):
    Path(config.run).write_text("x")
    with pytest.raises(RunError, match="run is a file, and a run needs a directory") as refused:
        RunDirectory.open(replace(config, run=config.run + "/deeper"), command="ppo")
    assert refused.value.exit_code == 2


def test_a_full_disk_is_said_and_leaves_whole_lines_and_tables(config, small_disk):
    config = replace(config, run=str(small_disk / "run"))
    run = RunDirectory.open(config, command="ppo")
    run.write_rollouts(1, {"cycle": [1]})
    with pytest.raises(RunError, match=r"cycle-000002\.parquet cannot be written \(.*No space left") as full:
        run.write_rollouts(2, {"noise": [os.urandom(10**6)]})
    assert full.value.exit_code == 1
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written .* Free some space"):
        fill(run)
    run.__exit__(RunError, full.value, None)  # not even the status can be written; what counts is the error
    got = Run.open(config.run)
    assert got.rollout_cycles == [1]
    assert [line["cycle"] for line in got.metrics] == list(range(1, len(got.metrics) + 1))
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")


def fill(run: RunDirectory) -> None:
    for cycle in range(1, 10**6):
        run.append_metrics({"cycle": cycle, "text": "x" * 1000})


# ---------------------------------------------------------------- --fresh


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(config):
    for cycle in (1, 2, 3):
        with RunDirectory.open(config, command="ppo", fresh=True) as run:
            assert not run.resumed
            run.append_metrics({"cycle": cycle})
    assert [Run.open(f"{config.run}{old}").metrics for old in (".old-1", ".old-2", "")] == [
        [{"cycle": 1}], [{"cycle": 2}], [{"cycle": 3}]
    ]  # fmt: skip


def test_fresh_may_begin_with_another_command(config):
    with RunDirectory.open(config, command="ppo"):
        pass
    sft = SFTConfig(run=config.run, model=SFTModelConfig(policy="m"), data=DataConfig(path="d"))
    with RunDirectory.open(sft, command="sft", fresh=True) as run:
        run.append_metrics({"step": 1})
    assert Run.open(config.run).config == sft


# ---------------------------------------------------------------- hashes


def test_a_hash_changes_with_the_content_and_not_with_the_name_of_the_directory(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
    assert hash_files(str(tmp_path / "a")) == hash_files(str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"Weights")
    assert hash_files(str(tmp_path / "a")) != hash_files(str(tmp_path / "b"))


def test_the_hash_of_a_file_is_its_sha256(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert hash_files(str(tmp_path / "abc")) == "sha256:ba7816bf8f01cfea"


def test_a_hub_id_stands_for_itself_at_its_revision():
    assert hash_files("some/model", "abc123") == "some/model@abc123"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A cache of the hub as huggingface_hub lays it out, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network")))
    return tmp_path / "hub"


def publish(hub: Path, folder: str, commit: str, branch: str = "main") -> None:
    """What a download of `branch` leaves when it stands at `commit`."""
    (hub / folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    (hub / folder / "refs").mkdir(exist_ok=True)
    (hub / folder / "refs" / branch).write_text(commit)


FIRST, SECOND = "a" * 40, "b" * 40


def test_a_hub_input_is_pinned_to_the_commit_that_its_branch_stood_at(hub):
    publish(hub, "models--me--tiny", FIRST)
    publish(hub, "models--me--tiny", SECOND, branch="v2")
    publish(hub, "datasets--me--tiny", SECOND)
    assert hash_files("me/tiny") == f"me/tiny@{FIRST}"
    assert hash_files("me/tiny", "v2") == hash_files("me/tiny", SECOND) == f"me/tiny@{SECOND}"
    assert hash_files("me/tiny", kind="dataset") == f"me/tiny@{SECOND}"


def test_the_hub_is_asked_before_the_cache(hub, monkeypatch):
    publish(hub, "models--me--tiny", FIRST)
    monkeypatch.setattr(HfApi, "repo_info", lambda *args, **kwargs: SimpleNamespace(sha=SECOND))
    assert hash_files("me/tiny") == f"me/tiny@{SECOND}"


def test_a_run_refuses_another_commit_and_goes_on_at_the_one_that_it_names(config, hub):
    config = replace(config, model=replace(config.model, policy="me/tiny"), prompts=PromptsConfig("me/prompts"))
    publish(hub, "models--me--tiny", FIRST)
    publish(hub, "datasets--me--prompts", FIRST)
    run = RunDirectory.open(config, command="ppo", inputs=input_hashes(config))
    assert run.path.joinpath("environment.json").read_text().count(FIRST) == 2
    run.append_metrics({"cycle": 1})
    run.__exit__(Interrupted, Interrupted(), None)
    publish(hub, "models--me--tiny", SECOND)
    with pytest.raises(RunError, match=rf"model\.policy .*was me/tiny@{FIRST}, is .*Set model\.revision to {FIRST}"):
        RunDirectory.open(config, command="ppo", inputs=input_hashes(config))
    pinned = replace(config, model=replace(config.model, revision=FIRST))
    with RunDirectory.open(pinned, command="ppo", inputs=input_hashes(pinned)) as run:
        assert run.resumed
    publish(hub, "datasets--me--prompts", SECOND)
    with pytest.raises(RunError, match=rf"prompts\.path .*was me/prompts@{FIRST}, is me/prompts@{SECOND}"):
        RunDirectory.open(pinned, command="ppo", inputs=input_hashes(pinned))


def test_the_code_that_comes_with_a_model_is_part_of_its_hash(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}')
    (tmp_path / "m" / "modeling_x.py").write_text("class X: ...\n")
    before = hash_files(str(tmp_path / "m"))
    (tmp_path / "m" / "modeling_x.py").write_text("class X: gain = 2\n")
    assert hash_files(str(tmp_path / "m")) != before


def test_reading_runs_loads_no_torch():
    script = "import sys, tether.runs; assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
