"""Log-probability and entropy of each token, from hidden states.

The logits of a batch are its largest tensor by far: 8,192 tokens of a vocabulary of 150,000 take 5 GB in fp32, their
softmax and its gradient as much again each. `token_logprobs` never holds them. It walks over the tokens in chunks,
keeps the results, and computes each chunk's logits a second time in the backward pass; only where all of them are
small are they kept, which saves that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

_CHUNK_BYTES = 8 * 2**20  # of fp32 logits at once, on a CPU: near its caches; about six such buffers are alive
_CHUNK_BYTES_ACCELERATOR = 256 * 2**20  # there, a matmul needs hundreds of rows to be worth reading the head for
_LEAST_ROWS = 32
_KEPT_BYTES = 160 * 2**20  # of log-probs over the vocabulary, from forward to backward: 1,250 tokens of 32,000
_SUMS_IN_FP32 = hasattr(torch.ops.aten.mm, "dtype")  # CUDA's product of bfloat16 factors in fp32, since torch 2.8


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int64[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    entropy: bool = True,
    chunk: int | None = None,
    device: str | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Log-probability of each target token, and entropy of the distribution that it was chosen from.

        z = softcap · tanh(scale · (h·Wᵀ + b) / softcap) / temperature
        logprob = z[target] - logsumexp(z)
        entropy = logsumexp(z) - Σ_v p_v·z_v,   p = softmax(z)

    Gradients are exact, to hidden, weight and bias, through both results; [N, V] is not in memory unless it is small:

        ∂logprob/∂z_v = [v = target] - p_v
        ∂entropy/∂z_v = -p_v·(z_v - Σ_u p_u·z_u)

    hidden   the hidden state *before* each target. To its dtype (or autocast's) the matmul's factors are rounded;
             logits, softmax and the sum of the weight's gradient over chunks are fp32 in any case.
    scale    multiplies the logits, as Granite and Cohere do.
    softcap  soft limit of the logits, as in Gemma 2; None: no limit.
    entropy  False saves the work and returns zeros.
    chunk    rows at a time: memory and speed, never the result; None: by the size of the vocabulary.
    device   cpu or cuda: compute as there; None: where `hidden` is. For tensors without data, see `Head`.

    Returns (logprobs, entropy), nats, fp32 (fp64 if hidden is).
    """
    if chunk is None:
        budget = _CHUNK_BYTES if (device or hidden.device.type) == "cpu" else _CHUNK_BYTES_ACCELERATOR
        chunk = max(_LEAST_ROWS, budget // (4 * weight.shape[0]))
    kind = {"scale": scale, "softcap": softcap, "dtype": _matmul_dtype(hidden), "device": device}
    # Asked here: inside an autograd function grad mode is always off. A soft-cap's gradient needs logits besides.
    keep = torch.is_grad_enabled() and softcap is None and 4 * hidden.shape[0] * weight.shape[0] <= _KEPT_BYTES
    logprobs, entropies = _TokenLogprobs.apply(hidden, weight, bias, targets, kind, temperature, entropy, chunk, keep)  # type: ignore[no-untyped-call]
    return logprobs, entropies


def full_logprobs(
    logits: Float[Tensor, "N V"], targets: Int64[Tensor, " N"], *, temperature: float = 1.0, entropy: bool = True
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """The same pair from logits that are in memory already: for heads that `token_logprobs` cannot reproduce.

    logits are the model's own, after its scaling and soft-cap. A logit may be -inf.
    Returns (logprobs, entropy), nats, fp32 (fp64 if logits are); entropy is zeros if not asked for.
    """
    log_p = torch.log_softmax(_at_least_fp32(logits) / temperature, dim=-1)
    logprobs = log_p.gather(-1, targets[:, None]).squeeze(-1)
    if not entropy:
        return logprobs, torch.zeros_like(logprobs)
    p = log_p.exp()
    return logprobs, -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)  # 0·log 0 = 0


class Head:
    """An output head: hidden states in, logits out; sampler and trainer both take theirs from here.

        z = softcap · tanh(scale · (h·Wᵀ + b) / softcap)

    Factors of the product are rounded to `dtype`, the matmul's. Its sums and all that follows are fp32 at least:
    rounding a logit of 20 to bfloat16 would move it by up to 0.06, and its token's probability by 6 %.

    device: cpu or cuda, whose kinds of factors are used; None: the weight's own. A GPU's memory is simulated on a CPU's
    tensors without data: without a GPU, torch turns off autocast for tensors of one.
    """

    def __init__(
        self, weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None = None, *, scale: float = 1.0,
        softcap: float | None = None, dtype: torch.dtype, device: str | None = None,
    ) -> None:  # fmt: skip
        self.dtype, self.scale, self.softcap, self.device = dtype, scale, softcap, device or weight.device.type
        self.weight = self.factor(weight)
        self.bias = None if bias is None else bias.to(torch.promote_types(dtype, torch.float32))

    def factor(self, x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        """`x` rounded to the matmul's dtype; held in fp32 where the device cannot sum a bfloat16 product in fp32."""
        x = x.to(self.dtype)
        return x if self.device == "cuda" and _SUMS_IN_FP32 else _at_least_fp32(x)

    def logits(self, hidden: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """z, at least fp32, in memory of its own."""
        h = self.factor(hidden)
        with torch.autocast(h.device.type, enabled=False):  # `dtype` has settled it
            if h.dtype in (torch.bfloat16, torch.float16):
                z = torch.mm(h, self.weight.T, out_dtype=torch.float32)
                z = z if self.bias is None else z.add_(self.bias)
            else:
                z = linear(h, self.weight, self.bias)
        if self.softcap is None:
            return z if self.scale == 1.0 else z.mul_(self.scale)
        return z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)

    def backward_(
        self, grad: Float[Tensor, "N V"], divided: Float[Tensor, "N V"] | None, temperature: float
    ) -> Float[Tensor, "N V"]:
        """Turn ∂L/∂(z/T) into ∂L/∂(h·Wᵀ + b), in place; `divided` is z/T, needed under a soft-cap, and is used up."""
        grad = grad.mul_(self.scale / temperature)
        if self.softcap is None:
            return grad
        assert divided is not None
        tanh = divided.mul_(temperature / self.softcap)
        return grad.mul_(tanh.square_().neg_().add_(1))


class _TokenLogprobs(torch.autograd.Function):
    """Chunks of rows, forward and again backward; between the two the entropies are kept, and log-probs if small."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "N D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        targets: Int64[Tensor, " N"],
        kind: dict[str, Any],
        temperature: float,
        entropy: bool,
        chunk: int,
        keep: bool,
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        head = Head(weight, bias, **kind)
        logprobs = hidden.new_zeros(hidden.shape[0], dtype=torch.promote_types(head.dtype, torch.float32))
        entropies = torch.zeros_like(logprobs)
        ctx.kept = []
        for rows in _chunks(hidden.shape[0], chunk):
            log_p = torch.log_softmax(_divide_(head.logits(hidden[rows]), temperature), dim=-1)
            logprobs[rows] = log_p.gather(-1, targets[rows, None]).squeeze(-1)
            if entropy:
                entropies[rows] = -torch.linalg.vecdot(log_p.exp(), log_p)
            if keep and any(ctx.needs_input_grad):
                ctx.kept.append(log_p)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        ctx.kind, ctx.temperature, ctx.chunk = kind, temperature, chunk
        ctx.set_materialize_grads(False)
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_logprobs, grad_entropies = grad_outputs
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(entropies)
        head = Head(weight, bias, **ctx.kind)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=entropies.dtype) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=entropies.dtype) if wants_bias else None

        with torch.autocast(hidden.device.type, enabled=False):
            for i, rows in enumerate(_chunks(hidden.shape[0], ctx.chunk)):
                z = None if ctx.kept else _divide_(head.logits(hidden[rows]), ctx.temperature)
                log_p = torch.log_softmax(z, dim=-1) if z is not None else ctx.kept[i]
                grad_z = log_p.exp().neg_()
                if grad_entropies is None:
                    grad_z.mul_(grad_logprobs[rows, None])
                else:
                    through_entropy = (log_p + entropies[rows, None]).mul_(grad_entropies[rows, None])
                    grad_z.mul_(through_entropy.add_(grad_logprobs[rows, None]))
                grad_z.scatter_add_(-1, targets[rows, None], grad_logprobs[rows, None])
                grad_raw = head.backward_(grad_z, z, ctx.temperature)
                if grad_bias is not None:
                    grad_bias += grad_raw.sum(0)
                grad_raw = grad_raw.to(head.weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (grad_raw @ head.weight).to(hidden.dtype)
                if grad_weight is not None and grad_weight.dtype == grad_raw.dtype:
                    grad_weight.addmm_(grad_raw.T, head.factor(hidden[rows]))  # saves a second [V, D]
                elif grad_weight is not None:
                    grad_weight += grad_raw.T @ head.factor(hidden[rows])
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def _chunks(n: int, chunk: int) -> list[slice]:
    return [slice(start, start + chunk) for start in range(0, n, chunk)]


def _divide_(x: Float[Tensor, "*S"], temperature: float) -> Float[Tensor, "*S"]:
    """x / temperature in place, as the sampler divides."""
    return x if temperature == 1.0 else x.div_(temperature)


def _at_least_fp32(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _matmul_dtype(hidden: Float[Tensor, "N D"]) -> torch.dtype:
    """What a linear layer would multiply in here: autocast's dtype, which leaves fp64 alone, or the input's own."""
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype
