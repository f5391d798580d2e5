"""A pool of samplers: Ray actors, each with a local engine, on this machine or all over a cluster.

A cycle's prompts are cut into as many parts as there are workers. Every draw is a function of seed, cycle, response and
token (see `tether.samplers.uniforms`), so whoever draws a response draws the same tokens: those of the local engine but
for rounding, and from a worker that took the place of a dead one the same to the bit. The learner is a process of its
own, or several under torchrun, and no actor: nothing that happens to a worker happens to it. Ray's head is another
matter: where that dies, Ray ends the learner within a minute or so.

Weights are put into Ray's store once after every update, from where each node fetches them once. A request says which
load it is for, and a worker that has another fetches it first.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tether.config import PoolConfig, SamplingConfig
from tether.distributed.ranks import ALONE, Ranks
from tether.distributed.shard import whole
from tether.errors import ConfigError, EngineError, ModelError, TetherError, first_line, last_line
from tether.models.language_model import LanguageModel
from tether.samplers.local import why_not_cached
from tether.samplers.pool_worker import Part, PoolWorker, Stored, packed, versions
from tether.types import Completions, Prompt, Sampling

_RETRIES = 3  # of a part of a cycle whose worker died: more is a fault that another try does not mend
_ADDRESS = "RAY_ADDRESS"  # set by `ray job submit`


def check_pool(config: PoolConfig, ranks: Ranks = ALONE) -> None:
    """Raise ConfigError where there can be no pool; nothing is started."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "sampling.engine=pool needs Ray, which is not installed: nothing could sample. pip install 'tether[ray]', "
            "or set sampling.engine to local."
        )
    if config.gpus and address_of(config) is None:
        raise ConfigError(
            f"sampling.pool.gpus={config.gpus:g} with sampling.pool.address=null: a Ray that the run starts would hand "
            "out the GPU that it trains on. Start one that sees the others (CUDA_VISIBLE_DEVICES=1,2,3 ray start "
            "--head), set sampling.pool.address to auto, and give the run CUDA_VISIBLE_DEVICES=0."
        )
    if ranks.size > config.workers:
        raise ConfigError(
            f"sampling.pool.workers={config.workers} for {ranks.size} ranks: some would have no worker. Set it to "
            f"{ranks.size} at least."
        )
    if ranks.size > 1 and address_of(config) is None:
        raise ConfigError(
            f"sampling.pool.address is null with {ranks.size} ranks: each would start a Ray of its own. Start one (ray "
            "start --head) and set sampling.pool.address to auto."
        )


def address_of(config: PoolConfig) -> str | None:
    """Of the cluster that is joined; None: a local Ray is started."""
    address = config.address or os.environ.get(_ADDRESS)
    return None if address in (None, "", "local") else address


class PoolSampler:
    """Samples in `sampling.pool.workers` Ray actors, of which each rank has its share."""

    def __init__(
        self, model: LanguageModel, config: SamplingConfig, ranks: Ranks = ALONE, *,
        restarted: Callable[[str], None] = lambda why: None,
    ) -> None:  # fmt: skip
        """Start the workers, or join a cluster and place them there. They have no weights yet.

        restarted: told of every worker that had to be started again.
        """
        check_pool(config.pool, ranks)
        import ray

        self._pool, self._restarted = config.pool, restarted
        self._workers = len(ranks.span(config.pool.workers))
        self._device = "cuda" if config.pool.gpus else "cpu"
        self.notes = [] if (note := why_not_cached(model)) is None else [note]
        self._narrow = model.dtype if model.hf_model.dtype == torch.float32 else None  # else each weight's own
        self._policy = Stored(None, None, 0)
        self._seen: list[tuple[int, str] | None] = [None] * self._workers  # process and node of each
        self._ours = _connect(config.pool)
        self._group: Any = None
        self._actors: list[Any] = []
        try:
            self._place(config.slots)
            self._policy = Stored(ray.put(_without_weights(model, self._narrow)), None, 0)
        except BaseException:
            self.close()
            raise

    def load_weights(self, weights: LanguageModel, version: int = 0) -> None:
        """Put `weights`, as they are now, where the workers find them."""
        import ray

        with torch.no_grad():
            arrays = [
                packed(whole(p).detach().to("cpu", self._narrow or p.dtype))
                for p in weights.lm.parameters()
                if p.requires_grad
            ]
        self._policy = Stored(self._policy.model, ray.put(arrays), self._policy.load + 1)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, cycle: int, first: int = 0) -> Completions:
        """Draw `responses_per_prompt` responses to each prompt, in the prompts' order; see `tether.types.Sampler`."""
        asked = []
        for number, actor in enumerate(self._actors):
            mine = Ranks(number, self._workers).span(len(prompts))
            if mine:
                ids = [prompts[i].ids for i in mine]
                start = first + mine.start * sampling.responses_per_prompt
                asked.append((number, actor.generate.remote(self._policy, ids, sampling, cycle, start)))
        parts = [self._answer(number, answer) for number, answer in asked]
        return Completions(
            prompts=[p for p in prompts for _ in range(sampling.responses_per_prompt)],
            response_ids=[row for part in parts for row in part.response_ids],
            sampler_logprobs=[row for part in parts for row in part.sampler_logprobs],
            truncated_mass=[row for part in parts for row in part.truncated_mass],
            finish_reasons=[row for part in parts for row in part.finish_reasons],
        )

    def close(self) -> None:
        """End the workers, and the Ray that was started for them."""
        import ray
        from ray.util import remove_placement_group

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._group is not None and not self._ours:  # else it ends with Ray
            remove_placement_group(self._group)
        self._group = None
        if self._ours:
            ray.shutdown()

    @property
    def pids(self) -> list[int]:
        """Of the workers that have answered."""
        return [seen[0] for seen in self._seen if seen is not None]

    def _place(self, slots: int | str) -> None:
        """Take room for all workers at once, and start them in it."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        pool = self._pool
        room: dict[str, float] = {"CPU": pool.cpus} | ({"GPU": pool.gpus} if pool.gpus else {})
        self._group = placement_group([room] * self._workers, strategy="SPREAD")
        if not self._group.wait(pool.timeout_s if address_of(pool) else 10):
            there = {name: f"{ray.cluster_resources().get(name, 0):g}" for name in room}
            raise ConfigError(
                f"sampling.pool: no room for {self._workers} workers with {_listed(room)} each: Ray has "
                f"{_listed(there)} in all, and others may use it. Lower sampling.pool.workers, cpus or gpus, or add "
                "nodes."
            )
        kind = ray.remote(PoolWorker)
        for number in range(self._workers):
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
            placed = kind.options(
                num_cpus=pool.cpus, num_gpus=pool.gpus, scheduling_strategy=strategy, max_restarts=-1,
                max_task_retries=_RETRIES,
            )  # fmt: skip
            self._actors.append(placed.remote(slots=slots, threads=pool.cpus, device=self._device))
        ours = versions()
        for number, answer in enumerate([actor.versions.remote() for actor in self._actors]):
            theirs = self._get(number, answer)
            for name, version in ours.items():
                if theirs[name] != version:
                    raise ModelError(
                        f"worker {number} of the pool has {name} {theirs[name]}, and the run {version}: its samples "
                        "would be of another model. Install the same on every node."
                    )

    def _answer(self, number: int, answer: Any) -> Part:
        part: Part = self._get(number, answer)
        seen, now = self._seen[number], (part.pid, part.node)
        if seen is not None and seen != now:
            self._restarted(
                f"worker {number} of the pool, process {seen[0]} on {seen[1]}, ended: process {now[0]} on {now[1]} "
                "took its place, and was asked the same"
            )
        self._seen[number] = now
        return part

    def _get(self, number: int, answer: Any) -> Any:
        """What a worker answered. Its own errors are raised as they are."""
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

        try:
            return ray.get(answer)
        except RayTaskError as error:
            if isinstance(error.cause, TetherError):
                raise error.cause from None
            raise EngineError(
                f"worker {number} of the pool failed ({type(error.cause).__name__}: {first_line(error.cause)}). Set "
                "sampling.engine to local to see whether the policy samples at all."
            ) from error
        except RayError as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise ConfigError(
                    f"worker {number} of the pool does not start where Ray placed it ({last_line(error)}): nothing "
                    "could sample. Install the same tether, torch and transformers on every node."
                ) from error
            raise EngineError(
                f"worker {number} of the pool ended, {_RETRIES + 1} times in a row, and said: {first_line(error)}. Was "
                "there enough memory? sampling.slots is how many responses it decodes at once."
            ) from error


def _connect(config: PoolConfig) -> bool:
    """Be connected to Ray. Whether that has to be ended: not where whoever calls us was connected already."""
    import ray

    if ray.is_initialized():
        return False
    address = address_of(config)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_worker_niceness"):  # its workers would give way to all else
        os.environ.setdefault(name, "0")
    local = {} if address else {"num_cpus": config.workers * config.cpus, "include_dashboard": False}
    caught = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    ours = {number: signal.getsignal(number) for number in caught}
    try:
        if address and address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()  # Ray would try for minutes
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # whatever its many layers raise
        where = "sampling.engine=pool"
        if address:
            where = f"sampling.pool.address={address}" if config.address else f"{_ADDRESS}={address}"
        raise ConfigError(
            f"{where}: Ray does not answer ({type(error).__name__}: {first_line(error)}), so nothing could sample. Is "
            "it running there (ray status), in the same version of Ray and Python, and does it ask for a token "
            f"(RAY_AUTH_MODE=token)? Without an address here and in {_ADDRESS} the run starts one."
        ) from error
    finally:
        for number, handler in ours.items():  # Ray puts its own in their place, and a run would end unsaved
            signal.signal(number, handler)
    return True


def _without_weights(model: LanguageModel, narrow: torch.dtype | None) -> LanguageModel:
    """A copy on the CPU, to sample from, that lacks what `load_weights` brings: the weights that are trained."""
    taken: dict[int, Any] = {id(b): b.detach().to("cpu", copy=True) for b in model.lm.buffers()}
    for p in model.lm.parameters():  # deepcopy takes these instead of copying
        ours = p.detach().to("cpu", narrow or p.dtype, copy=True)
        if p.requires_grad:
            ours = torch.empty(0, dtype=ours.dtype)
        taken[id(p)] = torch.nn.Parameter(ours, requires_grad=p.requires_grad)
    return LanguageModel(copy.deepcopy(model.lm, taken), model.dtype, model.use_full_logits, one_pass=model.one_pass)


def _listed(room: dict[str, Any]) -> str:
    return " and ".join(f"{amount} {name}" for name, amount in room.items())
