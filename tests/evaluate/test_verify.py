"""`lora verify`: forms of one model are the same function, others are not, by their logits and in
llama.cpp.

Hermetic: the tiny model, an adapter with B ≠ 0, a GGUF converted here. Alone: pytest
tests/evaluate/test_verify.py
"""

from __future__ import annotations

import json
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
from lora_cli.merge import rounding
from lora_cli.merge.merge import merge
from lora_cli.models import probes
from tests.networks import random_model


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


@pytest.fixture(scope="module")
def rounded(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter beside its base and the merged model, in bfloat16: rounding moves it by a mean KL
    of 2.5e-3, and another rope_theta by 0.04."""
    folder = tmp_path_factory.mktemp("rounded")
    base = random_model("llama", torch.bfloat16, vocab_size=512, num_hidden_layers=4)
    base.lm_head.weight.data *= 1000
    base.save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "adapter")
    merge(folder / "adapter", folder / "merged")
    return folder


def test_rounding_beyond_the_limit_of_its_type_is_a_warning(
    rounded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M's bfloat16, trained 12 steps, moved by 0.026; here the limit is lower."""
    monkeypatch.setitem(probes.TRAINED_KL, torch.bfloat16, 1e-4)
    said = verify.verify(str(rounded / "adapter"), str(rounded / "merged"), None)
    assert "39 of 39 tensors equal" in said
    assert "that is rounding, as the adapter merged anew" in capsys.readouterr().err
    with pytest.raises(RejectedError, match="not the same function"):
        verify.verify(str(rounded / "merged"), str(rounded / "base"), None)


def test_another_strength_is_not_rounding_though_each_weight_is_near(
    rounded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor lies some 0.05 of the adapter's change away, where 0.3 are allowed."""
    monkeypatch.setitem(probes.TRAINED_KL, torch.bfloat16, 1e-4)
    shutil.copytree(rounded / "merged", tmp_path / "weaker")
    file = tmp_path / "weaker" / "model.safetensors"
    tensors, before = load_file(file), load_file(rounded / "base" / "model.safetensors")
    weaker = {key: before[key] + 0.95 * (tensors[key].float() - before[key]) for key in tensors}
    save_file({key: tensor.bfloat16() for key, tensor in weaker.items()}, file, {"format": "pt"})
    with pytest.raises(RejectedError, match="not the same function"):
        verify.verify(str(rounded / "adapter"), str(tmp_path / "weaker"), None)


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize(
    ("field", "rope"),
    [
        ("rope_theta", {"rope_theta": 1e5, "rope_type": "default"}),
        ("rope_theta", {"rope_theta": 1e3, "rope_type": "default"}),
        ("factor", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
    ],
)
def test_the_same_weights_by_other_settings_are_another_function(
    rounded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    rope: dict[str, object],
    by_name: bool,
) -> None:
    """By the name of the field, and by the logits were it not known."""
    shutil.copytree(rounded / "merged", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 1e4, "rope_type": "default"}
    config["rope_parameters"] = rope
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    said = f"rope_parameters.{field} is .* in config.json of"
    if not by_name:
        monkeypatch.setattr(rounding, "refuse_other_settings", lambda *given: None)
        monkeypatch.setitem(probes.TRAINED_KL, torch.bfloat16, 0.1)
        said = "config.json of .* makes another function of its weights than that of its base"
    with pytest.raises(RejectedError, match=said):
        verify.verify(str(rounded / "adapter"), str(tmp_path / "other"), None)


def test_what_a_merge_elsewhere_changes_beside_the_function_is_let_pass(
    rounded: Path, tmp_path: Path
) -> None:
    shutil.copytree(rounded / "merged", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config |= {"pad_token_id": 5, "attention_dropout": 0.1, "unsloth_fixed": True, "dtype": None}
    config |= {"initializer_range": 1.0, "use_cache": False, "transformers_version": "4.40.0"}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert "39 of 39" in verify.verify(str(rounded / "adapter"), str(tmp_path / "other"), None)
