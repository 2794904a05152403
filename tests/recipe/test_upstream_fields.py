"""The fields read from upstream's source are those the classes really have.

Hermetic: installed packages only. Alone: pytest tests/recipe/test_upstream_fields.py
"""

from __future__ import annotations

import dataclasses

import peft
import pytest
import transformers
import trl

from lora_cli.recipe import upstream_fields
from lora_cli.recipe.keys import NOT_IN_LORA, NOT_IN_TRAINING, Lora, Training

CLASSES = [
    (peft.LoraConfig, upstream_fields.LORA_CONFIG),
    (transformers.TrainingArguments, upstream_fields.TRAINING_ARGUMENTS),
    (trl.SFTConfig, upstream_fields.SFT_CONFIG),
]


@pytest.mark.parametrize(
    ("real", "classes"), CLASSES, ids=lambda item: getattr(item, "__name__", "")
)
def test_names_and_literal_defaults_are_the_real_ones(real: type, classes: tuple) -> None:
    read = upstream_fields.read_fields(classes)
    own = {field.name: field for field in dataclasses.fields(real) if field.init}
    inherited_from_peft = {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
    }
    inherited_from_peft |= {"revision", "inference_mode"}
    assert own.keys() - read.keys() <= inherited_from_peft
    assert read.keys() <= own.keys()
    assert len(read) >= 30
    defaults = {name: field.default for name, field in read.items() if field.default is not None}
    assert len(defaults) >= 10
    assert {name: own[name].default for name in defaults} == defaults


def test_every_upstream_field_is_reachable_or_has_its_place_elsewhere() -> None:
    lora, training = (
        upstream_fields.read_fields(upstream_fields.LORA_CONFIG).keys(),
        upstream_fields.read_fields(upstream_fields.SFT_CONFIG).keys(),
    )
    assert len(lora) >= 30
    assert len(training) >= 120
    assert lora - Lora.model_fields.keys() == NOT_IN_LORA.keys() & lora
    assert training - Training.model_fields.keys() == NOT_IN_TRAINING.keys() & training
