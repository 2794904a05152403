"""Find a method, a batch and a length with which a recipe's steps fit into this machine's
memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_cli.common import LoraError, ui
from lora_cli.drafts.draft import Draft
from lora_cli.models import Base
from lora_cli.plan import hardware, memory, settled, weightless

SAFE = 0.9
"""Of the device's memory, what is planned to be used."""
ROUND = 64
"""What lengths are a multiple of."""
SHORTEST = 128
"""Tokens of a length below which rows are not cut to make them fit."""
METHODS = ("lora", "qlora")
SIZE, LENGTH = "training.per_device_train_batch_size", "training.max_length"
AGAIN = "training.gradient_checkpointing"
PASSES = "training.gradient_accumulation_steps"


class Fit(NamedTuple):
    """A recipe that fits, as the draft now has it."""

    found: settled.Settled
    total: int
    """Parameters of the base with its adapter."""
    trained: int
    need: memory.Need | None
    """None where the memory cannot be foreseen."""

    def describe(self) -> str:
        """Say what it needs of the device."""
        device = self.found.device
        name = "this machine" if device.kind == "cpu" else device.name
        if self.need is None:
            return f"whether it fits into {name} cannot be foreseen"
        needed = memory.format_bytes(self.need.total)
        return f"needs {needed} of {device.memory / hardware.GIB:.1f} GiB on {name}"


def list_methods(draft: Draft, asked: str | None, base: Base) -> Sequence[str]:
    """Return the methods that are tried, the first that fits is taken: the one that is asked for,
    or that a base which is stored in 4 bits already has."""
    if draft.is_given("method"):
        return [draft.read("method")]
    if asked is not None:
        return [asked]
    stored = base.quantised
    return METHODS[1:] if stored is not None and stored.in_4bit else METHODS


def fit(draft: Draft, methods: Sequence[str], device: hardware.Hardware | None = None) -> Fit:
    """Put a method into the draft that fits a device, by default this machine's; where none does,
    smaller batches, and then shorter rows. Raises LoraError where nothing fits."""
    for method in methods:
        draft.put("method", method)
        for _ in _walk_sizes(draft):
            made, forecast = _foresee(draft, device)
            if forecast is None or _is_safe(forecast, made.need):
                return made
    assert forecast is not None
    length = 0 if draft.is_given(LENGTH) else _find_length(draft, forecast)
    if length < SHORTEST:
        raise LoraError(
            f"{methods[-1]} on {made.found.base.name} {made.describe()}, which is too much",
            "give --model a smaller base",
        )
    draft.put(LENGTH, length, "tokens, the most that fit; longer rows are left out")
    ui.say(f"  rows of over {length:,} tokens do not fit ({LENGTH})")
    return _foresee(draft, device)[0]


def _find_length(draft: Draft, forecast: memory.Forecast) -> int:
    """Return the longest rows that fit with some room; 0 for pictures, which have one size."""
    if forecast.recipe.task_row.reads_pictures:
        return 0
    batch, most = memory.largest_batch(forecast.recipe), draft.read(LENGTH)
    found = forecast.largest(lambda n: batch._replace(length=n), most, most)
    return int(found * SAFE) // ROUND * ROUND


def _walk_sizes(draft: Draft) -> Iterator[None]:
    """Put what needs ever less into the draft, once for each: activations that are computed again,
    and smaller batches with as many rows in a step. Where rows share sequences, these are as long
    whatever the batch."""
    draft.put(AGAIN, None)
    yield
    if not draft.is_given(AGAIN):
        draft.put(AGAIN, True, "a step does not fit without")
        yield
    shares = draft.build().task_row.writes_next_tokens
    while not shares and not draft.is_given(SIZE) and draft.read(SIZE) > 1:
        draft.put(SIZE, draft.read(SIZE) // 2, "rows, in one pass: more do not fit")
        draft.put(PASSES, (draft.read(PASSES) or 1) * 2, "passes a step")
        yield


def _foresee(draft: Draft, device: hardware.Hardware | None) -> tuple[Fit, memory.Forecast | None]:
    """Return the draft settled, with its forecast if its memory can be foreseen."""
    found = settled.settle_recipe(draft.build(), device)
    trained = total = 0
    try:
        adapted = weightless.build_adapted(found.recipe, found.base.config)
        trained, total = adapted.get_nb_trainable_parameters()
        forecast = memory.Forecast(found.recipe, adapted, found.device)
        need = forecast.need(memory.largest_batch(found.recipe))
    except weightless.Unforeseen:
        return Fit(found, total, trained, None), None
    return Fit(found, total, trained, need), forecast


def _is_safe(forecast: memory.Forecast, need: memory.Need | None) -> bool:
    return need is not None and need.total <= SAFE * forecast.device.memory
