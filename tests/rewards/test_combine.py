"""From several sources to one score: worked by hand."""

import pytest
import torch
from torch.testing import assert_close

from tether.config import MissingEosConfig, RewardShapingConfig, RewardSourceConfig
from tether.errors import ConfigError, RewardError
from tether.rewards import RewardSet, build_reward, shape_scores
from tether.types import Completions, Prompt


class Fixed:
    def __init__(self, *scores):
        self.scores = scores

    def score(self, completions):
        return self.scores


def batch_of(n, cut=()):
    prompts = [Prompt((5,), f"p{i}", i) for i in range(n)]
    reasons = ["length" if i in cut else "stop" for i in range(n)]
    return Completions(prompts, [[7]] * n, [[0.0]] * n, [[0.0]] * n, reasons)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


AB = {"a": (Fixed(1.0, 2.0, None), 0.5), "b": (Fixed(10.0, None, 3.0), -1.0)}


def test_the_score_is_the_weighted_sum_of_the_sources_that_answered_not_renormalized():
    batch = RewardSet(AB, RewardShapingConfig(), {"a", "b"}).score(batch_of(3))
    assert_close(batch.scores, doubles(0.5 - 10.0, 1.0, -3.0))
    assert batch.parts == {"a": [1.0, 2.0, None], "b": [10.0, None, 3.0]}  # raw, for the rollout file
    assert batch.missing == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("optional", "row", "name"), [((), 1, "b"), (("a",), 1, "b"), (("b",), 2, "a")], ids=["neither", "a", "b"]
)
def test_none_beside_another_sources_score_is_an_error_unless_the_source_is_optional(optional, row, name):
    with pytest.raises(RewardError, match=rf"reward {name} answered None for row {row} .*'p{row}'.*`optional: true`"):
        RewardSet(AB, RewardShapingConfig(), optional).score(batch_of(3))


def test_the_config_says_which_source_is_optional(tmp_path, tiny_tokenizer):
    file = tmp_path / "f.py"
    file.write_text("def f(completions): return [1.0, None]\ndef g(completions): return [2.0, 4.0]\n")
    sources = [RewardSourceConfig(function=f"{file}:f", optional=True), RewardSourceConfig(function=f"{file}:g")]
    batch = build_reward(sources, RewardShapingConfig(), tiny_tokenizer, (1,), torch.device("cpu")).score(batch_of(2))
    assert_close(batch.scores, doubles(3.0, 4.0))
    assert batch.missing == {"f": 1}


def test_a_row_that_no_source_scored_is_an_error_that_names_it():
    both = {"a": (Fixed(1.0, None), 1.0), "b": (Fixed(1.0, None), 1.0)}
    rewards = RewardSet(both, RewardShapingConfig(), {"a", "b"})
    with pytest.raises(RewardError, match=r"row 1 \(row 1 of the data, 'p1'\): a, b all answered None"):
        rewards.score(batch_of(2))


def test_scores_are_clipped_to_both_sides():
    got = shape_scores(doubles(-9.0, -1.0, 0.5, 9.0), ["stop"] * 4, RewardShapingConfig(clip=2.0))
    assert_close(got, doubles(-2.0, -1.0, 0.5, 2.0))


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        (MissingEosConfig(set=-1.0), (3.0, -1.0)),
        (MissingEosConfig(set=0.0), (3.0, 0.0)),
        (MissingEosConfig(subtract=1.5), (3.0, 1.5)),
    ],
)
def test_a_missing_stop_token_sets_the_score_or_lowers_it(rule, want):
    got = shape_scores(doubles(3.0, 3.0), ["stop", "length"], RewardShapingConfig(missing_eos=rule))
    assert_close(got, doubles(*want))


def test_the_clip_comes_before_the_missing_stop_token():
    shaping = RewardShapingConfig(clip=1.0, missing_eos=MissingEosConfig(subtract=5.0))
    assert_close(shape_scores(doubles(3.0), ["length"], shaping), doubles(-4.0))


def test_sources_are_built_from_the_config_in_its_order_and_a_function_from_python_comes_last(tmp_path, tiny_tokenizer):
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [2.0] * len(completions)\n")
    sources = [
        RewardSourceConfig(function=f"{tmp_path}/mine.py:f", weight=2.0, name="second_letter"),
        RewardSourceConfig(function=f"{tmp_path}/mine.py:f"),
    ]

    def extra(completions):
        return [10.0] * len(completions)

    rewards = build_reward(sources, RewardShapingConfig(), tiny_tokenizer, (1,), torch.device("cpu"), given=extra)
    batch = rewards.score(batch_of(1))
    assert list(batch.parts) == ["second_letter", "f", "extra"]
    assert_close(batch.scores, doubles(2 * 2.0 + 2.0 + 10.0))


def test_a_function_from_python_cannot_take_the_name_of_one_in_the_config(tiny_tokenizer, tmp_path):
    (tmp_path / "mine.py").write_text("def f(completions):\n    return [2.0]\n")

    def f(completions):
        return [1.0]

    with pytest.raises(ConfigError, match="reward=f has the name of a source"):
        build_reward([RewardSourceConfig(function=f"{tmp_path}/mine.py:f")], RewardShapingConfig(), tiny_tokenizer,
                     (1,), torch.device("cpu"), given=f)  # fmt: skip
