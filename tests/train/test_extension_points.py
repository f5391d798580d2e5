"""A reward, a sampler and a sink of somebody's own take part in a run."""

import re

import pytest
import torch
from safetensors.torch import load_file

import tether
from tether.config import LogConfig
from tether.errors import BatchError, ConfigError, RewardError
from tether.samplers.local import LocalSampler
from tether.types import Completions, LogSink, Reward, Sampler
from tiny_ppo import id_score, tiny_config


class CountingSampler:
    """The local engine, and what was asked of it."""

    def __init__(self):
        self.inner, self.cycles, self.versions = None, [], []

    def generate(self, prompts, sampling, *, cycle, first=0):
        self.cycles.append(cycle)
        return self.inner.generate(prompts, sampling, cycle=cycle, first=first)

    def load_weights(self, weights, version):
        self.versions.append(version)
        self.inner = self.inner or LocalSampler(weights)
        self.inner.load_weights(weights, version)


class IdScore:
    name = "ids"

    def __init__(self):
        self.checked = []

    def check(self, prompts):
        self.checked += prompts

    def score(self, completions):
        return id_score(completions.response_ids)


class Collected:
    def __init__(self):
        self.lines = {}

    def write(self, step, metrics):
        self.lines[step] = metrics


def final_weights(run):
    return load_file(run.final / "model.safetensors")


def test_a_run_with_a_reward_object_a_sampler_and_a_sink_is_the_run_without_them(tiny_model, tmp_path):
    directory = tiny_model()
    sampler, reward, sink = CountingSampler(), IdScore(), Collected()
    parts: tuple[Sampler, Reward, LogSink] = sampler, reward, sink  # the protocols' own shape
    run = tether.ppo(
        tiny_config(tmp_path / "run", directory), sampler=parts[0], reward=parts[1], sinks=[parts[2], Collected()]
    )
    want = tether.ppo(tiny_config(tmp_path / "plain", directory), reward=id_score)
    assert all(torch.equal(final_weights(run)[k], w) for k, w in final_weights(want).items())
    assert sampler.cycles == [0, 1, 2, 0, 3, 4, 0]  # evaluations are cycle 0
    assert sampler.versions == [0, 1, 2, 3, 4]
    assert len({p.row for p in reward.checked}) == 12
    assert [m["reward/ids_mean"] for m in run.metrics] == [m["reward/id_score_mean"] for m in want.metrics]
    assert [sink.lines[m["cycle"]] for m in run.metrics] == run.metrics


def test_a_run_that_continues_gives_its_sampler_the_weights_of_its_checkpoint_first(tiny_model, tmp_path):
    config = tiny_config(tmp_path / "run", tiny_model())

    def breaks_in_cycle_3(completion_ids, **_):
        if sampler.cycles.count(0) == 2 and sampler.cycles[-1] == 3:
            raise ValueError
        return id_score(completion_ids)

    breaks_in_cycle_3.__name__ = "id_score"
    sampler, sink = CountingSampler(), Collected()
    with pytest.raises(RewardError):
        tether.ppo(config, reward=breaks_in_cycle_3, sampler=sampler)
    sampler = CountingSampler()
    tether.ppo(config, reward=id_score, sampler=sampler, sinks=[sink])
    assert sampler.versions == [2, 3, 4]
    assert list(sink.lines) == [3, 4]


def test_what_a_reward_object_does_wrong_stops_the_run_with_everything_saved(tiny_model, tmp_path):
    class Breaks(IdScore):
        def score(self, completions):
            if completions.prompts and len(self.checked) == 0:
                return super().score(completions)
            self.checked.pop()
            return [float("nan")] * len(completions) if not self.checked else super().score(completions)

    reward = Breaks()
    reward.check = lambda prompts: reward.checked.extend(prompts[:3])  # the third call answers NaN
    with pytest.raises(RewardError, match=r"reward ids returned nan for row 0"):
        tether.ppo(tiny_config(tmp_path / "run", tiny_model()), reward=reward)
    assert [m["cycle"] for m in tether.Run.open(tmp_path / "run").metrics] == [1]
    assert (tmp_path / "run" / "checkpoints" / "cycle-000001").is_dir()


def test_an_exception_of_a_reward_object_names_it_and_the_line(tiny_model, tmp_path):
    class Raises(IdScore):
        def score(self, completions):
            raise KeyError("no such word")

    with pytest.raises(RewardError, match=rf"reward ids raised KeyError.*{re.escape(__file__)}:\d+"):
        tether.ppo(tiny_config(tmp_path / "run", tiny_model()), reward=Raises())


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"reward": 3}, "reward is int, which has no method `check`"),
        ({"reward": id_score, "sampler": IdScore()}, "sampler is IdScore, which has no method `generate`"),
        (
            {"reward": id_score, "sinks": [Collected(), id_score]},
            r"sinks\[1\] is function, which has no method `write`",
        ),
    ],
)
def test_a_part_that_lacks_a_method_is_refused_before_anything_is_loaded(tmp_path, parts, message):
    with pytest.raises(ConfigError, match=message):
        tether.ppo(tiny_config(tmp_path / "run", tmp_path / "no model"), **parts)
    assert not (tmp_path / "run").exists()


def test_a_sampler_that_answers_other_prompts_than_it_was_asked_stops_the_run(tiny_model, tmp_path):
    class Swaps(CountingSampler):
        def generate(self, prompts, sampling, *, cycle, first=0):
            got = super().generate(prompts, sampling, cycle=cycle, first=first)
            return Completions(
                got.prompts[::-1], got.response_ids, got.sampler_logprobs, got.truncated_mass, got.finish_reasons
            )

    with pytest.raises(BatchError, match="another order"):
        tether.ppo(tiny_config(tmp_path / "run", tiny_model()), reward=id_score, sampler=Swaps())


def test_the_trainers_of_steps_have_sinks_too(tiny_model, tmp_path):
    from tether.config import (
        DataConfig,
        ModelConfig,
        QLearningConfig,
        RewardConfig,
        ScoredConfig,
        SFTConfig,
        SFTModelConfig,
    )

    (tmp_path / "text.jsonl").write_text('{"text": "once upon a time"}\n' * 4)
    (tmp_path / "pairs.jsonl").write_text(
        "".join(f'{{"prompt": "p{i}", "chosen": "good {i}", "rejected": "bad"}}\n' for i in range(8))
    )
    (tmp_path / "scored.jsonl").write_text('{"prompt": "a", "completion": "b", "score": 1}\n' * 4)
    path, log = str(tiny_model()), LogConfig(tensorboard=False)
    for kind, model, data, trainer, file in (
        (SFTConfig, SFTModelConfig, DataConfig, tether.sft, "text"),
        (RewardConfig, SFTModelConfig, DataConfig, tether.reward_model, "pairs"),
        (QLearningConfig, ModelConfig, ScoredConfig, tether.qlearning, "scored"),
    ):
        sink = Collected()
        config = kind(
            run=str(tmp_path / file), model=model(policy=path), data=data(path=str(tmp_path / f"{file}.jsonl")),
            log=log, device="cpu",
        )  # fmt: skip
        run = trainer(config, sinks=[sink])
        assert run.metrics
        assert list(sink.lines.values()) == run.metrics
