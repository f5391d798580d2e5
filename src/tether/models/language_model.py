"""A causal language model as trunk and head: log-probs off hidden states, without ever holding [B, T, V].

Model code is transformers': any causal language model, by directory or hub id.

Every forward pass here sees whole rows, prompt and response, padded on the right and without an attention mask: under
causal attention no token sees what comes after it (see `tether.types`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from tether.math import Head, full_logprobs, token_logprobs
from tether.models.loading import autocast
from tether.types import Rows, similar

_STEERED_ROWS = 256  # positions whose logits are held at once
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@dataclass
class LanguageModel:
    """A causal LM seen as trunk and head: hidden states out of one, log-probs of chosen tokens out of the other."""

    lm: Any  # the model that `transformers` would run, adapters included
    dtype: torch.dtype  # compute precision
    use_full_logits: bool = False  # read log-probs off the model's own logits: for heads that ours does not know
    steer: Callable[[Tensor, Tensor], Tensor] | None = None  # (logits [N, V], hidden [N, D]) -> what is sampled from
    one_pass: bool = False  # every row goes through the trunk in one pass, whatever that costs

    @property
    def trunk(self) -> nn.Module:
        trunk: nn.Module = self.hf_model.base_model
        return trunk

    @property
    def hf_model(self) -> Any:
        """The transformers model itself, adapters injected but unwrapped."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def config(self) -> Any:
        return self.hf_model.config.get_text_config()

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.hf_model.parameters()).device
        return device

    def autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.dtype, self.device)

    def without_adapter(self) -> AbstractContextManager[Any]:
        """Inside, the model is as it was before LoRA; the same model where there is no adapter."""
        return self.lm.disable_adapter() if hasattr(self.lm, "disable_adapter") else nullcontext()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, the model is in eval mode, without gradient checkpointing.

        Mode, attention implementation and (in `full_precision`) precision are state of the model itself: threads that
        share it take turns.
        """
        with _locks.setdefault(self.hf_model, threading.RLock()):
            training = [module for module in self.lm.modules() if module.training]
            self.lm.eval()
            try:
                yield
            finally:
                for module in training:
                    module.training = True

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Inside, the trunk computes in float32 (or float64): for probes, which rounding to bfloat16 would blunt.

        Weights that are kept in bfloat16 are widened a layer at a time, while it runs: the model need not fit twice.
        """
        narrow: dict[int, tuple[nn.Parameter, Tensor]] = {}

        def widen(layer: nn.Module, _: Any) -> None:
            for p in layer.parameters():
                if p.dtype in (torch.bfloat16, torch.float16):
                    narrow[id(p)] = p, p.data
                    p.data = p.data.float()

        def put_back(*_: Any) -> None:
            for p, data in narrow.values():
                p.data = data
            narrow.clear()

        hooks = []
        for child in self.trunk.children():
            for layer in child if isinstance(child, nn.ModuleList) else [child]:
                hooks.append(layer.register_forward_pre_hook(widen))
                hooks.append(layer.register_forward_hook(put_back, always_call=True))
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            put_back()

    def hidden(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, D] hidden states after the last norm, for tokens [B, T]."""
        hidden: Tensor = self.trunk(input_ids=tokens, use_cache=False, **kwargs).last_hidden_state
        return hidden

    def head(self) -> dict[str, Any]:
        """What stands between the trunk and the logits, for `token_logprobs`: weight, bias, scale and soft-cap."""
        output = self.hf_model.get_output_embeddings()
        scale = getattr(self.config, "logit_scale", None) or 1.0  # Cohere multiplies
        scale /= getattr(self.config, "logits_scaling", None) or 1.0  # Granite divides
        return {
            "weight": output.weight,
            "bias": getattr(output, "bias", None),
            "scale": scale,
            "softcap": getattr(self.config, "final_logit_softcapping", None),  # Gemma
        }

    def output_head(self) -> Head:
        """The head as a function, for many hidden states in a row: its weight is converted once."""
        kind = self.head()
        dtype = self.dtype if self.dtype == torch.bfloat16 else kind["weight"].dtype
        return Head(**kind, dtype=dtype)

    def response_logprobs(self, rows: Rows, *, temperature: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass; ([N] log-probs in nats, [N] entropies in nats, [N, D] hidden states) of N response tokens.

        Position t's come from the hidden state before token t. Without `entropy`, entropies are zeros.
        """
        if self.use_full_logits:  # of a head that is not ours the model gives no hidden states without its logits
            return self.logprobs(
                rows.tokens, rows.before_targets, rows.targets, temperature=temperature, entropy=entropy
            )
        with self.autocast():
            hidden = response_hidden(self.hidden, rows, one_pass=self.one_pass)
            return *self._of_hidden(hidden, rows.targets, temperature=temperature, entropy=entropy), hidden

    def logprobs(
        self,
        tokens: Tensor,
        before: tuple[Tensor, Tensor],
        targets: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One forward pass over tokens [B, T]; what `response_logprobs` returns, of any N positions.

        before: ([N], [N]) row and column of the position whose hidden state predicts each of targets [N].
        kwargs: for the trunk, such as position_ids.
        """
        with self.autocast():
            if self.use_full_logits:
                output = self.hf_model(input_ids=tokens, use_cache=False, output_hidden_states=True, **kwargs)
                hidden, logits = output.hidden_states[-1][before], output.logits[before]
                return *full_logprobs(logits, targets, temperature=temperature, entropy=entropy), hidden
            hidden = self.hidden(tokens, **kwargs)[before]
            return *self._of_hidden(hidden, targets, temperature=temperature, entropy=entropy), hidden

    def _of_hidden(
        self, hidden: Tensor, targets: Tensor, *, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        """([N], [N]) log-probs and entropies of N tokens under what is sampled from; -inf where that never comes."""
        if self.steer is None:
            return token_logprobs(hidden, targets=targets, temperature=temperature, entropy=entropy, **self.head())
        head, found = self.output_head(), []
        for h, chosen in zip(hidden.split(_STEERED_ROWS), targets.split(_STEERED_ROWS), strict=True):
            logits = self.steer(head.logits(h), h)
            found.append(full_logprobs(logits, chosen, temperature=temperature, entropy=entropy))
        logprobs, entropies = zip(*found, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    def check_head(self) -> str | None:
        """Compare our log-probs with the model's own logits on a probe; on a mismatch use those, and say so.

        Some architectures change logits after the head in ways that no config key names. Both sides are in float32 from
        the head on: rounding would hide a small change.
        """
        output = self.hf_model.get_output_embeddings()
        if not hasattr(output, "weight") or type(output).__module__.startswith("peft"):
            self.use_full_logits = True
            return "the head is not a plain linear layer: log-probs come from full logits, which takes more memory"
        vocabulary = self.config.vocab_size
        tokens = (torch.arange(12, device=self.device) * 7919 % vocabulary)[None]
        rows = Rows(tokens, torch.tensor([1]), torch.tensor([11]))
        wide = torch.promote_types(output.weight.dtype, torch.float32)
        head = self.head()
        plain_head = Head(head["weight"], head["bias"], dtype=wide)
        with torch.no_grad(), self.autocast():
            hidden = self.hidden(tokens)[0, :-1].to(wide)
            hook = output.register_forward_hook(lambda _, given, __: plain_head.logits(given[0][0])[None])
            try:
                logits = self.hf_model(input_ids=tokens, use_cache=False).logits[0, :-1]
            finally:
                hook.remove()
            with torch.autocast(self.device.type, enabled=False):
                ours = token_logprobs(hidden, targets=rows.targets, entropy=False, **head)[0]
                theirs = full_logprobs(logits, rows.targets, entropy=False)[0]
        gap = (ours - theirs).abs().max().item()
        if gap <= 1e-3:
            return None
        self.use_full_logits = True
        return (
            f"chunked log-probs differ from {type(self.hf_model).__name__}'s own by {gap:.2g} nats: "
            "log-probs come from full logits, which takes more memory"
        )


def response_hidden(trunk: Callable[[Tensor], Tensor], rows: Rows, *, one_pass: bool = False) -> Tensor:
    """[N, D] what trunk(tokens [B, T]) -> [B, T, D] says before each of the N response tokens of `rows`.

    On a CPU, where a padded token costs as much as any and a further pass next to nothing, rows of similar length go
    through the trunk together, group by group. A GPU is quicker with one pass.
    """
    lengths = rows.prompt_lengths + rows.response_lengths
    groups = similar(lengths) if rows.tokens.device.type == "cpu" and not one_pass else []
    if len(groups) < 2:
        return trunk(rows.tokens)[rows.before_targets]
    parts = [rows.select(index) for index in groups]
    found = torch.cat([trunk(part.tokens)[part.before_targets] for part in parts])  # row after row of the groups
    ends = rows.response_lengths.cumsum(0)
    at = [torch.arange(int(ends[i] - rows.response_lengths[i]), int(ends[i])) for i in torch.cat(groups).tolist()]
    return found[torch.cat(at).argsort()]


def freeze(lm: Any, dtype: torch.dtype, *, same_bits: bool = False) -> Any:
    """`lm` itself, frozen, with its weights in `dtype`.

    same_bits: only the matrices, which autocast to `dtype` rounds at every use anyway. Embeddings and norms stay as
    they are, and with them the sums over layers: the model then computes what it did before, to the bit.
    Buffers always stay: rotary frequencies in bfloat16 would drift from the trained model's by position.
    """
    looked_up = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    for p in lm.requires_grad_(False).parameters():
        if not same_bits or (p.ndim > 1 and id(p) not in looked_up):
            p.data = p.data.to(dtype)
    return lm
