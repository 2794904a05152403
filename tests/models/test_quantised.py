"""A base that is quantised already is known from its config.json, and its weights are read as they
dequantise.

Hermetic: the tiny model, quantised here by bitsandbytes, or folders without weights. Alone: pytest
tests/models/test_quantised.py
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lora_cli.common import LoraError, UsageError
from lora_cli.doctor.reference.nf4 import NF4Tensor
from lora_cli.models import Base, Tensors
from lora_cli.models.dequantised import FourBit
from lora_cli.models.quantised import DEQUANTISED, IN_4BIT, IN_8BIT, Quantised, find_quantised
from lora_cli.recipe import load
from tests import quantised

METHODS = sorted(AUTO_QUANTIZATION_CONFIG_MAPPING)
FOREIGN = [each for each in METHODS if each not in (IN_4BIT, *DEQUANTISED)] + ["exl3", "modelopt"]


def recipe_on(write_recipe, base: Path, more: str = ""):
    return load.load_recipe(write_recipe(f"model: {{name_or_path: {base}}}\n{more}"))


def settings_of(method: str) -> dict:
    if method.startswith("bitsandbytes"):
        return {"quant_method": "bitsandbytes", f"load_in_{method[-4:]}": True}
    return {"quant_method": method, "bits": 4, "group_size": 128}


def test_every_kind_that_transformers_knows_is_seen_without_weights(
    tiny: Path, tmp_path: Path, write_recipe
) -> None:
    assert len(FOREIGN) >= 24
    for method in FOREIGN:
        base = quantised.save_configured(tiny / "model", tmp_path / method, settings_of(method))
        with pytest.raises(LoraError, match="is already quantised .* lora does not train on") as e:
            Base.of_recipe(recipe_on(write_recipe, base))
        assert str(Base(str(base)).quantised).lower().startswith(method.partition("_")[0].lower())
        assert "16-bit" in str(e.value.hint)
        if method != IN_8BIT:  # which bitsandbytes dequantises
            with pytest.raises(LoraError, match="already quantised"):
                Base(str(base)).load_plain()


def test_what_is_no_quantisation_is_none(tiny: Path, tmp_path: Path) -> None:
    for number, settings in enumerate((None, {})):
        base = quantised.save_configured(tiny / "model", tmp_path / str(number), settings)
        assert Base(str(base)).quantised is None


def test_mlx_and_old_compressed_folders_are_seen_too(tiny: Path, tmp_path: Path) -> None:
    mlx = {"group_size": 64, "bits": 4}
    base = quantised.save_configured(tiny / "model", tmp_path / "mlx", mlx, "quantization")
    assert str(Base(str(base)).quantised) == (
        "in a way that config.json does not name, 4 bits, groups of 64"
    )
    old = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    base = quantised.save_configured(tiny / "model", tmp_path / "old", old, "compression_config")
    assert str(Base(str(base)).quantised) == "compressed-tensors"


def test_a_kind_whose_package_is_missing_is_named_before_weights_are_looked_for(
    tiny: Path, tmp_path: Path
) -> None:
    asked = "transformers does not know this kind"
    assert Quantised("exl3", {}).explain_unloadable() == asked
    assert Quantised("fp8", {"quant_method": "fp8"}).explain_unloadable() is None
    aqlm = {"quant_method": "aqlm"}
    said = Quantised("aqlm", aqlm).explain_unloadable()
    assert said and "pip install aqlm" in said


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("lora", "", "method is lora, but .*bitsandbytes NF4, scales quantised as well"),
        ("dora", "", "--set method=qdora"),
        ("qlora", "quantization: {bnb_4bit_quant_type: fp4}", "bnb_4bit_quant_type is fp4, but"),
        ("qlora", "quantization: {bnb_4bit_use_double_quant: false}", "double_quant is False, but"),
        ("qlora", "lora: {init_lora_weights: loftq}", "what it lost is not in its files"),
    ],
)
def test_a_recipe_that_contradicts_a_4bit_base_is_refused(
    tiny: Path, tmp_path: Path, write_recipe, method: str, more: str, said: str
) -> None:
    settings = {**quantised.DOUBLY, "quant_method": "bitsandbytes", "load_in_4bit": True}
    base = quantised.save_configured(tiny / "model", tmp_path / "base", settings)
    with pytest.raises((LoraError, UsageError)) as error:
        Base.of_recipe(recipe_on(write_recipe, base, f"method: {method}\n{more}\n"))
    assert re.search(said, f"{error.value.message} {error.value.hint}")


def test_keys_that_agree_with_a_4bit_base_are_taken(
    tiny: Path, tmp_path: Path, write_recipe
) -> None:
    settings = {**quantised.NF4, "quant_method": "bitsandbytes", "load_in_4bit": True}
    base = quantised.save_configured(tiny / "model", tmp_path / "base", settings)
    more = "method: qlora\nquantization: {bnb_4bit_use_double_quant: false}\n"
    assert Base.of_recipe(recipe_on(write_recipe, base, more)).quantised


STORED = [
    quantised.NF4,
    quantised.DOUBLY,
    {"bnb_4bit_quant_type": "fp4"},
    {**quantised.NF4, "bnb_4bit_quant_storage": torch.bfloat16},
    {**quantised.DOUBLY, "llm_int8_skip_modules": ["lm_head", "down_proj"]},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("settings", STORED, ids=str)
def test_4bit_weights_are_read_as_transformers_dequantises_them(
    tiny: Path, tmp_path: Path, settings: dict, dtype: torch.dtype
) -> None:
    base = quantised.save_bitsandbytes(tiny / "model", tmp_path / "base", dtype, **settings)
    wanted = AutoModelForCausalLM.from_pretrained(base).dequantize().state_dict()
    given = Base(str(base)).tensors
    assert given is not None and given.entries.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert given.entries[name].shape == tuple(weight.shape)
        assert torch.equal(given.rows(name), weight), name
        assert torch.equal(given.rows(name, 3, 9), weight[3:9]), name


def test_4bit_rows_that_bitsandbytes_misreads_are_read_rightly(tmp_path: Path) -> None:
    weight = torch.linspace(0.01, 1, 24 * 48).reshape(24, 48)
    stored = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    parts = {f"x.weight.{key}": part for key, part in stored.quant_state.as_dict(True).items()}
    save_file({"x.weight": stored.data, **parts}, tmp_path / "x.safetensors")
    given = FourBit(Tensors([tmp_path / "x.safetensors"]))
    wanted = NF4Tensor(weight, double_quant=stored.compress_statistics).dequantize()
    torch.testing.assert_close(given.rows("x.weight"), wanted, rtol=2e-2, atol=1e-3)


def test_rows_that_were_read_may_be_written_to(tiny: Path, tmp_path: Path) -> None:
    base = quantised.save_bitsandbytes(
        tiny / "model", tmp_path / "base", torch.float32, **quantised.NF4
    )
    given, name = Base(str(base)).tensors, "model.layers.0.mlp.up_proj.weight"
    assert given is not None
    before = given.rows(name, 0, 4)
    given.rows(name, 0, 4).zero_()
    assert before.any() and torch.equal(given.rows(name, 0, 4), before)


def test_a_description_of_4bit_weights_that_is_none_is_refused(tmp_path: Path) -> None:
    state = torch.frombuffer(bytearray(b'{"dtype": "float32", "shape": [9, 9]}'), dtype=torch.uint8)
    parts = {"x.weight": torch.zeros(8, 1, dtype=torch.uint8)}
    parts["x.weight.quant_state.bitsandbytes__nf4"] = state
    save_file(parts, tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match="does not describe 4-bit weights"):
        FourBit(Tensors([tmp_path / "x.safetensors"]))


@pytest.mark.parametrize(("block", "powers"), [((32, 32), False), ((1, 32), True)])
def test_fp8_weights_are_read_as_transformers_dequantises_them(
    tiny: Path, tmp_path: Path, block: tuple[int, int], powers: bool
) -> None:
    base = Base(str(quantised.save_fp8(tiny / "model", tmp_path / "base", block, powers)))
    options = {"dtype": torch.float32, "quantization_config": FineGrainedFP8Config(dequantize=True)}
    wanted = AutoModelForCausalLM.from_pretrained(base.name, **options).state_dict()
    loaded = base.load(torch.float32).state_dict()
    given = base.tensors
    assert given is not None and given.entries.keys() == wanted.keys() == loaded.keys()
    for name, weight in wanted.items():
        assert torch.equal(given.rows(name).float(), weight), name
        assert torch.equal(loaded[name], weight), name


def test_a_4bit_base_computes_in_the_type_of_the_run_and_keeps_its_gradients(
    tiny: Path, tmp_path: Path
) -> None:
    base = quantised.save_bitsandbytes(tiny / "model", tmp_path / "base", **quantised.NF4)
    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        network = Base(str(base)).load(torch.float32, chosen)
    layers = [each for each in network.modules() if isinstance(each, Linear4bit)]
    assert len(layers) == 14
    assert {each.compute_dtype for each in layers} == {torch.float32}
    assert not any(each.support_avx512bf16_for_cpu for each in layers)


def test_settings_in_a_text_model_s_own_part_are_found(tiny: Path, tmp_path: Path) -> None:
    base = Base(str(tiny / "model"))

    class Outer:
        quantization_config = None

        def get_text_config(self) -> object:
            inner = type("Inner", (), {"quantization_config": {"quant_method": "awq"}})
            return inner()

    assert find_quantised(base.config) is None
    assert str(find_quantised(Outer())) == "AWQ"  # type: ignore[arg-type]
