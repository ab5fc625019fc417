"""`reason curate` and `reason rescore`: problem sets and pools looked after, without a recipe.

Arguments are checked before torch is imported, so a misspelt path is refused at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.direct import Draw, ProblemSet, sample
from rl.types import Problem, RolloutGroup

if TYPE_CHECKING:
    from rl.curation import Curated, Step
    from rl.rescore import Audit, Rescored
    from rl.tasks.base import Task

Progress = Callable[[str, int, int], None]  # what, done, total

SAMPLES = "samples"  # the pool of a curation, in its folder


@dataclass(frozen=True, slots=True)
class Curation:
    """What `reason curate` was told.

    Example: `Curation(against=(Path("aime24.jsonl"),), model="./base", samples=10, guesses=8)`
    """

    against: tuple[Path, ...] = ()  # evaluation sets
    keep_forms: bool = False
    keep_duplicates: bool = False
    pool: Path | None = None  # judged samples of the problems
    model: str | None = None  # draws samples and guesses
    samples: int = 10
    guesses: int = 8
    drop_unsolved: bool = False
    drop_solved: bool = False


def steps_of(told: Curation, chosen: ProblemSet, out: Path, draw: Draw) -> list[Step]:
    """The filters of a curation, the cheap ones first."""
    from rl import curation
    from rl.decontamination import EvaluationIndex, read_items

    steps = [] if told.keep_forms else [curation.drop_forms()]
    if told.against:
        items = [item for path in told.against for item in read_items(path)]
        steps.append(curation.drop_leaks(EvaluationIndex(items)))
    if not told.keep_duplicates:
        steps.append(curation.drop_duplicates())
    if told.pool is not None:
        pool = told.pool
        steps.append(_difficulty(told, lambda problems, progress: pool_groups(pool, problems, chosen.task)))
    elif told.model is not None:
        model = told.model

        def drawn(problems: Sequence[Problem], progress: Callable[[int, int], None]) -> Sequence[RolloutGroup]:
            return sample(model, ProblemSet(tuple(problems), chosen.task), out / SAMPLES, draw, progress)

        steps.append(_difficulty(told, drawn))
        steps.append(curation.drop_guessable(_guesses(model, told.guesses, chosen.task, draw)))
    return steps


def _difficulty(told: Curation, draw: Any) -> Step:
    from rl.curation import rate_difficulty

    return rate_difficulty(draw, told.drop_unsolved, told.drop_solved)


def pool_groups(folder: Path, problems: Sequence[Problem], task: Task) -> list[RolloutGroup]:
    """The judged groups of a pool, of those problems that it holds."""
    from rl.pool import Pool

    pool = Pool.open(folder)
    held = {problem for problem, _, _ in pool.samples()}
    return pool.groups([problem for problem in problems if problem.id in held], task.verifier_version)


def _guesses(model: str, guesses: int, task: Task, draw: Draw) -> Any:
    """Draws guesses without thought."""

    def drawn(problems: Sequence[Problem], progress: Callable[[int, int], None]) -> Sequence[RolloutGroup]:
        from recipes.engines import open_engine
        from rl.difficulty import draw_guesses
        from rl.policy import load_tokenizer

        tokenizer = load_tokenizer(model)
        total = len(problems) * guesses
        with open_engine(draw.engine, model, tokenizer) as sampler:
            return draw_guesses(
                sampler, tokenizer, problems, task, draw.seed, guesses, report=lambda done: progress(done, total)
            )

    return drawn


def curate(told: Curation, chosen: ProblemSet, out: Path, draw: Draw, progress: Progress) -> Curated:
    """Run the filters over the problems and write what is kept, what is dropped and why into `out`."""
    from rl import curation

    if (out / curation.REPORT).exists():
        raise ValueError(f"{out} holds a finished curation; choose another folder or remove it")
    found = curation.curate(chosen.problems, *steps_of(told, chosen, out, draw), progress=progress)
    curation.write_curated(out, found)
    return found


def rescore(folder: Path, chosen: ProblemSet, before: str | None) -> Rescored:
    """Judge a pool again and write the changed verdicts beside it."""
    from rl import rescore
    from rl.pool import Pool

    found = rescore.rescore(Pool.open(folder), chosen.problems, chosen.task, before)
    rescore.write_changes(changes_file(folder, found), found)
    return found


def changes_file(folder: Path, found: Rescored) -> Path:
    return folder / f"changed-{found.before}-{found.after}.jsonl"


def audit(folder: Path, chosen: ProblemSet, second: Task) -> Audit:
    """Hold a verifier against a second one on the samples of a pool; the disagreements lie beside it."""
    from rl import rescore
    from rl.pool import Pool

    path = audit_file(folder, chosen.task, second)
    return rescore.audit(Pool.open(folder), chosen.problems, chosen.task, second, path)


def audit_file(folder: Path, task: Task, second: Task) -> Path:
    return folder / f"audit-{task.verifier_version}-{second.verifier_version}.jsonl"


def second_task(name: str) -> Task:
    """The verifier that a first one is held against: another task, or math-verify by itself."""
    from recipes.tasks import math_judge, open_task, section_for

    if name == "math-verify":
        from rl.tasks.mathematics import math_verify_task

        return math_verify_task(math_judge())
    return open_task(section_for("./second.jsonl", name))


def rescored_text(found: Rescored, folder: Path, show: int) -> str:
    """What changed, for people."""
    lines = [
        f"{found.samples} samples, none drawn: {found.before} calls {found.right_before} right, {found.after} "
        f"{found.right_after}",
        *[f"  {before} -> {after}: {count}" for (before, after), count in found.counts.items()],
    ]
    for one in found.changed[:show]:
        tail = " ".join(one.completion.text[-120:].split())
        lines.append(f"  {one.problem.id}[{one.sample}] {one.before.outcome} -> {one.after.outcome}: ...{tail}")
    if found.changed:
        lines.append(f"all {len(found.changed)}: {changes_file(folder, found)}")
    return "\n".join(lines)


def audit_text(found: Audit, path: Path) -> str:
    """How far two verifiers agree, for people."""
    low, high = found.bounds
    known = "nobody has looked yet" if found.estimate is None else f"estimate {found.estimate:.2%}"
    return "\n".join(
        [
            f"{found.first} and {found.second} agree on {found.agreement:.1%} of {found.samples} samples",
            *[f"  {one} / {other}: {count}" for (one, other), count in sorted(found.table.items())],
            f"false negatives of {found.first}: {low:.2%} to {high:.2%} ({known})",
            f"disagreements: {path} (write right or wrong into `label` and run this again)",
        ]
    )
