"""Two computations of one log-prob: what the sampler reported and what the trainer finds with the same weights.

Another engine, another precision or another kernel makes them differ, and then the tokens are slightly off-policy from
the first update on. This module has the weights that correct for it and the figures that show how large it is.

Three log-probs are in play: `sampler_` (the engine's), `old_` (the trainer's, at the weights that sampled) and
`policy_` (the trainer's, at the weights of this update). The ratio of the surrogate is π/π_old; the weights here are
π_old/π_sampler. Where the sampler's log-probs are usable as π_old there is nothing to correct and both are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rl.kl import bounded_exp
from rl.ranks import ALONE, Ranks

# (old, sampler) log-probs (B, T) -> detached weights (B, T)
Correction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Upper ends of the length buckets, in trained tokens of a completion; the last bucket has no end.
LENGTH_EDGES = (128, 1024, 4096, 16384)


@dataclass(frozen=True, slots=True)
class TruncatedIS:
    """min(π_old/π_sampler, cap) per token: truncated importance sampling (Flash-RL; cap 2 as in slime and verl).

    Example, cap 2: ratios (.3, .9, 1.5, 4) -> (.3, .9, 1.5, 2).
    """

    cap: float = 2.0

    def __post_init__(self) -> None:
        if not self.cap > 0:
            raise ValueError(f"cap must be above 0, got {self.cap}: it bounds the weight from above")

    def __call__(self, old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor) -> torch.Tensor:
        return bounded_exp(old_logprobs - sampler_logprobs).clamp(max=self.cap).detach()


@dataclass(frozen=True, slots=True)
class IcePop:
    """π_old/π_sampler inside [low, high], 0 outside: tokens on which the two disagree are left out (2510.18855).

    Both ends belong to the window. Bounds .5 and 5 as in NeMo-RL.
    Example: ratios (.3, .9, 1.5, 4, 6) -> (0, .9, 1.5, 4, 0).
    """

    low: float = 0.5
    high: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError(f"bounds must satisfy 0 <= low < high, got low {self.low} and high {self.high}")

    def __call__(self, old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor) -> torch.Tensor:
        ratio = bounded_exp(old_logprobs - sampler_logprobs).detach()
        return torch.where((ratio < self.low) | (ratio > self.high), 0.0, ratio)


@dataclass(slots=True)
class Mismatch:
    """How far sampler and trainer are apart, by length bucket: sums and maxima that add up over micro-batches.

    The tensors stay on the device until `means`; before the first micro-batch there are none.
    """

    # (buckets, 4), fp64: trained tokens, Σ |log π_old − log π_sampler|, Σ k3, tokens with correction weight 0.
    sums: torch.Tensor | None = None
    largest: torch.Tensor | None = None  # (buckets,), max |log π_old − log π_sampler|, nats

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        old_logprobs: torch.Tensor,
        sampler_logprobs: torch.Tensor,
        mask: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> Mismatch:
        """Of one micro-batch, all (B, T); `weights` are the correction's. k3 estimates KL(π_sampler‖π_old).

        A completion's bucket is chosen by its trained tokens.
        """
        trained = mask > 0
        difference = torch.where(trained, old_logprobs - sampler_logprobs, 0.0).double()
        k3 = bounded_exp(difference) - 1 - difference
        dropped = trained & (weights == 0) if weights is not None else torch.zeros_like(trained)
        lengths = trained.sum(-1)
        rows = torch.stack([lengths, difference.abs().sum(-1), k3.sum(-1), dropped.sum(-1)], dim=-1)  # (B, 4)
        edges = torch.tensor(LENGTH_EDGES, device=mask.device)
        bucket = torch.bucketize(lengths, edges)  # (B,), edges belong to the bucket below
        member = bucket == torch.arange(len(LENGTH_EDGES) + 1, device=mask.device).unsqueeze(-1)  # (buckets, B)
        return cls(member.double() @ rows, torch.where(member, difference.abs().amax(-1), 0.0).amax(-1))

    def add(self, other: Mismatch) -> None:
        """Take in another micro-batch's figures."""
        if self.sums is None or self.largest is None:
            self.sums, self.largest = other.sums, other.largest
        elif other.sums is not None and other.largest is not None:
            self.sums, self.largest = self.sums + other.sums, torch.maximum(self.largest, other.largest)

    def means(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Per trained token over all ranks, in nats: `mismatch_mean`, `_max`, `_k3` and `_masked` (a share), and the
        same with `/129-1024` and so on for every bucket that is not empty. {} if nothing was added anywhere.

        Example: log-ratios .1 and −.3 in one short completion: mean .2, max .3, k3 (.00517 + .04082) / 2 = .02299.
        """
        own = [] if self.sums is None or self.largest is None else [[self.sums.tolist(), self.largest.tolist()]]
        found = ranks.gather(own)
        if not found:
            return {}
        sums = torch.tensor([sums for sums, _ in found], dtype=torch.float64).sum(0)
        largest = torch.tensor([largest for _, largest in found], dtype=torch.float64).amax(0)
        metrics = _named("", sums.sum(0), largest.amax(0))
        for name, bucket_sums, bucket_largest in zip(_bucket_names(), sums, largest, strict=True):
            metrics |= _named(f"/{name}", bucket_sums, bucket_largest)
        return metrics


def _named(suffix: str, sums: torch.Tensor, largest: torch.Tensor) -> dict[str, float]:
    tokens, absolute, k3, dropped = sums.tolist()
    if not tokens:
        return {}
    return {
        f"mismatch_mean{suffix}": absolute / tokens,
        f"mismatch_max{suffix}": largest.item(),
        f"mismatch_k3{suffix}": k3 / tokens,
        f"mismatch_masked{suffix}": dropped / tokens,
    }


def _bucket_names() -> list[str]:
    starts = [1, *(edge + 1 for edge in LENGTH_EDGES)]
    return [f"{start}-{end}" for start, end in zip(starts, LENGTH_EDGES, strict=False)] + [f"{starts[-1]}-"]
