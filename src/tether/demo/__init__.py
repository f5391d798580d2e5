"""`tether demo`: what RLHF is, told by doing all of it in a few minutes on a CPU."""

from pathlib import Path


def main(to: Path, *, seed: int = 0) -> None:
    """Tell the whole story and write everything into `to`; running again continues."""
    from tether.demo.story import tell

    tell(to, seed=seed)
