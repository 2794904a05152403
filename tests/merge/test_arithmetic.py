"""Adapters made of others are what they claim: held against explicit sums, PEFT's own merge and
conversion, and numpy.

Hermetic: the tiny model, adapters with B ≠ 0 made by PEFT. Alone: pytest
tests/merge/test_arithmetic.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from lora_cli.common.errors import LoraError
from lora_cli.merge.combine import COMBINATIONS, combine
from lora_cli.merge.extract import convert, extract
from lora_cli.models import adapter_folder

EXACT = 512 * torch.finfo(torch.float32).eps
"""Of the norm: what float32 may cost a product or a decomposition whose longer side is 512, a unit
for each number. The weights here are float32; what is compared with them is computed in float64."""
SHAPES: dict[str, dict] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "r": 4, "target_modules": "all-linear", "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"v_proj": 3},
    },
    "one layer": {"r": 4, "lora_alpha": 2, "target_modules": r".*layers\.1\..*(q|o)_proj"},
    "layers": {"r": 4, "target_modules": ["k_proj"], "layers_to_transform": [0]},
}  # fmt: skip


@pytest.fixture
def make(tiny: Path, tmp_path: Path):
    """`make(name, **options)`: a folder with a PEFT adapter on the tiny model that trained
    noise."""

    def made(name: str, **options) -> Path:
        torch.manual_seed(sum(name.encode()))
        base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
        adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
        for parameter_name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.03 * torch.randn_like(parameter)
                assert "lora_" in parameter_name
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


def merged(tiny: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """The tiny model's weights in float64, with adapters merged by PEFT."""
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).double()
    for adapter in adapters:
        model = (
            PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
            .double()
            .merge_and_unload()
        )
    return model.state_dict()


def updates(tiny: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter changes, in float64: merged minus base."""
    base = merged(tiny)
    return {name: weight - base[name] for name, weight in merged(tiny, adapter).items()}


def norm(tensors) -> float:
    return sum(tensor.square().sum().item() for tensor in tensors) ** 0.5


@pytest.mark.parametrize(("first", "second"), [("plain", "rslora"), ("rslora", "plain"), ("plain", "layers"),
                                               ("layers", "one layer"), ("one layer", "patterns"),
                                               ("patterns", "rslora")])  # fmt: skip
@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_a_combination_is_the_weighted_sum_of_the_updates(
    make, tiny: Path, tmp_path: Path, first: str, second: str, combination: str
) -> None:
    one, two = make(first, **SHAPES[first]), make(second, **SHAPES[second])
    r = 12 if combination == "svd" else None
    combine([one, two], tmp_path / "out", "0.7,-0.3", combination, None, r, None)
    wanted = {
        n: 0.7 * a - 0.3 * b
        for (n, a), b in zip(updates(tiny, one).items(), updates(tiny, two).values())
    }
    given = updates(tiny, tmp_path / "out")
    assert norm(wanted[n] - given[n] for n in wanted) <= EXACT * norm(wanted.values())
    assert norm(wanted.values()) > 0.1
    kept = json.loads((tmp_path / "out" / "lora_record.json").read_text())
    assert kept["distance"] <= EXACT
    assert kept["weights"] == [0.7, -0.3]


def test_linear_sums_the_factors_and_says_how_far_that_is_from_the_sum(
    make, tiny: Path, tmp_path: Path, capfd
) -> None:
    one, two = make("plain", **SHAPES["plain"]), make("second", **SHAPES["plain"])
    combine([one, two], tmp_path / "out", "0.7,0.3", "linear", None, None, None)
    a, b = (
        load_file(one / "adapter_model.safetensors"),
        load_file(two / "adapter_model.safetensors"),
    )
    given, out = (
        updates(tiny, tmp_path / "out"),
        load_file(tmp_path / "out" / "adapter_model.safetensors"),
    )
    assert out.keys() == a.keys()
    for key in [key for key in a if "lora_A" in key]:
        # PEFT gives each factor the root of weight and scale (2 here)
        factor_A, factor_B = (
            (0.7 * 2) ** 0.5 * a[k].double() + (0.3 * 2) ** 0.5 * b[k].double()
            for k in (key, key.replace("lora_A", "lora_B"))
        )
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        torch.testing.assert_close(given[name], factor_B @ factor_A, rtol=0, atol=1e-6)
    distance = json.loads((tmp_path / "out" / "lora_record.json").read_text())["distance"]
    summed = {
        n: 0.7 * x + 0.3 * y
        for (n, x), y in zip(updates(tiny, one).items(), updates(tiny, two).values())
    }
    assert distance == pytest.approx(
        norm(summed[n] - given[n] for n in given) / norm(summed.values()), rel=1e-4
    )
    assert f"{distance:.1e} (linear sums the A's" in capfd.readouterr().err


def test_every_combination_that_peft_names_is_written_the_same_way_twice(
    make, tmp_path: Path
) -> None:
    one, two = make("plain", **SHAPES["plain"]), make("second", **SHAPES["plain"])
    assert len(COMBINATIONS) >= 11
    for combination in COMBINATIONS:
        density = 0.5 if combination.startswith(("ties", "dare", "magnitude")) else None
        for copy in ("one", "two"):
            combine(
                [one, two], tmp_path / combination / copy, None, combination, density, None, None
            )
        first, second = (
            load_file(tmp_path / combination / c / "adapter_model.safetensors")
            for c in ("one", "two")
        )
        assert all(torch.equal(first[key], second[key]) for key in first | second)
        assert any(tensor.abs().max() > 0 for key, tensor in first.items() if "lora_B" in key)


def test_ranks_that_cannot_be_summed_are_refused(make, tmp_path: Path) -> None:
    one, two = make("plain", **SHAPES["plain"]), make("patterns", **SHAPES["patterns"])
    with pytest.raises(
        LoraError, match="PEFT cannot combine them: All adapters must have the same r"
    ):
        combine([one, two], tmp_path / "out", None, "linear", None, None, None)
    assert not (tmp_path / "out").exists()


def test_several_adapters_are_merged_by_one_command(make, tiny: Path, tmp_path: Path, lora) -> None:
    one, two = make("plain", **SHAPES["plain"]), make("rslora", **SHAPES["rslora"])
    done = lora("merge", one, two, tmp_path / "out", "--weights", "1,-0.5")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert f"merging the combination into {tiny / 'model'}\n" in done.stderr
    given = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    first, second, base = updates(tiny, one), updates(tiny, two), merged(tiny)
    for name, weight in given.items():
        torch.testing.assert_close(
            weight.double(), base[name] + first[name] - 0.5 * second[name], rtol=0, atol=1e-6
        )
    parents = json.loads((tmp_path / "out" / "lora_record.json").read_text())["parent"]
    assert parents["command"] == "combine"


def tail(delta: torch.Tensor, r: int) -> float:
    """The norm of what the best approximation of rank r leaves, by numpy's singular values."""
    return float((numpy.linalg.svd(delta.double().numpy(), compute_uv=False)[r:] ** 2).sum() ** 0.5)


def lowered(delta: torch.Tensor, r: int) -> torch.Tensor:
    """The best approximation of rank r, by numpy in float64."""
    left, values, right = numpy.linalg.svd(delta.double().numpy(), full_matrices=False)
    return torch.from_numpy(left[:, :r] * values[:r] @ right[:r])


def test_what_is_extracted_misses_the_fine_tuned_model_by_the_tail(
    tiny: Path, tmp_path: Path, capfd
) -> None:
    torch.manual_seed(0)
    tuned = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    for name, weight in tuned.named_parameters():
        if "layers.1" in name or name in (
            "model.norm.weight",
            "model.embed_tokens.weight",
            "lm_head.weight",
        ):
            weight.data += 0.02 * torch.randn_like(weight)
    tuned.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "tuned")
    extract(str(tiny / "model"), str(tmp_path / "tuned"), tmp_path / "out", 8)
    base, given, wanted = merged(tiny), merged(tiny, tmp_path / "out"), tuned.double().state_dict()
    record_ = json.loads((tmp_path / "out" / "lora_record.json").read_text())
    modules = {entry["module"]: entry for entry in record_["modules"]}
    assert len(modules) == 8  # seven of the layer, and the head
    for name, entry in modules.items():
        key, delta = f"{name}.weight", wanted[f"{name}.weight"] - base[f"{name}.weight"]
        left = tail(delta, 8)
        assert norm([wanted[key] - given[key]]) == pytest.approx(left, rel=1e-5)
        assert entry["rest"] == pytest.approx(left, rel=1e-6)
        assert entry["energy_kept"] == pytest.approx(1 - (left / norm([delta])) ** 2, rel=1e-6)
    assert sorted(record_["left_out"]) == [
        "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight", "model.norm.weight",
    ]  # fmt: skip
    said = capfd.readouterr().err
    assert (
        "warning: not in the adapter, since they are not linear weights: model.embed_tokens.weight, "
        in said
    )
    assert "lowest: " in said
    info = adapter_folder.read_adapter(tmp_path / "out")
    assert info.base.name == str(tiny / "model")


def test_the_whole_rank_gives_the_whole_model_back_also_where_weights_lie_the_other_way(
    tiny: Path, tmp_path: Path
) -> None:
    # GPT-2 keeps (in, out)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    base = GPT2LMHeadModel(config)
    for folder, scale in (("base", 0.0), ("tuned", 0.1)):
        for name, weight in base.named_parameters():
            if name.endswith(("c_attn.weight", "c_fc.weight")):
                weight.data += scale * torch.randn_like(weight)
        base.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    extract(str(tmp_path / "base"), str(tmp_path / "tuned"), tmp_path / "out", 99)
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    given = PeftModel.from_pretrained(start, tmp_path / "out").merge_and_unload().state_dict()
    for name, weight in base.state_dict().items():
        torch.testing.assert_close(given[name], weight, rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 32


def test_dora_becomes_plain_lora_at_the_cost_of_the_tail(make, tiny: Path, tmp_path: Path) -> None:
    adapter = make("dora", r=4, target_modules="all-linear", use_dora=True)
    convert(adapter, tmp_path / "out", 16, None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["use_dora"], config["r"], config["lora_alpha"]) == (False, 16, 16)
    wanted, given = updates(tiny, adapter), updates(tiny, tmp_path / "out")
    modules = json.loads((tmp_path / "out" / "lora_record.json").read_text())["modules"]
    assert len(modules) == 14
    for entry in modules:
        key = f"{entry['module']}.weight"
        left = tail(wanted[key], 16)
        assert left > 0.01
        assert norm([wanted[key] - given[key]]) == pytest.approx(
            left, abs=EXACT * norm([wanted[key]])
        )
    # PEFT's own conversion leaves the magnitudes out, at any rank: why it is not used here
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    theirs = convert_to_lora(PeftModel.from_pretrained(base, adapter), rank=128)[1]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    update = theirs[f"{key}B.weight"] @ theirs[f"{key}A.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert norm([wanted[name] - update.double()]) > 0.3 * norm([wanted[name]])


def test_a_smaller_rank_is_the_one_peft_s_conversion_finds(
    make, tiny: Path, tmp_path: Path
) -> None:
    adapter = make("patterns", **SHAPES["patterns"])
    convert(adapter, tmp_path / "out", 2, None)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    theirs = convert_to_lora(PeftModel.from_pretrained(base, adapter), rank=2)[1]
    wanted, given = updates(tiny, adapter), updates(tiny, tmp_path / "out")
    keys = [key for key in theirs if "lora_A" in key]
    assert len(keys) == 14
    for key in keys:
        name = key.removeprefix("base_model.model.").replace("lora_A.", "")
        update = (theirs[key.replace("lora_A", "lora_B")] @ theirs[key]).double()
        best, allowed = lowered(wanted[name], 2), EXACT * norm([wanted[name]])
        assert norm([given[name] - best]) <= 2 * norm([update - best]) + allowed, name
        assert norm([update - best]) < 0.01 * norm([best])  # PEFT's is the same one
    convert(adapter, tmp_path / "same", None, None)  # its own rank: nothing is lost
    given = updates(tiny, tmp_path / "same")
    assert norm(wanted[n] - given[n] for n in wanted) <= EXACT * norm(wanted.values())


def test_a_4bit_adapter_is_converted_on_the_weights_it_was_trained_on(
    write_recipe, tmp_path: Path
) -> None:
    from lora_cli.merge.merge import merge
    from lora_cli.recipe import load
    from lora_cli.train import run

    adapter = run.train(
        load.load_recipe(write_recipe("method: qdora\ntraining: {learning_rate: 1e-2}\n"))
    )
    convert(adapter, tmp_path / "plain", 256, None)  # the tiny model's shorter side: exact
    merge(adapter, tmp_path / "one")
    merge(tmp_path / "plain", tmp_path / "two")
    one, two = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n).state_dict() for n in ("one", "two")
    )
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=0, atol=2e-5)


def test_another_update_than_the_one_meant_is_refused(make, tmp_path: Path, monkeypatch) -> None:
    from lora_cli.merge import low_rank

    adapter, save = make("plain", **SHAPES["plain"]), low_rank.save

    def careless(made, *rest):  # noqa: ANN001, ANN002, ANN202
        return save(
            {name: (lora_A, 1.001 * lora_B) for name, (lora_A, lora_B) in made.items()}, *rest
        )

    monkeypatch.setattr(low_rank, "save", careless)
    with pytest.raises(LoraError, match="was not written as it should be"):
        convert(adapter, tmp_path / "out", None, None)
    assert not (tmp_path / "out").exists()


def test_a_grown_vocabulary_is_named_and_the_rest_extracted(
    tiny: Path, tmp_path: Path, capfd
) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.add_tokens(["<|think|>"], special_tokens=True)
    tuned = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tuned.resize_token_embeddings(len(tokenizer))
    tuned.model.layers[0].mlp.up_proj.weight.data += 0.01
    tuned.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    extract(str(tiny / "model"), str(tmp_path / "tuned"), tmp_path / "out", 2)
    said = capfd.readouterr().err
    assert (
        "not linear weights: model.embed_tokens.weight (512x256 -> 513x256), lm_head.weight "
        "(512x256 -> 513x256)" in said
    )
    assert "not compared, since the vocabularies differ" in said
    kept = json.loads((tmp_path / "out" / "lora_record.json").read_text())
    assert [(entry["module"], round(entry["energy_kept"], 6)) for entry in kept["modules"]] == [
        ("model.layers.0.mlp.up_proj", 1.0)
    ]
