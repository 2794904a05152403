"""What a terminal shows of a run: numbers as they are, curves whole, nothing wider than the window;
and a real run on terminals of several sizes.

Hermetic: the tiny model, a pseudo-terminal, an emulator. Alone: pytest tests/train/test_picture.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from lora_cli.recipe import load
from lora_cli.train.picture import BARS, MOST, Curve, Picture, name_subject
from tests.terminals import Terminal, measure


def test_a_curve_keeps_its_shape_in_few_points() -> None:
    curve = Curve()
    for number in range(8):
        curve.add(number)
    assert curve.draw(20) == BARS
    assert curve.draw(4) == "▁▃▆█"
    curve.add(math.nan)
    curve.add(math.inf)
    assert curve.draw(20) == BARS
    assert Curve().draw(20) == ""
    for number in range(8, 100_001):
        curve.add(number)
    assert len(curve.points) < 2 * MOST
    assert curve.draw(8) == BARS
    joined = (len(curve.points) * curve.joined, len(curve._open))
    assert sum(joined) == 100_001
    flat = Curve()
    for _ in range(3):
        flat.add(2.5)
    assert flat.draw(9) == "▁▁▁"


def full() -> Picture:
    """A picture with all there may be."""
    picture = Picture(("qdora on SmolLM2-135M-Instruct", "train.jsonl and 3 more"), planned=3 << 30)
    picture.step, picture.steps, picture.left = 1240, 50_000, 7384.0
    picture.loss, picture.norm, picture.rate, picture.speed = 1.25, 0.834, 1.85e-4, 14_676.0
    picture.used, picture.memory, picture.peak = 0.44, 2 << 30, int(2.5 * (1 << 30))
    for number in range(400):
        picture.losses.add(1 / (number + 1))
    for step, loss in ((400, 2.0), (800, 1.5), (1200, 1.75)):
        picture.add_evaluation(step, {"eval_loss": loss})
    picture.sample = ("Reverse: jet fan red\n", "I am " * 90, "red fan jet")
    return picture


def texts(lines: list) -> list[str]:
    return ["".join(text for text, _ in line) for line in lines]


@pytest.mark.parametrize("columns", [36, 40, 75, 76, 80, 160])
@pytest.mark.parametrize("rows", [8, 24])
def test_nothing_is_wider_than_the_window_nor_higher(columns: int, rows: int) -> None:
    lines = texts(full().draw(columns, rows))
    assert len(lines) <= rows - 2
    assert all(len(line) <= max(columns, 40) - 1 for line in lines)
    assert any(line.startswith("step 1240/50000") and "2h03m left" in line for line in lines)


def test_every_number_is_shown() -> None:
    wide, narrow = ("\n".join(texts(full().draw(columns, 30))) for columns in (80, 40))
    for said in (wide, narrow):
        for word in ("qdora on SmolLM2-135M-Instruct", "train.jsonl and 3 more", "1.2500", "1.7500",
                     "best 1.5000 at", "1.85e-04", "0.834", "14,676 tokens/s", "MFU 44%"):  # fmt: skip
            assert word in said
        assert re.search(r"2.0 GiB( now)?, peak 2.5 GiB of 3.0 GiB", said)
        assert "now" in said and "red fan jet" in said
    assert len(re.findall("I am", wide)) > 30
    assert "…" in wide


def test_a_run_that_goes_on_takes_its_curves_up() -> None:
    lines = [{"step": 1, "eval_loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 4, "loss": 1.0},
             {"step": 4, "eval_loss": None}, {"step": 6, "loss": None}]  # fmt: skip
    picture = Picture()
    picture.recall(lines)
    assert picture.losses.points == [2.0, 2.0, 1.0, 1.0]
    assert (picture.best, picture.evaluations.points) == ((1, 3.0), [3.0])


def test_what_is_trained_on_what_is_said_by_last_names(write_recipe, tiny: Path) -> None:
    recipe = load.load_recipe(write_recipe("method: dora\n"))
    assert name_subject(recipe) == ("dora on tiny/model", "tiny/train.jsonl")
    text = f"data: {{path: null, max_rows: null, mix: [{{path: {tiny}/a.jsonl}}, {{path: [b.jsonl, c]}}]}}\n"
    recipe = load.load_recipe(write_recipe(text), ["model.name_or_path=org/name"])
    assert name_subject(recipe) == ("lora on name", "a.jsonl and 2 more")


def train(warm, recipe: Path, columns: int, rows: int = 24, **environment: str) -> Terminal:
    given = {"TERM": "xterm-256color", **environment}

    def run(path: str) -> int:
        return warm.run(["train", str(recipe)], terminal=path, environment=given).returncode

    return Terminal(run, columns, rows)


EVALUATED = (
    "training: {{max_steps: {}, per_device_train_batch_size: 2, logging_steps: 4, eval_strategy: steps, eval_steps: 4}}\n"
    "data: {{eval_path: {}, eval_split: 'train[:12]'}}\n"
)


@pytest.mark.parametrize(
    ("columns", "environment"), [(40, {}), (80, {"NO_COLOR": "1"}), (160, {})], ids=str
)
def test_a_run_shows_itself(
    warm, write_recipe, tiny: Path, tmp_path: Path, columns: int, environment: dict[str, str]
) -> None:
    path = write_recipe(EVALUATED.format(12, tiny / "eval.jsonl"))
    terminal = train(warm, path, columns, **environment)
    lines = terminal.end()
    assert terminal.result == 0, "\n".join(terminal.history())
    frames = terminal.frames()
    assert len(frames) >= 3
    for frame in frames:
        assert max(map(measure, frame)) < columns
    last = "\n".join(frames[-2])
    assert re.search(r"^lora on tiny/model", last, re.MULTILINE)
    assert re.search(r"^step 12/12 ━+", last, re.MULTILINE)
    assert re.search(r"^loss +\d\.\d{4} [▁▂▃▄▅▆▇█]{12}$", last, re.MULTILINE)
    assert re.search(r"^eval\S* +\d\.\d{4} [▁▂▃▄▅▆▇█]{2,3}  best", last, re.MULTILINE)
    assert ("\x1b[36m" in terminal.written.decode()) == ("NO_COLOR" not in environment)
    said = "".join(line.ljust(columns) for line in terminal.history())
    assert len(re.findall(r"step \d+: eval_loss \d\.\d{4}, perplexity", said)) == 3
    assert not re.search("[━▁▂▃▄▅▆▇█]|gradient norm", said)
    assert "".join(line.rstrip() for line in lines).endswith(str(tmp_path / "run" / "adapter"))
    assert not terminal.screen.cursor.hidden


def test_a_dumb_terminal_gets_plain_lines(warm, write_recipe) -> None:
    terminal = train(warm, write_recipe(), 80, TERM="dumb")
    said = "\n".join(terminal.end())
    assert terminal.result == 0
    assert b"\x1b" not in terminal.written
    assert re.search(r"^step 1/3  loss \d", said, re.MULTILINE)


def test_a_window_changes_and_ctrl_c_ends_a_run(
    warm, write_recipe, tiny: Path, tmp_path: Path
) -> None:
    path = write_recipe(EVALUATED.format(20000, tiny / "eval.jsonl"))
    terminal = train(warm, path, 100, 70)
    terminal.wait_for(r"step \d+/20000 ━*─+ .* left")
    while True:  # Ctrl-S: nothing is on its way while the window changes, nor half of a picture
        terminal.type("\x13")
        while terminal.read(0.3):
            pass
        if re.search(rb"\r\x1b\[\d+A$", terminal.written):
            break
        terminal.type("\x11")
        terminal.read(0.3)
    terminal.wrap_anew(44)
    terminal.type("\x11")
    lines = terminal.wait_for(r"^eval \d")
    terminal.type("\x03")
    starts = ("step", "loss", "eval ", "lr ", "mem ")
    drawn = [line for line in lines if line.startswith(starts) and "eval_loss" not in line]
    assert [line.split()[0] for line in drawn] == [start.strip() for start in starts], lines
    lines = terminal.end()
    assert terminal.result == 130, "\n".join(terminal.history())
    text = "".join(line.ljust(44) for line in terminal.history())
    assert "SIGINT: ends after this step and a" in text
    assert "stopped; from step " in text
    assert not any(re.search("[━▁▂▃▄▅▆▇█]", line) for line in lines)
    assert not terminal.screen.cursor.hidden
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["status"] == "interrupted"


def test_the_best_evaluation_is_told_by_the_run_s_metric() -> None:
    """Which may be better where it is greater, and is taken up again from metrics.jsonl."""
    picture = Picture(("lora", "rows"), metric="eval_accuracy", greater=True, steps=30)
    lines = [
        {"step": step, "eval_loss": loss, "eval_accuracy": share}
        for step, loss, share in ((10, 0.2, 0.5), (20, 0.9, 0.75), (30, 0.3, None))
    ]
    picture.recall(lines)
    assert picture.best == (20, 0.75)
    [said] = [line for line in texts(picture.draw(80, 24)) if "best" in line]
    assert said.startswith("accuracy       -") and said.endswith("best 0.7500 at step 20")
