"""Every tensor of a GGUF is held against the exact weights: a right file passes in every type, and a
changed weight is named.

Hermetic: random weights; the `gguf` package's dequantiser is the oracle. Alone: pytest
tests/gguf/test_tensor_check.py
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from lora_cli.common import LoraError
from lora_cli.gguf import header, mixture, quantize, tensor_check
from lora_cli.gguf.ggml import Ggml
from tests import ggufs

NAME = "blk.1.ffn_up.weight"
UNREAD = {"Q1_0", "Q2_0"}


def make(folder: Path, kind: str, model: str = "qwen2") -> tuple[Path, Path, dict[str, str]]:
    """A file of `kind`, the exact one, and the digests of what the quantiser made."""
    exact, file = folder / "exact.gguf", folder / f"{kind}.gguf"
    ggufs.write_model(exact, model, "F32")
    if kind in ("F16", "BF16"):
        ggufs.write_model(file, model, kind)
        return file, exact, {}
    ggufs.write_imatrix(folder / "imatrix.gguf", model)
    return file, exact, quantize.quantize(exact, file, kind, folder / "imatrix.gguf")


def write_over(file: Path, name: str, at: int, content: bytes) -> None:
    """Overwrite bytes of a tensor, `at` bytes after it begins."""
    found = header.read_header(memoryview(file.read_bytes()))
    (tensor,) = (each for each in found.tensors if each.name == name)
    with file.open("r+b") as out:
        out.seek(found.data_start + tensor.offset + at)
        out.write(content)


QUICK = ("F16", "BF16", "Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q4_K_M", "Q6_K", "IQ4_XS", "TQ2_0")
EACH = [
    pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
    for kind in ("F16", "BF16", *mixture.KINDS)
]


@pytest.mark.parametrize("kind", EACH)
def test_a_right_file_passes(kind: str, tmp_path: Path) -> None:
    file, exact, digests = make(tmp_path, kind)
    num = len(gguf.GGUFReader(exact).tensors)
    said = f"{num} of {num} tensors as their types round"
    assert tensor_check.compare_tensors(file, exact, digests) == said


@pytest.mark.parametrize("kind", [each for each in EACH[2:] if each.values[0] not in UNREAD])
def test_weights_are_read_as_the_gguf_package_reads_them(kind: str, tmp_path: Path) -> None:
    file, _, _ = make(tmp_path, kind, "rows of 576")
    ggml, seen = Ggml(), set()
    for tensor in gguf.GGUFReader(file).tensors:
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        seen.add(name := tensor.tensor_type.name)
        given = ggml.dequantize(
            np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1), name, wanted.shape[-1]
        )
        np.testing.assert_allclose(given, wanted.reshape(given.shape), rtol=1e-6, atol=1e-7)
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("kind", "at", "content", "said"),
    [
        ("F16", 10, b"\x01\x3c", r"has 1 of 2048 weights off"),
        ("BF16", 10, b"\x81\x3f", r"has 1 of 2048 weights off"),
        ("Q8_0", 34 * 3 + 5, b"\x55", r"has 1 of 2048 weights off"),
        ("Q8_0", 34 * 3, b"\x00\x3c", r"has \d+ of 2048 weights off"),
        ("Q4_K_M", 144 * 2 + 20, b"\x55", r"is not what the quantiser made"),
        ("Q4_K_M", 144 * 2, b"\x00\x44", r"\(Q4_K\) is \d+ % off"),
    ],
)
def test_a_changed_weight_is_named(
    kind: str, at: int, content: bytes, said: str, tmp_path: Path
) -> None:
    file, exact, digests = make(tmp_path, kind)
    write_over(file, NAME, at, content)
    with pytest.raises(LoraError, match=rf"{kind}.gguf does not hold .*: {NAME} {said} \(1 of "):
        tensor_check.compare_tensors(file, exact, digests)


def test_a_tensor_that_need_not_be_rounded_is_as_it_was(tmp_path: Path) -> None:
    file, exact, digests = make(tmp_path, "Q4_K_M")
    write_over(file, "output_norm.weight", 4, b"\x00\x00\x80\x3f")
    with pytest.raises(LoraError, match=r"output_norm.weight was changed on the way"):
        tensor_check.compare_tensors(file, exact, digests)


def test_another_model_s_tensors_are_refused(tmp_path: Path) -> None:
    file, exact, digests = make(tmp_path, "Q8_0")
    ggufs.write_model(exact, "untied", "F32")
    with pytest.raises(LoraError, match="holds other tensors"):
        tensor_check.compare_tensors(file, exact, digests)


def test_a_tensor_in_another_s_place_is_refused_in_every_type(tmp_path: Path) -> None:
    file, exact, digests = make(tmp_path, "Q2_K")
    found = header.read_header(memoryview(file.read_bytes()))
    other = next(each for each in found.tensors if each.name == "blk.2.ffn_up.weight")
    start = found.data_start + other.offset
    size = Ggml().num_bytes(Ggml().names[other.type], other.shape)
    write_over(file, NAME, 0, file.read_bytes()[start : start + size])
    with pytest.raises(LoraError, match=rf"{NAME} \(Q\w+\) is 1\d\d % off"):
        tensor_check.compare_tensors(file, exact, digests)


def test_one_step_of_q8_0_is_seen(tmp_path: Path) -> None:
    """A weight is at most half a step off, so that its neighbour in the code is too far."""
    file, exact, digests = make(tmp_path, "Q8_0")
    (tensor,) = (each for each in gguf.GGUFReader(file).tensors if each.name == NAME)
    first = int(tensor.data.reshape(-1)[2:34].view(np.int8)[7])
    write_over(
        file, NAME, 2 + 7, int(first + (1 if first < 0 else -1)).to_bytes(1, "little", signed=True)
    )
    with pytest.raises(LoraError, match=rf"{NAME} has 1 of 2048 weights off"):
        tensor_check.compare_tensors(file, exact, digests)


def test_what_float16_cannot_hold_is_sent_to_bfloat16(tmp_path: Path) -> None:
    file, exact, _ = make(tmp_path, "F16")
    write_over(exact, NAME, 4 * 5, np.float32(1e6).tobytes())
    write_over(file, NAME, 2 * 5, np.float16(np.inf).tobytes())
    with pytest.raises(LoraError, match=rf"{NAME} has weights too large for F16") as caught:
        tensor_check.compare_tensors(file, exact, {})
    assert (caught.value.hint or "").startswith("-q bf16")
