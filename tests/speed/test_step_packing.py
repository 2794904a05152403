"""Packing the rows of one optimiser step: the padded run, without its padding; refused where rows
would see each other.

Hermetic: the tiny model, random ones of several families. Alone: pytest
tests/speed/test_step_packing.py
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from lora_cli.models.tokenizer import IGNORED
from lora_cli.plan import auto
from lora_cli.recipe import load
from lora_cli.speed import document_attention, step_packing
from lora_cli.train import run as train
from tests.networks import random_model
from tests.units import STEADY_ADAM, assert_same_training


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(4, 50))
def test_every_row_is_in_one_sequence_whole(lengths: list[int], capacity: int) -> None:
    rows = [
        {"input_ids": [number] * length, "labels": [number] * length}
        for number, length in enumerate(lengths)
    ]
    made = step_packing.StepCollator(capacity)(rows)
    assert made["cuts"][0] == 0
    assert made["cuts"][-1] == sum(lengths) == made["input_ids"].shape[1]
    seen = []
    for part in step_packing.split_sequences(made, labelled=True, documents=True):
        followed = (part["labels"][0, 1:] != IGNORED).nonzero()[:, 0]
        assert torch.equal(part["labelled"], followed)
        bounds = part["cu_seq_lens_q"].tolist()
        assert part["max_length_k"] == max(end - start for start, end in pairwise(bounds))
        starts = [
            *(part["position_ids"][0] == 0).nonzero().flatten().tolist(),
            part["input_ids"].shape[1],
        ]
        assert bounds == starts
        assert part["input_ids"].shape[1] <= capacity or len(starts) == 2
        for start, end in zip(starts, starts[1:]):
            [number] = part["input_ids"][0, start:end].unique().tolist()
            assert part["position_ids"][0, start:end].tolist() == list(range(lengths[number]))
            assert part["labels"][0, start:end].tolist() == [IGNORED] + [number] * (
                lengths[number] - 1
            )
            seen.append(number)
    assert sorted(seen) == list(range(len(lengths)))
    assert len(made["cuts"]) - 1 <= len(lengths)


def run(write_recipe, folder: Path, text: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    train.train(load.load_recipe(write_recipe(f"output_dir: {folder}\n{text}")))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("head", "more"),
    [
        ("trainer: sft", ""),
        ("trainer: trainer", ""),
        ("method: dora", "loss_head: stock, "),
        ("method: qlora", "gradient_checkpointing: true, "),
        ("trainer: sft", "train_sampling_strategy: group_by_length, "),
        ("data: {train_on: all}", ""),
    ],
)
def test_a_packed_step_is_the_padded_step(
    write_recipe, tiny: Path, tmp_path: Path, head: str, more: str
) -> None:
    found = {}
    data = f"data: {{eval_path: {tiny / 'eval.jsonl'}}}\n" if "data" not in head else ""
    for name, value in (("step", "step"), ("padded", "false")):
        text = (
            f"{head}\n{data}training: {{{more}packing: {value}, {STEADY_ADAM}, logging_steps: 1, "
            "max_steps: 7, per_device_train_batch_size: 3, gradient_accumulation_steps: 4, "
            "learning_rate: 1e-3}\n"
        )
        found[name] = run(write_recipe, tmp_path / name, text)
    (packed, weights), (padded, expected) = found["step"], found["padded"]
    for key in ("loss", "grad_norm", "learning_rate", "num_input_tokens_seen", "eval_loss"):
        wanted = [line[key] for line in padded if key in line]
        assert [line[key] for line in packed if key in line] == pytest.approx(
            wanted, rel=1e-5, abs=1e-9
        ), key
        assert wanted or key == "eval_loss"
    assert_same_training(weights, expected)
    assert any(tensor.abs().max() > 1e-3 for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "phi", "mixtral"])
def test_models_that_keep_rows_apart_are_packed(
    family: str, attention: str, dtype: torch.dtype
) -> None:
    more = {"head_dim": 16} if family == "qwen3" else {}
    assert (
        step_packing.find_unsuitable(
            random_model(family, attn_implementation=attention, **more).to(dtype)
        )
        is None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 64}),  # counts positions by itself
        ("falcon_h1", {}),  # carries a state along
        ("mamba", {}),
    ],
)
def test_models_that_do_not_are_padded(family: str, more: dict, dtype: torch.dtype) -> None:
    assert "see each other" in str(
        step_packing.find_unsuitable(random_model(family, **more).to(dtype))
    )


@pytest.mark.parametrize(("layers", "vocab_size"), [(2, 300), (30, 262_144)])
def test_rounding_is_not_taken_for_another_document(layers: int, vocab_size: int) -> None:
    """In bfloat16, the more layers and tokens there are, the further the largest of the differences
    lies out."""
    network = random_model("llama", torch.bfloat16, num_hidden_layers=layers, vocab_size=vocab_size)
    for parameter in network.parameters():  # larger than at the start of a training
        parameter.data *= 1.5 if parameter.dim() > 1 else 1
    assert step_packing.find_unsuitable(network) is None


@pytest.mark.slow
def test_a_real_model_in_16_bits_is_packed(real: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16)
    assert step_packing.find_unsuitable(network) is None


def test_a_run_on_such_a_model_says_so(
    write_recipe, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(step_packing, "find_unsuitable", lambda base, length: "because")
    train.train(load.load_recipe(write_recipe("training: {packing: step}\n")))
    assert "training.packing = false: because" in capfd.readouterr().err


def test_attention_that_is_none_for_a_model_is_taken_out_again(
    write_recipe, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    def refuse(*_, **__) -> None:
        raise NotImplementedError("no kernel for this\nand a trace")

    def install(model: PreTrainedModel, longest: int | None) -> bool:
        assert longest == 512
        AttentionInterface.register("refusing", refuse)
        model.set_attn_implementation("refusing")
        return True

    monkeypatch.setattr(document_attention, "install", install)
    text = "training: {packing: step, packed_length: 2048, max_length: 512, max_steps: 1}\n"
    folder = train.train(load.load_recipe(write_recipe(text)))
    said = capfd.readouterr().err
    assert "attention by document is left out: NotImplementedError: no kernel for this\n" in said
    assert "model.attn_implementation = sdpa" in said
    record = json.loads((folder / "lora_record.json").read_text())
    assert record["status"] == "finished"


def test_long_sequences_are_for_bases_whose_attention_takes_them(
    write_recipe, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(document_attention, "install", lambda model, longest: False)
    monkeypatch.setattr(auto, "choose_packed_length", lambda given: (8192, "a GPU"))
    train.train(load.load_recipe(write_recipe("training: {packing: step, max_steps: 1}\n")))
    said = capfd.readouterr().err
    assert "packed_length = 128 (auto: rows attend through a mask in this base)" in said


@pytest.mark.parametrize("packing", ["step", "false"])
def test_places_of_labels_are_whole_where_batches_are_cut_to_their_rows(
    write_recipe, tmp_path: Path, packing: str
) -> None:
    found = []
    for name, more in (
        ("plain", ""),
        ("dispatched", ", accelerator_config: {dispatch_batches: true}"),
    ):
        folder = tmp_path / name
        text = f"training: {{packing: {packing}, logging_steps: 1, max_steps: 3{more}}}\n"
        found.append(run(write_recipe, folder, text))
    (lines, weights), (others, expected) = found
    assert [line["loss"] for line in lines[:3]] == [line["loss"] for line in others[:3]]
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
