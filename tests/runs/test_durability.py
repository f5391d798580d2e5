"""What is renamed into place is on the disk before, seen in the order of the system calls of the real functions."""

import os
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tether.models.export import save_model
from tether.models.language_model import LanguageModel
from tether.models.reward_model import init_reward_model, save_reward_model
from tether.runs import RunDirectory
from tether.runs.files import replacing_directory, write_atomically, write_sums, write_table
from tether.train import checkpoint


@dataclass
class Calls:
    """Inodes that were fsynced, and for every rename whether all that it moved had been."""

    synced: set[int] = field(default_factory=set)
    renamed: list[str] = field(default_factory=list)
    unsynced: list[str] = field(default_factory=list)  # moved into a visible place before the disk had them
    unsettled: set[int] = field(default_factory=set)  # folders whose new names the disk does not have yet


@pytest.fixture
def calls(monkeypatch) -> Calls:
    seen = Calls()
    real_sync = os.fsync

    def fsync(handle: int) -> None:
        real_sync(handle)
        seen.synced.add(os.fstat(handle).st_ino)
        seen.unsettled.discard(os.fstat(handle).st_ino)

    def watched(rename: Callable) -> Callable:
        def renaming(source, target, **options) -> None:
            source, target = Path(source), Path(target)
            if not target.name.startswith("."):  # what is put aside is on its way out
                seen.renamed.append(target.name)
                for path in [source, *source.rglob("*")]:
                    if stat.S_ISREG(path.stat().st_mode) and path.stat().st_ino not in seen.synced:
                        seen.unsynced.append(str(path))
                seen.unsettled.add(target.parent.stat().st_ino)
            rename(source, target, **options)

        return renaming

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(os, "rename", watched(os.rename))
    return seen


def a_model(tiny_model) -> tuple[LanguageModel, AutoTokenizer]:
    path = tiny_model("llama")
    lm = AutoModelForCausalLM.from_pretrained(path).eval()
    return LanguageModel(lm, torch.float32), AutoTokenizer.from_pretrained(path)


def a_policy(folder: Path, tiny_model) -> None:
    model, tokenizer = a_model(tiny_model)
    save_model(model, tokenizer, folder / "final", card="", add=lambda place: (place / "more").write_text("x"))


def a_reward_model(folder: Path, tiny_model) -> None:
    path = tiny_model("llama")
    where = {"revision": None, "trust_remote_code": False}
    cpu, f32 = torch.device("cpu"), torch.float32
    model = init_reward_model(str(path), dtype=f32, weights_dtype=f32, device=cpu, seed=0, **where)
    save_reward_model(model, AutoTokenizer.from_pretrained(path), folder / "final", stop_id=1)


WRITERS = {
    "a text": (lambda folder, _: write_atomically(folder / "status.json", "{}"), "status.json"),
    "a table": (lambda folder, _: write_table(folder / "rows.parquet", {"a": [1]}), "rows.parquet"),
    "a checkpoint": (
        lambda folder, _: checkpoint.save(folder, "cycle-1", {}, lambda place: (place / "w").write_text("x")), "cycle-1"
    ),
    "a policy": (a_policy, "final"),
    "a reward model": (a_reward_model, "final"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRITERS)
def test_every_file_is_fsynced_before_it_is_renamed_and_its_folder_after(what, calls, tiny_model, tmp_path):
    write, name = WRITERS[what]
    write(tmp_path, tiny_model)
    assert name in calls.renamed
    assert calls.unsynced == []
    assert calls.unsettled == set()


def test_a_run_directory_renames_nothing_that_is_not_on_the_disk(config, calls):
    with RunDirectory.open(config, command="ppo") as run:
        run.append_metrics({"cycle": 1})
        run.write_rollouts(1, {"cycle": [1]})
        run.truncate_after(1)
    assert {"config.yaml", "environment.json", "status.json", "metrics.jsonl"} < set(calls.renamed)
    assert calls.unsynced == []
    assert calls.unsettled == set()


def test_what_is_sealed_passes_the_check_of_coreutils(tmp_path, tiny_model):
    a_policy(tmp_path, tiny_model)
    done = subprocess.run(
        ["sha256sum", "--check", "SHA256SUMS"], cwd=tmp_path / "final", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: OK" in done.stdout
    assert "more: OK" in done.stdout


def test_a_block_that_fails_leaves_the_old_directory_and_nothing_beside_it(tmp_path):
    with replacing_directory(tmp_path / "final") as folder:
        (folder / "w").write_text("old")
        write_sums(folder)
    with pytest.raises(ZeroDivisionError), replacing_directory(tmp_path / "final") as folder:
        (folder / "w").write_text(str(1 / 0))
    assert (tmp_path / "final" / "w").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_a_rename_that_fails_puts_the_old_directory_back(tmp_path, monkeypatch):
    with replacing_directory(tmp_path / "final") as folder:
        (folder / "w").write_text("old")
    real = os.replace

    def once_refused(source, target):
        if Path(source).name == ".final.partial":
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", once_refused)
    with pytest.raises(OSError, match="Input/output"), replacing_directory(tmp_path / "final") as folder:
        (folder / "w").write_text("new")
    assert (tmp_path / "final" / "w").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_saving_a_model_leaves_the_one_in_memory_as_it_was(tmp_path, tiny_model):
    model, tokenizer = a_model(tiny_model)
    before = model.hf_model.generation_config.to_dict()
    save_model(model, tokenizer, tmp_path / "final", card="", temperature=0.5, max_new_tokens=7, stop_ids=(3, 4))
    assert model.hf_model.generation_config.to_dict() == before
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final").generation_config
    assert (again.temperature, again.eos_token_id) == (0.5, [3, 4])
