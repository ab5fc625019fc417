"""Policy-gradient losses: one skeleton with slots, and the named methods as choices for them.

    log-ratio -> rule (clip, weight, gate) -> sequence mask -> mismatch correction -> KL -> aggregation / denominator

Shapes: B completions, T completion positions, padded on the right; `mask` is 1 on the tokens that are trained.
Everything is in nats. Names say whose log-probs they are: `policy_` (the weights being trained, with gradient), `old_`
(the denominator of the ratio), `sampler_` (what the engine reported), `ref_` (the reference).

The denominator is an argument. A loss never guesses what it is averaged over: the caller gives the lengths of *all*
completions of the optimizer batch to `aggregation.denominator` once, so that the result does not depend on how the
batch was cut into micro-batches, nor on leaving out rows that have no gradient. For that reason TRL's `bnpo`, which
divides by the tokens of the micro-batch, has no place here. A completion that the sequence mask or the correction drops
still counts in the denominator (as in TRL): dropping one must not make the others louder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from rl.kl import KLTerm, bounded_exp, k3
from rl.mismatch import Correction
from rl.rules import Cispo, Clip, MirrorDescent, Rule, Sapo, Vespo


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One micro-batch. Padded positions may hold anything, also nan; every tensor but `advantages` is always (B, T)."""

    policy_logprobs: torch.Tensor  # with gradient
    old_logprobs: torch.Tensor  # the sampler's own where those are usable, else recomputed by the trainer
    sampler_logprobs: torch.Tensor
    advantages: torch.Tensor  # (B,), or (B, T): one a token
    mask: torch.Tensor  # 1 on trained tokens
    ref_logprobs: torch.Tensor | None = None

    @property
    def trained(self) -> torch.Tensor:
        return self.mask > 0

    @property
    def by_token(self) -> torch.Tensor:
        """The advantages against (B, T): (B, 1) or (B, T)."""
        return self.advantages if self.advantages.ndim == 2 else self.advantages.unsqueeze(-1)

    def without_padding(self) -> LossInputs:
        """The same with 0 in every untrained position: `where`, not a product, because nan · 0 is nan."""

        def clean(values: torch.Tensor) -> torch.Tensor:
            return torch.where(self.trained, values, 0.0)

        return replace(
            self,
            policy_logprobs=clean(self.policy_logprobs),
            old_logprobs=clean(self.old_logprobs),
            sampler_logprobs=clean(self.sampler_logprobs),
            ref_logprobs=None if self.ref_logprobs is None else clean(self.ref_logprobs),
        )


# Ratios. All give log-ratios (B, T) of inputs without padding; the rules exponentiate them.
LogRatio = Callable[[LossInputs], torch.Tensor]


def token_log_ratio(inputs: LossInputs) -> torch.Tensor:
    """log π/π_old of each token (DeepSeekMath, 2402.03300)."""
    return inputs.policy_logprobs - inputs.old_logprobs


def sequence_log_ratio(inputs: LossInputs) -> torch.Tensor:
    """log π/π_old of the whole completion, the same at each of its tokens: the sum of theirs, with its full gradient.

    R1 writes its ratio like this (2501.12948, eq. 1), Kimi k1.5 its Δ. Ratios (1.1, .95, 1.3, .9) -> log 1.222650.
    """
    return token_log_ratio(inputs).sum(-1, keepdim=True).expand_as(inputs.policy_logprobs)


def sequence_mean_log_ratio(inputs: LossInputs) -> torch.Tensor:
    """The mean of the completion's token log-ratios: log of the geometric mean s of its ratios (GSPO, 2507.18071).

    In GSPO's token form sg[s] · π_t/sg[π_t] (section 4.3): the value is s at every token, the gradient of token t goes
    to token t only, so that weights per token mean what they say. Ratios (1.1, .95, 1.3, .9) -> log 1.0515394.
    """
    lengths = inputs.trained.sum(-1, keepdim=True).clamp(min=1)
    means = (token_log_ratio(inputs).sum(-1, keepdim=True) / lengths).detach()
    return means + inputs.policy_logprobs - inputs.policy_logprobs.detach()


class Aggregation(Protocol):
    """How per-token losses become one number: `sums` over a micro-batch, divided by `denominator` of the whole batch.

    `lengths`: trained tokens of every decided completion of the optimizer batch, also of those that have no row.
    """

    def denominator(self, lengths: Sequence[int]) -> float: ...

    def sums(self, losses: torch.Tensor, trained: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class TokenMean:
    """Σ_i Σ_t ℓ / Σ_i |o_i| (DAPO, 2503.14476, section 3.3). Lengths 2 and 8: each token weighs 1/10."""

    def denominator(self, lengths: Sequence[int]) -> float:
        return float(max(sum(lengths), 1))

    def sums(self, losses: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        return losses.sum()


@dataclass(frozen=True, slots=True)
class SequenceMean:
    """(1/N) Σ_i (1/|o_i|) Σ_t ℓ (DeepSeekMath, 2402.03300, section 4.1). Lengths 2 and 8: tokens weigh 1/4 and 1/16.

    Known bias, kept for fidelity: each token of a long wrong answer is punished less, so wrong answers grow.
    """

    def denominator(self, lengths: Sequence[int]) -> float:
        return float(max(len(lengths), 1))

    def sums(self, losses: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        return (losses.sum(-1) / trained.sum(-1).clamp(min=1)).sum()


@dataclass(frozen=True, slots=True)
class SequenceSum:
    """(1/N) Σ_i Σ_t ℓ: the policy gradient itself; its scale grows with length. Two completions: tokens weigh 1/2."""

    def denominator(self, lengths: Sequence[int]) -> float:
        return float(max(len(lengths), 1))

    def sums(self, losses: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        return losses.sum()


@dataclass(frozen=True, slots=True)
class Constant:
    """Σ_i Σ_t ℓ / (N · length) (Dr.GRPO, 2503.20783; `length` is the generation budget).

    Lengths 2 and 8, `length` 16: each token weighs 1/32. A schedule of the budget changes the effective learning rate.
    """

    length: int

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length must be at least 1 token, got {self.length}; give the generation budget")

    def denominator(self, lengths: Sequence[int]) -> float:
        return float(max(len(lengths), 1) * self.length)

    def sums(self, losses: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        return losses.sum()


@dataclass(frozen=True, slots=True)
class OffPolicyMask:
    """Drops completions with A < 0 whose mean log π_sampler/π is above `delta` (DeepSeek-V3.2, 2512.02556).

    `delta` is in nats per token (slime 1e-4). The sampler's own log-probs are used, so that drift through updates and
    mismatch both count; positives always stay. Example, delta .1: (A −1, mean .2) goes, (A −1, .1) and (A 1, .2) stay.
    """

    delta: float

    def __call__(self, inputs: LossInputs) -> torch.Tensor:
        """Which completions stay: (B, 1) bool.

        Errors: ValueError for advantages per token, of which a completion may have both signs.
        """
        if inputs.advantages.ndim == 2:
            raise ValueError(f"{self} drops completions by the sign of their advantage; here every token has its own")
        drift = inputs.sampler_logprobs - inputs.policy_logprobs.detach()
        mean = drift.sum(-1) / inputs.trained.sum(-1).clamp(min=1)
        drop = (inputs.advantages < 0) & (mean > self.delta)  # a nan is kept, so that the loss shows it
        return ~drop.unsqueeze(-1)


@dataclass(frozen=True, slots=True)
class Objective:
    """One choice per slot. Picklable, and compared by value.

    Errors: ValueError for slots that do not go together: `MirrorDescent` and `Vespo` are defined on the ratio of the
    whole completion. With that ratio every token of a completion carries the completion's one term and its whole
    gradient, so for the other rules only a mean over the tokens, `SequenceMean`, counts it once.
    """

    ratio: LogRatio
    rule: Rule
    aggregation: Aggregation
    mask: OffPolicyMask | None = None
    correction: Correction | None = None
    kl: KLTerm | None = None

    def __post_init__(self) -> None:
        whole = self.ratio is sequence_log_ratio
        if self.rule.whole_sequence and not whole:
            raise ValueError(f"{self.rule} needs ratio=sequence_log_ratio, not {self.ratio}")
        if whole and not self.rule.whole_sequence and not isinstance(self.aggregation, SequenceMean):
            raise ValueError(f"{self.rule} on sequence_log_ratio needs SequenceMean(), not {self.aggregation}")

    @property
    def needs_all_rows(self) -> bool:
        """Whether rows with advantage 0 have a gradient too, so that the loop must not leave them out."""
        return self.kl is not None or self.rule.trains_without_advantage


def policy_loss(
    objective: Objective, inputs: LossInputs, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch (scalar) and its sums over trained tokens, from which metrics are made.

    `denominator` comes from `objective.aggregation.denominator`; losses of micro-batches add up to that of the batch.
    Sums, all detached: `clip_share` (tokens whose gradient or weight the rule bounded), `ratio_error` (Σ |π/π_old − 1|
    of single tokens), and where the slot is filled `off_policy_share` (tokens of dropped completions),
    `correction_weight` and `correction_masked` (Σ of the weights; tokens with weight 0), `kl` (Σ of the estimator).

    Errors: ValueError if there is a KL term and no `ref_logprobs`; for an advantage a token with the ratio of the whole
    completion, whose gradient would give each token the advantages of all.
    """
    if inputs.advantages.ndim == 2 and objective.ratio is sequence_log_ratio:
        raise ValueError("an advantage a token needs a ratio a token: ratio=token_log_ratio, not sequence_log_ratio")
    inputs = inputs.without_padding()
    trained = inputs.trained
    log_ratio = objective.ratio(inputs)
    losses, bounded = objective.rule(inputs.policy_logprobs, log_ratio, inputs.by_token)
    found = {"clip_share": bounded, "ratio_error": (bounded_exp(token_log_ratio(inputs)) - 1).abs()}
    if objective.mask is not None:
        keep = objective.mask(inputs)
        losses = torch.where(keep, losses, 0.0)
        found["off_policy_share"] = (~keep).expand_as(trained)
    if objective.correction is not None:
        weights = objective.correction(inputs.old_logprobs, inputs.sampler_logprobs)
        losses = losses * weights
        found |= {"correction_weight": weights, "correction_masked": weights == 0}
    if objective.kl is not None:
        if inputs.ref_logprobs is None:
            raise ValueError(f"{objective.kl} needs ref_logprobs: compute them with a reference model")
        divergence = objective.kl.estimator(inputs.policy_logprobs, inputs.ref_logprobs, inputs.old_logprobs)
        losses = losses + objective.kl.coefficient * divergence
        found["kl"] = divergence
    loss = objective.aggregation.sums(torch.where(trained, losses, 0.0), trained) / denominator
    return loss, {name: torch.where(trained, value.detach(), 0.0).sum() for name, value in found.items()}


def grpo(kl: KLTerm | None = None) -> Objective:
    """GRPO (DeepSeekMath, 2402.03300, section 4.1) with its clip of .2. The paper adds `KLTerm(k3, .04)`."""
    return Objective(token_log_ratio, Clip(0.2, 0.2), SequenceMean(), kl=kl)


def r1(kl_coefficient: float = 0.001) -> Objective:
    """GRPO as R1 writes it (2501.12948, eq. 1): one ratio for the whole output, ε 10, k3 at .001.

    Deviations: the product of the ratios is a clamped sum of logs, and k3 is the mean over the output's tokens. With
    ε_low 10 there is no lower clip, and nothing bounds the loss of a negative advantage: R1 lives on small updates.
    """
    return Objective(sequence_log_ratio, Clip(10, 10), SequenceMean(), kl=KLTerm(k3, kl_coefficient))


def dapo() -> Objective:
    """DAPO (2503.14476): clip-higher (section 3.1), token mean (section 3.3), no KL."""
    return Objective(token_log_ratio, Clip(0.2, 0.28), TokenMean())


def dr_grpo(max_tokens: int) -> Objective:
    """Dr.GRPO (2503.20783): a constant divisor instead of 1/|o|; goes with `mean_baseline`."""
    return Objective(token_log_ratio, Clip(0.2, 0.2), Constant(max_tokens))


def gspo() -> Objective:
    """GSPO (2507.18071, section 4): the geometric mean of the ratios, whose clip is narrow: 3e-4 and 4e-4."""
    return Objective(sequence_mean_log_ratio, Clip(3e-4, 4e-4), SequenceMean())


def luspo() -> Objective:
    """LUSPO (2602.05261): GSPO times |o_i|, which takes its 1/|o_i| back; clip 2e-3 and 2.5e-3."""
    return Objective(sequence_mean_log_ratio, Clip(2e-3, 2.5e-3), SequenceSum())


def cispo(cap: float = 5.0) -> Objective:
    """CISPO (MiniMax-M1, 2506.13585) with ScaleRL's cap of 5 (2510.13786)."""
    return Objective(token_log_ratio, Cispo(cap), TokenMean())


def sapo() -> Objective:
    """SAPO (2511.20347): the soft gate with τ 1 for A > 0 and 1.05 else."""
    return Objective(token_log_ratio, Sapo(), SequenceMean())


def vespo() -> Objective:
    """VESPO (2602.10693). Deviation: a mismatch correction multiplies the loss, where TRL puts it into w."""
    return Objective(sequence_log_ratio, Vespo(), TokenMean())


def kimi(tau: float) -> Objective:
    """Kimi k1.5's mirror descent (2501.12599, section 2.3). The paper does not print τ; τ · Δ should stay below the
    spread of the rewards, and Δ grows with length. The optimizer and the reference start afresh at each iteration."""
    return Objective(sequence_log_ratio, MirrorDescent(tau), SequenceSum())
