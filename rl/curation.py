"""From a file of problems to a set that RL can be trusted with: steps that drop problems, each with its evidence.

Kimi k1.5 (2501.12599, section 2.1) wants RL prompts that are diverse, of balanced difficulty, and hard to hack: no
multiple choice, true-or-false or proof problems, nothing that is guessed without thinking. Here that is a list of
steps, which are functions, taken in the order given:

    curated = curate(
        problems,
        drop_forms(),                                  # rl/problem_forms.py
        drop_leaks(EvaluationIndex(read_items(path))), # rl/decontamination.py
        drop_duplicates(),                             # rl/near_duplicates.py
        rate_difficulty(draw_samples),                 # rl/difficulty.py
        drop_guessable(draw_guesses),
    )
    write_curated(folder, curated)

A step sees what the steps before it have left. So every problem is kept or dropped once, under the first reason that
holds, and the costly steps sample only what is left. Put leaks before duplicates: of a leaked problem and its rewording
the leak goes first, and the rewording must stand for itself.

What is written: `problems.jsonl` (as `rl.problems.read_problems` reads it; with `pass_rate` where it was measured and
`overlap` where a kept problem shares words with an evaluation question), `dropped.jsonl` with reason and evidence,
`report.md` for people, and `report.json`, which comes last: a folder without it is not finished.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl.decontamination import EvaluationIndex, Kind, Overlap
from rl.difficulty import pass_rates, share_kept
from rl.jsonl import dump_lines
from rl.near_duplicates import DuplicateRule, near_duplicates
from rl.problem_forms import Form, form_of
from rl.problems import problem_row
from rl.runs import write_file, write_json
from rl.types import Problem, RolloutGroup

EXAMPLES = 3  # of each reason, in the report
MAX_SHOWN = 400  # characters of an example
REPORT = "report.json"

Progress = Callable[[int, int], None]  # done, total
# Judged samples of the given problems, one group a problem: from a pool, or drawn now.
Draw = Callable[[Sequence[Problem], Progress], Sequence[RolloutGroup]]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A problem that is left out.

    Example: `Dropped(problem, "yes or no", {"found": "answer: No"})`
    """

    problem: Problem
    reason: str
    evidence: Mapping[str, Any]  # JSON values


@dataclass(frozen=True, slots=True)
class Findings:
    """What a step says of the problems that it was given."""

    dropped: Sequence[Dropped] = ()
    facts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # problem id -> JSON fields for its row
    counts: Mapping[str, int] = field(default_factory=dict)  # what else the report should say


@dataclass(frozen=True, slots=True)
class Step:
    """One filter: a name for people, and the function that finds what to drop."""

    name: str
    find: Callable[[Sequence[Problem], Progress], Findings]


@dataclass(frozen=True, slots=True)
class StepReport:
    name: str
    read: int
    dropped: int
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Curated:
    """Every problem once: kept, in the order given, or dropped, in the order of the steps."""

    kept: tuple[Problem, ...]
    dropped: tuple[Dropped, ...]
    facts: Mapping[str, Mapping[str, Any]]
    steps: tuple[StepReport, ...]

    @property
    def reasons(self) -> dict[str, int]:
        """How many problems each reason took, in the order of the steps."""
        return dict(Counter(dropped.reason for dropped in self.dropped))

    def summary(self) -> dict[str, Any]:
        """For report.json. `read` is `kept` and all `reasons` together; a step reads what the one before it left."""
        rates = [facts["pass_rate"] for facts in self.facts.values() if "pass_rate" in facts]
        return {
            "read": len(self.kept) + len(self.dropped),
            "kept": len(self.kept),
            "reasons": self.reasons,
            "steps": [
                {"name": step.name, "read": step.read, "dropped": step.dropped, "counts": dict(step.counts)}
                for step in self.steps
            ],
            "pass_rates": histogram(rates),
        }


def curate(
    problems: Sequence[Problem],
    *steps: Step,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
) -> Curated:
    """Take the steps in order. `progress` is told the step's name, and how many of how many things are done.

    ValueError for an id that two problems have; RuntimeError for a step that drops what it was not given.
    """
    twice = [identity for identity, count in Counter(problem.id for problem in problems).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids belong to several problems, the first is {twice[0]!r}")
    kept = list(problems)
    dropped: list[Dropped] = []
    facts: dict[str, dict[str, Any]] = {}
    reports: list[StepReport] = []
    for step in steps:
        findings = step.find(kept, lambda done, total, name=step.name: progress(name, done, total))
        gone = {found.problem.id for found in findings.dropped}
        if len(gone) < len(findings.dropped) or not gone <= {problem.id for problem in kept}:
            raise RuntimeError(f"step {step.name!r} drops a problem twice, or one that it was not given")
        for identity, fields in findings.facts.items():
            facts.setdefault(identity, {}).update(fields)
        reports.append(StepReport(step.name, len(kept), len(gone), findings.counts))
        kept = [problem for problem in kept if problem.id not in gone]
        dropped.extend(findings.dropped)
    return Curated(tuple(kept), tuple(dropped), facts, tuple(reports))


# --- steps ------------------------------------------------------------------------------------------------------------


def drop_forms(forms: Sequence[Form] = tuple(Form)) -> Step:
    """Multiple choice, true or false, yes or no, proofs: what can be guessed or cannot be judged."""

    def find(problems: Sequence[Problem], progress: Progress) -> Findings:
        dropped = []
        for done, problem in enumerate(problems, 1):
            found = form_of(problem)
            if found is not None and found.form in forms:
                dropped.append(Dropped(problem, found.form, {"found": found.evidence}))
            progress(done, len(problems))
        return Findings(dropped)

    return Step("form", find)


def drop_leaks(index: EvaluationIndex) -> Step:
    """Problems that leak from an evaluation set. What shares a part or a template of one is kept and counted."""

    def find(problems: Sequence[Problem], progress: Progress) -> Findings:
        dropped, facts = [], {}
        weaker: Counter[Kind] = Counter({Kind.PART: 0, Kind.TEMPLATE: 0})
        for done, problem in enumerate(problems, 1):
            overlaps = index.overlaps(problem)
            leaks = [overlap for overlap in overlaps if overlap.leaked]
            if leaks:
                dropped.append(Dropped(problem, "evaluation leak", _overlap(leaks[0]) | {"items": len(leaks)}))
            elif overlaps:
                part = next((overlap for overlap in overlaps if overlap.kind is Kind.PART), overlaps[0])
                weaker[part.kind] += 1
                facts[problem.id] = {"overlap": _overlap(part)}
            progress(done, len(problems))
        counts = {
            "kept, sharing part of an evaluation question": weaker[Kind.PART],
            "kept, sharing only templates of evaluation questions": weaker[Kind.TEMPLATE],
        }
        return Findings(dropped, facts, counts)

    return Step("evaluation leak", find)


def _overlap(overlap: Overlap) -> dict[str, Any]:
    return {
        "kind": overlap.kind,
        "evaluation": overlap.item.evaluation,
        "item": overlap.item.id,
        "words": overlap.words,
        "coverage": round(overlap.coverage, 3),
        "shared": overlap.shared,
        "evaluation_text": overlap.item.text,
    }


def drop_duplicates(rule: DuplicateRule | None = None) -> Step:
    """Problems that repeat an earlier one."""

    def find(problems: Sequence[Problem], progress: Progress) -> Findings:
        found = near_duplicates(problems, rule, progress)
        dropped = [
            Dropped(
                duplicate.problem,
                "near duplicate",
                {
                    "kept": duplicate.kept.id,
                    "kept_question": duplicate.kept.text,
                    "kept_answer": duplicate.kept.answer,
                    "pair": [problem.id for problem in duplicate.link],
                    "similarity": round(duplicate.similarity, 3),
                    "answers_disagree": duplicate.answers_disagree,
                },
            )
            for duplicate in found
        ]
        return Findings(dropped, counts={"of these with another answer": sum(d.answers_disagree for d in found)})

    return Step("near duplicate", find)


def rate_difficulty(draw: Draw, drop_unsolved: bool = False, drop_solved: bool = False) -> Step:
    """The pass rate of every problem, written into its row.

    Problems that are never or always right give no gradient now and are kept all the same, unless asked: the model that
    is trained changes. What the judge could not decide at all has no rate and stays.
    """

    def find(problems: Sequence[Problem], progress: Progress) -> Findings:
        rates = pass_rates(draw(problems, progress))
        dropped, facts = [], {}
        for problem in problems:
            rate = rates.get(problem.id)
            if rate is None or rate.rate is None:
                continue
            facts[problem.id] = {"pass_rate": rate.rate}
            evidence = {"right": rate.right, "samples": rate.decided, "undecided": rate.undecided}
            if drop_unsolved and rate.right == 0:
                dropped.append(Dropped(problem, "never solved", evidence))
            elif drop_solved and rate.right == rate.decided:
                dropped.append(Dropped(problem, "always solved", evidence))
        return Findings(dropped, facts, {"without a pass rate": len(problems) - len(facts)})

    return Step("difficulty", find)


def drop_guessable(draw: Draw) -> Step:
    """Problems that are right in any guess without thought; `draw` is mostly `rl.difficulty.draw_guesses`."""

    def find(problems: Sequence[Problem], progress: Progress) -> Findings:
        drawn = draw(problems, progress)
        rates, groups = pass_rates(drawn), {group.problem.id: group for group in drawn}
        dropped, untested = [], 0
        for problem in problems:
            rate = rates.get(problem.id)
            if rate is not None and rate.right:
                texts = [rollout.completion.text for rollout in groups[problem.id].rollouts if rollout.right]
                guesses = rate.decided + rate.undecided
                evidence = {"right": rate.right, "guesses": guesses, "a_right_guess": texts[0][:MAX_SHOWN]}
                dropped.append(Dropped(problem, "guessable", evidence))
            elif rate is None or rate.undecided or not rate.decided:
                untested += 1
        return Findings(dropped, counts={"kept with guesses that were not judged": untested})

    return Step("guess", find)


# --- files ------------------------------------------------------------------------------------------------------------


def write_curated(folder: Path, curated: Curated, solutions: Mapping[str, str] | None = None) -> None:
    """Write the four files. `solutions` are worked ones by problem id (`rl.problems.read_solved_problems`), which are
    kept in front of `####`.

    FileExistsError for a folder that holds a finished report; ValueError for an answer that would not be read back.
    """
    if (folder / REPORT).exists():
        raise FileExistsError(f"{folder} holds a finished curation; choose another folder or remove it")
    solutions = solutions or {}
    kept = (problem_row(p, solutions.get(p.id, "")) | dict(curated.facts.get(p.id, {})) for p in curated.kept)
    write_file(folder / "problems.jsonl", dump_lines(kept), "curate.write")
    gone = (
        problem_row(d.problem, solutions.get(d.problem.id, ""))
        | dict(curated.facts.get(d.problem.id, {}))
        | {"reason": d.reason, "evidence": dict(d.evidence)}
        for d in curated.dropped
    )
    write_file(folder / "dropped.jsonl", dump_lines(gone), "curate.write")
    write_file(folder / "report.md", report(curated), "curate.write")
    write_json(folder / REPORT, curated.summary(), "curate.write")


def histogram(rates: Sequence[float]) -> dict[str, int]:
    """How many pass rates are 0, in each tenth between, and 1; all bins, so that two reports can be compared.

    `histogram([0, .1, .35, 1])` has one each in "0", "to 0.1", "to 0.4" and "1".
    """
    names = ["0", *(f"to {tenth / 10}" for tenth in range(1, 10)), "below 1", "1"]
    counts = dict.fromkeys(names, 0)
    for rate in rates:
        # Rounded first: 0.7 * 10 is a little more than 7.
        counts[names[-1] if rate == 1 else names[math.ceil(round(rate * 10, 9))]] += 1
    return counts


def report(curated: Curated) -> str:
    """The report for people, in Markdown. Texts of problems stand in indented blocks, where nothing is markup."""
    summary = curated.summary()
    lines = [
        "# Curated problems",
        "",
        f"{summary['kept']:,} of {summary['read']:,} problems are kept.",
        "",
        "| step | problems read | dropped | left |",
        "|---|---:|---:|---:|",
        *(f"| {s.name} | {s.read:,} | {s.dropped:,} | {s.read - s.dropped:,} |" for s in curated.steps),
        "",
        *(f"* {s.name}: {count:,} {what}" for s in curated.steps for what, count in s.counts.items()),
    ]
    if any(summary["pass_rates"].values()):
        lines += ["", "## Pass rates", "", *_indented(_bars(summary["pass_rates"]))]
    guessable = next((dropped for dropped in curated.dropped if dropped.reason == "guessable"), None)
    if guessable is not None:
        guesses = guessable.evidence["guesses"]
        rare, often = share_kept(0.1, guesses), share_kept(0.25, guesses)
        lines += [
            "",
            f"With {guesses} guesses a problem that is guessed with chance .1 stays in {rare:.0%} of cases, one that "
            f"is guessed with chance .25 in {often:.0%}.",
        ]
    for reason, count in curated.reasons.items():
        lines += ["", f"## Dropped: {reason} ({count:,})"]
        for dropped in [dropped for dropped in curated.dropped if dropped.reason == reason][:EXAMPLES]:
            lines += ["", *_indented(_example(dropped))]
    return "\n".join(lines) + "\n"


def _example(dropped: Dropped) -> list[str]:
    shown = {"id": dropped.problem.id, "question": dropped.problem.text, "answer": dropped.problem.answer}
    return [f"{name}: {_short(value)}" for name, value in {**shown, **dropped.evidence}.items()]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + " ..."


def _bars(counts: Mapping[str, int]) -> list[str]:
    most = max(counts.values())
    return [f"{name:>8}  {count:>7,}  {'#' * round(40 * count / most)}" for name, count in counts.items()]


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
