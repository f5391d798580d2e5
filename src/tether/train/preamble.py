"""What stands around every trainer: signals, determinism, the run directory, its heartbeat, memory that runs out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from tether.config import TrainingConfig
from tether.config.keys import Section, leaves
from tether.config.kinds import KINDS
from tether.distributed.ranks import Ranks, join
from tether.distributed.world import refuse
from tether.errors import ConfigError, Interrupted, RunError, TetherError
from tether.runs import RunDirectory
from tether.train.log import say
from tether.train.memory import explaining_out_of_memory
from tether.train.signals import Signals, StopRequested

_BEAT_S = 5.0
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def check_parts(reward: object, sampler: object, sinks: Sequence[object]) -> None:
    """Raise ConfigError where something that was passed from Python lacks a method that will be called."""
    wanted = [(f"sinks[{i}]", sink, "write") for i, sink in enumerate(sinks)]
    if sampler is not None:
        wanted.append(("sampler", sampler, "generate load_weights"))
    if reward is not None and not callable(reward):
        wanted.append(("reward", reward, "check score"))
    for name, part, methods in wanted:
        for method in methods.split():
            if not callable(getattr(part, method, None)):
                raise ConfigError(
                    f"{name} is {type(part).__name__}, which has no method `{method}`: the run could not use it. "
                    "tether.types lists the methods."
                )


@contextmanager
def open_run(
    config: TrainingConfig, *, command: str, fresh: bool, inputs: dict[str, str]
) -> Iterator[tuple[RunDirectory, Signals, Ranks]]:
    """Create or continue the run in `config.run`, together with the other processes of the run where there are any. A
    run that is finished says so: the caller then has nothing to do.

    inputs: hashes of what the run reads, by config key. fresh: move a run that is there aside first.
    """
    if not KINDS[command].many:
        refuse(f"tether {command}")
    with (
        Signals() as signals,
        deterministic(config.deterministic),
        join(config.device, timeout_s=config.distributed.timeout_s) as ranks,
        _opened(config, command, fresh, inputs, ranks) as run,
        explaining_out_of_memory(run),
    ):
        signals.ranks = ranks
        if run.finished:
            say(f"{run.path} is finished: nothing to do. --fresh moves it aside and starts over.")
            yield run, signals, ranks
            return
        with _beating(run):
            try:
                yield run, signals, ranks
            except StopRequested:
                raise Interrupted("stopped before it went on; the same command continues") from None


@contextmanager
def _opened(
    config: TrainingConfig, command: str, fresh: bool, inputs: dict[str, str], ranks: Ranks
) -> Iterator[RunDirectory]:
    """The run directory: rank 0 opens it, the others follow."""
    ranks.check_same({key: value for key, value, _ in leaves(config) if not isinstance(value, Section)} | inputs)
    with ranks.first(lambda: RunDirectory.open(config, command=command, fresh=fresh, inputs=inputs)) as run:
        if ranks.failures is None:
            yield run
            return

        def end(error: TetherError) -> None:
            if not run.follows:
                run.fail(error)
                os.write(2, f"tether: error: {error}\n".encode())

        ranks.failures.on_end = end
        with ranks.failures.shared():
            run.check_visible()
            yield run


@contextmanager
def _beating(run: RunDirectory) -> Iterator[None]:
    """Inside, status.json has a heartbeat however long a phase takes."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(_BEAT_S):
            with suppress(RunError):  # the trainer's own next write says what is wrong with the disk
                run.heartbeat()

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch takes no algorithm whose result depends on timing, if that is wanted; after, all is as before.

    To enter before the run's first matmul: cuBLAS reads how much workspace it has once, when it starts, and only with
    an amount of its own for each stream are its sums in a fixed order. A fixed amount that is set already is left.
    """
    if not wanted:
        yield
        return
    mode, workspace = torch.get_deterministic_debug_mode(), os.environ.get(_CUBLAS)
    if workspace not in (":4096:8", ":16:8"):
        os.environ[_CUBLAS] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        del os.environ[_CUBLAS]
        if workspace is not None:
            os.environ[_CUBLAS] = workspace
