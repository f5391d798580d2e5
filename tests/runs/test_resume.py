"""Which command continues a run: one table of what may change, one of what may not."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tether.config import (
    CheckpointConfig,
    DataConfig,
    HeldOutConfig,
    ILQLSection,
    LogConfig,
    MissingEosConfig,
    ModelConfig,
    PoolConfig,
    PPOConfig,
    QLearningConfig,
    QLearningSection,
    RewardShapingConfig,
    RewardSourceConfig,
    ScoredConfig,
    SFTConfig,
    SFTModelConfig,
    VLLMConfig,
    WandbConfig,
)
from tether.errors import Interrupted, RewardError, RunError
from tether.models.export import export
from tether.runs import Run, RunDirectory
from tether.runs.files import replacing_directory, write_sums
from tether.train import checkpoint


def begin(config, **options) -> None:
    """A run that was stopped after its first cycle."""
    run = RunDirectory.open(config, command="ppo", **options)
    run.append_metrics({"cycle": 1})
    run.__exit__(Interrupted, Interrupted("by SIGTERM"), None)


def write_final(run: RunDirectory, content: str) -> None:
    with replacing_directory(run.path / "final") as folder:
        (folder / "config.json").write_text(content)
        (folder / "model.safetensors").write_bytes(b"weights")
        write_sums(folder)


def change(config: PPOConfig, section: str, **values) -> PPOConfig:
    return replace(config, **{section: replace(getattr(config, section), **values)})


MAY_CHANGE = {
    "log.rollouts_every": (lambda c: replace(c, log=LogConfig(rollouts_every=5)), True),
    "log.wandb.project": (lambda c: replace(c, log=LogConfig(wandb=WandbConfig(project="p"))), True),
    "checkpoint.every": (lambda c: replace(c, checkpoint=CheckpointConfig(every=7)), True),
    "evaluate.samples": (lambda c: replace(c, evaluate=HeldOutConfig(samples=2)), True),
    "evaluate.every": (lambda c: replace(c, evaluate=HeldOutConfig(every=5)), True),
    "reward[0].timeout_s": (lambda c: replace(c, reward=[replace(c.reward[0], timeout_s=9.0)]), True),
    "reward[0].optional": (lambda c: replace(c, reward=[replace(c.reward[0], optional=True)]), True),
    "reward[0].dtype": (lambda c: replace(c, reward=[replace(c.reward[0], dtype="float32")]), False),
    "ppo.microbatch_tokens": (lambda c: change(c, "ppo", microbatch_tokens=64), False),
    "model.gradient_checkpointing": (lambda c: change(c, "model", gradient_checkpointing=True), False),
}


def test_the_strength_of_implicit_q_learning_may_change_as_no_loss_reads_it(tmp_path):
    config = QLearningConfig(
        str(tmp_path / "run"), ModelConfig("m"), ScoredConfig("d.jsonl"), qlearning=QLearningSection(loss="ilql")
    )
    run = RunDirectory.open(config, command="qlearning")
    run.append_metrics({"step": 1})
    run.__exit__(Interrupted, Interrupted("by SIGTERM"), None)
    with RunDirectory.open(change(config, "qlearning", ilql=ILQLSection(strength=5.0, top_k=3)), command="qlearning"):
        pass
    changed = [event["key"] for event in Run.open(config.run).events if event["event"] == "config_changed"]
    assert sorted(changed) == ["qlearning.ilql.strength", "qlearning.ilql.top_k"]


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_what_cannot_change_the_curves_may_change_and_an_event_says_so(config, key):
    changed, bit_equal = MAY_CHANGE[key]
    begin(config)
    with RunDirectory.open(changed(config), command="ppo") as run:
        assert run.resumed
    got = Run.open(config.run)
    assert got.config == changed(config)
    events = {event["key"]: event for event in got.events if event["event"] == "config_changed"}
    assert events[key]["bit_equal"] is bit_equal
    assert events[key]["old"] != events[key]["new"]
    assert {k.split(".")[0] for k in events} == {key.split(".")[0]}


@pytest.mark.parametrize(
    ("engine", "elsewhere", "key"),
    [("vllm", VLLMConfig("elsewhere/python"), "vllm.python"), ("pool", PoolConfig(workers=8), "pool.workers")],
)
def test_an_engine_may_move_to_another_place_but_no_other_engine_go_on(config, engine, elsewhere, key):
    begin(change(config, "sampling", engine=engine))
    with RunDirectory.open(change(config, "sampling", engine=engine, **{engine: elsewhere}), command="ppo"):
        pass
    (event,) = [event for event in Run.open(config.run).events if event["event"] == "config_changed"]
    assert (event["key"], event["bit_equal"]) == (f"sampling.{key}", False)
    with pytest.raises(RunError, match=r"sampling\.engine was"):
        RunDirectory.open(config, command="ppo")


MUST_NOT_CHANGE = {
    "seed was 0": lambda c: replace(c, seed=1),
    'device was "auto"': lambda c: replace(c, device="cuda"),
    'model.policy was "models/some"': lambda c: change(c, "model", policy="models/other"),
    "ppo.kl.coef was 0.05": lambda c: change(c, "ppo", kl=replace(c.ppo.kl, coef=0.1)),
    "ppo.batch was 64": lambda c: change(c, "ppo", batch=128),
    "ppo.critic_lam was null": lambda c: change(c, "ppo", critic_lam=1.0),
    "optim.betas[1] was 0.95": lambda c: change(c, "optim", betas=(0.9, 0.99)),
    "reward[0].weight was 1.0": lambda c: replace(c, reward=[replace(c.reward[0], weight=2.0)]),
    "reward[1].function was (absent)": lambda c: replace(c, reward=[*c.reward, RewardSourceConfig(function="b.py:g")]),
    "reward_shaping.missing_eos was null": lambda c: replace(
        c, reward_shaping=RewardShapingConfig(missing_eos=MissingEosConfig(set=-1.0))
    ),
    "evaluate.count was 16": lambda c: replace(c, evaluate=HeldOutConfig(count=8)),
    "evaluate.prompts was null": lambda c: replace(c, evaluate=HeldOutConfig(prompts="others.jsonl")),
    "evaluate.every was 10": lambda c: replace(c, evaluate=HeldOutConfig(every=0)),
    "ppo.cycles was 200": lambda c: change(c, "ppo", cycles=100),
}


@pytest.mark.parametrize("message", MUST_NOT_CHANGE)
def test_anything_else_is_refused_naming_the_key_and_both_values(config, message):
    begin(config)
    before = {file.name: file.read_bytes() for file in Run.open(config.run).path.iterdir() if file.name != "lock"}
    with pytest.raises(RunError) as refused:
        RunDirectory.open(MUST_NOT_CHANGE[message](config), command="ppo")
    assert message in str(refused.value)
    assert " now: " in str(refused.value)
    assert "--fresh moves" in str(refused.value) or "--fresh to move the old run aside" in str(refused.value)
    assert refused.value.exit_code == 2
    assert before == {
        file.name: file.read_bytes() for file in Run.open(config.run).path.iterdir() if file.name != "lock"
    }
    with RunDirectory.open(config, command="ppo"):
        pass  # the refusal has let go of the lock


def test_a_run_that_failed_before_its_first_cycle_may_be_begun_anew_with_another_config(config):
    run = RunDirectory.open(config, command="ppo", inputs={"prompts.path": "sha256:aa"})
    run.write_evaluation(0, {"cycle": [0]})
    checkpoint.save(run.path, "cycle-000000", {}, lambda folder: None)
    run.__exit__(RewardError, RewardError("reward function helpful raised KeyError"), None)
    fixed = change(config, "prompts", path="fixed.jsonl")
    with RunDirectory.open(fixed, command="ppo", inputs={"prompts.path": "sha256:cc"}) as run:
        assert not run.resumed
    got = Run.open(config.run)
    assert got.config == fixed
    assert got.environment["inputs"] == {"prompts.path": "sha256:cc"}
    assert got.evaluation_cycles == []
    assert checkpoint.names(run.path) == []


def test_cycles_may_grow_under_a_constant_schedule_alone(config):
    constant = change(config, "optim", schedule="constant")
    begin(constant)
    with RunDirectory.open(change(constant, "ppo", cycles=300), command="ppo") as run:
        assert run.resumed
    assert Run.open(config.run).config.ppo.cycles == 300
    with pytest.raises(RunError, match=r"ppo\.cycles was 300 .* is 299 now: its curves"):
        RunDirectory.open(change(constant, "ppo", cycles=299), command="ppo")

    with RunDirectory.open(config, command="ppo", fresh=True):
        pass
    with pytest.raises(RunError, match=r"ppo\.cycles was 200 .* is 300 now: .* optim\.schedule: constant alone"):
        RunDirectory.open(change(config, "ppo", cycles=300), command="ppo")


def test_a_finished_run_stays_finished_until_its_cycles_grow(config):
    config = change(config, "optim", schedule="constant")
    with RunDirectory.open(config, command="ppo") as run:
        assert not run.finished
        write_final(run, "of cycle 200")
    status = (run.path / "status.json").read_bytes()
    with RunDirectory.open(config, command="ppo") as run:
        assert run.finished
    assert (run.path / "status.json").read_bytes() == status
    with RunDirectory.open(change(config, "ppo", cycles=201), command="ppo") as run:
        assert not run.finished
        assert run.resumed


def test_a_run_that_grows_moves_its_old_model_aside_so_that_it_never_passes_for_the_longer_runs(config):
    config = change(config, "optim", schedule="constant")
    with RunDirectory.open(config, command="ppo") as run:
        write_final(run, "of cycle 200")
    run = RunDirectory.open(change(config, "ppo", cycles=201), command="ppo")
    run.__exit__(Interrupted, Interrupted("by SIGTERM"), None)
    assert not Run.open(run.path).final.exists()
    assert (run.path / "final.old-1" / "config.json").read_text() == "of cycle 200"
    assert any((e["event"], e.get("to")) == ("final_moved", "final.old-1") for e in Run.open(run.path).events)
    with RunDirectory.open(change(config, "ppo", cycles=201), command="ppo") as run:
        assert not run.finished
        write_final(run, "of cycle 201")
    with RunDirectory.open(change(config, "ppo", cycles=201), command="ppo") as run:
        assert run.finished


def test_a_finished_run_without_its_model_is_continued_from_a_checkpoint_or_refused_without_one(config):
    with RunDirectory.open(config, command="ppo") as run:
        checkpoint.save(run.path, "cycle-000200", {}, lambda folder: None)
    with RunDirectory.open(config, command="ppo") as run:
        assert not run.finished
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(RunError, match=r"final is damaged .it does not exist. and every checkpoint is gone"):
        RunDirectory.open(config, command="ppo")


DAMAGED = {
    "everything is gone": (lambda final: [file.unlink() for file in final.iterdir()], "SHA256SUMS is missing"),
    "a file is missing": (lambda final: (final / "config.json").unlink(), "config.json is missing"),
    "a file is short": (lambda final: os.truncate(final / "model.safetensors", 3), "of model.safetensors does not"),
    "a byte is another": (lambda final: (final / "model.safetensors").write_bytes(b"weighty"), "does not match"),
    "the checksums are empty": (lambda final: os.truncate(final / "SHA256SUMS", 0), "SHA256SUMS is empty"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_finished_run_whose_final_is_damaged_is_never_said_to_be_done(config, what):
    damage, said = DAMAGED[what]
    with RunDirectory.open(config, command="ppo") as run:
        checkpoint.save(run.path, "cycle-000200", {}, lambda folder: None)
        write_final(run, "of cycle 200")
    damage(run.path / "final")
    with pytest.raises(RunError, match=rf"{said}.*Run the same command again"):
        export(run.path, run.path.with_name("copy"))
    run = RunDirectory.open(config, command="ppo")
    assert not run.finished
    assert len(run.notes) == 1
    assert said in run.notes[0]
    assert "from the last checkpoint" in run.notes[0]
    write_final(run, "of cycle 200")
    run.__exit__(None, None, None)
    with RunDirectory.open(config, command="ppo") as run:
        assert run.finished

    damage(run.path / "final")
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(RunError, match=rf"{said}.*every checkpoint is gone.*Restore one of them"):
        RunDirectory.open(config, command="ppo")


def test_the_card_of_a_final_model_may_be_edited(config):
    with RunDirectory.open(config, command="ppo") as run:
        write_final(run, "of cycle 200")
    (run.path / "final" / "README.md").write_text("what I found with it")
    with RunDirectory.open(config, command="ppo") as run:
        assert run.finished


def test_changed_data_is_refused(config):
    begin(config, inputs={"prompts.path": "sha256:aa", "model.policy": "sha256:bb"})
    with pytest.raises(RunError, match=r"prompts\.path has other content .*was sha256:aa, is sha256:cc"):
        RunDirectory.open(config, command="ppo", inputs={"prompts.path": "sha256:cc", "model.policy": "sha256:bb"})


def test_other_prompts_to_evaluate_on_are_refused_because_some_may_have_been_trained_on(config):
    begin(config, inputs={"evaluate.prompts": "sha256:aa"})
    with pytest.raises(RunError, match=r"evaluate\.prompts has other content"):
        RunDirectory.open(config, command="ppo", inputs={"evaluate.prompts": "sha256:cc"})


def test_evaluation_cannot_be_turned_on_later_over_prompts_that_were_trained_on(config):
    off = replace(config, evaluate=HeldOutConfig(every=0))
    begin(off)
    with pytest.raises(RunError, match=r"evaluate\.every was 0 .* some of them have been trained on"):
        RunDirectory.open(config, command="ppo")


def test_a_reward_function_may_change_and_each_change_is_an_event_and_a_note(config):
    begin(config, inputs={"reward[0].function": "sha256:aa"})
    for now, noted in (("aa", 0), ("bb", 1), ("bb", 0), ("aa", 1), ("aa", 0)):
        with RunDirectory.open(config, command="ppo", inputs={"reward[0].function": f"sha256:{now}"}) as run:
            assert len(run.notes) == noted
            assert all("rewards.py:helpful has other code" in note for note in run.notes)
            run.finished = True  # leave the status: the next one continues
    events = [e for e in Run.open(config.run).events if e["event"] == "reward_changed"]
    assert [(e["function"], e["old"], e["new"], e["bit_equal"]) for e in events] == [
        ("rewards.py:helpful", "sha256:aa", "sha256:bb", False),
        ("rewards.py:helpful", "sha256:bb", "sha256:aa", False),
    ]


def test_another_command_is_refused(config):
    begin(config)
    sft = SFTConfig(run=config.run, model=SFTModelConfig(policy="m"), data=DataConfig(path="d"))
    with pytest.raises(RunError, match="holds a run of `tether ppo`, but this is `tether sft`"):
        RunDirectory.open(sft, command="sft")


def test_a_run_of_another_schema_is_refused(config):
    begin(config)
    status = Run.open(config.run).path / "status.json"
    status.write_text(status.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(RunError, match="has schema 2, but this version of tether writes schema 1"):
        RunDirectory.open(config, command="ppo")


def test_a_moved_run_continues_where_it_is(config, tmp_path):
    begin(config)
    Run.open(config.run).path.rename(tmp_path / "moved")
    with RunDirectory.open(replace(config, run=str(tmp_path / "moved")), command="ppo") as run:
        assert run.resumed


def test_a_key_that_an_older_version_did_not_write_has_its_default(config):
    begin(config)
    file = Run.open(config.run).path / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "whiten" not in line))
    with RunDirectory.open(config, command="ppo") as run:
        assert run.resumed


def test_a_status_that_cannot_be_read_says_so(config):
    begin(config)
    (Run.open(config.run).path / "status.json").write_text('{"schema": 1,')
    with pytest.raises(RunError, match=r"status\.json cannot be read"):
        RunDirectory.open(config, command="ppo")


@pytest.mark.parametrize("file", ["status.json", "environment.json"])
@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"schema": 1, "kind": [], "state": 1, "inputs": []}'])
def test_json_that_is_not_what_the_run_wrote_is_named_with_the_remedy(config, file, content):
    begin(config)
    run = Run.open(config.run)
    (run.path / file).write_text(content)
    problem = rf"{file} cannot be read \(it.*Restore the file, or add --fresh"
    with pytest.raises(RunError, match=problem):
        RunDirectory.open(config, command="ppo")
    with pytest.raises(RunError, match=problem):
        _ = run.status, run.environment


def test_a_line_of_metrics_that_is_no_object_is_named(config):
    begin(config)
    with (Run.open(config.run).path / "metrics.jsonl").open("a") as lines:
        lines.write("[]\n")
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is not a JSON object"):
        RunDirectory.open(config, command="ppo")


def test_another_thread_count_voids_bit_equality_and_an_event_says_so(config):
    begin(config)
    file = Run.open(config.run).path / "environment.json"
    file.write_text(file.read_text().replace('"torch_threads": ', '"torch_threads": 9'))
    with RunDirectory.open(config, command="ppo"):
        pass
    event = next(e for e in Run.open(config.run).events if e["event"] == "environment_changed")
    assert event["key"] == "hardware.torch_threads"
    assert event["bit_equal"] is False


def test_a_run_whose_config_this_version_does_not_read_names_the_file_and_fresh(config):
    begin(config)
    file = Path(config.run) / "config.yaml"
    file.write_text(file.read_text().replace("  clip: 0.2\n", "  clip: [0.2, 0.28]\n"))
    for use in (lambda: RunDirectory.open(config, command="ppo"), lambda: Run.open(config.run).config):
        with pytest.raises(RunError) as told:
            use()
        assert str(file) in str(told.value)
        assert "ppo.clip_high: 0.28" in str(told.value)
        assert "--fresh" in str(told.value)
