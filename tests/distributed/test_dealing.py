"""How rows are dealt out to ranks: a pure function, known on every rank without a word."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tether.distributed.ranks import Ranks, dealt
from tether.types import microbatches


def padded(groups, lengths):
    return [len(group) * int(lengths[group].max()) for group in groups]


@pytest.mark.parametrize("size", [2, 3, 8, 64])
@pytest.mark.parametrize(("rows", "tokens"), [(4096, 8192), (512, 32768), (64, 8192), (5, 100)])
def test_every_row_is_dealt_once_within_the_tokens_and_evenly(size, rows, tokens):
    generator = torch.Generator().manual_seed(rows)
    lengths = torch.randn(rows, generator=generator).mul(0.7).exp().mul(200).long().clamp(1, 4000)
    ranks = dealt(lengths, tokens, size)
    assert sorted(torch.cat([i for groups in ranks for i in groups]).tolist()) == list(range(rows))
    counts = [len(groups) for groups in ranks]
    assert max(counts) - min(counts) <= 1
    assert counts[0] == max(counts)
    assert all(
        len(g) == 1 or n <= tokens for groups in ranks for g, n in zip(groups, padded(groups, lengths), strict=True)
    )
    alone = sum(padded(microbatches(lengths, tokens), lengths))
    assert sum(sum(padded(groups, lengths)) for groups in ranks) <= 1.05 * alone


@pytest.mark.parametrize("size", [2, 8, 64])
def test_no_rank_has_much_more_to_do_than_the_others(size):
    lengths = (
        torch.randn(4096, generator=torch.Generator().manual_seed(1)).mul(0.7).exp().mul(200).long().clamp(1, 4000)
    )
    work = [sum(padded(groups, lengths)) for groups in dealt(lengths, 8192, size)]
    assert max(work) <= 1.05 * sum(work) / size


def log_normal(rows, sigma, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, generator=generator).mul(sigma).exp().mul(200).long().clamp(1, 4000)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    size=st.integers(2, 64), rows_a_rank=st.integers(16, 48), sigma=st.floats(0.2, 1.0), seed=st.integers(0, 10**6),
    tokens=st.sampled_from([4096, 8192, 32768]),
)  # fmt: skip
def test_several_ranks_run_at_most_a_twentieth_more_padded_tokens_than_one(size, rows_a_rank, sigma, seed, tokens):
    lengths = log_normal(size * rows_a_rank, sigma, seed)
    ranks = dealt(lengths, tokens, size)
    spare = min(ranks[0], key=len)  # run with weight 0 by whoever has a group less
    run = sum(sum(padded([*groups, *[spare] * (len(ranks[0]) - len(groups))], lengths)) for groups in ranks)
    assert run <= 1.05 * sum(padded(microbatches(lengths, tokens), lengths))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=st.integers(2, 32), sigma=st.floats(0.2, 1.0), seed=st.integers(0, 10**6))
def test_with_64_rows_a_rank_the_slowest_has_at_most_a_twentieth_more_to_do_than_the_mean(size, sigma, seed):
    lengths = log_normal(64 * size, sigma, seed)
    work = [sum(padded(groups, lengths)) for groups in dealt(lengths, 8192, size)]
    assert max(work) <= 1.05 * sum(work) / size


def test_in_every_turn_the_largest_group_goes_to_whoever_has_least():
    lengths = torch.tensor([9, 8, 8, 7, 5, 5, 4])  # at most 16 at once: 9, 8 + 8, 7 + 5, 5 + 4, padded 9, 16, 14, 10
    assert [padded(groups, lengths) for groups in dealt(lengths, 16, 2)] == [[16, 10], [9, 14]]


def test_ranks_run_equally_many_microbatches_and_each_row_counts_once():
    lengths = torch.tensor([9, 7, 7, 4, 2])
    runs = [Ranks(rank, 3).deal(lengths, 9) for rank in range(3)]
    assert len({len(run) for run in runs}) == 1
    assert sorted(i for run in runs for index, counts in run if counts for i in index.tolist()) == [0, 1, 2, 3, 4]


def test_with_more_ranks_than_rows_some_only_keep_up():
    runs = [Ranks(rank, 4).deal([5, 3], 100) for rank in range(4)]
    assert [[counts for _, counts in run] for run in runs] == [[True], [True], [False], [False]]


def test_alone_nothing_is_dealt():
    lengths = torch.tensor([9, 7, 7, 4, 2])
    assert [i.tolist() for i, _ in Ranks().deal(lengths, 14)] == [i.tolist() for i in microbatches(lengths, 14)]
