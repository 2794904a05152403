"""A `lora train` that is timed: tokens a second after the first steps, and the most memory."""

from __future__ import annotations

import json
from pathlib import Path

from gpu_parts import levers, runs
from gpu_parts.part import Bench, Figures
from gpu_parts.report import Column
from lora_cli.data import load
from lora_cli.plan import memory, settled
from lora_cli.recipe import load_recipe

COLUMNS = (
    Column("tokens/s", "tokens_per_s"),
    Column("step ms", "step_ms"),
    Column("between steps ms", "between_ms", 1),
    Column("TFLOP/s", "tflops"),
    Column("MFU, sheet", "mfu", 1, 100, "%"),
    Column("of the measured product", "of_ceiling", 1, 100, "%"),
    Column("allocated MiB", "allocated_mib"),
    Column("reserved MiB", "reserved_mib"),
    Column("planned MiB", "planned_mib"),
    Column("planned/allocated", "planned_share", 2),
)
LONGEST = 1024
"""Tokens of the longest row that recipes allow where nothing is said of sequences: `auto` plans
for such a row."""
STEPS = 7
"""Steps of a run that is timed; the first runs.WARM are not."""


def measure(
    bench: Bench,
    name: str,
    model: Path,
    rows: Path,
    changes: Figures,
    names: list[str] | None = None,
    plans: bool = False,
    **seen: int,
) -> Figures:
    """Train on a model and rows with the recipe's `changes` and these levers; return speed and
    memory. `plans`: what `lora plan` foresees too; `seen` is for the observer."""
    training = changes.get("training", {})
    # a step that is logged waits for its numbers
    usual = {"max_steps": STEPS, "max_length": LONGEST, "logging_steps": STEPS}
    recipe = runs.write_recipe(
        runs.make_folder(bench, name),
        model,
        rows,
        changes | {"training": usual | training},
    )
    observer = runs.Observer(bench.clock, **seen)
    with levers.use(bench, names or []):
        found = foresee(recipe) if plans else {}
        bench.clock.free()
        found |= bench.clock.read_held()
        losses = runs.train(recipe, observer)
    found |= observer.measure_speed() | bench.clock.read_memory()
    if "planned_mib" in found and "allocated_mib" in found:
        found["planned_share"] = found["planned_mib"] / found["allocated_mib"]
    ceiling = bench.read_earlier("ground", "ceilings").get("product_tflops")
    if ceiling:
        found["of_ceiling"] = found["tflops"] / ceiling
    record = json.loads((recipe.parent / "run/record.json").read_text(encoding="utf-8"))
    chosen = {each["name"]: each["value"] for each in record["choices"]}
    found["chosen"] = {key: chosen[key] for key in sorted(chosen) if key in SHOWN}
    found["loss"] = losses[-1]["loss"]
    if observer.waits:
        found["waits"] = dict(observer.waits.most_common(20))
    return found | ({"profile": observer.profile} if observer.profile else {})


SHOWN = (
    "model.dtype",
    "model.attn_implementation",
    "training.gradient_checkpointing",
    "training.packed_length",
)


def foresee(path: Path) -> Figures:
    """Return in MiB what `lora plan` says of a recipe's memory, without what it sets aside for
    CUDA, which no allocator counts, and without its search for the largest batch."""
    found = settled.settle_recipe(load_recipe(path))
    recipe, base = found.recipe, found.base
    rows, _ = load.load_rows(recipe, base.load_tokenizer())
    forecast = memory.make_forecast(recipe, base.config, found.device)
    needed = forecast.need(memory.largest_batch(recipe, rows)).items
    items = {name: size / 2**20 for name, size in needed.items()}
    total = sum(size for name, size in items.items() if name != memory.RESERVE)
    return {"planned_mib": total, "planned_items_mib": items}
