"""Whether the rows of a step share sequences in this base: by which attention, of what length."""

from __future__ import annotations

from transformers import PreTrainedModel

from lora_cli.common import ui
from lora_cli.data import selection
from lora_cli.models import Base, find_positions
from lora_cli.plan import auto_choices, memory
from lora_cli.recipe import Recipe
from lora_cli.speed import document_attention, step_packing
from lora_cli.train.run_folder import Run


def settle_packing(recipe: Recipe, base: PreTrainedModel, run: Run) -> Recipe:
    """Install attention by document if the recipe leaves it open and the base's own lacks it, and
    try on the base that rows of a sequence do not see each other.

    Return the recipe, with padded batches for a base in which they do; and with sequences no longer
    than on a CPU where the attention that long ones want did not do.
    """
    if not recipe.task_row.writes_next_tokens:
        return recipe
    packed = recipe.training.packing == "step"
    longest = recipe.training.max_length if packed else None
    as_on_cpu = min(recipe.training.max_length, step_packing.SEQUENCE)
    apart = not recipe.model.attn_implementation and document_attention.install(base, longest)
    why = _try_packing(recipe, base, apart) if packed else None
    if why and apart:
        document_attention.remove(base)
        ui.say(f"  attention by document is left out: {why}")
        apart, recipe = False, _shorten(recipe, run, as_on_cpu, THROUGH_MASK)
        why = _try_packing(recipe, base, False)
    elif packed and not apart and not document_attention.takes_bounds(base):
        recipe = _shorten(recipe, run, as_on_cpu, THROUGH_MASK)
    if not recipe.model.attn_implementation:
        _say_attention(base, run, apart)
    if why is None:
        return recipe
    ui.say(f"  training.packing = false: {why}")
    padded = {"packing": False, "packed_length": None}
    return recipe.replace(recipe.trainer, {"training": padded})


THROUGH_MASK = "rows attend through a mask in this base"


def fit_positions(recipe: Recipe, base: Base, run: Run) -> Recipe:
    """Return the recipe with sequences that a base's table of positions holds, where `auto` made
    them longer: that a place is not in the table spoils a GPU's whole process."""
    if memory.find_packed_length(recipe) <= step_packing.SEQUENCE:
        return recipe
    found = find_positions(base)
    if found is None or not found.ends:
        return recipe
    return _shorten(recipe, run, found.number, "the base has a table of so many positions")


def _shorten(recipe: Recipe, run: Run, length: int, reason: str) -> Recipe:
    """Return the recipe with sequences of `length` tokens, where `auto` made them longer."""
    chosen = run.has_choice("training.packed_length")
    if not chosen or memory.find_packed_length(recipe) <= length:
        return recipe
    choice = auto_choices.Choice("training.packed_length", length, reason)
    run.replace_choice(choice)
    ui.say(f"  {choice}")
    return recipe.replace(recipe.trainer, {"training": {"packed_length": length}})


def _try_packing(recipe: Recipe, base: PreTrainedModel, apart: bool) -> str | None:
    """Return why rows of a step cannot share sequences in a base; None if they can.

    An attention of lora's own (`apart`) may be none for this base: what it raises is a reason.
    """
    try:
        longest = max(each.total for each in selection.list_limits(recipe))
        pair = longest if recipe.objective_row.has_pairs else 0  # it is not parted
        return step_packing.find_unsuitable(base, max(pair, memory.find_packed_length(recipe)))
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        if not apart:
            raise
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _say_attention(base: PreTrainedModel, run: Run, apart: bool) -> None:
    """Say, and record, by which attention the base trains."""
    reason = (
        "each document of a sequence by itself, the same for less time"
        if apart
        else "what the model has"
    )
    choice = auto_choices.Choice(
        "model.attn_implementation", base.config._attn_implementation, reason
    )
    run.replace_choice(choice)
    ui.say(f"  {choice}")
