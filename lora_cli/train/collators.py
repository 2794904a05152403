"""What puts a task's rows together to batches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli.data import collate, load
from lora_cli.models import PictureProcessor, Reader, decoder
from lora_cli.recipe import Recipe
from lora_cli.scoring import losses
from lora_cli.speed import step_packing
from lora_cli.train import pair_batches, unpaired_batches


def make_collator(
    recipe: Recipe, reader: Reader, sequence: int, network: PreTrainedModel | None = None
) -> Any:
    """Return the collator that makes batches of rows, or where `packing: step` sequences of up to
    `sequence` tokens; None where TRL has its own. What the decoder of a `network` with an encoder
    is fed, it makes itself."""
    measured = losses.is_measured(recipe.model.problem_type)
    if isinstance(reader, PictureProcessor):
        width = len(recipe.model.labels) if measured else 1
        dtype = getattr(torch, recipe.model.dtype)
        return collate.PictureCollator(reader, measured, width, dtype)
    multiple = recipe.training.collect_values().get("pad_to_multiple_of")
    if recipe.task_row.has_targets:
        return collate.PairCollator(reader, partial(decoder.shift_labels, network), multiple)
    if not recipe.task_row.writes_next_tokens:
        return collate.TaskCollator(
            reader,
            recipe.task_row.places_labels,
            measured,
            multiple,
            load.find_encoder(recipe.task_row).beside,
        )
    if recipe.objective_row.compares:
        steps, padded = pair_batches.PairSteps, pair_batches.PaddedPairs
        if recipe.objective_row.unpaired:
            steps, padded = unpaired_batches.Steps, unpaired_batches.PaddedRows
        packed = recipe.training.packing == "step"
        return steps(sequence) if packed else padded(find_pad_id(reader), multiple)
    if recipe.training.packing == "step":
        return step_packing.StepCollator(sequence)
    if not recipe.uses_trl:
        return DataCollatorForLanguageModeling(pad_token_id=find_pad_id(reader))
    return None


def find_pad_id(tokenizer: Any) -> int:
    """Return the token that fills rows up, the one that ends a text where there is none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
