"""Run a model of pictures without weights, on a picture without content: what does not fit is said
before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import nn

from lora_cli.common import LoraError
from lora_cli.data import prepare
from lora_cli.models import Base, PictureProcessor, find_statistics
from lora_cli.recipe import Recipe

LONE = "more than 1 value per channel"
"""torch's words where one picture leaves one value, of which there is no variance."""


def try_base(base: Base, network: nn.Module, processor: PictureProcessor) -> None:
    """Raise LoraError where a base does not take the pictures that its processor makes; `network`
    is on the `meta` device."""
    height, width = processor.shape
    said = _run(network.eval(), processor, 2)
    if said:
        raise LoraError(
            f"model.name_or_path: {base} does not take the pictures of {width}x{height} that its "
            f"preprocessor_config.json makes: {said}",
            "set the size that it takes in preprocessor_config.json of a copy of the base, or take "
            "another base, of pictures in colour",
        )


def try_adapted(base: Base, adapted: PeftModel, processor: PictureProcessor) -> None:
    """Raise LoraError where a base runs, but not with its adapter."""
    said = _run(adapted.eval(), processor, 2)
    if said:
        raise LoraError(
            f"lora.target_modules: {base} does not run with its modules adapted: {said}",
            "name others of its modules in lora.target_modules",
        )


def refuse_lone_picture(
    recipe: Recipe,
    network: nn.Module,
    processor: PictureProcessor,
    rows: Sequence[prepare.Prepared] | None,
) -> None:
    """Raise LoraError where a batch has one picture, of which BatchNorm makes no variance."""
    size = recipe.training.per_device_train_batch_size
    number = len(rows[0].rows) if rows else 0
    drops_last = recipe.training.collect_values().get("dataloader_drop_last")
    lone = size == 1 or (number % size == 1 and not drops_last)
    if not lone or not find_statistics(network) or LONE not in _run(network.train(), processor, 1):
        return
    place = recipe.where("training", "per_device_train_batch_size")
    which = "each batch" if size == 1 else f"the last batch of {number:,} rows, {size} at a time,"
    change = "per_device_train_batch_size=8" if size == 1 else "dataloader_drop_last=true"
    raise LoraError(
        f"{place}: {which} has one picture, of which BatchNorm makes no variance",
        f"--set training.{change}",
    )


def _run(network: nn.Module, processor: PictureProcessor, pictures: int) -> str:
    """Return in words why a model without weights does not run on so many pictures, empty where it
    does, or where that hangs on their content."""
    made = processor([processor.blank])["pixel_values"]
    kind = next(each.dtype for each in network.parameters())
    shown = torch.empty((pictures, *made.shape[1:]), dtype=kind, device="meta")
    try:
        with torch.no_grad():
            network(pixel_values=shown)
    except NotImplementedError:  # for tensors without content
        return ""
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        said = " ".join(str(error).split())[:200]
        return "" if "meta" in said else f"{type(error).__name__}: {said}"
    return ""
