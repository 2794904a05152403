"""The verb that scores models: evaluate."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_cli.cli.options import (
    BadRow,
    BaseModel,
    BatchSize,
    Columns,
    FirstRows,
    Forgetting,
    HeldOutRows,
    MaxNewTokens,
    MetricNames,
    Pattern,
    ResultFolder,
    ShownRows,
    TaskFiles,
    TaskNames,
    Temperature,
    TrustRemoteCode,
)
from lora_cli.cli.start import quiet_libraries

verbs = typer.Typer()
AnyModels = Annotated[
    list[str],
    typer.Argument(metavar="PATH...", help="Base, adapters, merged folders, .gguf files."),
]


@verbs.command()
def evaluate(
    paths: AnyModels,
    data: HeldOutRows = None,
    metrics: MetricNames = None,
    regex: Pattern = None,
    out: ResultFolder = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    batch_size: BatchSize = 8,
    max_rows: FirstRows = None,
    columns: Columns = None,
    on_bad_row: Annotated[BadRow, typer.Option(help="skip: say how many.")] = BadRow.error,
    base: BaseModel = None,
    no_base: Annotated[bool, typer.Option("--no-base", help="No base beside adapters.")] = False,
    forgetting: Forgetting = True,
    tasks: TaskNames = None,
    tasks_path: TaskFiles = None,
    show: ShownRows = 3,
    as_json: Annotated[bool, typer.Option("--json", help="evaluation.json on stdout.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Use nothing computed before.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score models on held-out rows, side by side: loss, answers, what was forgotten; with
    intervals. What was computed is kept: a killed evaluation goes on."""
    quiet_libraries()
    from lora_cli.evaluate import answerers, score

    sampling = answerers.Sampling(max_new_tokens, temperature)
    skips_bad = on_bad_row is BadRow.skip
    asked = score.Request(data, _split(metrics), regex, out, base, not no_base, sampling)
    asked = asked._replace(batch_size=batch_size, max_rows=max_rows, columns=columns or [])
    asked = asked._replace(skips_bad=skips_bad, general=forgetting, show=show, fresh=fresh)
    asked = asked._replace(tasks=_split(tasks), tasks_path=tasks_path, as_json=as_json)
    score.evaluate(paths, asked)


def _split(names: str | None) -> list[str]:
    """Return names that stand with commas between them."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]
