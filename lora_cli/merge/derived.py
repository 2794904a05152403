"""Finish the folder of an adapter that was made from others: its tokenizer, and a record that names
the parents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_cli.common import files, provenance
from lora_cli.models import Adapter, Reader, TrainingRecord, save_reader


def finish_folder(
    staging: Path,
    reader: Reader,
    command: str,
    sources: Sequence[Adapter],
    **contents: Any,
) -> None:
    """Write what reads its input, and a record, beside the adapter.

    The record names the parents and holds what merging needs to know.
    """
    first = sources[0]
    save_reader(reader, staging, first.base.name, first.base.revision)
    # an adapter made elsewhere may name its base without a commit
    base = first.base if first.base.revision else first.base.resolve()
    # 4-bit storage is a base's that it replaces
    kept = ("model",) if first.replaced else ("model", "quantization")
    stops = sorted({token for source in sources for token in source.stop_token_ids})
    recipe = first.recipe.to_data()
    prefix = first.recipe.source_prefix
    read_with = {"data": {"source_prefix": prefix}} if prefix else {}
    made = provenance.new_record(
        command,
        status="finished",
        base=base.to_record(),
        recipe={key: recipe[key] for key in kept if key in recipe} | read_with,
        data={"stop_token_ids": stops},
        **contents,
        parents=[
            {"folder": str(source.folder), "record": source.record.to_data()}
            for source in sources
            if source.record
        ],
    )
    record = TrainingRecord.model_validate(made)
    files.write_json(staging / provenance.ARTEFACT_RECORD, record.to_data())
    files.leave_out_home(staging)
