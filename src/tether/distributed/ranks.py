"""Which of a run's processes this is, and the few things that they say to each other.

    torchrun --nproc-per-node 2 -m tether ppo C.yaml

Every rank holds all tokens and all [B, R] tensors, so denominators, advantages, metrics and decisions are the same code
on the same numbers everywhere. Forward and backward passes are split by rows, those of reward models too. Rank 0 alone
asks other sources of scores, and writes.

Alone, which is what a process is without torchrun, every method returns what it was given, and torch.distributed is not
imported.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from tether.distributed.failures import Failures, is_agreed, mark_agreed
from tether.distributed.world import world
from tether.errors import ConfigError, RunError, first_line
from tether.types import microbatches

T = TypeVar("T")

_JOIN_S = 120.0  # all processes are started by then: torchrun itself waits for hosts
BUCKET = 16 * 2**20  # gradients summed at once: numbers, 64 MiB in float32


@dataclass(frozen=True, slots=True)
class Ranks:
    """Process `rank` of `size`."""

    rank: int = 0
    size: int = 1
    failures: Failures | None = None

    def deal(self, lengths: Tensor | Sequence[int], max_tokens: int) -> list[tuple[Tensor, bool]]:
        """This rank's microbatches of rows with these lengths, as many as every other rank's: (rows, whether they
        count). What does not count is there to be run beside the others', with weight 0."""
        if self.size == 1:
            return [(index, True) for index in microbatches(lengths, max_tokens)]
        groups = dealt(lengths, max_tokens, self.size)
        mine = [(index, True) for index in groups[self.rank]]
        spare = min(groups[0], key=len)  # rank 0 never has fewer groups than another
        return mine + [(spare, False)] * (len(groups[0]) - len(mine))

    def span(self, count: int) -> range:
        """This rank's part of `count` things, one after the other."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each summed over the ranks. Of tensors that are 0 but for a rank's own rows it puts the rows together."""
        if self.size == 1:
            return tensors
        from torch import distributed as dist

        together = torch.stack(tensors)
        dist.all_reduce(together)
        return together.unbind(0)

    def gather(self, items: list[T]) -> list[T]:
        """The items of every rank, in the order of the ranks."""
        if self.size == 1:
            return items
        from torch import distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, items)
        return [item for part in found for item in part]

    def cat(self, parts: list[Tensor]) -> Tensor:
        """The parts of every rank, one after the other; of several ranks on the CPU."""
        return torch.cat(parts if self.size == 1 else self.gather([part.cpu() for part in parts]))

    def agree(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return any(self.gather([flag]))

    def first(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, where alone it is called. What it raises there, every rank raises."""
        if self.size == 1:
            return call()
        from torch import distributed as dist

        answer: list[Any] = [None, None]
        result: Any = None
        if self.rank == 0:
            try:
                result = call()
                answer[0] = pickle.dumps(result)
            except Exception as error:
                answer[1] = _portable(error)
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise mark_agreed(answer[1])
        if self.rank > 0:
            result = pickle.loads(answer[0])
        return cast(T, result)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Sum the gradients of replicated weights over the ranks; those of sharded ones FSDP has summed.

        A weight without a gradient here may have one elsewhere: of an expert that no token of this rank went to.
        """
        if self.size == 1:
            return
        from torch import distributed as dist

        replicated = [p for p in parameters if not hasattr(p, "full_tensor")]
        if not replicated:
            return
        reached = torch.tensor([p.grad is not None for p in replicated], dtype=torch.int32, device=replicated[0].device)
        dist.all_reduce(reached)
        gradients = list[Tensor]()
        for parameter, count in zip(replicated, reached.tolist(), strict=True):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        while gradients:
            bucket, size = list[Tensor](), 0
            while gradients and (not bucket or size + gradients[0].numel() <= BUCKET):
                bucket.append(gradients.pop(0))
                size += bucket[-1].numel()
            flat = torch.cat([g.reshape(-1) for g in bucket])
            dist.all_reduce(flat)
            for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raise ConfigError where a rank's facts (config keys, hashes of files) are not those of rank 0."""
        everybody = self.gather([(socket.gethostname(), dict(facts))])
        for rank, (host, theirs) in enumerate(everybody):
            ours = everybody[0][1]
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    raise mark_agreed(
                        ConfigError(
                            f"{key} is {theirs.get(key)!r} on rank {rank} (host {host}) and {ours.get(key)!r} on rank "
                            "0: they would train different runs. Give every host the same config and the same files."
                        )
                    )


ALONE = Ranks()


def dealt(lengths: Tensor | Sequence[int], max_tokens: int, size: int) -> list[list[Tensor]]:
    """Of each of `size` ranks, its microbatches: index tensors that together partition the rows.

    The rows are cut, longest first, into as few groups as fit in max_tokens and can be dealt out evenly, then into
    groups as equal as that number allows. They are dealt out in turns, a group a rank, of which the largest goes to
    whoever has least so far: ranks that run side by side have alike much to do in every turn, and in all. Ranks whose
    numbers of groups differ, at most by one, have fewer rows than the others.
    """
    lengths = torch.as_tensor(lengths)
    wanted = -(-len(microbatches(lengths, max_tokens)) // size) * size
    low, high = 0, max_tokens  # `high` tokens give at most `wanted` groups
    while high - low > 1:
        middle = (low + high) // 2
        few = len(microbatches(lengths, middle)) <= wanted
        low, high = (low, middle) if few else (middle, high)
    groups = microbatches(lengths, high)
    tokens = [len(group) * int(lengths[group[0]]) for group in groups]  # padded: the longest comes first
    ranks: list[list[Tensor]] = [[] for _ in range(size)]
    total = [0] * size
    for start in range(0, len(groups), size):
        turn = sorted(range(start, min(start + size, len(groups))), key=lambda i: -tokens[i])
        for i, rank in zip(turn, sorted(range(size), key=total.__getitem__), strict=False):  # both sorts are stable
            ranks[rank].append(groups[i])
            total[rank] += tokens[i]
    return sorted(ranks, key=len, reverse=True)  # stable: only the last turn may be short


# ---------------------------------------------------------------- starting


def need_replicas(shard: str, command: str, size: int | None = None) -> None:
    """Raise ConfigError where a command that only knows replicas is to cut the weights into parts.

    size: the number of processes; None: of this run.
    """
    if (size or world()[1]) > 1 and shard == "full":
        raise ConfigError(
            f"distributed.shard=full, but tether {command} keeps all weights on every process so far: it would take "
            "more memory than you expect. Set distributed.shard to replicate, or train adapters (model.lora)."
        )


def local_device(device: torch.device) -> torch.device:
    """This rank's own device: of several GPUs the one with its number on this host."""
    if world()[1] == 1 or device.type != "cuda":
        return device
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
    if device.index is not None or processes > count:  # the same on all of a host: its first says it
        why = f"all processes would share {device}" if device.index is not None else f"there are {count} GPUs"
        raise ConfigError(
            f"device={device} with {processes} processes on a host: {why}. Set device: cuda, and --nproc-per-node to "
            f"the GPUs of a host, {count} here."
        )
    own = torch.device("cuda", local)
    torch.cuda.set_device(own)
    return own


@contextmanager
def join(device: str, *, timeout_s: float) -> Iterator[Ranks]:
    """Meet the other processes of the run; alone there is nobody to meet.

    device: the config's. timeout_s: how long a rank waits in an exchange for one that does not come.
    """
    rank, size = world()
    if size == 1:
        yield ALONE
        return
    from torch import distributed

    dist: Any = distributed  # which does not declare what it takes from C++
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    store = _meet(rank, size)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    together = False
    try:
        with _quiet(rank), Failures.watching(dist.PrefixStore("failures", store.clone()), rank, size) as failures:
            yield Ranks(rank, size, failures)
        together = True
    except BaseException as error:
        together = is_agreed(error) and not failures.happened
        raise
    finally:
        if together:  # else it may wait for those that are gone
            dist.destroy_process_group()


def _meet(rank: int, size: int) -> Any:
    """The store that all ranks have reached; RunError naming those that have not."""
    from torch import distributed

    dist: Any = distributed  # which does not declare what it takes from C++
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by torchrun
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    deadline = time.monotonic() + _JOIN_S
    try:
        store = dist.TCPStore(
            address, port, is_master=rank == 0 and not hosted, timeout=timedelta(seconds=_JOIN_S),
            wait_for_workers=False,
        )  # fmt: skip
    except (dist.DistError, RuntimeError) as error:
        why = first_line(error)
        remedy = "Check --master-addr, --master-port and the network"
        if "in use" in why.lower():
            remedy = "Choose another --master-port"
        raise RunError(
            f"rank {rank} of {size} on {socket.gethostname()} does not reach the others at {address}:{port} ({why}): "
            f"the run cannot begin. {remedy}."
        ) from error
    everybody = dist.PrefixStore(f"tether/{attempt}", store)
    everybody.set(f"here/{rank}", socket.gethostname())
    while missing := [r for r in range(size) if not everybody.check([f"here/{r}"])]:
        if time.monotonic() > deadline:
            raise RunError(
                f"{size - len(missing)} of {size} processes came to {address}:{port} within {_JOIN_S:.0f} s, and rank "
                f"{', '.join(map(str, missing))} did not: the run cannot begin. Look at what these say, and at the "
                "network between the hosts."
            )
        time.sleep(0.05)
    return everybody


@contextmanager
def _quiet(rank: int) -> Iterator[None]:
    """Inside, only rank 0 is heard: the others have nothing else to say. What they fail with is printed after."""
    if rank == 0:
        yield
        return
    before = sys.stdout, sys.stderr
    with Path(os.devnull).open("w", encoding="utf-8") as nobody:
        sys.stdout = sys.stderr = nobody
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _portable(error: Exception) -> Exception:
    """The error itself, or where it cannot be sent, one with its words."""
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
