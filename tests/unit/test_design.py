"""The design's rules, read from the source: imports go downward, the start-up path is light, commands are documented.

Hermetic: reads this repository, starts Python. Alone: pytest tests/unit/test_design.py
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lora_cli import schema

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "lora_cli"

# The package's files; the reference is a folder of some.
FILES = {path.stem: [path] for path in PACKAGE.glob("*.py")} | {"reference": [*PACKAGE.glob("reference/*.py")]}

# Each file may import from the lines above its own only.
FLOORS = [
    {"__init__", "errors", "private"},
    {
        "imatrix_file",
        "gguf_file",
        "ui",
        "files",
        "fields",
        "foreign",
        "trust",
        "launcher",
        "patterns",
        "chat",
        "reference",
        "lock",
        "rng",
        "hardware",
        "flops",
    },
    {"yamlfile", "claims"},
    {"recipe", "record", "llama_cpp", "formats", "checkpoints", "signals"},
    {"tokens", "readers", "render", "shards", "gguf_mixture"},
    {"limits", "selection", "sources"},
    {"cache"},
    {
        "refusal",
        "targets",
        "recipe_file",
        "schema",
        "upstream",
        "model",
        "tokenizing",
        "data",
        "gguf",
        "verify",
        "llama_cpp_setup",
    },
    {"stream", "identity", "disk", "gguf_quantize"},
    {"attach", "origin"},
    {"walk"},
    {
        "whole",
        "weights",
        "watch",
        "oracle",
        "initial",
        "plan",
        "loss",
        "packing",
        "attention",
        "dropout",
        "norms",
        "dora",
        "factors",
        "parity",
        "preflight",
        "finite",
    },
    {"fused"},
    {"fold", "derived", "quick", "resumable"},
    {"rehearse"},
    {"memory"},
    {"oom"},
    {"answer", "trainers", "serving", "imatrix"},
    # the verbs never import each other
    {
        "train",
        "check",
        "planning",
        "merge",
        "compare",
        "export",
        "export_adapter",
        "generate",
        "doctor",
        "combine",
        "extract",
    },
    {"cli"},
    {"__main__"},
]


def imported(path: Path) -> set[str]:
    """Files of the package that `path` imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "lora_cli":
            names |= {alias.name if alias.name in FILES else "__init__" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_cli."):
            names.add(str(node.module).split(".")[1])
    return names


def test_imports_go_downward() -> None:
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    assert FILES.keys() == floor_of.keys()
    upward = {
        (name, other)
        for name, paths in FILES.items()
        for path in paths
        for other in imported(path) - {name if name == "reference" else ""}
        if floor_of[other] >= floor_of[name]
    }
    assert not upward


def test_the_reference_is_only_for_comparing() -> None:
    users = {name for name, paths in FILES.items() for path in paths if "reference" in imported(path)}
    assert users == {"reference", "oracle"}
    assert packages(FILES["reference"]) == {"torch", "safetensors"}


def packages(paths: list[Path]) -> set[str]:
    """What these files import beside this package and the standard library, anywhere in them."""
    imports = {
        name.split(".")[0]
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    return imports - set(sys.stdlib_module_names) - {"lora_cli"}


def test_what_is_imported_is_asked_for() -> None:
    asked = {Requirement(line).name.replace("-", "_") for line in importlib.metadata.requires("lora-cli") or []}
    used = packages([path for paths in FILES.values() for path in paths])
    assert {"torch", "numpy", "yaml"} < used
    assert {"pyyaml" if name == "yaml" else name for name in used} - asked == set()


def modules_after(arguments: list[str]) -> tuple[int, set[str], str]:
    """Exit status, what was imported, and stderr of the command line run with `arguments`."""
    code = f"import sys; sys.argv = ['lora', *{arguments!r}]\nfrom lora_cli.cli import main\n"
    code += "try:\n    main()\nfinally:\n    print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.returncode, set(done.stdout.rpartition("MODULES")[2].split()), done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"], ["schema"]])
def test_help_is_answered_without_torch(arguments: list[str]) -> None:
    status, modules, _ = modules_after(arguments)
    assert status == 0
    assert "typer" in modules
    assert not modules & {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy"}


def test_a_typo_is_answered_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("model: {name_or_path: x}\ndata: {path: y}\ntraining:\n  learning_rat: 1e-4\n")
    status, modules, stderr = modules_after(["train", str(path)])
    assert status == 2
    assert stderr == (
        f"error: {path}:4: training.learning_rat is not a known key\n\nhint: did you mean training.learning_rate?\n"
    )
    assert "pydantic" in modules
    assert not modules & {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy"}


def test_generated_documents_are_fresh() -> None:
    assert (ROOT / "configs" / "schema.json").read_text() == schema.json_text(), "make docs"
    assert (ROOT / "docs" / "recipe.md").read_text() == schema.markdown(), "make docs"


def test_the_readme_documents_every_command_and_file() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"@app\.command\((?:\"([\w-]+)\")?\)\ndef (\w+)", (PACKAGE / "cli.py").read_text())
    names = [given or function for given, function in commands]
    assert len(names) >= 7
    assert not [name for name in names if f"lora {name}" not in readme]
    assert not [path.name for path in PACKAGE.glob("*.py") if path.stem[0] != "_" and path.name not in readme]
    assert not [path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in readme]
