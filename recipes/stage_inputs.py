"""What the stage functions of a recipe share: the problems, task, settings, files and pools that a stage reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.keys import SamplingKeys, Split
from recipes.methods import Sample
from recipes.problem_keys import source_kind
from recipes.runner import StageContext
from recipes.schema import Recipe
from recipes.tasks import load_problems, open_task
from recipes.trace_keys import ImportTraces
from rl.problems import BadProblems
from rl.runs import model_hash
from rl.tasks.base import Task
from rl.types import Problem, RolloutGroup

if TYPE_CHECKING:
    from rl.samplers.base import SamplingSettings

PROBLEMS = "problems.jsonl"  # what a stage that makes problems writes


def task_of(recipe: Recipe) -> Task:
    """How the recipe's answers are judged."""
    return open_task(recipe.problems)


def problems_of(context: StageContext, split: Split, count: int | None = None) -> list[Problem]:
    """At most `count` problems of a split, in the order of the source; an empty split is an error, not an empty run."""
    section = context.recipe.problems
    wanted = getattr(section, split)
    path = context.recipe.problems_file
    if source_kind(section.source) == "stage":
        path = context.inputs[section.source] / PROBLEMS
    elif source_kind(section.source) == "file" and path is None:
        raise BadProblems(section.source, [(0, not_set(section.source))])
    return load_problems(section, split, wanted if count is None else min(wanted, count), path)


def not_set(ref: str, where_from: str = "") -> str:
    """What to do about `$NAME/file` where NAME is not set."""
    name = ref.removeprefix("$").partition("/")[0]
    return f"{name} is not set: `export {name}=FOLDER`, the folder with this file. {where_from}".rstrip()


def settings_of(stage: SamplingKeys) -> SamplingSettings:
    """The sampling settings of a stage; the recipe's defaults were filled in when it was checked."""
    from rl.samplers.base import SamplingSettings

    assert stage.temperature is not None and stage.top_p is not None and stage.max_tokens is not None
    return SamplingSettings(stage.temperature, stage.top_p, stage.max_tokens)


def model_fingerprint(name: str) -> str:
    """The content of a model folder, or the name of a hub id: what a pool's samples are samples of."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    return model_hash(folder)


def files_of(context: StageContext, where_from: str = "") -> list[Path]:
    """The files that the running stage reads; BadProblems for one in a folder whose environment variable is not set."""
    references = [read for read in context.recipe.stages[context.name].references() if read.wants == "file"]
    for read in references:
        if read.path is None:
            raise BadProblems(read.ref, [(0, not_set(read.ref, where_from))])
    return [read.path for read in references if read.path is not None]


def pool_groups(context: StageContext, pool_stage: str, samples: int | None = None) -> list[RolloutGroup]:
    """The judged groups of a `sample` stage, with the problems that stage was given; of an `import_traces` stage those
    of the problems that have samples, as many as they have."""
    from rl.pool import Pool

    filled = context.recipe.stages[pool_stage].config
    if isinstance(filled, ImportTraces):
        from distill.imported import pool_groups_as_they_are

        imported = Pool.open(context.inputs[pool_stage] / "pool")
        return pool_groups_as_they_are(
            imported, problems_of(context, "train"), task_of(context.recipe).verifier_version
        )
    assert isinstance(filled, Sample)
    problems = problems_of(context, filled.problems, filled.count)
    pool = Pool.open(context.inputs[pool_stage] / "pool")
    return pool.groups(problems, task_of(context.recipe).verifier_version, samples)


def thinks_by_template(context: StageContext, pool_stage: str) -> tuple[bool, frozenset[str]]:
    """Whether the pool's template opens `<think>`, and the special tokens no text may contain."""
    from rl.policy import load_tokenizer
    from rl.prompts import prefills_think

    filled = context.recipe.stages[pool_stage].config
    assert isinstance(filled, Sample | ImportTraces)
    tokenizer = load_tokenizer(context.model(filled.model))
    return prefills_think(tokenizer), frozenset(tokenizer.all_special_tokens)


def loss_report(context: StageContext):
    def report(step: int, steps: int, metrics: Mapping[str, float]) -> None:
        context.progress(step, steps, f"loss {metrics['loss']:.3f}" if "loss" in metrics else "")

    return report
