"""Does a stage fit, how long does it take, and what to change where it does not fit.

A `Work` is what a stage does, as `distill.plan_memory` and `distill.plan_time` count it. Advice is found by trying:
levers are pulled one after the other, those that change no result first, until the peak is within the device's memory;
what is proposed has been computed to fit.

Line: `reason plan RECIPE --gpu H100-80GB --gpus 8`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distill.plan_gpus import Device
from distill.plan_memory import Memory, Training, sampling_memory, token_budget, training_memory
from distill.plan_models import ModelShape
from distill.plan_time import decode_rate, step_seconds

MOST_GPUS = 1024
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Rollouts:
    """Completions that are drawn. `completions` is None where their number is not known yet."""

    shape: ModelShape
    sequences: int  # at once, on one engine
    length: int  # longest, prompt included
    tokens: float  # mean of a completion
    completions: float | None
    engines: int = 1
    parts: int = 1  # GPUs that one engine is divided over
    reserved: float | None = None  # the share of a GPU's memory that vLLM takes for itself
    sleeps: bool = False  # vLLM gives it back while the policy trains


@dataclass(frozen=True, slots=True)
class Work:
    """What a stage does. `steps` optimizer steps on `step_tokens` tokens each in rows of `row_tokens`; None: not known.

    `levers`: the keys that the stage has to change its memory.
    """

    training: Training | None = None
    rollouts: Rollouts | None = None
    steps: float | None = None
    step_tokens: float = 0.0
    row_tokens: float = 0.0
    longest: int = 0  # tokens of the longest row: no micro-batch is smaller
    levers: tuple[Lever, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """A key and the value that it should have: `Change("gradient_checkpointing", True)`."""

    key: str
    value: Any


# What a lever makes of a work on a device: the changes and the new work, or None where it has nothing to give.
Lever = Callable[[Work, Device], tuple[tuple[Change, ...], Work] | None]


@dataclass(frozen=True, slots=True)
class Plan:
    """A stage on a device: the peak by its parts, the most tokens a micro-batch may have, hours, and the way out."""

    memory: Memory
    limit: int
    token_budget: int | None
    rollout_hours: float | None
    training_hours: float | None
    changes: tuple[Change, ...]  # () where it fits, and where nothing helps
    fits_after: int | None = None  # the peak with the changes

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit


def plan(work: Work, device: Device, utilization: float) -> Plan:
    """The plan of a stage."""
    memory, limit = work_memory(work, device), device.limit
    found = None if memory.total <= limit else advice(work, device)
    return Plan(
        memory=memory,
        limit=limit,
        token_budget=None if work.training is None else token_budget(work.training, limit),
        rollout_hours=_rollout_hours(work, device, utilization),
        training_hours=_training_hours(work, device, utilization),
        changes=() if found is None else found[0],
        fits_after=None if found is None else work_memory(found[1], device).total,
    )


def work_memory(work: Work, device: Device) -> Memory:
    """The larger peak of training and of sampling; in a stage that does both, moments and weights stay for both."""
    training = None if work.training is None else training_memory(work.training)
    if work.rollouts is None:
        return training or Memory()
    drawn = work.rollouts
    engine = 0 if drawn.reserved is None else int(drawn.reserved * device.memory)
    if training is None:
        if engine:
            return Memory(engine=max(engine, _least_engine(drawn, device)))
        return sampling_memory(drawn.shape, drawn.sequences, drawn.length, device.on_gpu, drawn.parts)
    if engine:
        taken = max(engine, _least_engine(drawn, device))
        if drawn.sleeps:
            awake = Memory(weights=training.weights, optimizer=training.optimizer, engine=taken)
            return max(training, awake, key=lambda memory: memory.total)
        return replace(training, engine=taken)
    alone = sampling_memory(drawn.shape, drawn.sequences, drawn.length, device.on_gpu)
    beside = replace(alone, weights=training.weights, optimizer=training.optimizer)
    return max(training, beside, key=lambda memory: memory.total)


def _least_engine(drawn: Rollouts, device: Device) -> int:
    """An engine holds its weights and one sequence of full length, or it does not start."""
    return sampling_memory(drawn.shape, 1, drawn.length, device.on_gpu, drawn.parts).total


def advice(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
    """The changes that make a stage fit, and the stage with them; None where all levers together do not.

    Levers are pulled in order until it fits. Then each earlier one that is not needed is taken out again.
    """
    for count in range(1, len(work.levers) + 1):
        pulled = work.levers[:count]
        if _pull(work, pulled, device, fitting=True) is None:
            continue
        for lever in pulled[:-1]:
            fewer = tuple(one for one in pulled if one is not lever)
            if _pull(work, fewer, device, fitting=True) is not None:
                pulled = fewer
        return _pull(work, pulled, device, fitting=True)
    return None


def _pull(
    work: Work, levers: Sequence[Lever], device: Device, *, fitting: bool
) -> tuple[tuple[Change, ...], Work] | None:
    changes: dict[str, Change] = {}
    for lever in levers:
        found = lever(work, device)
        if found is not None:
            changes |= {change.key: change for change in found[0]}
            work = found[1]
    return None if fitting and work_memory(work, device).total > device.limit else (tuple(changes.values()), work)


# --- levers ----------------------------------------------------------------------------------------------------------


def checkpointing(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
    """Recompute activations: the same result, a third more time."""
    if work.training is None or work.training.checkpointing:
        return None
    return (Change("gradient_checkpointing", True),), _with(work, checkpointing=True)


def chunked_loss(head: Any) -> Lever:
    """Logits of few tokens at a time by `head`."""

    def pull(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
        if work.training is None or work.training.head is head:
            return None
        return (Change("chunked_loss", True),), _with(work, head=head)

    return pull


def smaller_micro_batches(*keys: Change) -> Lever:
    """The largest micro-batch that fits, never below the longest row. `keys`: what else must be set (packing)."""

    def pull(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
        if work.training is None:
            return None
        packed = _with(work, mask_cells=0, accumulates=True)
        assert packed.training is not None
        drawn = work.rollouts
        beside = 0 if drawn is None or drawn.reserved is None or drawn.sleeps else _least_engine(drawn, device)
        tokens = max(token_budget(packed.training, device.limit - beside), work.longest)
        if tokens >= work.training.tokens and not work.training.mask_cells:
            return None
        tokens = min(tokens, work.training.tokens)
        return (*keys, Change("micro_batch_tokens", tokens)), _with(packed, tokens=tokens)

    return pull


def sharding(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
    """Divide weights, gradients and moments over the GPUs that are there."""
    if work.training is None or work.training.shard or work.training.gpus == 1 or not device.on_gpu:
        return None
    return (Change("shard", True),), _with(work, shard=True)


def more_gpus(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
    """The fewest GPUs, doubled again and again, over which it fits sharded."""
    if work.training is None or not device.on_gpu:
        return None
    for gpus in _doubled(work.training.gpus):
        changed = _with(work, shard=True, gpus=gpus)
        if work_memory(changed, device).total <= device.limit:
            return (Change("shard", True), Change("--gpus", gpus)), changed
    return None


def lora(rank: int = 16) -> Lever:
    """Train adapters only: another result, far fewer moments."""

    def pull(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
        if work.training is None or work.training.lora_rank is not None:
            return None
        return (Change("lora", {"rank": rank}),), _with(work, lora_rank=rank)

    return pull


def fewer_sequences(key: str) -> Lever:
    """Halve the sequences that are drawn at once until their keys and values fit."""

    def pull(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
        drawn = work.rollouts
        if drawn is None or drawn.reserved is not None:
            return None
        while drawn.sequences > 1 and work_memory(work, device).total > device.limit:
            drawn = replace(drawn, sequences=drawn.sequences // 2)
            work = replace(work, rollouts=drawn)
        assert work.rollouts is not None
        return (Change(key, drawn.sequences),), work

    return pull


def smaller_engine(key: str) -> Lever:
    """Give vLLM what training leaves, at least its weights and one sequence."""

    def pull(work: Work, device: Device) -> tuple[tuple[Change, ...], Work] | None:
        drawn = work.rollouts
        if drawn is None or drawn.reserved is None or work.training is None:
            return None
        left = math.floor(100 * (device.limit - training_memory(work.training).total) / device.memory)
        share = max(left, math.ceil(100 * _least_engine(drawn, device) / device.memory)) / 100
        if drawn.sleeps or share >= drawn.reserved:
            return None
        return (Change(key, share),), replace(work, rollouts=replace(drawn, reserved=share))

    return pull


def _with(work: Work, **values: Any) -> Work:
    assert work.training is not None
    return replace(work, training=replace(work.training, **values))


def _doubled(gpus: int) -> Iterator[int]:
    while (gpus := 2 * gpus) <= MOST_GPUS:
        yield gpus


# --- time ------------------------------------------------------------------------------------------------------------


def _training_hours(work: Work, device: Device, utilization: float) -> float | None:
    if work.training is None:
        return 0.0
    if work.steps is None:
        return None
    return work.steps * step_seconds(work.training, work.step_tokens, work.row_tokens, device, utilization) / HOUR


def _rollout_hours(work: Work, device: Device, utilization: float) -> float | None:
    drawn = work.rollouts
    if drawn is None:
        return 0.0
    if drawn.completions is None:
        return None
    sequences = min(drawn.sequences, max(1.0, drawn.completions / drawn.engines))
    rate = decode_rate(drawn.shape, int(sequences), drawn.tokens / 2, device, utilization)
    return drawn.completions * drawn.tokens / (rate * drawn.engines * drawn.parts) / HOUR
