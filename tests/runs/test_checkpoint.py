"""Checkpoints: killed while writing, damaged on disk, out of space; an optimizer that goes on as if never stopped."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tether.errors import RunError
from tether.train import checkpoint

SAVE_AND_HANG = """
import sys, time
from pathlib import Path
from tether.train import checkpoint

def write(folder):
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"half of the weig")
    print("writing")
    time.sleep(60)

checkpoint.save(Path(sys.argv[1]), "cycle-000020", {"cycle": 20}, write)
"""

SAVE_FOREVER = """
import sys
from pathlib import Path
from tether.train import checkpoint

cycle = 0
while True:
    cycle += 1
    data = bytes([cycle % 256]) * 100_000
    checkpoint.save(Path(sys.argv[1]), f"cycle-{cycle:06d}", {"cycle": cycle},
                    lambda folder: [(folder / name).write_bytes(data) for name in "abcd"])
    print(cycle)
"""


def two_files(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(b"weights")
    (folder / "rng.safetensors").write_bytes(b"random")


def saved(run: Path, *cycles: int, keep: int = 2) -> None:
    for cycle in cycles:
        checkpoint.save(run, f"cycle-{cycle:06d}", {"cycle": cycle, "kl_coef": 0.1 + cycle / 3}, two_files, keep=keep)


def entries(run: Path) -> list[str]:
    """Everything in the folder, what is hidden too."""
    return sorted(file.name for file in (run / "checkpoints").iterdir())


def damage(file: Path) -> None:
    """Flip one bit in the middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def silent(message: str) -> None:
    raise AssertionError(f"fell back: {message}")


# ---------------------------------------------------------------- saved and found


def test_the_newest_is_found_with_its_state(tmp_path):
    saved(tmp_path, 10, 20)
    path, state = checkpoint.latest(tmp_path, silent)
    assert path == tmp_path / "checkpoints" / "cycle-000020"
    assert state == {"cycle": 20, "kl_coef": 0.1 + 20 / 3}  # a float comes back bit for bit
    assert (path / "policy" / "model.safetensors").read_bytes() == b"weights"


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert checkpoint.latest(tmp_path, silent) is None


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 9, 10, 100, 101, keep=3)
    assert checkpoint.names(tmp_path) == ["cycle-000010", "cycle-000100", "cycle-000101"]


def test_the_millionth_cycle_is_newer_than_the_one_before(tmp_path):
    for cycle in (999_998, 999_999, 1_000_000):
        checkpoint.save(tmp_path, f"cycle-{cycle:06d}", {"cycle": cycle}, lambda folder: None)
    assert checkpoint.names(tmp_path) == ["cycle-999999", "cycle-1000000"]
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[1] == {"cycle": 1_000_000}


def test_state_json_names_every_file_with_its_sha256(tmp_path):
    saved(tmp_path, 1)
    sealed = json.loads((tmp_path / "checkpoints" / "cycle-000001" / "state.json").read_text())
    assert sealed["schema"] == 1
    assert sealed["files"] == {  # from coreutils: printf weights | sha256sum
        "policy/model.safetensors": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
        "rng.safetensors": "a441b15fe9a3cf56661190a0b93b9dec7d04127288cc87250967cf3b52894d11",
    }


def test_saving_the_same_cycle_again_writes_nothing_if_it_is_whole_and_replaces_it_if_damaged(tmp_path):
    saved(tmp_path, 10, 20)
    checkpoint.save(tmp_path, "cycle-000020", {"again": 1}, lambda folder: pytest.fail("written again"))
    damage(tmp_path / "checkpoints" / "cycle-000020" / "rng.safetensors")
    checkpoint.save(tmp_path, "cycle-000020", {"again": 2}, two_files)
    assert checkpoint.names(tmp_path) == ["cycle-000010", "cycle-000020"]
    assert checkpoint.latest(tmp_path, silent)[1] == {"again": 2}


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("damaged", [False, True])
def test_at_no_moment_of_saving_again_is_a_run_without_a_whole_checkpoint(tmp_path, monkeypatch, keep, damaged):
    saved(tmp_path, *([10, 20] if damaged else [20]))
    if damaged:
        damage(tmp_path / "checkpoints" / "cycle-000020" / "rng.safetensors")

    def watched(change):
        def and_look(*args, **kwargs):
            result = change(*args, **kwargs)
            assert checkpoint.latest(tmp_path, lambda told: None) is not None
            return result

        return and_look

    monkeypatch.setattr(Path, "rename", watched(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", watched(shutil.rmtree))
    saved(tmp_path, 20, keep=keep)
    assert checkpoint.latest(tmp_path, silent)[1]["cycle"] == 20


# ---------------------------------------------------------------- damaged


@pytest.mark.parametrize("file", ["policy/model.safetensors", "rng.safetensors", "state.json"])
def test_one_flipped_bit_is_noticed_its_file_named_and_the_one_before_used(tmp_path, file):
    saved(tmp_path, 10, 20)
    damage(tmp_path / "checkpoints" / "cycle-000020" / file)
    told = []
    path, state = checkpoint.latest(tmp_path, told.append)
    assert (path.name, state["cycle"]) == ("cycle-000010", 10)
    assert len(told) == 1
    for word in ("cycle-000020", file, "continuing from cycle-000010"):
        assert word in told[0]


@pytest.mark.parametrize("file", ["policy/model.safetensors", "state.json"])
def test_a_missing_file_is_noticed_and_named(tmp_path, file):
    saved(tmp_path, 10, 20)
    (tmp_path / "checkpoints" / "cycle-000020" / file).unlink()
    told = []
    assert checkpoint.latest(tmp_path, told.append)[1]["cycle"] == 10
    assert f"{file} is missing" in told[0]


def test_when_all_are_damaged_it_does_not_begin_anew_in_silence(tmp_path):
    saved(tmp_path, 10, 20)
    for name in checkpoint.names(tmp_path):
        damage(tmp_path / "checkpoints" / name / "rng.safetensors")
    with pytest.raises(RunError, match=r"cycle-000020 is damaged .*cycle-000010 is damaged .*no other is intact"):
        checkpoint.latest(tmp_path)


def test_a_damaged_one_does_not_take_the_place_of_an_intact_one(tmp_path):
    saved(tmp_path, 10, 20)
    damage(tmp_path / "checkpoints" / "cycle-000020" / "state.json")
    saved(tmp_path, 15)  # the run went on from 10, and now saves more often
    assert checkpoint.names(tmp_path) == ["cycle-000010", "cycle-000015"]


# ---------------------------------------------------------------- killed


def test_a_process_killed_while_it_writes_leaves_the_one_before(tmp_path, start):
    saved(tmp_path, 10)
    process = start(SAVE_AND_HANG, tmp_path)
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.latest(tmp_path, silent)[1]["cycle"] == 10
    saved(tmp_path, 20)
    assert entries(tmp_path) == ["cycle-000010", "cycle-000020"]  # what it left is gone


def test_killed_at_any_moment_the_newest_finished_one_is_intact(tmp_path, start):
    for i in range(3):
        run = tmp_path / str(i)
        run.mkdir()
        process = start(SAVE_FOREVER, run)
        assert process.stdout.readline() == "1\n"
        time.sleep(0.017 * i)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        last_reported = int(rest[-1]) if rest else 1
        _, state = checkpoint.latest(run, silent)
        assert state["cycle"] in (last_reported, last_reported + 1)


# ---------------------------------------------------------------- failed


def test_a_full_disk_leaves_the_one_before_and_says_so(small_disk):
    saved(small_disk, 10)

    def large(folder: Path) -> None:
        (folder / "weights").write_bytes(os.urandom(10**6))

    with pytest.raises(RunError, match=r"could not be written .*No space left.* cycle-000010 is intact") as full:
        checkpoint.save(small_disk, "cycle-000020", {}, large)
    assert full.value.exit_code == 1
    assert entries(small_disk) == ["cycle-000010"]
    assert checkpoint.latest(small_disk, silent)[1]["cycle"] == 10
    saved(small_disk, 20)  # the space it took is free again


def tensors(folder: Path) -> None:
    save_file({"w": torch.zeros(10**6)}, folder / "model.safetensors")


def model(folder: Path) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=5000, n_embd=64, n_layer=1, n_head=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("write", [tensors, model])
def test_a_disk_that_fills_up_inside_another_library_is_said_the_same_way(small_disk, write):
    with pytest.raises(RunError, match="No space left"):
        checkpoint.save(small_disk, "cycle-000020", {}, write)
    assert entries(small_disk) == []


def test_a_mistake_in_the_writer_passes_through_and_leaves_nothing(tmp_path):
    saved(tmp_path, 10)

    def broken(folder: Path) -> None:
        two_files(folder)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path, "cycle-000020", {}, broken)
    assert entries(tmp_path) == ["cycle-000010"]


# ---------------------------------------------------------------- the optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def adam(model: nn.Module, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, *, only: Callable | None = None) -> None:
    for step in steps:
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        (only or (lambda m, x: m(x)))(model, x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_training_goes_on_bit_for_bit_after_save_and_load(tmp_path, options):
    whole = network()
    optimizer = adam(whole, **options)
    train(whole, optimizer, range(20))

    first = network()
    optimizer = adam(first, **options)
    train(first, optimizer, range(7))
    save_file(checkpoint.optimizer_tensors(optimizer, first.named_parameters()), tmp_path / "optimizer.safetensors")
    second = network()
    second.load_state_dict(first.state_dict())
    optimizer = adam(second, **options)
    checkpoint.load_optimizer(optimizer, second.named_parameters(), tmp_path / "optimizer.safetensors")
    train(second, optimizer, range(7, 20))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_a_parameter_that_was_never_trained_has_no_moments_after_loading_either(tmp_path):
    model = network()
    optimizer = adam(model)
    train(model, optimizer, range(3), only=lambda m, x: m[2](m[0](x).detach()))
    save_file(checkpoint.optimizer_tensors(optimizer, model.named_parameters()), tmp_path / "o.safetensors")
    assert sorted({name.rpartition(".")[0] for name in load_file(tmp_path / "o.safetensors")}) == ["2.bias", "2.weight"]
    again = network()
    optimizer = adam(again)
    checkpoint.load_optimizer(optimizer, again.named_parameters(), tmp_path / "o.safetensors")
    assert set(optimizer.state) == {again[2].weight, again[2].bias}


def test_moments_of_another_model_are_refused_by_name(tmp_path):
    model = network()
    optimizer = adam(model)
    train(model, optimizer, range(1))
    file = tmp_path / "o.safetensors"
    save_file(checkpoint.optimizer_tensors(optimizer, model.named_parameters()), file)
    shorter = nn.Sequential(nn.Linear(5, 7))
    with pytest.raises(RunError, match=r"has moments of 2\.\w+\.\w+, which the model has not"):
        checkpoint.load_optimizer(adam(shorter), shorter.named_parameters(), file)
    wider = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(RunError, match=r"0\.weight is \[7, 5\] there and \[8, 5\] in the model"):
        checkpoint.load_optimizer(adam(wider), wider.named_parameters(), file)
