"""The models of a PPO run: the policy with its critic, and the frozen reference."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tether.config import ModelConfig, ReferencedModelConfig
from tether.errors import ModelError
from tether.models.ilql import heads_left_out
from tether.models.language_model import LanguageModel, freeze, response_hidden
from tether.models.loading import (
    add_lora,
    autocast,
    load_causal_lm,
    load_weights,
    model_config,
    resolve_dtype,
    set_checkpointing,
)
from tether.models.reward_model import load_reward_model
from tether.types import Rows

_VALUE_HEAD = "value_head.safetensors"  # in a critic's directory, beside its trunk if it has one


class PolicyOutput(NamedTuple):
    """Of every response token, 0 outside the mask."""

    logprobs: Tensor  # [B, R] nats, at the sampling temperature
    entropy: Tensor  # [B, R] nats, of the whole next-token distribution
    values: Tensor | None  # [B, R] reward units: V before the token is chosen; None without a critic


class Policy(nn.Module):
    """A language model that learns, and the critic beside it: a head on its trunk, a trunk of its own, or none."""

    def __init__(self, model: LanguageModel, critic: SeparateCritic | None = None, *, value_head: bool = True) -> None:
        super().__init__()
        self.model = model
        self.lm = model.lm  # registered, so that parameters() finds it
        self.critic = critic
        self.value_head = zero_head(model.config.hidden_size, model.device) if value_head and not critic else None
        self.critic_only = False  # value warm-up: the critic learns, a shared trunk is frozen

    def forward(self, rows: Rows, *, temperature: float, entropy: bool = True) -> PolicyOutput:
        """Log-probs, entropies and values of every response token: one pass with a shared trunk, two without.

        Shapes: rows B × T; each output [B, R].
        """
        mask = rows.response_mask
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.critic_only):
            logprobs, entropies, hidden = self.model.response_logprobs(rows, temperature=temperature, entropy=entropy)
        values = None
        if self.critic is not None:
            values = fill(self.critic(rows), mask)
        elif self.value_head is not None:
            values = fill(read_values(self.value_head, hidden), mask)
        return PolicyOutput(fill(logprobs, mask), fill(entropies, mask), values)

    @torch.no_grad()
    def reference_logprobs(self, rows: Rows, *, temperature: float) -> Tensor:
        """[B, R] nats, 0 outside the mask, without the LoRA adapter if there is one."""
        with self.model.without_adapter():
            logprobs, _, _ = self.model.response_logprobs(rows, temperature=temperature, entropy=False)
        return fill(logprobs, rows.response_mask)

    @property
    def has_critic(self) -> bool:
        return self.critic is not None or self.value_head is not None

    def policy_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained weights of the language model, by name, in a fixed order."""
        return [(f"lm.{name}", p) for name, p in self.lm.named_parameters() if p.requires_grad]

    def critic_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Trained weights of the critic alone, by name, in a fixed order."""
        module = self.critic or self.value_head
        return [(f"critic.{name}", p) for name, p in module.named_parameters() if p.requires_grad] if module else []

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds of it, by name: the language model, and the critic's trunk and head."""
        trunk = {"critic": self.critic.trunk} if self.critic else {}
        return {"policy": self.lm, **trunk, **({"critic/value_head": self._head()} if self.has_critic else {})}

    def save_critic(self, directory: Path) -> None:
        """Write the critic: its head, and its trunk if it has one of its own. Without a critic, nothing."""
        if not self.has_critic:
            return
        directory.mkdir(parents=True, exist_ok=True)
        if self.critic is not None:
            self.critic.trunk.save_pretrained(directory)
        head = {name: tensor.detach().cpu().contiguous() for name, tensor in self._head().state_dict().items()}
        save_file(head, directory / _VALUE_HEAD)

    def load_critic(self, directory: Path) -> None:
        """Read back what save_critic wrote, bit for bit."""
        self._head().load_state_dict(load_file(directory / _VALUE_HEAD))
        if self.critic is not None:
            load_weights(self.critic.trunk, directory)

    def _head(self) -> nn.Linear:
        head = self.critic.head if self.critic is not None else self.value_head
        assert head is not None
        return head


class SeparateCritic(nn.Module):
    """A critic with a trunk of its own: it cannot disturb the policy, and costs a second forward and backward pass."""

    def __init__(self, trunk: Any, head: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.trunk, self.head, self.dtype = trunk, head, dtype
        self.one_pass = False  # see `LanguageModel`

    def forward(self, rows: Rows) -> Tensor:
        """[N] values, one before each response token."""
        with autocast(self.dtype, rows.tokens.device):
            hidden = response_hidden(
                lambda x: self.trunk(input_ids=x, use_cache=False).last_hidden_state, rows, one_pass=self.one_pass
            )
        return read_values(self.head, hidden)


@dataclass(frozen=True)
class Reference:
    """The frozen model that the KL is measured to; None is the policy without its LoRA adapter, as the run began."""

    policy: Policy
    frozen: Policy | None

    def logprobs(self, rows: Rows, *, temperature: float) -> Tensor:
        """[B, R] nats, 0 outside the mask."""
        logprobs: Tensor = (self.frozen or self.policy).reference_logprobs(rows, temperature=temperature)
        return logprobs


def companions(config: ReferencedModelConfig) -> dict[str, Any]:
    """Reference and critic where they are models of their own: `key=path` -> transformers config, without weights.

    Raises ModelError where one has another vocabulary than the policy.
    """
    trust = config.trust_remote_code
    found, ours = {}, None
    critic = config.critic if isinstance(config, ModelConfig) else None
    for key, path in (("model.reference", config.reference), ("model.critic", critic)):
        if path is None or path in ("shared", "separate"):
            continue
        ours = ours or model_config(config.policy, revision=config.revision, trust_remote_code=trust)
        found[f"{key}={path}"] = other = model_config(path, trust_remote_code=trust)
        sizes = [architecture.get_text_config().vocab_size for architecture in (other, ours)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"{key}={path} has a vocabulary of {sizes[0]} tokens, the policy one of {sizes[1]}: the same ids would "
                "mean other words to it. Name a model with the policy's tokenizer."
            )
    return found


def build_policy(
    config: ModelConfig, *, device: torch.device, seed: int, with_critic: bool = True
) -> tuple[Policy, Reference, list[str]]:
    """Load policy, critic and reference as the config says. The third value: notes on the fallbacks, for the log.

    The reference is in the compute precision as far as that changes none of its bits: it must agree with the policy
    before anything is learned.
    """
    policy, notes = load_policy(config, device=device, seed=seed, with_critic=with_critic)
    frozen, model = None, policy.model
    if config.reference is not None:
        frozen = load_reference(config.reference, model, trust_remote_code=config.trust_remote_code)
    elif not config.lora:
        frozen = LanguageModel(freeze(copy.deepcopy(model.lm), model.dtype, same_bits=True).eval(), model.dtype)
    if frozen is not None and (note := frozen.check_head()):
        notes.append(note)
    return policy, Reference(policy, Policy(frozen, value_head=False) if frozen else None), notes


def load_policy(
    config: ModelConfig, *, device: torch.device, seed: int, with_critic: bool = True
) -> tuple[Policy, list[str]]:
    """The policy with its critic alone, and notes on the fallbacks.

    Trained weights are float32; the frozen base under LoRA is in the compute precision.
    """
    companions(config)
    where: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    dtype = resolve_dtype(config.dtype, device, model_config(config.policy, **where))
    lm: Any = load_causal_lm(config.policy, dtype=dtype if config.lora else torch.float32, device=device, **where)
    critic = None if config.critic == "shared" else _load_critic(config, lm, dtype, device)
    if config.lora:
        lm = add_lora(lm, config.lora, seed=seed)
    set_checkpointing(config.gradient_checkpointing, device, lm, *([critic.trunk] if critic else []))

    policy = Policy(LanguageModel(lm, dtype), critic, value_head=with_critic).to(device)
    note = policy.model.check_head()
    notes = [*([note] if note else []), *heads_left_out(config.policy), *heads_left_out(config.reference)]
    if config.lora and critic:
        notes.append("model.lora adapts the policy alone: the separate critic's own trunk is trained whole, in float32")
    return policy.train(), notes


def load_reference(path: str, policy: LanguageModel, *, trust_remote_code: bool) -> LanguageModel:
    """The frozen model in `path`, with the precision of the policy's own arithmetic."""
    lm: Any = load_causal_lm(
        path, dtype=policy.hf_model.dtype, device=policy.device, trust_remote_code=trust_remote_code
    )
    return LanguageModel(freeze(lm, policy.dtype, same_bits=True).eval(), policy.dtype)


def _load_critic(config: ModelConfig, lm: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> SeparateCritic:
    if config.critic == "separate":
        trunk: Any = copy.deepcopy(lm.base_model).float()
        return SeparateCritic(trunk, zero_head(trunk.config.get_text_config().hidden_size, device), dtype)
    where: dict[str, Any] = {"device": device, "trust_remote_code": config.trust_remote_code}
    kind = model_config(config.critic, trust_remote_code=config.trust_remote_code).architectures or [""]
    if kind[0].endswith("ForSequenceClassification"):
        scorer = load_reward_model(config.critic, dtype=torch.float32, **where)
        trunk, head = scorer.trunk, scorer.value_head()
    else:
        trunk = load_causal_lm(config.critic, dtype=torch.float32, trunk_only=True, **where)
        head = zero_head(trunk.config.get_text_config().hidden_size, device)
        saved = Path(config.critic) / _VALUE_HEAD  # another run's critic
        if saved.exists():
            head.load_state_dict(load_file(saved))
    return SeparateCritic(trunk, head, dtype)


def zero_head(width: int, device: torch.device) -> nn.Linear:
    """A value head that says 0 of everything: the first cycle's advantages are then the rewards' own."""
    head = nn.Linear(width, 1, device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def read_values(head: nn.Linear, hidden: Tensor) -> Tensor:
    """[N] values of hidden states [N, D], in the head's float32: bfloat16 is too coarse to sum the whole width in."""
    with torch.autocast(hidden.device.type, enabled=False):
        values: Tensor = head(hidden.to(head.weight.dtype))
        return values.squeeze(-1)


def fill(values: Tensor, mask: Tensor) -> Tensor:
    """[N] values of the counted positions -> [B, R], 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
