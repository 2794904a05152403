"""Merging: the merged model is the function that was trained, for each method and type, and a wrong
one is refused.

Hermetic: the tiny model, adapters with B ≠ 0 made by PEFT. Alone: pytest tests/merge/test_merge.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_cli.common import provenance
from lora_cli.common.errors import LoraError, RejectedError
from lora_cli.merge import in_memory, layerwise_logits
from lora_cli.merge.merge import merge
from lora_cli.models import adapter_folder
from lora_cli.models.probes import TRAINED, compute_logits, make_probes
from lora_cli.recipe import load
from lora_cli.train import run
from tests import architectures


def randomised(base: torch.nn.Module, config: LoraConfig) -> PeftModel:
    """An adapter made by PEFT alone whose B (and magnitude) are not what they start as, or merging
    would do nothing."""
    torch.manual_seed(0)
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
            assert "lora_" in name
    return adapted


def logits(network: torch.nn.Module) -> torch.Tensor:
    network.eval()
    with torch.no_grad():
        return network(input_ids=torch.arange(8, 72).reshape(2, 32)).logits.double()


TYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS: tuple[dict, ...] = ({}, {"use_rslora": True}, {"use_dora": True})


@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((way, dtype) for way in WAYS for dtype in TYPES), ({}, torch.float64)],
    ids=str,
)
def test_a_foreign_adapter_merges_with_one_rounding(
    tiny: Path, tmp_path: Path, options: dict, dtype: torch.dtype
) -> None:
    """Into a model of the base's type; of a base in float64, into one in float32."""
    base = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=dtype)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "base")
    # PEFT's own merge of the same adapter in float64: the exact weights
    adapted = randomised(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    exact = adapted.double().merge_and_unload().state_dict()
    merge(tmp_path / "adapter", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    dtype = torch.float32 if dtype == torch.float64 else dtype
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == str(dtype)[6:]
    assert merged.keys() == exact.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        once = exact[name].float().to(dtype)
        # float32 arithmetic may land on the other side of a tie: at most one unit in the last
        # place, and rarely
        off = (tensor != once).float().mean().item()
        assert off <= (1.0 if dtype == torch.float32 else 0.002), name
        torch.testing.assert_close(
            tensor.double(), exact[name], rtol=torch.finfo(dtype).eps, atol=1e-6
        )


@pytest.mark.parametrize("method", ["qlora", "qdora"])
def test_a_4bit_adapter_merges_into_the_weights_it_was_trained_on(
    write_recipe, tmp_path: Path, method: str
) -> None:
    adapter = run.train(
        load.load_recipe(write_recipe(f"method: {method}\ntraining: {{learning_rate: 1e-2}}\n"))
    )
    merge(adapter, tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    info = adapter_folder.read_adapter(adapter)
    trained = PeftModel.from_pretrained(info.load_base(), adapter)
    effect = (logits(trained) - logits(info.load_base())).abs().max()
    assert (logits(merged) - logits(trained)).abs().max() < 1e-3 * effect
    original = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(info.base.name), adapter
    )
    assert (
        logits(original) - logits(trained)
    ).abs().max() > 0.01 * effect  # the 16-bit base is another function


def test_a_merged_folder_is_complete_and_says_what_it_came_from(
    write_recipe, tmp_path: Path
) -> None:
    adapter = run.train(load.load_recipe(write_recipe("")))
    merge(adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    }
    assert names >= {"chat_template.jinja", "lora_record.json"}
    parent = json.loads((tmp_path / "out" / "lora_record.json").read_text())["parent"]
    assert (
        parent["recipe"]["model"]["name_or_path"] == adapter_folder.read_adapter(adapter).base.name
    )
    with pytest.raises(LoraError, match="out already exists"):
        merge(adapter, tmp_path / "out")


@pytest.fixture
def adapter(write_recipe) -> Path:
    return run.train(load.load_recipe(write_recipe("")))


def damage(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: {name.replace("model.", "model.wrong.", 1): each for name, each in t.items()},
            "the model has no place for",
        ),
        (lambda t: dict(list(t.items())[1:]), "the adapter lacks 1 tensor"),
        (
            lambda t: {name: tensor * float("nan") for name, tensor in t.items()},
            "holds values that are not finite",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    adapter: Path, tmp_path: Path, change, said: str
) -> None:
    damage(adapter, change)
    with pytest.raises(LoraError, match=said):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_merge_that_did_not_take_is_refused(adapter: Path, tmp_path: Path, monkeypatch) -> None:
    def unmerged(adapted):  # noqa: ANN001, ANN202
        return adapted.unload(), 14

    damage(adapter, lambda t: {name: tensor + 0.02 for name, tensor in t.items()})
    (adapter / TRAINED).unlink()  # which would have noticed the damage already
    monkeypatch.setattr(in_memory, "fold_adapter", unmerged)
    with pytest.raises(
        RejectedError,
        match=r"proj.weight in the merged model is off by 100.0% of the adapter's change, in "
        r".*; left in .*out.rejected",
    ):
        merge(adapter, tmp_path / "out", stream=False)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.rejected" / "model.safetensors").is_file()


def test_what_is_no_adapter_is_refused(tiny: Path, adapter: Path, tmp_path: Path) -> None:
    for folder, said, hint in (
        (
            tiny / "model",
            "is not an adapter: it has no adapter_config.json",
            "give the adapter's folder",
        ),
        (adapter.parent, "is not an adapter", f"did you mean {adapter}?"),
        (tmp_path / "nothing", "does not exist", "ls "),
    ):
        with pytest.raises(LoraError, match=said) as caught:
            merge(folder, tmp_path / "out")
        assert (caught.value.hint or "").startswith(hint)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(LoraError, match=r"has no adapter_model.safetensors"):
        merge(adapter, tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal"])
def test_an_adapter_that_starts_from_the_base_s_weights_is_saved_as_a_plain_one(
    write_recipe, tmp_path: Path, capfd, start: str
) -> None:
    # PEFT loads such an adapter by running its (random) decomposition again: every load is another
    # model
    recipe_path = write_recipe(
        f"lora: {{init_lora_weights: {start}}}\ntraining: {{learning_rate: 1e-2}}\n"
    )
    adapter = run.train(load.load_recipe(recipe_path))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["init_lora_weights"] in (True, start)
    assert config["r"] == (32 if start.startswith(("pissa", "olora")) else 16)
    merge(adapter, tmp_path / "out")  # compares with the logits that training left
    assert "against the end of training" in capfd.readouterr().err
    trained = load_file(adapter / TRAINED)["logits"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    probes = make_probes(AutoTokenizer.from_pretrained(tmp_path / "out"))
    given = torch.stack([rows[-1] for rows in compute_logits(merged, probes)])
    torch.testing.assert_close(given, trained, rtol=1e-3, atol=1e-3)


def test_a_base_that_has_changed_since_training_is_refused(
    write_recipe, tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny / "model", tmp_path / "base")
    adapter = run.train(
        load.load_recipe(write_recipe(f"model: {{name_or_path: {tmp_path / 'base'}}}\n"))
    )
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 0.5
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    said = r"is not the base that .* was trained on: the tensor model.layers.0.mlp.up_proj.weight differ"
    with pytest.raises(LoraError, match=said):
        merge(adapter, tmp_path / "out")
    kept = json.loads((adapter / provenance.ARTEFACT_RECORD).read_text())
    del kept["base"]["fingerprint"]  # as an adapter from before there were any
    (adapter / provenance.ARTEFACT_RECORD).write_text(json.dumps(kept))
    for stream in (True, False):
        with pytest.raises(LoraError, match="on its base is not the model that was trained"):
            merge(adapter, tmp_path / "out", stream=stream)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(LoraError, match="the base of .* is not here"):
        merge(adapter, tmp_path / "out")


def test_a_model_whose_own_arithmetic_is_rough_is_still_told_from_another(
    write_recipe,
    tiny: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # large weights: bfloat16 moves the logits by some ten times TRAINED_KL
    base = architectures.make_folder(
        "llama", tmp_path / "base", tiny / "model", initializer_range=0.8, num_hidden_layers=4
    )
    recipe = f"model: {{name_or_path: {base}, dtype: bfloat16}}\ntraining: {{max_steps: 1}}\n"
    adapter = run.train(load.load_recipe(write_recipe(recipe)))
    merge(adapter, tmp_path / "out")
    assert "what its arithmetic comes to here: mean KL" in capfd.readouterr().err
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 0.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    kept = json.loads((adapter / provenance.ARTEFACT_RECORD).read_text())
    del kept["base"]["fingerprint"]
    (adapter / provenance.ARTEFACT_RECORD).write_text(json.dumps(kept))
    with pytest.raises(LoraError, match="is not the model that was trained: .*its arithmetic"):
        merge(adapter, tmp_path / "other")
    # nothing is loaded whole where there may not be room for it
    monkeypatch.setattr(layerwise_logits, "fits_memory", lambda _: False)
    with pytest.raises(LoraError, match="is not the model that was trained: largest") as refused:
        merge(adapter, tmp_path / "other")
    assert "its arithmetic" not in refused.value.message


def test_a_base_whose_weights_do_not_fit_its_config_is_refused(
    write_recipe, tiny: Path, tmp_path: Path
) -> None:
    # transformers fills what is missing with random numbers
    shutil.copytree(tiny / "model", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        LoraError, match=r"do not fit its configuration: 9 missing keys, such as model.layers.2"
    ):
        run.train(load.load_recipe(write_recipe(f"model: {{name_or_path: {tmp_path / 'base'}}}\n")))


def test_lora_on_tied_embeddings_is_refused_with_the_reason(tiny: Path, tmp_path: Path) -> None:
    # of the same files, whose head is another weight, transformers makes a model without the tie
    config = AutoConfig.from_pretrained(tiny / "model", tie_word_embeddings=True)
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "base")
    adapted = randomised(base, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraError, match="uses one weight for its embeddings and its head"):
        merge(tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_with_added_tokens_grows_the_base(tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.add_tokens(["<|think|>", "<|done|>"], special_tokens=True)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    adapted = get_peft_model(base, config)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "out", str(tiny / "model"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == len(tokenizer)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_is_merged_into_the_weights_of_its_run(
    write_recipe, tmp_path: Path, capfd
) -> None:
    steps = "training: {save_strategy: steps, save_steps: 2}\n"
    adapter = run.train(load.load_recipe(write_recipe(f"method: qlora\n{steps}")))
    merge(adapter.parent / "checkpoint-2", tmp_path / "out")
    assert "trained on 4-bit weights" in capfd.readouterr().err


def test_an_adapter_of_no_strength_is_refused(tiny: Path, tmp_path: Path) -> None:
    adapted = randomised(
        AutoModelForCausalLM.from_pretrained(tiny / "model"), LoraConfig(target_modules=["q_proj"])
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tiny / "model")
    adapted.peft_config["default"].alpha_pattern = {"layers.0.self_attn.q_proj": 0}
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraError, match="alpha_pattern.* is 0, but must be greater than 0"):
        merge(tmp_path / "adapter", tmp_path / "out")
