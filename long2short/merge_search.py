"""The weight of a merge, searched: a coarse grid on few problems, successive halving, the rest on all dev problems.

Successive halving (Jamieson and Talwalkar, 2016): all candidates are scored on a few problems, the better part of them
on `factor` times as many, and so on, until no more than `keep` are left; those are scored on all problems. A candidate
that went on was scored on the earlier problems already, with the same seeds, and only the new ones are drawn.

The winner is chosen by `long2short.select.Briefest`: the fewest tokens among those whose accuracy is at least the
parent's less a tolerance; if there is none, the most accurate. Few problems do not say who that is. So those that go on
from an earlier round are chosen in turns by two such rules, whose tolerances are a standard error of the parent's
accuracy narrower and wider: a safe one, a brief one, the next safe one.

A candidate is merged when it is to be scored and removed afterwards, so the disk holds one at a time. Scores are kept
per problem in scores.jsonl: a search that was killed draws nothing twice. The search ends in points of a frontier: the
winner is the stage's model, those after it lie in models/2, models/3, .. in the order of the same rule, and a recipe
makes arms of them by `SEARCH@2`. summary.json holds every round and, for all that were scored to the end, a point on
dev problems with its interval and whether another one dominates it.

Line: `reason long2short RECIPE`, the stage with `method: merge_search`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from long2short.frontier_scores import non_dominated
from long2short.select import Briefest, Choice, Rule
from rl.faults import fault
from rl.runs import append_line, read_lines, write_json
from rl.stats import bootstrap_mean
from rl.train_metrics import DevScore
from rl.types import FinishReason, Problem, RolloutGroup

PARENT = ""  # its name among the scores

Make = Callable[[Path], Mapping[str, Any]]
"""Writes a model to the folder, in place of what is there, and returns its summary."""
Draw = Callable[[str, Sequence[Problem]], Sequence[RolloutGroup]]
"""Judged completions of problems by the model of a folder or hub id, the same number for each problem."""


@dataclass(frozen=True, slots=True)
class Halving:
    """How a search goes on. Example: `Halving(first=20, factor=2, keep=2)`."""

    first: int  # problems of the first round
    factor: int = 2  # a round keeps 1 / factor of the candidates, the next one has factor times the problems
    keep: int = 2  # candidates that are scored on all problems, and kept

    def rounds(self, candidates: int, problems: int) -> list[tuple[int, int]]:
        """(problems, candidates that go on) of each round; those of the last one are kept, the winner first.

        Example: 9 candidates, 200 problems, first 20, factor 2, keep 2: (20, 5), (40, 3), (80, 2), (200, 2).
        """
        found = []
        number = self.first
        while candidates > self.keep and number < problems:
            candidates = max(self.keep, math.ceil(candidates / self.factor))
            found.append((number, candidates))
            number *= self.factor
        return [*found, (problems, self.keep)]


@dataclass(frozen=True, slots=True)
class ProblemScore:
    """What a model did on one problem, over its samples. Example: `ProblemScore("p1", 0.5, 61.5, 0.0)`."""

    problem: str
    accuracy: float | None  # share of right ones; None where the judge decided none
    tokens: float  # mean
    truncated: float  # share

    @classmethod
    def of(cls, group: RolloutGroup) -> ProblemScore:
        group.require_complete("a merge search")
        right = [rollout.right for rollout in group.rollouts if rollout.verdict.decided]
        return cls(
            group.problem.id,
            float(np.mean(right)) if right else None,
            float(np.mean(group.num_tokens)),
            float(np.mean([r.completion.finish_reason is FinishReason.LENGTH for r in group.rollouts])),
        )


def search_merges(
    candidates: Mapping[str, Make],
    parent: str,
    problems: Sequence[Problem],
    folder: Path,
    *,
    draw: Draw,
    halving: Halving,
    tolerance: float,
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> Choice:
    """Find the best of `candidates` (name -> how it is made) and make it in `folder`/model, the next best up to
    `halving.keep` in `folder`/models/2 and so on.

    `parent` is the model whose accuracy is to be kept. What an earlier, killed search in `folder` scored is used.

    Errors: ValueError without candidates or problems, and for a parent or candidate of which nothing could be judged.
    """
    if not candidates or not problems:
        raise ValueError("a merge search needs candidates and problems")
    scores = _Scores(folder / "scores.jsonl")
    alive = list(candidates)
    rounds = halving.rounds(len(alive), len(problems))
    total, done = _drawings(len(alive), rounds), 0
    history: list[dict[str, Any]] = []
    best: list[Choice] = []
    for number, staying in rounds:
        for name in [PARENT, *alive]:
            progress(done, total, f"{name or 'parent'} on {number} problems")
            missing = scores.missing(name, problems[:number])
            if missing and name == PARENT:
                scores.add(name, draw(parent, missing))
            elif missing:
                scores.add(name, _draw_made(candidates[name], folder / ".candidate", draw, missing))
            done += 1
        found = {name: scores.mean(name, problems[:number]) for name in [PARENT, *alive]}
        base = found.pop(PARENT)
        error = _standard_error(base.accuracy, number)
        rules = [Briefest(tolerance - error), Briefest(tolerance + error)]
        if number == len(problems):
            rules = [Briefest(tolerance)]
        best = _best(found, base, rules, staying)
        alive = [choice.name for choice in best]
        history.append(
            {
                "problems": number,
                "tolerances": [rule.tolerance for rule in rules],
                "parent": base.metrics(),
                "candidates": {name: score.metrics() for name, score in found.items()},
                "kept": alive,
            }
        )
    chosen = best[0]
    merged = candidates[chosen.name](folder / "model")
    shutil.rmtree(folder / "models", ignore_errors=True)
    for rank, name in enumerate(alive[1:], 2):
        (folder / "models").mkdir(exist_ok=True)
        candidates[name](folder / "models" / str(rank))
    finalists = {name: scores.mean(name, problems) for name in [PARENT, *history[-1]["candidates"]]}
    marks = non_dominated([(score.accuracy, score.mean_tokens) for score in finalists.values()])
    summary = {
        "chosen": chosen.name,
        "reason": chosen.reason,
        "tolerance": tolerance,
        "rounds": history,
        "order": alive,
        "points": {
            name or "parent": {**scores.point(name, problems), "frontier": mark}
            for name, mark in zip(finalists, marks, strict=True)
        },
        "model": dict(merged),
    }
    write_json(folder / "summary.json", summary, "search.summary")
    progress(total, total, f"{chosen.name}: {chosen.reason}")
    return chosen


def _drawings(candidates: int, rounds: Sequence[tuple[int, int]]) -> int:
    """How often a model is scored: the parent and all that are left, each round."""
    left = [candidates, *(staying for _, staying in rounds[:-1])]
    return sum(number + 1 for number in left)


def _standard_error(accuracy: float, problems: int) -> float:
    """Of a share of right answers. One more right and one more wrong one are counted: 20 of 20 is not certain.

    Example: .9 of 10 problems: sqrt(.8333 · .1667 / 10) = .118.
    """
    share = (accuracy * problems + 1) / (problems + 2)
    return math.sqrt(share * (1 - share) / problems)


def _draw_made(make: Make, path: Path, draw: Draw, problems: Sequence[Problem]) -> Sequence[RolloutGroup]:
    """What a candidate does, which exists only for that."""
    try:
        make(path)
        return draw(str(path), problems)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _best(found: Mapping[str, DevScore], parent: DevScore, rules: Sequence[Rule], number: int) -> list[Choice]:
    """The `number` best: what the first rule chooses, what the next one chooses of the others, and so on in turns."""
    left = dict(found)
    best: list[Choice] = []
    for rule in islice(cycle(rules), min(number, len(left))):
        best.append(rule(left, parent))
        del left[best[-1].name]
    return best


class _Scores:
    """What each model did on each problem, in memory and in a log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, ProblemScore]] = {}
        for line in read_lines(path) if path.exists() else ():
            name = line.pop("candidate")
            self.known.setdefault(name, {})[line["problem"]] = ProblemScore(**line)

    def missing(self, name: str, problems: Sequence[Problem]) -> list[Problem]:
        known = self.known.get(name, {})
        return [problem for problem in problems if problem.id not in known]

    def add(self, name: str, groups: Sequence[RolloutGroup]) -> None:
        fault("search.score")
        for group in groups:
            score = ProblemScore.of(group)
            append_line(self.path, {"candidate": name, **asdict(score)})
            self.known.setdefault(name, {})[score.problem] = score

    def mean(self, name: str, problems: Sequence[Problem]) -> DevScore:
        """Means over problems; those of which the judge decided no sample have no accuracy."""
        rows = [self.known[name][problem.id] for problem in problems]
        decided = [row.accuracy for row in rows if row.accuracy is not None]
        if not decided:
            raise ValueError(f"{name or 'the parent'}: the judge decided none of its {len(rows)} problems")
        return DevScore(
            0,
            float(np.mean(decided)),
            float(np.mean([row.tokens for row in rows])),
            float(np.mean([row.truncated for row in rows])),
        )

    def point(self, name: str, problems: Sequence[Problem]) -> dict[str, Any]:
        """Accuracy and tokens with their intervals over problems."""
        rows = [self.known[name][problem.id] for problem in problems]
        return {
            "accuracy": asdict(bootstrap_mean([row.accuracy for row in rows if row.accuracy is not None])),
            "tokens": asdict(bootstrap_mean([row.tokens for row in rows])),
        }
