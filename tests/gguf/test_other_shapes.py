"""GGUFs of other shapes than Llama's: fields that transformers 5 has renamed, layers for guessing
ahead that are not in the files, heads of other names, bases with a tower for pictures.

Each file is compared in llama.cpp with the model, by `lora export-gguf` itself. Hermetic. Alone:
pytest tests/gguf/test_other_shapes.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_cli.gguf import run_converter
from tests import architectures

SLOW = pytest.mark.slow
FAMILIES = (
    "gpt_neox",  # rotary_pct
    pytest.param("gpt2", marks=SLOW),  # n_ctx, and a head tied to the embeddings
    pytest.param("cohere2", marks=SLOW),  # rotary_pct
    pytest.param("falcon_h1", marks=SLOW),  # head_dim
    pytest.param("qwen3_next", marks=SLOW),  # layers for guessing ahead
    pytest.param("llava", marks=SLOW),
)


@pytest.fixture(scope="module")
def known_tokenizer(vocabularies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's tokenizer, which llama.cpp recognises."""
    folder = tmp_path_factory.mktemp("gpt-2")
    tokenizer = AutoTokenizer.from_pretrained(vocabularies, gguf_file="ggml-vocab-gpt-2.gguf")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_transformers_has_saved_is_exported(
    lora, known_tokenizer: Path, tmp_path: Path, family: str
) -> None:
    model = architectures.make_folder(family, tmp_path / "model", known_tokenizer)
    done = lora("export-gguf", model, "-q", "f16", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "in llama.cpp: mean KL" in done.stderr
    assert (tmp_path / "out/model-f16.gguf").is_file()


def test_a_head_of_another_name_that_is_not_the_embeddings_is_refused(
    lora, known_tokenizer: Path, tmp_path: Path
) -> None:
    model = architectures.make_folder("gpt2", tmp_path / "model", known_tokenizer)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = torch.randn_like(weights["transformer.wte.weight"])
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    done = lora("export-gguf", model, "-q", "f16")
    assert "ties the head to the embeddings, but its files hold a separate head" in done.stderr


def test_old_names_are_added_where_they_are_missing_only() -> None:
    config = {"model_type": "gpt_neox", "rope_parameters": {"partial_rotary_factor": 0.25}}
    assert run_converter.add_old_names(dict(config))["rotary_pct"] == 0.25
    assert run_converter.add_old_names(config | {"rotary_pct": 0.5})["rotary_pct"] == 0.5
    whole = {"model_type": "cohere2_vision", "text_config": {"model_type": "cohere2"}}
    assert run_converter.add_old_names(whole)["text_config"]["rotary_pct"] == 1.0
    assert run_converter.add_old_names({"model_type": "llama"}) == {"model_type": "llama"}
    assert run_converter.add_old_names({"model_type": "gpt2", "n_positions": 7})["n_ctx"] == 7


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("model.layers.1.mlp.weight", False),
        ("model.layers.2.mlp.weight", True),
        ("mtp.layers.0.mlp.weight", True),
        ("model.mtp.fc.weight", True),
        ("model.layers.0.nextn.eh_proj.weight", True),
    ],
)
def test_layers_that_guess_ahead_are_found(tmp_path: Path, name: str, there: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    save_file({name: torch.zeros(1)}, tmp_path / "model.safetensors")
    assert run_converter.has_ahead_layers(tmp_path) is there
    shutil.move(tmp_path / "config.json", tmp_path / "text.json")
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": 2}}))
    assert run_converter.has_ahead_layers(tmp_path) is there
