"""Out of memory: what would fit, and the same steps made of smaller pieces (`training.on_oom:
reduce`)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyarrow import compute

from lora_cli.common import LoraError, ui
from lora_cli.data import prepare
from lora_cli.plan import memory
from lora_cli.recipe import Recipe
from lora_cli.speed import step_packing
from lora_cli.train import run_folder

HOST = ("DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried to allocate")


class Pieces(NamedTuple):
    """What one optimiser step is made of: rows per forward pass, passes, and (packing: step) tokens
    per sequence."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    sequence: int

    def halved(self, recipe: Recipe, rows: prepare.Prepared) -> Pieces | None:
        """About half as much in memory at a time, and the same rows in each step; None where that
        is not possible."""
        if recipe.training.packing == "step":
            lengths = compute.list_value_length(rows.rows.with_format("arrow")[:]["input_ids"])
            least = min(
                self.sequence, int(compute.max(lengths).as_py())
            )  # the longest row has a sequence to itself
            smaller = max(self.sequence // 2, least)
            return self._replace(sequence=smaller) if smaller < self.sequence else None
        total = self.per_device_train_batch_size * self.gradient_accumulation_steps
        fitting = [
            size
            for size in range(1, self.per_device_train_batch_size // 2 + 1)
            if total % size == 0
        ]
        if not fitting:
            return None
        return self._replace(
            per_device_train_batch_size=fitting[-1],
            gradient_accumulation_steps=total // fitting[-1],
        )

    def in_words(self, recipe: Recipe) -> str:
        """`sequences of 512 tokens`, or `batches of 4 rows, 2 per step`."""
        if recipe.training.packing == "step":
            return f"sequences of {self.sequence} tokens"
        return f"batches of {self.per_device_train_batch_size}, {self.gradient_accumulation_steps} per step"


def read_pieces(recipe: Recipe, run: Mapping[str, Any]) -> Pieces:
    """As the recipe has them, or as the run's record says that they became."""
    if run.get("reduced"):
        return Pieces(**run["reduced"][-1]["pieces"])
    training = recipe.training
    return Pieces(
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        min(training.max_length, step_packing.SEQUENCE),
    )


def apply_pieces(recipe: Recipe, pieces: Pieces) -> Recipe:
    """The recipe with these pieces; the sequence's length is no key of it."""
    changes = {
        name: getattr(pieces, name)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    }
    return recipe.replace(recipe.trainer, {"training": changes})


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the accelerator's or the host's memory is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in HOST)


def explain_out_of_memory(
    error: BaseException, recipe: Recipe, now: Pieces, smaller: Pieces | None, training: bool
) -> LoraError:
    """One message, with what would fit; `training` is False where memory ran out in an evaluation
    or the optimiser."""
    said = (str(error).splitlines() or ["the host's memory is used up"])[
        0
    ] or "the host's memory is used up"
    ways = []
    if not training:
        size = getattr(recipe.training, "per_device_eval_batch_size", None) or 8
        ways.append(f"--set training.per_device_eval_batch_size={max(1, int(size) // 2)}")
    elif smaller is not None and recipe.training.packing == "step":
        ways.append(
            f"--set training.on_oom=reduce goes on with {smaller.in_words(recipe)}, the same steps"
        )
    elif smaller is not None:
        ways.append(
            f"--set training.per_device_train_batch_size={smaller.per_device_train_batch_size} "
            f"--set training.gradient_accumulation_steps={smaller.gradient_accumulation_steps} "
            "makes the same steps "
            "(training.on_oom=reduce does so by itself)"
        )
    ways.append(memory.suggest_what_fits(recipe))
    return LoraError(f"out of memory with {now.in_words(recipe)}: {said}", "; or ".join(ways))


def train_through(
    trainer: Any,
    make: Callable[[], Any],
    checkpoint: Path | None,
    recipe: Recipe,
    rows: prepare.Prepared,
    run: dict[str, Any],
) -> tuple[int, float, dict[str, float]]:
    """Train from `checkpoint` to the end; the steps made, the mean loss of them all, and speed and
    memory.

    Where memory runs out amid a step and `training.on_oom` is reduce, the last step is saved, and a
    trainer that `make()` gives goes on from it; otherwise that is a LoraError.
    """
    while True:
        try:
            with trainer.signals.heard():
                result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            return (
                result.global_step,
                result.metrics["train_loss"],
                trainer.watch.effort(trainer.state),
            )
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            now = read_pieces(recipe, run)
            smaller = now.halved(recipe, rows)
            if recipe.training.on_oom == "stop" or not trainer.in_step or smaller is None:
                raise explain_out_of_memory(error, recipe, now, smaller, trainer.in_step) from error
        finally:
            trainer.watch.progress.clear()
        gc.collect()  # what the failed step held, now that its error is forgotten
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        checkpoint = trainer.save_last_step()
        step = trainer.state.global_step
        reduced = [*run.get("reduced", []), {"step": step, "pieces": smaller._asdict()}]
        run_folder.update_record(Path(recipe.output_dir), run, reduced=reduced)
        ui.warn(
            f"out of memory after step {step}: {now.in_words(recipe)} become "
            f"{smaller.in_words(recipe)}"
        )
        trainer = make()
