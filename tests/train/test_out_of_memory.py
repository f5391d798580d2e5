"""Memory that runs out is explained, reading numbers off the device is rare, and a long phase has a heartbeat."""

import json
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tether
from tether.config import PPOSection
from tether.errors import TrainingError
from tether.models.policy import Policy
from tether.samplers.local import LocalSampler
from tether.train import preamble, rollout
from tether.train.update import accumulate
from tether.types import Rollout
from tiny import language_model, ragged_rows
from tiny_ppo import id_score, tiny_config

TORCHS_WORDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.25 GiB is free."
)


def runs_out(*_, **__):
    raise torch.OutOfMemoryError(TORCHS_WORDS)


@pytest.mark.parametrize(
    ("owner", "name", "part", "knob"),
    [
        (LocalSampler, "generate", "sampling", "Lower sampling.slots"),
        (rollout.Policy, "forward", "valuing", "Lower ppo.microbatch_tokens (8,192 now)"),
        (torch.optim.AdamW, "step", "updating, epoch 1 of 2", "Lower ppo.microbatch_tokens (8,192 now)"),
        (rollout.RewardSet, "_answers", "scoring", "Set dtype: bfloat16 for the reward models"),
    ],
)
def test_cuda_out_of_memory_names_the_part_the_bytes_and_the_key_to_turn(
    tiny_model, tmp_path, monkeypatch, owner, name, part, knob
):
    monkeypatch.setattr(owner, name, runs_out)
    with pytest.raises(TrainingError) as caught:
        tether.ppo(tiny_config(tmp_path / "run", tiny_model(), evaluate={"every": 0}), reward=id_score)
    text = str(caught.value)
    assert f"CUDA out of memory while {part}: 2.00 GiB was asked for, and 1.25 GiB of 79.11 GiB are free." in text
    assert knob in text
    assert caught.value.exit_code == 1
    status = tether.Run.open(tmp_path / "run").status
    assert (status["state"], status["exit_reason"]) == ("failed", text)


def test_a_cpu_that_runs_out_of_memory_is_explained_too_and_no_other_error_is(tiny_model, tmp_path, monkeypatch):
    config = tiny_config(tmp_path / "run", tiny_model(), evaluate={"every": 0})
    monkeypatch.setattr(LocalSampler, "generate", lambda *_, **__: torch.empty(2**50, dtype=torch.int8))
    with pytest.raises(
        TrainingError, match=r"^Out of memory while sampling: 1125899906842624 bytes was asked for\. Lower"
    ):
        tether.ppo(config, reward=id_score)

    def fails(*_, **__):
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(LocalSampler, "generate", fails)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        tether.ppo(config, reward=id_score)


def test_the_status_has_heartbeats_while_a_reward_takes_long(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(preamble, "_BEAT_S", 0.1)
    file, beats = tmp_path / "run" / "status.json", []

    def slow(completion_ids, **_):
        if not beats:
            file.unlink()
            deadline = time.monotonic() + 60
            while not file.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            beats.append(json.loads(file.read_text())["state"])
        return id_score(completion_ids)

    run = tether.ppo(tiny_config(tmp_path / "run", tiny_model(), ppo={"cycles": 1}, evaluate={"every": 0}), reward=slow)
    assert beats == ["running"]
    assert run.status["state"] == "finished"


def test_rows_whose_tokens_are_on_a_device_are_cut_and_indexed_without_reading_from_it():
    """The meta device has no data: whatever reads from it raises."""
    rows = ragged_rows()
    there = rows.to(torch.device("meta"))
    part = there.select(torch.tensor([0, 2]))
    want = rows.select(torch.tensor([0, 2]))
    assert part.tokens.shape == want.tokens.shape
    assert part.response_mask.shape == want.response_mask.shape
    assert part.targets.shape == want.targets.shape


class ReadNumbers(TorchDispatchMode):
    """Counts the floating-point numbers that are read off tensors, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_metrics_of_a_step_are_read_at_once_however_many_microbatches_it_has():
    rows = ragged_rows()
    x = torch.zeros(rows.response_mask.shape)
    batch = Rollout(rows, x, x, x, x, x, x)
    ppo = PPOSection(cycles=1, batch=3, minibatch=3, responses_per_prompt=1, microbatch_tokens=1)
    with ReadNumbers() as read:
        metrics, _ = accumulate(Policy(language_model()), batch, ppo, kl_coef=0.0, temperature=1.0)
    assert read.count == 0
    assert all(isinstance(value, float) for value in metrics.values())
