"""After memory runs out: say what would fit, or make the same steps of smaller pieces.

`training.on_oom` decides between the two: `stop` or `reduce`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_cli.common import LoraError, ui
from lora_cli.data import prepare
from lora_cli.distributed import ranks
from lora_cli.plan import memory
from lora_cli.recipe import Recipe
from lora_cli.train import outcome
from lora_cli.train.run_folder import Run

SPELLINGS = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUDA error: out of memory",  # pinned memory, and bitsandbytes' own
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS found no room for its workspace
    "HIP error: out of memory",
    "MPS backend out of memory",
)
"""What the accelerators and the host say that is no torch.OutOfMemoryError."""


class Pieces(NamedTuple):
    """What one optimiser step is made of."""

    per_device_train_batch_size: int
    """Rows per forward pass."""
    gradient_accumulation_steps: int
    """Forward passes."""
    sequence: int
    """Tokens per sequence, where the rows of a step share sequences (`packing: step`)."""

    def halve(self, recipe: Recipe, rows: prepare.Prepared) -> Pieces | None:
        """About half as much in memory at a time, the same rows in a step; None if impossible."""
        if recipe.training.packing == "step":
            # the longest row has a sequence to itself
            least = min(self.sequence, int(prepare.find_lengths(rows.rows).max()))
            smaller = max(self.sequence // 2, least)
            return self._replace(sequence=smaller) if smaller < self.sequence else None
        total = self.per_device_train_batch_size * self.gradient_accumulation_steps
        half = self.per_device_train_batch_size // 2
        fitting = [size for size in range(1, half + 1) if total % size == 0]
        if not fitting:
            return None
        size = fitting[-1]
        return self._replace(
            per_device_train_batch_size=size, gradient_accumulation_steps=total // size
        )

    def describe(self, recipe: Recipe) -> str:
        """`sequences of 512 tokens`, or `batches of 4, 2 per step`."""
        if recipe.training.packing == "step":
            return f"sequences of {self.sequence} tokens"
        passes = self.gradient_accumulation_steps
        return f"batches of {self.per_device_train_batch_size}, {passes} per step"


def read_pieces(recipe: Recipe, run: Run) -> Pieces:
    """Return the pieces of the recipe, or the smaller ones that the run's record says they
    became."""
    if run.record.reduced:
        return Pieces(**run.record.reduced[-1].pieces.to_data())
    training = recipe.training
    return Pieces(
        training.per_device_train_batch_size,
        training.gradient_accumulation_steps,
        memory.find_packed_length(recipe),
    )


def apply_pieces(recipe: Recipe, pieces: Pieces) -> Recipe:
    """Return the recipe with these pieces; the sequence's length is the collator's."""
    changes = {
        "per_device_train_batch_size": pieces.per_device_train_batch_size,
        "gradient_accumulation_steps": pieces.gradient_accumulation_steps,
    }
    return recipe.replace(recipe.trainer, {"training": changes})


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the accelerator's or the host's memory is used up."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SPELLINGS)


def explain_out_of_memory(
    error: BaseException, recipe: Recipe, now: Pieces, smaller: Pieces | None, training: bool
) -> LoraError:
    """One error that says what would fit.

    `training` is False where memory ran out in an evaluation or in the optimiser.
    """
    first_line = str(error).partition("\n")[0] or "the host's memory is used up"
    ways = []
    if not training:
        size = getattr(recipe.training, "per_device_eval_batch_size", None) or 8
        ways.append(f"--set training.per_device_eval_batch_size={max(1, int(size) // 2)}")
    elif smaller is not None:
        ways.append(_suggest_smaller(recipe, smaller))
    ways.append(memory.suggest_what_fits(recipe))
    message = f"out of memory with {now.describe(recipe)}: {first_line}"
    return LoraError(message, "; or ".join(ways))


def _suggest_smaller(recipe: Recipe, smaller: Pieces) -> str:
    """Return what to type for the same steps in smaller pieces, which `reduce` is for where one
    process trains, or several that can be started again."""
    alone = ranks.count() == 1 or ranks.may_start_again()
    packed = recipe.training.packing == "step"
    if packed and alone:
        described = smaller.describe(recipe)
        return f"--set training.on_oom=reduce goes on with {described}, the same steps"
    if packed:
        return f"--set training.packed_length={smaller.sequence} makes the same steps"
    by_itself = " (training.on_oom=reduce does so by itself)" if alone else ""
    return (
        f"--set training.per_device_train_batch_size={smaller.per_device_train_batch_size} "
        f"--set training.gradient_accumulation_steps={smaller.gradient_accumulation_steps} "
        f"makes the same steps{by_itself}"
    )


def _choose_smaller(
    error: Exception, recipe: Recipe, now: Pieces, rows: prepare.Prepared, training: bool
) -> Pieces:
    """Return the pieces that this process goes on with after memory ran out. LoraError where it
    does not: several processes end, to be started again with them."""
    smaller = now.halve(recipe, rows)
    goes_on = recipe.training.on_oom == "reduce" and training
    if goes_on and smaller is not None and ranks.count() == 1:
        return smaller
    if goes_on and smaller is not None:
        _ask_for_smaller(recipe, now, smaller)
    raise explain_out_of_memory(error, recipe, now, smaller, training) from error


def _ask_for_smaller(recipe: Recipe, now: Pieces, smaller: Pieces) -> None:
    """Ask the launcher to start all of several processes again with smaller pieces: the others are
    amid the step, and wait for this one."""
    if ranks.may_start_again():
        ranks.ask_to_start_again(
            {
                "pieces": smaller._asdict(),
                "words": f"{now.describe(recipe)} become {smaller.describe(recipe)}",
            }
        )


def make_smaller(run: Run, step: int, asked: dict[str, Any]) -> None:
    """Note what a process has asked for before all are started again from the checkpoint of a
    step."""
    run.add_reduction(step, asked["pieces"])
    ui.warn(f"out of memory: {asked['words']}; all processes go on from step {step}")


def train_through(
    trainer: Any,
    make: Callable[[], Any],
    checkpoint: Path | None,
    recipe: Recipe,
    rows: prepare.Prepared,
    run: Run,
) -> outcome.Trained:
    """Train from `checkpoint` to the end, and return how that was.

    Where memory runs out amid a step and `training.on_oom` is reduce, the last step is saved, and a
    trainer that `make()` gives goes on from it; otherwise that is a LoraError, by which several
    processes end to be started again.
    """
    while True:
        try:
            with trainer.signals.listen():
                result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
            return outcome.describe_end(trainer, result.global_step, result.metrics["train_loss"])
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            now = read_pieces(recipe, run)
            smaller = _choose_smaller(error, recipe, now, rows, trainer.in_step)
        finally:
            trainer.watch.clear()
        gc.collect()  # the failed step's tensors, as its error no longer refers to them
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        checkpoint = trainer.save_last_step()
        step = trainer.state.global_step
        run.add_reduction(step, smaller._asdict())
        before, after = now.describe(recipe), smaller.describe(recipe)
        ui.warn(f"out of memory after step {step}: {before} become {after}")
        trainer = make()
