"""Bytes over the wire: the formula beside what torch would send, counted on a group of processes that are not there."""

import pytest
import torch
from torch import distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from policies_on_ranks import build, rollout
from tether.diagnose.per_rank import wire_bytes
from tether.diagnose.simulate import units_of
from tether.distributed.ranks import Ranks
from tether.distributed.shard import shard, whole


class Received(TorchDispatchMode):
    """Bytes that a rank of two receives: half of what it has after a gather, or before a reduction."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if "allgather" in name or "all_gather_into_tensor." in name:
            larger = args[0] if "c10d._" in name else result
            self.bytes += larger.numel() * larger.element_size() // 2
        elif "_reduce_scatter_base_" in name:
            self.bytes += args[1].numel() * args[1].element_size() // 2
        elif "allreduce" in name:  # to every rank a part of the sum, and then the sum
            self.bytes += sum(x.numel() * x.element_size() for x in args[0] if x.is_floating_point())
        return result


@pytest.fixture
def two():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield Ranks(0, 2)
    dist.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
def test_what_full_sends_in_a_cycle_is_what_the_formula_says(two, tied):
    policy, frozen = (build(tied=tied, advantage="group") for _ in range(2))
    frozen.requires_grad_(False)
    units, reference = units_of(policy.lm), units_of(frozen.lm)
    for model in (policy, frozen):
        shard(model, two)
    rows = rollout(False).rows
    with torch.no_grad():
        frozen(rows, temperature=1.0)  # its root is gathered once and stays
    with Received() as received:
        with torch.no_grad():
            for _ in range(3):
                policy(rows, temperature=1.0)
                frozen(rows, temperature=1.0)
        for _ in range(4):
            policy(rows, temperature=1.0).logprobs.sum().backward()
        for parameter in policy.lm.parameters():
            whole(parameter)
    want = wire_bytes(units, reference, 2, sharded=True, steps=2, passes=4, valued=3)
    assert received.bytes == want


def test_what_replicas_send_in_a_step_is_what_the_formula_says(two):
    policy = build(tied=True, advantage="group")
    rows = rollout(False).rows
    policy(rows, temperature=1.0).logprobs.sum().backward()
    with Received() as received:
        two.sum_gradients(list(policy.lm.parameters()))
    units = units_of(policy.lm)
    assert received.bytes == wire_bytes(units, [], 2, sharded=False, steps=1, passes=1, valued=1)
