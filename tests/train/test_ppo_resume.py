"""Exact resume: killed or stopped at any moment and started again, a run ends with the bits of one that was not.

The runs that die are forks of this process, and die of real signals.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tether
from tether.config import KLConfig, LoraConfig, PPOConfig, RewardSourceConfig
from tether.config.reading import to_yaml
from tether.runs import Run
from tether.runs.files import damage
from tether.samplers.local import LocalSampler
from tether.train import checkpoint
from tether.train import ppo as ppo_module
from tiny_ppo import id_score, tiny_config

STOPPED = 3
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "separate critic": {"model": {"critic": "separate"}, "ppo": {"value_warmup_cycles": 1}},
    "KL held": {"optim": {"lr": 1e-2}, "ppo": {"kl": KLConfig(coef=0.01, target=0.5)}},
    "adapters, KL held": {
        "model": {"lora": LoraConfig(rank=2)},
        "optim": {"lr": 1e-2},
        "ppo": {"kl": KLConfig(coef=0.01, target=0.5)},
    },
    "KL by Ziegler's formula": {"ppo": {"kl": KLConfig(coef=0.2, target=0.05, horizon=40)}},
    "group baseline": {"ppo": {"advantage": "group", "surrogate": "cispo"}},
    "sampled ahead": {"optim": {"lr": 1e-2}, "ppo": {"ahead": 1}},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory) -> Callable[[str], Run]:
    """whole(variant): the run that nothing happened to."""
    runs: dict[str, Run] = {}

    def of(variant: str) -> Run:
        if variant not in runs:
            runs[variant] = tether.ppo(
                config_of(variant, tmp_path_factory.mktemp("whole") / "run", model), reward=id_score
            )
        return runs[variant]

    return of


def config_of(variant: str, run: Path, model: Path) -> PPOConfig:
    sections = {name: dict(section) for name, section in VARIANTS[variant].items()}
    sections["model"] = {"policy": str(model), **sections.get("model", {})}
    return tiny_config(run, model, **sections)


# ---------------------------------------------------------------- moments to die at


@contextmanager
def at_call(owner: Any, name: str, number: int, what: Callable[[], None], *, after: bool = False) -> Iterator[None]:
    """Inside, the `number`-th call of owner.name (from 1) does `what` before, or after, what it does."""
    original, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            what()
        result = original(*args, **kwargs)
        if calls == number and after:
            what()
        return result

    setattr(owner, name, counted)
    yield
    setattr(owner, name, original)


def signal_myself(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def in_a_fork(config: PPOConfig, moment) -> int:
    """Run in a child in which `moment` is in force: its exit code, or minus the signal it died of."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with moment:
                tether.ppo(config, reward=id_score)
            code = 0
        except tether.Interrupted as error:
            code = error.exit_code
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


KILL = signal_myself(signal.SIGKILL)
INT = signal_myself(signal.SIGINT)


def in_generation(number: int, what=KILL):
    """After the sampling for: evaluation, cycle 1, cycle 2, evaluation, cycle 3, cycle 4, evaluation."""
    return at_call(LocalSampler, "generate", number, what, after=True)


def in_update(step: int, what=KILL):
    return at_call(torch.optim.AdamW, "step", step, what, after=True)  # four steps a cycle


def in_checkpoint(number: int, what=KILL):
    """When every file is written and nothing is renamed."""
    return at_call(checkpoint, "sync", number, what)


def after_renaming(number: int, what=KILL):
    """When the new checkpoint stands and the older ones are not yet removed."""
    return at_call(checkpoint, "_drop_all_but", number, what)


# ---------------------------------------------------------------- the same in the end


def assert_same(run: Run, want: Run) -> None:
    """Bit-equal in everything that does not measure time or memory."""

    def comparable(run: Run) -> list[dict[str, Any]]:
        measured = ("time/", "tokens_per_s/", "memory/")
        return [{k: v for k, v in m.items() if not k.startswith(measured)} for m in run.metrics]

    assert comparable(run) == comparable(want)
    for name in ("model.safetensors", "critic/value_head.safetensors", "critic/model.safetensors"):
        if (want.final / name).exists():
            a, b = load_file(run.final / name), load_file(want.final / name)
            assert all(torch.equal(a[key], b[key]) for key in b), name
    for folder in ("rollouts", "evaluations"):
        files = sorted(p.name for p in (want.path / folder).iterdir())
        assert sorted(p.name for p in (run.path / folder).iterdir()) == files
        for name in files:
            assert (run.path / folder / name).read_bytes() == (want.path / folder / name).read_bytes()


MOMENTS = {
    "in the first rollout": lambda: in_generation(2),
    "in an evaluation": lambda: in_generation(4),
    "in a later rollout": lambda: in_generation(5),
    "in an update": lambda: in_update(10),  # cycle 3, after its second step
    "inside a checkpoint": lambda: in_checkpoint(1),
    "inside the last checkpoint": lambda: in_checkpoint(2),
    "just after a checkpoint": lambda: after_renaming(2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_a_run_ends_as_if_nothing_had_happened(model, whole, tmp_path, moment):
    config = config_of("full", tmp_path / "run", model)
    assert in_a_fork(config, MOMENTS[moment]()) == -signal.SIGKILL
    assert not Run.open(config.run).final.exists()
    assert_same(tether.ppo(config, reward=id_score), whole("full"))


def between_the_renames(number: int):
    """When the old best/ is put aside and the new one does not stand yet."""

    @contextmanager
    def moment():
        real, seen = Path.replace, 0

        def replace_path(self, target):
            nonlocal seen
            seen += self.name == ".best.partial"
            if self.name == ".best.partial" and seen == number:
                KILL()
            return real(self, target)

        Path.replace = replace_path
        yield
        Path.replace = real

    return moment()


BEST_MOMENTS = {
    "between evaluation and save": lambda: at_call(ppo_module, "keep_best", 2, KILL),
    "between its renames": lambda: between_the_renames(1),
    "between its later renames": lambda: between_the_renames(2),
    "before the metrics are logged": lambda: at_call(ppo_module, "keep_best", 2, KILL, after=True),
    "before the checkpoint": lambda: in_checkpoint(1),
}


@pytest.mark.parametrize("moment", BEST_MOMENTS)
def test_the_best_evaluated_policy_survives_a_kill_at_any_moment_bit_for_bit(model, tmp_path, moment):
    def config(name: str) -> PPOConfig:
        return tiny_config(tmp_path / name, model, evaluate={"every": 1, "count": 3, "samples": 2}, ppo={"cycles": 3})

    want = tether.ppo(config("whole"), reward=id_score)
    scores = {m["cycle"]: m["eval/score_mean"] for m in want.metrics}
    best = max(scores, key=scores.get)
    assert want.best == {"cycle": best, "score": scores[best]}
    if in_a_fork(config("run"), BEST_MOMENTS[moment]()) != -signal.SIGKILL:
        pytest.skip("no later evaluation was better: there was no such moment")
    run = tether.ppo(config("run"), reward=id_score)
    assert run.best == want.best
    assert damage(run.path / "best") is None
    for file in sorted((want.path / "best").rglob("*.safetensors")):
        assert (run.path / "best" / file.relative_to(want.path / "best")).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "full"])
def test_so_do_runs_with_a_separate_critic_adapters_an_adaptive_beta_and_bfloat16_killed_twice(
    model, whole, tmp_path, variant
):
    config = config_of(variant, tmp_path / "run", model)
    for moment in (in_update(10), in_generation(1)):  # in cycle 3; then, continued from 2, in cycle 3 again
        assert in_a_fork(config, moment) == -signal.SIGKILL
    run = tether.ppo(config, reward=id_score)
    assert_same(run, whole(variant))
    resumes = [e["cycle"] for e in run.events if e["event"] == "resumed"]
    assert resumes == [2, 2]
    assert ("KL" in variant) == (len({m["kl/coef"] for m in run.metrics}) > 2)  # else there is nothing to put back


@pytest.mark.parametrize(
    ("moment", "saved"),
    [(lambda: in_generation(3, INT), 1), (lambda: in_update(6, INT), 2)],
    ids=["in phase 1, which is dropped", "in phase 2, which is finished"],
)
def test_stopped_by_a_signal_a_run_saves_and_goes_on_the_same(model, whole, tmp_path, moment, saved):
    config = config_of("full", tmp_path / "run", model)
    assert in_a_fork(config, moment()) == STOPPED
    run = Run.open(config.run)
    assert run.status["state"] == "stopped"
    assert checkpoint.names(run.path)[-1] == f"cycle-{saved:06d}"
    assert [m["cycle"] for m in run.metrics] == list(range(1, saved + 1))
    assert_same(tether.ppo(config, reward=id_score), whole("full"))


def test_stopped_in_the_evaluation_before_cycle_1_it_stops_at_once_and_begins_the_same_again(model, whole, tmp_path):
    config = config_of("full", tmp_path / "run", model)
    assert in_a_fork(config, in_generation(1, INT)) == STOPPED
    run = Run.open(config.run)
    assert run.status["state"] == "stopped"
    assert run.evaluation_cycles == run.metrics == []
    assert_same(tether.ppo(config, reward=id_score), whole("full"))


def test_ctrl_c_that_also_ends_the_reader_of_the_output_saves_as_ever(model, tmp_path):
    (tmp_path / "ids.py").write_text("def f(completion_ids):\n    return [float(len(ids)) for ids in completion_ids]\n")
    config = tiny_config(tmp_path / "run", model, ppo={"cycles": 10_000}, evaluate={"every": 0})
    config = replace(config, reward=[RewardSourceConfig(function=f"{tmp_path}/ids.py:f")])
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    main = "import sys; from tether.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", main, "ppo", str(tmp_path / "c.yaml")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:  # 2>&1 | tee
        lines = iter(process.stdout.readline, "")
        assert any("cycle 1/10000" in line for line in lines)
        process.stdout.close()  # tee is dead
        process.send_signal(signal.SIGINT)
        assert process.wait() == STOPPED
    run = Run.open(config.run)
    assert run.status["state"] == "stopped"
    assert checkpoint.names(run.path)[-1] == f"cycle-{run.metrics[-1]['cycle']:06d}"


def test_a_damaged_checkpoint_costs_time_and_nothing_else(model, whole, tmp_path):
    config = config_of("full", tmp_path / "run", model)
    assert in_a_fork(config, after_renaming(2)) == -signal.SIGKILL
    newest = config.run + "/checkpoints/cycle-000004/optimizer.safetensors"
    data = bytearray(Path(newest).read_bytes())
    data[len(data) // 2] ^= 1
    Path(newest).write_bytes(data)
    run = tether.ppo(config, reward=id_score)
    assert_same(run, whole("full"))
    assert any("optimizer.safetensors" in e.get("what", "") for e in run.events)
