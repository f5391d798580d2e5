"""What a rank holds of a model, worked out by hand on a few weights."""

from tether.diagnose.per_rank import (
    Weight,
    bucket_bytes,
    gathered_bytes,
    gradient_bytes_in_flight,
    largest_gradient_bytes,
    trained_numbers,
    weight_bytes,
)

TABLE, NORM = Weight((10, 4), 4, True), Weight((4,), 4, True)
MATRIX, FROZEN = Weight((6, 4), 4, True), Weight((8, 4), 2, False)
UNITS = [[TABLE, NORM], [MATRIX, FROZEN], [MATRIX]]


def test_a_rank_holds_whole_rows_and_the_first_has_most():
    assert weight_bytes(UNITS) == 4 * (40 + 4 + 24 + 24) + 2 * 32
    # of 4 ranks: 3 of 10 rows, 1 of 4 numbers, 2 of 6 rows, 2 of 8 rows
    assert weight_bytes(UNITS, 4) == 4 * (12 + 1 + 8 + 8) + 2 * 8
    assert trained_numbers(UNITS, 4) == 12 + 1 + 8 + 8
    assert trained_numbers(UNITS) == 40 + 4 + 24 + 24


def test_with_more_ranks_than_rows_a_rank_still_holds_a_row():
    assert weight_bytes([[MATRIX]], 64) == 4 * 4


def test_the_root_is_gathered_and_a_layer_with_the_buffer_of_the_next():
    assert gathered_bytes(UNITS) == (4 * 44, 2 * (4 * 24 + 2 * 32))


def test_gradients_in_flight_are_the_roots_and_those_of_two_layers_in_float32():
    assert gradient_bytes_in_flight(UNITS) == 4 * 44 + 2 * 4 * 24
    assert gradient_bytes_in_flight([[FROZEN], [FROZEN]]) == 0
    assert largest_gradient_bytes(UNITS) == 4 * 44


def test_replicas_sum_gradients_in_copies_of_a_bucket_or_of_one_weight_that_is_larger():
    assert bucket_bytes([3, 4, 5, 2], 8) == 4 * 7  # 3 + 4, then 5 + 2
    assert bucket_bytes([3, 20, 5], 8) == 4 * 20
    assert bucket_bytes([3, 2], 100) == 4 * 5
    assert bucket_bytes([], 8) == 0
