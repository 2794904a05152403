"""`lora check`: what it shows is what training then does, and what would waste a run exits 1 before
weights are loaded.

Hermetic: the tiny model and files made here. Alone: pytest tests/plan/test_check.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from lora_cli.common.errors import UsageError
from lora_cli.data.selection import Counts
from lora_cli.models.base import Base
from lora_cli.plan import check, sizes
from lora_cli.recipe import load
from lora_cli.train import run as train


@pytest.fixture
def report(write_recipe, capsys: pytest.CaptureFixture[str]):
    """`report(recipe text, …)` is the JSON of `lora check`."""

    def run(text: str = "", samples: int = 3) -> dict:
        check.show_check(load.load_recipe(write_recipe(text)), samples, True)
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_shown_is_what_training_does(
    report, write_recipe, tmp_path: Path, packing: bool
) -> None:
    more = "packing: true, " if packing else ""
    text = (
        f"training: {{{more}max_steps: -1, num_train_epochs: 2, gradient_accumulation_steps: 3}}\n"
    )
    shown = report(text)
    train.train(load.load_recipe(write_recipe(text)))
    run = json.loads((tmp_path / "run" / "record.json").read_text())
    assert shown["plan"]["steps"] == run["results"]["steps"]
    assert shown["plan"]["packed"] is packing
    assert 0.8 < shown["plan"]["fill"] <= 1
    counted = {key: run["parameters"][key] for key in ("trainable", "modules")}
    assert shown["adapter"] == counted | {"left_out": ""}
    for key in ("read", "rows", "tokens", "trained_tokens", "left_out", "fingerprint"):
        assert shown["train"][key] == run["data"][key], key
    # how documents attend is known when the weights are there
    assert shown["choices"] == [
        choice for choice in run["choices"] if choice["name"] != "model.attn_implementation"
    ]


def test_samples_set_apart_what_is_trained(report, tiny: Path) -> None:
    shown = report(samples=2)
    row = json.loads((tiny / "train.jsonl").read_text().splitlines()[1])
    sample = shown["samples"][1]
    assert sample["place"] == f"{tiny / 'train.jsonl'}:2"
    assert [run["trained"] for run in sample["runs"]] == [False, True]
    assert sample["runs"][1]["text"] == row["completion"] + "<|end|>"
    assert len(shown["samples"]) == 2


def test_it_is_read_without_colour(lora, report, write_recipe, tiny: Path) -> None:
    tokens = report()["train"]["tokens"]
    done = lora("check", write_recipe(), "--samples", "1")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    row = json.loads((tiny / "train.jsonl").read_text().splitlines()[0])
    assert f"⟦{row['completion']}<|end|>⟧" in done.stdout
    assert "adapter: 131,072 parameters in 14 modules" in done.stdout
    assert f"16 steps and {tokens:,} tokens an epoch, 3 steps in all" in done.stdout


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("data: {path: nowhere.jsonl}\n", 1, "nowhere.jsonl does not exist"),
        (
            "training: {max_length: 4}\n",
            1,
            "no rows are left to train on: 64 read (64 dropped: over 4 tokens)",
        ),
        ("lora: {target_modules: [q_prj]}\n", 2, "did you mean q_proj?"),
        ("data: {columns: {prompt: questoin}}\n", 1, "data.columns: there is no column questoin"),
    ],
)
def test_what_would_waste_a_run_is_refused(
    lora, write_recipe, text: str, status: int, said: str
) -> None:
    done = lora("check", write_recipe(text))
    assert done.returncode == status
    assert said in done.stderr
    assert "Loading weights" not in done.stderr


def test_the_expected_padding() -> None:
    """Against every batch of two of three rows, drawn with replacement."""
    lengths = [10, 20, 60]
    longest = sum(max(a, b) for a in lengths for b in lengths) / 9
    assert sizes.estimate_padded_fill([Counter(lengths)], 2) == pytest.approx(30 / longest)
    assert sizes.estimate_padded_fill([{7: 5}], 4) == pytest.approx(1)


def test_the_histogram_counts_every_row() -> None:
    lengths = Counts().lengths
    lengths.update({3: 5, 40: 7, 101: 2})
    lines = check._format_histogram(lengths, 100)
    assert [line.split()[:2] for line in lines[1:2]] == [["1-4", "5"]]
    assert sum(int(line.replace("over 100", "over").split()[1]) for line in lines[1:]) == 14
    assert lines[-1].split()[:3] == ["over", "100", "2"]


def test_the_lengths_that_hold_most_rows() -> None:
    assert check._format_quantiles(Counter({3: 50, 40: 45, 101: 5})) == (
        "half of the rows have up to 3 tokens, 95% up to 40, all up to 101"
    )
    assert (
        check._format_quantiles(Counter({7: 1}))
        == "half of the rows have up to 7 tokens, 95% up to 7, all up to 7"
    )


def test_training_refuses_names_before_weights_are_loaded(
    write_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "load", None)
    with pytest.raises(UsageError, match="q_prj"):
        train.train(load.load_recipe(write_recipe("lora: {target_modules: [q_prj]}\n")))
