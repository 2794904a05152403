"""The verbs about GGUF files: export-gguf, setup-llama-cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.cli.options import (
    BaseCost,
    BaseModel,
    GGUFTypes,
    ImportanceMatrix,
    LlamaCpp,
    TrustRemoteCode,
)
from lora_cli.cli.start import quiet_libraries
from lora_cli.common import UsageError, ui

verbs = typer.Typer()


@verbs.command("export-gguf")
def export_gguf(
    path: Annotated[
        Optional[Path],
        typer.Argument(
            help="A merged model or an adapter; default: the newest result under this folder."
        ),
    ] = None,
    quantize: GGUFTypes = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the files; default: PATH."),
    ] = None,
    base: BaseModel = None,
    imatrix: ImportanceMatrix = None,
    adapter_only: Annotated[
        bool,
        typer.Option(
            "--adapter-only", help="Write the adapter alone, for llama.cpp to lay over its base."
        ),
    ] = False,
    base_cost: BaseCost = True,
    llama_cpp: LlamaCpp = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Convert a model, or an adapter merged on the way, to GGUF with llama.cpp's own converter and
    quantiser."""
    quiet_libraries()
    types = quantize or ["f16"]
    if adapter_only:
        from lora_cli.gguf import adapter

        folder = _require_adapter_alone(path, imatrix)
        files = adapter.export_adapter(folder, types, output, base, llama_cpp)
    else:
        from lora_cli.gguf import export

        files = export.export(path, types, output, base, llama_cpp, imatrix, base_cost)
    for file in files:
        ui.report_path(file)


def _require_adapter_alone(path: Path | None, imatrix: str | None) -> Path:
    """Return the adapter's folder; raise UsageError for options that --adapter-only cannot have."""
    if imatrix is not None:
        raise UsageError(
            "--imatrix is for the quantiser's types, which an adapter has none of", "leave it out"
        )
    if path is None:
        raise UsageError(
            "--adapter-only needs the adapter's folder", "lora export-gguf ADAPTER --adapter-only"
        )
    return path


@verbs.command("setup-llama-cpp")
def setup_llama_cpp() -> None:
    """Install a pinned copy of llama.cpp's converters, checked by sha256."""
    from lora_cli.gguf import install

    ui.report_path(install.install_converters())
