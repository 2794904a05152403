"""Try the lowest versions that lora says it works with: `make floors`.

An environment in build/floors gets the lower end of every dependency's range, torch excepted, which
it has from the environment this runs in, as the test tools; then the tests named below run there.
Some of the lowest versions have no wheel for a Python after 3.11; there pip says which.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "floors"
ABOVE_TORCH = ("accelerate", "bitsandbytes", "peft", "trl")
"""They ask for torch, several gigabytes: installed without what they ask for."""
DOCUMENTS = "tests/test_design.py::test_generated_documents_are_fresh"
"""Left out: the references list the fields of the tested versions."""
TESTS = [
    "tests/recipe",
    "tests/common",
    "tests/test_design.py",
    "tests/test_portable.py",
    "tests/common/test_lock.py",
]
TESTS += [
    "tests/models/test_chat_template.py",
    "tests/data/test_prepare.py",
    "tests/merge/test_merge.py",
]


def find_floors() -> dict[str, str]:
    """Package -> lowest version of its range, for each dependency but torch."""
    floors = {}
    for requirement in map(Requirement, importlib.metadata.requires("lora-cli") or []):
        if requirement.marker is None and requirement.name != "torch":
            [floor] = [each.version for each in requirement.specifier if each.operator == ">="]
            floors[requirement.name] = floor
    return floors


def make_environment(floors: dict[str, str]) -> Path:
    """Install the floors into build/floors; the Python there."""
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", "--clear", str(FOLDER)], check=True
    )
    python = FOLDER / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--quiet",
        "--only-binary=:all:",
    ]
    pins = {name: f"{name}=={version}" for name, version in floors.items()}
    above = [pins.pop(name) for name in ABOVE_TORCH]
    subprocess.run([*pip, *pins.values()], check=True)
    subprocess.run([*pip, "--no-deps", *above], check=True)
    [site] = FOLDER.rglob("site-packages")
    (site / "the_rest.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def main() -> int:
    """Exit status of the tests."""
    floors = find_floors()
    print("lowest:", *(f"{name} {version}" for name, version in floors.items()))
    python = make_environment(floors)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pytest = [str(python), "-m", "pytest", "-q", "--deselect", DOCUMENTS, *TESTS]
    return subprocess.run(pytest, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
