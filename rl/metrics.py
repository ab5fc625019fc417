"""The headline numbers as `evaluate.Metric` subclasses, for those who have outcomes and lengths but no `RolloutGroup`.

A row is a problem with its k samples; `columns(groups, task)` makes the rows of every metric from judged groups:

    rows = columns(groups, task)
    AvgAtK().compute(predictions=rows["outcomes"])  ->  {"avg_at_k": 0.75, "low": .., "high": .., "undecided": 0}
    MajAtK().compute(predictions=rows["answers"], outcomes=rows["outcomes"])
    TokensPerCorrect().compute(predictions=rows["tokens"], outcomes=rows["outcomes"])

The arithmetic is in `rl.stats`, which `rl.evaluate.summarize` calls too: both give the same numbers. An outcome is
"right", "wrong" or "undecided" (the judge failed: the sample leaves the denominator and is counted). An empty answer is
no answer.

`evaluate` keeps its rows in arrow files below the home folder, and makes that folder even when told to stay in memory.
These metrics stay in memory and make no folder; nothing touches the network.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import evaluate
from datasets import Features, List, Value

from rl import stats
from rl.evaluate import ends_in_loop
from rl.tasks.base import Task
from rl.types import FinishReason, Outcome, RolloutGroup

STRINGS = List(Value("string"))
INTEGERS = List(Value("int64"))
FLAGS = List(Value("bool"))

Rows = Sequence[Sequence[Any]]


def columns(groups: Sequence[RolloutGroup], task: Task) -> dict[str, list[list[Any]]]:
    """Judged groups as rows of k values per problem: outcomes, answers ("" for none), tokens, truncated, looped."""
    for group in groups:
        group.require_complete("evaluation")
    rows = [group.rollouts for group in groups]
    return {
        "outcomes": [[str(r.verdict.outcome) for r in row] for row in rows],
        "answers": [[task.answer_of(r.completion.text) or "" for r in row] for row in rows],
        "tokens": [[r.num_tokens for r in row] for row in rows],
        "truncated": [[r.completion.finish_reason is FinishReason.LENGTH for r in row] for row in rows],
        "looped": [[ends_in_loop(r.completion) for r in row] for row in rows],
    }


class GroupMetric(evaluate.Metric):
    """What the metrics share: rows in memory, no folder. A subclass names its columns and computes from `rl.stats`."""

    columns: ClassVar[dict[str, List]]  # name -> type; a row is one problem's k samples
    score: ClassVar[Callable[..., dict[str, Any]]]  # the columns and the options by name -> the numbers

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        description = inspect.getdoc(type(self)) or ""
        names = ", ".join(f"`{name}` ({kind.feature.dtype})" for name, kind in self.columns.items())
        usage = f"One row per problem, one value per sample: {names}."
        return evaluate.MetricInfo(
            description=description, citation="", inputs_description=usage, features=Features(self.columns)
        )

    def _compute(
        self, *, predictions: Any = None, references: Any = None, **columns_and_options: Any
    ) -> dict[str, Any]:
        return type(self).score(predictions=predictions, **columns_and_options)

    def _build_data_dir(self) -> str:
        if self.keep_in_memory:
            return os.path.join(self._data_dir_root, str(self.name))
        return super()._build_data_dir()


class AvgAtK(GroupMetric):
    """avg@k: the share of right samples of each problem, averaged over problems, with a 95 % interval over problems.

    Example: `AvgAtK().compute(predictions=[["right", "wrong"], ["right", "right"]])["avg_at_k"] == 0.75`.
    """

    columns: ClassVar = {"predictions": STRINGS}

    @staticmethod
    def score(predictions: Rows) -> dict[str, float]:
        decided, undecided = keep_decided(predictions, predictions)
        estimate = stats.bootstrap_mean(stats.shares(rights(decided)), bounds=stats.SHARE)
        return {"avg_at_k": estimate.value, "low": estimate.low, "high": estimate.high, "undecided": undecided}


class MajAtK(GroupMetric):
    """maj@k: the share of problems whose majority answer is right; ties go to the answer seen first.

    Example: answers `[["4", "7", "7"]]` with outcomes `[["right", "wrong", "wrong"]]` give 0.0.
    """

    columns: ClassVar = {"predictions": STRINGS, "outcomes": STRINGS}

    @staticmethod
    def score(predictions: Rows, outcomes: Rows) -> dict[str, float]:
        decided, undecided = keep_decided(outcomes, outcomes)
        answers, _ = keep_decided(predictions, outcomes)
        votes = [[answer or None for answer in row] for row in answers]
        return {"maj_at_k": stats.maj_at_k(votes, rights(decided)), "undecided": undecided}


class PassAtK(GroupMetric):
    """pass@k, unbiased, averaged over the problems with k decided samples or more.

    Example: one problem, 4 of 16 samples right: 0.25 at k=1, 0.72802 at k=4.
    """

    columns: ClassVar = {"predictions": STRINGS}

    @staticmethod
    def score(predictions: Rows, k: int) -> dict[str, float | None]:
        decided, undecided = keep_decided(predictions, predictions)
        return {"pass_at_k": stats.mean_pass_at_k(rights(decided), k), "k": k, "undecided": undecided}


class GPassAtK(GroupMetric):
    """G-Pass@k at tau: the chance that of k samples of a problem at least tau k are right, averaged over problems.

    Example: one problem, 12 of 16 samples right: 0.97308 at k=4, tau=.5 and 0.27198 at tau=1.
    """

    columns: ClassVar = {"predictions": STRINGS}

    @staticmethod
    def score(predictions: Rows, k: int, tau: float = 1.0) -> dict[str, float | None]:
        decided, undecided = keep_decided(predictions, predictions)
        value = stats.mean_g_pass_at_k(rights(decided), k, tau)
        return {"g_pass_at_k": value, "k": k, "tau": tau, "undecided": undecided}


class Tokens(GroupMetric):
    """Lengths in tokens: mean with a 95 % interval over problems, median, p95; of all, right or wrong completions.

    Example: `Tokens().compute(predictions=[[10, 30]], outcomes=[["right", "wrong"]], of="right")["mean"] == 10`.
    """

    columns: ClassVar = {"predictions": INTEGERS, "outcomes": STRINGS}

    @staticmethod
    def score(predictions: Rows, outcomes: Rows, of: str = "all") -> dict[str, float | None]:
        if of not in ("all", "right", "wrong"):
            raise ValueError(f'of must be "all", "right" or "wrong", got {of!r}')
        check_outcomes(outcomes)
        lengths = [
            [length for length, outcome in zip(row, verdicts, strict=True) if of in ("all", outcome)]
            for row, verdicts in zip(predictions, outcomes, strict=True)
        ]
        found = stats.lengths(lengths)
        if found is None:
            return {"count": 0, "mean": None, "low": None, "high": None, "median": None, "p95": None}
        mean = {"mean": found.mean.value, "low": found.mean.low, "high": found.mean.high}
        return {"count": found.count, **mean, "median": found.median, "p95": found.p95}


class TokensPerCorrect(GroupMetric):
    """What a right answer costs: tokens of all decided completions over the number of right ones.

    Example: tokens `[[10, 30]]` with outcomes `[["right", "wrong"]]` give 40.
    """

    columns: ClassVar = {"predictions": INTEGERS, "outcomes": STRINGS}

    @staticmethod
    def score(predictions: Rows, outcomes: Rows) -> dict[str, float | None]:
        decided, undecided = keep_decided(outcomes, outcomes)
        tokens, _ = keep_decided(predictions, outcomes)
        return {"tokens_per_correct": stats.tokens_per_correct(tokens, rights(decided)), "undecided": undecided}


class Share(GroupMetric):
    """The share of completions with a flag (truncated, ended in a loop), with a 95 % interval over problems.

    Example: `Share().compute(predictions=[[True, False], [False, False]])["share"] == 0.25`.
    """

    columns: ClassVar = {"predictions": FLAGS}

    @staticmethod
    def score(predictions: Rows) -> dict[str, float]:
        estimate = stats.bootstrap_mean(stats.shares(predictions), bounds=stats.SHARE)
        return {"share": estimate.value, "low": estimate.low, "high": estimate.high}


def keep_decided(rows: Rows, outcomes: Rows) -> tuple[list[list[Any]], int]:
    """`rows` without undecided samples and without problems that have no other, and how many samples that left out."""
    check_outcomes(outcomes)
    kept = [
        [value for value, outcome in zip(row, verdicts, strict=True) if outcome != Outcome.UNDECIDED]
        for row, verdicts in zip(rows, outcomes, strict=True)
    ]
    return [row for row in kept if row], sum(map(len, rows)) - sum(map(len, kept))


def rights(outcomes: Rows) -> list[list[bool]]:
    return [[outcome == Outcome.RIGHT for outcome in row] for row in outcomes]


def check_outcomes(outcomes: Rows) -> None:
    known = set(Outcome)
    for index, row in enumerate(outcomes):
        for outcome in row:
            if outcome not in known:
                names = ", ".join(sorted(known))
                raise ValueError(f"problem number {index}: {outcome!r} is no outcome; use one of {names}")
