"""Our quantiser against llama.cpp's own program: the same bytes for every kind of file, over models
of many shapes.

Slow: `make quantizer` builds llama-quantize (which needs a C++ compiler) and runs this. Hermetic
but for that: the GGUFs of tests/ggufs.py, and models of transformers as the managed converter
writes them. Alone: pytest -m slow tests/gguf/test_quantize_bytes.py
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from lora_cli.common import LoraError
from lora_cli.gguf import mixture, quantize, tools
from tests import ggufs

PROGRAM = Path(__file__).parent.parent.parent / "build" / "llama-quantize" / "llama-quantize"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def program() -> None:
    assert PROGRAM.is_file(), "llama-quantize is not built: make quantizer"


def compare(folder: Path, kind: str, imatrix: Path | None) -> str:
    """Whether the files are "equal" or both "refused"; fails where they differ. The matrix is named
    in the file."""
    theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
    weighted = ["--imatrix", imatrix.name] if imatrix else []
    command = [PROGRAM, *weighted, "model.gguf", theirs.name, kind]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    try:
        quantize.quantize(folder / "model.gguf", ours, kind, imatrix)
    except LoraError as error:
        assert done.returncode != 0, error
        return "refused"
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    assert ours.read_bytes() == theirs.read_bytes()
    return "equal"


@pytest.mark.parametrize("kind", mixture.KINDS)
@pytest.mark.parametrize("name", ggufs.MODELS)
def test_every_kind_of_every_model_is_llama_quantize_s(
    name: str, kind: str, tmp_path: Path
) -> None:
    ggufs.write_model(tmp_path / "model.gguf", name)
    ggufs.write_imatrix(tmp_path / "imatrix.gguf", name)
    weighted = compare(tmp_path, kind, tmp_path / "imatrix.gguf")
    plain = compare(tmp_path, kind, None)
    no_block_fits = kind == "Q1_0" and name.startswith("rows of")
    assert weighted == ("refused" if no_block_fits else "equal")
    if not name.startswith("rows of"):
        assert (plain == "refused") is (kind in mixture.NEEDS_IMATRIX)


@pytest.mark.parametrize("raw", ["F16", "BF16"])
@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_XS", "Q8_0", "TQ2_0"])
def test_half_precision_is_read_as_llama_quantize_does(raw: str, kind: str, tmp_path: Path) -> None:
    ggufs.write_model(tmp_path / "model.gguf", "rows of 80" if kind == "Q8_0" else "untied", raw)
    assert compare(tmp_path, kind, None) == "equal"


@pytest.mark.parametrize("about", [b"", struct.pack("<ii", 7, 9) + b"rows.text"])
@pytest.mark.parametrize("calls", [0, 3])
def test_the_older_importance_matrix_is_read_as_llama_quantize_does(
    about: bytes, calls: int, tmp_path: Path
) -> None:
    ggufs.write_model(tmp_path / "model.gguf", "qwen2")
    ggufs.write_dat(tmp_path / "old.dat", "qwen2", calls, about)
    for kind in ("Q4_K_M", "IQ2_XXS"):
        assert compare(tmp_path, kind, tmp_path / "old.dat") == "equal"


FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma": {"head_dim": 64, "num_key_value_heads": 1},
    "mixtral": {"num_local_experts": 8, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_llama_quantize_s(family: str, tiny: Path, tmp_path: Path) -> None:
    """Whole models, as `lora export-gguf` has them: the converter's metadata, vocabulary and order
    of tensors."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
    }
    config = AutoConfig.for_model(family, vocab_size=512, **sizes, **FAMILIES[family])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "model"
    )
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "model")
    shutil.copy(tiny / "model" / "tokenizer.model", tmp_path / "model")
    tools.convert(tmp_path / "model", tmp_path / "model.gguf", "bf16", tools.find_converter())
    for kind in ("Q4_0", "Q4_K_M", "Q5_K_S", "Q6_K", "IQ3_M", "IQ4_XS", "Q8_0"):
        assert compare(tmp_path, kind, None) == "equal", kind
