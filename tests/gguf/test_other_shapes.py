"""GGUFs of other shapes than Llama's: fields that transformers 5 has renamed, layers for guessing
ahead that are not in the files, heads of other names, bases with a tower for pictures.

Each file is compared in llama.cpp with the model, by `lora export-gguf` itself. Hermetic. Alone:
pytest tests/gguf/test_other_shapes.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lora_cli.common import LoraError
from lora_cli.gguf import llama_api, opening, run_converter, tools
from lora_cli.gguf.engine import GGUFModel
from tests import architectures

SLOW = pytest.mark.slow
FAMILIES = (
    "gpt_neox",  # rotary_pct
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


@pytest.mark.parametrize("family", [*run_converter.OLD_NAMES, *run_converter.OTHER_FORMS])
def test_an_older_configuration_is_left_to_the_converter(family: str) -> None:
    old = {"model_type": family, "n_positions": 8, "hidden_size": 64, "num_attention_heads": 4}
    made = run_converter.add_old_names(dict(old))
    assert made.items() >= old.items()
    assert run_converter.add_old_names(dict(made)) == made


def test_layers_get_the_names_of_before() -> None:
    kinds = ["linear_attention", "full_attention"]
    granite = {"model_type": "granitemoehybrid", "layer_types": kinds}
    assert run_converter.add_old_names(granite)["layer_types"] == ["mamba", "attention"]
    assert run_converter.add_old_names(granite)["layer_types"] == ["mamba", "attention"]
    kimi = run_converter.add_old_names(
        {
            "model_type": "kimi_linear", "layer_types": kinds, "linear_num_heads": 2,
            "linear_head_dim": 8, "linear_conv_kernel_dim": 4, "moe_renormalize": True,
            "mlp_layer_types": ["dense", "sparse"],
        }
    )  # fmt: skip
    assert kimi["linear_attn_config"]["full_attn_layers"] == [2]
    assert kimi["linear_attn_config"]["kda_layers"] == [1]
    assert (kimi["first_k_dense_replace"], kimi["scoring_func"]) == (1, "sigmoid")


def test_a_nemotron_without_experts_counts_none() -> None:
    counts = {"num_experts_per_tok": 2, "n_routed_experts": 8, "n_group": 1}
    dense = {"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention", "mlp"]}
    made = run_converter.add_old_names(dense | counts)
    assert made["hybrid_override_pattern"] == "M*-"
    assert not counts.keys() & made.keys()
    experts = dense | {"layers_block_type": ["linear_attention", "full_attention", "moe"]}
    made = run_converter.add_old_names(experts | counts)
    assert made["hybrid_override_pattern"] == "M*E"
    assert counts.items() <= made.items()


@pytest.mark.parametrize(
    ("more", "count"),
    [
        ({}, 1),  # as falcon-7b, for which transformers writes 71
        ({"multi_query": False}, 71),
        ({"new_decoder_architecture": True, "num_kv_heads": 8}, 8),  # as falcon-40b
    ],
)
def test_falcon_s_heads_for_keys_are_counted_as_transformers_does(more: dict, count: int) -> None:
    config = {"model_type": "falcon", "num_attention_heads": 71, "num_kv_heads": 71} | more
    assert run_converter.add_old_names(config)["num_kv_heads"] == count


def test_a_vocabulary_is_not_padded() -> None:
    config = run_converter.Unpadded({"vocab_size": 50257})
    config["pad_vocab_size_multiple"] = 8  # as Granite's converter does
    assert config["pad_vocab_size_multiple"] == 1
    assert config["vocab_size"] == 50257


def test_what_ends_llama_cpp_is_a_message(known_tokenizer: Path, tmp_path: Path) -> None:
    whole = {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["sparse"] * 2}
    model = architectures.make_folder(
        "mellum", tmp_path / "model", known_tokenizer, num_hidden_layers=2, **whole
    )
    tools.convert(model, tmp_path / "mellum.gguf", "f32", tools.find_converter())
    said = r"cannot load .*mellum.gguf: GGML_ASSERT\(hparams.is_swa_any\(\)\) failed"
    with pytest.raises(LoraError, match=said):
        GGUFModel(tmp_path / "mellum.gguf")
    with pytest.raises(LoraError, match=said):
        next(llama_api.compute_logits(tmp_path / "mellum.gguf", [[1, 2]]))


@pytest.mark.parametrize(
    ("said", "code", "reason"),
    [
        ("x\nsrc/llama-graph.cpp:2116: fatal error\n", -6, "llama-graph.cpp:2116: fatal error"),
        ("", -9, "its process was ended by signal 9"),
        ("hello\nbad file\n", 3, "bad file"),
        ("", 3, "it ended with exit 3"),
    ],
)
def test_the_reason_is_found_in_what_llama_cpp_said(said: str, code: int, reason: str) -> None:
    assert opening.find_reason(said, subprocess.CompletedProcess([], code)) == reason


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
