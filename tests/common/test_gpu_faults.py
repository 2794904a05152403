"""What is said where a GPU cannot be used, or not for what is asked of it.

Hermetic: torch is told what there is (tests/cards.py). What `lora train` refuses of these is in
tests/cli/bad_inputs.txt. Alone: pytest tests/common/test_gpu_faults.py
"""

from __future__ import annotations

import pytest
import torch

from lora_cli.common import LoraError, gpu_faults
from lora_cli.recipe import load
from lora_cli.train import run
from tests.cards import NO_DRIVER, NO_GPU, OLD_DRIVER, WHEEL_13, Machine, pretend_machine


def hear(capsys: pytest.CaptureFixture[str], in_4bit: bool = False) -> str:
    """What is said of the machine, once."""
    for _ in range(2):
        gpu_faults.check_gpu(in_4bit)
    return capsys.readouterr().err


def test_a_torch_for_cuda_without_a_driver_says_that_the_cpu_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_machine(monkeypatch, Machine(fault=NO_DRIVER))
    said = hear(capsys)
    assert said.count("\n") == 1
    assert said.startswith(
        "warning: this torch is built for CUDA 13.0, and there is no NVIDIA driver: the CPU is used"
    )
    assert f"torch=={torch.__version__.partition('+')[0]} --index-url" in said


def test_and_the_run_goes_on(
    write_recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load.load_recipe(write_recipe("training: {max_steps: 1}\n"))
    pretend_machine(monkeypatch, Machine(fault=NO_DRIVER))
    assert (run.train(recipe) / "adapter_config.json").is_file()
    assert capsys.readouterr().err.count("there is no NVIDIA driver") == 1


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (Machine(cuda=None), ""),
        (Machine(cuda=None, driver=True), "is a CPU build, and there is an NVIDIA driver: the CPU"),
        (Machine(fault=NO_GPU), "the driver finds no GPU: the CPU is used"),
        (Machine("cuda"), ""),
        (Machine("cuda", capability=(12, 0)), ""),
        (Machine("cuda", capability=(8, 9)), ""),
        (Machine("cuda", capability=(6, 0), built=("sm_50", "sm_60", "sm_70")), ""),
        (Machine("cuda", capability=(12, 1), built=("sm_90", "compute_90")), ""),
        (Machine("cuda", capability=(0, 0), cuda=None), ""),
        (Machine("mps", cuda=None), "4-bit weights were not tried on Apple's GPU: the CPU is used"),
    ],
)
def test_what_else_is_said_or_is_nothing_to_say(
    machine: Machine,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend_machine(monkeypatch, machine)
    heard = hear(capsys, in_4bit=True)
    assert said in heard
    assert heard.count("\n") == bool(said)


def test_nothing_is_wrong_with_apple_s_gpu_in_16_bits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_machine(monkeypatch, Machine("mps", cuda=None))
    assert hear(capsys) == ""


@pytest.mark.parametrize("visible", ["", "-1", " "])
def test_no_visible_gpu_is_said_to_be_so_by_choice(
    visible: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pretend_machine(monkeypatch, Machine(fault=NO_GPU))
    said = hear(capsys)
    assert said == (
        "warning: CUDA_VISIBLE_DEVICES is empty: the CPU is used (unset CUDA_VISIBLE_DEVICES)\n"
    )


@pytest.mark.parametrize(
    ("machine", "in_4bit", "said", "hint"),
    [
        (Machine(fault=OLD_DRIVER.format(version=11080)), False, "knows CUDA 11.8", "update the driver; CUDA"),
        (Machine(fault=OLD_DRIVER.format(version=12040)), False, "knows CUDA 12.4", "/cu126"),
        (Machine(fault="CUDA unknown error - this\nmay be"), False, "CUDA unknown error - this may", "nvidia-smi"),
        (Machine("cuda", capability=(7, 0)), False, "no kernels for NVIDIA H100", "/cu126"),
        (Machine("cuda", capability=(13, 0)), False, "(compute capability 13.0)", "pip install -U torch;"),
        (Machine("cuda", capability=(12, 0), cuda="12.6", built=("sm_90",)), False, "for sm_90", "/cu130"),
        (Machine("cuda", capability=(10, 3), built=("sm_90a", "sm_100a")), False, "sm_100a", "install -U"),
        (Machine("cuda", capability=(5, 2), built=("sm_50",)), True, "no 4-bit kernels", "method=lora"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_refused(
    machine: Machine, in_4bit: bool, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pretend_machine(monkeypatch, machine)
    with pytest.raises(LoraError) as caught:
        gpu_faults.check_gpu(in_4bit)
    assert said in caught.value.message
    assert hint in (caught.value.hint or "")


def test_what_the_wheel_is_built_for_runs_on_every_card_since_turing() -> None:
    # torch/cuda/__init__.py: code of a generation runs on its later cards
    for capability in ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)):
        assert any(gpu_faults._runs(each, capability) for each in WHEEL_13), capability
    for capability in ((5, 2), (6, 1), (7, 0), (11, 0), (13, 0)):
        assert not any(gpu_faults._runs(each, capability) for each in WHEEL_13), capability


def test_one_of_several_gpus_is_named_with_how_to_take_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)
    first = torch.device("cuda:0")
    assert gpu_faults.describe_choice(torch.device("cpu")) == []
    pretend_machine(monkeypatch, Machine("cuda"))
    assert gpu_faults.describe_choice(first) == []
    pretend_machine(monkeypatch, Machine("cuda", names=("NVIDIA L4", "NVIDIA L4")))
    alike = gpu_faults.describe_choice(first)
    assert alike == [
        "one of the 2 visible GPUs is used: cuda:0, NVIDIA L4",
        "  (another one: CUDA_VISIBLE_DEVICES=1)",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5")
    assert gpu_faults.describe_choice(first)[1] == "  (another one: CUDA_VISIBLE_DEVICES=5)"
    pretend_machine(monkeypatch, Machine("cuda", names=("NVIDIA A100", "Tesla T4")))
    told = gpu_faults.describe_choice(first)
    assert len(told) == 3
    assert "NVIDIA A100, Tesla T4; CUDA begins with the fastest" in told[2]
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in told[2]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert len(gpu_faults.describe_choice(first)) == 2
