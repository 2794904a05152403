"""The verb that takes over other tools' files: import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.common import quote, say, ui

verbs = typer.Typer()


@verbs.command("import")
def import_recipe(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The YAML of another tool.")],
    tool: Annotated[
        Optional[str],
        typer.Option(
            "--from",
            metavar="axolotl|llama-factory|trl|unsloth",
            help="The tool; default: told by the file's keys.",
        ),
    ] = None,
    model: Annotated[
        Optional[str], typer.Option(help="A base in place of the file's, or where it names none.")
    ] = None,
    data: Annotated[
        Optional[str], typer.Option(help="Rows in place of the file's, or where it names none.")
    ] = None,
    out: Annotated[
        Optional[Path],
        typer.Option("--out", metavar="FILE", help="Must not exist; default: FILE's name, here."),
    ] = None,
) -> None:
    """Turn a configuration of axolotl, LLaMA-Factory, TRL or Unsloth into a recipe, and say what
    became of each of its keys."""
    from lora_cli.translate import import_file

    recipe = import_file(file, tool, out, model, data)
    ui.report_path(recipe)
    say(f"next: lora check {quote(recipe)}")
