"""`reason plan`: memory per GPU and hours of every stage of a recipe, before anything starts.

    reason plan tiny --gpu cpu
    reason plan r1-distill-qwen-7b --gpu H100-80GB --gpus 8 --rows 804745 --tokens 5355

Exit code 0 where every stage fits, 3 where one does not; then it says which keys to change, with values that it has
computed to fit. `cli.py` registers `plan_command`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recipes.options import JsonOption, RecipeArgument, SeedOption, SetOption

if TYPE_CHECKING:
    from distill.plan import Plan

EXIT_DOES_NOT_FIT = 3
GB = 1e9


def plan_command(
    recipe: RecipeArgument,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="Such as H100-80GB, or cpu  [the one present]")
    ] = None,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many of them, one process each.")] = 1,
    tokens: Annotated[
        float | None, typer.Option("--tokens", min=1, help="Mean tokens of a completion or row  [the longest]")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="Rows to train on  [the most that the recipe can make]")
    ] = None,
    utilization: Annotated[
        float, typer.Option("--mfu", min=0.01, max=1.0, help="Share of the peak speed that training reaches.")
    ] = 0.3,
    overrides: SetOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Memory per GPU and hours of a recipe's stages, from configs alone; what to change where one does not fit."""
    from recipes.schema import load_recipe

    loaded = load_recipe(recipe, overrides or (), seed)

    from distill.plan import plan
    from distill.plan_gpus import find_device
    from recipes.console import show
    from recipes.plan_stages import Given, NotPlanned, work_of

    device = find_device(gpu)
    found: list[dict[str, Any]] = []
    for stage in loaded.stages.values():
        head = {"stage": stage.name, "method": stage.method}
        try:
            work = work_of(loaded, stage, device, Given(gpus, tokens, rows))
        except NotPlanned as reason:
            found.append(head | {"not_planned": str(reason)})
            continue
        if work is not None:
            found.append(head | plan_values(plan(work, device, utilization)))
    fits = all(row.get("fits", True) for row in found)
    value = {
        "recipe": loaded.name,
        "device": {"name": device.name, "memory": device.memory, "usable": device.limit},
        "gpus": gpus,
        "mfu": utilization,
        "fits": fits,
        "stages": found,
    }
    show(value, plan_text(value), as_json)
    if not fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def plan_values(made: Plan) -> dict[str, Any]:
    """A plan as JSON values; memory in bytes, times in hours."""
    return {
        "fits": made.fits,
        "bytes": made.memory.total,
        "parts": asdict(made.memory),
        "token_budget": made.token_budget,
        "rollout_hours": made.rollout_hours,
        "training_hours": made.training_hours,
        "change": {change.key: change.value for change in made.changes},
        "bytes_after": made.fits_after,
    }


def plan_text(value: dict[str, Any]) -> str:
    """The table for people, and what to change."""
    from recipes.console import columns

    device = value["device"]
    head = ["stage", "method", "GB", "of it weights", "grads+AdamW", "activations", "logits", "cache+engine", "hours"]
    rows, notes = [], []
    for row in value["stages"]:
        if "not_planned" in row:
            notes.append(f"{row['stage']}: {row['not_planned']}")
            continue
        parts = row["parts"]
        sums = (
            parts["weights"] + parts["copies"], parts["gradients"] + parts["optimizer"], parts["activations"],
            parts["logits"], parts["kv_cache"] + parts["engine"],
        )  # fmt: skip
        hours = [row["rollout_hours"], row["training_hours"]]
        mark = "" if row["fits"] else " !"
        rows.append(
            [row["stage"], row["method"], f"{row['bytes'] / GB:.2f}{mark}", *(f"{part / GB:.2f}" for part in sums),
             "?" if None in hours else _hours(sum(hours))]
        )  # fmt: skip
        if not row["fits"]:
            notes.append(_way_out(row, device["usable"]))
        if None in hours:
            notes.append(f"{row['stage']}: hours need the number of rows: give --rows")
    title = (
        f"{value['recipe']} on {value['gpus']} x {device['name']}, {device['usable'] / GB:.1f} GB usable each; "
        f"training at {value['mfu']:.0%} of the peak speed"
    )
    return "\n".join(
        [title, "", columns(head, rows) if rows else "no stage trains or samples", *(["", *notes] if notes else [])]
    )


def _way_out(row: dict[str, Any], usable: int) -> str:
    short = f"{row['stage']}: does not fit, {row['bytes'] / GB:.1f} GB of {usable / GB:.1f}"
    if not row["change"]:
        return f"{short}; no key that this stage has makes it fit: take a larger GPU or a smaller model"
    keys = ", ".join(f"{key}: {_value(value)}" for key, value in row["change"].items() if key != "--gpus")
    gpus = f", and --gpus {row['change']['--gpus']}" if "--gpus" in row["change"] else ""
    return f"{short}. With {keys}{gpus} it takes {row['bytes_after'] / GB:.1f} GB"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "{" + ", ".join(f"{k}: {v}" for k, v in value.items()) + "}" if isinstance(value, dict) else str(value)


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 0.1 else f"{hours * 60:.1f} min"
