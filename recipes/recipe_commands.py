"""`reason recipes`: list, show and check recipes; their JSON schema."""

from __future__ import annotations

import typer

from recipes.options import JsonOption, RecipeArgument, SeedOption, SetOption

recipes_app = typer.Typer(help="List, show and check recipes; print their JSON schema.")


@recipes_app.callback(invoke_without_command=True)
def _recipes(ctx: typer.Context, as_json: JsonOption = False) -> None:
    if ctx.invoked_subcommand is None:
        list_recipes(as_json)


@recipes_app.command("list")
def list_recipes(as_json: JsonOption = False) -> None:
    """The recipes that come with `reason`."""
    from recipes.console import columns, show
    from recipes.schema import load_recipe, shipped_recipes

    found = [load_recipe(path) for path in shipped_recipes().values()]
    value = [
        {"name": path.stem, "description": recipe.description, "path": str(recipe.path), "stages": recipe.stage_names()}
        for path, recipe in zip(shipped_recipes().values(), found, strict=True)
    ]
    rows = [[item["name"], str(len(item["stages"])), item["description"]] for item in value]
    show({"recipes": value}, columns(["recipe", "stages", ""], rows) if rows else "no recipes are shipped", as_json)


@recipes_app.command("show")
def show_recipe(
    recipe: RecipeArgument, overrides: SetOption = None, seed: SeedOption = None, as_json: JsonOption = False
) -> None:
    """A recipe with every default filled in."""
    import yaml

    from recipes.console import show
    from recipes.schema import load_recipe

    value = load_recipe(recipe, overrides or (), seed).to_json()
    show(value, yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120), as_json)


@recipes_app.command("schema")
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    import json

    from recipes.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@recipes_app.command("validate")
def validate(
    path: RecipeArgument, overrides: SetOption = None, seed: SeedOption = None, as_json: JsonOption = False
) -> None:
    """Check a recipe and everything it names, without running it."""
    from recipes.console import show
    from recipes.schema import load_recipe

    loaded = load_recipe(path, overrides or (), seed)
    names = loaded.stage_names()
    show({"recipe": loaded.name, "valid": True, "stages": names}, f"{loaded.name}: {len(names)} stages, valid", as_json)
