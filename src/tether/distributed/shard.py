"""How the weights of a run lie on its ranks: a replica on each, or a part on each (FSDP2).

Replicas need nothing but a sum of gradients, which the optimizer's step begins with. Under `full` a rank holds its part
of the weights, gradients and moments. A layer's weights are put together when it runs and let go after it; FSDP sums
the gradients on its way back. The module as a whole is the root: what shares weights (tied embeddings and head) or
stands outside the layers (the last norm) is one unit, so the head may be applied by hand inside its forward.

Left out: several hosts each with a whole model (HSDP), sums in bfloat16, checkpoints written in parts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tether.distributed.ranks import Ranks
from tether.models.policy import Policy, Reference

_REPLICATED = 16e9  # bytes of weights, gradients and moments that `auto` leaves on every rank


@dataclass(frozen=True, slots=True)
class Layout:
    """A trained policy, and where its weights are whole."""

    policy: Policy
    whole: Policy | None  # what checkpoints and exports are written from; None on the ranks that write none

    @property
    def sharded(self) -> bool:
        return self.whole is not self.policy

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds, see `Policy.parts`."""
        return self.whole.parts() if self.whole is not None else {}

    @torch.no_grad()
    def gather(self) -> None:
        """Bring `whole` up to date; every rank calls."""
        if self.sharded:
            for sharded, ours in self._pairs():
                tensor = whole(sharded)
                if ours is not None:
                    ours.copy_(tensor)

    @torch.no_grad()
    def scatter(self) -> None:
        """Give every rank its part of what `whole` holds; every rank calls."""
        if not self.sharded:
            return
        from torch.distributed.tensor import distribute_tensor

        for sharded, ours in self._pairs():
            p: Any = sharded
            local = torch.empty(p.shape, dtype=p.dtype, device=p.device) if ours is None else ours.to(p.device)
            p.to_local().copy_(distribute_tensor(local, p.device_mesh, p.placements).to_local())

    def _pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
        """Each trained weight of the policy, and that of `whole`."""
        there = dict(self.whole.named_parameters()) if self.whole is not None else {}
        for name, parameter in self.policy.named_parameters():
            if parameter.requires_grad:
                yield parameter, there.get(name)


def shards(setting: str, policy: Policy, ranks: Ranks) -> bool:
    """Whether `distributed.shard` cuts the weights into parts."""
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    learned = sum(p.numel() * (p.element_size() + 8) for p in policy.parameters() if p.requires_grad)
    return cuts(setting, weights + learned, ranks.size)


def cuts(setting: str, replica: int, ranks: int) -> bool:
    """Whether `distributed.shard` cuts weights, gradients and moments of `replica` bytes into parts, on several."""
    return ranks > 1 and (setting == "full" or (setting == "auto" and replica > _REPLICATED))


def lay_out(policy: Policy, reference: Reference, ranks: Ranks, *, sharded: bool) -> Layout:
    """Cut `policy` and the frozen reference into parts, in place, if they are to be.

    Before: whatever copies or probes the models. After: the optimizer, which takes the parts.
    """
    if not sharded:
        return Layout(policy, policy)
    kept = copy.deepcopy(policy).cpu() if ranks.rank == 0 else None
    shard(policy, ranks)
    if reference.frozen is not None:
        shard(reference.frozen, ranks)
    return Layout(policy, kept)


def shard(policy: Policy, ranks: Ranks) -> None:
    """Each rank keeps its part of the weights; gradients are sums over the ranks, as those of one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(policy.model.device.type, (ranks.size,))
    trunks: list[nn.Module] = [policy.model.trunk, *([policy.critic.trunk] if policy.critic else [])]
    for trunk in trunks:
        for layer in layers(trunk):
            fully_shard(layer, mesh=mesh)
    if policy.value_head is not None:
        fully_shard(policy.value_head, mesh=mesh)  # of its own, its weights stay as precise as they are
    fully_shard(policy, mesh=mesh)
    for module in policy.modules():
        if isinstance(module, FSDPModule):  # each setter acts on one module alone
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # else NCCL may give zero gradients, pytorch#190745
    register_fsdp_forward_method(policy, "reference_logprobs")
    for part in (policy.model, policy.critic):
        if part is not None:
            part.one_pass = True  # a layer that runs more often on one rank than on another waits for ever


def layers(trunk: nn.Module) -> list[nn.Module]:
    """What is put together on its own while it runs."""
    return [layer for child in trunk.children() if isinstance(child, nn.ModuleList) for layer in child]


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this rank has a part; every rank calls. One that is whole is returned itself."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def like(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's part of a tensor that every rank has, where `parameter` is a part; else the tensor itself."""
    p: Any = parameter
    if not hasattr(p, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
