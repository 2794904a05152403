"""Find what each shipped recipe needs, for `lora recipes` and docs/reference/recipes.md.

    python -m scripts.make_recipe_table         all, four minutes in one thread; no GPU, no hub
    python -m scripts.make_recipe_table chat    some

Memory is the memory plan's, for the published base's configuration: with sequences of the longest
row, where several rows share one (`auto` fills more of an empty card). A causal model is rehearsed
with two layers and with three, and the rest is counted up, as in scripts/make_gpu_table.py. Time is
what `lora plan` says for rows of so many tokens: at 40 % of the card's peak, which is assumed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from lora_cli.common import ui
from lora_cli.models import Base
from lora_cli.plan import auto, flops, hardware, memory, outlook, show, spread, weightless
from lora_cli.recipe import Recipe, load_recipe, recipe_table, shipped_recipes
from tests import pictures, shapes

TINY = Path(__file__).parent.parent / "build" / "tiny" / "model"
ROWS, TOKENS = 1000, 500
"""What the time is for."""
CARD = "L4"
CARDS = {"qlora-7b-t4": "T4"}
"""The card of a recipe that is made for one; of all others CARD, which has 24 GB."""
PROCESSES = {"two-gpus": 2}
DEPTHS = (2, 3)
HEADS = {
    "sequence_classification": "classifier",
    "token_classification": "classifier",
    "question_answering": "classifier",
    "image_classification": "classifier",
}
"""What a task's class has and the base's files lack, which is trained whole: training finds it by
the files themselves."""


@contextmanager
def open_base(name: str, depth: int | None) -> Iterator[Path]:
    """Yield a folder with the configuration of a published base, of its whole depth or of
    another."""
    kind = name.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as folder:
        base = shapes.write_base(kind, Path(folder) / "base", TINY)
        if depth is not None:
            config = {**shapes.SHAPES[kind], "num_hidden_layers": depth}
            (base / "config.json").write_text(json.dumps(config))
        if shapes.SHAPES[kind]["model_type"] == "vit":
            pictures.save_processor(base, 224)
        yield base


def load(name: str, base: Path, checkpointing: bool | None) -> Recipe:
    """Return a shipped recipe on this base, with what `auto` would take from the card's room
    settled."""
    recipe = load_recipe(Path(name))
    given = {"model.name_or_path": str(base), "training.optim": outlook.FASTEST_OPTIMIZER}
    if recipe.task_row.writes_next_tokens:
        given["training.packed_length"] = str(recipe.training.max_length)
    if recipe.task in HEADS:
        given["lora.modules_to_save"] = f"[{HEADS[recipe.task]}]"
    if checkpointing is not None:
        given["training.gradient_checkpointing"] = str(checkpointing).lower()
    return load_recipe(Path(name), [f"{key}={value}" for key, value in given.items()])


def settle(name: str, base: Path, checkpointing: bool | None) -> tuple[Recipe, Any]:
    """Return a recipe as it is settled for its card, and the configuration of its base."""
    loaded = load(name, base, checkpointing)
    config = Base.of_recipe(loaded).config
    return auto.settle(loaded, config, hardware.parse_gpu(CARDS.get(name, CARD)))[0], config


def build(name: str, checkpointing: bool | None) -> tuple[Recipe, PeftModel]:
    """Return a recipe as it is settled, and its whole network without weights."""
    with open_base(load_recipe(Path(name)).model.name_or_path, None) as base:
        recipe, config = settle(name, base, checkpointing)
        return recipe, weightless.build_adapted(recipe, config, *_find_new_rows(recipe, config))


def rehearse(name: str, depth: int | None, checkpointing: bool | None) -> dict[str, int]:
    """Return the bytes of a step by item, of a base of so many layers, or of all."""
    with open_base(load_recipe(Path(name)).model.name_or_path, depth) as base:
        recipe, config = settle(name, base, checkpointing)
        adapted = weightless.build_adapted(recipe, config, *_find_new_rows(recipe, config))
        forecast = memory.Forecast(recipe, adapted, hardware.parse_gpu(CARDS.get(name, CARD)))
        return dict(forecast.need(memory.largest_batch(recipe)).items)


def _find_new_rows(recipe: Recipe, config: Any) -> tuple[int, list[int]]:
    """Return how many rows the embeddings need, and those that are trained, as `build_adapted`
    takes them: the last ones, for tokens that the recipe adds."""
    count = len(recipe.model.add_special_tokens)
    return (
        (config.vocab_size, [config.vocab_size - 1 - at for at in range(count)])
        if count
        else (0, [])
    )


def count_items(name: str, layers: int | None, checkpointing: bool | None) -> dict[str, int]:
    """Return the bytes of a step by item: of the whole base, or on the line through DEPTHS."""
    if layers is None:
        return rehearse(name, None, checkpointing)
    few, more = (rehearse(name, depth, checkpointing) for depth in DEPTHS)
    share = (layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return {item: round(few[item] + (more[item] - few[item]) * share) for item in few}


def foresee(name: str) -> dict[str, Any]:
    """Return what a shipped recipe needs of its card, and how long it takes for ROWS there."""
    device = hardware.parse_gpu(CARDS.get(name, CARD))
    loaded = load_recipe(Path(name))
    layers = None
    if loaded.task_row.writes_next_tokens:
        layers = shapes.SHAPES[loaded.model.name_or_path.rpartition("/")[2]]["num_hidden_layers"]
    given = loaded.training.gradient_checkpointing
    for checkpointing in (False, True) if given == "auto" else (given,):
        recipe, adapted = build(name, checkpointing)
        items = count_items(name, layers, checkpointing)
        parts = spread.take_apart(recipe, items, adapted)
        need = parts.measure(PROCESSES.get(name, 1))
        if need <= device.memory:
            break
    if need > device.memory:
        raise SystemExit(f"{name} does not fit a card of {device}")
    return {
        "card": CARDS.get(name, CARD),
        "cards": PROCESSES.get(name, 1),
        "gib": round(need / hardware.GIB, 1),
        "seconds": _measure_time(recipe, adapted, device, PROCESSES.get(name, 1)),
    }


def _measure_time(
    recipe: Recipe, adapted: PeftModel, device: hardware.Hardware, cards: int
) -> float | None:
    """Return the seconds of ROWS rows, of two digits; None where the card's peak is not known."""
    peak = flops.find_peak(device.name, recipe.model.dtype)
    if peak is None:
        return None
    if recipe.task_row.reads_pictures:
        work = ROWS * flops.count_per_picture(adapted, (224, 224))
    else:
        work = ROWS * TOKENS * flops.count_per_token(adapted, TOKENS)
    return float(f"{work / (show.ASSUMED_USE * peak * cards):.2g}") or None


def main() -> None:
    """Write the plans of the recipes that are named, or of all."""
    warnings.simplefilter("ignore")
    plans = recipe_table.read_plans()
    every = [recipe.name for recipe in shipped_recipes.list_recipes()]
    for name in sys.argv[1:] or every:
        plans[name] = foresee(name)
        ui.say(f"{name}: {plans[name]}")
    lines = [f"  {json.dumps(name)}: {json.dumps(plans[name])}" for name in every if name in plans]
    recipe_table.PLANS.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
