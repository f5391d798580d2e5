"""What a rank says of a failure, its own and another's, by the store that they share."""

import pytest
from torch import distributed

from tether.distributed.failures import Failures
from tether.errors import DataError, TrainingError

GLOO = "[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29412"


def fail(failures, error):
    with failures.shared():
        raise error


@pytest.fixture
def ranks():
    store = distributed.HashStore()
    return [Failures(store, rank, 2) for rank in range(2)]


def test_what_one_rank_failed_with_is_what_the_others_say(ranks):
    with pytest.raises(ValueError, match=r"^no$"):
        fail(ranks[1], ValueError("no"))
    with pytest.raises(TrainingError, match=r"^rank 1: ValueError: no$"):
        fail(ranks[0], RuntimeError(GLOO))


def test_a_mistake_that_all_ranks_find_is_no_rank_s_own(ranks):
    for failures in reversed(ranks):
        with pytest.raises(DataError, match=r"^line 3$"):
            fail(failures, DataError("line 3"))


def test_of_a_process_that_ended_without_a_word_it_is_said_that_it_ended(ranks):
    with pytest.raises(TrainingError, match=r"^rank 0: another process of the run has ended .*the same command"):
        fail(ranks[0], RuntimeError(GLOO))
