"""The verbs that look back at runs: runs, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.common import ui

verbs = typer.Typer()


@verbs.command()
def runs(
    folder: Annotated[
        Optional[Path], typer.Argument(metavar="FOLDER", help="Default: runs, or the current one.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON list on stdout instead.")
    ] = False,
) -> None:
    """List the runs below FOLDER: base, method, steps, evaluation, time, and how each ended."""
    from lora_cli.report import listing

    listing.list_runs(folder, as_json)


@verbs.command()
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Runs' folders; merged folders, .gguf files of them."
        ),
    ],
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="FILE", help="Default: report.html in RUN."),
    ] = None,
) -> None:
    """Write one HTML page of what runs were and whether they worked, and its numbers as JSON."""
    from lora_cli.report import report

    ui.report_path(report.write_report(paths, output))
