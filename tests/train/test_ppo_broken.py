"""PPO runs in which something goes wrong: what is kept, what is said, and that the same command goes on."""

import math

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import tether
from resume import steady
from tether.errors import EngineError, ModelError, RewardError, TrainingError
from tether.models.policy import build_policy
from tether.samplers.local import LocalSampler
from tether.train import checkpoint
from tether.train import rollout as experience
from tether.types import Completions
from tiny_ppo import id_score, tiny_config


class Reward:
    """id_score, but for what `spoil` makes of the scores of its n-th call (from 1; evaluations call it too)."""

    __name__ = "id_score"

    def __init__(self, spoil):
        self.spoil, self.calls = spoil, 0

    def __call__(self, completion_ids, **_):
        self.calls += 1
        return self.spoil(self.calls, id_score(completion_ids))


def spoiled_at(call: int, value: float):
    return Reward(lambda n, scores: [value, *scores[1:]] if n == call else scores)


def weights(run, cycle):
    return load_file(run / "checkpoints" / f"cycle-{cycle:06d}" / "policy" / "model.safetensors")


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# Calls of the reward: evaluation before cycle 1, cycle 1, cycle 2, evaluation, cycle 3, cycle 4, evaluation.
@pytest.mark.parametrize(("call", "done"), [(1, None), (2, None), (4, 2), (5, 2), (6, 3)])
def test_a_reward_that_is_not_a_number_stops_the_run_after_saving_and_the_same_command_goes_on(
    tiny_model, tmp_path, call, done
):
    directory = tiny_model()
    config = tiny_config(tmp_path / "run", directory, checkpoint={"every": 10})
    with pytest.raises(RewardError, match=r"returned nan for row 0 \(row \d+ of the data"):
        tether.ppo(config, reward=spoiled_at(call, math.nan))
    assert checkpoint.names(tmp_path / "run") == ([] if done is None else [f"cycle-{done:06d}"])
    assert tether.Run.open(tmp_path / "run").status["state"] == "failed"

    run = tether.ppo(config, reward=id_score)
    want = tether.ppo(tiny_config(tmp_path / "whole", directory, checkpoint={"every": 10}), reward=id_score)
    assert [m["cycle"] for m in run.metrics] == [1, 2, 3, 4]
    assert same(load_file(run.final / "model.safetensors"), load_file(want.final / "model.safetensors"))


class Engine(LocalSampler):
    """The local engine, which fails at the n-th use of one of its methods."""

    def __init__(self, config, method: str, use: int):
        policy, _, _ = build_policy(config.model, device=torch.device("cpu"), seed=0, with_critic=False)
        super().__init__(policy.model, beside=bool(config.ppo.ahead))
        self.left = {method: use}

    def _use(self, method):
        self.left[method] = self.left.get(method, 0) - 1
        if self.left[method] == 0:
            raise EngineError("the engine is gone")

    def load_weights(self, weights, version=0):
        self._use("load_weights")
        super().load_weights(weights, version)

    def generate(self, *given, **named):
        self._use("generate")
        return super().generate(*given, **named)


# It samples as the reward is called; it is given weights at the start and after every cycle.
@pytest.mark.parametrize(
    ("method", "use", "done"),
    [("generate", 2, None), ("generate", 3, 1), ("generate", 4, 2), ("load_weights", 3, 2), ("load_weights", 5, 4)],
)
def test_an_engine_that_fails_stops_the_run_after_saving_and_the_same_command_goes_on(
    tiny_model, tmp_path, method, use, done
):
    directory = tiny_model()
    config = tiny_config(tmp_path / "run", directory, checkpoint={"every": 10})
    with pytest.raises(EngineError, match="the engine is gone"):
        tether.ppo(config, reward=id_score, sampler=Engine(config, method, use))
    assert checkpoint.names(tmp_path / "run") == ([] if done is None else [f"cycle-{done:06d}"])
    run = tether.ppo(config, reward=id_score, sampler=Engine(config, method, 0))
    want = tether.ppo(tiny_config(tmp_path / "whole", directory, checkpoint={"every": 10}), reward=id_score)
    assert steady(run) == steady(want)
    assert same(load_file(run.final / "model.safetensors"), load_file(want.final / "model.safetensors"))


def test_an_engine_that_fails_one_cycle_ahead_leaves_the_last_checkpoint(tiny_model, tmp_path):
    """When that is known the policy has moved on from the last cycle that is done."""
    directory = tiny_model()
    ahead = {"cycles": 5, "batch": 8, "minibatch": 4, "ahead": 1}
    configs = [
        tiny_config(tmp_path / name, directory, checkpoint={"every": 2}, evaluate={"every": 0}, ppo=ahead)
        for name in ("run", "whole")
    ]
    with pytest.raises(TrainingError, match="the engine is gone"):
        tether.ppo(configs[0], reward=id_score, sampler=Engine(configs[0], "generate", 4))
    assert checkpoint.names(tmp_path / "run") == ["cycle-000002"]
    run, want = tether.ppo(configs[0], reward=id_score), tether.ppo(configs[1], reward=id_score)
    assert same(load_file(run.final / "model.safetensors"), load_file(want.final / "model.safetensors"))


def test_a_gradient_that_is_not_finite_skips_its_step_and_is_counted(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run", tiny_model(),
        checkpoint={"every": 1, "keep": 4}, evaluate={"every": 0}, ppo={"cycles": 3, "epochs": 1, "whiten": False},
    )  # fmt: skip
    run = tether.ppo(config, reward=Reward(lambda n, scores: [1e38] * 8 if n == 2 else scores))
    assert [m["optim/skipped_steps"] for m in run.metrics] == [0, 2, 0]
    assert same(weights(run.path, 1), weights(run.path, 2))
    assert not same(weights(run.path, 2), weights(run.path, 3))
    alarms = [e["what"] for e in run.events if e["event"] == "alarm"]
    assert sum("skipped" in what for what in alarms) == 2
    assert all(torch.isfinite(w).all() for w in load_file(run.final / "model.safetensors").values())
    assert "| entropy" in (run.final / "README.md").read_text()


def test_a_run_whose_gradients_stay_broken_stops_with_its_rollout_left_behind(tiny_model, tmp_path):
    config = tiny_config(
        tmp_path / "run", tiny_model(),
        checkpoint={"every": 1}, evaluate={"every": 0}, log={"tensorboard": False, "rollouts_every": 0},
    )  # fmt: skip
    with pytest.raises(TrainingError, match=r"5 optimizer steps in a row are not finite"):
        tether.ppo(config, reward=Reward(lambda n, scores: [1e38] * 8 if n >= 2 else scores))
    run = tether.Run.open(tmp_path / "run")
    assert run.status["state"] == "failed"
    assert [m["cycle"] for m in run.metrics] == [1, 2]  # 4 steps skipped in cycle 2, the fifth in cycle 3
    dumped = pq.read_table(run.path / "rollouts" / "cycle-000003.parquet").to_pylist()
    assert [row["score"] for row in dumped] == [1e38] * 8
    assert same(weights(run.path, 1), weights(run.path, 2))


def test_steps_skipped_before_a_stop_count_after_it(tiny_model, tmp_path):
    """Four in a row before, one after: the run still stops at five."""
    config = tiny_config(
        tmp_path / "run", tiny_model(), checkpoint={"every": 1}, evaluate={"every": 0}, ppo={"whiten": False}
    )
    with pytest.raises(RewardError):
        tether.ppo(config, reward=Reward(lambda n, scores: scores if n == 1 else [1e38 if n == 2 else math.nan] * 8))
    with pytest.raises(TrainingError, match="5 optimizer steps in a row"):
        tether.ppo(config, reward=Reward(lambda n, scores: [1e38] * 8))
    assert [m["cycle"] for m in tether.Run.open(tmp_path / "run").metrics] == [1, 2]


def test_a_model_that_is_not_finite_stops_the_run_at_its_first_token(tiny_model, tmp_path):
    directory = tiny_model()
    weights = load_file(directory / "model.safetensors")
    broken = {name: torch.full_like(w, torch.nan) if "embed_tokens" in name else w for name, w in weights.items()}
    save_file(broken, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="logits are not finite"):
        tether.ppo(tiny_config(tmp_path / "run", directory), reward=id_score)


def test_a_first_ratio_that_is_not_one_stops_the_run(tiny_model, tmp_path, monkeypatch):
    """As if the log-probs of phase 1 had been taken at another temperature."""
    collect = experience.Policy.forward

    def hotter(self, rows, *, temperature, entropy=True):
        return collect(self, rows, temperature=temperature if torch.is_grad_enabled() else 1.5, entropy=entropy)

    monkeypatch.setattr(experience.Policy, "forward", hotter)
    with pytest.raises(TrainingError, match="first ratio of the cycle is off 1"):
        tether.ppo(tiny_config(tmp_path / "run", tiny_model(), evaluate={"every": 0}), reward=id_score)
    assert (tmp_path / "run" / "rollouts" / "cycle-000001.parquet").exists()


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_score_that_is_not_on_the_last_token_stops_the_run(tiny_model, tmp_path, monkeypatch, shift):
    place = experience.place_rewards

    def misplaced(scores, old, ref, mask, *, kl_coef):
        return place(scores, old, ref, mask, kl_coef=kl_coef).roll(shift, 1)

    monkeypatch.setattr(experience, "place_rewards", misplaced)
    with pytest.raises(TrainingError, match="not on the last token"):
        tether.ppo(tiny_config(tmp_path / "run", tiny_model(), evaluate={"every": 0}), reward=id_score)


def test_a_sampler_that_drifts_from_the_policy_raises_an_alarm(tiny_model, tmp_path, monkeypatch):
    from tether.samplers.local import LocalSampler

    honest = LocalSampler.generate

    def drifting(self, *args, **kwargs) -> Completions:
        got = honest(self, *args, **kwargs)
        off = [[x - 0.01 for x in row] for row in got.sampler_logprobs]
        return Completions(got.prompts, got.response_ids, off, got.truncated_mass, got.finish_reasons)

    monkeypatch.setattr(LocalSampler, "generate", drifting)
    config = tiny_config(tmp_path / "run", tiny_model(), ppo={"cycles": 1}, evaluate={"every": 0})
    run = tether.ppo(config, reward=id_score)
    assert run.metrics[0]["check/sampler_gap"] == pytest.approx(0.01, rel=1e-2)
    assert any("sampler gap" in e.get("what", "") for e in run.events)


def test_a_model_that_is_not_there_is_an_error(tiny_model, tmp_path):
    for model in ({"policy": "/nonsuch/model"}, {"reference": "/nonsuch/model"}, {"critic": "/nonsuch/model"}):
        config = tiny_config(tmp_path / "run", tiny_model(), model={"policy": str(tiny_model()), **model})
        with pytest.raises(ModelError, match="/nonsuch/model does not exist"):
            tether.ppo(config, reward=id_score)


def test_a_vocabulary_smaller_than_the_tokenizers_is_an_error(tiny_model, tmp_path):
    with pytest.raises(ModelError, match="embeddings end at id 199"):
        tether.ppo(tiny_config(tmp_path / "run", tiny_model(vocab_size=200)), reward=id_score)


def test_prompts_that_leave_no_room_to_answer_are_an_error(tiny_model, tmp_path):
    with pytest.raises(tether.ConfigError, match="leaves no room for a prompt in the model's context of 128"):
        tether.ppo(
            tiny_config(tmp_path / "run", tiny_model(), sampling={"max_new_tokens": 128, "stop_token_ids": None}),
            reward=id_score,
        )


def test_a_penalty_of_thousands_is_not_taken_for_a_misplaced_score():
    # β = 2,000 and log-ratios of 10 nats: float32 keeps 7 digits of 20,000, so the score is known to about 0.002
    old, ref = torch.full((2, 3), -1.0), torch.full((2, 3), -11.003)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    scores, lengths = torch.tensor([0.5, -0.25]), torch.tensor([3, 2])
    penalties = torch.where(mask, -2000.0 * (old - ref), 0.0)
    rewards = experience.place_rewards(scores, old, ref, mask, kl_coef=2000.0)
    experience._check_placement(rewards, penalties, scores, lengths)
    small = experience.place_rewards(scores, old, ref, mask, kl_coef=0.1)
    with pytest.raises(TrainingError, match="not on the last token"):
        experience._check_placement(small.roll(1, dims=1), penalties * 0.1 / 2000, scores, lengths)
