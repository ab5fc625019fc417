"""Log-probabilities and entropies of given tokens from hidden states, without ever holding all logits.

M positions of a vocabulary of 151,936 in fp32 are 600 kB of logits each: 10 GB for a micro-batch of 16,384 tokens, and
as much again for their gradient. Here the output layer runs on `chunk_tokens` positions at a time and only a
log-sum-exp is kept of them; backward makes each chunk's logits again. The cost is one more product with the output
layer. The entropy comes from the same pass and has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to the output layer's product x to make logits of it: softcap · tanh(scale · x / softcap).

    Without a softcap only scale · x. Example: scale .5, softcap 2: 4 -> 2 tanh(1) = 1.523.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply_(self, product: torch.Tensor) -> torch.Tensor:
        """Of a product, in place."""
        if self.scale != 1:
            product.mul_(self.scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        return product

    def chain_(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient on the product, in place of the gradient on the logits. `logits` are overwritten."""
        if self.softcap is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1))
        return gradient.mul_(self.scale) if self.scale != 1 else gradient


PLAIN = LogitTransform()


def chunked_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    transform: LogitTransform = PLAIN,
    chunk_tokens: int = CHUNK_TOKENS,
    fp32: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` and entropies under softmax(transform(hidden · weightᵀ + bias) / temperature).

    `hidden` (M, H), `weight` (V, H), `bias` (V,), `targets` (M,) -> two (M,) fp32 tensors in nats; only the first has a
    gradient. The product runs in autocast's dtype if that is on, else in the weight's, with `fp32` in fp32 (a bf16
    output layer is the largest part of the gap between sampler and trainer: MiniMax-M1, 2506.13585);
    everything after it is fp32.

    Example: one position, logits (0, log 3), target 1, temperature 1: log .75 = −.28768, entropy .56233.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}; at least one position must go through the output layer")
    device = weight.device.type
    dtype = weight.dtype
    if fp32:
        dtype = torch.float32
    elif torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, temperature, transform, chunk_tokens, dtype)


class _ChunkedLogprobs(torch.autograd.Function):
    """Saves hidden states, weight and one log-sum-exp a position; casts by itself, since backward has no autocast."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        transform: LogitTransform,
        chunk_tokens: int,
        dtype: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logsumexps, logprobs, entropies = hidden.new_empty(3, len(hidden), dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
            for start in range(0, len(hidden), chunk_tokens):
                part = slice(start, start + chunk_tokens)
                logits = transform.apply_(linear(hidden[part].to(dtype), w, b).float()).div_(temperature)
                highest = logits.amax(-1)
                shifted = logits.sub_(highest.unsqueeze(-1))
                exps = shifted.exp()
                total = exps.sum(-1)
                logprobs[part] = shifted.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1) - total.log()
                entropies[part] = total.log() - exps.mul_(shifted).sum(-1) / total
                logsumexps[part] = highest + total.log()
                del logits, shifted, exps  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexps)
        ctx.temperature, ctx.transform, ctx.chunk_tokens, ctx.dtype = temperature, transform, chunk_tokens, dtype
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, logsumexps = ctx.saved_tensors
        grads = grad_outputs[0].float().unsqueeze(-1)  # (M, 1); the second is the entropies', which has none
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        w, b = weight.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        # Sums over chunks are taken in fp32, whatever the weights are.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = None if bias is None or not needs_bias else torch.zeros_like(bias, dtype=torch.float32)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), ctx.chunk_tokens):
                part = slice(start, start + ctx.chunk_tokens)
                h = hidden[part].to(ctx.dtype)
                logits = ctx.transform.apply_(linear(h, w, b).float())
                capped = ctx.transform.softcap is not None
                scaled = logits / ctx.temperature if capped else logits.div_(ctx.temperature)
                # d log p(target) / d logits = (onehot − p) / temperature
                gradient = scaled.sub_(logsumexps[part].unsqueeze(-1)).exp_().neg_().mul_(grads[part])
                gradient.scatter_add_(-1, targets[part].unsqueeze(-1), grads[part]).div_(ctx.temperature)
                gradient = ctx.transform.chain_(gradient, logits).to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = gradient @ w
                if grad_weight is not None:
                    if ctx.dtype == torch.float32:
                        grad_weight.addmm_(gradient.t(), h)
                    else:
                        grad_weight += gradient.t() @ h
                if grad_bias is not None:
                    grad_bias += gradient.sum(0, dtype=torch.float32)
                del logits, scaled, gradient
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if bias is not None and grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None
