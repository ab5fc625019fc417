"""From the keys of `filters:` to the functions of distill/filters.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.filter_keys import TraceFilters
from recipes.runner import StageContext
from recipes.stage_inputs import not_set, task_of
from rl.language import NATURAL, Languages
from rl.problems import BadProblems
from rl.types import Problem

if TYPE_CHECKING:
    from distill.filters import TextFilter


def filters_of(
    keys: TraceFilters | None,
    *,
    languages: Languages = NATURAL,
    prefilled: bool = True,
    problems: Sequence[Problem] = (),
    evaluations: Sequence[Path] = (),
) -> tuple[TextFilter, ...]:
    """The filters that the keys name, in the order in which their reasons count.

    `languages` are the task's, `prefilled` says whether the template opens `<think>`, `problems` are those of the
    traces (near-duplicates), `evaluations` the files that `decontaminate` names.
    """
    from distill import filters
    from rl.decontamination import EvaluationIndex, read_items

    if keys is None:
        return ()
    found: list[TextFilter] = []
    if keys.format:
        found.append(filters.malformed_think(prefilled))
    if keys.truncated:
        found.append(filters.truncated)
    if keys.language is not None:
        target = None if keys.language.target == "question" else keys.language.target
        found.append(filters.mixed_language(keys.language.least, target, languages))
    if keys.paragraph is not None:
        found.append(filters.long_paragraphs(keys.paragraph))
    if keys.code_blocks:
        found.append(filters.code_blocks)
    if keys.repetition is not None:
        found.append(filters.repetition(keys.repetition.ngram, keys.repetition.most))
    if evaluations:
        found.append(filters.leaked(EvaluationIndex([item for path in evaluations for item in read_items(path)])))
    if keys.near_duplicates:
        found.append(filters.near_duplicate(problems))
    return tuple(found)


def stage_filters(
    context: StageContext, keys: TraceFilters | None, problems: Sequence[Problem], prefilled: bool
) -> tuple[TextFilter, ...]:
    """The filters of a running stage: with the languages of the recipe's task and the files that the keys name.

    Errors: BadProblems for a file in a folder whose environment variable is not set.
    """
    evaluations = []
    for read in context.recipe.stages[context.name].references():
        if read.key.startswith("filters.decontaminate"):
            if read.path is None:
                raise BadProblems(read.ref, [(0, not_set(read.ref))])
            evaluations.append(read.path)
    return filters_of(
        keys,
        languages=task_of(context.recipe).languages,
        prefilled=prefilled,
        problems=problems,
        evaluations=evaluations,
    )
