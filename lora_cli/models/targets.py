"""Check that every module name, pattern, layer and row of a recipe means something on its model.

PEFT ignores most of what matches nothing. Here every name, pattern and layer is asked for alone, by
PEFT's own matching, before an adapter is attached; `unsupported.py` finds what PEFT could not do
with it.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from lora_cli.common import UsageError, find_nearest, join_errors
from lora_cli.models import all_linear, patterns, token_rows, unsupported
from lora_cli.models.peft_matching import (
    as_list,
    find_targeted_modules,
    find_targeted_parameters,
    is_saved_whole,
    list_parameter_names,
    matches_ending,
    matches_key,
    resolve_targets,
)
from lora_cli.models.unsupported import Problem
from lora_cli.recipe import Recipe, upstream


def make_config(
    recipe: Recipe,
    model: PreTrainedModel,
    vocabulary: int = 0,
    new_ids: Sequence[int] = (),
    parent: Path | None = None,
) -> tuple[LoraConfig, str]:
    """Return PEFT's configuration of the recipe's adapter on `model`, and in words which linear
    modules `all-linear` leaves out.

    The model's embeddings grow to the tokens that the adapter has rows for: the `new_ids` of a
    `vocabulary`, and those of the adapter in `parent` that is trained on.
    UsageError where a name matches nothing, or what is adapted cannot be merged.
    """
    config = upstream.build_lora_config(recipe)
    if parent is not None:
        token_rows.fit_embeddings(model, parent)
    elif recipe.model.adapter is not None:
        token_rows.grow_to_trained(model, config)
    if new_ids:
        token_rows.grow_embeddings(model, vocabulary)
        token_rows.train_rows(model, config, list(new_ids))
    return config, settle_targets(recipe, model, config)


def settle_targets(recipe: Recipe, model: PreTrainedModel, config: LoraConfig) -> str:
    """Spell `all-linear` out in `config` where some linear modules of `model` are no part of it,
    and return in words which (empty where there are none).

    Raises UsageError with every part of `config` that matches nothing, or that cannot be merged.
    What an adapter that is trained on names in vain is left: its tensors say what it has.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    patterns.refuse_slow_patterns(config, list(modules), lambda field: recipe.where("lora", field))
    resolved = resolve_targets(model, config)
    targeted = find_targeted_modules(resolved, modules)
    left_out = all_linear.find_left_out(model, config, targeted)
    if left_out:
        without = {name for names in left_out.values() for name in names}
        targeted = [name for name in targeted if name not in without]
        config.target_modules = resolved.target_modules = set(targeted)
    parameters = find_targeted_parameters(resolved, model)
    adapted = {name: modules[name] for name in targeted}
    wrong = list(unsupported.find_problems(recipe, model, config, adapted, parameters))
    if recipe.model.adapter is not None:
        if wrong:
            raise UsageError(
                f"model.adapter: {recipe.model.adapter} cannot be trained on: {wrong[0][0]}",
                "train a new adapter: leave model.adapter out",
            )
        return ""
    problems = [*_find_unmatched(recipe, config, resolved, model), *wrong]
    if not problems and not targeted and not parameters:
        problems = [
            (
                f"{recipe.where('lora', 'target_modules')}: nothing is left to adapt",
                "lora.target_modules: all-linear",
            )
        ]
    if problems:
        raise join_errors(f"with lora on {recipe.model.name_or_path}", problems)
    return all_linear.describe_left_out(left_out)


def _guess_target(target: str, names: Iterable[str], otherwise: str) -> str:
    """Make a hint that names the module, or ending of a module's name, that `target` most likely
    meant."""
    parts = target.count(".") + 1
    guess = find_nearest(target, sorted({".".join(name.split(".")[-parts:]) for name in names}))
    return f"did you mean {guess}?" if guess else otherwise


# What matches nothing -----------------------------------------------------------------------------


def _find_unmatched(
    recipe: Recipe, config: LoraConfig, resolved: LoraConfig, model: PreTrainedModel
) -> Iterator[Problem]:
    """Find every name, pattern, layer and row that matches nothing."""
    names = [name for name, _ in model.named_modules() if name]
    targeted = find_targeted_modules(resolved, names)
    parameters = find_targeted_parameters(resolved, model)
    yield from _find_unmatched_names(recipe, config, resolved, names)
    yield from _find_unmatched_saved(recipe, config, names)
    yield from _find_left_out_targets(recipe, config, resolved, names)
    yield from _find_unmatched_layers(recipe, config, names)
    yield from _find_unmatched_parameters(recipe, config, model)
    yield from _find_unmatched_patterns(recipe, config, [*targeted, *parameters])
    yield from _find_wrong_token_ids(recipe, config, model, targeted)
    if config.ensure_weight_tying and len({id(w) for w in _find_ends(model).values()}) > 1:
        where = recipe.where("lora", "ensure_weight_tying")
        yield f"{where} has no effect: embeddings and head have weights of their own", "remove it"


def _find_unmatched_names(
    recipe: Recipe, config: LoraConfig, resolved: LoraConfig, names: Sequence[str]
) -> Iterator[Problem]:
    """Find targets and exclusions that match no module; an expression must match a whole name."""
    kind = recipe.model.name_or_path
    for field in ("target_modules", "exclude_modules"):
        wanted, where = getattr(config, field), recipe.where("lora", field)
        if isinstance(wanted, str):
            if wanted != "all-linear" and not any(re.fullmatch(wanted, name) for name in names):
                hint = _explain_unmatched_expression(field, wanted, names)
                yield f"{where}: no module of {kind} matches {wanted!r}", hint
        elif wanted and wanted == getattr(resolved, field):  # else PEFT has converted old names
            for target in sorted(wanted):
                if not any(matches_ending(name, target) for name in names):
                    hint = _guess_target(target, names, INSTEAD[field])
                    yield f"{where}: no module of {kind} is called {target}", hint


INSTEAD = {
    "target_modules": "lora.target_modules: all-linear",
    "exclude_modules": "leave lora.exclude_modules out",
}
"""What to write where no name is near the one that matches nothing."""


def _explain_unmatched_expression(field: str, written: str, names: Sequence[str]) -> str:
    """Return the hint for a text that is no module's whole name: a name in a list, as it stands or
    as it is spelt, where it is one."""
    if not re.fullmatch(r"[\w.-]+", written):
        return "an expression must match the whole name"
    if any(matches_ending(name, written) for name in names):
        return f"lora.{field}: [{written}]"
    if find_nearest(written.lower(), ["all-linear"]):
        return "did you mean all-linear?"
    parts = written.count(".") + 1
    guess = find_nearest(written, sorted({".".join(name.split(".")[-parts:]) for name in names}))
    return f"lora.{field}: [{guess}]" if guess else INSTEAD[field]


def _find_unmatched_saved(
    recipe: Recipe, config: LoraConfig, names: Sequence[str]
) -> Iterator[Problem]:
    """Find items of modules_to_save that match nothing, or more than their last parts say."""
    where = recipe.where("lora", "modules_to_save")
    for name in config.modules_to_save or []:
        meant = [module for module in names if matches_ending(module, name)]
        more = [m for m in names if is_saved_whole(m, name) and m not in meant]
        more = [m for m in more if m not in (config.modules_to_save or [])]
        if not meant:
            yield (
                f"{where}: no module of {recipe.model.name_or_path} is called {name}",
                _guess_target(name, names, "leave it out"),
            )
        elif more:
            yield f"{where}: PEFT takes {name} for {more[0]} too", f"give the full name: {meant[0]}"


def _find_left_out_targets(
    recipe: Recipe, config: LoraConfig, resolved: LoraConfig, names: Sequence[str]
) -> Iterator[Problem]:
    """Find targets that exist, but that another field takes away again."""
    if (
        not isinstance(config.target_modules, (set, list))
        or config.target_modules != resolved.target_modules
    ):
        return
    alone, where = copy.copy(config), recipe.where("lora", "target_modules")
    for target in sorted(config.target_modules):
        alone.target_modules = [target]
        if any(matches_ending(name, target) for name in names) and not find_targeted_modules(
            alone, names
        ):
            others = ("exclude_modules", "modules_to_save", "layers_to_transform")
            taking = " or ".join(field for field in others if getattr(config, field) is not None)
            yield f"{where}: {target} is left out again by {taking}", "remove it from one of them"


def _find_unmatched_layers(
    recipe: Recipe, config: LoraConfig, names: Sequence[str]
) -> Iterator[Problem]:
    """Find layers and layer patterns that choose no module, and full names, for which PEFT ignores
    them."""
    if config.layers_to_transform is None:
        return
    for target in sorted(set(config.target_modules or ()) & set(names)):
        where = recipe.where("lora", "target_modules")
        yield (
            f"{where}: {target} is a full name: layers_to_transform does not apply to it",
            "give the end of the name",
        )
    alone = copy.copy(config)
    for layer in as_list(config.layers_to_transform):
        alone.layers_to_transform = layer
        if not find_targeted_modules(alone, names):
            numbers = sorted(
                {int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)}
            )
            there = f"{numbers[0]} to {numbers[-1]}" if numbers else "not numbered"
            where = recipe.where("lora", "layers_to_transform")
            yield f"{where}: no target_modules in layer {layer}", f"the layers are {there}"
    alone.layers_to_transform = config.layers_to_transform
    for pattern in as_list(config.layers_pattern):
        alone.layers_pattern = [pattern]
        if not find_targeted_modules(alone, names):
            lists = {match[1] for name in names if (match := re.match(r".*?([^.]+)\.\d+\.", name))}
            where = recipe.where("lora", "layers_pattern")
            yield (
                f"{where}: no target_modules under {pattern}",
                f"one of {', '.join(sorted(lists))}",
            )


def _find_unmatched_parameters(
    recipe: Recipe, config: LoraConfig, model: nn.Module
) -> Iterator[Problem]:
    names, where = list_parameter_names(model), recipe.where("lora", "target_parameters")
    for target in config.target_parameters or []:
        if not any(matches_ending(name, target) for name in names):
            yield (
                f"{where}: no parameter is called {target}",
                _guess_target(target, names, "leave it out"),
            )
    for field in ("layers_to_transform", "exclude_modules"):
        if config.target_parameters and getattr(config, field) is not None:
            place = recipe.where("lora", field)
            yield (
                f"{place} does not apply to target_parameters",
                "name each parameter in full, and leave it out",
            )


def _find_unmatched_patterns(
    recipe: Recipe, config: LoraConfig, targeted: Sequence[str]
) -> Iterator[Problem]:
    """Find keys that match no adapted module, and modules that two keys match: the adapter's file
    does not keep their order."""
    for field in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(config, field))
        matched = {key: [name for name in targeted if matches_key(name, key)] for key in keys}
        for key in keys:
            if not matched[key]:
                where = recipe.where("lora", field, key)
                yield (
                    f"{where}: no adapted module matches",
                    _guess_target(key, targeted, "leave it out"),
                )
        twice = Counter(name for found in matched.values() for name in found)
        for name in [name for name, times in twice.items() if times > 1][:1]:
            both = " and ".join(key for key in keys if name in matched[key])
            yield (
                f"{recipe.where('lora', field)}: {both} both match {name}",
                "give each module one key",
            )


def _find_wrong_token_ids(
    recipe: Recipe, config: LoraConfig, model: PreTrainedModel, targeted: Sequence[str]
) -> Iterator[Problem]:
    """Find rows of embeddings that do not exist, are named twice, or are adapted as well."""
    where = recipe.where("lora", "trainable_token_indices")
    weights = _find_ends(model)
    given: Any = config.trainable_token_indices or {}
    embeddings = token_rows.find_embeddings(model)
    if given and embeddings is None:
        yield f"{where}: a model of pictures has no rows of tokens", "leave it out"
        return
    if not isinstance(given, dict):
        given = {next(n for n, m in model.named_modules() if m is embeddings): given}
    seen: set[str] = set()
    for name, ids in given.items():
        found = next((full for full in weights if matches_ending(full, name)), None)
        if found is None:
            yield (
                f"{where}: no embedding or head is called {name}",
                _guess_target(name, weights, "leave it out"),
            )
            continue
        if found in seen:
            yield f"{where}: {found} is named twice", "give all its rows under one name"
        seen.add(found)
        rows = weights[found].shape[0]
        if wrong := [str(number) for number in ids if number >= rows]:
            yield f"{where}: {name} has no row {', '.join(wrong)}", f"its {rows} rows count from 0"
        if len(set(ids)) < len(ids):
            yield f"{where}: {name} has a row twice", "give each row once"
        if ids and found in targeted:
            yield (
                f"{recipe.where('lora', 'target_modules')}: {found} trains rows of its own already",
                "leave it out, or use modules_to_save for both",
            )


def _find_ends(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights of the embeddings and of the head, by the modules' names."""
    ends = [token_rows.find_embeddings(model), model.get_output_embeddings()]
    return {
        name: module.weight
        for name, module in model.named_modules()
        if any(module is end for end in ends)
    }
