"""Human preferences: pairs of completions of which people chose one, and how to hold some of them out.

Pairs that share a prompt, or a group that their data set names, are not independent: a reward model that has seen one
half knows the other. So whole connected components of prompts and groups go to train or to test, never part of one.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from tether.data.text import common_prefix
from tether.errors import DataError

ASSISTANT = "\n\nAssistant:"  # how HH-RLHF transcripts open the assistant's turns


@dataclass(frozen=True, slots=True)
class Pair:
    """Two completions of one prompt, tokenized: the chosen one was preferred."""

    prompt_ids: list[int]  # never empty; shared by both
    chosen_ids: list[int]  # the stop token included
    rejected_ids: list[int]
    row: int  # its row in the data set, from 0
    prompt_key: str  # equal for pairs with the same prompt, as it was before anything was cut
    group: str | None = None  # the data set's own word for pairs that belong together


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole transcripts: they part after the last Assistant: that they share.

    >>> split_transcripts("\\n\\nHuman: Hi\\n\\nAssistant: Hello", "\\n\\nHuman: Hi\\n\\nAssistant: Go away")
    ('\\n\\nHuman: Hi\\n\\nAssistant:', ' Hello', ' Go away')
    """
    common = chosen[: common_prefix(chosen, rejected)]
    start = common.rfind(ASSISTANT)
    if start < 0:
        raise DataError(
            f"chosen and rejected share only {common[:60]!r}, without {ASSISTANT!r}, so the prompt cannot be told from "
            "the answers. Add a column 'prompt', or begin both with the same transcript up to the assistant's turn."
        )
    border = start + len(ASSISTANT)
    return chosen[:border], chosen[border:], rejected[border:]


def split_pairs(pairs: Sequence[Pair], test_fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(train, test), each in the order of `pairs`; the same for the same seed.

    test_fraction: of the pairs, in (0, 1); met as nearly as whole components allow, with at least one on either side.
    """
    components = _components(pairs)
    if len(components) < 2:
        raise DataError(
            f"all {len(pairs)} pairs hang together by prompt or group, so none can be held out for the test: its "
            "accuracy would measure memory. Add pairs with other prompts, or give them finer groups."
        )
    random.Random(seed).shuffle(components)
    wanted = test_fraction * len(pairs)
    test: set[int] = set()
    for component in components:
        if len(test) + len(component) <= max(wanted, 1):
            test.update(component)
    if not test:  # every component is larger than the test side is wanted
        smallest = min(components, key=len)
        test.update(smallest)
    return [p for i, p in enumerate(pairs) if i not in test], [p for i, p in enumerate(pairs) if i in test]


def _components(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of pairs, together where a chain of shared prompts and groups joins them (union-find)."""
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for pair in pairs:
        if pair.group is not None:
            parent[root(("prompt", pair.prompt_key))] = root(("group", pair.group))
    members: dict[Hashable, list[int]] = {}
    for i, pair in enumerate(pairs):
        members.setdefault(root(("prompt", pair.prompt_key)), []).append(i)
    return list(members.values())
