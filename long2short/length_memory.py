"""What a length objective remembers between steps: one length a group, handed to it as `GroupLengths.reference`.

    ShortestRight      HAPO (2505.11225): the shortest right answer to the problem so far
    FirstSeen          O1-Pruner (2501.12570), Toggle (2602.02276): a statistic of the problem's first group
    DifficultyTargets  LASER-D (2505.15612): one target for easy, middling and hard groups, estimated again and again
    Stated             L1 (2503.04697): the budget that the prompt states, read anew each time; nothing to remember

A memory is fed by what it is asked: `recall(group)` gives the reference of a group and then takes the group in. Feeding
it a pool of the starting model before the first step gives O1-Pruner and Toggle the statistics of that model; without
one the first group of each problem in the run stands for it, and the policy may have moved since the start.

`as_json` holds all of it, exactly; a checkpoint stores it, so a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from long2short.length_limits import Budget, stated_budget
from long2short.length_objectives import GroupLengths

HARD, MIDDLING, EASY = "hard", "middling", "easy"


class Memory(Protocol):
    """Lengths remembered over steps, in tokens."""

    def recall(self, group: GroupLengths) -> float | None:
        """The reference of a group, None while there is none; then the group itself is taken in."""
        ...

    def as_json(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(slots=True)
class Stated:
    """The budget in the group's prompt: an exact one ("Think for N tokens."), or with `at_most` a limit ("maximum N").

    A limit is not read as an exact length, nor the other way round: the model would be paid for what it was not asked.
    Example: "2+2? Think for maximum 12 tokens." with `at_most` -> 12; without -> ValueError.

    Errors: ValueError for a prompt that states none, or the other kind.
    """

    at_most: bool

    def recall(self, group: GroupLengths) -> float:
        return self.budget(group.problem, group.prompt)

    def budget(self, problem: str, prompt: str) -> int:
        """What the prompt of a problem states, in tokens; errors as above."""
        found = stated_budget(prompt)
        if found is not None and found.at_most == self.at_most:
            return found.tokens
        wanted = Budget(512, self.at_most)
        if found is None:
            raise ValueError(
                f"length.target: not given, and problem {problem} states no budget: set length.target, or end its text "
                f'or problems.prompt_suffix with one, such as " {wanted}"'
            )
        raise ValueError(
            f'length.target: not given, and problem {problem} states "{found}", which '
            f"{'lcpo-max' if found.at_most else 'lcpo-exact'} reads: take that objective, set length.target, or state "
            f'it as "{wanted}"'
        )

    def as_json(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        return


@dataclass(slots=True)
class ShortestRight:
    """The shortest right answer to each problem in earlier steps.

    Example: a group with right answers of 900 and 700 tokens: None; the next group of that problem: 700.
    """

    lengths: dict[str, int] = field(default_factory=dict)  # by problem

    def recall(self, group: GroupLengths) -> float | None:
        before = self.lengths.get(group.problem)
        found = group.right_lengths + ([] if before is None else [before])
        if found:
            self.lengths[group.problem] = min(found)
        return before

    def as_json(self) -> dict[str, Any]:
        return {"lengths": dict(self.lengths)}

    def restore(self, state: dict[str, Any]) -> None:
        self.lengths = dict(state["lengths"])


def mean_length(group: GroupLengths) -> float:
    """The mean over all samples, right and wrong: lengths [1000, 3000] -> 2000 (O1-Pruner)."""
    return math.fsum(group.lengths) / len(group.lengths)


@dataclass(frozen=True, slots=True)
class RightPercentile:
    """A percentile of the right lengths, linear between two of them; None where nothing is right (Toggle).

    Example: percentile 50 of right lengths [1000, 2000, 4000] -> 2000, percentile 75 -> 3000.
    """

    percentile: float = 50.0

    def __call__(self, group: GroupLengths) -> float | None:
        found = sorted(group.right_lengths)
        if not found:
            return None
        place = self.percentile / 100 * (len(found) - 1)
        below, above = found[math.floor(place)], found[math.ceil(place)]
        return below + (place - math.floor(place)) * (above - below)


@dataclass(slots=True)
class FirstSeen:
    """A statistic of the first group of each problem that has one; that group's own reference is it already."""

    statistic: Callable[[GroupLengths], float | None]
    lengths: dict[str, float] = field(default_factory=dict)  # by problem

    def recall(self, group: GroupLengths) -> float | None:
        if group.problem not in self.lengths:
            found = self.statistic(group)
            if found is None:
                return None
            self.lengths[group.problem] = found
        return self.lengths[group.problem]

    def as_json(self) -> dict[str, Any]:
        return {"lengths": dict(self.lengths)}

    def restore(self, state: dict[str, Any]) -> None:
        self.lengths = dict(state["lengths"])


def difficulty(group: GroupLengths) -> str:
    """easy from 2/3 of right answers on, middling from 1/3 on, else hard; exact in whole numbers."""
    thirds = 3 * sum(group.right)
    return EASY if thirds >= 2 * len(group.right) else MIDDLING if thirds >= len(group.right) else HARD


def laser_target(right_lengths: Sequence[int], fewest_right: float) -> int:
    """LASER-D's target: the smallest length within which at least one right answer of a group is expected.

    `fewest_right` is how many right answers a group of this difficulty has at least; within a length it is expected to
    have that times the share of the right answers that are so short.
    Example: [500, 800, 1200, 2000, 3000, 4000] and 16 x 2/3: 10.67 x 1/6 is 1.78, so 500; with 1 the longest, 4000.
    """
    ordered = sorted(right_lengths)
    place = min(max(1, math.ceil(len(ordered) / fewest_right - 1e-9)), len(ordered))
    return ordered[place - 1]


@dataclass(slots=True)
class DifficultyTargets:
    """A target for each difficulty, estimated every `every` steps on the groups since the last estimate.

    The first estimate comes after the first step. Deviation: the paper samples 500 problems apart for it; here the
    groups of training are the sample. Where nothing was right yet in a difficulty it has no target.
    """

    every: int = 20
    targets: dict[str, int] = field(default_factory=dict)
    started: int | None = None  # the first step whose groups go into the next estimate
    seen: dict[str, list[int]] = field(default_factory=dict)  # right lengths by difficulty, since the last estimate
    size: int = 0  # samples of the largest group among them

    def recall(self, group: GroupLengths) -> float | None:
        if self.started is None:
            self.started = group.step
        if group.step - self.started >= (self.every if self.targets else 1):
            self.estimate()
            self.started = group.step
        self.seen.setdefault(difficulty(group), []).extend(group.right_lengths)
        self.size = max(self.size, len(group.lengths))
        return self.targets.get(difficulty(group))

    def estimate(self) -> None:
        """New targets from the groups that were taken in since the last time."""
        fewest = {EASY: 2 * self.size / 3, MIDDLING: self.size / 3, HARD: 1.0}
        for name, lengths in self.seen.items():
            if lengths:
                self.targets[name] = laser_target(lengths, max(1.0, fewest[name]))
        self.seen, self.size = {}, 0

    def as_json(self) -> dict[str, Any]:
        seen = {name: list(lengths) for name, lengths in self.seen.items()}
        return {"targets": dict(self.targets), "started": self.started, "seen": seen, "size": self.size}

    def restore(self, state: dict[str, Any]) -> None:
        self.targets, self.started = dict(state["targets"]), state["started"]
        self.seen = {name: list(lengths) for name, lengths in state["seen"].items()}
        self.size = state["size"]
