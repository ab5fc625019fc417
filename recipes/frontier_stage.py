"""The frontier stage: the arms' pools become the table, the pictures and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes.methods import Frontier
from recipes.runner import StageContext
from recipes.stage_inputs import problems_of, task_of
from rl.runs import read_json, read_lines

if TYPE_CHECKING:
    from long2short.report import StageTime, TrainingCurve


def frontier(context: StageContext) -> None:
    from long2short.frontier import Arm
    from long2short.frontier import frontier as compare_arms
    from long2short.report import write_report
    from rl.evaluate import EvalSummary
    from rl.pool import Pool

    stage: Frontier = context.stage
    task, problems = task_of(context.recipe), problems_of(context, stage.problems, stage.count)
    arms = []
    for position, (name, ref) in enumerate(stage.arms.items()):
        context.progress(position, len(stage.arms), name)
        folder = context.inputs[f"{context.name}.{name}"]
        groups = Pool.open(folder / "pool").groups(problems, task.verifier_version, stage.samples)
        summary = EvalSummary.from_json(read_json(folder / "summary.json"))
        arms.append(Arm(name, tuple(groups), summary, _family(context, ref)))
    write_report(
        context.folder,
        compare_arms(arms, stage.parent, stage.compare),
        arms,
        title=f"{context.recipe.name}: accuracy and tokens",
        curves=_curves(context),
        times=_times(context),
        facts=_facts(context, stage, len(problems)),
    )


def _family(context: StageContext, ref: str) -> str:
    """The method that made an arm; it sets the colour. A model from outside the recipe is a start."""
    made_by = context.recipe.stages.get(ref)
    return made_by.method if made_by is not None else "start"


def _curves(context: StageContext) -> list[TrainingCurve]:
    from long2short.report import TrainingCurve

    return [
        TrainingCurve(name, tuple(read_lines(folder / "metrics.jsonl")))
        for name, folder in context.inputs.items()
        if (folder / "metrics.jsonl").is_file()
    ]


def _times(context: StageContext) -> list[StageTime]:
    from long2short.report import StageTime

    manifests = {name: read_json(folder / "manifest.json") for name, folder in context.inputs.items()}
    return [StageTime(name, manifest["method"], manifest["seconds"]) for name, manifest in manifests.items()]


def _facts(context: StageContext, stage: Frontier, num_problems: int) -> list[tuple[str, str]]:
    return [
        ("recipe", context.recipe.name),
        ("seed", str(context.recipe.seed)),
        ("problems", f"{num_problems} of the {stage.problems} split, {context.recipe.problems.source}"),
        ("samples", f"{stage.samples} a problem"),
        ("sampling", f"temperature {stage.temperature}, top-p {stage.top_p}, at most {stage.max_tokens} tokens"),
    ]
