"""Items to label."""

from tether.feedback.records import Answer, Item


def pairs(count: int, start: int = 0) -> list[Item]:
    """Pairs of answers; the second is the longer one."""
    return [Item(f"prompt {i}", (Answer(f"yes {i}"), Answer(f"certainly {i}"))) for i in range(start, start + count)]
