"""Which pairs are held out of training, to measure what a reward model learned.

Pairs that share a prompt, or a group that their data set names, are not independent: a reward model that has seen one
half knows the other. So whole connected components of prompts and groups go to train or to test, never part of one.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from tether.data.pairs import Pair
from tether.errors import DataError


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
