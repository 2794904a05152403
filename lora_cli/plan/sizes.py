"""Count what a run will be: the adapter's size, the steps, how full the batches are.

The base's shape and the rows suffice; no weights are loaded. Training calls this first, so that
names in the recipe that match nothing are refused at once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from pyarrow import compute
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import pack_dataset

from lora_cli.common import LoraError, UsageError, spell_count
from lora_cli.data import preferences, prepare, selection
from lora_cli.models import (
    Base,
    Parent,
    PictureProcessor,
    Reader,
    attach,
    causality,
    decoder,
    find_positions,
    make_probes,
    targets,
    token_rows,
)
from lora_cli.plan import try_pictures
from lora_cli.recipe import Recipe


class Size(NamedTuple):
    """How large an adapter is."""

    trainable: int
    """Parameters."""
    modules: int
    """Those that have an adapter."""
    left_out: str
    """Linear modules that `all-linear` leaves out, in words."""

    def __str__(self) -> str:
        left_out = f"; all-linear leaves out {self.left_out}" if self.left_out else ""
        modules = spell_count(self.modules, "module")
        return f"{self.trainable:,} parameters in {modules}{left_out}"


class Steps(NamedTuple):
    """The steps of a run."""

    packed: bool
    """Whether the sequences are packed over the whole data set."""
    rows: int
    steps_per_epoch: int
    steps: int
    fill: float
    """The share of the batches that is text: exact when packed, else expected of random rows."""


def measure_adapter(
    recipe: Recipe,
    base: Base,
    reader: Reader,
    new_ids: list[int],
    parent: Parent | None = None,
) -> Size:
    """Return the adapter's size; UsageError where the recipe's names match nothing in the base,
    LoraError where the adapter that is trained on does not fit it."""
    if base.task.writes_next_tokens:
        causality.refuse_encoder_by_config(base.config, base.task, base.name)
    network = base.build_empty()
    if base.task.has_targets:
        decoder.refuse_beginless(network, base.name)
    if isinstance(reader, PictureProcessor):
        try_pictures.try_base(base, network, reader)
    folder = parent.folder if parent else None
    config, left_out = targets.make_config(recipe, network, len(reader), new_ids, folder)
    config.init_lora_weights = True  # others need the weights
    with torch.device("meta"), attach.quiet_peft():
        adapted = attach.attach_adapter(network, config)
    if parent is not None:
        parent.refuse_unfit(adapted)
    if isinstance(reader, PictureProcessor):
        try_pictures.try_adapted(base, adapted, reader)
    trainable = sum(parameter.numel() for _, parameter in attach.walk_trainable(adapted))
    return Size(trainable, len(attach.find_lora_layers(adapted)), left_out)


def refuse_lack_of_experts(recipe: Recipe, base: Base) -> None:
    """Raise UsageError for a loss of the router of a base that has none."""
    coefficient = getattr(recipe.training, "router_aux_loss_coef", None)
    if coefficient and not hasattr(base.config.get_text_config(), "output_router_logits"):
        place = recipe.where("training", "router_aux_loss_coef")
        raise UsageError(f"{place}: {base} is not a mixture of experts", "remove it")


def refuse_unknown_ids(
    recipe: Recipe,
    base: Base,
    rows: prepare.Prepared,
    tokenizer: Reader,
    parent: Parent | None = None,
) -> None:
    """Raise LoraError where rows, or what pads them, have a token for which the base lacks an
    embedding.

    Some tokenizers have more tokens than their model; that is fine as long as none of them is used.
    """
    if isinstance(tokenizer, PictureProcessor):
        return
    network = base.build_empty()
    if parent is not None:
        token_rows.fit_embeddings(network, parent.folder)
    there = network.get_input_embeddings().num_embeddings
    # the embeddings grow to all of the tokenizer's tokens where the recipe adds some
    added = recipe.model.add_tokens or recipe.model.add_special_tokens
    if (added and parent is None) or max(tokenizer.get_vocab().values(), default=-1) < there:
        return
    used = [tokenizer.pad_token_id or 0]
    for column in recipe.task_row.text_columns:
        for chunk in rows.rows.data.table.column(column).chunks:
            used.append(compute.max(chunk.values).as_py() or 0)
    if max(used) >= there:
        token = tokenizer.convert_ids_to_tokens(max(used))
        raise LoraError(
            f"model.name_or_path: token {max(used)} of the tokenizer ({token!r}) is used; "
            f"the base's embeddings end at {there - 1}",
            "take the model's own tokenizer, or a token that it has for training.pad_token",
        )


def check_positions(
    recipe: Recipe,
    base: Base,
    reader: Reader,
    rows: Sequence[prepare.Prepared] | None,
) -> str | None:
    """Return in words how far the rows reach beyond the positions that the base was made for; None
    if they do not. LoraError for a row, or a prompt that is compared later, that it cannot read at
    all.

    Rows that share a sequence count from 0 each. Of rows that are not known (None, or a stream)
    training.max_length tells.
    """
    if isinstance(reader, PictureProcessor):
        try_pictures.refuse_lone_picture(recipe, base.build_empty(), reader, rows)
        return None
    positions = find_positions(base)
    if positions is not None:
        prompts = max(len(probe.ids) for probe in make_probes(reader))
        if positions.ends and prompts > positions.number:
            raise LoraError(
                f"model.name_or_path: {base} reads {positions.number} tokens at most, and the "
                f"prompts by which models are compared have up to {prompts}",
                "take a model with more positions",
            )
    found = [_check_limit(recipe, base, limit, rows) for limit in selection.list_limits(recipe)]
    return "; ".join(filter(None, found)) or None


def _check_limit(
    recipe: Recipe,
    base: Base,
    limit: selection.Limit,
    rows: Sequence[prepare.Prepared] | None,
) -> str | None:
    """Return in words how far a text of the rows reaches beyond the positions for it."""
    positions = find_positions(base, of_target=limit.column == "labels")
    if positions is None:
        return None
    number = positions.number
    counted = f"the {number:,} positions of {base}"
    if rows is None:
        over = f"{limit.key} {limit.tokens:,} is over {counted}"
        return over if limit.tokens > number else None
    lengths = [n for part in rows for n in _find_lengths(recipe, part, limit, positions.ends)]
    over_them = sum(length > number for length in lengths)
    if not over_them:
        return None
    what = f"{limit.name or 'row'}s"
    found = f"{what} longer than {counted}: {over_them:,}, up to {max(lengths):,} tokens"
    hint = f"--set {limit.key}={number}"
    if positions.ends:
        raise LoraError(f"{limit.key}: {found}", hint)
    return f"{found} ({hint} limits them)"


def _find_lengths(
    recipe: Recipe, part: prepare.Prepared, limit: selection.Limit, ends: bool
) -> list[int]:
    """Return the positions that a text of each row takes, or the longest there may be."""
    training = recipe.training
    given = training.collect_values()
    wrapped = given.get("packing_strategy") == "wrapped"
    if part.stream is not None or (training.packing in (True, "dataset") and wrapped):
        return [limit.tokens]
    found: list[int] = prepare.find_lengths(part.rows, limit.column).tolist()
    if limit.texts > 1:
        found = np.asarray(part.rows[preferences.DOCUMENTS]).flatten().tolist()
    multiple = given.get("pad_to_multiple_of") if ends else None
    if multiple and training.packing is False:
        return [math.ceil(length / multiple) * multiple for length in found]
    return found


def count_steps(recipe: Recipe, train: prepare.Prepared) -> Steps:
    """Return how many steps the rows make; of a stream, its first rows show how full the batches
    are."""
    training = recipe.training
    packed = training.packing in (True, "dataset")
    rows = len(train.rows)
    fill = 1.0
    if packed:
        strategy = getattr(training, "packing_strategy", None) or "bfd"
        rows = len(pack_dataset(train.rows, training.max_length, strategy))
        fill = train.counts.tokens / (rows * training.max_length)
    elif training.packing != "step" and not getattr(training, "padding_free", False):
        size = training.per_device_train_batch_size
        grouped = getattr(training, "train_sampling_strategy", None) == "group_by_length"
        columns = recipe.task_row.text_columns
        texts = [prepare.find_lengths(train.rows, column).tolist() for column in columns]
        fill = (
            measure_grouped_fill(texts, size, training.seed)
            if grouped and train.stream is None
            else estimate_padded_fill([Counter(lengths) for lengths in texts], size)
        )
    batches = math.ceil(rows / training.per_device_train_batch_size)
    if getattr(training, "dataloader_drop_last", False) and train.stream is None:
        batches = rows // training.per_device_train_batch_size
        if not batches:
            hint = "--set training.dataloader_drop_last=false"
            raise LoraError("there is no full batch to train on", hint)
    epoch = math.ceil(batches / training.gradient_accumulation_steps)
    total = training.max_steps
    if total <= 0:
        total = math.ceil(epoch * training.num_train_epochs)
    return Steps(packed, rows, epoch, total, fill)


def measure_grouped_fill(texts: Sequence[list[int]], size: int, seed: int) -> float:
    """Return the share of text in batches of `size` rows of about the same length, as Trainer draws
    them in an epoch. `texts` are the lengths of each row's texts, by the first of which it goes."""
    drawn = torch.Generator().manual_seed(seed)
    order = get_length_grouped_indices(texts[0], size, generator=drawn)
    padded = 0
    for lengths in texts:
        sorted_so = [lengths[place] for place in order]
        batches = [sorted_so[start : start + size] for start in range(0, len(order), size)]
        padded += sum(max(batch) * len(batch) for batch in batches)
    return sum(map(sum, texts)) / padded


def estimate_padded_fill(texts: Sequence[Mapping[int, int]], size: int) -> float:
    """Return the expected share of text in batches of `size` rows drawn at random. `texts` count
    the rows of each length, for each text of a row."""
    batches = [_estimate_batch(lengths, size) for lengths in texts]
    return sum(text for text, _ in batches) / sum(padded for _, padded in batches)


def _estimate_batch(lengths: Mapping[int, int], size: int) -> tuple[float, float]:
    """Return how long rows are on average, and the longest of `size` rows drawn at random: a batch
    is as long as its longest row. `lengths` counts the rows of each length."""
    count = sum(lengths.values())
    longest = 0.0
    below = 0
    for length, number in sorted(lengths.items()):
        share = ((below + number) / count) ** size - (below / count) ** size
        longest += length * share
        below += number
    return sum(length * number for length, number in lengths.items()) / count, longest
