"""`reason preflight`: what would do silent damage in a recipe, before anything runs.

    reason preflight tiny                        tokenizers, configs, rows, limits, splits; no weights are loaded
    reason preflight mine.yaml --weights         also embedding rows, two steps of each sft stage, log-probs at step 0
    reason preflight mine.yaml --fix             writes copies of the models in which the safe fixes are made

Exit code 3 if a defect is found, 0 if none. What could not be looked at is listed, never passed over. `cli.py`
registers `preflight_command`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recipes.options import JsonOption, RecipeArgument, RunsOption, SeedOption, SetOption

if TYPE_CHECKING:
    from distill.preflight_subjects import Defect
    from recipes.preflight_recipe import Gathered

EXIT_DEFECT = 3


def preflight_command(
    recipe: RecipeArgument,
    weights: Annotated[
        bool, typer.Option("--weights", help="Load models as well: embedding rows, two steps, log-probs at step 0.")
    ] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Write copies of the models with the safe fixes made.")] = False,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="With --fix: folder for the copies.")] = Path(
        "preflight-fixed"
    ),
    overrides: SetOption = None,
    seed: SeedOption = None,
    runs: RunsOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Look for silent damage in a recipe: templates, EOS, vocabularies, limits, data. Exit code 3 if there is some."""
    from recipes.console import show
    from recipes.schema import load_recipe

    loaded = load_recipe(recipe, overrides or (), seed)
    from distill.preflight import examine
    from recipes.preflight_recipe import gather

    found = gather(loaded, runs, weights)
    defects = examine(found.subjects)
    fixed = write_fixes(found, defects, set(loaded.stages), out) if fix else []
    value = {
        "recipe": loaded.name,
        "checked": len(found.subjects),
        "defects": [asdict(defect) for defect in defects],
        "not_checked": found.unchecked,
        "fixed": [{"use": options, "done": done} for options, done in fixed],
    }
    show(value, report_text(defects, found, fixed), as_json)
    if defects:
        raise typer.Exit(EXIT_DEFECT)


def write_fixes(
    found: Gathered, defects: Sequence[Defect], stages: Collection[str], out: Path
) -> list[tuple[str, list[str]]]:
    """Write a copy of every model folder that has a defect with a safe fix; (options that use it, what was done)."""
    from distill.preflight_fix import write_fixed

    fixed = []
    for where, opened in found.models.items():
        own = [defect for defect in defects if defect.where.startswith(found.names[where])]
        if own and Path(opened.source).is_dir():
            folder = out / Path(opened.source).name
            done = write_fixed(Path(opened.source), folder, own)
            if done:
                keys = (
                    name.partition(" = ")[0] for name in found.names[where] if name.partition(" = ")[2] not in stages
                )
                settings = (f"--set {key}={folder.absolute()}" for key in keys)
                fixed.append((" ".join(settings), list(done)))
        elif own:
            fixed.append(("", [f"{opened.source} is of the hub: `hf download {opened.source} --local-dir DIR` first"]))
    return fixed


def report_text(defects: Sequence[Defect], found: Gathered, fixed: Sequence[tuple[str, Sequence[str]]]) -> str:
    """The findings for people."""
    lines = [f"{one.check}: {one.where}\n    {one.found}\n    fix: {one.fix}" for one in defects]
    lines += [f"not checked: {note}" for note in found.unchecked]
    lines += [f"fixed: {'; '.join(done)}" + (f"\n    use it with {at}" if at else "") for at, done in fixed]
    count = "no defect" if not defects else f"{len(defects)} defect{'s' if len(defects) > 1 else ''}"
    left = f", {len(found.unchecked)} not checked" if found.unchecked else ""
    return "\n".join([*lines, f"{count}; {len(found.subjects)} checked{left}"])
