"""The verbs that help with the others: doctor, cache, schema, recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.cli.start import quiet_libraries
from lora_cli.common import ui

verbs = typer.Typer()


@verbs.command()
def doctor(
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also print every comparison's largest deviation.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead.")
    ] = False,
) -> None:
    """Check what is installed here against the published formulas. Exit 1 if something a recipe
    needs is wrong."""
    from lora_cli.doctor import checks

    if not checks.run_doctor(oracle, as_json, quiet_libraries):
        raise typer.Exit(1)


@verbs.command()
def cache(
    remove: Annotated[
        Optional[list[str]],
        typer.Option(
            "--remove",
            metavar="BASE",
            help="Remove this base first, by its name or sha256; may be repeated.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object on stdout instead.")
    ] = False,
) -> None:
    """List what lora keeps in its cache: the bases that were made of GGUF files, who uses them, and
    the rest."""
    quiet_libraries()
    from lora_cli.doctor import cached

    cached.show_cache(remove or [], as_json)


@verbs.command()
def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The reference of all keys as Markdown instead.")
    ] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from lora_cli.recipe import schema

    text = schema.make_markdown() if markdown else schema.make_json()
    ui.report(*text.splitlines())


recipes = typer.Typer()
verbs.add_typer(recipes, name="recipes")


@recipes.callback(invoke_without_command=True)
def list_recipes(
    context: typer.Context,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The table as a page in Markdown instead.")
    ] = False,
) -> None:
    """List the recipes that come with lora; `copy` writes one into the current folder."""
    if context.invoked_subcommand is not None:
        return
    from lora_cli.recipe import recipe_table

    if markdown:
        ui.report(*recipe_table.make_markdown().splitlines())
    else:
        recipe_table.say_table()


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `lora recipes` lists them.")],
    target: Annotated[
        Optional[Path], typer.Argument(metavar="FILE", help="Must not exist; default: NAME.yaml.")
    ] = None,
) -> None:
    """Copy a shipped recipe to start your own from."""
    from lora_cli.recipe import shipped_recipes

    ui.report_path(shipped_recipes.copy_recipe(name, target))
