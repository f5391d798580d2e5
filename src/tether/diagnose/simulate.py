"""One training step on tensors without data, to learn what memory it takes.

torch's fake tensors have shapes, types and lifetimes, and no storage. The real model code runs on them, any
architecture's, with its real autograd graph, autocast and checkpointing; a meter adds up what is alive. So nothing is
estimated by formula, no weight is loaded, and an 8B model takes seconds on a laptop.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from tether.config import LoraConfig
from tether.diagnose.per_rank import Weight
from tether.distributed.shard import layers
from tether.models.ilql import ILQLHeads
from tether.models.language_model import LanguageModel
from tether.models.loading import add_lora, checkpoint_activations, quiet_transformers, without_dropout


@dataclass(frozen=True, slots=True)
class Step:
    """What a training step takes, in bytes."""

    parameters: int  # number of them, the critic's trunk left out
    weights: int  # masters and frozen weights
    trained: int  # number of trained weights, the critic's left out
    critic: int  # number of weights of a separate critic
    heads: int  # number of trained weights of implicit Q-learning's heads
    targets: int  # number of weights of their targets
    activations: int  # peak of the forward and backward pass of one microbatch, gradients left out
    units: list[list[Weight]]  # the weights, as several ranks cut and gather them: the root first, then the layers
    critic_units: list[list[Weight]]  # those of a separate critic

    @property
    def all_units(self) -> list[list[Weight]]:
        """Those of the policy with its critic, of which there is one root."""
        roots = [unit[0] for unit in (self.units, self.critic_units) if unit]
        return [[w for root in roots for w in root], *self.units[1:], *self.critic_units[1:]]


@dataclass
class _SimulatedModel(LanguageModel):
    """A model on a CPU's tensors without data, whose output head takes the memory that it would on `simulated`."""

    simulated: str = "cpu"

    def head(self) -> dict[str, Any]:
        return {**super().head(), "device": self.simulated}


@dataclass(frozen=True, slots=True)
class Shape:
    """One microbatch."""

    rows: int
    width: int  # tokens a row
    targets: int  # tokens a row whose log-probability is wanted; 0: only the last hidden state is read, for a score


def simulate(
    architecture: Any, shape: Shape, *, dtype: torch.dtype, device: str = "cpu", lora: LoraConfig | None = None,
    checkpointing: bool = False, critic: Any = None, q_heads: bool = False,
) -> Step:  # fmt: skip
    """Build the model as training does and run one microbatch forward and backward.

    architecture: a transformers config. dtype: compute precision; trained weights are float32. device: cpu or cuda.
    critic: a separate critic's transformers config, or None. q_heads: with the heads of implicit Q-learning.
    """
    with torch.device("meta"), torch.random.fork_rng(), quiet_transformers():
        lm: Any = AutoModelForCausalLM.from_config(architecture, dtype=dtype if lora else torch.float32)
        lm = without_dropout(lm)
        parameters = sum(p.numel() for p in lm.parameters())
        if lora:
            lm = add_lora(lm, lora, seed=0)
        trunk = AutoModelForCausalLM.from_config(critic, dtype=torch.float32).base_model if critic else None
    modules = [lm] + ([trunk] if trunk is not None else [])
    with FakeTensorMode():
        for module in modules:
            _bring_to_life(module)
            module.train()
            if checkpointing:
                checkpoint_activations(module)
        text = architecture.get_text_config()
        heads = ILQLHeads(text.hidden_size, text.vocab_size) if q_heads else None
        modules += [heads] if heads is not None else []
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.zeros_like(p)  # gradients are a part of their own
        known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        meter = _Meter([*known, *(p.grad for p in trained if p.grad is not None)])
        with meter:
            _microbatch(_SimulatedModel(lm, dtype, simulated=device), trunk, heads, shape).backward()
        critic_size = sum(p.numel() for p in trunk.parameters()) if trunk is not None else 0
        in_heads = [p.numel() for p in heads.parameters() if p.requires_grad] if heads is not None else []
        targets = [p.numel() for p in heads.parameters() if not p.requires_grad] if heads is not None else []
        return Step(
            parameters=parameters,
            weights=sum(p.numel() * p.element_size() for p in lm.parameters()),
            trained=sum(p.numel() for p in lm.parameters() if p.requires_grad),
            critic=critic_size,
            heads=sum(in_heads),
            targets=sum(targets),
            activations=meter.peak,
            units=units_of(lm),
            critic_units=units_of(trunk) if trunk is not None else [],
        )


def units_of(model: nn.Module) -> list[list[Weight]]:
    """What `tether.distributed.shard.shard` makes units of: all that is in no layer, and each layer."""
    wrapped: Any = model  # by peft, maybe
    lm = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    units = [list(layer.parameters()) for layer in layers(lm.base_model)]
    inside = {id(p) for unit in units for p in unit}
    root = [p for p in model.parameters() if id(p) not in inside]
    return [[Weight(tuple(p.shape), p.element_size(), p.requires_grad) for p in unit] for unit in [root, *units]]


def _bring_to_life(module: nn.Module) -> None:
    """Turn weights and buffers on the meta device, where no autocast is, into fake ones on the CPU; ties stay ties."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                if id(p) not in memo:
                    memo[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                part._parameters[name] = memo[id(p)]
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty(b.shape, dtype=b.dtype)


def _microbatch(model: LanguageModel, critic: Any, heads: ILQLHeads | None, shape: Shape) -> Tensor:
    """What a trainer computes of one microbatch; a sum of it all stands for the loss."""
    tokens = torch.zeros(shape.rows, shape.width, dtype=torch.long)
    positions = torch.zeros(shape.rows * max(1, shape.targets), dtype=torch.long)  # which ones changes no size
    before = (positions, positions)
    if shape.targets:
        logprobs, entropy, hidden = model.logprobs(tokens, before, positions, entropy=True)
        loss = logprobs.sum() + entropy.sum() + hidden.float().sum()
        if heads is not None:
            with model.autocast():
                loss = loss + sum(x.sum() for x in heads(hidden, positions))
    else:
        with model.autocast():
            loss = model.hidden(tokens)[before].float().sum()
    if critic is not None:
        with model.autocast():
            loss = loss + critic(input_ids=tokens, use_cache=False).last_hidden_state[before].float().sum()
    return loss


class _Meter(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in known}  # counted elsewhere

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:  # a view
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, address: int) -> None:
        self.now -= self._sizes.pop(address)
