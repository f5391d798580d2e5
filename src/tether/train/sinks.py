"""Where metrics go besides metrics.jsonl: each a `LogSink`, with `close` for the end of the run."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any

from tether.config import WandbConfig
from tether.errors import ConfigError
from tether.runs import Run, RunDirectory


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
