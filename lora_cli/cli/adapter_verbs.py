"""The verbs about adapters and models: merge, combine, extract, convert, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.cli.options import (
    BaseModel,
    BaseWeights,
    Combination,
    Density,
    TrustRemoteCode,
    Weights,
)
from lora_cli.cli.start import quiet_libraries, two_or_more
from lora_cli.common import ui

verbs = typer.Typer()


@verbs.command()
def merge(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER... OUT",
            help="LoRA or DoRA adapters, ours or any PEFT ones; a new folder.",
        ),
    ],
    base: BaseModel = None,
    weights: Weights = None,
    combination: Combination = "cat",
    density: Density = None,
    stream: Annotated[
        Optional[bool],
        typer.Option(
            "--stream/--no-stream",
            help="In constant memory, or not; default: where that is possible.",
        ),
    ] = None,
    base_weights: Annotated[
        BaseWeights, typer.Option(help="Of an adapter trained in 4 bits: what it is merged into.")
    ] = BaseWeights.dequantized,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fold an adapter, or several combined, into their base model and verify the result."""
    *adapters, out = two_or_more(paths, "lora merge ADAPTER OUT")
    quiet_libraries()
    from lora_cli.merge import combine, merge

    with combine.join_adapters(adapters, out, weights, combination, density, base) as adapter:
        called = "the combination" if len(adapters) > 1 else None
        merge.merge(adapter, out, base, stream, base_weights is BaseWeights.original, called)
    ui.report_path(out)


@verbs.command()
def combine(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ADAPTER ADAPTER... OUT", help="LoRA adapters of one base; a new folder."
        ),
    ],
    weights: Weights = None,
    combination: Combination = "cat",
    density: Density = None,
    r: Annotated[
        Optional[int],
        typer.Option("--r", min=1, help="Rank of the svd kinds; default: the largest."),
    ] = None,
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make one adapter of several, by PEFT's add_weighted_adapter."""
    *adapters, out = two_or_more(paths, "lora combine ADAPTER ADAPTER OUT")
    quiet_libraries()
    from lora_cli.merge import combine

    combine.combine(adapters, out, weights, combination, density, r, base)
    ui.report_path(out)


@verbs.command()
def extract(
    base: Annotated[str, typer.Argument(help="The model that the fine-tuning started from.")],
    finetuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the adapter to; must not exist.")],
    r: Annotated[int, typer.Option("--r", min=1, help="Rank of the adapter.")] = 64,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a LoRA adapter of what a full fine-tuning changed, by truncated SVD."""
    quiet_libraries()
    from lora_cli.merge import extract

    extract.extract(base, finetuned, out, r)
    ui.report_path(out)


@verbs.command()
def convert(
    adapter: Annotated[
        Path, typer.Argument(help="A LoRA or DoRA adapter folder, ours or any PEFT one.")
    ],
    out: Annotated[
        Path, typer.Argument(help="Folder to write the plain LoRA adapter to; must not exist.")
    ],
    r: Annotated[
        Optional[int], typer.Option("--r", min=1, help="Rank; default: the adapter's largest.")
    ] = None,
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a plain LoRA adapter of a DoRA one, or one of a smaller rank, and say what that
    costs."""
    quiet_libraries()
    from lora_cli.merge import extract

    extract.convert(adapter, out, r, base)
    ui.report_path(out)


@verbs.command()
def verify(
    first: Annotated[
        str,
        typer.Argument(metavar="A", help="An adapter, a model (folder or hub), or a .gguf file."),
    ],
    second: Annotated[
        str, typer.Argument(metavar="B", help="What should be the same function: any of these.")
    ],
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare what two forms of a model say to the same prompts. Exit 1 where rounding does not
    explain it."""
    quiet_libraries()
    from lora_cli.evaluate import verify

    ui.report(verify.verify(first, second, base))
