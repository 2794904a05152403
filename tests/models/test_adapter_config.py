"""adapter_config.json is checked by the fields of a recipe: everything that PEFT saves passes, and
what PEFT would choke on later is named here.

Hermetic: a small random Llama, adapted and saved by PEFT. Alone: pytest
tests/models/test_adapter_config.py
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from lora_cli.common.errors import LoraError
from lora_cli.models import adapter_config, adapter_folder
from tests.networks import random_model

Q = ["q_proj"]
SET_BY_PEFT = {"target_modules", "inference_mode", "fan_in_fan_out"}
SAVED = [
    {},
    {"target_modules": "all-linear"},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": {"q_proj", "v_proj"}},
    {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    {"target_parameters": []},
    {"exclude_modules": []},
    {"exclude_modules": "model.layers.0.self_attn.q_proj"},
    {"modules_to_save": []},
    {"modules_to_save": ["lm_head"]},
    {"layers_to_transform": 0},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"layers_to_transform": [1], "layers_pattern": ["layers"]},
    {"layers_to_transform": [], "layers_pattern": []},
    {"layers_pattern": ""},
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 1.5}},
    {"rank_pattern": {}, "alpha_pattern": {}},
    {"trainable_token_indices": [0, 7]},
    {"trainable_token_indices": {"embed_tokens": [3]}},
    {"trainable_token_indices": {}},
    {"trainable_token_indices": []},
    {"lora_alpha": 0.5, "lora_dropout": 0},
    {"lora_dropout": 0.25},
    {"bias": "all"},
    {"bias": "lora_only", "use_rslora": True},
    {"use_dora": True},
    {"fan_in_fan_out": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa_niter_2"},
    {"inference_mode": True, "revision": "main", "task_type": None},
    {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]},
]


@pytest.mark.parametrize("settings", SAVED)  # not named: a set has no order
def test_what_peft_saves_passes(settings: dict, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the settings are PEFT's business here
        config = LoraConfig(**{"task_type": "CAUSAL_LM", "r": 2, "target_modules": Q, **settings})
        get_peft_model(random_model("llama"), config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    asked = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    kept = {key: saved[key] for key in asked.keys() - SET_BY_PEFT}
    assert kept.items() <= asked.items()  # PEFT saved the setting, not its default
    adapter_folder._read_config(tmp_path, {"weight": (64, 64)})


def test_nulls_pass_where_peft_has_nothing() -> None:
    nothing = [name for name in SAVED_FIELDS if getattr(LoraConfig, name, None) is None]
    assert {"target_modules", "rank_pattern", "revision", "task_type"} < set(nothing)
    adapter_config.check_fields(Path("a.json"), dict.fromkeys(nothing))


SAVED_FIELDS = LoraConfig(task_type="CAUSAL_LM").to_dict()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("r", "16", "r is '16', but must be a whole number"),
        ("r", 0, "r is 0, but must be greater than or equal to 1"),
        ("r", True, "r is true, but must be a whole number"),
        ("r", None, "r is null, but must be a whole number"),
        ("lora_alpha", 0, "lora_alpha is 0, but must be greater than 0"),
        ("lora_alpha", float("nan"), "lora_alpha is nan, but must be a finite number"),
        ("lora_dropout", None, "lora_dropout is null, but must be a number"),
        ("use_rslora", 1, "use_rslora is 1, but must be true or false"),
        ("bias", "most", "bias is 'most', but must be 'none', 'all' or 'lora_only'"),
        ("target_modules", 7, "target_modules is 7, but must be text or a list"),
        ("target_modules", ["a", 7], "target_modules.1 is 7, but must be text"),
        ("modules_to_save", "head", "modules_to_save is 'head', but must be a list"),
        ("rank_pattern", {"q": 0}, "rank_pattern.q is 0, but must be greater than or equal to 1"),
        (
            "alpha_pattern",
            {"q": "x"},
            "alpha_pattern.q is 'x', but must be a number",
        ),
        (
            "trainable_token_indices",
            {"embed_tokens": [5, -3]},
            "trainable_token_indices.embed_tokens.1 is -3, but must be greater than or equal to 0",
        ),
        ("base_model_name_or_path", 7, "base_model_name_or_path is 7, but must be text"),
        ("task_type", 7, "task_type is 7, but must be text"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named(field: str, value: object, said: str) -> None:
    with pytest.raises(LoraError) as caught:
        adapter_config.check_fields(Path("a.json"), {**SAVED_FIELDS, field: value})
    assert str(caught.value.message) == f"a.json: {said}"


def test_fields_of_a_newer_peft_are_told_where_they_are_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "adapter_config.json"
    for _ in range(2):
        adapter_config.check_fields(file, {"r": 8, "brand_new": 3, "unset": None, "off": False})
    said = capsys.readouterr().err
    assert said.count("the installed PEFT does not know brand_new: ") == 1


def test_no_name_of_a_base_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, folder, base = random_model("llama"), tmp_path / "a", tmp_path / "base"
    network.save_pretrained(base)
    get_peft_model(network, LoraConfig(target_modules=Q)).save_pretrained(folder)
    (tmp_path / "config.json").write_text("[]")
    monkeypatch.chdir(tmp_path)  # the adapter names no base, which is not the current folder
    assert adapter_folder.read_adapter(folder, str(base)).base.name == str(base)
