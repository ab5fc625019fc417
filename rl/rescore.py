"""Judge a pool again, without sampling again: what another verifier says, what changed, and how far to trust it.

A verifier that was wrong makes every number that hangs on it wrong; the samples are as good as ever. `rescore` writes
the verdicts of another version beside the old ones (rl/pool.py) and lists those that differ. `audit` holds a verifier
against a second, independent one on the same samples. Where they agree nothing is learned; what they disagree on is
for a person to look at, and how often the first is wrong follows from that:

    estimated false negatives = share of (first wrong, second right) that a person calls right x their number
    false-negative rate       = false negatives / (false negatives + samples that the first calls right)

Until somebody has looked, only the bounds are known: between none and all of these disagreements.

    reason rescore POOL PROBLEMS --task math --second math-verify
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl.jsonl import dump_lines, read_rows
from rl.judging import judge_attempts
from rl.pool import Key, Pool
from rl.runs import write_file
from rl.tasks.base import Task, UndecidedLimit
from rl.types import Completion, Outcome, Problem, Verdict

TAIL = 400  # characters of a completion that a reader is shown
LABELS = ("right", "wrong")
AUDIT_FIELDS = {
    "problem": str, "sample": int, "gold": str, "tail": str, "first": str, "second": str, "label": str,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Changed:
    """One sample whose verdict is not what it was."""

    problem: Problem
    sample: int
    completion: Completion
    before: Verdict
    after: Verdict

    def row(self) -> dict[str, Any]:
        return {
            "problem": self.problem.id,
            "sample": self.sample,
            "gold": self.problem.answer,
            "before": str(self.before.outcome),
            "after": str(self.after.outcome),
            "reason_before": self.before.reason,
            "reason_after": self.after.reason,
            "tail": self.completion.text[-TAIL:],
        }


@dataclass(frozen=True, slots=True)
class Rescored:
    """What a second judging of the same samples changed.

    Example: 800 samples, 12 changed: {("wrong", "right"): 10, ("right", "wrong"): 2}.
    """

    before: str  # verifier versions
    after: str
    samples: int
    right_before: int
    right_after: int
    changed: tuple[Changed, ...]

    @property
    def counts(self) -> dict[tuple[str, str], int]:
        found = Counter((str(one.before.outcome), str(one.after.outcome)) for one in self.changed)
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "samples": self.samples,
            "sampled": 0,  # nothing is drawn
            "right_before": self.right_before,
            "right_after": self.right_after,
            "changed": len(self.changed),
            "counts": [[before, after, count] for (before, after), count in self.counts.items()],
        }


def rescore(pool: Pool, problems: Sequence[Problem], task: Task, before: str | None = None) -> Rescored:
    """Judge every sample of the pool with `task` and compare with the verdicts of the version `before`, by default the
    one that judged last. Verdicts that are there are not made again.

    Errors: ValueError if no other version has judged the pool.
    """
    known = [version for version in pool.verifiers() if version != task.verifier_version]
    if before is None and not known:
        raise ValueError(f"{pool.folder} holds no verdicts of another verifier than {task.verifier_version}")
    before = before or known[-1]
    old = pool.verdicts(before)
    pool.judge(problems, task)
    new = pool.verdicts(task.verifier_version)
    by_id = {problem.id: problem for problem in problems}
    changed = tuple(
        Changed(by_id[problem], sample, completion, old[problem, sample], new[problem, sample])
        for problem, sample, completion in pool.samples()
        if old[problem, sample].outcome is not new[problem, sample].outcome
    )
    right = [sum(verdict.right for verdict in verdicts.values()) for verdicts in (old, new)]
    return Rescored(before, task.verifier_version, len(new), right[0], right[1], changed)


# --- two verifiers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Audit:
    """Two verifiers on the same samples.

    `table` counts (first, second) outcomes. `labelled` counts what people said of the disagreements (first wrong,
    second right): how many they looked at, and how many of those are right.

    Example: first right 700, (wrong, right) 20, of which 10 were looked at and 4 are right: about 8 false negatives,
    8 / 708 = 1.1 %; bounds before anybody looked: 0 to 20 / 720 = 2.8 %.
    """

    first: str
    second: str
    table: Mapping[tuple[str, str], int]
    labelled: tuple[int, int] = (0, 0)  # looked at, right

    @property
    def samples(self) -> int:
        return sum(self.table.values())

    @property
    def agreement(self) -> float:
        """Of the samples that both decided."""
        decided = {pair: n for pair, n in self.table.items() if Outcome.UNDECIDED not in pair}
        total = sum(decided.values())
        return sum(n for (one, other), n in decided.items() if one == other) / total if total else math.nan

    def count(self, first: Outcome, second: Outcome) -> int:
        return self.table.get((str(first), str(second)), 0)

    @property
    def first_right(self) -> int:
        return sum(n for (one, _), n in self.table.items() if one == Outcome.RIGHT)

    def false_negative_rate(self, share: float) -> float:
        """The rate if `share` of the disagreements are false negatives."""
        missed = share * self.count(Outcome.WRONG, Outcome.RIGHT)
        return missed / (missed + self.first_right) if missed + self.first_right else 0.0

    @property
    def bounds(self) -> tuple[float, float]:
        """Before anybody looked 0 and all of them; after that the 95 % Wilson interval of the labelled share."""
        looked, right = self.labelled
        low, high = wilson(right, looked) if looked else (0.0, 1.0)
        return self.false_negative_rate(low), self.false_negative_rate(high)

    @property
    def estimate(self) -> float | None:
        looked, right = self.labelled
        return self.false_negative_rate(right / looked) if looked else None

    def to_json(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "second": self.second,
            "samples": self.samples,
            "agreement": None if math.isnan(self.agreement) else self.agreement,
            "table": [[one, other, n] for (one, other), n in sorted(self.table.items())],
            "looked_at": self.labelled[0],
            "false_negative_rate": self.estimate,
            "false_negative_bounds": list(self.bounds),
        }


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share: `wilson(4, 10)` is (.168, .687)."""
    share, spread = successes / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def audit(pool: Pool, problems: Sequence[Problem], task: Task, second: Task, path: Path, seed: int = 0) -> Audit:
    """Hold `task` against `second` on every sample of the pool and write what they disagree on to `path`, in random
    order. A person writes `right` or `wrong` into a row's `label`; called again, those labels count.

    Errors: ValueError for a label that is neither.
    """
    labels = read_labels(path) if path.is_file() else {}
    pool.judge(problems, task)
    first = pool.verdicts(task.verifier_version)
    by_id = {problem.id: problem for problem in problems}
    samples = list(pool.samples())
    attempts = [(by_id[problem], completion) for problem, _, completion in samples]
    opinion = replace(second, limit=UndecidedLimit(share=1.0))  # nothing hangs on it
    found = judge_attempts(opinion, attempts)
    table: Counter[tuple[str, str]] = Counter()
    rows = []
    for (problem, sample, completion), verdict in zip(samples, found, strict=True):
        pair = (str(first[problem, sample].outcome), str(verdict.outcome))
        table[pair] += 1
        if pair[0] != pair[1] and Outcome.UNDECIDED not in pair:
            rows.append(
                {
                    "problem": problem,
                    "sample": sample,
                    "gold": by_id[problem].answer,
                    "tail": completion.text[-TAIL:],
                    "first": pair[0],
                    "second": pair[1],
                    "label": labels.get((problem, sample), ""),
                }
            )
    random.Random(seed).shuffle(rows)
    write_file(path, dump_lines(rows), "rescore.audit")
    looked = [row["label"] for row in rows if row["first"] == Outcome.WRONG and row["label"]]
    return Audit(task.verifier_version, second.verifier_version, table, (len(looked), looked.count("right")))


def read_labels(path: Path) -> dict[Key, str]:
    """What people wrote into an audit file."""
    found = {}
    for place, row in read_rows(path, AUDIT_FIELDS):
        if row["label"] not in ("", *LABELS):
            raise ValueError(f"{place}: label must be right, wrong or empty, not {row['label'][:20]!r}")
        if row["label"]:
            found[row["problem"], row["sample"]] = row["label"]
    return found


def write_changes(path: Path, rescored: Rescored) -> None:
    """The changed verdicts, one a line, with the end of each completion."""
    write_file(path, dump_lines(one.row() for one in rescored.changed), "rescore.changes")
