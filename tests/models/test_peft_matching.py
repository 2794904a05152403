"""The rules of peft_matching.py give PEFT's own answer, each for names that a looser or stricter
rule would tell apart.

Hermetic: a small module tree, adapted by PEFT. Alone: pytest tests/models/test_peft_matching.py
"""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import nn

from lora_cli.models import peft_matching

TARGETS = ["set_up", "down", "head"]
ENDINGS = ["up", "set_up", "blocks.0.up", "0.up", "s.0.up", "up.", ".up", "head", "blocks", "u"]
KEYS = [*ENDINGS, r"blocks\.1\..*", "up|head", ".*", "set.up", "^head", "blocks.0"]


def make_tree() -> nn.Module:
    """Two numbered blocks, with names that end alike, and a head beside them."""
    names = ("up", "set_up", "down")
    blocks = [nn.ModuleDict({name: nn.Linear(4, 4) for name in names}) for _ in range(2)]
    return nn.ModuleDict({"blocks": nn.ModuleList(blocks), "head": nn.Linear(4, 4)})


NAMES = [name for name, _ in make_tree().named_modules() if name]


def test_an_ending_means_the_modules_that_peft_targets() -> None:
    for ending in ENDINGS:
        config = LoraConfig(target_modules=[ending])
        theirs = [name for name in NAMES if check_target_module_exists(config, name)]
        ours = [name for name in NAMES if peft_matching.matches_ending(name, ending)]
        assert ours == theirs == peft_matching.find_targeted_modules(config, NAMES), ending


@pytest.mark.parametrize("target", ["up.weight", "head.weight", "0.up.weight", "weight"])
def test_an_ending_means_the_parameters_that_peft_targets(target: str) -> None:
    config = LoraConfig(target_parameters=[target], target_modules=[])
    ours = peft_matching.find_targeted_parameters(config, make_tree())
    adapted = get_peft_model(make_tree(), config)
    assert ours
    assert sorted(ours) == sorted(adapted.targeted_parameter_names)


@pytest.mark.parametrize("saved", ["up", "blocks.0.up", "p", "head", "set_up"])
def test_a_module_is_saved_whole_where_peft_does(saved: str) -> None:
    config = LoraConfig(target_modules=["down"], modules_to_save=[saved])
    model = get_peft_model(make_tree(), config).base_model.model
    theirs = {n for n, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    assert theirs == {name for name in NAMES if peft_matching.is_saved_whole(name, saved)}
    if saved == "up":
        assert "blocks.0.set_up" in theirs  # as nothing else in PEFT would have it


def test_a_key_of_a_pattern_means_the_modules_that_peft_gives_its_rank() -> None:
    for key in KEYS:
        theirs = [name for name in NAMES if get_pattern_key([key], name) == key]
        assert [name for name in NAMES if peft_matching.matches_key(name, key)] == theirs, key
    ranks = {"blocks.0.up": 3, "up": 5}
    model = get_peft_model(
        make_tree(), LoraConfig(r=2, target_modules=["up", "down"], rank_pattern=ranks)
    )
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and name:
            first = [rank for key, rank in ranks.items() if peft_matching.matches_key(name, key)]
            assert module.r["default"] == (first or [2])[0], name


@pytest.mark.parametrize("layers", ["blocks", "block.", "locks", ["head", "blocks"]])
def test_the_expressions_are_those_that_peft_forms(layers: str | list[str]) -> None:
    """Each is tried on the names before PEFT is let loose on them: it must be the same one."""
    config = LoraConfig(
        target_modules=TARGETS,
        exclude_modules=r".*0\.down|blocks",
        modules_to_save=["up"],
        layers_to_transform=1,
        layers_pattern=layers,
        rank_pattern={"up": 2},
    )
    formed = list(peft_matching.walk_patterns(config))
    assert {field for field, _, _ in formed} == {
        "exclude_modules", "modules_to_save", "layers_pattern", "rank_pattern"
    }  # fmt: skip
    for name in NAMES:
        found = {field: [] for field, _, _ in formed}
        for field, _, pattern in formed:
            found[field].append(re.match(pattern, name))
        left_out = any(found["exclude_modules"]) or any(found["modules_to_save"])
        match = next(filter(None, found["layers_pattern"]), None)
        asked = any(peft_matching.matches_ending(name, each) for each in TARGETS)
        ours = asked and not left_out and (
            name == "head" or (match is not None and match["idx"] == "1")
        )  # fmt: skip
        assert bool(check_target_module_exists(config, name)) == ours, name


@pytest.mark.parametrize("written", [r"blocks\.\d\.up", "up", ".*up", "head|down"])
def test_one_expression_is_matched_to_the_whole_name(written: str) -> None:
    config = LoraConfig(target_modules=written)
    [(_, _, pattern)] = peft_matching.walk_patterns(config)
    theirs = [name for name in NAMES if check_target_module_exists(config, name)]
    assert [name for name in NAMES if re.match(pattern, name)] == theirs


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_an_empty_field_holds_nothing(empty) -> None:
    assert peft_matching.as_list(empty) == []
    config = LoraConfig(layers_pattern=empty)
    assert list(peft_matching.walk_patterns(config)) == []


@pytest.mark.parametrize("value", [0, "layers"])
def test_one_value_is_a_list_of_one(value) -> None:
    assert peft_matching.as_list(value) == [value]
