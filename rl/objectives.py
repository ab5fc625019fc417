"""Policy-gradient losses as pure functions of tensors.

Shapes: B rows, T completion positions (padded on the right; `mask` is 1 on the tokens that are trained). Everything is
in nats. Names say whose log-probabilities they are: `policy_` (the weights being trained), `sampler_` (the weights that
drew the tokens), `ref_` (the frozen reference).

The denominator is an argument. A loss never guesses what it is averaged over: the caller counts the tokens of the whole
optimizer batch once, so the result does not depend on how the batch was cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

# Log-ratios are clamped here before exp: exp(20) = 5e8 stays finite in fp32 and no sane ratio is near it.
MAX_LOG_RATIO = 20.0

KLEstimator = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def clipped_surrogate(
    policy_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    epsilon_low: float,
    epsilon_high: float,
    denominator: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """PPO's clipped surrogate per token, summed over the mask and divided by `denominator`.

    `advantages`: (B,), one a completion. loss = −Σ min(ρA, clip(ρ, 1 − ε_low, 1 + ε_high) A) / denominator with
    ρ = π_policy / π_sampler. With a denominator of all trained tokens of the optimizer batch this is DAPO's token mean
    (2503.14476, section 3.3) with clip-higher (3.1). ε_low = ε_high gives GRPO's clip (2402.03300).

    Deviation from GRPO: no 1/|o| per sequence, which would punish each token of a long wrong answer less.

    Example (ε .2/.28): (ρ, A) = (1.5, 1) -> 1.28; (.5, 1) -> .5; (1.5, −1) -> −1.5; (.5, −1) -> −.8.

    Returns the loss (scalar) and sums for the metrics: `clipped` (number of tokens whose gradient the clip removed),
    `ratio_error` (Σ |ρ − 1|).
    """
    log_ratio = (policy_logprobs - sampler_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    token_advantages = advantages.unsqueeze(-1)
    free = ratio * token_advantages
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high) * token_advantages
    # where, not a product: a padded position may hold anything, and nan * 0 is nan.
    terms = torch.where(mask > 0, torch.minimum(free, clipped), 0.0)
    with torch.no_grad():
        sums = {
            "clipped": ((clipped < free) & (mask > 0)).sum(),
            "ratio_error": torch.where(mask > 0, (ratio - 1).abs(), 0.0).sum(),
        }
    return -terms.sum() / denominator, sums


def k2(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor) -> torch.Tensor:
    """½ (log π/π_ref)² per token: as a loss its gradient is that of the reverse KL. (π .5, ref .4) -> .024897."""
    return 0.5 * (policy_logprobs - ref_logprobs).square()


def k3(policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor) -> torch.Tensor:
    """r − 1 − log r with r = π_ref/π, per token, as R1 writes it (2501.12948, eq. 2). (π .5, ref .4) -> .023144.

    Known defect, kept for fidelity: as a loss its gradient is that of the *forward* KL.
    """
    log_r = (ref_logprobs - policy_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_r.exp() - 1 - log_r


def k3_corrected(
    policy_logprobs: torch.Tensor, ref_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor
) -> torch.Tensor:
    """ρ · k3 with ρ = π/π_sampler (DeepSeek-V3.2, 2512.02556): unbiased value and gradient of the reverse KL."""
    ratio = (policy_logprobs - sampler_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return ratio * k3(policy_logprobs, ref_logprobs, sampler_logprobs)


def kl_penalty(
    estimator: KLEstimator,
    policy_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    sampler_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    denominator: float,
) -> torch.Tensor:
    """Σ estimator over the mask / denominator, to be added to the loss with its coefficient."""
    values = estimator(policy_logprobs, ref_logprobs, sampler_logprobs)
    return torch.where(mask > 0, values, 0.0).sum() / denominator
