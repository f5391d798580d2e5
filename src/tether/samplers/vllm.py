"""vLLM as the engine: a process beside the run samples, from weights that it is given after every cycle.

Tokens in, tokens out. Every response has a seed of its own, and vLLM draws a request's tokens from that seed alone:
what is sampled is a function of (seed, stream, cycle, response) and the weights, though not the tokens of the local
engine. A process that dies is started again, and the same request gives the same tokens.

Weights travel as a directory of safetensors. After every load a probe is scored by both sides: an engine with stale,
half-loaded or wrong weights ends the run.

Left out: weights over NCCL or CUDA IPC, a vLLM server that is running already.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tether.config import SamplingConfig
from tether.distributed.ranks import ALONE, Ranks
from tether.distributed.shard import whole
from tether.errors import EngineError, ModelError, TrainingError
from tether.models.export import CPU_HEADS, save_for_engine
from tether.models.language_model import LanguageModel
from tether.models.loading import context_length, head_size
from tether.runs.bounds import PROBE_GAP
from tether.samplers.local import count_slots, slot_bytes
from tether.samplers.uniforms import request_seed
from tether.samplers.vllm_probe import Answers, Probe, differing, read, score
from tether.samplers.vllm_process import (
    Installation,
    ProcessEnded,
    RequestFailed,
    VLLMProcess,
    find_installation,
    last_words,
)
from tether.types import Completions, Prompt, Sampling

_BLOCK = {"cpu": 128}  # tokens that are kept together, of vLLM; elsewhere 16
_LEAST_CONTEXT = 80  # positions that the engine has at least, where the model has them: for the probe


@dataclass(frozen=True, slots=True)
class Room:
    """How much the engine is asked at most, and where it may write."""

    folder: Path  # of its log and its weights; on several ranks, that of all of them
    responses: int  # of a cycle, or of an evaluation; on several ranks, of one of them
    tokens: int  # of the longest prompt and response together
    trust_remote_code: bool = False
    ranks: Ranks = ALONE  # each has an engine; rank 0 writes the weights for all


def check_vllm(config: SamplingConfig, architecture: Any) -> Installation:
    """What samples under `engine: vllm`. Raises ConfigError where there is none, ModelError where it refuses the model.

    architecture: the transformers config of the policy.
    """
    found = find_installation(config.vllm.python)
    size = head_size(architecture.get_text_config())
    if found.on_cpu and size not in CPU_HEADS:
        raise ModelError(
            f"attention heads have {size} dimensions, and vLLM on a CPU serves {', '.join(map(str, CPU_HEADS))}: it "
            "would refuse the policy. Set sampling.engine to local, or begin with another model."
        )
    return found


@dataclass(frozen=True, slots=True)
class Cache:
    """What the engine keeps of all rows that decode together."""

    width: int  # tokens of a row, at most
    slots: int  # rows
    bytes: int


def plan_cache(
    slots: int | str, responses: int, tokens: int, architecture: Any, dtype: torch.dtype, device: str
) -> Cache:
    """As much as all rows of `sampling.slots` take at their longest: none ever has to give way to another.

    responses, tokens: see `Room`. architecture: the transformers config. device: cpu or cuda.
    """
    text, block = architecture.get_text_config(), _BLOCK.get(device, 16)
    width = max(tokens, min(context_length(architecture) or tokens, _LEAST_CONTEXT))
    rows = count_slots(slots, responses, text, width, dtype, device)
    row, _ = slot_bytes(text, -(-width // block) * block, dtype)
    return Cache(width, rows, (rows + 1) * row)  # one more: vLLM keeps a block to itself


class VLLMSampler:
    """Samples in vLLM's process, from the weights that were loaded last."""

    def __init__(
        self, model: LanguageModel, config: SamplingConfig, room: Room, *, copied: bool = False,
        restarted: Callable[[str], None] = lambda why: None,
    ) -> None:  # fmt: skip
        """Nothing is started before weights are loaded.

        copied: write and score from a copy, as of a model whose weights will be cut into parts.
        restarted: told why, whenever the process has to be started again.
        """
        self._installation = check_vllm(config, model.hf_model.config)
        self._config, self._room, self._restarted = config, room, restarted
        self._model, self._copied, self._device = model, copied, model.device
        if copied:
            self._model = replace(model, lm=copy.deepcopy(model.lm).cpu())
        self._dtype = model.dtype if config.vllm.dtype == "auto" else getattr(torch, config.vllm.dtype)
        self._bound = PROBE_GAP["float32" if model.dtype == self._dtype == torch.float32 else "bfloat16"]
        self._process: VLLMProcess | None = None
        self._facts: dict[str, Any] = {}
        self._loads = self._version = 0
        self._before: Answers | None = None  # of the version before
        self.gaps = 0.0, 0.0  # nats, of the last probe: where a text is scored, where one is continued
        room.folder.mkdir(parents=True, exist_ok=True)
        self._remove_all()  # what a process that was killed has left

    @property
    def notes(self) -> list[str]:
        """What a run's log should say of it."""
        cut = "vLLM does not say how much top-k and top-p cut off: check/truncated_mass is empty"
        return [cut] if self._config.truncates else []

    @property
    def _weights(self) -> Path:
        return self._room.folder / f"weights-{self._loads}"

    @property
    def _log(self) -> Path:
        ranks = self._room.ranks
        return self._room.folder / (f"log-{ranks.rank}.txt" if ranks.size > 1 else "log.txt")

    @property
    def pid(self) -> int | None:
        """Of the process, where there is one."""
        return None if self._process is None else self._process.pid

    def load_weights(self, weights: LanguageModel, version: int = 0) -> None:
        """Hand over `weights` as they are now, and check by the probe that the engine has them."""
        if self._copied:
            with torch.no_grad():
                for ours, theirs in zip(self._model.lm.parameters(), weights.lm.parameters(), strict=True):
                    ours.copy_(whole(theirs))
        else:
            self._model = weights
        old, was = self._weights, self._version
        self._loads, self._version = self._loads + 1, version
        self._room.ranks.first(lambda: self.write(self._weights))
        if self._process is None:
            self._start()
        else:
            self._ask(do="load", path=str(self._weights))
        self.verify(old, was)
        self._remove(old)

    def write(self, directory: Path) -> None:
        """The weights, for the engine. In a new directory each time: it may keep what it read from an old path."""
        save_for_engine(self._model, directory, self._dtype)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, cycle: int, first: int = 0) -> Completions:
        """Draw `responses_per_prompt` responses to each prompt, in the prompts' order; see `tether.types.Sampler`."""
        s = sampling
        asked = [p for p in prompts for _ in range(s.responses_per_prompt)]
        rows = [
            {"prompt": p.ids, "seed": request_seed(s.seed, s.stream, cycle, row), "temperature": s.temperature,
             "top_k": s.top_k, "top_p": s.top_p, "max_tokens": s.max_new_tokens,
             "stop_token_ids": s.stop_token_ids, "ignore_eos": True}
            for row, p in enumerate(asked, start=first)
        ]  # fmt: skip
        answer = self._ask(do="generate", rows=rows, salt=self.salt(f"{s.stream}.{cycle}"))
        if not all(math.isfinite(x) for row in answer["logprobs"] for x in row):
            raise TrainingError(
                "vLLM's log-probs are not finite: no token can be drawn from such logits. If training broke the model, "
                "lower optim.lr and start over with --fresh (a run that continues keeps its settings)."
            )
        stops = set(s.stop_token_ids)
        unknown = math.nan if self._config.truncates else 0.0  # vLLM does not say how much it cut off
        return Completions(
            prompts=asked,
            response_ids=answer["ids"],
            sampler_logprobs=answer["logprobs"],
            truncated_mass=[[unknown] * len(ids) for ids in answer["ids"]],
            finish_reasons=["stop" if ids[-1] in stops else "length" for ids in answer["ids"]],
        )

    def salt(self, use: str) -> str:
        """Keys and values that were cached under another salt are not read. Weights that change leave them where they
        are (vllm#46125); and what one use left for the next, a resumed run would not find."""
        return f"{self._version}.{use}"

    def close(self) -> None:
        """End the process, and remove the weights that were written for it."""
        if self._process is not None:
            self._process.close()
            self._process = None
        self._remove_all()

    def _remove_all(self) -> None:
        for directory in self._room.folder.glob("weights-*"):  # two where a load failed
            self._remove(directory)

    def _remove(self, directory: Path) -> None:
        if self._room.ranks.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)

    # ------------------------------------------------------------ the process

    def _ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request; from a process that was started again, where it ended meanwhile."""
        again = False
        while True:
            try:
                if self._process is None:
                    self._start()
                    if request["do"] == "load":
                        return {}
                assert self._process is not None
                return self._process.ask(**request)
            except RequestFailed as error:
                raise EngineError(f"vLLM failed ({error}); {self._log} has all that it said.") from error
            except ProcessEnded as ended:
                self._process = None
                if again:
                    raise EngineError(
                        f"{ended} twice in a row, the last time saying: {last_words(self._log)}. {self._log} has the "
                        "rest. Was there enough memory? sampling.slots is how many responses it decodes at once."
                    ) from ended
                again = True
                self._restarted(f"{ended}: it is started again, and asked the same")

    def _start(self) -> None:
        """Start the process with the weights that were written last, and look at what it says of them."""
        model, room = self._model, self._room
        device = self._device.type
        cache = plan_cache(self._config.slots, room.responses, room.tokens, model.hf_model.config, self._dtype, device)
        arguments = {
            "max_num_seqs": cache.slots,
            "kv_cache_memory_bytes": cache.bytes,
            **({"enforce_eager": True} if device == "cpu" else {}),  # compiling takes longer than it saves
            "disable_log_stats": True,
            **self._config.vllm.arguments,
            "model": str(self._weights),
            "max_model_len": cache.width,
            "dtype": str(self._dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "seed": 0,  # of what has no seed: nothing
            # Both are of the whole vocabulary where nothing is truncated; where something is, the temperature is 1.
            "logprobs_mode": "raw_logprobs" if self._config.truncates else "processed_logprobs",
            "trust_remote_code": room.trust_remote_code,
            **({"hf_overrides": {"head_dtype": "float32"}} if self._dtype != torch.float32 else {}),
        }
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if arguments.get("enforce_eager"):
            environment["TORCHDYNAMO_DISABLE"] = "1"  # else some functions are compiled at the first request
        process = VLLMProcess(self._installation.python, self._log, **environment | _visible(self._device))
        try:
            self._facts = process.ask(do="start", arguments=arguments)
        except RequestFailed as error:
            process.close()
            raise ModelError(
                f"vLLM {self._installation.version} does not start with this model ({error}); {self._log} has all that "
                "it said. Set sampling.engine to local, or change sampling.vllm.arguments."
            ) from error
        except ProcessEnded as ended:
            raise EngineError(
                f"{ended} while it started, and said: {last_words(self._log)}; {self._log} has the rest."
            ) from ended
        self._process = process
        for name, want in (("vocabulary", model.config.vocab_size), ("dtype", arguments["dtype"]),
                           ("version", self._installation.version)):  # fmt: skip
            if self._facts[name] != want:
                self.close()
                raise ModelError(
                    f"vLLM's {name} is {self._facts[name]}, and the policy's is {want}: its samples would be of "
                    f"another model. Look at {self._log}, or set sampling.engine to local."
                )

    # ------------------------------------------------------------ the probe

    def verify(self, old: Path, was: int) -> None:
        """Raise TrainingError unless the engine gives the probe's tokens the log-probs that the trainer gives them.

        old, was: directory and version of the weights before."""
        probe = Probe.of(self._model.config.vocab_size, longest=self._facts["longest"], block=self._facts["block"])
        rows, temperature = probe.rows(self._config.temperature), self._config.temperature
        engine = read(self._ask(do="generate", rows=rows, salt=self.salt("probe")))
        trainer = score(self._model, probe, engine.drawn, temperature)
        self.gaps = gaps = engine.gaps(trainer)
        if max(gaps) <= self._bound:
            self._before = trainer
            return
        what = differing(self._model, probe, engine, self._before, old, was, self._bound)
        raise TrainingError(
            f"vLLM samples from other weights than the policy's of version {self._version}: on a fixed probe its "
            f"log-probs are off by up to {gaps[0]:.2g} nats where a text is scored, by {gaps[1]:.2g} where one is "
            f"continued, and {self._bound:g} is allowed. {what} Set sampling.engine to local, and please report it."
        )


def _visible(device: torch.device) -> dict[str, str]:
    """Of several GPUs, vLLM takes the one that the policy is on."""
    if device.type != "cuda" or device.index is None:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[device.index] if visible else str(device.index)}
