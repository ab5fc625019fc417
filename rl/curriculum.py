"""Which problems a step draws: seeded epochs, a curriculum, or hard ones more often. And the success rates behind it.

Kimi k1.5 (2501.12599, section 2.3.4 "sampling strategies") draws easy problems before hard ones, because a policy that
solves little wastes its rollouts on hard ones, and draws a problem with success rate s with a probability that is
proportional to 1 − s.

A source is a frozen value. For every step it has a *stream* of problems, of which the caller takes as many as it needs:
dynamic sampling does not know how many that is. The stream is a function of the source's seed, the step, the success
rates, and how many problems the run has drawn; so a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as count_from
from typing import Protocol

from rl.samplers.base import sample_seed
from rl.types import Problem, RolloutGroup


class SuccessRates:
    """How often each problem was solved: part of a run's state.

    A plain average over a whole run describes a policy that no longer exists. So old counts are multiplied by `decay`
    whenever their problem is sampled again (a choice of ours: the paper does not say how it tracks the rate; 1 is the
    plain average, 0 keeps the last group only).

    Example, decay .5: 2 of 4 solved, later 4 of 4: attempts 4 × .5 + 4 = 6, successes 2 × .5 + 4 = 5, rate 5/6.
    """

    def __init__(self, decay: float = 0.5) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.decay = decay
        self._counts: dict[str, tuple[float, float]] = {}  # problem id -> attempts, successes

    def update(self, groups: Iterable[RolloutGroup]) -> None:
        """Count the groups of a step, those without signal too. An undecided rollout says nothing about the problem."""
        for group in groups:
            right = [rollout.right for rollout in group.rollouts if rollout.verdict.decided]
            if right:
                attempts, successes = self._counts.get(group.problem.id, (0.0, 0.0))
                self._counts[group.problem.id] = (
                    self.decay * attempts + len(right),
                    self.decay * successes + sum(right),
                )

    def rate(self, problem_id: str) -> float | None:
        """Successes over attempts, in [0, 1]; None for a problem that was never sampled."""
        if problem_id not in self._counts:
            return None
        attempts, successes = self._counts[problem_id]
        return successes / attempts

    def as_json(self) -> dict[str, object]:
        return {"decay": self.decay, "counts": {name: list(counts) for name, counts in self._counts.items()}}

    @classmethod
    def from_json(cls, state: dict) -> SuccessRates:
        rates = cls(state["decay"])
        rates._counts = {name: (attempts, successes) for name, (attempts, successes) in state["counts"].items()}
        return rates


class ProblemSource(Protocol):
    """Where the problems of a step come from."""

    def stream(self, step: int, drawn: int, rates: SuccessRates) -> Iterator[Problem]:
        """The problems of a step (from 1), in the order in which they are to be sampled.

        `drawn` is how many problems the run has taken in all earlier steps. A stream may end, when all problems have
        come, and one that does not end may bring a problem again.
        """
        ...


@dataclass(frozen=True, slots=True)
class Shuffled:
    """Epochs of a seeded shuffle, cut into consecutive pieces: every problem once before any of them again.

    Example, 3 problems, 2 a step: steps 1 to 3 are the first epoch and then the second one.
    """

    problems: Sequence[Problem]
    seed: int

    def __post_init__(self) -> None:
        _require_some(self.problems)

    def stream(self, step: int, drawn: int, rates: SuccessRates) -> Iterator[Problem]:
        for position in count_from(drawn):
            epoch, index = divmod(position, len(self.problems))
            yield self.problems[_epoch_order(self.seed, epoch, len(self.problems))[index]]


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(sample_seed(seed, "epoch", epoch)).shuffle(order)
    return tuple(order)


@dataclass(frozen=True, slots=True)
class Curriculum:
    """Easy problems first, hard ones only from `switch_step` on.

    By level, where all problems have one and they differ: before the switch, the easiest levels up to one that rises
    with the step, all levels at the last step before it; from the switch on, the upper half of the levels.

    Else by measured success rate: before the switch, all problems alike (the phase that measures, and what Kimi's
    ablation does), in the epochs of `Shuffled`; from the switch on, those with a rate of at most `hard_below` or none
    yet.

    A step's chosen problems come in seeded order, none twice. When they are used up the others follow, nearest to what
    is wanted first (before the switch the easiest, from it on the hardest), so a step is full as long as there are
    problems, and with nothing hard left it takes the least easy. Rises and shares are ours: the paper gives none.

    Example, levels 3 to 7, switch at step 6: step 1 draws level 3, step 2 levels 3 and 4, step 5 all; from step 6 on
    levels 6 and 7.
    """

    problems: Sequence[Problem]
    seed: int
    switch_step: int
    hard_below: float = 0.5

    def __post_init__(self) -> None:
        _require_some(self.problems)
        if self.switch_step < 2:
            raise ValueError(f"switch_step must be at least 2, got {self.switch_step}: step 1 is before the switch")

    def stream(self, step: int, drawn: int, rates: SuccessRates) -> Iterator[Problem]:
        levels = sorted({-1 if problem.level is None else problem.level for problem in self.problems})
        by_level = len(levels) > 1 and levels[0] >= 0
        if step < self.switch_step and not by_level:
            return Shuffled(self.problems, self.seed).stream(step, drawn, rates)
        if step < self.switch_step:
            open_levels = math.ceil(len(levels) * step / (self.switch_step - 1))
            return self._nearest_first(step, lambda problem: max(_level(problem), levels[open_levels - 1]))
        if by_level:
            first_hard = levels[math.ceil(len(levels) / 2)]
            return self._nearest_first(step, lambda problem: -min(_level(problem), first_hard))
        return self._nearest_first(step, lambda problem: max(rates.rate(problem.id) or 0.0, self.hard_below))

    def _nearest_first(self, step: int, distance: Callable[[Problem], float]) -> Iterator[Problem]:
        """All problems by distance; those of equal distance, as all the chosen ones are, in seeded order."""
        order = list(self.problems)
        random.Random(sample_seed(self.seed, "curriculum", step)).shuffle(order)
        return iter(sorted(order, key=distance))


@dataclass(frozen=True, slots=True)
class Prioritized:
    """Problems drawn with weight max(1 − s, `floor`), s the success rate; one that was never sampled counts as s = 0.

    The first problem of a step is drawn with exactly these probabilities; the next ones from those that are left, so in
    a step no problem comes twice. `floor` is ours: without one a problem that was once solved always is never looked
    at again. Problems of weight 0 come when no others are left.

    Example, floor 0, s = .9, .5, .1, 1: weights .1, .5, .9, 0, sum 1.5, probabilities .0667, .3333, .6, 0.
    """

    problems: Sequence[Problem]
    seed: int
    floor: float = 0.05

    def __post_init__(self) -> None:
        _require_some(self.problems)
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")

    def probabilities(self, rates: SuccessRates) -> list[float]:
        """With what probability each problem is the first one drawn, in the order of `problems`."""
        weights = [max(1 - (rates.rate(problem.id) or 0.0), self.floor) for problem in self.problems]
        total = math.fsum(weights)
        return [weight / total for weight in weights] if total else [1 / len(weights)] * len(weights)

    def stream(self, step: int, drawn: int, rates: SuccessRates) -> Iterator[Problem]:
        # Exponential clocks: problem i rings after a time of rate p_i. The first one to ring is i with probability p_i,
        # and having no memory, so does the next among the rest (Efraimidis and Spirakis, 2006).
        uniforms = random.Random(sample_seed(self.seed, "prioritized", step))
        times = [
            (-math.log1p(-uniform) / probability if probability else math.inf, uniform)
            for probability in self.probabilities(rates)
            for uniform in [uniforms.random()]
        ]
        return iter([self.problems[i] for i in sorted(range(len(times)), key=times.__getitem__)])


def _require_some(problems: Sequence[Problem]) -> None:
    if not problems:
        raise ValueError("there are no problems to draw from")


def _level(problem: Problem) -> int:
    assert problem.level is not None
    return problem.level
