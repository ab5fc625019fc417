"""The problems that the page's browser holds: every arm's answers, as many as its size allows.

The texts of completions are nearly all of the page. Where they would pass `BYTES`, problems are left out evenly over
the order of the test set, the same ones every time, and the page says how many it shows. Where even a few problems with
all their samples would pass it, the first samples of each stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from long2short.frontier import Arm
from long2short.report_text import json_text, readable, visible
from rl.types import FinishReason, Outcome, Problem, Rollout

BYTES = 8_000_000  # of the problems in the page, which may have 15,000,000 with plotly.js (4.8)
FEW = 24  # problems; rather than showing fewer, fewer samples are shown
VERDICTS = tuple(Outcome)
ENDS = {
    FinishReason.STOP: "ended by itself",
    FinishReason.LENGTH: "cut at the token limit",
    FinishReason.REPETITION: "stopped in a loop",
    FinishReason.ABORTED: "aborted",
}


@dataclass(frozen=True, slots=True)
class Examples:
    """The problems of the browser. Example: 81 of 400 problems, 4 of 4 samples: `Examples(rows, 400, 4, 4)`."""

    rows: tuple[dict[str, Any], ...]
    problems: int  # in the test set
    samples: int  # of each problem in the page
    all_samples: int  # of each problem in the pool

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "verdicts": VERDICTS, "ends": list(ENDS.values()), "samples": self.samples}


def examples(arms: Sequence[Arm], bin_of: Mapping[str, int], limit: int = BYTES) -> Examples:
    """The answers of all arms to the problems of the first, as JSON values of at most `limit` bytes.

    `bin_of` is the difficulty of a problem, by its id. A row: {"id", "level", "bin", "question", "answer", "samples"};
    `samples[arm][sample]` is [verdict, tokens, end, text, reason], the first and third as positions in `VERDICTS` and
    `ENDS`. At least one problem is shown, however long.
    """
    by_id = [{group.problem.id: group for group in arm.groups} for arm in arms]
    problems = [group.problem for group in arms[0].groups]
    groups = [[own[problem.id] for own in by_id] for problem in problems]
    bare = [_row(problem, bin_of.get(problem.id), [() for _ in arms]) for problem in problems]
    # Bytes of each problem with no sample, with the first of every arm, with the first two, ..
    sizes = [
        list(
            accumulate(map(_sample_bytes, *(group.rollouts for group in own)), initial=len(json_text(row).encode()) + 1)
        )
        for row, own in zip(bare, groups, strict=True)
    ]
    samples = all_samples = len(sizes[0]) - 1
    while True:
        kept = evenly_within([size[samples] for size in sizes], limit)
        if samples == 1 or len(kept) >= min(FEW, len(problems)):
            break
        samples = max(1, samples // 2)
    rows = (
        _row(problems[at], bin_of.get(problems[at].id), [group.rollouts[:samples] for group in groups[at]])
        for at in kept or [0]
    )
    return Examples(tuple(rows), len(problems), samples, all_samples)


def evenly_within(sizes: Sequence[int], limit: int) -> list[int]:
    """Positions, evenly apart, whose sizes add up to at most `limit`; as many as that rule finds.

    `evenly_within([10, 10, 10, 10], 25)` is [1, 3]; all of them where they fit.
    """
    total = len(sizes)
    most = sum(size <= limit for size in accumulate(sorted(sizes)))  # no choice of more can fit
    for wanted in range(most, 0, -1):
        chosen = [(2 * index + 1) * total // (2 * wanted) for index in range(wanted)]
        if sum(sizes[index] for index in chosen) <= limit:
            return chosen
    return []


def _row(problem: Problem, bin_: int | None, rollouts: Sequence[Sequence[Rollout]]) -> dict[str, Any]:
    return {
        "id": visible(problem.id),
        "level": problem.level,
        "bin": bin_,
        "question": readable(problem.text),
        "answer": readable(problem.answer, 2_000),
        "samples": [[_sample(rollout) for rollout in own] for own in rollouts],
    }


def _sample(rollout: Rollout) -> list[Any]:
    completion = rollout.completion
    return [
        VERDICTS.index(rollout.verdict.outcome),
        rollout.num_tokens,
        list(ENDS).index(completion.finish_reason),
        readable(completion.text),
        readable(rollout.verdict.reason, 300),
    ]


def _sample_bytes(*rollouts: Rollout) -> int:
    return sum(len(json_text(_sample(rollout)).encode()) + 1 for rollout in rollouts)
