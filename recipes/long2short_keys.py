"""What the long2short stages may be told, each a class as in recipes/methods.py (RL: recipes/rl_keys.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.keys import Count, NonNegative, Overflow, Rate, Ref, SamplingKeys, Share, Split, StageKeys


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
    """Drop a problem if one wrong answer was given more often than the right one: its shortest may be a lucky guess."""
    min_tokens: NonNegative = 0
    """Shorter completions are not chosen."""


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
    """Preference pairs (Kimi k1.5): chosen the shortest correct, rejected longer wrong and much longer correct ones."""

    REFERENCES: ClassVar[dict[str, str]] = {"pool": "pool"}
    MAKES: ClassVar[str | None] = "pairs"

    method: Literal["pairs"]
    pool: Ref
    """The `sample` stage to read."""
    min_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.5
    """A correct completion is rejected when it is at least this many times as long as the chosen one."""
    per_problem: Count = 4
    """At most this many pairs per problem."""


class Dpo(StageKeys):
    """Direct preference optimisation on pairs."""

    REFERENCES: ClassVar[dict[str, str]] = {"model": "model", "pairs": "pairs"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["dpo"]
    model: Ref
    """Model to start from, also the reference model: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    pairs: Ref
    """The `pairs` stage to read."""
    beta: Annotated[float, Field(gt=0, le=100)] = 0.1
    """Strength of the pull towards the reference model."""
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


class Merge(StageKeys):
    """Average the weights of a long-CoT and a short-CoT model."""

    REFERENCES: ClassVar[dict[str, str]] = {"long": "model", "short": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["merge"]
    long: Ref
    """The long-CoT model: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    short: Ref
    """The short-CoT model, a relative of the long one."""
    weight: Share
    """Share of the long model: 1 gives the long model, 0 the short one."""


class Select(SamplingKeys):
    """Choose among candidates on dev problems: the fewest tokens within a tolerance of the parent's accuracy."""

    REFERENCES: ClassVar[dict[str, str]] = {"candidates": "model", "parent": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["select"]
    candidates: Annotated[tuple[Ref, ...], Field(min_length=1, max_length=100)]
    """The models to choose among."""
    parent: Ref
    """The model whose accuracy is to be kept."""
    tolerance: Share = 0.02
    """How far below the parent's dev accuracy a candidate may be."""
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
