"""What a run has ready before the weights of its base are loaded: its rows, and what reads them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft import PeftModel

from lora_cli.common import LoraError, ui
from lora_cli.data import load, prepare, selection
from lora_cli.distributed import ranks
from lora_cli.models import Base, Parent, Reader, load_recipe_reader
from lora_cli.plan import hardware, memory, outlook, sizes
from lora_cli.recipe import Recipe
from lora_cli.train import disk_space, reference
from lora_cli.train.collators import make_collator
from lora_cli.train.run_folder import Run


class Inputs(NamedTuple):
    """What a run has ready before the base's weights are loaded."""

    reader: Reader
    """The tokenizer, or the image processor."""
    new_ids: list[int]
    """Ids of the tokens that the recipe adds."""
    parent: Parent | None
    """The adapter that the run trains on."""
    train_rows: prepare.Prepared
    eval_rows: prepare.Prepared | None
    disk: disk_space.Need
    planned: int | None = None
    """Bytes that this process has at most as it trains, by the memory plan; None where there is
    none."""
    references: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
    """How likely the answers of pairs are at the start, of both kinds of rows."""


def prepare_inputs(recipe: Recipe, base: Base, parent: Parent | None, run: Run) -> Inputs:
    """Tokenizer and rows; LoraError for what would waste the run, such as too small a disk."""
    sizes.refuse_lack_of_experts(recipe, base)
    reader, new_ids, template = load_recipe_reader(recipe, base, parent)
    if template:
        ui.say(f"  chat template: {template}")
    size = sizes.measure_adapter(recipe, base, reader, new_ids, parent)
    if size.left_out:
        ui.say(f"  lora.target_modules: all-linear leaves out {size.left_out}")
    train_rows, eval_rows = load.load_rows(recipe, reader, run.record.day)
    ui.say(f"  data: {train_rows.summarise()}")
    if eval_rows:
        ui.say(f"  evaluation: {eval_rows.summarise()}")
    sizes.refuse_unknown_ids(recipe, base, train_rows, reader, parent)
    both = [train_rows, *filter(None, [eval_rows])]
    if beyond := sizes.check_positions(recipe, base, reader, both):
        ui.warn(beyond)
    steps = sizes.count_steps(recipe, train_rows).steps
    disk = disk_space.estimate_need(recipe, size.trainable, len(reader), steps)
    if ranks.is_first():
        disk_space.refuse_too_little(run.folder, disk)
    _refuse_other_rows(run, train_rows, reader)
    if eval_rows and recipe.data.holds_out:
        run.update(holdout={"rows": len(eval_rows.rows), "fingerprint": eval_rows.fingerprint})
    planned = _foresee_memory(recipe, base, train_rows) if ranks.is_first() else None
    if planned is not None:
        run.add(planned_memory_gb=round(planned / 1e9, 3))
    return Inputs(reader, new_ids, parent, train_rows, eval_rows, disk, planned)


def _foresee_memory(recipe: Recipe, base: Base, rows: prepare.Prepared) -> int | None:
    """Return how many bytes this process has at most as it trains, if the memory plan can say it,
    and it is more than a small part of the device's."""
    device = hardware.detect_device(hardware.find_training_device(recipe))
    if recipe.distributed.shards or outlook.is_far_below(recipe, base.config, device):
        return None
    batch = memory.largest_batch(recipe, None if rows.stream is not None else rows)
    try:
        need = memory.make_forecast(recipe, base.config, device).need(batch)
    except LoraError:  # what is mistaken is said where it is used
        return None
    # what is there already, a CPU's tensors are beside
    return need.total + (hardware.measure_memory() if device.kind == "cpu" else 0)


def _describe_rows(rows: prepare.Prepared, reader: Reader) -> dict[str, Any]:
    """Return what a run's record keeps of the rows it trains on."""
    return {
        "fingerprint": rows.fingerprint,
        "commit": rows.commit,
        "read": rows.counts.read,
        "rows": len(rows.rows),
        "tokens": rows.counts.tokens,
        "trained_tokens": rows.counts.trained_tokens,
        "left_out": dict(rows.counts.left_out),
        "stop_token_ids": selection.find_stop_ids(reader, rows.counts),
        "streamed": rows.stream is not None,
    }


def _refuse_other_rows(run: Run, train_rows: prepare.Prepared, reader: Reader) -> None:
    """Record the rows before training on them; LoraError when a resumed run began with others."""
    now = _describe_rows(train_rows, reader)
    before = run.record.data
    if before and before.fingerprint != now["fingerprint"]:
        changed = "the data, tokenizer or chat template have changed since"
        raise LoraError(
            f"the run in {run.folder} began with other rows: {changed}",
            "undo the change; record.json says what they were",
        )
    run.update(data=now)


def add_references(recipe: Recipe, base: Base, adapted: PeftModel, inputs: Inputs) -> Inputs:
    """Return the inputs with what the model says of the rows' answers before the first step, where
    they are held against that."""
    if not recipe.objective_row.needs_reference:
        return inputs
    collate = make_collator(recipe, inputs.reader, memory.find_packed_length(recipe))
    train, evaluation = (
        reference.find_reference(recipe, base, adapted, part.rows, collate) if part else None
        for part in (inputs.train_rows, inputs.eval_rows)
    )
    return inputs._replace(references=(train, evaluation))
