"""What `make demo` shows: the rows it makes, and, slowly, that it comes to what it promises.

Hermetic: the rows are drawn by a seed; the model of the slow test is made of a package. Alone:
pytest tests/cli/test_demo.py, and with -m slow
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_cli.recipe.load import load_recipe
from scripts import make_orders

ROOT = Path(__file__).parent.parent.parent


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_word_of_a_held_out_order_is_trained(tmp_path: Path) -> None:
    trained, held_out = map(read_rows, make_orders.write_rows(tmp_path, 320, 200))
    assert (len(trained), len(held_out)) == (320, 200)
    seen: list[set[object]] = [set(), set()]
    for words, rows in zip(seen, (trained, held_out)):
        assert len({row["prompt"] for row in rows}) == len(rows)
        for row in rows:
            order = json.loads(row["completion"])
            assert list(order) == ["name", "city", "item", "quantity"]
            assert all(str(value) in row["prompt"] for value in order.values())
            first, last = order.pop("name").split()
            words |= {first, last, *order.values()}
    assert not seen[0] & seen[1]
    assert all(len(words) > 50 for words in seen)


def test_rows_are_drawn_by_a_seed(tmp_path: Path) -> None:
    drawn = [
        [path.read_bytes() for path in make_orders.write_rows(tmp_path / str(number), 20, 20, seed)]
        for number, seed in enumerate((0, 0, 1))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    layouts = {layout.split("{")[0] for layout in make_orders.LAYOUTS}
    assert len(layouts) >= 8, "several ways of writing an order"


def test_the_recipe_is_that_of_the_model_on_the_hub() -> None:
    recipe = load_recipe(Path("extract"))
    assert recipe.model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert recipe.data.format == "prompt_completion"


@pytest.mark.slow
def test_a_real_model_learns_the_task_in_every_form(real: Path, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/demo.py", "--out", str(tmp_path / "run")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    [header, shares] = re.findall(r"^base .*\n-.*\n(?= *[\d.]+%)|^ *[\d.]+%.*$", done.stdout, re.M)
    assert header.split()[:6] == ["base", "adapter", "merged", "f16", "q8_0", "Q4_K_M"]
    base, *others = [float(share.rstrip("%")) for share in shares.split()]
    assert base < 10 < 90 <= min(others), shares
    assert done.stdout.count("\nquestion: ") == 3
    assert re.search(r"^\{\"name\": .*\}$", done.stdout, re.M), "the served answer"
    assert re.search(r"^together +\d", done.stdout, re.M)
    assert (tmp_path / "run" / "report.html").is_file()
