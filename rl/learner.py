"""One optimizer step on training rows: packed forward passes, the objective, and the refusal of what is not finite.

The denominator of the loss is counted over the whole optimizer batch before the first forward pass, so how the batch is
cut into micro-batches, and over how many processes, changes rounding and nothing else. Nothing is read off the device
before the gradient is complete: one synchronisation an update, not one a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rl.distributed import clip_gradients, finite_gradients, sum_gradients
from rl.faults import fault
from rl.kl import kl_in_reward
from rl.lora import WithoutAdapters
from rl.mismatch import Mismatch
from rl.objectives import LossInputs, Objective, policy_loss
from rl.packing import PackedBatch, by_prompt, pack, plan_micro_batches
from rl.policy import PolicyModel
from rl.ranks import ALONE, Ranks
from rl.refusal import StepRefused
from rl.rows import Batch, TrainingRow
from rl.train_metrics import UpdateMetrics
from rl.types import Rollout, RolloutGroup


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """AdamW, how a step's rollouts are cut into updates, and how the forward pass runs."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    updates_per_step: int = 1  # optimizer steps a rollout batch is split into; 1 is fully on-policy
    reset_optimizer: bool = False  # forget the moments at every step (Kimi k1.5, 2501.12599, section 2.3)
    micro_batch_tokens: int = 16_384  # tokens a forward pass holds; changes memory and speed, not the result
    bf16: bool = False  # autocast; the weights and the optimizer stay fp32

    def learning_rate_at(self, step: int) -> float:
        """Linear over the first `warmup_steps` steps (from 1), then constant: 1e-6, warm-up 20, step 5 -> 2.5e-7."""
        return self.learning_rate * min(1.0, step / max(self.warmup_steps, 1))


class Learner:
    """A policy with its optimizer, objective and reference.

    `recompute_old`: the ratio's denominator is recomputed by the trainer before the first update of a step, because the
    sampler's log-probs are not the trainer's (another engine, another precision). Otherwise they are used as they are.
    """

    def __init__(
        self,
        policy: PolicyModel,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        optim: OptimSettings,
        temperature: float,
        *,
        reference: PolicyModel | WithoutAdapters | None = None,
        recompute_old: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        if objective.kl is not None and reference is None:
            raise ValueError("the objective has a KL term: give the learner a reference model")
        self.policy, self.optimizer, self.objective, self.optim = policy, optimizer, objective, optim
        self.temperature, self.reference, self.recompute_old, self.ranks = temperature, reference, recompute_old, ranks
        self.reference_moved = False  # whether the reference is still the starting model

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device

    def begin_step(self, step: int) -> None:
        """Set the learning rate of a step (from 1) and, where asked, let the optimizer start afresh."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.optim.learning_rate_at(step)
        if self.optim.reset_optimizer:
            self.optimizer.state.clear()

    def refresh_reference(self) -> None:
        """The reference becomes the policy (R1 does so every 400 updates)."""
        assert isinstance(self.reference, PolicyModel), "the model under the adapters cannot be refreshed"
        with torch.no_grad():
            for old, new in zip(self.reference.parameters(), self.policy.parameters(), strict=True):
                old.copy_(new)
        self.reference_moved = True

    def penalized(self, groups: Sequence[RolloutGroup], coefficient: float) -> list[RolloutGroup]:
        """Groups with `coefficient` × the KL estimate k1 of each completion taken off its reward (rl/kl.py)."""
        if coefficient == 0:
            return list(groups)
        assert self.reference is not None
        rows = [
            TrainingRow(group.prompt_ids, r.completion.token_ids, r.completion.sampler_logprobs, 0.0, group.problem.id)
            for group in groups
            for r in group.rollouts
        ]
        found = iter(self.logprobs(self.reference, rows))

        def reward(rollout: Rollout) -> float:
            return rollout.reward + kl_in_reward(rollout.completion.sampler_logprobs, next(found), coefficient)

        return [group.with_rewards([reward(rollout) for rollout in group.rollouts]) for group in groups]

    def with_old_logprobs(self, batches: Sequence[Batch]) -> list[Batch]:
        """The rows of all updates of a step with log-probs recomputed by the policy as it is now, if that is wanted
        and more than one update will read them; a single update has them in its own forward pass."""
        if not self.recompute_old or len(batches) == 1:
            return list(batches)
        found = iter(self.logprobs(self.policy, [row for rows, _ in batches for row in rows]))
        return [([replace(row, old_logprobs=next(found)) for row in rows], lengths) for rows, lengths in batches]

    @torch.no_grad()
    def logprobs(self, policy: PolicyModel | WithoutAdapters, rows: Sequence[TrainingRow]) -> list[tuple[float, ...]]:
        """The log-probs (nats) of every row's completion tokens under `policy`, in the order of `rows`."""
        if not rows:
            return []
        place = {id(row): position for position, row in enumerate(rows)}
        found: list[tuple[float, ...]] = [()] * len(rows)
        for chunk in self._plan(rows):
            with self.precision():
                values, _ = policy(pack(chunk, self.device), self.temperature)
            for row, line in zip(chunk, values.tolist(), strict=True):
                if id(row) in place:  # not the row of an idle rank
                    found[place[id(row)]] = tuple(line[: row.num_tokens])
        return self.ranks.merge(found)

    def update(self, rows: Sequence[TrainingRow], lengths: Sequence[int], metrics: UpdateMetrics) -> bool:
        """One optimizer step on `rows`, accumulated over micro-batches; whether there was one (without rows there is
        none).

        `lengths`: trained tokens of *all* decided completions of this optimizer batch, those without a row included;
        the objective's aggregation counts its denominator from them. `metrics` are those of the rollout step: in its
        first update sampler and policy have the same weights, and their log-probs are compared.

        Errors: StepRefused if a log-prob, the loss or the gradient is not finite on any rank; nothing has changed then.
        """
        if not rows:
            return False
        denominator = self.objective.aggregation.denominator(lengths)
        refused = _Refusals()
        for chunk in self._plan(rows):
            self._backward(chunk, denominator, metrics, refused)
        sum_gradients(self.policy, self.ranks)
        grad_norm = clip_gradients(self.policy, self.optim.max_grad_norm)
        try:
            refused.check(grad_norm, self.ranks, lambda: self._offenders(rows, denominator))
        except StepRefused:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        fault("grpo.update")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics.add_update(grad_norm)
        return True

    def _plan(self, rows: Sequence[TrainingRow]) -> list[list[TrainingRow]]:
        """This rank's micro-batches, rows in the order in which `pack` lays them out.

        Every rank gets the same number, because the forward passes of sharded models are collective: one without rows
        runs a row that trains nothing.
        """
        own = plan_micro_batches(rows, self.optim.micro_batch_tokens, self.ranks.world)[self.ranks.rank]
        shortest = min(rows, key=lambda row: len(row.prompt_ids) + row.num_tokens)
        idle = replace(shortest, advantage=0.0, trained=(False,) * shortest.num_tokens)
        return [[row for members in by_prompt(chunk or [idle]) for row in members] for chunk in own]

    def _backward(
        self,
        chunk: Sequence[TrainingRow],
        denominator: float,
        metrics: UpdateMetrics,
        refused: _Refusals,
    ) -> None:
        batch = pack(chunk, self.device)
        with self.precision():
            policy_logprobs, entropies = self.policy(batch, self.temperature)
        inputs = self._inputs(batch, chunk, policy_logprobs)
        loss, sums = policy_loss(self.objective, inputs, denominator)
        refused.note(chunk, inputs, loss)
        loss.backward()
        metrics.add(loss, sums, entropies, inputs.mask)
        if metrics.num_updates == 0 or self.recompute_old:
            old = inputs.old_logprobs if self.recompute_old else policy_logprobs.detach()
            weights = None
            if self.objective.correction is not None:
                weights = self.objective.correction(old, inputs.sampler_logprobs)
            metrics.mismatch.add(Mismatch.of(old, inputs.sampler_logprobs, inputs.mask, weights))

    def _inputs(self, batch: PackedBatch, chunk: Sequence[TrainingRow], policy_logprobs: torch.Tensor) -> LossInputs:
        old = batch.sampler_logprobs
        if self.recompute_old:
            recomputed = [row.old_logprobs for row in chunk]
            if any(values is None for values in recomputed):
                old = policy_logprobs.detach()
            else:
                flat = [value for values in recomputed if values is not None for value in values]
                old = batch.padded(torch.tensor(flat, dtype=torch.float32, device=self.device))
        ref = None
        if self.objective.kl is not None:
            assert self.reference is not None
            with torch.no_grad(), self.precision():
                ref, _ = self.reference(batch, self.temperature)
        return LossInputs(
            policy_logprobs=policy_logprobs,
            old_logprobs=old,
            sampler_logprobs=batch.sampler_logprobs,
            advantages=batch.advantages,
            mask=batch.completion_mask,
            ref_logprobs=ref,
        )

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """The context of every forward pass, the sampler's included: bf16 autocast or nothing."""
        if not self.optim.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _offenders(self, rows: Sequence[TrainingRow], denominator: float) -> list[str]:
        """The groups whose gradient is not finite, each by itself: slow, and only ever run on the way out."""
        found = []
        for group in dict.fromkeys(row.group for row in rows):
            self.optimizer.zero_grad(set_to_none=True)
            own = [row for row in rows if row.group == group]
            for chunk in plan_micro_batches(own, self.optim.micro_batch_tokens, 1)[0]:
                self._backward(chunk, denominator, UpdateMetrics(), _Refusals())
            if not finite_gradients(self.policy, self.ranks):
                found.append(group)
        self.optimizer.zero_grad(set_to_none=True)
        return found or [row.group for row in rows]


class _Refusals:
    """What was not finite in the micro-batches of one update, kept on the device until the gradient is complete."""

    def __init__(self) -> None:
        self._rows: list[tuple[Sequence[TrainingRow], torch.Tensor]] = []
        self._losses: list[tuple[Sequence[TrainingRow], torch.Tensor]] = []

    @torch.no_grad()
    def note(self, chunk: Sequence[TrainingRow], inputs: LossInputs, loss: torch.Tensor) -> None:
        """Look at every log-prob of trained tokens and at the loss; log-ratios are clamped, so the loss hides some."""
        given = (inputs.policy_logprobs, inputs.old_logprobs, inputs.sampler_logprobs, inputs.ref_logprobs)
        bad = torch.stack([~torch.isfinite(values) for values in given if values is not None]).any(dim=0)
        self._rows.append((chunk, (bad & (inputs.mask > 0)).any(dim=-1)))
        self._losses.append((chunk, ~torch.isfinite(loss)))

    def check(self, grad_norm: torch.Tensor, ranks: Ranks, offenders: Callable[[], list[str]]) -> None:
        """Raise StepRefused on every rank if anything was not finite on one of them."""
        if not ranks.any(not bool(torch.isfinite(grad_norm)) or self._any()):
            return
        by_row = [
            row.group for chunk, bad in self._rows for row, is_bad in zip(chunk, bad.tolist(), strict=True) if is_bad
        ]
        by_loss = [row.group for chunk, bad in self._losses if bool(bad) for row in chunk]
        by_row, by_loss = ranks.gather(by_row), ranks.gather(by_loss)
        if by_row:
            raise StepRefused("a log-prob", by_row)
        if by_loss:
            raise StepRefused("the loss", by_loss)
        raise StepRefused("the gradient", offenders())

    def _any(self) -> bool:
        return any(bool(bad.any()) for _, bad in (*self._rows, *self._losses))
