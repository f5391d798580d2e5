"""Copies of a policy while a peer trains it, and the seconds of training that each had had."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback


class Copies(TrainerCallback):
    """Every `every` steps a copy; the clock runs from the first step and stands still while a copy is written."""

    def __init__(self, every: int, to: str) -> None:
        self.every, self.to, self.copies, self.saving = every, Path(to), [], 0.0

    def on_train_begin(self, *_, **__):
        self.began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every:
            return
        now = time.time()
        seconds = now - self.began - self.saving
        path = self.to / f"copy-{state.global_step:04d}"
        model = kwargs["model"]
        getattr(model, "policy", model).save_pretrained(path)  # TRL's PPO wraps policy and value model in one
        kwargs["processing_class"].save_pretrained(path)
        self.copies.append((seconds, str(path)))
        (self.to / "copies.json").write_text(json.dumps(self.copies))
        self.saving += time.time() - now
