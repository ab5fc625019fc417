"""What a surrogate does with the ratio and the advantage of a token: clip, cap, gate, weigh.

A rule takes policy log-probs (B, T), log-ratios (B, T) and advantages (B, 1) and returns the loss of each token (B, T)
and which tokens it bounded (B, T, bool): those whose gradient it removed or whose weight it cut. ρ is π/π_old at the
level that the objective chose, exp of the log-ratio clamped to ±20.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from rl.kl import MAX_LOG_RATIO, bounded_exp

Terms = tuple[torch.Tensor, torch.Tensor]


class Rule(ABC):
    """What every rule answers beside its loss."""

    __slots__ = ()

    whole_sequence: ClassVar[bool] = False  # defined on the ratio of the whole completion, by which it weighs log-probs

    @property
    def trains_without_advantage(self) -> bool:
        """Whether a row with advantage 0 has a gradient."""
        return False

    @abstractmethod
    def __call__(self, policy_logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor) -> Terms: ...


@dataclass(frozen=True, slots=True)
class Clip(Rule):
    """−min(ρA, clip(ρ, 1 − low, 1 + high) A): PPO's clip; low < high is clip-higher (DAPO, 2503.14476, section 3.1).

    For A < 0 that has no bound as ρ grows. Two ways to give it one, at most one of them:
    `dual` c (dual clip, 1912.09729; verl has c = 3): the term is at least c·A. It wins over a wide clip: with R1's
    high = 10 and c = 3 negative advantages are still held at 3.
    `delta` (two-sided clip, INTELLECT-2, 2505.07291; TRL's `delta`): ρ is at most delta in the unclipped branch. Above
    1 + high, where alone it is allowed, it is the same as dual = delta.

    Example (.2, .28): (ρ, A) = (1.5, 1) -> loss −1.28; (.5, 1) -> −.5; (1.5, −1) -> 1.5; (.5, −1) -> .8. With dual 3,
    (7, −1) -> 3 instead of 7.
    """

    low: float
    high: float
    dual: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        if not (self.low > 0 and self.high > 0):
            raise ValueError(f"clip bounds are distances from ratio 1, both above 0; got {self.low} and {self.high}")
        if self.dual is not None and self.delta is not None:
            raise ValueError(f"dual ({self.dual}) and delta ({self.delta}) bound the same branch; give one of them")
        if self.dual is not None and not self.dual > 1:
            raise ValueError(f"dual must be above 1, got {self.dual}: at 1 on-policy tokens would have no gradient")
        if self.delta is not None and not self.delta > 1 + self.high:
            raise ValueError(f"delta must be above 1 + high = {1 + self.high:g}, got {self.delta}: it would clip A > 0")

    def __call__(self, policy_logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor) -> Terms:
        ratio = bounded_exp(log_ratio)
        free = (ratio if self.delta is None else ratio.clamp(max=self.delta)) * advantages
        held = ratio.clamp(1 - self.low, 1 + self.high) * advantages
        terms = torch.minimum(free, held)
        if self.dual is not None:
            terms = torch.where(advantages < 0, torch.maximum(terms, self.dual * advantages), terms)
        return -terms, (terms != ratio * advantages).detach()


@dataclass(frozen=True, slots=True)
class Cispo(Rule):
    """−sg[min(ρ, cap)] · A · log π (MiniMax-M1, 2506.13585): a capped weight, no token loses its gradient.

    `cap` is the absolute cap on ρ as in TRL, not an ε to be added to 1. The paper's lower bound has no effect and is
    left out. Example, cap 5: (ρ 7, A 1, log π −.5) -> 2.5.
    """

    cap: float = 5.0

    def __post_init__(self) -> None:
        if not self.cap > 1:
            raise ValueError(f"cap must be above 1, got {self.cap}: it bounds the ratio, not its distance from 1")

    def __call__(self, policy_logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor) -> Terms:
        ratio = bounded_exp(log_ratio.detach())
        return -ratio.clamp(max=self.cap) * advantages * policy_logprobs, ratio > self.cap


@dataclass(frozen=True, slots=True)
class Sapo(Rule):
    """−(4/τ) σ(τ(ρ − 1)) · A (SAPO, 2511.20347): a gate with slope 1 at ρ = 1 that fades out, in place of the clip.

    τ is `tau_positive` for A > 0, else `tau_negative`, which fades faster. Gate, τ 1: ρ .5/1/1.5 -> 1.5102/2/2.4898.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        if not (self.tau_positive > 0 and self.tau_negative > 0):
            raise ValueError(f"both tau must be above 0, got {self.tau_positive} and {self.tau_negative}")

    def __call__(self, policy_logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor) -> Terms:
        ratio = bounded_exp(log_ratio)
        tau = torch.where(advantages > 0, self.tau_positive, self.tau_negative)
        gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
        return -gate * advantages, torch.zeros_like(ratio, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class MirrorDescent(Rule):
    """−sg[A − τΔ] · log π: Kimi k1.5's surrogate (2501.12599, section 2.3), Δ the completion's summed log-ratio.

    Summed over a completion, its gradient is −(r − r̄ − τΔ) ∇log π(y), the one that the paper writes. The literal
    squared loss (r − τ log Z − τΔ)² has 2τ times that gradient, which would hide τ in the learning rate. A is r − r̄
    (`mean_baseline`) or r − τ log Z (`LogPartition`). Δ needs no clamp: nothing is exponentiated.

    Example, τ .5: A (.5, −.5, .5, −.5) and Δ (.2, −.1, 0, .4) -> coefficients (.4, −.45, .5, −.7).
    """

    tau: float
    whole_sequence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.tau >= 0:
            raise ValueError(f"tau must be at least 0, got {self.tau}")

    @property
    def trains_without_advantage(self) -> bool:
        return self.tau > 0

    def __call__(self, policy_logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor) -> Terms:
        coefficients = advantages - self.tau * log_ratio.detach()
        return -coefficients * policy_logprobs, torch.zeros_like(policy_logprobs, dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class Vespo(Rule):
    """−sg[φ(w)] · A · log π with φ(w) = exp(λ + k log w − λw) (VESPO, 2602.10693), w the completion's ratio.

    φ(1) = 1; log w is held in [log 1e-8, 20]. (k, λ) is (2, 3) for A >= 0 and (3, 2) else.
    Example: w .5/1/2 -> 1.1204/1/.1991 for A >= 0 and .3398/1/1.0827 for A < 0.
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0
    whole_sequence: ClassVar[bool] = True

    def __call__(self, policy_logprobs: torch.Tensor, log_ratio: torch.Tensor, advantages: torch.Tensor) -> Terms:
        log_w = log_ratio.detach().clamp(math.log(1e-8), MAX_LOG_RATIO)
        k = torch.where(advantages >= 0, self.k_positive, self.k_negative)
        scale = torch.where(advantages >= 0, self.lambda_positive, self.lambda_negative)
        phi = (scale + k * log_w - scale * log_w.exp()).exp()
        return -phi * advantages * policy_logprobs, torch.zeros_like(phi, dtype=torch.bool)
