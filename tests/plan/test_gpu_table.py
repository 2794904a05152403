"""The table of docs/how-to/gpu.md is what its script makes now, and its figures are the plan's for
whole bases.

Hermetic: published configurations, no weights. Alone: pytest tests/plan/test_gpu_table.py
All of it: pytest -m slow tests/plan/test_gpu_table.py
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from lora_cli.plan import auto, hardware, memory

ROOT = Path(__file__).parent.parent.parent
SPEC = importlib.util.spec_from_file_location(
    "make_gpu_table", ROOT / "scripts" / "make_gpu_table.py"
)
assert SPEC is not None
assert SPEC.loader is not None
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)
SAMPLE = {("0.5B (Qwen2.5)", "lora"), ("8B (Llama 3.1)", "qlora")}
EVERY = [(name, method) for name in table.SHAPES for method in table.METHODS]


def read_table() -> list[str]:
    text = table.DOCUMENT.read_text(encoding="utf-8")
    return text.split(table.BEGIN)[1].split(table.END)[0].splitlines(keepends=True)


@pytest.mark.parametrize(
    ("name", "method"),
    [each if each in SAMPLE else pytest.param(*each, marks=pytest.mark.slow) for each in EVERY],
)
def test_a_row_is_what_the_script_makes_now(name: str, method: str) -> None:
    row = next(row for row in read_table() if row.startswith(f"| {name} | `{method}` |"))
    assert row == table.make_row(name, method), "make docs"


def test_the_table_has_every_base_method_and_card() -> None:
    head, _, *rows = read_table()
    assert head.split("|")[3:-1] == [f" {size} " for size in table.CARDS.values()]
    assert [tuple(re.split(r" *\| *`?|` *", row)[1:3]) for row in rows] == [
        (name, method) for name, method in EVERY
    ]
    assert all(row.count("|") == len(table.CARDS) + 3 for row in rows)
    cells = {cell.strip() for row in rows for cell in row.split("|")[3:-1]}
    assert {"–", "8k"} < cells  # it says what does not fit as well


@pytest.mark.parametrize("checkpointing", [True, False])
def test_memory_grows_alike_with_every_layer(checkpointing: bool) -> None:
    shape = table.SHAPES["1B (Llama 3.2)"]
    whole = table.count_bytes(shape, "lora", checkpointing, shape.layers)
    assert table.foresee(shape, "lora", checkpointing) == pytest.approx(whole, rel=1e-3)


def test_a_cell_is_the_longest_that_fits() -> None:
    needs = [1, 2, 4, 8]
    assert [table.find_longest(needs, room) for room in (0, 1, 3, 4, 9)] == [
        "–", "1k", "2k", "4k", "8k"
    ]  # fmt: skip


def test_what_the_table_says_is_what_lora_plan_says() -> None:
    # the same recipe for one card, by the way that `lora plan` goes
    device = hardware.parse_gpu("RTX 4060")
    shape = table.SHAPES["0.5B (Qwen2.5)"]
    config = shape.configure(shape.layers)
    row = next(row for row in read_table() if row.startswith("| 0.5B (Qwen2.5) | `lora` |"))
    with_it, without = re.fullmatch(r" (\d)k \((\d)k\) ", row.split("|")[3]).groups()
    for checkpointing, longest in ((True, int(with_it)), (False, int(without))):
        for length, fits in ((longest, True), (2 * longest, longest == 8)):
            recipe = table.make_recipe("lora", checkpointing, min(length, 8) * 1024)
            settled, _ = auto.settle(recipe, config, device)
            batch = memory.largest_batch(settled)
            assert memory.make_forecast(settled, config, device).fits(batch) == fits
