"""Quantising GGUFs: every kind reads back near what it was made from, in other people's readers;
nothing half right.

Hermetic: the GGUFs of tests/ggufs.py; the `gguf` package, whose dequantiser is numpy of its own,
reads them back. That the bytes are llama-quantize's is compared by
tests/gguf/test_quantize_bytes.py. Alone: pytest tests/gguf/test_quantize.py
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from lora_cli.common import LoraError, UsageError
from lora_cli.gguf import header, mixture, quantize
from lora_cli.gguf.ggml import Ggml
from tests import ggufs

UNREAD = {"Q1_0", "Q2_0"}
"""Kinds newer than the gguf package's dequantiser."""


def made(
    folder: Path,
    kind: str,
    name: str = "untied",
    weighted: bool = False,
    raw: str = "F32",
    **options: int,
) -> Path:
    """A model of tests/ggufs.py in `kind`; the model lies beside it as model.gguf."""
    ggufs.write_model(folder / "model.gguf", name, raw)
    imatrix = folder / "imatrix.gguf" if weighted else None
    if imatrix:
        ggufs.write_imatrix(imatrix, name)
    quantize.quantize(folder / "model.gguf", folder / f"{kind}.gguf", kind, imatrix, **options)
    return folder / f"{kind}.gguf"


def read(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


READ = [(kind, "F32") for kind in mixture.KINDS if kind not in UNREAD] + [
    ("Q6_K", "F16"),
    ("Q6_K", "BF16"),
]


@pytest.mark.parametrize(("kind", "raw"), READ)
def test_every_kind_reads_back_near_what_it_was(kind: str, raw: str, tmp_path: Path) -> None:
    path = made(tmp_path, kind, "qwen2", weighted=True, raw=raw)
    before, after = read(tmp_path / "model.gguf"), read(path)
    assert before.keys() == after.keys()
    num_quantized = 0
    for name, tensor in after.items():
        if tensor.tensor_type == before[name].tensor_type:
            assert np.array_equal(tensor.data, before[name].data)
            continue
        num_quantized += 1
        given, back = (
            gguf.quants.dequantize(each.data, each.tensor_type) for each in (before[name], tensor)
        )
        error = np.sqrt(np.mean((given - back) ** 2)) / given.std()
        block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        # no code of that many bits is nearer to normal values (Shannon's rate-distortion function)
        least = 2 ** (-8 * size / block)
        assert least < error < 4 * least
    assert num_quantized == 2 + 7 * 12


def test_the_metadata_say_what_was_done(tmp_path: Path) -> None:
    path = made(tmp_path, "Q4_K_M", "qwen2", weighted=True)
    before, after = (gguf.GGUFReader(file).fields for file in (tmp_path / "model.gguf", path))
    said = {key: field.contents() for key, field in after.items()}
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert said["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert (
        said["quantize.imatrix.file"] == "imatrix.gguf"
    )  # a name: where it lay on this machine is nobody's business
    assert said["quantize.imatrix.dataset"] == "some rows.jsonl"
    assert said["quantize.imatrix.chunks_count"] == 3
    changed = {key for key in said if key not in before or said[key] != before[key].contents()}
    assert changed == {"general.file_type", "general.quantization_version", "GGUF.kv_count"} | {
        f"quantize.imatrix.{key}" for key in ("file", "dataset", "entries_count", "chunks_count")
    }
    assert said["tokenizer.ggml.tokens"] == [f"word {index}" for index in range(64)]


def test_numbers_of_kinds_are_llama_cpp_s() -> None:
    known = {each.name.removeprefix("MOSTLY_"): int(each) for each in gguf.LlamaFileType}
    shared = {kind for kind in mixture.KINDS if kind in known}
    assert len(shared) == 30  # not the three short names, nor Q2_0, which is newer
    assert {kind: mixture.KINDS[kind].number for kind in shared} == {
        kind: known[kind] for kind in shared
    }
    for short, long in mixture.SAME.items():
        assert mixture.KINDS[short] == mixture.KINDS[long]


MIXTURES = {
    "untied": "f6d8cc17b87e8763",
    "tied, heads shared": "8fcd6bf1802f322d",
    "rows of 576": "a1e7248fa0a1e2a2",
    "rows of 96": "0224c8b475a67f7a",
    "rows of 80": "2feeda41a1ebe6da",
    "qwen2": "7d29665a6e99d1cd",
    "gemma": "7d60a97c9ab0ed2f",
    "eight experts": "fa1675f2c4275315",
    "four experts": "2d87240fbfbd36c0",
    "three experts": "31b733286b18943d",
    "70B": "c5c738621b238a1a",
    "65B": "f0ee8634901c0424",
    "72B": "c5c738621b238a1a",
    "falcon": "ee2ce0633753c785",
    "gpt2": "97a0d43c241083db",
    "latent": "a47dcc3b024f3df9",
}


@pytest.mark.parametrize("name", ggufs.MODELS)
def test_the_rule_is_the_one_that_was_compared(name: str, tmp_path: Path) -> None:
    """Digests of all types, recorded where tests/gguf/test_quantize_bytes.py had found every byte
    equal."""
    ggufs.write_model(tmp_path / "model.gguf", name)
    model = header.read_header(memoryview((tmp_path / "model.gguf").read_bytes()))
    block, types = Ggml().block, []
    for kind in mixture.KINDS:
        for weighted in (False, True):
            try:
                chosen = mixture.choose(model, kind, weighted, block)
                for tensor, new, narrower in chosen:
                    needs = mixture.needs_weights(tensor.name, new, kind)
                    types.append(f"{kind} {weighted} {tensor.name} {new} {narrower} {needs}")
            except LoraError:
                types.append(f"{kind} {weighted} refused")
    assert hashlib.sha256("\n".join(types).encode()).hexdigest()[:16] == MIXTURES[name]


def test_kinds_that_need_an_importance_matrix_are_refused_without(tmp_path: Path) -> None:
    ggufs.write_model(tmp_path / "model.gguf", "untied")
    refused = []
    for kind in mixture.KINDS:
        try:
            quantize.quantize(tmp_path / "model.gguf", tmp_path / "made.gguf", kind)
        except LoraError as error:
            assert "needs an importance matrix" in error.message
            refused.append(kind)
    assert sorted(refused) == sorted(mixture.NEEDS_IMATRIX)
    for kind in refused:
        with pytest.raises(UsageError, match="needs an importance matrix"):
            mixture.pick(kind.lower(), weighted=False)
        assert mixture.pick(kind.lower(), weighted=True) == kind


def test_threads_and_pieces_do_not_change_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made(tmp_path, "Q4_K_M", "eight experts", weighted=True, num_threads=1).read_bytes()
    monkeypatch.setattr(quantize, "CHUNK", 700)  # two rows
    assert (
        made(tmp_path, "Q4_K_M", "eight experts", weighted=True, num_threads=3).read_bytes()
        == whole
    )


def test_each_expert_has_its_own_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where the matrix lacks experts, as lora's own does, that is said."""
    path, name = (
        made(tmp_path, "Q4_K_M", "eight experts", weighted=True),
        "blk.3.ffn_up_exps.weight",
    )
    given, stacked = (read(file)[name].data for file in (tmp_path / "model.gguf", path))
    columns = quantize.read_weights(tmp_path / "imatrix.gguf").by_tensor[name].reshape(8, 256)
    ggml = Ggml()
    for expert in range(8):
        alone = ggml.quantize(given[expert], "Q4_K", columns[expert])
        assert np.array_equal(alone, stacked[expert].reshape(-1))
        assert not np.array_equal(
            alone, ggml.quantize(given[expert], "Q4_K", columns[(expert + 1) % 8])
        )
    assert "importance matrix" not in capsys.readouterr().err
    model, file = tmp_path / "model.gguf", tmp_path / "old.dat"
    ggufs.write_dat(file, "eight experts", 1, b"")
    quantize.quantize(model, tmp_path / "x.gguf", "Q4_K_M", file)
    said = "24 of 66 rounded tensors are not in the importance matrix, such as blk.0.ffn_down_exps"
    assert sum("_exps." in name for name in read(model)) == 24
    assert said in capsys.readouterr().err
    with pytest.raises(LoraError, match="matter$") as error:
        quantize.quantize(model, tmp_path / "y.gguf", "IQ2_XS", file)
    assert str(error.value.hint).startswith("it is another model's, or lacks experts, ")


def test_rows_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path, "Q4_K_M", "rows of 576")
    types = {tensor.tensor_type.name for tensor in read(path).values()}
    assert types == {"F32", "Q8_0", "Q5_0", "Q4_K", "Q6_K"}
    assert (
        "48 of 82 tensors take a larger type: their rows do not fit Q4_K_M's blocks"
        in capsys.readouterr().err
    )
    with pytest.raises(
        LoraError,
        match="Q1_0 is not for this model: rows of .* have 576 elements, not a multiple of 128",
    ):
        made(tmp_path, "Q1_0", "rows of 576")


def break_values(path: Path) -> None:
    """A number that is none, in the last matrix."""
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)


def break_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def break_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


def break_start(path: Path) -> None:
    path.write_bytes(b"GGML" + path.read_bytes()[4:])


def break_type(path: Path) -> None:
    ggufs.write_model(path, "untied", "Q8_0")


def break_architecture(path: Path) -> None:
    path.write_bytes(
        path.read_bytes().replace(b"\5\0\0\0\0\0\0\0llama", b"\x08\0\0\0\0\0\0\0nanbeige", 1)
    )


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_values, "holds values that are not finite"),
        (break_end, "holds fewer bytes than it should"),
        (break_header, "model.gguf cannot be quantised: the header is damaged"),
        (
            break_start,
            "model.gguf cannot be quantised: it starts with b'GGML', version 3",
        ),
        (break_type, r"the model is already quantised \(output.weight is Q8_0\)"),
        (break_architecture, "llama.cpp treats nanbeige specially in Q4_K_M"),
        (Path.unlink, "model.gguf is missing or empty"),
    ],
)
def test_what_cannot_be_quantised_leaves_what_was_there(
    damage: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    source, target = tmp_path / "model.gguf", tmp_path / "out" / "made.gguf"
    target.parent.mkdir()
    target.write_bytes(b"the old one")
    ggufs.write_model(source, "untied")
    damage(source)
    with pytest.raises(LoraError, match=said) as caught:
        quantize.quantize(source, target, "Q4_K_M")
    assert caught.value.hint
    assert {file.name: file.read_bytes() for file in target.parent.iterdir()} == {
        "made.gguf": b"the old one"
    }


def test_another_model_s_importance_matrix_is_refused(tmp_path: Path) -> None:
    ggufs.write_model(tmp_path / "model.gguf", "untied")
    for other, kind, said in (
        ("rows of 576", "Q4_K_M", "has 576 columns for blk.0.attn_k.weight, which has 256"),
        (
            "falcon",
            "IQ2_XXS",
            "IQ2_XXS needs an importance matrix that says how much the columns of blk.0",
        ),
    ):
        ggufs.write_imatrix(tmp_path / "other.gguf", other)
        with pytest.raises(LoraError, match=said):
            quantize.quantize(
                tmp_path / "model.gguf", tmp_path / "x.gguf", kind, tmp_path / "other.gguf"
            )


def test_what_is_no_importance_matrix_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    ggufs.write_model(path, "untied")
    with pytest.raises(
        LoraError, match="imatrix.gguf is not an importance matrix: it holds no sums"
    ):
        quantize.read_weights(path)
    path.write_bytes(b"\x01\0\0\0some text that is none either")
    with pytest.raises(LoraError, match=r"imatrix.gguf is not an importance matrix: "):
        quantize.read_weights(path)
    ggufs.write_imatrix(path, "untied")
    path.write_bytes(path.read_bytes().replace(b"imatrix.chunk_size", b"imatrix.chunk_Size"))
    with pytest.raises(LoraError, match="it does not say what it was measured on"):
        quantize.read_weights(path)


@pytest.mark.parametrize("calls", [0, 4])
def test_the_older_importance_matrix_is_a_mean_too(calls: int, tmp_path: Path) -> None:
    ggufs.write_dat(tmp_path / "new.dat", "untied", calls, b"")
    ggufs.write_dat(tmp_path / "once.dat", "untied", 1, b"\x07\0\0\0\x09\0\0\0rows.text")
    found, once = (quantize.read_weights(tmp_path / f"{name}.dat") for name in ("new", "once"))
    assert (found.num_chunks, found.dataset, once.num_chunks, once.dataset) == (
        0,
        None,
        7,
        "rows.text",
    )
    assert len(found.by_tensor) == 2 + 7 * 17
    for name, columns in found.by_tensor.items():
        assert np.array_equal(columns * np.float32(calls or 1), once.by_tensor[name])
