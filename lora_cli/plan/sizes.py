"""What a run will be, from the base's shape and the rows alone: the adapter's size, steps, how full
the batches are.

No weights are loaded. Training looks here first, so that what the recipe's names do not match is
refused at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pyarrow import compute
from transformers import PreTrainedTokenizerBase
from trl import pack_dataset

from lora_cli.common import LoraError
from lora_cli.data import Prepared
from lora_cli.models import Base, attach, targets, token_rows
from lora_cli.recipe import Recipe, upstream


class Size(NamedTuple):
    """An adapter's trained parameters, and the modules that have one."""

    trainable: int
    modules: int


class Steps(NamedTuple):
    """Batches of a run; `packed` over the whole data set.

    `fill` is the share of them that is text: exact when packed, else what rows drawn at random are
    expected to give.
    """

    packed: bool
    rows: int
    steps_per_epoch: int
    steps: int
    fill: float


def measure_adapter(
    recipe: Recipe, base: Base, tokenizer: PreTrainedTokenizerBase, new_ids: list[int]
) -> Size:
    """The adapter's size; UsageError where the recipe's names match nothing in the base."""
    network, config = base.build_empty(), upstream.build_lora_config(recipe)
    if new_ids:
        token_rows.grow_embeddings(network, len(tokenizer))
        token_rows.train_rows(network, config, new_ids)
    targets.check_targets(recipe, network, config)
    config.init_lora_weights = True  # others need the weights
    with torch.device("meta"), attach.quiet_peft():
        adapted = attach.attach_adapter(network, config)
    trainable = sum(parameter.numel() for _, parameter in attach.walk_trainable(adapted))
    return Size(trainable, len(attach.find_lora_layers(adapted)))


def refuse_unknown_ids(
    recipe: Recipe, base: Base, rows: Prepared, tokenizer: PreTrainedTokenizerBase
) -> None:
    """LoraError where rows, or what fills short ones, have a token for which the base has no
    embedding.

    Some tokenizers have more tokens than their model; that is no error as long as none of them is
    used.
    """
    there = base.build_empty().get_input_embeddings().num_embeddings
    added = (
        recipe.model.add_tokens or recipe.model.add_special_tokens
    )  # for which the embeddings grow to all tokens
    if added or max(tokenizer.get_vocab().values(), default=-1) < there:
        return
    used = [tokenizer.pad_token_id or 0]
    for chunk in rows.rows.data.table.column("input_ids").chunks:
        used.append(compute.max(chunk.values).as_py() or 0)
    if max(used) >= there:
        token = tokenizer.convert_ids_to_tokens(max(used))
        raise LoraError(
            f"model.name_or_path: token {max(used)} of the tokenizer ({token!r}) is used; the "
            "base's embeddings end "
            f"at {there - 1}",
            "take the tokenizer that belongs to the model, or a token that it has for "
            "training.pad_token",
        )


def count_steps(recipe: Recipe, train: Prepared) -> Steps:
    """How many steps the rows make; of a stream, its first rows tell how full they are."""
    training, rows, fill = recipe.training, len(train.rows), 1.0
    packed = training.packing in (True, "dataset")
    if packed:
        rows = len(
            pack_dataset(
                train.rows,
                training.max_length,
                getattr(training, "packing_strategy", None) or "bfd",
            )
        )
        fill = train.counts.tokens / (rows * training.max_length)
    elif training.packing != "step" and not getattr(training, "padding_free", False):
        lengths = compute.list_value_length(
            train.rows.with_format("arrow")[:]["input_ids"]
        ).value_counts()
        counted = {each["values"]: each["counts"] for each in lengths.to_pylist()}
        fill = estimate_padded_fill(counted, training.per_device_train_batch_size)
    batches = math.ceil(rows / training.per_device_train_batch_size)
    if getattr(training, "dataloader_drop_last", False) and train.stream is None:
        batches = rows // training.per_device_train_batch_size
        if not batches:
            raise LoraError(
                "there is no full batch to train on", "--set training.dataloader_drop_last=false"
            )
    epoch = math.ceil(batches / training.gradient_accumulation_steps)
    total = (
        training.max_steps
        if training.max_steps > 0
        else math.ceil(epoch * training.num_train_epochs)
    )
    return Steps(packed, rows, epoch, total, fill)


def estimate_padded_fill(lengths: dict[int, int], size: int) -> float:
    """The expected share of text in batches of `size` rows drawn at random, each batch as long as
    its longest row.

    `lengths` counts the rows of each length.
    """
    count, longest, below = sum(lengths.values()), 0.0, 0
    for length, number in sorted(lengths.items()):
        share = ((below + number) / count) ** size - (below / count) ** size
        longest, below = longest + length * share, below + number
    return sum(length * number for length, number in lengths.items()) / count / longest
