"""The allocator's segments grow where NVIDIA's driver is, unless the user has said how it works.

Hermetic. Alone: pytest tests/common/test_gpu_memory.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_cli.common import gpu_memory


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine on Linux with NVIDIA's driver, on which the user has said nothing."""
    file = tmp_path / "nvidiactl"
    file.touch()
    monkeypatch.setattr(gpu_memory, "NVIDIA", file)
    monkeypatch.setattr(sys, "platform", "linux")
    for each in gpu_memory.SETTINGS:
        monkeypatch.setenv(each, "")  # so that it is as before when the test ends
        monkeypatch.delenv(each)
    return file


def set_by_lora() -> dict[str, str]:
    gpu_memory.let_segments_grow()
    return {name: os.environ[name] for name in gpu_memory.SETTINGS if name in os.environ}


def test_segments_grow_beside_a_driver(driver: Path) -> None:
    assert set_by_lora() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def test_not_without_one(driver: Path) -> None:
    driver.unlink()
    assert set_by_lora() == {}


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_not_on_another_system(driver: Path, platform: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    assert set_by_lora() == {}


@pytest.mark.parametrize("name", gpu_memory.SETTINGS)
def test_what_the_user_says_stays(driver: Path, name: str, monkeypatch) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    assert set_by_lora() == {name: "max_split_size_mb:128"}


def test_torch_knows_these_names_and_takes_the_value_where_there_is_no_gpu() -> None:
    library = (Path(torch.__file__).parent / "lib" / "libc10.so").read_bytes()
    header = Path(torch.__file__).parent / "include" / "c10" / "core" / "AllocatorConfig.h"
    assert all(name.encode() in library for name in gpu_memory.SETTINGS)
    assert "primary environment variable for configuration is `PYTORCH_ALLOC_CONF`" in (
        re.sub(r"\s*\*\s*", " ", header.read_text())
    )
    code = "import torch; print((torch.ones(3) @ torch.ones(3)).item())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, gpu_memory.SETTINGS[0]: gpu_memory.GROWING},
    )
    assert (done.stdout, done.stderr) == ("3.0\n", "")


def test_training_says_so_before_torch_is_loaded(driver: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from lora_cli import cli\n"
        "from lora_cli.common import gpu_memory\n"
        f"gpu_memory.NVIDIA = Path({str(driver)!r})\n"
        "sys.argv = ['lora', 'train', 'gone.yaml']\n"
        "try:\n    cli.main()\nfinally:\n"
        "    print(os.environ.get('PYTORCH_ALLOC_CONF'), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "expandable_segments:True False\n"
