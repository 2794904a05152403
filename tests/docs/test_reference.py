"""The generated pages of docs/reference: fresh, and true of the source and of files that lora
writes.

Hermetic: the tiny model, trained for a few steps. Alone: pytest tests/docs/test_reference.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from lora_cli.common import stored
from lora_cli.models import record
from scripts import make_reference
from scripts.reference import artefact_page, cli_page, environment_page, fields

ROOT = Path(__file__).parent.parent.parent
FREE = {
    "versions",
    "recipe",
    "base.fingerprint",
    "data.left_out",
    "scores",
    "sampling",
    "files",
    "parent",
    "kept_of",
}
FREE |= {
    "checked.rounded",
    "checked.before_rounding",
    "figures.likeness",
    "figures.base",
    "models.metrics",
}
FREE |= {
    "models.differences",
    "models.forgetting",
    "models.tasks",
    "data.stop_token_ids",
    "reduced",
}
"""Fields whose own names are not lora's, or are told in their meaning."""


@pytest.mark.parametrize("name", make_reference.PAGES)
def test_each_page_is_fresh(name: str) -> None:
    page = (ROOT / "docs" / "reference" / name).read_text()
    assert page == make_reference.PAGES[name](), "make docs"


def test_a_stale_page_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "reference").mkdir(parents=True)
    monkeypatch.setattr(make_reference, "ROOT", tmp_path)
    monkeypatch.setattr(make_reference, "PAGES", {"a.md": lambda: "as it is now"})
    assert make_reference.main(check=True) == 1
    assert "a.md is stale; hint: make docs" in capsys.readouterr().err
    assert make_reference.main(check=False) == 0
    assert make_reference.main(check=True) == 0


def test_the_readme_says_how_many_messages_there_are() -> None:
    page = (ROOT / "docs/reference/messages.md").read_text()
    told = re.search(r"Here are\s+(\d+) mistakes", page)
    assert told is not None
    assert f"[{told[1]} of them]" in (ROOT / "README.md").read_text()


def test_every_option_has_a_meaning() -> None:
    cells = [line.split(" | ") for line in cli_page.make_page().splitlines() if line[:3] == "| `"]
    assert len(cells) > 120
    assert not [cell for cell in cells if not cell[-1].strip(" |")]


def test_every_variable_of_the_source_is_described_and_no_other() -> None:
    used = environment_page.list_used()
    assert {"LORA_CACHE_DIR", "RANK", "TMPDIR"} <= used
    assert used == environment_page.list_described()


def list_fields(value: Any, above: str = "") -> Iterator[str]:
    """The dotted name of each field in what a file holds."""
    for name, below in value.items():
        dotted = f"{above}{name}"
        yield dotted
        if dotted not in FREE:
            for each in below if isinstance(below, list) else [below]:
                if isinstance(each, dict):
                    yield from list_fields(each, f"{dotted}.")


@pytest.fixture(scope="module")
def files(lora, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the files of a run, a merge, an export and an evaluation hold, by their names."""
    folder = tmp_path_factory.mktemp("artefacts")
    (folder / "r.yaml").write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 80, eval_fraction: 0.2}}\n"
        "training: {max_steps: 4, per_device_train_batch_size: 4, max_length: 128, logging_steps: 2,"
        " sample_prompts: [x], eval_strategy: steps, eval_steps: 2, save_strategy: steps, save_steps: 2}\n"
        "output_dir: run\n"
    )
    for words in (
        ["train", "r.yaml"],
        ["merge", "run/adapter", "run/merged"],
        ["export-gguf", "run/merged", "--quantize", "q8_0"],
        ["evaluate", "run/adapter", "--data", tiny / "eval.jsonl", "--max-rows", "4", "--max-new-tokens", "8"],
    ):  # fmt: skip
        done = lora(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    (gguf,) = folder.glob("run/merged/*.gguf.json")
    (evaluation,) = folder.glob("run/evaluations/*/evaluation.json")
    found = {
        "record.json": [folder / "run/record.json", folder / "run/adapter/lora_record.json"],
        "metrics.jsonl": [folder / "run/metrics.jsonl"],
        "samples.jsonl": [folder / "run/samples.jsonl"],
        "manifest.json": [folder / "run/checkpoint-4/manifest.json"],
        "lora_record.json": [folder / "run/merged/lora_record.json"],
        "MODEL.gguf.json": [gguf],
        "evaluation.json": [evaluation],
        "answers.jsonl": [evaluation.with_name("answers.jsonl")],
    }
    return {
        name: [
            json.loads(text)
            for path in paths
            for text in (
                path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            )
        ]
        for name, paths in found.items()
    }


@pytest.mark.parametrize("name", fields.FILES)
def test_each_field_of_a_file_is_described_and_no_other(
    name: str, files: dict[str, list[Any]]
) -> None:
    described = fields.FILES[name][1]
    found = {field for each in files[name] for field in list_fields(each)}
    needed = {f for f, meaning in described.items() if not artefact_page.is_optional(meaning)}
    assert found - described.keys() == set()
    assert needed - found == set()


def list_classes(model: type[stored.Stored], above: str = "") -> Iterator[str]:
    """The dotted name of each field that a class of a file has."""
    for name, field in model.model_fields.items():
        dotted = f"{above}{name}"
        yield dotted
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, stored.Stored) and dotted not in FREE:
                yield from list_classes(kind, f"{dotted}.")


def test_each_field_that_is_read_back_is_described() -> None:
    read = set(list_classes(record.TrainingRecord))
    assert len(read) > 30
    assert read - fields.RUN.keys() == set()


def test_each_file_of_a_run_is_named(files: dict[str, list[Any]]) -> None:
    page = artefact_page.make_page()
    assert not [name for name in files if f"## {name}" not in page]
