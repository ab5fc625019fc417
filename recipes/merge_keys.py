"""What the merging stages may be told: `method: merge` and `method: merge_search`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from recipes.keys import MAPPING, PLAIN, Count, Ref, SamplingKeys, Share, Split, StageKeys, plain_or_mapping

RULES_WITH_BASE = ("task_arithmetic", "ties", "dare")
# Which keys only some rules read: written beside another one they are a mistake.
OF_RULE = {
    "base": RULES_WITH_BASE,
    "scale": RULES_WITH_BASE,
    "scales": RULES_WITH_BASE,
    "density": ("ties", "dare"),
    "densities": ("ties", "dare"),
    "normalize": ("ties",),
}
NEEDED = ("base", "density", "densities")
PATTERN = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"

PerTensor = Annotated[dict[str, Share], Field(min_length=1, max_length=1000)]
Candidate = Annotated[
    Annotated[Share, Tag(PLAIN)] | Annotated[PerTensor, Tag(MAPPING)], Discriminator(plain_or_mapping)
]
RuleName = Literal["linear", "slerp", "task_arithmetic", "ties", "dare"]
Scale = Annotated[float, Field(gt=0, le=10)]
Density = Annotated[float, Field(gt=0, le=1)]
Like = Literal["long", "short"]


class Merge(StageKeys):
    """Merge the weights of a long-CoT and a short-CoT model."""

    REFERENCES: ClassVar[dict[str, str]] = {"long": "model", "short": "model", "base": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["merge"]
    long: Ref
    """The long-CoT model: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    short: Ref
    """The short-CoT model, a relative of the long one."""
    base: Ref | None = None
    """The model that both were trained from; task_arithmetic, ties and dare need it."""
    rule: RuleName = "linear"
    """The weighted average, slerp between both, or a rule on the deltas from the base."""
    weight: Share | None = None
    """Share of the long model: 1 gives the long model, 0 the short one."""
    weights: PerTensor | None = None
    """Instead of weight: `default`, and other shares for modules and layers such as mlp, layers.0-11, layers.0-11.mlp;
    of those that match a tensor the one with the most parts decides."""
    scale: Scale = 1.0
    """Factor of the merged deltas."""
    density: Density | None = None
    """Share of each delta that stays: the largest (ties), or drawn at random (dare)."""
    normalize: bool = True
    """ties: divide by the weights of the deltas that agree in sign."""
    like: Like = "long"
    """Whose config, tokenizer, chat template, dtype and files the model has."""

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        if (self.weight is None) == (self.weights is None):
            yield "weight", "give either weight or weights (a share for all tensors, or shares by pattern)"
        yield from _problems_with_rule(self)
        yield from _problems_with_patterns("weights", self.weights)


class MergeSearch(SamplingKeys):
    """Search the weight of a merge: a grid on few dev problems, successive halving, the finalists on all."""

    REFERENCES: ClassVar[dict[str, str]] = {"long": "model", "short": "model", "base": "model"}
    MAKES: ClassVar[str | None] = "model"

    method: Literal["merge_search"]
    long: Ref
    """The long-CoT model, whose accuracy is to be kept: a stage, a folder (./ ../ /) or a hub id (org/name)."""
    short: Ref
    """The short-CoT model, a relative of the long one."""
    base: Ref | None = None
    """The model that both were trained from; task_arithmetic, ties and dare need it."""
    rule: RuleName = "linear"
    """As in a `merge` stage."""
    grid: Annotated[tuple[Candidate, ...], Field(min_length=1, max_length=1000)] = (0.2, 0.4, 0.5, 0.6, 0.8)
    """The weights of the candidates: each a number, or weights by pattern, as in a `merge` stage."""
    scales: Annotated[tuple[Scale, ...], Field(min_length=1, max_length=100)] = (1.0,)
    """Factors of the merged deltas; every one with every weight is a candidate."""
    densities: Annotated[tuple[Density, ...], Field(min_length=1, max_length=100)] | None = None
    """Shares of each delta that stay: the largest (ties), or drawn at random (dare). Every one is tried with every
    weight and scale."""
    normalize: bool = True
    """ties: divide by the weights of the deltas that agree in sign."""
    like: Like = "long"
    """Whose config, tokenizer, chat template, dtype and files the model has."""
    first: Count = 40
    """Dev problems of the first round."""
    factor: Annotated[int, Field(ge=2, le=100)] = 2
    """A round keeps one in so many candidates; the next one has so many times the problems."""
    keep: Count = 2
    """So many candidates are scored on all dev problems and kept: the best is the stage's model, the next STAGE@2."""
    tolerance: Share = 0.02
    """How far below the long model's dev accuracy the chosen one may be."""
    samples: Annotated[int, Field(ge=1, le=4096)] = 2
    """Completions per problem."""
    count: Count | None = None
    """At most this many dev problems; null takes all."""

    def splits(self) -> tuple[Split, ...]:
        return ("dev",)

    def more_models(self) -> tuple[str, ...]:
        candidates = len(self.grid) * len(self.scales) * len(self.densities or (1.0,))
        return tuple(str(rank) for rank in range(2, min(self.keep, candidates) + 1))

    def problems_with_keys(self) -> Iterator[tuple[str, str]]:
        yield from _problems_with_rule(self)
        weights = [entry if isinstance(entry, dict) else {"default": entry} for entry in self.grid]
        for key, values in (("grid", weights), ("scales", self.scales), ("densities", self.densities or ())):
            repeated = [value for index, value in enumerate(values) if value in values[:index]]
            if repeated:
                value = repeated[0]
                shown = value["default"] if isinstance(value, dict) and value.keys() == {"default"} else value
                yield key, f"has {shown} more than once"
        for entry in self.grid:
            if isinstance(entry, dict):
                yield from _problems_with_patterns("grid", entry)
        if self.rule == "ties" and self.normalize and self.base == self.short and len(self.grid) > 1:
            yield (
                "grid",
                "changes nothing: the short model is the base, so its delta is 0 and normalize: true takes the long "
                "one's weight out again; give one weight and several scales, or normalize: false",
            )


def _problems_with_rule(keys: Merge | MergeSearch) -> Iterator[tuple[str, str]]:
    """(key, message) of keys that the rule does not read, or needs."""
    own = {key: rules for key, rules in OF_RULE.items() if key in type(keys).model_fields}
    for key, rules in own.items():
        if keys.rule not in rules and getattr(keys, key) != type(keys).model_fields[key].default:
            yield key, f"has no effect with rule: {keys.rule}; remove it"
        if key in NEEDED and keys.rule in rules and getattr(keys, key) is None:
            yield key, f"required with rule: {keys.rule}"


def _problems_with_patterns(key: str, weights: dict[str, float] | None) -> Iterator[tuple[str, str]]:
    if weights is None:
        return
    if "default" not in weights:
        yield key, "needs default, the share of the tensors that no pattern matches"
    for pattern in weights:
        if not re.fullmatch(PATTERN, pattern):
            yield key, f"{pattern[:60]!r} is no pattern: write parts of a tensor's name, such as mlp or layers.0-11.mlp"
