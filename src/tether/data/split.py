"""Which pairs are held out of training, to measure what a reward model learned.

Pairs that share a prompt, or a group that their data set names, are not independent: a reward model that has seen one
half knows the other. So whole connected components of prompts and groups go to train or to test, never part of one.
Where all pairs have one prompt, the answers take its place: no answer then stands on both sides.
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from typing import TypeVar

from tether.data.labeled import Labeled
from tether.data.pairs import Pair
from tether.errors import DataError

Example = TypeVar("Example", bound=Pair | Labeled)


def split_pairs(
    pairs: Sequence[Example], test_fraction: float, seed: int, *, section: str = "reward_model"
) -> tuple[list[Example], list[Example]]:
    """(train, test), each in the order of `pairs` (or of labeled answers); the same for the same seed.

    test_fraction: of the pairs, in [0, 1); met as nearly as whole components allow, with at least one on either side.
    0 holds none out. section: of the config, which the user would set it in.
    """
    if test_fraction == 0:
        return list(pairs), []
    components, what = _linked(pairs)
    if len(components) < 2:
        raise DataError(
            f"all {len(pairs)} pairs hang together by {what} or group, so none can be held out for the test: its "
            f"accuracy would measure memory. Add pairs with other {what}s, give them finer groups, or set "
            f"{section}.test_fraction to 0, which reports no accuracy."
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


def resample(pairs: Sequence[Example], seed: int) -> list[Example]:
    """As many pairs, drawn with replacement: a prompt or group comes with all its pairs, which are not independent.

    The last that is drawn is cut. Source: Efron 1979, the bootstrap, by clusters.
    """
    components, draw = _linked(pairs)[0], random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < len(pairs):
        drawn += draw.choice(components)
    return [pairs[i] for i in drawn[: len(pairs)]]


def share_prompts(train: Sequence[Pair | Labeled], test: Sequence[Pair | Labeled]) -> bool:
    """Whether held-out pairs have prompts that are trained on: they were held out by their answers."""
    return not {pair.prompt_key for pair in train}.isdisjoint(pair.prompt_key for pair in test)


def _linked(pairs: Sequence[Example]) -> tuple[list[list[int]], str]:
    """(places of pairs that hang together by prompt or group, what they hang together by)."""
    links: list[list[Hashable]] = [[("prompt", pair.prompt_key)] for pair in pairs]
    what = "prompt"
    if len({pair.prompt_key for pair in pairs}) == 1:
        links = [[("answer", *ids) for ids in pair.answers] for pair in pairs]
        what = "answer"
    keys = [
        found if pair.group is None else [*found, ("group", pair.group)]
        for found, pair in zip(links, pairs, strict=True)
    ]
    return _components(keys), what


def _components(links: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Indices of the entries, together where a chain of shared keys joins them (union-find)."""
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for first, *others in links:
        for other in others:
            parent[root(first)] = root(other)
    members: dict[Hashable, list[int]] = {}
    for i, (first, *_) in enumerate(links):
        members.setdefault(root(first), []).append(i)
    return list(members.values())
