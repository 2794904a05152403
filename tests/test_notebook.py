"""The notebook runs from top to bottom, headless, in an empty folder; every cell ends well, and the
answers it leads to are there.

Hermetic: the tiny model, or SmolLM2 of a package (slow); no network. Alone: pytest
tests/test_notebook.py
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "first_adapter.ipynb"


def run(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Run the notebook in `folder` with this model; what each cell said, by its first telling
    line."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", programs)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(folder / ".ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    said = {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = [line for line in cell.source.splitlines() if line != "%%bash"]
            texts = [
                each.get("text") or each.get("data", {}).get("text/plain", "")
                for each in cell.outputs
                if each.get("name") != "stderr"  # what libraries say beside an answer
            ]
            said[lines[0]] = "".join(texts)
    return said


def find(said: dict[str, str], beginning: str) -> str:
    [text] = [text for line, text in said.items() if line.startswith(beginning)]
    return text


def test_it_is_kept_without_outputs_and_is_a_sound_notebook() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 9
    assert not [cell for cell in code if cell.outputs or cell.execution_count]
    links = [
        link
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for link in re.findall(r"\]\(([^)]+)\)", cell.source)
    ]
    assert links
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]


def check(said: dict[str, str], folder: Path) -> None:
    """What holds whatever the model is."""
    assert "wrote dates.yaml" in find(said, "lora init")
    assert "runs/dates/adapter" in find(said, "lora train")
    assert "model.safetensors" in find(said, "lora merge")
    steps = eval(find(said, "metrics ="))  # noqa: S307 – a list of pairs that this notebook printed
    assert len(steps) >= 2
    assert steps[-1][1] < steps[0][1]
    assert (folder / "runs/dates/report.html").is_file()


@pytest.mark.slow
def test_it_runs_with_the_tiny_model(tiny: Path, tmp_path: Path, monkeypatch) -> None:
    check(run(tiny / "model", tmp_path, monkeypatch), tmp_path)


@pytest.mark.slow
def test_it_teaches_the_real_model_what_it_says(real: Path, tmp_path: Path, monkeypatch) -> None:
    said = run(real, tmp_path, monkeypatch)
    check(said, tmp_path)
    assert find(said, "import torch").strip("'\n") == "2001-06-21"
    assert "1969-07-20" in find(said, "lora generate")
