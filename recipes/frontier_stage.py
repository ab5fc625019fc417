"""The frontier stage: the arms' pools become the table (JSON, Markdown, CSV), the pictures and the page."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.methods import Frontier
from recipes.runner import StageContext
from recipes.schema import Recipe, stage_named
from recipes.stage_inputs import problems_of, task_of
from rl.runs import read_json, read_lines

if TYPE_CHECKING:
    from long2short.report import StageTime, TrainingCurve


def frontier(context: StageContext) -> None:
    from long2short.frontier import Arm
    from long2short.frontier import frontier as compare_arms
    from long2short.frontier_efficiency import efficiency_of
    from long2short.report import write_report
    from rl.evaluate import summarize
    from rl.policy import load_tokenizer
    from rl.pool import Pool

    stage: Frontier = context.stage
    task, problems = task_of(context.recipe), problems_of(context, stage.problems, stage.count)
    arms = []
    for position, (name, ref) in enumerate(stage.arms.items()):
        context.progress(position, len(stage.arms), name)
        folder = context.inputs[f"{context.name}.{name}"]
        groups = Pool.open(folder / "pool").groups(problems, task.verifier_version, stage.samples)
        tokenizer = load_tokenizer(context.model(ref))
        # Counted anew, not read from summary.json: the samples may be of an earlier version, which counted less.
        summary, spent = summarize(groups, task, tokenizer), efficiency_of(groups, task, tokenizer)
        arms.append(Arm(name, tuple(groups), summary, _family(context, ref), spent))
    found = compare_arms(arms, stage.parent, stage.compare, stage.budgets)
    write_report(
        context.folder,
        found,
        arms,
        title=f"{context.recipe.name}: accuracy and tokens",
        curves=_curves(context, stage),
        times=_times(context),
        facts=_facts(context, stage, len(problems)),
        provenance=_provenance(context, stage),
    )


def _family(context: StageContext, ref: str) -> str:
    """The method that made an arm; it sets the colour. A model from outside the recipe is a start."""
    made_by = context.recipe.stages.get(stage_named(ref))
    return made_by.method if made_by is not None else "start"


def _curves(context: StageContext, stage: Frontier) -> list[TrainingCurve]:
    from long2short.report import TrainingCurve

    def arms_of(name: str) -> tuple[str, ...]:
        return tuple(arm for arm, ref in stage.arms.items() if stage_named(ref) == name)

    return [
        TrainingCurve(name, tuple(read_lines(folder / "metrics.jsonl")), arms_of(name))
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


def recipe_hash(recipe: Recipe) -> str:
    """sha256 of the resolved recipe as JSON, 64 hex digits: the same for two files that mean the same run."""
    means = {key: value for key, value in recipe.to_json().items() if key not in ("name", "description")}
    return sha256(json.dumps(means, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()


def _provenance(context: StageContext, stage: Frontier) -> dict[str, list[tuple[str, str]]]:
    """Where each arm comes from, by the manifests of the stage that made it and of the one that sampled it."""
    from rl.pool import Pool

    verifier, recipe = task_of(context.recipe).verifier_version, recipe_hash(context.recipe)
    found = {}
    for name, ref in stage.arms.items():
        lines = [("recipe", context.recipe.name), ("sha256 of the recipe", recipe), ("seed", str(context.recipe.seed))]
        lines.append(("model of the arm", ref))
        if (maker := stage_named(ref)) in context.inputs:
            folder = context.inputs[maker]
            made = read_json(folder / "manifest.json")
            lines += [("stage", f"{made['stage']}-{made['hash']}"), ("method", made["method"])]
            lines += [(f"from {key}", value) for key, value in made["inputs"].items()]
            config = made["config"]["config"]
            lines += [(key, json.dumps(value)) for key, value in config.items() if key != "method"]
            # Of this model alone: a stage may have left others beside it, in models/20.
            model = Path(context.model(ref)).relative_to(folder).as_posix() + "/"
            weights = {file: sha for file, sha in made["files"].items() if file.startswith(model)}
            lines += [(f"sha256 of {file}", sha) for file, sha in weights.items() if file.endswith(".safetensors")]
        sampled = context.inputs[f"{context.name}.{name}"]
        judged = read_json(sampled / "manifest.json")
        lines.append(("samples", f"{judged['stage']}-{judged['hash']}"))
        lines += [(f"samples from {key}", value) for key, value in judged["inputs"].items()]
        lines += [("fingerprint of the problems", Pool.open(sampled / "pool").address.problems), ("verifier", verifier)]
        lines += [(package, version or "-") for package, version in judged["versions"].items()]
        found[name] = lines
    return found
