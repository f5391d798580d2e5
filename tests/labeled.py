"""Items to label."""

from dataclasses import replace

from tether.feedback.records import Answer, Item, Label


def pairs(count: int, start: int = 0) -> list[Item]:
    """Pairs of answers; the second is the longer one."""
    return [Item(f"prompt {i}", (Answer(f"yes {i}"), Answer(f"certainly {i}"))) for i in range(start, start + count)]


def label(item, annotator, choice="a", **changes) -> Label:
    """What somebody said of a pair, without a store."""
    plain = Label(
        event=0, item=item, annotator=annotator, kind="pair", choice=choice, ranking=None, strength=None, axes={},
        note=None, reason=None, order=(0, 1), seconds=None, guideline=None, at="2026-10-01T00:00:00.000Z", gold=None,
        repeat_of=None, longer=None,
    )  # fmt: skip
    return replace(plain, **changes)
