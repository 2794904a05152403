"""The shipped recipes that are made for a card fit it, by the memory plan and with a margin, for
bases of the size they speak of; and not a smaller card, so that the plan could have said no.

Hermetic: published configurations, no weights. Alone: pytest tests/plan/test_card_recipes.py
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from lora_cli.models import Base
from lora_cli.plan import auto, hardware, memory
from lora_cli.plan.hardware import GIB, Hardware
from lora_cli.recipe import Recipe, load
from tests import shapes


class Found(NamedTuple):
    recipe: Recipe
    need: float
    """In GiB."""
    device: Hardware


def plan(name: str, gpu: str, base: Path, *changes: str) -> Found:
    """What `lora plan NAME --gpu GPU` says of the recipe on this base."""
    device = hardware.parse_gpu(gpu)
    # a rehearsal less: `auto` takes another optimiser only where nothing else makes it fit
    given = [f"model.name_or_path={base}", "training.optim=adamw_torch_fused", *changes]
    recipe = load.load_recipe(Path(name), given)
    config = Base.of_recipe(recipe).config
    recipe, _ = auto.settle(recipe, config, device)
    forecast = memory.make_forecast(recipe, config, device)
    batch = memory.largest_batch(recipe)
    assert forecast.fits(batch) == (forecast.need(batch).total <= device.memory)
    return Found(recipe, forecast.need(batch).total / GIB, device)


@pytest.mark.parametrize(
    ("name", "gpu", "shape", "dtype", "free"),
    [
        ("qlora-8b", "RTX 4090", "Qwen3-8B-Base", "bfloat16", 22.0),
        ("qlora-8b", "RTX 3090", "Llama-3.1-8B", "bfloat16", 22.0),
        ("qlora-7b-t4", "T4", "Mistral-7B-v0.3", "float16", 14.0),
        ("qlora-7b-t4", "T4", "Qwen2.5-7B", "float16", 14.0),
        ("lora-1b-8gb", "RTX 4060", "OLMo-2-0425-1B", "bfloat16", 5.0),
        ("lora-1b-8gb", "RTX 3070", "Llama-3.2-1B", "bfloat16", 5.0),
    ],
)
def test_a_recipe_for_a_card_fits_it(
    name: str, gpu: str, shape: str, dtype: str, free: float, tiny: Path, tmp_path: Path
) -> None:
    found = plan(name, gpu, shapes.write_base(shape, tmp_path / "base", tiny / "model"))
    assert found.need < free < found.device.memory / GIB
    assert found.recipe.model.dtype == dtype
    assert found.recipe.training.max_length == 2048
    assert found.recipe.training.gradient_checkpointing is True


@pytest.mark.parametrize(
    ("name", "gpu", "shape", "changes"),
    [
        ("qlora-8b", "RTX 4060", "Llama-3.1-8B", []),
        ("qlora-7b-t4", "RTX 2060", "Mistral-7B-v0.3", []),
        # what its comment says
        ("qlora-7b-t4", "T4", "Mistral-7B-v0.3", ["training.gradient_checkpointing=false"]),
        ("lora-1b-8gb", "4GB", "OLMo-2-0425-1B", []),
    ],
)
def test_and_not_a_smaller_one(
    name: str, gpu: str, shape: str, changes: list[str], tiny: Path, tmp_path: Path
) -> None:
    base = shapes.write_base(shape, tmp_path / "base", tiny / "model")
    found = plan(name, gpu, base, *changes)
    assert found.need > found.device.memory / GIB


def test_the_bases_of_these_recipes_are_among_the_shapes() -> None:
    for name in ("qlora-8b", "qlora-7b-t4", "lora-1b-8gb"):
        base = load.load_recipe(Path(name)).model.name_or_path
        assert base.rpartition("/")[2] in shapes.SHAPES
