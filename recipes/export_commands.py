"""`reason export`: a finished model of a recipe as a folder of its own, its card with what the frontier measured.

    reason export tiny brief ./tiny-brief
    reason export mine brief ./brief-7b --push-to-hub me/brief-7b --private

Only the folder is pushed, by huggingface_hub, with the token of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from recipes.methods import Frontier
    from recipes.model_card import Measured
    from recipes.schema import Recipe
    from rl.runs import StageFolder


def export_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or path of a YAML file.")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="A finished stage that makes a model.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the model; it must not exist yet.")],
    push: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="ORG/NAME", help="Then push the folder to this repository.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="The overrides that the run had.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The root seed that the run had.")] = None,
    runs: Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of all runs.")] = Path("runs"),
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout, everything else on stderr.")
    ] = False,
) -> None:
    """Copy a finished model out of a run, with its card; --push-to-hub pushes it."""
    from recipes.console import show
    from recipes.schema import load_recipe

    if push is None and private:
        raise typer.BadParameter("--private goes with --push-to-hub; remove it")
    if push is not None:
        check_repository(push)
    measured = export(load_recipe(recipe, overrides or (), seed), stage, out, runs)
    url = None if push is None else push_to_hub(out, push, private)
    said = f"measured by {', '.join(one.stage for one in measured)}" if measured else "not measured by any frontier yet"
    text = f"{stage} is in {out}, {said}" + ("" if url is None else f"\npushed to {url}")
    show({"model": str(out), "measured": [one.stage for one in measured], "url": url}, text, as_json)


def export(recipe: Recipe, stage: str, out: Path, root: Path) -> list[Measured]:
    """Copy the model that `stage` has made under `root` to `out` and write its card; the frontiers it stands in.

    Errors: ValueError for a stage that makes no model or is not finished, and for an `out` that exists.
    """
    from recipes.model_card import model_card
    from recipes.runner import plan_stages
    from rl.runs import CARD, write_file

    found = recipe.stage(stage)  # refuses an unknown one
    if found.makes != "model":
        raise ValueError(f"stage {stage} is of method {found.method}, which makes no model")
    if out.exists():
        raise ValueError(f"{out} exists; name a folder that does not")
    plan = {planned.stage.name: planned for planned in plan_stages(recipe, root=root)}
    planned = plan[stage]
    if not planned.folder.finished:
        raise ValueError(
            f"stage {stage} is not finished in {root}: `reason run {recipe.name} {stage}` (same --set, --seed)"
        )
    measured = [
        one
        for other in plan.values()
        if other.stage.method == "frontier" and other.folder.finished
        for one in measured_by(other.folder, stage, other.stage.config)
    ]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(planned.folder.final / "model", partial)
    write_file(partial / CARD, model_card(recipe, found, planned.inputs, measured), "stage.card")
    partial.rename(out)
    return measured


def measured_by(frontier: StageFolder, stage: str, keys: Frontier) -> list[Measured]:
    """The lines of a finished frontier for the arms that are this stage's model, each beside the parent's."""
    from long2short.frontier import Frontier as Found
    from long2short.frontier import few_problems, table_columns
    from recipes.model_card import Measured
    from rl.runs import read_json
    from rl.stats import FEW_PROBLEMS

    found = Found.from_json(read_json(frontier.final / "frontier.json"))
    parent = found.row(found.parent)
    problems = parent.summary.num_problems
    how = (
        f"{problems} problems of the {keys.problems} split x {keys.samples} samples, temperature {keys.temperature}, "
        f"top-p {keys.top_p}, at most {keys.max_tokens:,} tokens. Intervals are 95 % ones over problems; "
        "differences are paired with the parent on the same ones."
    )
    notes = [few_problems(problems)] if problems < FEW_PROBLEMS else []
    measured = []
    for arm in (arm for arm, ref in keys.arms.items() if ref == stage):
        row = found.row(arm)
        own = [f"{row.summary.undecided} completions could not be judged."] if row.summary.undecided else []
        if row.dominated_by:
            sure = "" if row.beyond_noise else ", within noise"
            own.append(f"Another model of this comparison is at least as accurate and as brief{sure}.")
        if row.collapsed:
            own.append("It is less than half as right as its parent: it has collapsed.")
        rows = [
            (f"{column.head} {column.unit}".replace("- ", "").strip(), column.cell(row), column.cell(parent))
            for column in table_columns(found)[1:]
        ]
        measured.append(Measured(frontier.stage, arm, found.parent, rows, how, (*own, *notes)))
    return measured


def check_repository(name: str) -> None:
    """ValueError for what cannot be the name of a repository, before anything is copied."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"--push-to-hub {name}: {error}") from error


def push_to_hub(folder: Path, name: str, private: bool) -> str:
    """Push a model folder to the hub repository `name` (made if it is not there); its address.

    Errors: RuntimeError that says what to do, where the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"Upload {folder.name} with its card")
    except (OSError, _http_error()) as error:  # no token, no right, no network
        raise RuntimeError(
            f"{name} was not pushed: {error}. The model is in {folder}; after `hf auth login`: "
            f"hf upload {name} {folder}"
        ) from error
    return str(address)


def _http_error() -> type[Exception]:
    """What the HTTP library raises that this version of the hub's client uses; the hub's own errors are of its kind."""
    from huggingface_hub.utils import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]
