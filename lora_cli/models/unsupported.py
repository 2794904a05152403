"""Refuse what PEFT's LoRA cannot do on a model: it would fail late, not train, or not merge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.models import all_linear, ties, token_rows
from lora_cli.models.peft_matching import matches_ending, matches_key
from lora_cli.recipe import Recipe, find_initialisation

Problem = tuple[str, str | None]
"""What is wrong, and what to do."""


def find_problems(
    recipe: Recipe,
    model: PreTrainedModel,
    config: LoraConfig,
    targeted: dict[str, nn.Module],
    parameters: Sequence[str],
) -> Iterator[Problem]:
    """Find all problems of the modules and parameters that `config` adapts."""
    yield from _find_wrong_kinds(recipe, targeted)
    yield from _find_wrong_parameters(recipe, config, model, parameters)
    yield from _find_wrong_biases(recipe, config, model, targeted)
    yield from _find_wrong_starts(recipe, config, targeted)
    yield from _find_wrong_copies(recipe, config, model)
    yield from _find_tied(recipe, config, model, list(targeted), parameters)


def _find_wrong_kinds(recipe: Recipe, targeted: dict[str, nn.Module]) -> Iterator[Problem]:
    """Find modules without a weight that LoRA knows, and those that use theirs in a way an adapter
    would bypass."""
    where = recipe.where("lora", "target_modules")
    for why, names in _group_by_reason(targeted, explain_unlike_peft).items():
        more = f" ({len(names)} such modules)" if len(names) > 1 else ""
        yield (
            f"{where}: PEFT cannot adapt {names[0]}, {why}{more}",
            "leave it out of target_modules",
        )


def _group_by_reason(
    targeted: dict[str, nn.Module], reason: Callable[[Any], str | None]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, module in targeted.items():
        if why := reason(module):
            found.setdefault(why, []).append(name)
    return found


def explain_unlike_peft(module: Any) -> str | None:
    """Explain why PEFT's adapter would not compute, or not merge into, what the module computes."""
    if isinstance(module, nn.Embedding):
        own = f"a {type(module).__name__}, which looks its rows up in its own way"
        return None if token_rows.looks_up_ids(module) else own
    if all_linear.computes_more(module):
        return f"a {type(module).__name__}, which returns more than a product"
    if isinstance(module, (nn.Linear, Conv1D)):
        return None
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return f"a {type(module).__name__}"
    if type(module).forward not in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return f"a {type(module).__name__}, which changes its weights as it runs"
    if module.groups > 1:  # PEFT builds A without any of these
        return f"a convolution with groups={module.groups}"
    if set(module.dilation) != {1}:
        return f"a convolution with dilation={module.dilation}"
    return (
        None
        if module.padding_mode == "zeros"
        else f"a convolution with padding_mode={module.padding_mode}"
    )


def _find_wrong_parameters(
    recipe: Recipe, config: LoraConfig, model: nn.Module, parameters: Sequence[str]
) -> Iterator[Problem]:
    """Find what does not work with adapters on parameters (which `all-linear` includes where
    experts are fused)."""
    if not parameters:
        return
    such = f"parameters such as {parameters[0]}"
    flat = [name for name in parameters if model.get_parameter(name).dim() < 2]
    initial = str(config.init_lora_weights)
    for name in flat[:1]:
        yield (
            f"{recipe.where('lora', 'target_parameters')}: {name} has one dimension only",
            "leave it out",
        )
    if config.use_dora:
        yield (
            f"{recipe.where('method')}: DoRA is not defined for {such}",
            "method: lora, or name target_modules",
        )
    if config.lora_dropout:
        where = recipe.where("lora", "lora_dropout")
        yield f"{where}: there is no dropout for {such}", "lora_dropout: 0, or name target_modules"
    start = find_initialisation(config.init_lora_weights)
    if start and (start.needs_linear or start.name == "eva"):
        where = recipe.where("lora", "init_lora_weights")
        yield f"{where}: {initial} is not defined for {such}", "init_lora_weights: true"


def _find_wrong_biases(
    recipe: Recipe, config: LoraConfig, model: nn.Module, targeted: dict[str, nn.Module]
) -> Iterator[Problem]:
    without = [name for name, module in targeted.items() if getattr(module, "bias", None) is None]
    if config.lora_bias and without:
        where = recipe.where("lora", "lora_bias")
        yield (
            f"{where}: {without[0]} has no bias, so the adapter's could not be merged",
            "lora_bias: false",
        )
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if config.bias == "lora_only":
        biases = [name for name in biases if name.removesuffix(".bias") in targeted]
    if config.bias != "none" and not biases:
        yield (
            f"{recipe.where('lora', 'bias')} is {config.bias}, but there is no bias to train",
            "bias: none",
        )


def _find_wrong_starts(
    recipe: Recipe, config: LoraConfig, targeted: dict[str, nn.Module]
) -> Iterator[Problem]:
    """Find initialisations that a module's kind, shape or rank does not allow, and what else eva
    does not work with."""
    initial = str(config.init_lora_weights).partition("_niter")[0]
    where = recipe.where("lora", "init_lora_weights")
    if initial == "eva" and config.trainable_token_indices:
        yield f"{where}: eva does not go with trained rows of embeddings", "init_lora_weights: true"
    start = find_initialisation(config.init_lora_weights)
    if start is None or not start.needs_linear:
        return
    for name, module in targeted.items():
        if not isinstance(module, (nn.Linear, nn.Embedding)):
            yield (
                f"{where}: {initial} is not defined for {name}, a {type(module).__name__}",
                "init_lora_weights: true",
            )
            return
        rank, field = next(
            ((rank, key) for key, rank in config.rank_pattern.items() if matches_key(name, key)),
            (config.r, None),
        )
        place = recipe.where("lora", "rank_pattern", field) if field else recipe.where("lora", "r")
        largest = min(module.weight.shape) // (2 if initial == "lora_ga" else 1)
        if isinstance(module, nn.Linear) and initial == "orthogonal" and rank % 2:
            yield f"{place}: orthogonal needs an even rank, {name} has {rank}", f"{rank + 1}"
            return
        if isinstance(module, nn.Linear) and initial != "orthogonal" and rank > largest:
            yield (
                f"{place}: {initial} allows a rank of at most {largest} for {name}, not {rank}",
                "lower it",
            )
            return


def _find_wrong_copies(
    recipe: Recipe, config: LoraConfig, model: PreTrainedModel
) -> Iterator[Problem]:
    """Find modules that cannot be trained whole: in 4 bits, or with rows trained by themselves."""
    where = recipe.where("lora", "modules_to_save")
    modules = dict(model.named_modules())
    given: Any = config.trainable_token_indices or {}
    embeddings = token_rows.find_embeddings(model)
    rows = given if isinstance(given, dict) else [n for n, m in modules.items() if m is embeddings]
    added = recipe.model.add_tokens or recipe.model.add_special_tokens
    for saved in config.modules_to_save or []:
        for name in [name for name in modules if name and matches_ending(name, saved)]:
            if any(hasattr(module, "quant_state") for module in modules[name].modules()):
                yield (
                    f"{where}: {name} is stored in 4 bits and cannot be trained",
                    "quantization.llm_int8_skip_modules",
                )
                return
            shared = ties.find_sharing(modules, getattr(modules[name], "weight", None))
            if any(matches_ending(other, row) for other in shared for row in rows):
                yield (
                    f"{where}: {name} is trained whole, and "
                    f"{'model.add_tokens' if added else 'its rows'} by themselves",
                    "take it out of modules_to_save, or give every module with this weight there: "
                    + ", ".join(sorted(shared)),
                )


def _find_tied(
    recipe: Recipe,
    config: LoraConfig,
    model: PreTrainedModel,
    targeted: Sequence[str],
    parameters: Sequence[str],
) -> Iterator[Problem]:
    """Find adapters on a weight that serves as embeddings of encoder or decoder and as head: it
    cannot be merged into one without changing the others.

    `trainable_token_indices` is sound there, but for rows of the head alone, and `modules_to_save`
    where there is no encoder beside a decoder: PEFT would part one of three from the others.
    """
    for shared in ties.find_shared(model):
        yield from _find_tied_adapters(recipe, shared, targeted, parameters)
        yield from _find_tied_rows(recipe, config, shared)
        if model.config.is_encoder_decoder:
            yield from _find_tied_copies(recipe, config, shared)


def _find_tied_adapters(
    recipe: Recipe, shared: list[str], targeted: Sequence[str], parameters: Sequence[str]
) -> Iterator[Problem]:
    both = ties.list_shared(shared)
    instead = "use modules_to_save or trainable_token_indices, or leave them out"
    if len(shared) > 2:
        instead = "leave them out; single rows are lora.trainable_token_indices"
    for name in shared:
        for field, adapted in (
            ("target_modules", name in targeted),
            ("target_parameters", f"{name}.weight" in parameters),
        ):
            if adapted:
                yield f"{recipe.where('lora', field)}: {name} shares its weight ({both})", instead


def _find_tied_copies(recipe: Recipe, config: LoraConfig, shared: list[str]) -> Iterator[Problem]:
    saved = config.modules_to_save or []
    for name in [name for name in shared if any(matches_ending(name, each) for each in saved)]:
        yield (
            f"{recipe.where('lora', 'modules_to_save')}: {name} shares its weight "
            f"({ties.list_shared(shared)})",
            "leave it out; single rows are lora.trainable_token_indices",
        )


def _find_tied_rows(recipe: Recipe, config: LoraConfig, shared: list[str]) -> Iterator[Problem]:
    both = ties.list_shared(shared)
    given = config.trainable_token_indices
    rows = given if isinstance(given, dict) else {}
    of_head = [ids for name, ids in rows.items() if matches_ending(shared[-1], name)]
    of_embeddings = [ids for name, ids in rows.items() if matches_ending(shared[0], name)]
    if of_head and of_head != of_embeddings:
        yield (
            f"{recipe.where('lora', 'trainable_token_indices')}: {shared[-1]} shares its weight "
            f"({both})",
            f"give the rows of {shared[0].rpartition('.')[2]}",
        )
