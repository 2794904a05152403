"""Write a real data set for classification: docstrings, told apart by the package they are of.

    python scripts/docstrings.py OUT

writes OUT/train.jsonl and OUT/test.jsonl, rows of text and label, drawn from the public functions
and classes of eight packages that lora installs: 300 of each, one in six held out. No docstring is
on both sides, and none names its own package. Which there are, the installed versions decide.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "pandas",
    "datasets",
    "huggingface_hub",
    "sympy",
    "peft",
)
EACH = 300
HELD_OUT = 6
SHORTEST = 60


def find_docstrings(package: str) -> Iterator[str]:
    """Yield the docstrings of a package's functions and classes, without importing it."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations, f"{package} is not installed"
    for file in sorted(Path(found.submodule_search_locations[0]).rglob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and test data of theirs
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST and package not in text.lower():
                    yield text


def main() -> None:
    """Write both files."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(0)
    sides: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    seen: set[str] = set()
    for package in PACKAGES:
        texts = sorted(set(find_docstrings(package)) - seen)
        seen |= set(texts)
        for number, text in enumerate(drawn.sample(texts, min(EACH, len(texts)))):
            side = "train" if number % HELD_OUT else "test"
            sides[side].append({"text": text, "label": package})
    for side, rows in sides.items():
        drawn.shuffle(rows)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (out / f"{side}.jsonl").write_text(lines, encoding="utf-8")
        sys.stdout.write(f"{out / side}.jsonl: {len(rows)} rows\n")


if __name__ == "__main__":
    main()
