"""The GPU benchmark runs through on a processor, and what goes wrong in one case leaves the others
alone; its wheels are packed again rightly.

Needs no GPU and no network. Alone: pytest -m "slow or not slow" tests/gpu/test_bench_gpu.py
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import math
import subprocess
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module", autouse=True)
def scripts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield


def run(out: Path, tiny: Path, *words: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "scripts/bench_gpu.py",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*command, "--model", str(tiny), *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "report.json").read_text())


def walk_numbers(found: Any) -> Iterator[float]:
    if isinstance(found, (dict, list)):
        for each in found.values() if isinstance(found, dict) else found:
            yield from walk_numbers(each)
    elif isinstance(found, float):
        yield found


@pytest.mark.slow
def test_a_case_that_goes_wrong_leaves_the_others_alone(tmp_path: Path, tiny: Path) -> None:
    words = ("--also", "tests.gpu.planted", "--only", "ground,packing")
    parts = run(tmp_path, tiny, *words)["parts"]
    assert list(parts) == ["planted", "ground", "packing"]
    planted = parts["planted"]["cases"]
    assert {name: case["state"] for name, case in planted.items()} == {
        "works": "done",
        "raises": "failed",
        "hangs": "died",
        "dies": "died",
        "is not for this machine": "not here",
        "works again": "done",
    }
    assert planted["raises"]["why"] == "ValueError: as planted"
    assert "its time was over" in planted["hangs"]["why"]
    assert planted["dies"]["why"] == "died with status 3"
    assert "last words" in planted["dies"]["said"]
    others = [case for name in [*parts][1:] for case in parts[name]["cases"].values()]
    assert {case["state"] for case in others} == {"done", "not here"}, others
    assert len(others) > 15
    numbers = list(walk_numbers(parts))
    assert len(numbers) > 50
    assert all(map(math.isfinite, numbers))
    assert {each.name for each in tmp_path.iterdir()} == {"report.json", "table.md", "log.txt"}
    table = (tmp_path / "table.md").read_text()
    assert "- raises: **failed**: ValueError: as planted" in table
    assert "| works again | 42 |" in table
    assert "dry run" in table


@pytest.mark.slow
def test_a_part_that_has_no_time_to_begin_is_named(tmp_path: Path, tiny: Path) -> None:
    parts = run(tmp_path, tiny, "--only", "ground,right", "--budget", "1")["parts"]
    assert [part["cases"] for part in parts.values()] == [{}, {}]
    assert all(part["why"].startswith("0 s were left") for part in parts.values())
    assert "- right: **nothing was begun**: 0 s were left" in (tmp_path / "table.md").read_text()


def test_cases_that_there_is_no_time_for_are_named(tmp_path: Path, tiny: Path) -> None:
    from gpu_parts import child

    work = {
        "device": "cpu",
        "small": True,
        "patience": 1,
        "module": "tests.gpu.planted",
        "done": ["works"],
    }
    paths = {
        "scratch": tmp_path,
        "tiny": tiny,
        "report": tmp_path / "none",
        "lines": tmp_path / "lines",
    }
    given = work | {name: str(path) for name, path in paths.items()}
    assert child.go_through(given | {"until": time.time() + 1}) == 0
    first, *others = map(json.loads, (tmp_path / "lines").read_text().splitlines())
    assert first["cases"][0] == "works"
    assert [each["case"] for each in others] == first["cases"][1:]
    assert {each["state"] for each in others} == {"skipped"}
    assert {each["why"] for each in others} <= {"0 s were left", "1 s were left"}


def test_every_part_has_cases(tmp_path: Path, tiny: Path) -> None:
    from gpu_parts.clock import Clock
    from gpu_parts.part import Bench

    parts = importlib.import_module("bench_gpu").PARTS
    bench = Bench(Clock("cpu"), tmp_path, tiny, True, tmp_path / "none.json")
    modules = {part.name: importlib.import_module(part.module) for part in parts}
    cases = {name: module.list_cases(bench) for name, module in modules.items()}
    assert len(cases) == 10
    assert all(len(found) >= 3 for found in cases.values())
    assert all(module.TITLE for module in modules.values())


def test_tables_stand_between_their_marks_and_a_dry_run_s_are_refused(tmp_path: Path) -> None:
    from gpu_parts import report

    document, found = tmp_path / "b.md", tmp_path / "report.json"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    cases = {"works": {"state": "done", "figures": {"answer": 42}}}
    given = {"parts": {"planted": {"columns": [["answer", "answer"]], "cases": cases}}}
    found.write_text(json.dumps(given | {"given": {"device": "cpu"}}))
    with pytest.raises(SystemExit, match="dry run"):
        report.write_section(found, document)
    found.write_text(json.dumps(given | {"given": {"device": "cuda"}}))
    report.write_section(found, document)
    text = document.read_text()
    assert "| works | 42 |" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    real = (ROOT / "docs/explanation/benchmarks.md").read_text()
    assert real.index(report.BEGIN) < real.index(report.END)


def test_waits_are_counted_by_their_place() -> None:
    from gpu_parts import clock

    found = Counter[str]()
    with warnings.catch_warnings(record=True) as others:
        with clock.Clock("cpu").note_waits(found):
            for _ in range(3):
                warnings.warn(f"called a {clock.WAITING}", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        warnings.warn(clock.WAITING, stacklevel=1)
    assert sum(found.values()) == 3
    assert len(others) == 2


def test_wheels_are_packed_again_with_fewer_libraries(tmp_path: Path) -> None:
    import gpu_wheels

    wheel = tmp_path / "some-1.0-py3-none-any.whl"
    contents = {
        "some/__init__.py": b"x = 1\n",
        "some/lib_a.so": b"a" * 9,
        "some/lib_b.so": b"b" * 9,
    }
    contents["some-1.0.dist-info/METADATA"] = (
        b"Name: some\nRequires-Dist: other>=2\n\nRequires-Dist: no\n"
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in {**contents, "some-1.0.dist-info/RECORD": b"wrong"}.items():
            archive.writestr(name, content)
    gpu_wheels.repack(wheel, ("lib_b.so",))
    with zipfile.ZipFile(wheel) as archive:
        kept = {name: archive.read(name) for name in archive.namelist()}
    record = dict(
        line.split(",", 1) for line in kept.pop("some-1.0.dist-info/RECORD").decode().split()
    )
    assert kept == {name: content for name, content in contents.items() if "lib_a" not in name}
    for name, content in kept.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert record[name] == f"sha256={digest},{len(content)}"
    assert gpu_wheels.find_unmet(tmp_path) == ["some needs other>=2, and there is none"]
    with pytest.raises(SystemExit, match=r"has no lib_c\.so"):
        gpu_wheels.repack(wheel, ("lib_c.so",))
