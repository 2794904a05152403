"""The verbs that publish: push, card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.cli.start import quiet_libraries
from lora_cli.common import ui

verbs = typer.Typer()


@verbs.command()
def push(
    path: Annotated[
        Path, typer.Argument(help="An adapter, a merged model (folders) or a GGUF file.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made if it is not there.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    gguf: Annotated[
        Optional[list[Path]],
        typer.Option("--gguf", metavar="FILE", help="A GGUF file beside it; may be repeated."),
    ] = None,
    base_name: Annotated[
        Optional[str],
        typer.Option(
            "--base-name", metavar="OWNER/NAME", help="What a base in a folder is called there."
        ),
    ] = None,
    branch: Annotated[str, typer.Option(help="Made if it is not there.")] = "main",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and upload nothing.")
    ] = False,
) -> None:
    """Upload a model to the hub with a card made from its record; nothing private leaves."""
    quiet_libraries()
    from lora_cli.publish import push as pushing

    wishes = pushing.Wishes(private, tuple(gguf or ()), base_name, branch, yes, dry_run)
    address = pushing.push(path, repository, wishes)
    if address:
        ui.report(address)


@verbs.command()
def card(
    path: Annotated[
        Path, typer.Argument(help="An adapter, a merged model (folders) or a GGUF file.")
    ],
    out: Annotated[
        Optional[Path],
        typer.Option(
            "--out", "-o", metavar="FILE", help="Write it there, and keep what you wrote in it."
        ),
    ] = None,
) -> None:
    """Print the model card: what it is, how it was made, checked and is used."""
    quiet_libraries()
    from lora_cli.publish import show

    show.show_card(path, out)
