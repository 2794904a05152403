"""Add tokens to a base: grow its embeddings to the tokenizer, and train the new rows.

Growing never shrinks: many bases have more rows than tokens. A trained row is kept whole in the
adapter, so that what the new rows started from is of no matter afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel

from lora_cli.common import LoraError, files
from lora_cli.models.head import find_task_of
from lora_cli.models.peft_matching import matches_ending

MOST_ADDED = 2**17
"""Rows that an adapter may add to its base: more than any vocabulary was ever extended by."""


def find_embeddings(model: PreTrainedModel | PeftModel) -> Any:
    """Return the table in which a model looks its tokens up; None for one that reads pictures."""
    return None if find_task_of(model).reads_pictures else model.get_input_embeddings()


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Let the embeddings, and the head, have at least so many rows; new ones are drawn around the
    mean of the rest."""
    if model.get_input_embeddings().num_embeddings < rows:
        model.resize_token_embeddings(rows, mean_resizing=model.device.type != "meta")


def grow_to_trained(model: PreTrainedModel, config: LoraConfig) -> None:
    """Let the embeddings have at least the rows that `config`, of an adapter that was trained,
    names."""
    if rows := _count_named(config.trainable_token_indices):
        grow_embeddings(model, rows)


def _count_named(given: Any) -> int:
    """Return the number of rows up to the last one of `trainable_token_indices`."""
    listed = list(given.values()) if isinstance(given, dict) else [given or []]
    return max((number + 1 for ids in listed for number in ids), default=0)


def train_rows(model: PreTrainedModel, config: LoraConfig, ids: list[int]) -> None:
    """Make `config` train the rows of `ids`, in the embeddings and in a head of its own, beside
    those it names.

    A module that is trained whole (`modules_to_save`) needs none.
    """
    if not ids:
        return
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embeddings] if head is None or head.weight is embeddings.weight else [embeddings, head]
    names = [name for name, module in model.named_modules() if any(module is end for end in ends)]
    given: Any = config.trainable_token_indices or {}
    rows = dict(given) if isinstance(given, dict) else {names[0].rpartition(".")[2]: given}
    for name in names:
        if not any(matches_ending(name, saved) for saved in config.modules_to_save or ()):
            key = next((key for key in rows if matches_ending(name, key)), name.rpartition(".")[2])
            rows[key] = [
                *rows.get(key, []),
                *(number for number in ids if number not in rows.get(key, [])),
            ]
    config.trainable_token_indices = rows or None


def fit_embeddings(model: PreTrainedModel, folder: Path) -> None:
    """Grow the embeddings of a base to those the adapter in `folder` was trained with."""
    if find_embeddings(model) is None:
        return
    stored = load_peft_weights(str(folder), device="cpu")
    rows = count_rows_trained(
        model, folder, {key: tuple(tensor.shape) for key, tensor in stored.items()}
    )
    there = model.get_input_embeddings().num_embeddings
    if rows > there + MOST_ADDED:
        raise LoraError(
            f"{folder} needs row {rows - 1} of the embeddings, but its base has only {there}",
            "copy the adapter again",
        )
    if there < rows:
        model.resize_token_embeddings(rows, mean_resizing=False)


def count_rows_trained(
    model: PreTrainedModel, folder: Path, shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """Count the rows of embeddings that the adapter in `folder` needs; `shapes` are those of its
    tensors, by key."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    ends = tuple(
        f"{name}{inner}.weight" for inner in ("", ".base_layer", ".token_adapter.base_layer")
    )
    carried = [shape[0] for key, shape in shapes.items() if key.endswith(ends)]
    config = files.read_json(folder / "adapter_config.json")
    return max([*carried, _count_named(config.get("trainable_token_indices"))])


def looks_up_ids(module: nn.Module) -> bool:
    """Whether the module is an embedding whose forward takes the numbers of rows and nothing else.

    Learned positions are embeddings, too, but find out themselves which rows they need.
    """
    if not isinstance(module, nn.Embedding):
        return False
    return type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
