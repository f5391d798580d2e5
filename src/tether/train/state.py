"""Where a run stands: what a checkpoint holds, for every trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from tether.config import TrainingConfig
from tether.distributed.ranks import ALONE, Ranks
from tether.distributed.shard import Layout
from tether.errors import EngineError, Interrupted, RewardError
from tether.runs import RunDirectory
from tether.train import checkpoint
from tether.train.ahead import FILE as AHEAD
from tether.train.ahead import read_ahead, write_ahead
from tether.train.log import Logger, say
from tether.train.optim import ScheduledOptimizer
from tether.train.signals import Signals, StopRequested
from tether.types import Completions, LogSink, Prompt

Batch = TypeVar("Batch")


@dataclass(slots=True)
class TrainingState:
    """All that the next cycle (or step) depends on. Every draw is counted, so there is no more."""

    run: RunDirectory
    models: Mapping[str, Any]  # name in the checkpoint -> module, see `checkpoint.save_weights`
    steps: ScheduledOptimizer
    tokenizer: PreTrainedTokenizerBase
    done: int = 0  # cycles (or steps)
    kl_coef: float = 0.0  # PPO's β; 0 elsewhere
    kl_error: float = -2.0  # `tether.math.kl_error` of the last cycle
    ranks: Ranks = ALONE
    layout: Layout | None = None  # where the models' weights may be in parts
    ahead: Completions | None = None  # of PPO: the next cycle's responses, where they are sampled before it
    requests: Callable[[int], list[Prompt]] | None = None  # and the prompt of each response of a cycle

    def save(self) -> None:
        """Write a checkpoint; every rank calls."""
        assert isinstance(self.run.config, TrainingConfig)
        if self.layout is not None:
            self.layout.gather()
        moments = checkpoint.optimizer_tensors(self.steps.optimizer, self.steps.named, kept=self.ranks.rank == 0)
        if self.ranks.rank > 0:
            return

        def write(directory: Path) -> None:
            for name, model in self.models.items():
                checkpoint.save_weights(model, directory / name)
            self.tokenizer.save_pretrained(directory / "policy")
            save_file(moments, directory / "optimizer.safetensors")
            if self.ahead is not None:
                write_ahead(directory / AHEAD, self.ahead)

        numbers = {self.run.unit: self.done, "kl_coef": self.kl_coef, "kl_error": self.kl_error,
                   "skipped": self.steps.skipped}  # fmt: skip
        name, keep = f"{self.run.unit}-{self.done:06d}", self.run.config.checkpoint.keep
        checkpoint.save(self.run.path, name, numbers, write, keep=keep)

    def run_steps(
        self,
        plan: Sequence[Batch],
        accumulate: Callable[[Batch], Mapping[str, float | None]],
        signals: Signals,
        sinks: Sequence[LogSink],
        notes: Sequence[str] = (),
        after_step: Callable[[int], None] = lambda step: None,
        first: int = 0,
        total: int | None = None,
    ) -> None:
        """The loop of a trainer whose unit is the optimizer step: go on where the run stopped, to the end of `plan`.

        first, total: where the run trains several models one after the other, the steps before this one's, and of all.
        accumulate: adds up the gradients of a step's batch, and returns the step's metrics so far.
        after_step: gets the number of steps that are done, after each and before it is saved.
        """
        assert isinstance(self.run.config, TrainingConfig)
        self.restore(first, first + len(plan))
        with (
            Logger(self.run, self.run.config.log, total=total or len(plan), sinks=sinks) as log,
            self.saved_when_stopped(),
        ):
            for note in notes:
                log.fallback(note)
            while self.done < first + len(plan):
                signals.stop_if_requested()
                began = time.perf_counter()
                metrics = dict(accumulate(plan[self.done - first]))
                metrics |= self.steps.step(self.done - first)
                seconds = metrics["time/update_s"] = time.perf_counter() - began
                if tokens := metrics.get("tokens/trained"):
                    metrics["tokens_per_s/update"] = tokens / seconds
                self.done += 1
                after_step(self.done)
                log.write(self.done, metrics)
                if self.steps.skipped:
                    log.alarms(self.done, [("skipped-steps", "optimizer step skipped: its gradient is not finite")])
                self.steps.stop_if_broken()
                self.save_if_due(first + len(plan))

    def save_if_due(self, total: int) -> None:
        """Write a checkpoint where the config asks for one, and after the last of `total` cycles (or steps)."""
        assert isinstance(self.run.config, TrainingConfig)
        if self.done % self.run.config.checkpoint.every == 0 or self.done == total:
            self.save()

    def restore(self, first: int = 0, last: float = math.inf) -> None:
        """Put back the newest intact checkpoint, and cut the run's files back to it; without one stay at the start.

        first, last: of a model that is trained between these steps; a checkpoint outside is another model's.
        """

        def passed_over(text: str) -> None:
            self.run.event("checkpoint_damaged", what=text)
            say(text)

        self.done = first
        found = self.ranks.first(lambda: checkpoint.latest(self.run.path, passed_over))
        if found and (not first or first < found[1][self.run.unit]) and found[1][self.run.unit] <= last:
            directory, numbers = found
            for name, model in self.models.items():
                checkpoint.restore_weights(model, directory / name)
            if self.layout is not None:
                self.layout.scatter()
            checkpoint.load_optimizer(self.steps.optimizer, self.steps.named, directory / "optimizer.safetensors")
            self.done, self.steps.skipped = numbers[self.run.unit], numbers["skipped"]
            self.kl_coef, self.kl_error = numbers["kl_coef"], numbers["kl_error"]
            if self.requests is not None and (directory / AHEAD).exists():
                self.ahead = read_ahead(directory / AHEAD, self.requests(self.done + 1))
        self.run.truncate_after(self.done)

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Around a trainer's loop: a signal, or a reward or an engine that failed, stops it with everything saved that
        is done. An engine fails on one rank alone, and ranks save together: of several none saves then."""
        try:
            yield
        except (RewardError, EngineError, StopRequested) as stop:
            unit = self.run.unit
            if isinstance(stop, EngineError) and self.ranks.size > 1:
                raise
            if self.done:  # else there is nothing to keep: the same command starts over
                self.save()
            if not isinstance(stop, StopRequested):
                raise
            if self.done:
                text = f"stopped after {unit} {self.done}, saved; the same command continues"
            elif checkpoint.names(self.run.path):  # stopped before they were put back
                text = "stopped before it went on; the same command continues"
            else:
                text = f"stopped before {unit} 1; the same command starts over"
            raise Interrupted(text) from None
