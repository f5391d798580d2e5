"""A trainer that does one piece of work each time that it is told to (see bench/peer.py)."""

import sys

from peak import peak_mb
from transformers import TrainerCallback


class WaitToBeTold(TrainerCallback):
    """A step ends: say so, and wait for the next."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_train_begin(self, *_, **__):
        print("@ready 0", flush=True)
        wait()

    def on_step_end(self, *_, **__):
        print(f"@done {self.tokens} {peak_mb()}", flush=True)
        wait()


def wait() -> None:
    if not sys.stdin.readline():
        sys.exit(0)
