"""What tells others which lora this is: version, changelog, citation, and the forms for issues.

Hermetic: the schemas come with check-jsonschema. Alone: pytest tests/test_release.py
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lora_cli import __version__
from scripts import floors

ROOT = Path(__file__).parent.parent
FORMS = ROOT / ".github" / "ISSUE_TEMPLATE"
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
"""Of keepachangelog.com 1.1.0, in its order."""


def test_the_changelog_begins_with_this_version_and_so_does_the_citation() -> None:
    versions = re.findall(r"^## (.*)$", CHANGELOG, re.M)
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", each) for each in versions)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert versions[0] == f"[{__version__}] - {citation['date-released']}"
    assert citation["version"] == __version__
    assert len(versions) == len(set(versions)) >= 2


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    for version in re.split(r"^## .*$", CHANGELOG, flags=re.M)[1:]:
        kinds = re.findall(r"^### (.*)$", version, re.M)
        assert kinds == [kind for kind in KINDS if kind in kinds]
        for kind in re.split(r"^### .*$", version, flags=re.M)[1:]:
            points = kind.strip().splitlines()
            assert points
            assert all(line.startswith(("- ", "  ")) for line in points)


def test_what_the_changelog_names_is_there() -> None:
    links = re.findall(r"\]\((?!https:)([^)]+)\)", CHANGELOG)
    verbs = set(re.findall(r"`lora ([\w-]+)", CHANGELOG))
    assert len(links) >= 2
    assert len(verbs) >= 10
    assert not [link for link in links if not (ROOT / link).exists()]
    code = (
        "from lora_cli.cli import app; import typer; print(*typer.main.get_command(app).commands)"
    )
    known = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert verbs <= set(known.stdout.split())


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-issue-forms", [path for path in FORMS.glob("*.yml") if path.stem != "config"]),
        ("github-issue-config", [FORMS / "config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
        ("github-workflows", [*(ROOT / ".github" / "workflows").glob("*.yml")]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_for_others_programs_keep_to_their_schemas(schema: str, files: list[Path]) -> None:
    assert len(files) >= {"github-issue-forms": 3}.get(schema, 1)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_tests_that_run_with_the_lowest_versions_are_there() -> None:
    """And each file of Python that a script, the Makefile or a workflow names."""
    assert len(floors.TESTS) == 8
    gone = [each for each in floors.TESTS if not (ROOT / each).exists()]
    read = [
        ROOT / "Makefile",
        *(ROOT / ".github").rglob("*.yml"),
        *(ROOT / "scripts").rglob("*.py"),
    ]
    named = set(re.findall(r"\b(?:tests|scripts)/[\w/]+\.py\b", "".join(map(Path.read_text, read))))
    assert len(named) > 20
    assert gone + sorted(each for each in named if not (ROOT / each).is_file()) == []
