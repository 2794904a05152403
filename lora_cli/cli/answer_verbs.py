"""The verbs that ask models: generate, chat, predict."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from lora_cli.cli.options import (
    AskedRows,
    AskedTexts,
    BadRow,
    BaseModel,
    BatchSize,
    Columns,
    ComparesLabels,
    KeptColumns,
    LongestRow,
    LongestText,
    LongRow,
    MaxNewTokens,
    NewFile,
    SaysAll,
    Temperature,
    TrustRemoteCode,
)
from lora_cli.cli.start import quiet_libraries

verbs = typer.Typer()
CUT = LongRow.truncate


@verbs.command()
def generate(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Base, adapters, merged folders, .gguf files."),
    ],
    prompt: Annotated[
        Optional[list[str]], typer.Option("--prompt", "-p", help="May be repeated.")
    ] = None,
    file: Annotated[
        Optional[Path],
        typer.Option(
            "--file",
            "-f",
            help="Prompts: lines of .txt, or rows as for training; their answers are compared.",
        ),
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    base: BaseModel = None,
    show: Annotated[
        Optional[int], typer.Option(min=0, help="Print at most this many prompts' answers.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object per prompt and model on stdout.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer the same prompts with several models side by side."""
    quiet_libraries()
    from lora_cli.evaluate import generate

    generate.generate(paths, prompt or [], file, max_new_tokens, temperature, base, show, as_json)


@verbs.command()
def chat(
    path: Annotated[str, typer.Argument(help="Base, adapter, merged folder or .gguf file.")],
    system: Annotated[Optional[str], typer.Option(help="A system message.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a model; answers stream. /reset starts over, /quit or end of input leaves."""
    quiet_libraries()
    from lora_cli.evaluate import chat

    chat.chat(path, system, max_new_tokens, temperature, base)


@verbs.command()
def predict(
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Adapters or models of any task but causal_lm."),
    ],
    data: AskedRows = None,
    text: AskedTexts = None,
    out: NewFile = None,
    batch_size: BatchSize = 32,
    max_length: LongestRow = None,
    max_new_tokens: LongestText = None,
    on_long_row: Annotated[LongRow, typer.Option(help="What becomes of longer rows.")] = CUT,
    on_bad_row: Annotated[BadRow, typer.Option(help="skip: a line says why.")] = BadRow.error,
    columns: Columns = None,
    keep: KeptColumns = None,
    labels: ComparesLabels = True,
    everything: SaysAll = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --out: counts and metrics as JSON on stdout.")
    ] = False,
    base: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Tell of each row what models say of it, as lines of JSON: labels with probabilities, values,
    entities, answers, texts. Several adapters of one base share it."""
    quiet_libraries()
    from lora_cli.evaluate import predict, predictors

    reading = predictors.Reading(
        max_length, on_long_row is CUT, labels, everything, batch_size, max_new_tokens
    )
    skips = on_bad_row is BadRow.skip
    options = predict.Options(reading, keep or [], skips, as_json)
    predict.predict(paths, data, text or [], out, base, columns or [], options)
