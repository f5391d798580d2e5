"""`tether demo`: what RLHF is, told by doing all of it in a few minutes on a CPU.

world        a town that does not exist, whose facts make every answer checkable
judge        the hidden judge: helpful, harmless, honest; no training ever sees it
annotators   simulated people who compare answers, each with a taste of their own
tokenizer    a small vocabulary, learned from the town's texts
recipe       the configs of tether.sft, tether.reward_model and tether.ppo
story        the steps, and what is printed between them
"""

from pathlib import Path

__all__ = ["main"]


def main(to: Path, *, seed: int = 0) -> None:
    """Tell the whole story and write everything into `to`; running again continues."""
    from tether.demo.story import tell

    tell(to, seed=seed)
