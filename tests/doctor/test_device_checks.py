"""`lora doctor` on the device that trains: a step by every method, each of which can fail alone, and
GPUs that torch cannot use.

Hermetic: torch is told what GPUs there are (tests/cards.py). Alone: pytest
tests/doctor/test_device_checks.py
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import pytest
import torch

from lora_cli.doctor import device_checks, training_steps
from lora_cli.doctor.finding import Check
from lora_cli.speed import dora_norms
from tests.cards import NO_DRIVER, NO_GPU, OLD_DRIVER, Machine, pretend_machine


def train() -> dict[str, Check]:
    return {check.name: check for check in device_checks.check_training()}


def test_a_step_is_made_by_every_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made: list[str] = []
    optimizer = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda *a, **k: [made.append("step"), optimizer(*a, **k)][1]
    )
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    found = train()
    assert list(found) == ["training"]
    assert found["training"].status == "ok"
    assert all(f"{method} on cpu (" in found["training"].said for method in training_steps.METHODS)
    assert len(made) >= 4
    assert not list(tmp_path.iterdir())  # nothing is left


def test_a_method_that_fails_is_named_with_the_last_line_and_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("a kernel gave up\nCUDA said: no such kernel for NF4")

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", broken)
    found = train()
    assert list(found) == ["training by qlora", "training by qdora", "training"]
    wrong = found["training by qlora"]
    assert wrong.status == "problem"
    assert wrong.said == "fails on cpu: RuntimeError: CUDA said: no such kernel for NF4"
    assert "torch==" in (wrong.fix or "")
    assert "bitsandbytes==" in (wrong.fix or "")
    assert found["training"].said.count(" on cpu (") == 2


def test_what_lora_itself_installs_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **named: object) -> None:
        raise NotImplementedError("no norm here")

    monkeypatch.setattr(dora_norms.FactoredDora, "forward", broken)
    found = train()
    assert {"training by dora", "training by qdora"} < found.keys()
    assert "NotImplementedError: no norm here" in found["training by dora"].said


def test_a_known_failure_has_its_own_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **named: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", broken)
    wrong = train()["training by qlora"]
    assert "this build of torch does not know the GPU" in wrong.said
    assert wrong.fix is not None
    assert wrong.fix.startswith("lora doctor, which tries")


@pytest.mark.parametrize(
    ("machine", "status", "said"),
    [
        (Machine(fault=NO_DRIVER), "note", "there is no NVIDIA driver: the CPU is used"),
        (Machine(fault=OLD_DRIVER.format(version=12040)), "problem", "knows CUDA 12.4, and this"),
        (Machine(fault=NO_GPU), "note", "the driver finds no GPU: the CPU is used"),
        (Machine(cuda=None, driver=True), "note", "is a CPU build, and there is an NVIDIA driver"),
    ],
)
def test_a_gpu_that_torch_does_not_use_is_explained(
    machine: Machine, status: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend_machine(monkeypatch, machine)
    found = {check.name: check for check in device_checks.check_devices()}
    assert list(found) == ["GPU", "cpu"]
    assert found["GPU"].status == status
    assert said in found["GPU"].said
    assert found["GPU"].fix


def test_a_card_that_is_too_old_and_several_cards_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend_machine(
        monkeypatch, Machine("cuda", names=("Tesla V100", "Tesla V100"), capability=(7, 0))
    )
    old, several = device_checks._check_gpus()
    assert (old.status, several.status) == ("problem", "note")
    assert "no kernels for Tesla V100" in old.said
    assert "one of the 2 visible GPUs is used: cuda:0" in several.said


def test_an_accelerator_is_timed_by_large_products_and_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[int] = []
    waited: list[str] = []
    made = torch.randn

    def note(*size: int, **named: object) -> torch.Tensor:
        shapes.append(size[0])
        return made(8, 8, requires_grad=bool(named.get("requires_grad")))

    monkeypatch.setattr(torch, "randn", note)
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    device_checks.time_matmul("cuda:0", torch.bfloat16)
    assert set(shapes) == {4096}
    assert waited == ["cuda:0"] * 10
    shapes.clear()
    device_checks.time_matmul("cpu", torch.bfloat16)
    assert set(shapes) == {512}
    assert len(waited) == 10
