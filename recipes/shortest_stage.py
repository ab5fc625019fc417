"""The `shortest` stage: a pool's right completions, perhaps cut, without lucky guesses, the shortest of each problem.

The names of its keys become functions here; what they do is in `long2short.first_solution`, `long2short.lucky_guesses`
and `long2short.shortest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from recipes.long2short_keys import Shortest
from recipes.methods import Sample
from recipes.runner import StageContext
from recipes.stage_inputs import pool_groups, task_of, thinks_by_template
from recipes.tasks import TASKS
from rl.runs import write_json
from rl.types import RolloutGroup

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from long2short.lucky_guesses import Guard

REFLECTIONS = {"first": 0, "reflection": 1}  # the key `cut` -> right solutions kept behind the first one


def shortest(context: StageContext) -> None:
    from distill.traces import write_traces
    from long2short.first_solution import cut_groups
    from long2short.shortest import select_shortest
    from rl.policy import load_tokenizer

    stage: Shortest = context.stage
    sampled = context.recipe.stages[stage.pool].config
    assert isinstance(sampled, Sample)
    tokenizer = load_tokenizer(context.model(sampled.model))
    prefilled, forbidden = thinks_by_template(context, stage.pool)
    groups = pool_groups(context, stage.pool, stage.samples)
    about_cuts: dict[str, Any] = {}
    if stage.cut is not None:
        made = cut_groups(
            groups,
            task_of(context.recipe),
            partial(_encode, tokenizer),
            reflections=REFLECTIONS[stage.cut],
            prefilled=prefilled,
            forbidden=forbidden,
        )
        groups, about_cuts = list(made.groups), {"cut": made.summary()}
    selection = select_shortest(
        groups,
        teacher=stage.pool,
        samples=stage.samples,
        per_problem=stage.per_problem,
        guards=_guards(context, groups, tokenizer),
        min_tokens=stage.min_tokens,
        prefilled=prefilled,
        forbidden=forbidden,
    )
    write_traces(context.folder / "traces.jsonl", selection.traces)
    write_json(context.folder / "summary.json", selection.summary() | about_cuts, "traces.summary")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int] | None:
    """A completion's token ids with EOS; None where the tokenizer has no token for a part of it."""
    from rl.policy import eos_token_id

    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return None if tokenizer.unk_token_id in ids else [*ids, eos_token_id(tokenizer)]


def _guards(context: StageContext, groups: Sequence[RolloutGroup], tokenizer: Any) -> list[Guard]:
    """The guards against lucky guesses that the stage asks for."""
    from long2short import lucky_guesses

    stage: Shortest = context.stage
    guards: list[Guard] = []
    if stage.min_right > 1:
        guards.append(lucky_guesses.too_few_right(stage.min_right))
    if stage.majority:
        guards.append(lucky_guesses.outvoted(task_of(context.recipe).answer_of))
    if stage.min_think_tokens:
        guards.append(lucky_guesses.hardly_thought(stage.min_think_tokens, tokenizer))
    if stage.verify_with is not None:
        guards.append(lucky_guesses.not_confirmed(groups, TASKS[stage.verify_with](context.recipe.problems)))
    return guards
