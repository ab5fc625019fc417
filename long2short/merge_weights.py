"""The long model's share per tensor: one number, or other numbers for named modules and ranges of layers.

In model interpolation (arXiv 2510.10977) the feed-forward layers carry the pattern of thinking and attention carries
correctness, and the later two thirds of the layers nearly all of both, so one share for all tensors is seldom the best.

    Weights(0.5, {"mlp": 0.3, "layers.0-11": 0.7, "layers.0-11.mlp": 0.4})

A pattern is a run of parts of a tensor's dotted name; `0-11` is any number from 0 to 11. Of several patterns that match
a tensor the one with the most parts decides; two with equally many must say the same. So the order does not matter.

Line: a recipe's merge stage with `weights: {default: 0.5, mlp: 0.3, layers.0-11: 0.7}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class Weights:
    """Shares of the long model, each in [0, 1]: `default`, and what patterns say. Example: `Weights(0.5)`."""

    default: float
    patterns: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, weight in {"default": self.default, **self.patterns}.items():
            if not 0 <= weight <= 1:
                where = "weight" if key == "default" else f"weight of {key}"
                raise ValueError(f"{where} must be between 0 (the short model) and 1 (the long model), got {weight}")

    def for_tensors(self, names: Iterable[str]) -> dict[str, float]:
        """The share of each tensor.

        Example: `Weights(0.5, {"mlp": 0.3}).for_tensors(["layers.0.mlp.up.weight", "norm.weight"])` gives 0.3 and 0.5.

        Errors: ValueError for a pattern that decides no tensor, and for two with equally many parts that match one
        tensor and say different things.
        """
        patterns = {pattern: pattern.split(".") for pattern in self.patterns}
        shares: dict[str, float] = {}
        matched: dict[str, int] = dict.fromkeys(patterns, 0)
        decided: set[str] = set()
        for name in names:
            parts = name.split(".")
            matching = [pattern for pattern, wanted in patterns.items() if _matches(wanted, parts)]
            for pattern in matching:
                matched[pattern] += 1
            longest = max((len(patterns[pattern]) for pattern in matching), default=0)
            deciding = [pattern for pattern in matching if len(patterns[pattern]) == longest]
            if len({self.patterns[pattern] for pattern in deciding}) > 1:
                raise ValueError(
                    f"weights: {' and '.join(deciding[:2])} say different things of tensor {name}: add a pattern with "
                    "more parts for what both match, such as layers.0-11.mlp"
                )
            decided.update(deciding)
            shares[name] = self.patterns[deciding[0]] if deciding else self.default
        for pattern in patterns.keys() - decided:
            how = "is overruled by longer patterns everywhere" if matched[pattern] else "matches no tensor"
            raise ValueError(f"weights: {pattern} {how}; a tensor is named like {next(iter(shares), '?')}")
        return shares

    def __str__(self) -> str:
        """`0.5`, or `0.5 mlp 0.3`: the name of a candidate."""
        parts = {"": self.default, **{f"{key} ": self.patterns[key] for key in sorted(self.patterns)}}
        return " ".join(f"{key}{weight:.15g}" for key, weight in parts.items())


def _matches(wanted: list[str], parts: list[str]) -> bool:
    """Whether the parts of a name hold the wanted ones in a row."""
    starts = range(len(parts) - len(wanted) + 1)
    return any(all(map(_is, wanted, parts[start : start + len(wanted)])) for start in starts)


def _is(wanted: str, part: str) -> bool:
    layers = _RANGE.fullmatch(wanted)
    if layers is None:
        return wanted == part
    return part.isdigit() and int(layers[1]) <= int(part) <= int(layers[2])
