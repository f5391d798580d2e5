"""Counted randomness: each uniform is a function of its coordinates."""

import numpy as np

from tether.samplers.uniforms import uniforms

AT = {"seed": 3, "stream": 0, "cycle": 5, "row": 7}


def test_the_same_coordinates_give_the_same_uniforms_and_fewer_are_the_first_of_more():
    assert (uniforms(**AT, count=40) == uniforms(**AT, count=40)).all()
    assert (uniforms(**AT, count=13) == uniforms(**AT, count=40)[:13]).all()


def test_every_coordinate_counts():
    seen = {float(uniforms(**AT, count=1)[0])}
    for name in AT:
        for other in (1, 2, 2**31):
            seen.add(float(uniforms(**AT | {name: other}, count=1)[0]))
    assert len(seen) == 1 + 3 * len(AT)


def test_neighboring_cycles_rows_and_tokens_are_independent_and_uniform():
    table = np.stack([[uniforms(0, 0, cycle, row, 64) for row in range(32)] for cycle in range(8)])
    assert table.min() >= 0
    assert table.max() < 1
    assert len(np.unique(table)) == table.size
    counts, _ = np.histogram(table, bins=16, range=(0, 1))
    assert ((counts - table.size / 16) ** 2 / (table.size / 16)).sum() < 37.7  # 15 degrees of freedom: probability .001
    for axis in range(3):
        a, b = (np.take(table, np.arange(s, table.shape[axis] - 1 + s), axis).ravel() for s in (0, 1))
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(a.size)
