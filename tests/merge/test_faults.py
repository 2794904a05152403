"""One wrong tensor among many: whatever goes wrong with one module of 210, in the arithmetic or on
the way into the file, the merge is refused, though rounding to bfloat16 moves the logits further.

Hermetic: a random bfloat16 Llama of thirty layers with the tiny model's tokenizer, an adapter made
by PEFT. Alone: pytest tests/merge/test_faults.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lora_cli.common.errors import RejectedError
from lora_cli.merge import in_memory, rounding, streaming
from lora_cli.merge.merge import Checked, merge, merge_adapter, refuse_different
from lora_cli.merge.streamed import Streamed
from lora_cli.models import probes, tensors
from lora_cli.models.adapter_folder import Adapter, read_adapter
from tests.networks import random_model

MODULE = "model.layers.17.self_attn.q_proj"
OTHER = "model.layers.17.self_attn.k_proj"
SLIGHT, ROW = "1 % too strong", "one row left unmerged"
"""Faults that, of one module of 210, move the logits no further than the order of sums may."""
Fault = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
FAULTS: dict[str, Fault] = {
    "left unmerged": lambda merged, base, other: base,
    "merged twice": lambda merged, base, other: 2 * merged - base,
    ROW: lambda merged, base, other: torch.cat([merged[:40], base[40:41], merged[41:]]),
    "two rows swapped": lambda merged, base, other: torch.cat([merged[:40], merged[[41, 40]], merged[42:]]),
    "transposed": lambda merged, base, other: merged.T,
    "q for k": lambda merged, base, other: other,
    SLIGHT: lambda merged, base, other: base + 1.01 * (merged - base),
}  # fmt: skip


@pytest.fixture(scope="module")
def deep(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of 210 modules, beside its base."""
    folder = tmp_path_factory.mktemp("deep")
    base = random_model(
        "llama", torch.bfloat16, vocab_size=512, num_hidden_layers=30, num_key_value_heads=4
    )
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    return folder


def damage(name: str, merged: torch.Tensor, deep: Path) -> torch.Tensor:
    """The module's merged weight (float32) with a fault."""
    base = load_file(deep / "base" / "model.safetensors")[f"{MODULE}.weight"].float()
    other = load_file(deep / "right" / "model.safetensors")[f"{OTHER}.weight"].float()
    return FAULTS[name](merged, base, other)


@pytest.fixture(scope="module")
def right(deep: Path) -> Checked:
    """How the right merge was checked."""
    checked = merge_adapter(read_adapter(deep / "adapter"), deep / "right").checked
    assert checked is not None
    return checked


def test_the_record_tells_what_is_exact_from_what_is_rounded(deep: Path, right: Checked) -> None:
    record = json.loads((deep / "right" / "lora_record.json").read_text())["checked"]
    assert right.exact is not None
    assert right.rounded is not None
    assert record["before_rounding"] == right.exact._asdict()
    assert record["rounded"] == right.rounded._asdict()
    assert record["trained"] == right.trained
    assert record["weights"] == f"merged again: {right.weights.partition(': ')[2]}"
    assert 0 < right.exact.max_abs < 1e-3 * right.rounded.max_abs, "bfloat16 has 16 bits fewer"
    # PEFT and transformers alone come to the same distance, over all positions of longer probes
    ids = torch.arange(8, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(deep / "base", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(deep / "right", dtype=torch.float32)
    with torch.inference_mode():
        expected = PeftModel.from_pretrained(base, deep / "adapter")(input_ids=ids).logits
        apart = (merged(input_ids=ids).logits - expected).abs().max().item()
    assert 0.5 * right.rounded.max_abs < apart < 2 * right.rounded.max_abs


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in (SLIGHT, ROW)])
def test_a_fault_of_the_arithmetic_is_caught_before_rounding(
    deep: Path, right: Checked, tmp_path: Path, monkeypatch, name: str
) -> None:
    through = streaming.Plan._merge_through_layer

    def wrong(plan, tensor, changed, adapter, start, stop):  # noqa: ANN001, ANN202
        rows = through(plan, tensor, changed, adapter, start, stop)
        if tensor != f"{MODULE}.weight":
            return rows
        assert (start, stop) == (0, 64)
        return damage(name, rows, deep)

    monkeypatch.setattr(streaming.Plan, "_merge_through_layer", wrong)
    with pytest.raises(RejectedError, match="before rounding, the merged model differs") as caught:
        merge(deep / "adapter", tmp_path / "out")
    # which rounding would have hidden
    moved = float(str(caught.value).split("|Δlogit| ")[1].split(",")[0])
    assert right.rounded is not None
    assert moved < right.rounded.max_abs


def test_a_scale_that_is_off_is_caught_before_rounding(
    deep: Path, tmp_path: Path, monkeypatch
) -> None:
    """Of all modules, as a wrong scale would be."""
    through = streaming.Plan._merge_through_layer

    def wrong(plan, tensor, changed, adapter, start, stop):  # noqa: ANN001, ANN202
        merged = through(plan, tensor, changed, adapter, start, stop)
        return FAULTS[SLIGHT](merged, plan.weights.rows(tensor, start, stop), merged)

    monkeypatch.setattr(streaming.Plan, "_merge_through_layer", wrong)
    with pytest.raises(RejectedError, match="before rounding, the merged model differs"):
        merge(deep / "adapter", tmp_path / "out")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_on_the_way_into_the_file_is_caught_by_merging_again(
    deep: Path, right: Checked, tmp_path: Path, monkeypatch, name: str
) -> None:
    fill = tensors.fill_tensor

    def wrong(entry, tensor, pieces):  # noqa: ANN001, ANN202
        if tensor == f"{MODULE}.weight":
            pieces = [damage(name, torch.cat(list(pieces)).float(), deep).bfloat16()]
        return fill(entry, tensor, pieces)

    monkeypatch.setattr(tensors, "fill_tensor", wrong)
    said = f"{MODULE}.weight in the merged model is off by .* of the adapter's change"
    with pytest.raises(RejectedError, match=said):
        merge(deep / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["left unmerged", "transposed"])
def test_a_fault_of_the_merge_in_memory_is_caught_before_rounding(
    deep: Path, right: Checked, tmp_path: Path, monkeypatch, name: str
) -> None:
    fold = in_memory.fold_adapter

    def wrong(adapted):  # noqa: ANN001, ANN202
        plain, modules = fold(adapted)
        merged = plain.get_submodule(MODULE).weight
        merged.data = damage(name, merged.data, deep)
        return plain, modules

    monkeypatch.setattr(in_memory, "fold_adapter", wrong)
    with pytest.raises(RejectedError, match="before rounding, the merged model differs"):
        merge(deep / "adapter", tmp_path / "out", stream=False)


def test_a_file_that_is_not_what_was_merged_in_memory_is_caught(
    deep: Path, tmp_path: Path, monkeypatch
) -> None:
    save = in_memory.Whole.write

    def wrong(way, folder, dtype, ends):  # noqa: ANN001, ANN202
        modules = save(way, folder, dtype, ends)
        file = folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return modules

    monkeypatch.setattr(in_memory.Whole, "write", wrong)
    with pytest.raises(RejectedError, match="in the merged model's files is not what was written"):
        merge(deep / "adapter", tmp_path / "out", stream=False)


@pytest.mark.parametrize(
    ("moved", "was_exact", "outcome"),
    [
        (0.25, False, "refused"),
        (0.25, True, "warned"),
        (0.01, True, "kept"),
        (3.0, True, "refused"),
        (float("nan"), True, "refused"),
    ],
)
def test_rounding_is_no_reason_to_refuse_what_was_exact_before(
    moved: float, was_exact: bool, outcome: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M's bfloat16, trained 12 steps, moved by a mean KL of 0.026 as it was rounded."""
    generator = torch.Generator().manual_seed(0)
    expected = [torch.randn(1, 16, 64, generator=generator)]
    given = [expected[0] + moved * torch.randn(1, 16, 64, generator=generator)]
    adapter = cast(Adapter, SimpleNamespace(base=SimpleNamespace(config=LlamaConfig())))

    def compare() -> float:
        found = refuse_different(adapter, given, expected, torch.bfloat16, "rounded, ", was_exact)
        return found.mean_kl

    if outcome == "refused":
        with pytest.raises(RejectedError, match="rounded, the merged model differs"):
            compare()
    else:
        assert (compare() > 2e-2) == (outcome == "warned")
    warned = "warning: rounding the merged weights to bfloat16" in capsys.readouterr().err
    assert warned == (outcome == "warned")


@pytest.mark.parametrize("stream", [None, False])
@pytest.mark.parametrize("by_name", [True, False])
def test_settings_that_are_not_the_base_s_are_no_rounding(
    deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool, stream: bool | None
) -> None:
    """By the name of the field, and by the logits where these lie beyond the type's limit."""
    check = Streamed.check_files if stream is None else in_memory.Whole.check_files

    def wrong(way, folder, dtype):  # noqa: ANN001, ANN202
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] *= 10
        (folder / "config.json").write_text(json.dumps(config))
        check(way, folder, dtype)

    monkeypatch.setattr(Streamed if stream is None else in_memory.Whole, "check_files", wrong)
    said = "rope_parameters.rope_theta is 100000.0 in config.json of the merged model"
    if not by_name:
        monkeypatch.setattr(rounding, "refuse_other_settings", lambda *given: None)
        monkeypatch.setitem(probes.TRAINED_KL, torch.bfloat16, 1e-12)
        said = "config.json of the merged model makes another function"
    with pytest.raises(RejectedError, match=said):
        merge(deep / "adapter", tmp_path / "out", stream=stream)
