"""The length objectives by name: how each is made, what it remembers, and the weights that make it the paper's.

    chosen = make("laser", target=2000)
    chosen.objective(GroupLengths((1500, 2500), (True, True)))   # [1.0, 0.0]

The parameters of an objective are the fields of its class and of its memory's; `parameters("laser")` names them. GFPO
is no objective but a filter (long2short/length_filter.py); it has its own place at the doors of recipes/.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from long2short import length_limits as limits
from long2short import length_objectives as relative
from long2short.length_memory import (
    DifficultyTargets,
    FirstSeen,
    Memory,
    RightPercentile,
    ShortestRight,
    Stated,
    mean_length,
)
from long2short.length_objectives import LengthObjective


@dataclass(frozen=True, slots=True)
class Entry:
    """One objective of the catalog."""

    objective: Callable[..., LengthObjective]  # a dataclass; its fields are the parameters
    weight: float  # the paper's, or one in the middle of its range
    reward_accuracy: float = 1.0  # the paper's
    memory: Callable[..., Memory] | None = None  # called with the parameters of `of_memory`; not beside a target
    of_memory: tuple[tuple[str, Any], ...] = ()  # (parameter of the memory, default)


def _percentile(percentile: float) -> Memory:
    return FirstSeen(RightPercentile(percentile))


def _means() -> Memory:
    return FirstSeen(mean_length)


def _exact_budget() -> Memory:
    return Stated(at_most=False)


def _most_budget() -> Memory:
    return Stated(at_most=True)


OF_PROMPTS = (_exact_budget, _most_budget)


CATALOG: dict[str, Entry] = {
    "kimi": Entry(relative.Kimi, 1.0),
    "lcpo-exact": Entry(limits.LcpoExact, 3e-4, memory=_exact_budget),
    "lcpo-max": Entry(limits.LcpoMax, 1.0, memory=_most_budget),
    "lcpo-max-code": Entry(limits.LcpoMaxCode, 1.0, memory=_most_budget),
    "o1-pruner": Entry(limits.O1Pruner, 1.0, 2.0, _means),
    "thinkprune": Entry(limits.ThinkPrune, 1.0),
    "shorter-better": Entry(relative.ShorterBetter, 1e-3, 2.0),
    "arora-zanette": Entry(relative.AroraZanette, 0.2),
    "dast": Entry(relative.Dast, 1.0),
    "alp": Entry(relative.Alp, 1e-7),
    "laser": Entry(limits.Laser, 0.5),
    "laser-d": Entry(limits.LaserD, 0.5, memory=DifficultyTargets, of_memory=(("every", 20),)),
    "laser-de": Entry(limits.LaserDE, 0.5, memory=DifficultyTargets, of_memory=(("every", 20),)),
    "hapo": Entry(limits.Hapo, 1.0, memory=ShortestRight),
    "lc-r1": Entry(relative.LcR1, 1.0),
    "cosine": Entry(limits.Cosine, 1.0),
    "soft-overlong": Entry(limits.SoftOverlong, 1.0, 2.0),
    "dler": Entry(limits.Dler, 1.0),
    "toggle": Entry(limits.Toggle, 1.0, memory=_percentile, of_memory=(("percentile", 50.0),)),
    "prime-linear": Entry(relative.PrimeLinear, 0.1),
}


def parameters(name: str) -> dict[str, Any]:
    """The parameters of an objective with their defaults, MISSING for what must be given.

    `parameters("hapo") == {"floor": -0.7}`
    """
    entry = CATALOG[name]
    own: Any = entry.objective
    return {field.name: field.default for field in fields(own)} | dict(entry.of_memory)


def required(name: str) -> list[str]:
    """The parameters that must be given: `required("laser") == ["target"]`."""
    return [key for key, default in parameters(name).items() if default is MISSING]


def remembers(name: str) -> bool:
    """Whether an objective compares with lengths of other groups than the one at hand."""
    return CATALOG[name].memory not in (None, *OF_PROMPTS)


def reads_budget(name: str) -> bool:
    """Whether it takes the budget that the prompt states where no target is given: the rules of L1; not GFPO."""
    return name in CATALOG and CATALOG[name].memory in OF_PROMPTS


@dataclass(frozen=True, slots=True)
class Chosen:
    """An objective of the catalog with its parameters, and a fresh memory if it needs one."""

    objective: LengthObjective
    memory: Memory | None


def make(name: str, **given: Any) -> Chosen:
    """The objective of that name. Errors: TypeError for a parameter that it does not have, or one that is missing."""
    entry = CATALOG[name]
    of_memory = {key: given.pop(key, default) for key, default in entry.of_memory}
    memory = None if given.get("target") is not None else entry.memory  # a given target leaves nothing to look up
    return Chosen(entry.objective(**given), None if memory is None else memory(**of_memory))
