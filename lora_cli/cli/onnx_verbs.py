"""The verb about ONNX files: export-onnx."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_cli.cli.options import TrustRemoteCode
from lora_cli.cli.start import quiet_libraries
from lora_cli.common import ui

verbs = typer.Typer()


@verbs.command("export-onnx")
def export_onnx(
    model: Annotated[
        str, typer.Argument(help="A model that was merged, or a whole one (folder or hub).")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write model.onnx to; must not exist.")],
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a model that classifies, tags or answers questions as ONNX, compared with it in
    onnxruntime."""
    quiet_libraries()
    from lora_cli.onnx_export import export

    export.export(model, out)
    ui.report_path(out)
