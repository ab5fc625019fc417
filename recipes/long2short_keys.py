"""What the long2short stages may be told, each a class as in recipes/methods.py (RL: recipes/rl_keys.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, NonNegative, Overflow, Rate, Ref, SamplingKeys, Share, Split, StageKeys
from recipes.policy_keys import Lora


class Shortest(StageKeys):
    """Shortest rejection sampling (Kimi k1.5): of n samples keep the shortest correct one."""

    REFERENCES: ClassVar[dict[str, str]] = {"pool": "pool"}
    MAKES: ClassVar[str | None] = "traces"

    method: Literal["shortest"]
    pool: Ref
    """The `sample` stage to read."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 8
    """Choose among the first this many samples of each problem."""
    majority: bool = False
    """Drop a problem if one wrong answer was given more often than the right one: its shortest may be a lucky guess. A
    tie passes; undecided samples have no vote."""
    min_tokens: NonNegative = 0
    """Shorter completions are not chosen."""
    min_think_tokens: NonNegative = 0
    """Completions with a shorter thought are not chosen."""
    min_right: Count = 1
    """Drop a problem with fewer right samples: with 2, another sample must confirm the answer."""
    verify_with: Literal["exact", "integers", "math"] | None = None
    """Another task whose judge must find a completion right as well; null asks no second one."""
    per_problem: Count = 1
    """Keep so many of the shortest right ones of each problem."""
    cut: Literal["first", "reflection"] | None = None
    """Cut right completions behind the first right solution in their thought, or behind the second; null: neither."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        for key in ("per_problem", "min_right"):
            if getattr(self, key) > self.samples:
                yield key, f"{getattr(self, key)} is more than samples ({self.samples})"


class Race(SamplingKeys):
    """Shortest rejection sampling by racing: `sample` and `shortest` in one, samples that cannot win are stopped."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model"}
    MAKES: ClassVar[str | None] = "traces"

    method: Literal["race"]
    model: Ref
    """Model to sample from: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    count: Count | None = None
    """At most this many train problems; null takes all."""
    samples: Annotated[int, Field(ge=2, le=4096)] = 8
    """Completions per problem that race against each other."""
    min_tokens: NonNegative = 0
    """Shorter completions do not win."""

    def splits(self) -> tuple[Split, ...]:
        return ("train",)


class Pairs(StageKeys):
    """Preference pairs: the shortest correct over longer wrong and much longer correct ones (Kimi k1.5), and a long
    correct one over the shortest wrong ones (SILC)."""

    REFERENCES: ClassVar[dict[str, str]] = {"pool": "pool"}
    MAKES: ClassVar[str | None] = "pairs"

    method: Literal["pairs"]
    pool: Ref
    """The `sample` stage to read."""
    min_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.5
    """A correct completion is rejected when it is at least this many times as long as the chosen one."""
    per_problem: Count = 4
    """At most this many pairs per problem after Kimi."""
    silc: NonNegative = 0
    """At most this many pairs per problem of a short wrong and a longer correct completion; Sky-T1-Flash has 1."""
    min_tokens: NonNegative = 0
    """A right completion with fewer tokens is not chosen: it may be a guess."""
    min_right: Count = 1
    """Leave out a problem with fewer right samples: with 2, another sample must confirm the answer."""
    balance_bins: Annotated[int, Field(ge=2, le=100)] | None = None
    """Divide the pass rates into so many equal bins and keep equally many pairs in each, as many as the poorest bin has
    that has any, but balance_min at least; null keeps all pairs."""
    balance_min: Count | None = None
    """With balance_bins: so many pairs a bin may keep however poor another one is [1]."""
    max_length: Count | None = None
    """Count in the summary the pairs whose prompt with the longer side has at most so many tokens; drops none."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.balance_min is not None and self.balance_bins is None:
            yield "balance_min", "has no effect without balance_bins; remove it"


class PairTraining(StageKeys):
    """What every stage may be told that trains on pairs."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "pairs": "pairs"}
    MAKES: ClassVar[str | None] = "model"

    model: Ref
    """Model to start from, for dpo also the reference model: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    pairs: Ref
    """The `pairs` stage to read."""
    learning_rate: Rate = 1e-6
    """Peak learning rate."""
    epochs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Passes over the pairs."""
    batch_size: Count = 32
    """Pairs per optimizer step."""
    max_length: Count
    """Longest prompt plus completion in tokens; never cut silently."""
    overflow: Overflow = "refuse"
    """What to do with a longer row: refuse the run, or drop and count it."""
    save_every: Count = 100
    """Write a checkpoint every this many optimizer steps."""
    micro_batch_pairs: Count | None = None
    """Pairs per forward and backward pass, a divisor of batch_size; never changes the result. null: the whole batch."""
    lora: Lora | None = None
    """Train adapters instead of all weights; dpo then needs no second copy of the weights as its reference."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass; null: on a GPU only."""
    bf16: bool | None = None
    """Run the model in bf16 (autocast), weights and optimizer stay fp32; null: on a GPU only."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if self.micro_batch_pairs is not None and self.batch_size % self.micro_batch_pairs:
            yield "micro_batch_pairs", f"{self.micro_batch_pairs} does not divide batch_size ({self.batch_size})"


class Dpo(PairTraining):
    """Direct preference optimisation on pairs."""

    method: Literal["dpo"]
    loss: Literal["sigmoid", "sigmoid_norm"] = "sigmoid"
    """DPO on summed log-probabilities, or on their means over the tokens of a side (length-normalised)."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Strength of the pull towards the reference model; to be given with loss: sigmoid_norm."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from super().problems_with_keys()
        if self.loss == "sigmoid_norm" and "beta" not in self.model_fields_set:
            yield "beta", "required with loss: sigmoid_norm, whose margins are per token and small; 5 is usual (Tülu 3)"


class Simpo(PairTraining):
    """SimPO on pairs: length-normalised, without a reference model."""

    method: Literal["simpo"]
    beta: Annotated[float, Field(gt=0, le=100)] = 2.0
    """Scale of a side's mean log-probability."""
    gamma: Annotated[float, Field(ge=0, le=100)] = 1.0
    """How far the chosen side must be ahead, on the scale of beta."""


class Select(SamplingKeys):
    """Choose among candidates on dev problems: the briefest within a tolerance, or the best balance with accuracy."""

    REFERENCES: ClassVar[dict[str, str]] = {"candidates": "model", "parent": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["select"]
    candidates: Annotated[tuple[Ref, ...], Field(min_length=1, max_length=100)]
    """The models to choose among."""
    parent: Ref
    """The model whose accuracy is to be kept."""
    rule: Literal["brief", "balance"] = "brief"
    """brief: the fewest tokens within the tolerance. balance: the highest accuracy-efficiency score (AES) against the
    parent, as Kimi k1.5 starts its length RL from the checkpoint with the best balance."""
    tolerance: Share = 0.02
    """brief: how far below the parent's dev accuracy a candidate may be."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 2
    """Completions per problem."""
    count: Count | None = None
    """At most this many dev problems; null takes all."""

    def splits(self) -> tuple[Split, ...]:
        return ("dev",)

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        repeated = sorted({ref for ref in self.candidates if self.candidates.count(ref) > 1})
        if repeated:
            yield "candidates", f"names {repeated[0]} more than once"
        if self.rule != "brief" and self.tolerance != type(self).model_fields["tolerance"].default:
            yield "tolerance", f"has no effect with rule: {self.rule}; remove it"
