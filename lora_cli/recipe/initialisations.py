"""The table of what an adapter's A and B may start from: PEFT's names, what each needs and what
each does."""

from __future__ import annotations

from typing import NamedTuple


class Initialisation(NamedTuple):
    """One word that `lora.init_lora_weights` may be."""

    name: str
    needs_linear: bool = False
    """PEFT computes it from the weight of a Linear, so it does not work on embeddings, convolutions
    or 4-bit storage."""
    moves_base: bool = False
    """Training starts from s·B₀A₀ ≠ 0, which is taken off the base; the saved adapter has to make
    up for that."""
    changes_base_at_load: bool = False
    """PEFT computes it again when it loads an adapter that names it, and changes the base's
    weights."""
    repeated_at_load: bool = False
    """PEFT computes it again when it loads an adapter that names it, whether or not that changes
    the base."""
    config: str | None = None
    """The field of LoraConfig that holds its settings."""


TABLE = (
    Initialisation("gaussian"),
    Initialisation("orthogonal", needs_linear=True),
    Initialisation("mica", needs_linear=True),
    Initialisation("eva", repeated_at_load=True, config="eva_config"),
    Initialisation("loftq", changes_base_at_load=True, repeated_at_load=True),
    Initialisation("olora", True, True, True, True),
    Initialisation("pissa", True, True, True, True),
    Initialisation("corda", True, True, True, True, "corda_config"),
    Initialisation("lora_ga", True, True, True, True, "lora_ga_config"),
)
PATTERN = rf"^({'|'.join(each.name for each in TABLE)}|pissa_niter_[1-9]\d*)$"
"""A regular expression for the words that a recipe may write."""
CONFIGS = {each.name: each.config for each in TABLE if each.config}
INITIALISATION_SETTINGS = tuple(CONFIGS.values())
"""The fields of LoraConfig that hold them."""


def find_initialisation(written: object) -> Initialisation | None:
    """Return the row of a value of init_lora_weights (`pissa_niter_4` is pissa), or None for true,
    false and null."""
    name = str(written).partition("_niter")[0]
    return (
        next((each for each in TABLE if each.name == name), None)
        if isinstance(written, str)
        else None
    )
