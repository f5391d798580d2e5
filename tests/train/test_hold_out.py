"""Which prompts are evaluated on: none that is trained on, however often it stands in the file."""

from hypothesis import given
from hypothesis import strategies as st

from tether.train.held_out import hold_out
from tether.types import Prompt


def prompts_of(ids):
    return [Prompt((i,), str(i), row) for row, i in enumerate(ids)]


@given(ids=st.lists(st.integers(0, 12), min_size=1, max_size=60), count=st.integers(1, 8), seed=st.integers(0, 3))
def test_a_prompt_that_stands_there_twice_is_never_both_trained_on_and_held_out(ids, count, seed):
    prompts = prompts_of(ids)
    train, held_out, note = hold_out(prompts, count, seed)
    kinds = set(ids)
    if len(kinds) < 4:
        assert (train, held_out) == (prompts, prompts)
        assert "only" in note
        return
    trained, held = {p.ids for p in train}, [p.ids for p in held_out]
    assert not trained & set(held)
    assert len(held) == len(set(held)) == min(count, len(kinds) // 4)
    assert trained | set(held) == {(i,) for i in kinds}
    assert len(train) == sum((i,) in trained for i in ids)  # and every row of what is trained on
    left_out = len(prompts) - len(train) - len(held)
    assert (f"{left_out} rows repeat" in (note or "")) == (left_out > 0)


def test_prompts_that_stand_there_once_are_split_by_the_seed():
    prompts = prompts_of(range(40))
    first, again, other = (hold_out(prompts, 5, seed)[1] for seed in (0, 0, 1))
    assert first == again != other
    assert [p.row for p in first] == sorted(p.row for p in first)
    assert hold_out(prompts, 5, 0)[2] is None
    assert hold_out(prompts, 0, 0) == (prompts, [], None)
