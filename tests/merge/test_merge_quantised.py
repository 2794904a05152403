"""Adapters of bases that are quantised already: merged into the dequantised weights, or into a
16-bit base that is named, with the distance measured.

Hermetic: the tiny model, quantised here; adapters with B ≠ 0 made by PEFT. Alone: pytest
tests/merge/test_merge_quantised.py
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_cli.common import LoraError, UsageError
from lora_cli.evaluate.open_answerers import open_models
from lora_cli.evaluate.verify import verify
from lora_cli.merge.combine import combine
from lora_cli.merge.extract import convert, extract
from lora_cli.merge.merge import merge
from lora_cli.models import Base, make_probes, probes
from tests import quantised, units

KINDS = {
    "nf4": lambda model, folder: quantised.save_bitsandbytes(model, folder, **quantised.NF4),
    "nf4 doubly": lambda model, folder: quantised.save_bitsandbytes(
        model, folder, torch.float32, **quantised.DOUBLY
    ),
    "fp4": lambda model, folder: quantised.save_bitsandbytes(model, folder, torch.float16),
    "nf4 but some": lambda model, folder: quantised.save_bitsandbytes(
        model, folder, **quantised.DOUBLY, llm_int8_skip_modules=["lm_head", "q_proj"]
    ),
    "fp8": lambda model, folder: quantised.save_fp8(model, folder, (32, 32)),
}


@pytest.fixture
def nf4(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base in NF4, and an adapter that PEFT made on it."""
    base = quantised.save_bitsandbytes(tiny / "model", tmp_path / "nf4", **quantised.DOUBLY)
    return base, quantised.save_adapter(base, tmp_path / "adapter")


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dequantised_base_and_the_adapter_s_product(
    tiny: Path, tmp_path: Path, kind: str, stream: bool, capsys
) -> None:
    base = KINDS[kind](tiny / "model", tmp_path / "base")
    adapter = quantised.save_adapter(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "out", stream=stream)
    wanted = quantised.merge_plainly(base, adapter)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == wanted.keys() and len(merged) == 21
    dtype = getattr(torch, json.loads((base / "config.json").read_text())["dtype"])
    for name, weight in merged.items():
        assert weight.dtype == dtype
        assert units.same_sum(weight, wanted[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    record = json.loads((tmp_path / "out" / "lora_record.json").read_text())
    assert record["into"] == f"dequantised, from {Base(str(base)).quantised}"
    assert "already quantised (" in capsys.readouterr().err
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "21 of 21 tensors equal" in verify(str(adapter), str(tmp_path / "out"), None)


def test_in_a_16bit_base_by_name_it_is_measured_how_far_that_lies(
    nf4: tuple[Path, Path], tiny: Path, tmp_path: Path, capsys
) -> None:
    base, adapter = nf4
    merge(adapter, tmp_path / "out", base=str(tiny / "model"))
    said = capsys.readouterr().err
    plain = tmp_path / "plain"
    shutil.copytree(adapter, plain)
    wanted = quantised.merge_plainly(tiny / "model", plain)
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        assert units.same_sum(weight, wanted[name]), name
    # the distance, measured by PEFT and transformers on the two whole models
    trained, other = (_last_logits(folder, adapter) for folder in (base, tiny / "model"))
    apart = probes.compare_logits(trained, other)
    given = re.search(r"this far from what was trained: .*mean KL ([\d.e+-]+)", said)
    assert given and float(given[1]) == pytest.approx(apart.mean_kl, rel=0.1)
    distance = re.search(r"lie up to ([\d.]+)% from those of .*\((\S+)\)", said)
    assert distance is not None
    first, second = (
        quantised.merge_plainly(each, plain)[distance[2]] for each in (base, tiny / "model")
    )
    size = load_file(tiny / "model" / "model.safetensors")[distance[2]].norm()
    assert float(distance[1]) == pytest.approx(
        100 * float((first - second).norm() / size), rel=0.02
    )
    record = json.loads((tmp_path / "out" / "lora_record.json").read_text())
    assert record["into"] == f"its own; trained on {base}, which is quantised"


def _last_logits(base: Path, adapter: Path) -> list[torch.Tensor]:
    """Base, dequantised, with adapter by PEFT: logits of the last positions of each probe."""
    network = AutoModelForCausalLM.from_pretrained(base)
    state = quantised.merge_plainly(base, adapter)
    if getattr(network, "hf_quantizer", None) is not None:
        network = network.dequantize()
    network = network.float()
    network.load_state_dict(state)
    made = make_probes(Base(str(base)).load_tokenizer())
    short = [probe._replace(ids=probe.ids[:32]) for probe in made]
    return [rows[-8:] for rows in probes.compute_logits(network, short)]


def test_another_model_in_a_quantised_base_s_place_is_refused(
    nf4: tuple[Path, Path], tiny: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny / "model", other)
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = torch.randn_like(weights[name]) * weights[name].std()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraError, match=rf"was made from: {name} is off by 14\d%"):
        merge(nf4[1], tmp_path / "out", base=str(other))
    assert not (tmp_path / "out").exists()
    for call in (
        lambda: convert(nf4[1], tmp_path / "out", None, str(other)),
        lambda: combine([nf4[1], nf4[1]], tmp_path / "out", None, "cat", None, None, str(other)),
        lambda: verify(str(nf4[1]), str(other), str(other)),
        lambda: open_models([str(nf4[1])], str(other)),
    ):
        with pytest.raises(LoraError, match="was made from"):
            call()


def test_a_quantised_base_has_no_original_weights(nf4: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it has no original weights"):
        merge(nf4[1], tmp_path / "out", original=True)


def test_others_are_refused_before_their_weights_are_looked_for(
    nf4: tuple[Path, Path], tiny: Path, tmp_path: Path
) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": 128}
    awq = str(quantised.save_configured(tiny / "model", tmp_path / "awq", settings))
    calls = [
        lambda: merge(nf4[1], tmp_path / "out", base=awq),
        lambda: convert(nf4[1], tmp_path / "out", None, awq),
        lambda: extract(awq, str(tiny / "model"), tmp_path / "out", 4),
        lambda: extract(str(tiny / "model"), awq, tmp_path / "out", 4),
        lambda: verify(awq, str(tiny / "model"), None),
        lambda: verify(str(nf4[1]), str(tiny / "model"), awq),
    ]
    for call in calls:
        with pytest.raises(LoraError, match=r"is already quantised \(AWQ, 4 bits, groups of 128\)"):
            call()
    assert not (tmp_path / "out").exists()


def test_extracting_converting_and_combining_take_a_4bit_base(
    nf4: tuple[Path, Path], tiny: Path, tmp_path: Path
) -> None:
    base, adapter = nf4
    extract(str(base), str(tiny / "model"), tmp_path / "extracted", 256)
    wanted = load_file(tiny / "model" / "model.safetensors")
    given = quantised.merge_plainly(base, tmp_path / "extracted")
    for name, weight in given.items():
        if "_proj" in name:
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-4)
    convert(adapter, tmp_path / "converted", 4, None)
    combine(
        [adapter, tmp_path / "converted"], tmp_path / "both", "0.5,0.5", "cat", None, None, None
    )
    merge(tmp_path / "both", tmp_path / "out")
    once = quantised.merge_plainly(base, adapter)
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(weight.float(), once[name], rtol=8e-3, atol=1e-4)


def test_experts_in_mxfp4_are_dequantised_and_merged(tiny: Path, tmp_path: Path) -> None:
    base = quantised.save_mxfp4(tiny / "model", tmp_path / "base")
    adapter = quantised.save_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", "o_proj"]
    )
    merge(adapter, tmp_path / "out")
    wanted = quantised.merge_plainly(base, adapter)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    merged = network.state_dict()
    assert merged.keys() == wanted.keys()
    assert merged["model.layers.0.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    for name, weight in merged.items():
        assert units.same_sum(weight, wanted[name]), name
