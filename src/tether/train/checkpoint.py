"""Checkpoints that survive anything: written beside, checksummed, fsynced, renamed.

A checkpoint is a directory, `checkpoints/cycle-000050/`, whose `state.json` holds the trainer's small state and the
sha256 of every other file. A process killed while writing leaves `.cycle-000050.partial`, which nobody reads and the
next save removes. Tensors are safetensors, the rest is JSON: nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tether.distributed.shard import like, whole
from tether.errors import ModelError, RunError, first_line
from tether.models.loading import load_weights, quiet_transformers
from tether.runs.files import SCHEMA, damaged_file, file_hashes, is_os_error, replacing_directory, sync
from tether.train.optim import Named

_ADAM = ("exp_avg", "exp_avg_sq", "step")


def save(run: Path, name: str, state: dict[str, Any], write: Callable[[Path], None], *, keep: int = 2) -> Path:
    """Write checkpoint `name`, such as "cycle-000050", and drop all but the newest `keep`.

    state: what JSON can hold. write: called with an empty directory to put the files in.
    One that is there and whole is not written again: to replace it would leave an instant without it. On any failure
    the directory is as before; a full disk is a RunError.
    """
    folder = Path(run) / "checkpoints"
    target = folder / name
    if _is_whole(target):
        _drop_all_but(keep, name, folder)
        return target
    try:
        folder.mkdir(exist_ok=True)
        _remove_hidden(folder)
        with replacing_directory(target) as partial:
            write(partial)
            body = {"schema": SCHEMA, "state": state, "files": file_hashes(partial)}
            sealed = json.dumps(body | {"sha256": _digest(body)}, indent=2)
            (partial / "state.json").write_text(sealed, encoding="utf-8")
            sync(Path(run) / "metrics.jsonl")  # a checkpoint must not outlive the metrics that led to it
    except Exception as error:
        if not is_os_error(error):
            raise
        kept = names(run)
        failure = RunError(
            f"checkpoint {target} could not be written ({error}): the run cannot go on safely. "
            + (f"{kept[-1]} is intact. " if kept else "There is none before it. ")
            + "Free some space and run the same command again to continue."
        )
        failure.exit_code = 1  # the machine's state, not a mistake in what the user typed
        raise failure from error
    finally:
        _remove_hidden(folder)
    _drop_all_but(keep, name, folder)
    return target


def _drop_all_but(keep: int, newest: str, folder: Path) -> None:
    """Keep `newest` and the `keep - 1` before it. What is newer is damaged: the run was continued from before it."""
    present = names(folder.parent)
    end = present.index(newest) + 1
    for name in set(present) - set(present[max(0, end - keep) : end]):
        (folder / name).rename(folder / f".{name}.dropped")  # at once, so that no half of it is taken for a checkpoint
    _remove_hidden(folder)


def latest(run: Path, on_fallback: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
    """(directory, state) of the newest checkpoint whose every checksum matches; None if there is none at all.

    on_fallback: told of each damaged checkpoint that is passed over, with the file that is damaged.
    """
    damaged: list[str] = []
    for name in reversed(names(run)):
        path = Path(run) / "checkpoints" / name
        try:
            state = _open_seal(path)
        except (OSError, ValueError) as error:
            damaged.append(f"checkpoint {path} is damaged ({error})")
            continue
        for what in damaged:
            on_fallback(f"{what}: continuing from {name} instead.")
        return path, state
    if damaged:
        raise RunError(
            f"{'; '.join(damaged)}; no other is intact: there is nothing to continue from. Restore the file from a "
            "copy, or add --fresh to move the run aside and start over."
        )
    return None


def names(run: Path) -> list[str]:
    """The checkpoints of a run, oldest first."""
    folder = Path(run) / "checkpoints"
    there = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.exists() else []
    return sorted(there, key=lambda name: (_number(name), name))


def _number(name: str) -> int:
    """What stands at the end of a name: as text, cycle-1000000 would come before cycle-999999."""
    found = re.search(r"[0-9]+$", name)
    return int(found[0]) if found else -1


# ---------------------------------------------------------------- weights and optimizer


def save_weights(model: Any, directory: Path) -> None:
    """Write a transformers model or a peft model's adapter; any other module, a head, becomes DIRECTORY.safetensors."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    if not hasattr(model, "save_pretrained"):
        save_file(dict(model.state_dict()), directory.with_suffix(".safetensors"))
        return
    with quiet_transformers():
        model.save_pretrained(directory)


def restore_weights(model: Any, directory: Path) -> None:
    """Read back what `save_weights` wrote, in place and bit for bit."""
    if not hasattr(model, "save_pretrained"):
        model.load_state_dict(load_file(directory.with_suffix(".safetensors")))
        return
    if not hasattr(model, "peft_config"):
        load_weights(model, directory)
        return
    from peft import set_peft_model_state_dict

    file = directory / "adapter_model.safetensors"
    try:
        result: Any = set_peft_model_state_dict(model, load_file(file))
    except RuntimeError as error:  # of another shape
        raise ModelError(f"{file} does not fit the adapter: {first_line(error)}. Was it edited?") from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for names, what in ((trained.intersection(result.missing_keys), "lacks"), (result.unexpected_keys, "has besides")):
        if names:
            raise ModelError(
                f"{file} does not fit the adapter: it {what} {min(names)}, and training would go on with other weights "
                "than it stopped with. Continue with the model and the model.lora that the run began with."
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer, named_parameters: Named) -> dict[str, Tensor]:
    """AdamW's moments and step counts by name, for a safetensors file; learning rates follow from the steps that are
    done. Of weights that lie in parts every rank calls; they are put together on the CPU."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        moments = optimizer.state.get(parameter, {})  # empty for a parameter that never had a gradient
        tensors |= {f"{name}.{key}": _put_together(moments[key]) for key in _ADAM if key in moments}
    return tensors


def _put_together(moment: Tensor) -> Tensor:
    tensor = whole(moment.detach())
    return tensor.contiguous() if tensor.is_cpu or not hasattr(moment, "full_tensor") else tensor.cpu()


def load_optimizer(optimizer: torch.optim.Optimizer, named_parameters: Named, path: Path) -> None:
    """Put back `optimizer_tensors`, bit for bit; raises RunError if the parameters are not the same."""
    tensors = load_file(path)
    steps_on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    for name, parameter in named_parameters:
        if f"{name}.step" not in tensors:
            optimizer.state.pop(parameter, None)
            continue
        moments = {key: tensors.pop(f"{name}.{key}").to(parameter.device) for key in _ADAM}
        if moments["exp_avg"].shape != parameter.shape:
            raise RunError(
                f"{path}: {name} is {list(moments['exp_avg'].shape)} there and {list(parameter.shape)} in the model: "
                "the moments belong to another model. Continue with the model that the run began with."
            )
        moments = {key: m if key == "step" else like(m, parameter) for key, m in moments.items()}
        if not steps_on_device:
            moments["step"] = moments["step"].cpu()
        optimizer.state[parameter] = moments
    if tensors:
        raise RunError(
            f"{path} has moments of {next(iter(tensors))}, which the model has not: they belong to another model. "
            "Continue with the model that the run began with."
        )


def _open_seal(folder: Path) -> dict[str, Any]:
    try:
        body = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        sealed = body.pop("sha256") == _digest(body)
    except FileNotFoundError:
        raise ValueError("state.json is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sealed = False
    if not sealed:
        raise ValueError("the checksum of state.json does not match")
    if problem := damaged_file(folder, body["files"]):
        raise ValueError(problem)
    state: dict[str, Any] = body["state"]
    return state


def _is_whole(folder: Path) -> bool:
    try:
        _open_seal(folder)
    except (OSError, ValueError):
        return False
    return True


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _remove_hidden(folder: Path) -> None:
    """What was begun and not finished, replaced or dropped."""
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
