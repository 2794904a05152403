"""The verb that writes a recipe from rows: init."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.cli.options import DraftMethod, DraftModel, Overrides, TrustRemoteCode
from lora_cli.cli.start import quiet_libraries
from lora_cli.common import quote, ui

verbs = typer.Typer()


@verbs.command()
def init(
    data: Annotated[
        Optional[str],
        typer.Argument(
            metavar="DATA",
            help="A file or folder of rows, or a data set on the hub; default: one that lies here.",
        ),
    ] = None,
    model: DraftModel = None,
    method: DraftMethod = None,
    overrides: Overrides = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: take what each question offers.")
    ] = False,
    out: Annotated[
        Optional[Path],
        typer.Option("--out", metavar="FILE", help="Must not exist; default: DATA's name, .yaml."),
    ] = None,
    gpu: Annotated[
        Optional[str],
        typer.Option("--gpu", metavar="24GB|H100|…", help="Fit this; default: this machine."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a recipe that trains a model on DATA and fits this machine: the rows are looked at, two
    steps are tried."""
    quiet_libraries()
    from lora_cli.drafts import questions, write

    asks = questions.is_answered() and not yes
    asked = write.Asked(data, model, method, overrides or [], out, asks, gpu)
    written = write.write_recipe(asked)
    ui.say(f"next: lora train {quote(written)}")
    ui.report_path(written)
