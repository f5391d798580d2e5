"""Tasks small enough to enumerate: every response is a row, so expectations are sums and the optimum is known."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Game:
    """All B responses of up to R tokens: prefix before each token, the token, the response's score."""

    prefixes: Tensor  # [B, R]
    actions: Tensor  # [B, R]
    mask: Tensor  # [B, R]
    scores: Tensor  # [B]
    reference: Tensor  # [prefixes, symbols] log-probs


def game(symbols: int, length: int, score: Callable[[tuple[int, ...]], float], *, stop: int | None = None) -> Game:
    """Enumerate. `stop` ends a response when it comes; the reference is uniform until replaced."""
    responses = {y[: y.index(stop) + 1] if stop in y else y for y in itertools.product(range(symbols), repeat=length)}
    rows = sorted(responses)
    index = {p: i for i, p in enumerate(sorted({y[:t] for y in rows for t in range(len(y))}))}
    prefixes, actions = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(2))
    for i, y in enumerate(rows):
        for t, token in enumerate(y):
            prefixes[i, t], actions[i, t] = index[y[:t]], token
    mask = torch.arange(length) < torch.tensor([len(y) for y in rows])[:, None]
    scores = torch.tensor([score(y) for y in rows], dtype=torch.float64)
    return Game(prefixes, actions, mask, scores, torch.zeros(len(index), symbols).double().log_softmax(-1))


def bandit() -> Game:
    """E1: eight actions, ref = softmax(-0.3k), score sin k."""
    e1 = game(8, 1, lambda y: math.sin(y[0]))
    e1.reference = (-0.3 * torch.arange(8).double()).log_softmax(-1)[None]
    return e1


def sparse() -> Game:
    """E2: three symbols, six tokens, score 1 if as many 0 as 1."""
    return game(3, 6, lambda y: float(y.count(0) == y.count(1)))


def variable_length() -> Game:
    """E3: a stop token may come at any of four steps; the score depends on the length; -1 without a stop."""
    e3 = game(3, 4, lambda y: math.sin(2.0 * len(y)) if y[-1] == 2 else -1.0, stop=2)
    generator = torch.Generator().manual_seed(0)
    e3.reference = torch.randn(e3.reference.shape, generator=generator, dtype=torch.float64).log_softmax(-1)
    return e3


def of_responses(g: Game, table: Tensor) -> Tensor:
    """[B] log-prob of every response under a table of log-probs."""
    return torch.where(g.mask, table[g.prefixes, g.actions], 0.0).sum(1)


def optimum(g: Game, beta: float) -> Tensor:
    """[B] probability of every response under π*."""
    return torch.softmax(of_responses(g, g.reference) + g.scores / beta, 0)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p / q).log()).sum())
