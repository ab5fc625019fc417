"""The merging stages: typed keys become a rule, weights and parents. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from recipes.engines import open_engine
from recipes.merge_keys import Merge, MergeSearch
from recipes.runner import StageContext
from recipes.stage_inputs import problems_of, settings_of, task_of
from rl.runs import write_json
from rl.types import Problem, RolloutGroup

if TYPE_CHECKING:
    from pathlib import Path

    from long2short.merge import Parents
    from long2short.merge_rules import Rule
    from long2short.merge_weights import Weights


def merge(context: StageContext) -> None:
    from long2short.merge import merge as run

    stage: Merge = context.stage
    given = stage.weights if stage.weights is not None else stage.weight
    assert given is not None  # checked with the keys
    summary = run(
        context.folder / "model",
        _parents(context),
        _weights(given),
        _rule(stage, stage.scale, stage.density, context.seed),
        report=lambda done, total: context.progress(done, total, "tensors"),
    )
    facts = _facts(stage, stage.scale, stage.density)
    write_json(context.folder / "summary.json", facts | summary, "merge.summary")


def merge_search(context: StageContext) -> None:
    from long2short.merge import merge as run
    from long2short.merge_search import Halving, search_merges
    from rl.policy import load_tokenizer
    from rl.rollout import sample_groups

    stage: MergeSearch = context.stage
    task, settings, suffix = task_of(context.recipe), settings_of(stage), context.recipe.problems.prompt_suffix

    def draw(model: str, problems: Sequence[Problem]) -> list[RolloutGroup]:
        tokenizer = load_tokenizer(model)
        with open_engine(context.recipe.sampling.choice, model, tokenizer) as sampler:
            return sample_groups(sampler, tokenizer, problems, task, stage.samples, settings, context.seed, suffix)

    def make(weights: Weights, scale: float, density: float | None, folder: Path) -> Mapping[str, Any]:
        summary = run(folder, parents, weights, _rule(stage, scale, density, context.seed))
        return _facts(stage, scale, density) | summary

    parents = _parents(context)
    densities = (None,) if stage.densities is None else stage.densities
    search_merges(
        {
            _name(stage, weights, scale, density): partial(make, weights, scale, density)
            for weights, scale, density in product(map(_weights, stage.grid), stage.scales, densities)
        },
        context.model(stage.long),
        problems_of(context, "dev", stage.count),
        context.folder,
        draw=draw,
        halving=Halving(stage.first, stage.factor, stage.keep),
        tolerance=stage.tolerance,
        progress=context.progress,
    )


def _parents(context: StageContext) -> Parents:
    from long2short.merge import Parents

    stage: Merge | MergeSearch = context.stage
    base = None if stage.base is None else context.model(stage.base)
    return Parents(context.model(stage.long), context.model(stage.short), base, stage.like == "short")


def _weights(given: float | Mapping[str, float]) -> Weights:
    from long2short.merge_weights import Weights

    if isinstance(given, Mapping):
        return Weights(given["default"], {key: weight for key, weight in given.items() if key != "default"})
    return Weights(given)


def _name(stage: MergeSearch, weights: Weights, scale: float, density: float | None) -> str:
    """A candidate's name: what differs among the candidates, such as "0.5 scale 0.8"."""
    parts = [str(weights)]
    if len(stage.scales) > 1:
        parts.append(f"scale {scale:.15g}")
    if density is not None and stage.densities is not None and len(stage.densities) > 1:
        parts.append(f"density {density:.15g}")
    return " ".join(parts)


def _facts(stage: Merge | MergeSearch, scale: float, density: float | None) -> dict[str, Any]:
    """What summary.json says of the rule; its numbers where it reads them."""
    facts: dict[str, Any] = {"rule": stage.rule, "like": stage.like}
    if stage.base is not None:
        facts["scale"] = scale
    return facts if density is None else facts | {"density": density}


def _rule(stage: Merge | MergeSearch, scale: float, density: float | None, seed: int) -> Rule:
    """The rule that the stage names, with its numbers."""
    from long2short.merge_rules import Rule, dare, linear, slerp, task_arithmetic, ties

    kept = 1.0 if density is None else density
    return {
        "linear": lambda: Rule(linear),
        "slerp": lambda: Rule(slerp),
        "task_arithmetic": lambda: task_arithmetic(scale),
        "ties": lambda: ties(kept, scale, stage.normalize),
        "dare": lambda: dare(kept, scale, seed=seed),
    }[stage.rule]()
