"""The streaming merge against PEFT's `merge_and_unload`, tensor for tensor, for every shape and
type.

The oracle is PEFT on the base in its own type, saved by transformers. Where PEFT rounds more than
once (it rounds an embedding's change before adding it), the oracle is its merge in float32, rounded
once. What no product is added to is equal bit for bit; blocks of rows may be multiplied by another
kernel than the whole (`tests/units.py`). Hermetic: tiny random models with B ≠ 0, several shards,
rows in several blocks. Alone: pytest tests/merge/test_streaming.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from lora_cli.common import devices
from lora_cli.common.errors import LoraError, RejectedError, UsageError
from lora_cli.evaluate import verify as compare
from lora_cli.gguf import adapter
from lora_cli.merge import combine, extract, layerwise_logits, merge, streaming, streaming_plan
from lora_cli.models import adapter_folder, tensors
from lora_cli.models import probes as verify
from lora_cli.models.base import Base
from lora_cli.recipe import load
from lora_cli.train import run
from tests.units import same_sum

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LINEAR = "all-linear"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "patterns": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    ),
    "an unusual rank": ("llama", {"r": 33, "lora_alpha": 7}),
    "some layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "lora_bias": ("qwen", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias all": ("qwen", {"bias": "all"}),
    "bias lora_only": (
        "qwen",
        {"target_modules": ["q_proj"], "bias": "lora_only", "use_dora": True},
    ),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "embeddings dora": ("llama", {"target_modules": ["embed_tokens", "k_proj"], "use_dora": True}),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "input_layernorm"]}),
    "trained rows": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [3, 100, 7], "lm_head": [5]}},
    ),
    "tied": ("tied", {}),
    "tied, trained rows": ("tied", {"trainable_token_indices": [9, 4]}),
    "target_parameters": (
        "llama",
        {"target_modules": ["q_proj"], "target_parameters": ["v_proj.weight"]},
    ),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv1d dora": (
        "gpt2",
        {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
}
WHOLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": (
        "moe",
        {"target_parameters": ["experts.down_proj"], "target_modules": ["q_proj"]},
        "use other names for the tensors",
    ),
    "whole tied ends": ("tied", {"modules_to_save": ["embed_tokens"]}, "tied"),
    "a start of the weights": ("llama", {"init_lora_weights": "pissa"}, "pissa"),
    "kasa": ("llama", {"kasa_config": {"beta": 1e-4}}, "a KaSA takes part of each weight out"),
}
TINY: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
SIZES = {
    **TINY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory):
    """`made(name, dtype)` is the folder of a base in several shards."""
    root = tmp_path_factory.mktemp("bases")
    configs = {
        "tied": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
        "qwen": lambda: Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False),
        "gpt2": lambda: GPT2Config(**TINY, n_embd=64, n_layer=2, n_head=4),
        "moe": lambda: MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4),
    }

    def make(name: str, dtype: torch.dtype) -> Path:
        folder = root / f"{name}-{dtype}"
        if not folder.exists():
            torch.manual_seed(0)
            if name in configs:
                base = AutoModelForCausalLM.from_config(configs[name](), dtype=dtype)
            else:
                base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=dtype)
            base.save_pretrained(folder, max_shard_size="100KB")
            assert (folder / tensors.INDEX).is_file()
            AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder)
        return folder

    return make


def save_adapter(base: Path, folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """An adapter of PEFT's alone, each of its tensors away from where it starts."""
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    adapted = get_peft_model(
        network, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options})
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)


def peft_merge(base: Path, adapter: Path, dtype: torch.dtype, out: Path) -> dict[str, torch.Tensor]:
    network = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    PeftModel.from_pretrained(network, adapter).merge_and_unload().save_pretrained(out)
    return tensors_of(out)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def multiplied(adapter: Path) -> set[str]:
    """The weights to which the adapter adds a product of matrices."""
    keys = load_file(adapter / "adapter_model.safetensors")
    paths = {
        re.split(r"\.(?:base_layer\.)?lora_(?:embedding_)?A", key)[0] for key in keys if "_A" in key
    }
    return {f"{path.removeprefix('base_model.model.')}.weight" for path in paths}


def assert_merged(
    given: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor], adapter: Path
) -> None:
    """Products to the last places, what is not one to the bit."""
    assert given.keys() == oracle.keys()
    products = multiplied(adapter)
    assert products < given.keys()
    for key, tensor in given.items():
        assert (
            same_sum(tensor, oracle[key])
            if key in products
            else torch.equal(tensor, oracle[key].to(tensor.dtype))
        ), key


ROW_BY_ROW = [
    (shape, dtype, 1) for shape in ("lora", "dora", "an unusual rank") for dtype in ("fp32", "bf16")
]


@pytest.mark.parametrize(
    ("shape", "dtype", "block"),
    [*((shape, dtype, 16384) for shape in SHAPES for dtype in DTYPES), *ROW_BY_ROW],
)
def test_it_is_merge_and_unload_to_the_last_places(
    made, tmp_path: Path, monkeypatch, shape: str, dtype: str, block: int
) -> None:
    """In blocks of a few rows, and of one, which every processor multiplies by another kernel than
    the whole."""
    monkeypatch.setattr(tensors, "BLOCK", block)
    assert len(list(tensors.split_rows((128, 128)))) == (
        2 * 2 if block > 1 else 128
    )  # read where they are made
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # several at a time
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    (name, options), wanted = SHAPES[shape], DTYPES[dtype]
    base, adapter, out = made(name, wanted), tmp_path / "adapter", tmp_path / "out"
    save_adapter(base, adapter, wanted, options)
    merged = merge.merge_adapter(adapter_folder.read_adapter(adapter), out, stream=True)
    assert merged.modules == sum(
        key.endswith(("lora_A.weight", "embedding_A"))
        for key in load_file(adapter / "adapter_model.safetensors")
    )
    oracle = peft_merge(base, adapter, wanted, tmp_path / "peft")
    once = peft_merge(base, adapter, torch.float32, tmp_path / "peft32")
    given, before = tensors_of(out), tensors_of(base)
    assert any(
        not torch.equal(tensor, before[key]) for key, tensor in given.items()
    )  # or it would compare nothing
    assert {tensor.dtype for tensor in given.values()} == {wanted}
    assert_merged(given, once, adapter)
    # PEFT rounds twice: an embedding's change before it is added, and what it merges in another
    # type
    twice = {
        "embeddings": ["model.embed_tokens.weight"],
        "target_parameters": sorted(multiplied(adapter)),
    }
    for key in given.keys() - set(twice.get(shape, [])):
        assert same_sum(oracle[key].to(wanted), once[key]), key


@pytest.mark.parametrize("shape", WHOLE)
def test_what_cannot_be_streamed_says_why_and_is_merged_whole(
    made, tmp_path: Path, capfd, shape: str
) -> None:
    name, options, reason = WHOLE[shape]
    base, adapter = made(name, torch.float32), tmp_path / "adapter"
    save_adapter(base, adapter, torch.float32, options)
    leaves_base = shape not in ("a start of the weights", "kasa")
    assert adapter_folder.read_adapter(adapter).shares_base == leaves_base
    with pytest.raises(LoraError, match=f"cannot be merged in constant memory: .*{reason}"):
        merge.merge(adapter, tmp_path / "out", stream=True)
    if shape != "a start of the weights":  # which is another adapter at each load
        merge.merge(adapter, tmp_path / "out")
        said = capfd.readouterr().err
        assert "the whole model is loaded: " in said
        assert reason in said
        oracle = peft_merge(base, adapter, torch.float32, tmp_path / "peft")
        given = tensors_of(tmp_path / "out")
        assert given.keys() == oracle.keys()
        assert all(torch.equal(tensor, oracle[key]) for key, tensor in given.items())


def test_tied_weights_that_differ_in_the_files_are_kept_apart(
    tiny: Path, tmp_path: Path, capfd
) -> None:
    # transformers leaves them untied, whatever the configuration says
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny / "model", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    save_adapter(base, adapter, torch.float32, {})
    merge.merge(adapter, tmp_path / "out")
    assert "the whole model is loaded" not in capfd.readouterr().err
    oracle = peft_merge(base, adapter, torch.float32, tmp_path / "peft")
    given = tensors_of(tmp_path / "out")
    assert not torch.equal(oracle["lm_head.weight"], oracle["model.embed_tokens.weight"])
    assert given.keys() == oracle.keys()
    merge.merge(adapter, tmp_path / "whole", stream=False)
    whole = tensors_of(tmp_path / "whole")
    for key, tensor in given.items():
        assert torch.equal(whole[key], oracle[key]), key  # the same operations on whole tensors
        torch.testing.assert_close(tensor, oracle[key])
    for made in ("out", "whole", "peft"):
        said = json.loads((tmp_path / made / "config.json").read_text())
        assert said["tie_word_embeddings"] is False, made


@pytest.mark.parametrize(
    ("method", "original"),
    [
        ("lora", False),
        ("qlora", False),
        ("qlora", True),
        ("qdora\nmodel: {dtype: bfloat16}", False),
        (
            "qlora\nquantization: {bnb_4bit_use_double_quant: false, bnb_4bit_quant_type: fp4}",
            False,
        ),
    ],
)
def test_both_ways_write_the_same_folder(
    write_recipe, tmp_path: Path, capfd, method: str, original: bool
) -> None:
    adapter = run.train(
        load.load_recipe(write_recipe(f"method: {method}\ntraining: {{learning_rate: 1e-2}}\n"))
    )
    info = adapter_folder.read_adapter(adapter)
    for stream_it, out in ((True, tmp_path / "streamed"), (False, tmp_path / "whole")):
        merge.merge_adapter(info, out, stream=stream_it, original=original)
    said = capfd.readouterr().err
    if method != "lora":
        into = "original weights, as asked" if original else "dequantised weights"
        assert said.count(f"merged into the {into}") == 2
    assert_merged(tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "whole"), adapter)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "streamed").iterdir())
    for name in names:
        # a card has the folder's name and the figures, which differ in their last digits
        if name not in ("model.safetensors", "lora_record.json", "README.md"):
            assert (tmp_path / "streamed" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes(), name


def test_original_weights_are_for_adapters_trained_in_4_bits(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="was not trained on 4-bit weights"):
        merge.merge(foreign, tmp_path / "out", original=True)


def test_the_original_weights_are_not_what_was_trained_on(write_recipe, tmp_path: Path) -> None:
    adapter = run.train(load.load_recipe(write_recipe("method: qlora\n")))
    info = adapter_folder.read_adapter(adapter)
    for original in (False, True):
        merge.merge_adapter(info, tmp_path / str(original), original=original)
    there, here = tensors_of(tmp_path / "True"), tensors_of(tmp_path / "False")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(there[name], here[name])
    assert torch.equal(there["lm_head.weight"], here["lm_head.weight"])  # which is not quantised


@pytest.mark.parametrize(
    "shape", ["lora", "dora", "lora_bias", "embeddings", "trained rows", "tied", "conv1d dora"]
)
def test_logits_read_weight_by_weight_are_those_of_the_loaded_model(
    made, tmp_path: Path, shape: str
) -> None:
    name, options = SHAPES[shape]
    base, adapter = made(name, torch.float32), tmp_path / "adapter"
    save_adapter(base, adapter, torch.float32, options)
    probes = verify.make_probes(AutoTokenizer.from_pretrained(base))
    network = AutoModelForCausalLM.from_pretrained(base)
    plain = [rows[-layerwise_logits.KEPT :] for rows in verify.compute_logits(network, probes)]
    wanted = [
        rows[-layerwise_logits.KEPT :]
        for rows in verify.compute_logits(PeftModel.from_pretrained(network, adapter), probes)
    ]
    plan, adapted = streaming_plan.make_plan(
        adapter_folder.read_adapter(adapter), torch.float32, None
    )
    given = layerwise_logits.walk_logits(adapted, plan.read, plan, probes)
    difference = verify.compare_logits(wanted, given)
    assert difference.max_abs < 1e-4 * difference.spread
    assert (
        verify.compare_logits(plain, given).max_abs > 1e-2 * difference.spread
    )  # the adapter does something
    there = layerwise_logits.walk_logits_of(Base(str(base)), torch.float32, probes)
    assert there is not None
    assert verify.compare_logits(plain, there).max_abs < 1e-4 * difference.spread


@pytest.fixture
def foreign(made, tmp_path: Path) -> Path:
    base = made("llama", torch.bfloat16)
    save_adapter(base, tmp_path / "adapter", torch.bfloat16, {})
    return tmp_path / "adapter"


def test_one_file_of_another_name_keeps_its_index(tiny: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny / "model", tmp_path / "base"))
    names, file = load_file(base / tensors.SINGLE), "s-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (base / tensors.INDEX).write_text(json.dumps(index))
    (base / tensors.SINGLE).rename(base / file)
    save_adapter(base, tmp_path / "adapter", torch.float32, {})
    given = adapter_folder.read_adapter(tmp_path / "adapter", str(base))
    merge.merge_adapter(given, tmp_path / "out", True)
    wanted = peft_merge(base, tmp_path / "adapter", torch.float32, tmp_path / "peft")
    merged = load_file(tmp_path / "out" / file)
    assert merged.keys() == wanted.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_one_weight_changed_between_writing_and_checking_is_caught(
    foreign: Path, tmp_path: Path, monkeypatch
) -> None:
    write = streaming.write

    def corrupted(plan, folder, dtype):  # noqa: ANN001, ANN202
        result = write(plan, folder, dtype)
        path = sorted(folder.glob("*.safetensors"))[1]
        data = bytearray(path.read_bytes())
        data[-1] ^= 0x80  # the sign of one weight
        path.write_bytes(data)
        return result

    monkeypatch.setattr(streaming, "write", corrupted)
    with pytest.raises(RejectedError, match=r"is not what was written; left in .*out.rejected"):
        merge.merge(foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "config.json").is_file()
    with pytest.raises(LoraError, match="out.rejected already exists"):
        merge.merge(foreign, tmp_path / "out")


def test_a_merge_that_comes_to_no_numbers_is_rejected_unchecked_too(
    foreign: Path, tmp_path: Path, monkeypatch
) -> None:
    through = streaming.Plan._merge_through_layer
    monkeypatch.setattr(streaming.Plan, "_merge_through_layer", lambda *given: through(*given) / 0)
    with pytest.raises(RejectedError, match="holds values that are not finite"):
        merge.merge_adapter(adapter_folder.read_adapter(foreign), tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_an_adapter_tensor_that_is_not_used_is_an_error(foreign: Path, tmp_path: Path) -> None:
    plan, _ = streaming_plan.make_plan(adapter_folder.read_adapter(foreign), torch.bfloat16, None)
    fewer = plan._replace(layers=dict(list(plan.layers.items())[1:]))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        LoraError, match="2 tensors of the adapter were not merged, such as base_model.model"
    ):
        streaming.write(fewer, tmp_path / "out", torch.bfloat16)


def test_a_model_that_cannot_be_read_weight_by_weight_is_loaded_or_said(
    foreign: Path, tmp_path: Path, monkeypatch, capfd
) -> None:
    def meta(*given):  # noqa: ANN002, ANN202
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")

    monkeypatch.setattr(layerwise_logits, "walk_logits", meta)
    assert (
        merge.merge_adapter(
            adapter_folder.read_adapter(foreign), tmp_path / "loaded", stream=True
        ).checked.rounded
        is not None
    )
    monkeypatch.setattr(
        layerwise_logits.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000)
    )
    assert (
        merge.merge_adapter(
            adapter_folder.read_adapter(foreign), tmp_path / "unchecked", stream=True
        ).checked.rounded
        is None
    )
    assert (
        "logits were not compared: that needs the whole model in memory" in capfd.readouterr().err
    )


def test_a_base_that_is_quantised_already_is_refused_at_once(
    foreign: Path, made, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(made("llama", torch.bfloat16), base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(LoraError, match=r"is already quantised \(GPTQ, 4 bits\)"):
        merge.merge(foreign, tmp_path / "out", str(base))


def test_the_fingerprint_names_what_differs(write_recipe, tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny / "model", base)
    adapter = run.train(load.load_recipe(write_recipe(f"model: {{name_or_path: {base}}}\n")))
    adapter_folder.read_adapter(adapter).refuse_other_base()
    adapter_folder.read_adapter(
        adapter, str(tiny / "model")
    ).refuse_other_base()  # the same base elsewhere
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(
        LoraError, match=r"the configuration's rms_norm_eps \(1e-06, now 1e-05\) differ"
    ):
        adapter_folder.read_adapter(adapter).refuse_other_base()
    with pytest.raises(LoraError, match="rms_norm_eps"):
        adapter_folder.read_adapter(adapter).load_base()  # as generating does
    (base / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1e-4
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraError, match=r"the tensor lm_head.weight differ"):
        merge.merge(adapter, tmp_path / "out")


def test_another_base_is_not_resumed_on(write_recipe, tiny: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny / "model", base)
    recipe = load.load_recipe(write_recipe(f"model: {{name_or_path: {base}}}\n"))
    run.train(recipe)
    path = tmp_path / "run" / "record.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "status": "interrupted"}))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 2
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraError, match="the base differs from that of the run .*lm_head.weight"):
        run.train(recipe, resume=True)


def changed_base(write_recipe, tiny: Path, tmp_path: Path, number: int = 1) -> list[Path]:
    """Adapters trained on a base whose weights are others by now."""
    if not (tmp_path / "base").exists():
        shutil.copytree(tiny / "model", tmp_path / "base")
    made = []
    for each in range(number):
        text = (
            f"model: {{name_or_path: {tmp_path / 'base'}}}\noutput_dir: {tmp_path / f'run{each}'}\n"
        )
        made.append(run.train(load.load_recipe(write_recipe(text))))
    weights = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name: tensor * 1.02 for name, tensor in weights.items()}
    save_file(changed, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    return made


def test_every_verb_knows_the_base(write_recipe, tiny: Path, tmp_path: Path) -> None:
    one, other = changed_base(write_recipe, tiny, tmp_path, 2)
    said = "is not the base that .* was trained on"
    with pytest.raises(LoraError, match=said):
        combine.combine([one, other], tmp_path / "both", None, "cat", None, None, None)
    with pytest.raises(LoraError, match=said):
        extract.convert(one, tmp_path / "plain", 4, None)
    with pytest.raises(LoraError, match=said):
        compare.verify(str(one), str(tiny / "model"), None)
    with pytest.raises(LoraError, match=said):
        adapter.export_adapter(one, ["f16"], tmp_path, None, None)
    assert not (tmp_path / "both").exists()


def test_what_is_made_of_adapters_knows_its_base(made, tmp_path: Path) -> None:
    base = made("llama", torch.float32)
    shutil.copytree(base, tmp_path / "base")
    save_adapter(tmp_path / "base", tmp_path / "a", torch.float32, {})
    combine.combine(
        [tmp_path / "a", tmp_path / "a"], tmp_path / "both", None, "cat", None, None, None
    )
    file = next((tmp_path / "base").glob("*.safetensors"))
    save_file(
        {name: tensor * 1.02 for name, tensor in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    with pytest.raises(LoraError, match="is not the base that .* was trained on"):
        merge.merge(tmp_path / "both", tmp_path / "out")


def test_the_files_that_transformers_reads_are_read(made, tmp_path: Path) -> None:
    """Saving a model anew in one file leaves the index of its shards, and may leave the shards."""
    base = tmp_path / "base"
    shutil.copytree(made("llama", torch.float32), base)
    network = AutoModelForCausalLM.from_pretrained(base)
    for parameter in network.parameters():
        parameter.data *= 1.1
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        base / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert (base / tensors.INDEX).is_file()
    save_adapter(base, tmp_path / "a", torch.float32, {})
    expected = peft_merge(base, tmp_path / "a", torch.float32, tmp_path / "peft")
    merge.merge(tmp_path / "a", tmp_path / "out")
    assert_merged(tensors_of(tmp_path / "out"), expected, tmp_path / "a")


def test_a_configuration_without_a_type_has_that_of_the_weights(made, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made("llama", torch.bfloat16), base)
    config = json.loads((base / "config.json").read_text())
    config.pop("dtype")
    (base / "config.json").write_text(json.dumps(config))
    save_adapter(base, tmp_path / "a", torch.bfloat16, {})
    for stream_it in (True, False):
        merge.merge_adapter(
            adapter_folder.read_adapter(tmp_path / "a"), tmp_path / str(stream_it), stream=stream_it
        )
        assert {tensor.dtype for tensor in tensors_of(tmp_path / str(stream_it)).values()} == {
            torch.bfloat16
        }


def test_experts_may_be_chosen_otherwise_at_a_few_tokens(
    made, tmp_path: Path, monkeypatch, capfd
) -> None:
    base = made("moe", torch.bfloat16)
    save_adapter(base, tmp_path / "a", torch.bfloat16, {"target_modules": ["q_proj"]})
    off = verify.Difference(max_abs=1.0, mean_kl=1e-6, top1=0.99, spread=0.1)
    monkeypatch.setattr(merge, "compare_logits", lambda *args: off)
    merge.merge_adapter(adapter_folder.read_adapter(tmp_path / "a"), tmp_path / "out")
    assert "rounding sends those to another expert" in capfd.readouterr().err
    monkeypatch.setattr(merge, "compare_logits", lambda *args: off._replace(mean_kl=1e-2))
    with pytest.raises(RejectedError):
        merge.merge_adapter(adapter_folder.read_adapter(tmp_path / "a"), tmp_path / "other")


def test_outputs_behind_a_link_and_damaged_tokenizers_are_refused(made, tmp_path: Path) -> None:
    base = made("llama", torch.float32)
    save_adapter(base, tmp_path / "a", torch.float32, {})
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(LoraError, match="link already exists"):
        merge.merge(tmp_path / "a", tmp_path / "link")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    with pytest.raises(LoraError, match="the tokenizer of .* cannot be read"):
        merge.merge(tmp_path / "a", tmp_path / "out")


SIGNALLED = """
import os, signal, sys
from pathlib import Path
from lora_cli import cli

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # so does one of nohup
owner, name, number = {"made": (Path, "mkdir", 1), "written": (os, "fsync", 2)}[sys.argv.pop(1)]
act, calls = getattr(owner, name), []

def signalled(*args, **kwargs):
    made = act(*args, **kwargs)
    staged = name == "mkdir" and args[0].parent == Path(sys.argv[-1]).parent
    if name == "fsync" or staged:
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), int(os.environ["NUMBER"]))
    return made

setattr(owner, name, signalled)
cli.main()
"""


@pytest.mark.parametrize(
    ("instant", "number", "status"),
    [
        ("made", signal.SIGTERM, 143),
        ("written", signal.SIGINT, 130),
        pytest.param("written", signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
def test_a_merge_that_is_ended_leaves_nothing(
    made, tmp_path: Path, instant: str, number: int, status: int
) -> None:
    """As soon as its folder is there, and amid its files; `tests/common/test_files.py` has all other
    instants."""
    save_adapter(made("llama", torch.float32), tmp_path / "a", torch.float32, {})
    command = [
        sys.executable,
        "-c",
        SIGNALLED,
        instant,
        "merge",
        str(tmp_path / "a"),
        str(tmp_path / "out"),
    ]
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(merge.__file__).parent.parent.parent),
        "NUMBER": str(int(number)),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == status, done.stderr
    assert done.stderr.splitlines()[-1] in ("terminated", "interrupted", "hung up")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(999, 2055), (70_001,), (3, 5, 200_003)])
def test_a_tensors_checksum_does_not_depend_on_the_pieces_it_comes_in(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Widths that are no multiple of eight bytes: merged whole, and read back in blocks."""
    torch.manual_seed(0)
    whole = torch.randint(0, 256, shape, dtype=torch.uint8).to(dtype)
    pieces = [whole[start:stop] for start, stop in tensors.split_rows(shape)]
    assert sum(map(len, pieces)) == shape[0]
    assert (
        sum(map(tensors.compute_checksum, pieces)) % 2**64
        == tensors.compute_checksum(whole) % 2**64
    )
    before = tensors.compute_checksum(whole)
    whole.view(-1)[-1] += 1
    assert tensors.compute_checksum(whole) != before


def test_4_bit_weights_are_quantised_where_training_did_or_a_line_says_so(
    write_recipe, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder = run.train(load.load_recipe(write_recipe("method: qlora\n")))
    trained = adapter_folder.read_adapter(folder)
    assert (trained.trained_on, trained.record.device.name) == (
        "cpu",
        "this machine's memory",
    )
    merge._say_into(trained, original=False)
    assert "codes may be others" not in capsys.readouterr().err
    trained.record.device.kind = "cuda"
    assert streaming_plan.choose_quantiser(trained).type == "cpu"
    merge._say_into(trained, original=False)
    assert "trained on cuda, and quantised on cpu here" in " ".join(capsys.readouterr().err.split())
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(devices, "find_device", lambda in_4bit: gpu)
    assert streaming_plan.choose_quantiser(trained) == gpu
