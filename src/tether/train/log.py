"""Where a cycle's metrics go: metrics.jsonl, TensorBoard, Weights & Biases, and the person at the screen.

metrics.jsonl is the record; everything else is derived from it.
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tether.config import LogConfig, WandbConfig
from tether.errors import ConfigError
from tether.runs import Run, RunDirectory, to_plain
from tether.runs.durations import format_duration
from tether.types import LogSink

_COLUMNS = {  # shown on the console, by the run's unit: label, metric (of steps its last word), format
    "cycle": [
        ("score", "reward/score_mean", ".3f"),
        ("KL", "kl/ref_mean", ".3f"),
        ("entropy", "policy/entropy", ".3f"),
        ("expl. var.", "value/explained_variance", ".2f"),
        ("tokens/s", "tokens_per_s/rollout", ",.0f"),
    ],
    "step": [
        ("loss", "loss", ".4f"),
        ("accuracy", "accuracy", ".3f"),
        ("lr", "lr", ".2e"),
        ("tokens/s", "update", ",.0f"),  # tokens_per_s/update
    ],
}
_PHASE_SILENCE_S = 30.0  # without a terminal a long phase says where it is this often
_STEP_SILENCE_S = 5.0  # and steps, which may take milliseconds, write a line this often


class Logger:
    """Writes metrics everywhere, and shows progress: a bar on a terminal, else a plain line a write.

    total: cycles (or steps) of the whole run. sinks: where metrics go besides what `config` asks for.
    """

    def __init__(self, run: RunDirectory, config: LogConfig, *, total: int, sinks: Sequence[LogSink] = ()) -> None:
        self.run, self.total, self.unit = run, total, run.unit
        past = [] if run.follows else run.metrics()
        self._first = self._done = past[-1][self.unit] if past else 0
        self._own: list[TensorBoard | WeightsAndBiases] = []
        if run.follows:
            sinks = []
        elif config.tensorboard:
            self._own.append(TensorBoard(run, past, self.unit))
        if config.wandb is not None and not run.follows:
            self._own.append(WeightsAndBiases(run, config.wandb))
        self._sinks: list[LogSink] = [*self._own, *sinks]
        self._screen: _Bar | _Lines = (
            _Bar(total, self.unit, self._first) if sys.stdout.isatty() else _Lines(total, self.unit)
        )
        self._began = time.monotonic()
        run.phase = "training"

    def __enter__(self) -> Logger:
        for text in self.run.notes:
            self.note(text)
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.close()
        for sink in self._own:
            sink.close()
        _forget_readers_that_left()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """A cycle's (or step's) metrics, everywhere."""
        line = to_plain({self.unit: step, **metrics})
        self.run.append_metrics(line)
        for sink in self._sinks:
            sink.write(step, line)
        self._done = step
        self._screen.write(step, f"{self.unit} {step}/{self.total}", self._summary(step, line))

    @contextmanager
    def writing(self, step: int, metrics: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Write `metrics` after the block, which may add to them; also where it fails: the step itself is done."""
        try:
            yield metrics
        finally:
            self.write(step, metrics)

    def rewrite(self, step: int, metrics: dict[str, Any]) -> None:
        """The last step's metrics once more, now that there are more of them."""
        line = to_plain(metrics)
        self.run.replace_last_metrics(line)
        for sink in self._sinks:
            sink.write(step, line)

    def note(self, text: str) -> None:
        """A line for the person, in no file."""
        self._screen.note(text)

    def fallback(self, text: str) -> None:
        """Something that the run does in another way than asked for: an event, and a line for the person."""
        self.run.event("fallback", what=text)
        self.note(text)

    def alarms(self, step: int, found: Sequence[tuple[str, str]]) -> None:
        """What should not be: an event each, and a line for the person. found: (rule of tether.diagnose, text)."""
        for rule, text in found:
            self.run.event("alarm", **{self.unit: step}, rule=rule, what=text)
            self.note(f"{self.unit} {step}: {text}")

    def phase(self, text: str) -> None:
        """What the next cycle is doing now."""
        self.run.phase = text
        self.run.heartbeat()
        self._screen.phase(f"{self.unit} {min(self._done + 1, self.total)}/{self.total}: {text}")

    def _summary(self, step: int, metrics: dict[str, Any]) -> str:
        named = metrics if self.unit == "cycle" else {key.rpartition("/")[2]: value for key, value in metrics.items()}
        shown = [(label, named.get(name), form) for label, name, form in _COLUMNS[self.unit]]
        parts = [f"{label} {value:{form}}" for label, value, form in shown if value is not None]
        if step < self.total and step > self._first:
            seconds = (time.monotonic() - self._began) / (step - self._first) * (self.total - step)
            parts.append(f"left {format_duration(seconds)}")
        return "  ".join(parts)


# ---------------------------------------------------------------- sinks, each with `close` for the end of the run


class TensorBoard:
    """Event files in the run directory, written again from `past` when a run continues: none is left of a cycle that
    was cut back."""

    def __init__(self, run: RunDirectory, past: list[dict[str, Any]], unit: str):
        from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is wanted

        folder = run.path / "tensorboard"
        shutil.rmtree(folder, ignore_errors=True)
        self._writer = SummaryWriter(str(folder))
        for metrics in past:
            self.write(metrics[unit], metrics)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, the same one after a resume."""

    def __init__(self, run: RunDirectory, config: WandbConfig):
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "log.wandb is set, but the package wandb is not installed: no metrics would arrive there. Install it "
                "with `pip install tether[wandb]`, or set log.wandb to null."
            ) from error
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=run.path.name,
            id=Run(run.path).environment["id"],  # the same after a resume, another after --fresh
            resume="allow",
            dir=str(run.path),
            config=asdict(run.config),
        )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


# ---------------------------------------------------------------- screens


def say(text: str) -> None:
    """Print a line. Who reads our output may have left (`head`, or `tee` at the same Ctrl-C): the run goes on."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _forget_readers_that_left()


def _forget_readers_that_left() -> None:
    """Point a standard stream that nobody reads any more at nothing: what is written there later is no error."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)  # errors and hang-ups alone, which are always told
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            os.dup2(nobody, descriptor)
    os.close(nobody)


class _Lines:
    """Without a terminal: a plain line for every cycle, and for steps every few seconds."""

    def __init__(self, total: int, unit: str):
        self.total, self.unit = total, unit
        self._last = time.monotonic()

    def write(self, step: int, head: str, summary: str) -> None:
        if self.unit == "cycle" or step == self.total or time.monotonic() - self._last > _STEP_SILENCE_S:
            self.note(f"{head}  {summary}")

    def note(self, text: str) -> None:
        say(text)
        self._last = time.monotonic()

    def phase(self, text: str) -> None:
        if time.monotonic() - self._last > _PHASE_SILENCE_S:
            self.note(f"  {text}")

    def close(self) -> None:
        pass


class _Bar:
    """On a terminal: a bar, the latest metrics, and the phase that is under way."""

    def __init__(self, total: int, unit: str, first: int):
        self._progress = Progress(
            TextColumn("{task.fields[unit]} {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[summary]}", markup=False),
            TextColumn("{task.fields[phase]}", markup=False, style="dim"),
            console=Console(highlight=False),
        )
        self._task: TaskID = self._progress.add_task("", total=total, completed=first, unit=unit, summary="", phase="")
        self._progress.start()

    def write(self, step: int, head: str, summary: str) -> None:
        self._progress.update(self._task, completed=step, summary=summary, phase="")

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def phase(self, text: str) -> None:
        self._progress.update(self._task, phase=text)

    def close(self) -> None:
        self._progress.update(self._task, phase="")
        self._progress.stop()
