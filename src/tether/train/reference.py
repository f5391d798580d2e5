"""What the frozen reference gives fixed responses: computed once, before the first step, and kept with the run.

The policy as it is loaded *is* the reference, unless the config names another one, so no second model is held: this is
called before a checkpoint is put back into it. The arithmetic is that of training, so the first log-ratios are 0 up to
rounding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tether.config import ReferencedModelConfig
from tether.distributed.ranks import ALONE, Ranks
from tether.models.language_model import LanguageModel
from tether.models.policy import companions, load_reference
from tether.runs import RunDirectory
from tether.runs.files import replacing, wrap_os_errors
from tether.train.log import say
from tether.types import Rows, microbatches

FILE = "reference.safetensors"  # in the run directory

Response = tuple[Sequence[int], Sequence[int]]  # ids of a prompt, and of what follows it


def reference_logprobs(
    run: RunDirectory, model: LanguageModel, config: ReferencedModelConfig, responses: Sequence[Response],
    inputs: Mapping[str, str], *, temperature: float = 1.0, microbatch_tokens: int, ranks: Ranks = ALONE,
) -> list[Tensor]:  # fmt: skip
    """[R] of each response: the reference's log-prob of every token, nats, on the CPU.

    Read back from the run directory where they are there, for the same weights, ids, precision and temperature; else
    computed, and written there.

    model   the policy as it was loaded: before any step or checkpoint. Under LoRA its adapter is turned off.
    inputs  hashes of what the run reads, `model.policy` and perhaps `model.reference` among them.
    ranks   rank 0 computes, for all.
    """
    lengths = [len(response) for _, response in responses]
    compute = partial(_kept_or_computed, run, model, config, responses, inputs)
    together = ranks.first(lambda: compute(temperature=temperature, microbatch_tokens=microbatch_tokens))
    return list(together.split(lengths))


def _kept_or_computed(
    run: RunDirectory, model: LanguageModel, config: ReferencedModelConfig, responses: Sequence[Response],
    inputs: Mapping[str, str], *, temperature: float, microbatch_tokens: int,
) -> Tensor:  # fmt: skip
    """[N] of all responses, one after the other."""
    key = _key(responses, inputs.get("model.reference", inputs["model.policy"]), model, temperature)
    file = run.path / FILE
    if (kept := _read(file, key)) is not None:
        return kept
    if file.exists():
        run.event("reference_computed_again", file=file.name)
        say(f"{file} is damaged, or not of this model and data: the reference's log-probs are computed again")
    run.phase = "computing the reference's log-probs"
    companions(config)
    reference = model
    if config.reference is not None:
        reference = load_reference(config.reference, model, trust_remote_code=config.trust_remote_code)
        if note := reference.check_head():
            run.event("fallback", what=note)
            say(note)
    found: list[Tensor] = [torch.empty(0)] * len(responses)
    with torch.no_grad(), reference.without_adapter():
        for index in microbatches([len(p) + len(r) for p, r in responses], microbatch_tokens):
            batch = [responses[i] for i in index.tolist()]
            rows = Rows.of([p for p, _ in batch], [r for _, r in batch]).to(model.device)
            logprobs, _, _ = reference.response_logprobs(rows, temperature=temperature, entropy=False)
            parts = logprobs.cpu().split([len(r) for _, r in batch])
            for i, part in zip(index.tolist(), parts, strict=True):
                found[i] = part
    together = torch.cat(found)  # 4 bytes per token
    with wrap_os_errors(file), replacing(file) as partial:
        save_file({"logprobs": together}, partial, {"key": key, "sha256": _digest(together)})
    return together


def _key(responses: Sequence[Response], weights: str, model: LanguageModel, temperature: float) -> str:
    """Hash of all that the log-probs depend on."""
    digest = hashlib.sha256(f"{weights} {model.hf_model.dtype} {model.dtype} {temperature!r}".encode())
    for prompt, response in responses:
        ids = torch.tensor([len(prompt), len(response), *prompt, *response], dtype=torch.int64)
        digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, key: str) -> Tensor | None:
    """[N] of all responses, one after the other; None where the file is missing, damaged or not of this key."""
    try:
        with safe_open(file, framework="pt") as stored:
            metadata, logprobs = stored.metadata() or {}, stored.get_tensor("logprobs")
    except (OSError, SafetensorError):
        return None
    whole = metadata.get("key") == key and metadata.get("sha256") == _digest(logprobs)
    return logprobs if whole else None


def _digest(logprobs: Tensor) -> str:
    return hashlib.sha256(logprobs.numpy().tobytes()).hexdigest()
