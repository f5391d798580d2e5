"""The penalty for long answers, with figures worked by hand from the paper's equation."""

import pytest
import torch

from tether.config import RewardShapingConfig, RewardSourceConfig
from tether.errors import RewardError
from tether.rewards import FunctionReward, build_reward
from tether.rewards.overlong import overlong
from tether.types import Completions, Prompt


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0), (11, -1.0), (99, -1.0)],
)
def test_a_limit_of_10_with_a_buffer_of_4_by_hand(length, penalty):
    # eq. 13 of arXiv:2503.14476: 0 up to 10 - 4; ((10 - 4) - length)/4 up to 10; -1 beyond
    assert overlong([[5] * length], longest=10, buffer=4) == [penalty]


def test_the_papers_own_numbers():
    # 16384 tokens are free, 4096 more are the slope: halfway up it the penalty is a half
    lengths = (16384, 18432, 20480)
    assert overlong([range(n) for n in lengths], longest=20480, buffer=4096) == [0.0, -0.5, -1.0]


@pytest.mark.parametrize("buffer", [0, 11])
def test_a_buffer_without_a_slope_is_refused(buffer):
    with pytest.raises(ValueError, match=r"outside \[1, longest=10\]"):
        overlong([[5]], longest=10, buffer=buffer)


def completions(*lengths: int, **columns: list[object]) -> Completions:
    ids = [[5] * n for n in lengths]
    prompts = [Prompt((5,), "p", i, {name: values[i] for name, values in columns.items()}) for i in range(len(ids))]
    floats = [[0.0] * n for n in lengths]
    return Completions(prompts, ids, floats, floats, ["stop"] * len(ids))


def test_a_config_names_it_with_its_arguments_and_its_weight(tiny_tokenizer):
    named = RewardSourceConfig("tether.rewards.overlong:overlong", weight=2.0, arguments={"longest": 10, "buffer": 4})
    rewards = build_reward([named], RewardShapingConfig(), tiny_tokenizer, (1,), torch.device("cpu"))
    assert rewards.score(completions(3, 8, 10)).scores.tolist() == [0.0, -1.0, -2.0]


def needs(completion_ids, longest, **columns):
    return [float(longest)] * len(completion_ids)


def source(tokenizer, function, **fixed) -> FunctionReward:
    return FunctionReward(function, name="f", tokenizer=tokenizer, stop_ids=(1,), fixed=fixed)


def test_arguments_that_are_missing_misspelled_or_given_twice_are_named(tiny_tokenizer):
    with pytest.raises(RewardError, match=r"needs 'longest'.*set it in `arguments`"):
        source(tiny_tokenizer, overlong, buffer=4).check(completions(1).prompts)
    with pytest.raises(RewardError, match=r"hold 'bufer', which it does not take.*Did you mean 'buffer'"):
        source(tiny_tokenizer, overlong, bufer=4)
    with pytest.raises(RewardError, match="hold 'completion_ids', which every call sets"):
        source(tiny_tokenizer, overlong, completion_ids=4)
    with pytest.raises(RewardError, match="a column 'longest', and arguments of f give it as well"):
        source(tiny_tokenizer, needs, longest=4).check(completions(1, longest=[3]).prompts)


def test_a_function_of_any_columns_gets_its_arguments_too(tiny_tokenizer):
    assert source(tiny_tokenizer, needs, longest=4).score(completions(1, 2, label=["a", "b"])) == [4.0, 4.0]
