"""Estimators of the divergence from a reference, from the log-probs of sampled tokens (2501.12948, eq. 2; PPO; V3.2).

Notation: x is drawn from the policy π, r = π_ref/π. k1 = −log r, k2 = ½ (log r)², k3 = r − 1 − log r; k1 and k3 average
to KL(π‖π_ref). What an estimator is worth as a *loss* is decided by its gradient on sampled tokens, not by its value:

| estimator | its average gradient as a loss term | where it belongs |
|---|---|---|
| k1 | zero | the reward only (`kl_in_reward`); no function here can be put into a loss |
| k2 | that of the reverse KL(π‖π_ref), on-policy | the loss |
| k3 | that of the *forward* KL(π_ref‖π) | the loss, for fidelity to GRPO and R1 |
| k3 times π/π_old | that of the reverse KL, off-policy too | the loss; the default |

All estimators take (policy, ref, old) log-probs of one shape, in nats, and return that shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# Log-ratios are clamped here before exp: exp(20) = 5e8 stays finite in fp32 and no sane ratio is near it.
MAX_LOG_RATIO = 20.0

KLEstimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def bounded_exp(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp of a log-ratio clamped to ±20: 0 -> 1, 1000 -> 4.9e8 instead of inf."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def k2(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """½ (log π/π_ref)² per token. Example: (π .5, ref .4) -> .024897; (.4, .5) -> .024897."""
    return 0.5 * (policy_logprobs - ref_logprobs).square()


def k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """r − 1 − log r with r = π_ref/π, per token, as GRPO and R1 write it. Example: (π .5, ref .4) -> .023144; (.4, .5)
    -> .026856.

    Known defect, kept for fidelity: its gradient is that of the forward KL, and it explodes where π is far below π_ref.
    """
    log_r = (ref_logprobs - policy_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_r.exp() - 1 - log_r


def k3_corrected(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, old_logprobs: torch.Tensor) -> torch.Tensor:
    """ρ · k3 with ρ = π/π_old (DeepSeek-V3.2, 2512.02556): value and gradient of the reverse KL, unbiased off-policy.

    ρ is always the ratio of the single token, also where the surrogate uses the ratio of the whole completion.
    Example: (π .5, ref .4, old .25) -> 2 · .023144.
    """
    return bounded_exp(policy_logprobs - old_logprobs) * k3(policy_logprobs, ref_logprobs, old_logprobs)


@dataclass(frozen=True, slots=True)
class KLTerm:
    """coefficient · estimator, added to the loss of every trained token. R1: k3 at .001; DeepSeekMath: k3 at .04."""

    estimator: KLEstimator
    coefficient: float

    def __post_init__(self) -> None:
        if not self.coefficient > 0:
            raise ValueError(f"a KL coefficient must be above 0, got {self.coefficient}; leave the term out for no KL")


def kl_in_reward(sampler_logprobs: Sequence[float], ref_logprobs: Sequence[float], coefficient: float) -> float:
    """What k1 adds to the reward of one completion: −coefficient · Σ_t log π_sampler/π_ref (PPO; TULU 3, 2411.15124).

    Both are (T,) in nats. The samples come from the sampler's policy, so its log-probs make the estimate unbiased. A
    plain number on purpose: k1 has no use under a gradient.

    Example: reward 10, coefficient .05, a completion whose log-ratios sum to 20: 10 + (−1) = 9.
    """
    log_ratios = [sampled - ref for sampled, ref in zip(sampler_logprobs, ref_logprobs, strict=True)]
    return -coefficient * math.fsum(log_ratios)
