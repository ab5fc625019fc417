"""The rules of model merging, as pure functions of fp32 tensors.

`weight` is the long model's share, 1 - weight the short one's; `delta` is a parent minus the base.

    linear          weight long + (1 - weight) short       Kimi k1.5 (2501.12599, 2.4) with .5; interpolation 2510.10977
    slerp           the same along the arc between both    Shoemake 1985, on the flattened tensor
    task arithmetic base + scale sum(share delta)          2212.04089
    TIES            task arithmetic on trimmed deltas that agree in sign      2306.01708
    DARE            task arithmetic on deltas of which a random part is kept  2311.03099

A rule sees a tensor in pieces of `PIECE` elements, so that memory does not grow with the tensor and pieces can be
worked on side by side. It first may look at all pieces (slerp: lengths and angle; TIES: the trim threshold), then gives
a function that merges one. Sums over pieces are fp64, in order: results do not depend on threads.

Deviations. TIES keeps every delta whose magnitude equals the threshold, as the authors' code does; mergekit keeps
exactly the share, and its sort decides which of equals go. Long and short are weighted in every rule: equal shares are
the papers' unweighted sums up to `scale`. DARE's mask is drawn per piece from (seed, tensor, parent, piece).
A tensor without elements stays as it is.

Line: `reason long2short RECIPE`, the stage with `method: merge` and `rule: ties`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import torch

PIECE = 1 << 18  # elements; 1 MiB in fp32, which stays in a core's cache. Part of what DARE draws.
NEARLY_PARALLEL = 0.9995  # |cos| beyond which slerp is linear, as in mergekit
TINY = torch.finfo(torch.float32).tiny
T = TypeVar("T")

Parts = tuple[torch.Tensor, ...]
"""One piece of the parents in fp32, (n,) each: long, short and, for rules that take it, base. May be overwritten."""
Each = Callable[[Callable[[Parts], T]], Iterator[T]]
"""Applies a function to all pieces of a tensor and gives the results in order, as they come."""
Combine = Callable[[Parts, int], torch.Tensor]
"""Merges one piece, given its parts and its index; fp32 (n,)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a tensor of two parents becomes one. Example: `Rule(linear)`, `ties(density=0.8)`."""

    prepare: Callable[[str, float, Each], Combine]  # (name of the tensor, weight, its pieces)
    takes_base: bool = False
    interpolates: bool = True  # weight 1 and 0 give a parent: its tensors are copied, bit for bit


def merge_tensor(rule: Rule, parents: Parts, weight: float, name: str = "") -> torch.Tensor:
    """A whole tensor by a rule: fp32 parents of one shape (long, short and perhaps base) -> fp32 of that shape.

    Examples: long (2, 1), short (-1, 1): `merge_tensor(Rule(linear), ..., 0.75)` is (1.25, 1). Long (1, 0), short
    (0, 2): `merge_tensor(Rule(slerp), ..., 0.5)` is (.70711, 1.41421).
    """
    if not parents[0].numel() or (rule.interpolates and weight in (0, 1)):
        return parents[0 if weight == 1 else 1].clone()
    pieces = [parent.reshape(-1).split(PIECE) for parent in parents]
    parts = [tuple(piece.clone() for piece in part) for part in zip(*pieces, strict=True)]
    combine = rule.prepare(name, weight, lambda look: (look(tuple(p.clone() for p in part)) for part in parts))
    merged = [combine(part, index) for index, part in enumerate(parts)]
    return torch.cat(merged).reshape(parents[0].shape)


# --- between the parents ----------------------------------------------------------------------------------------------


def linear(name: str, weight: float, each: Each) -> Combine:
    """The weighted average, weight · long + (1 − weight) · short.

    The sum is a fused multiply-add where the processor has one: as mergekit's, also where the two nearly cancel.
    """
    return lambda parts, index: parts[0].mul_(weight).add_(parts[1], alpha=1 - weight)


def slerp(name: str, weight: float, each: Each) -> Combine:
    """Spherical interpolation of the flattened tensors: sin(weight Ω)/sin Ω long + sin((1 − weight) Ω)/sin Ω short.

    Ω is the angle between both; a zero tensor is at right angles to all. Nearly parallel ones are averaged linearly.
    """
    long, short, both = torch.tensor(list(each(_products)), dtype=torch.float64).sum(0).tolist()
    cosine = both / math.sqrt(long * short) if long * short > 0 else 0.0
    if abs(cosine) > NEARLY_PARALLEL:
        return linear(name, weight, each)
    angle = math.acos(cosine)
    ours, theirs = (math.sin(share * angle) / math.sin(angle) for share in (weight, 1 - weight))
    return lambda parts, index: parts[0].mul_(ours).add_(parts[1].mul_(theirs))


def _products(parts: Parts) -> tuple[float, float, float]:
    long, short = parts
    return float(torch.dot(long, long)), float(torch.dot(short, short)), float(torch.dot(long, short))


# --- deltas from a base -----------------------------------------------------------------------------------------------


def task_arithmetic(scale: float = 1.0) -> Rule:
    """base + scale · (weight δ_long + (1 − weight) δ_short).

    Example: base 1, long 3, short 2, weight .5, scale .5: 1 + .5 · (.5 · 2 + .5 · 1) = 1.75. With scale 1 it is the
    weighted average up to rounding.
    """

    def prepare(name: str, weight: float, each: Each) -> Combine:
        def combine(parts: Parts, index: int) -> torch.Tensor:
            long, short, base = _deltas(parts)
            return long.mul_(weight).add_(short, alpha=1 - weight).mul_(scale).add_(base)

        return combine

    return Rule(prepare, takes_base=True, interpolates=scale == 1)


def ties(density: float, scale: float = 1.0, normalize: bool = True) -> Rule:
    """Trim, elect sign, merge: base + scale · (sum of the weighted trimmed deltas that have the elected sign).

    Trim: of each parent's delta the largest `density` of its elements stay, the others become 0. Elect: the sign of
    the weighted sum, + where it is 0. `normalize` divides the sum by the weights that went into it.

    Example: base 0, long (1, −2, .1, 3), short (−.5, −1, .2, −4), weight .5, density .75 -> (1, −1.5, 0, −4).
    """

    def prepare(name: str, weight: float, each: Each) -> Combine:
        thresholds = trim_thresholds(each, density) if density < 1 else (0.0, 0.0)
        low_long, low_short = torch.nextafter(torch.tensor(thresholds), torch.zeros(2)).tolist()

        def combine(parts: Parts, index: int) -> torch.Tensor:
            long, short, base = _deltas(parts)
            # No masks of bools, they are slow. hardshrink keeps what is larger than the number below the threshold.
            long = torch.nn.functional.hardshrink(long, low_long).mul_(weight)
            short = torch.nn.functional.hardshrink(short, low_short).mul_(1 - weight)
            elected = torch.copysign(torch.ones(()), long + short)
            # Towards the elected sign: what disagrees is negative now and becomes 0.
            for delta in (long, short):
                delta.mul_(elected).clamp_(min=0)
            total = long + short
            if normalize:  # by the weights of those above 0; where there is none the total is 0
                total.div_(long.sign_().mul_(weight).add_(short.sign_(), alpha=1 - weight).clamp_(min=TINY))
            return total.mul_(elected).mul_(scale).add_(base)

        return combine

    return Rule(prepare, takes_base=True, interpolates=density == 1 and scale == 1)


def dare(density: float, scale: float = 1.0, *, seed: int) -> Rule:
    """Drop and rescale: each element of a delta stays with probability `density`, divided by it, else becomes 0.

    In expectation it is task arithmetic. What stays is drawn from the seed and the tensor, the parent and the piece.
    Example: density .25, base 0, long 1, short 0, weight .5: a quarter of the elements is 2, the others are 0.
    """

    def prepare(name: str, weight: float, each: Each) -> Combine:
        def combine(parts: Parts, index: int) -> torch.Tensor:
            long, short, base = _deltas(parts)
            for parent, delta, share in (("long", long, weight), ("short", short, 1 - weight)):
                generator = torch.Generator().manual_seed(_piece_seed(seed, name, parent, index))
                kept = torch.empty_like(delta).uniform_(generator=generator) < density
                delta.mul_(kept).mul_(share / density)
            return long.add_(short).mul_(scale).add_(base)

        return combine

    return Rule(prepare, takes_base=True, interpolates=density == 1 and scale == 1)


def _deltas(parts: Parts) -> Parts:
    """(long − base, short − base, base), in place."""
    long, short, base = parts
    return long.sub_(base), short.sub_(base), base


def _piece_seed(seed: int, name: str, parent: str, index: int) -> int:
    digest = sha256(f"{seed}/{name}/{parent}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


# --- the threshold of TIES --------------------------------------------------------------------------------------------


def trim_thresholds(each: Each, density: float) -> tuple[float, float]:
    """For long and short the magnitude of the last delta that stays: the k-th largest, k = max(1, ⌊density · n⌋).

    Exact and without sorting: the bits of a non-negative fp32 number are ordered like the number, so its upper 15 bits
    are counted first, then, within the one bin that holds the k-th largest, the lower 16. Counts are a few hundred KB.
    """
    upper = sum(each(lambda parts: torch.stack([_upper_counts(bits) for bits in _magnitude_bits(parts)])))
    assert isinstance(upper, torch.Tensor)  # (2, 2^15)
    wanted = max(1, int(density * int(upper[0].sum())))
    found = [_find_bin(counts, wanted) for counts in upper]
    lower = sum(
        each(
            lambda parts: torch.stack(
                [_lower_counts(bits, chosen) for bits, (chosen, _) in zip(_magnitude_bits(parts), found, strict=True)]
            )
        )
    )
    assert isinstance(lower, torch.Tensor)  # (2, 2^16)
    bits = [(chosen << 16) + _find_bin(counts, left)[0] for counts, (chosen, left) in zip(lower, found, strict=True)]
    long, short = torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()
    return long, short


def _magnitude_bits(parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """The bits of |delta| of long and short, int32 (n,)."""
    long, short, _ = _deltas(parts)
    return long.abs_().view(torch.int32), short.abs_().view(torch.int32)


def _upper_counts(bits: torch.Tensor) -> torch.Tensor:
    return torch.bincount(bits >> 16, minlength=1 << 15)


def _lower_counts(bits: torch.Tensor, chosen: int) -> torch.Tensor:
    return torch.bincount(bits[(bits >> 16) == chosen] & 0xFFFF, minlength=1 << 16)


def _find_bin(counts: torch.Tensor, wanted: int) -> tuple[int, int]:
    """The bin that holds the `wanted`-th largest, and how many are wanted of that bin.

    Example: counts (5, 3, 2), wanted 4: the two largest are in bin 2, so bin 1 and 2 more.
    """
    above = counts.flip(0).cumsum(0).flip(0)  # how many lie in this bin or higher
    chosen = int((above >= wanted).sum()) - 1
    return chosen, wanted - int(above[chosen] - counts[chosen])
