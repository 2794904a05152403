"""`lora verify`: forms of one model are the same function, others are not, by their logits and in
llama.cpp.

Hermetic: the tiny model, an adapter with B ≠ 0, a GGUF converted here. Alone: pytest
tests/evaluate/test_verify.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli.common.errors import LoraError, RejectedError
from lora_cli.evaluate import verify
from lora_cli.gguf import quantize, tools
from lora_cli.merge.merge import merge


@pytest.fixture(scope="module")
def forms(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same function as adapter, merged folder and GGUF; another as `base`."""
    folder = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny / "model"),
        LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", use_dora=True),
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny / "model")
    adapted.save_pretrained(folder / "adapter")
    merge(folder / "adapter", folder / "merged")
    shutil.copy(tiny / "model" / "tokenizer.model", folder / "merged")
    tools.convert(folder / "merged", folder / "m.gguf", "f16", tools.find_converter())
    names = {"adapter": folder / "adapter", "merged": folder / "merged", "gguf": folder / "m.gguf"}
    return {**{name: str(path) for name, path in names.items()}, "base": str(tiny / "model")}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("adapter", "merged"),
        ("merged", "adapter"),
        ("merged", "gguf"),
        ("gguf", "adapter"),
        ("gguf", "gguf"),
    ],
)
def test_forms_of_one_model_are_the_same_function(
    forms: dict[str, str], one: str, other: str
) -> None:
    said = verify.verify(forms[one], forms[other], None)
    assert said.startswith(forms[one])
    assert (
        "(limit: mean KL 3.13e-04)" in said
        if "gguf" in (one, other)
        else "(limit: |Δlogit| " in said
    )


@pytest.mark.parametrize("other", ["adapter", "merged", "gguf"])
def test_another_model_is_another_function(forms: dict[str, str], other: str) -> None:
    with pytest.raises(RejectedError, match="not the same function: "):
        verify.verify(forms["base"], forms[other], None)


def test_a_quantised_file_is_judged_by_how_many_bits_it_has(
    forms: dict[str, str], tmp_path: Path
) -> None:
    files = {}
    for kind in ("Q4_K_M", "Q2_K"):
        files[kind] = tmp_path / f"{kind}.gguf"
        quantize.quantize(Path(forms["gguf"]), files[kind], kind)
    said = verify.verify(forms["adapter"], str(files["Q4_K_M"]), None)
    assert "(limit: mean KL 5.00e-01)" in said
    with pytest.raises(RejectedError, match="not the same function: "):
        verify.verify(forms["base"], str(files["Q4_K_M"]), None)
    assert "has no limit" in verify.verify(forms["adapter"], str(files["Q2_K"]), None)


def test_another_tokenizer_is_another_model(forms: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(forms["merged"], tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["primary"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(LoraError, match="splits .* into other tokens"):
        verify.verify(forms["merged"], str(tmp_path / "other"), None)


def test_another_chat_template_is_another_model(forms: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(forms["merged"], tmp_path / "other")
    template = tmp_path / "other" / "chat_template.jinja"
    template.write_text("{{ 'SECRET ' }}" + template.read_text())
    for pair in (
        (forms["merged"], str(tmp_path / "other")),
        (str(tmp_path / "other"), forms["adapter"]),
    ):
        with pytest.raises(RejectedError, match="the chat templates differ"):
            verify.verify(*pair, None)


def test_the_command_prints_the_difference_and_exits_1_beyond_it(
    lora, forms: dict[str, str], tmp_path: Path
) -> None:
    done = lora("verify", forms["adapter"], forms["merged"])
    assert (done.returncode, done.stdout.count("largest |Δlogit|")) == (0, 1), done.stderr
    shutil.copytree(forms["merged"], tmp_path / "off")
    weights = load_file(tmp_path / "off" / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.1
    save_file(weights, tmp_path / "off" / "model.safetensors", metadata={"format": "pt"})
    done = lora("verify", forms["merged"], tmp_path / "off")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: not the same function: ")


def test_one_module_left_unmerged_in_16_bits_is_found_by_its_weights(
    tiny: Path, tmp_path: Path
) -> None:
    """PEFT's own merge in bfloat16, which rounds twice, passes; with one module as it is in the
    base it does not."""
    base = str(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(base)
    torch.manual_seed(0)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=8, lora_alpha=8, target_modules="all-linear"),
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data += 1e-3 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload(safe_merge=True).save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "merged")
    said = verify.verify(str(tmp_path / "adapter"), str(tmp_path / "merged"), None)
    assert " tensors equal, " in said and ", 0.00% of" not in said
    tensors, before = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(f"{base}/model.safetensors"),
    )
    changed = next(name for name in tensors if "v_proj" in name)
    tensors[changed] = before[changed]
    save_file(tensors, tmp_path / "merged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        RejectedError, match=f"{changed} in .* is off by 100.0% of the adapter's change"
    ):
        verify.verify(str(tmp_path / "adapter"), str(tmp_path / "merged"), None)


def test_a_weight_that_no_adapter_changes_must_be_the_bases(
    forms: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(forms["merged"], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RejectedError, match="model.norm.weight in .* differs from the base"):
        verify.verify(forms["adapter"], str(tmp_path / "other"), None)


def test_rounding_is_told_from_another_model_by_the_weights(
    forms: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge in bfloat16 may move a small model by a mean KL of over 0.02."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 16, 64, generator=generator)
    moved = logits + 0.25 * torch.randn(1, 16, 64, generator=generator)
    made = iter([logits, moved] * 2)
    monkeypatch.setattr(
        verify, "_load_form", lambda *given: verify.Form([next(made)], "bfloat16", 4)
    )
    assert "mean KL 3." in verify.verify(forms["adapter"], forms["merged"], None)
    assert "rounding, by the weights" in capsys.readouterr().err
    with pytest.raises(RejectedError, match="not the same function"):
        verify.verify(forms["merged"], forms["base"], None)
