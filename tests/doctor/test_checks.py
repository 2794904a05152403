"""`lora doctor`: nothing to say of a sound installation, and each thing broken on purpose is found
with its fix.

Hermetic: breaks copies and stand-ins, not the installation. Alone: pytest
tests/doctor/test_checks.py
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from lora_cli.doctor import checks, device_checks, oracle
from lora_cli.models import four_bit


def findings(output: str) -> dict[str, dict[str, Any]]:
    return {check["name"]: check for check in json.loads(output)["checks"]}


def test_a_sound_installation_has_no_problem(lora) -> None:
    done = lora("doctor", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is True
    names = [check["name"] for check in report["checks"]]
    assert names[:1] == ["lora"]
    assert {
        "libraries",
        "cpu",
        "LoRA, rsLoRA, DoRA",
        "NF4",
        "QLoRA",
        "4-bit gradients",
        "4-bit rows",
    } <= set(names)
    assert {
        "llama.cpp converter",
        "llama.cpp quantiser",
        "llama.cpp engine",
        "disk for this folder",
        "memory",
    } <= set(names)
    assert not [check for check in report["checks"] if check["status"] == "problem"]
    assert {each["pair"] for each in report["oracle"]} >= {
        f"{k} {m} (cpu)" for k in oracle.KINDS for m in oracle.METHODS
    }
    assert all(each["ok"] and each["value"] <= each["limit"] for each in report["oracle"])


def test_the_table_has_every_pair(lora) -> None:
    done = lora("doctor", "--oracle")
    for pair in (f"{kind} {method}" for kind in oracle.KINDS for method in oracle.METHODS):
        row = next(line for line in done.stdout.splitlines() if line.startswith(f"{pair} (cpu)"))
        assert len(row.split()) == 8
        assert all(float(cell) <= oracle.EXACT for cell in row.split()[3:])
    assert "problems: 0, notes: " in done.stderr
    assert max(map(len, done.stdout.partition("\n\n")[2].splitlines())) < 80


@pytest.fixture
def old_peft(tmp_path: Path) -> dict[str, str]:
    """An environment in which `peft` is a version that lacks what lora imports."""
    package = tmp_path / "old" / "peft"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.10.0'\n")
    info = tmp_path / "old" / "peft-0.10.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.10.0\n")
    paths = [str(tmp_path / "old"), str(Path(__file__).parent.parent.parent)]
    return {"PYTHONPATH": os.pathsep.join(paths)}


def test_an_old_peft_is_found(lora, old_peft: dict[str, str]) -> None:
    done = lora("doctor", "--json", env=old_peft)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    found = findings(done.stdout)
    assert found["peft"] == {
        "name": "peft",
        "status": "problem",
        "said": "0.10.0 is not <0.22,>=0.21",
        "fix": f"python -m pip install peft=={checks.read_tested_versions()['peft']}",
    }
    assert found["libraries"]["status"] == "problem"
    assert found["libraries"]["said"].startswith("cannot be tried: ")
    assert found["disk for this folder"]["status"] == "ok"  # the rest is checked all the same
    text = lora("doctor", env=old_peft)
    assert text.returncode == 1
    assert (
        "problem  peft: 0.10.0 is not <0.22,>=0.21\n         -> python -m pip install peft=="
        in text.stdout
    )


def test_missing_converters_are_a_note_with_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    found = {check.name: check for check in checks.check_tools()}
    converter = found["llama.cpp converter"]
    assert (converter.status, converter.fix) == ("note", "lora setup-llama-cpp")
    assert found["llama.cpp quantiser"].status == "ok"  # it comes with the engine


def test_wrong_maths_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft.tuners.lora import layer

    right = layer.Linear.get_delta_weight
    monkeypatch.setattr(
        layer.Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) * (1 + 1e-9)
    )
    assert checks.run_doctor(False, True, lambda: None) is False
    found = findings(capsys.readouterr().out)["LoRA, rsLoRA, DoRA"]
    assert found["status"] == "problem"
    assert "Linear LoRA (cpu) merged " in found["said"]
    assert found["fix"].startswith("python -m pip install peft==")


def test_unlike_gradients_of_4bit_layers_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        oracle, "compare_qlora", lambda device="cpu", protected=True: {"gradients": 0.01}
    )
    found = {check.name: check for check in checks.check_oracle([])}
    assert found["QLoRA"].status == "problem"
    assert {check.name: check.status for check in checks.check_four_bit()}[
        "4-bit gradients"
    ] == "note"


def test_rows_that_are_misread_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    for misread, status in ((True, "note"), (False, "ok")):
        monkeypatch.setattr(four_bit, "misreads_rows", lambda length: misread)  # noqa: B023
        assert {check.name: check.status for check in checks.check_four_bit()}[
            "4-bit rows"
        ] == status


def test_one_group_that_cannot_be_compared_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device="cpu", protected=True):
        raise ValueError("no such kernel")

    monkeypatch.setattr(oracle, "compare_qlora", broken)
    deviations: list[Any] = []
    found = {check.name: check for check in checks.check_oracle(deviations)}
    assert {name: check.status for name, check in found.items()} == {
        "LoRA, rsLoRA, DoRA": "ok",
        "QLoRA": "problem",
        "NF4": "ok",
    }
    assert "ValueError: no such kernel" in found["QLoRA"].said
    assert len({each.pair for each in deviations}) == 10


def test_not_a_number_is_no_agreement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(value: float) -> oracle.Deviation:
        return oracle.Deviation("g", "p", "m", value, 1.0)

    assert not made(float("nan")).ok
    kept = oracle.find_worst([made(value) for value in (0.5, float("nan"), 0.7)])
    assert [math.isnan(each.value) for each in kept] == [True]
    monkeypatch.setattr(
        oracle, "measure_deviations", lambda device: {"NF4": lambda: iter([made(float("nan"))])}
    )
    assert checks.run_doctor(False, True, lambda: None) is False
    report = json.loads(
        capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert [(each["value"], each["ok"]) for each in report["oracle"]] == [(None, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["product", "gradient"])
def test_a_type_that_computes_wrongly_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, dtype, where: str
) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x * (1.5 if where == "product" else 1.0)

        @staticmethod
        def backward(context, gradient):
            return gradient * (1.5 if where == "gradient" else 1.0)

    right = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda self, other: (
            Wrong.apply(right(self, other))
            if self.dtype == dtype and self.requires_grad
            else right(self, other)
        ),
    )
    found = [check for check in device_checks.check_devices() if check.status == "problem"]
    name = str(dtype).removeprefix("torch.")
    assert [check.said.partition(":")[0] for check in found if check.name == "cpu"] == [
        f"computes wrongly in {name}"
    ]


def test_a_type_that_is_not_there_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.__matmul__

    def missing(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if self.dtype == torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        return right(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", missing)
    found = {
        check.status: check.said for check in device_checks.check_devices() if check.name == "cpu"
    }
    assert found["note"] == "has no float16: RuntimeError: not implemented for 'Half'"
    assert "float16" not in found["ok"].replace("bfloat16", "")


def test_disks_that_are_full_or_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    found = {check.name: check for check in checks.check_disk()}["disk for models"]
    assert (found.status, found.fix) == ("problem", "export HF_HOME=FOLDER")
    usage = checks.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        checks.shutil, "disk_usage", lambda place: usage._replace(free=1_000_000_000)
    )
    little = {check.name: check for check in checks.check_disk()}["disk for this folder"]
    assert (little.status, little.fix) == ("note", "make room, or work in another folder")


@pytest.mark.slow  # nothing is compiled for it beforehand
def test_it_runs_without_assertions(lora) -> None:
    done = lora("doctor", "--json", env={"PYTHONOPTIMIZE": "1"})
    assert done.returncode == 0, done.stderr


def test_a_folder_that_was_a_package_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "peft-0.9.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    found = {check.name: check for check in checks.check_versions()}["peft"]
    assert (found.status, found.said) == ("problem", "is not, or not wholly, installed")
    assert "--force-reinstall" in found.fix


def test_a_wrong_folder_of_llama_cpp_is_named_with_what_helps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    found = {check.name: check for check in checks.check_tools()}["llama.cpp converter"]
    assert found.status == "note"
    assert found.fix == "unset LLAMA_CPP_DIR and install it: lora setup-llama-cpp"


def test_the_tested_versions_are_those_of_the_constraints() -> None:
    tested = checks.read_tested_versions()
    assert tested["torch"] == "2.13.0"
    assert len(tested) > 60
    assert not list(checks.check_versions())[:-1], "this environment is the tested one"


def test_other_versions_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = checks.read_tested_versions()
    monkeypatch.setattr(checks, "read_tested_versions", lambda: tested | {"peft": "0.21.99"})
    found = list(checks.check_versions())[0]
    assert (found.name, found.status) == ("peft", "note")
    assert found.said.endswith(", tested with 0.21.99")


@pytest.mark.parametrize(("num", "offered"), [(1, False), (2, True)])
def test_fewer_threads_are_offered_where_there_are_several(
    num: int, offered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: 99.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: num)
    (check,) = checks.check_threads()
    assert check.status == "note"
    assert check.fix.endswith("end the other work")
    assert ("OMP_NUM_THREADS=1" in check.fix) == offered
