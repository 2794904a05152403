"""Build the objects that PEFT, TRL and transformers take from a recipe."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from peft import EvaConfig, LoraConfig
from peft.tuners.lora.config import (
    BdLoraConfig,
    CordaConfig,
    LoraGAConfig,
    VeloraConfig,
)
from pydantic import TypeAdapter, ValidationError
from transformers import BitsAndBytesConfig, TrainingArguments

from lora_cli.common import UsageError, devices, find_nearest, missing_packages
from lora_cli.recipe import initialisations, upstream_fields
from lora_cli.recipe.keys import BY_METRIC, Recipe


def build_lora_config(recipe: Recipe) -> LoraConfig:
    """Return PEFT's configuration of the adapter."""
    values = copy.deepcopy(recipe.lora.collect_values())  # PEFT writes into them
    values.pop("autocast_adapter_dtype")  # an argument of get_peft_model, not of LoraConfig
    values["use_dora"] = recipe.method in ("dora", "qdora")
    if values["init_lora_weights"] == "loftq":
        # models/init_weights.py computes it, at the adapter's own scaling and on any device
        values["init_lora_weights"] = True
    for name, kind in VARIANT_CONFIGS.items():
        if values.get(name) is not None:
            values[name] = _build_variant(recipe, name, kind)
        elif name == initialisations.CONFIGS.get(str(values["init_lora_weights"])):
            values[name] = kind()
    kind = recipe.task_row.peft_type
    return _build(recipe, "lora", values, lambda given: LoraConfig(task_type=kind, **given))


VARIANT_CONFIGS: dict[str, Any] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "velora_config": VeloraConfig,
    "use_bdlora": BdLoraConfig,
}


def _build_variant(recipe: Recipe, name: str, kind: Any) -> Any:
    """Return the mapping that a recipe gives for one of PEFT's own configuration classes, as that
    class.

    PEFT checks the values of some and ignores unknown keys of others; here both raise UsageError.
    """
    place, given = recipe.where("lora", name), getattr(recipe.lora, name)
    known = sorted(field.name for field in dataclasses.fields(kind) if field.init)
    if not isinstance(given, dict):
        raise UsageError(f"{place} must be a mapping", f"its keys: {', '.join(known)}")
    for key in given.keys() - set(known):
        guess = find_nearest(str(key), known)
        hint = f"did you mean {guess}?" if guess else f"its keys: {', '.join(known)}"
        raise UsageError(f"{recipe.where('lora', name, str(key))} is not a known key", hint)
    try:
        return TypeAdapter(kind).validate_python(given)
    except ValidationError as error:
        detail = error.errors()[0]
        key = ".".join(str(part) for part in detail["loc"][:1])
        where = recipe.where("lora", name, key) if key else place
        raise UsageError(f"{where}: {detail['msg']}", "lora schema --markdown") from None


def build_quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    """Return the configuration of 4-bit storage of the base, or None for methods that do not
    quantise it."""
    if not recipe.quantized:
        return None
    return BitsAndBytesConfig(load_in_4bit=True, **recipe.quantization.collect_values())


COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


def read_compile_options(recipe: Recipe) -> dict[str, Any] | None:
    """Return torch.compile's options for a settled recipe, or None where nothing is to be
    compiled."""
    values = recipe.training.collect_values()
    asked, *given = (values.get(name) for name in COMPILING)
    if not asked and not any(given):
        return None
    return {name: value for name, value in zip(("backend", "mode"), given) if value}


OURS = (
    "pad_token",
    "packed_length",
    "loss_head",
    "loraplus_lr_ratio",
    "loraplus_lr_embedding",
    "stop_on_loss_above",
    "on_oom",
    "generate_at_evaluation",
    "keep",
    "early_stopping_patience",
    "early_stopping_threshold",
    "sample_prompts",
    "sample_tokens",
)
"""Keys of `training` that lora acts on itself, beside COMPILING."""
NEWER_NAMES = ("activation_checkpointing", "activation_checkpointing_kwargs")
"""Names that newer versions of transformers have for `gradient_…`."""


def build_training_arguments(recipe: Recipe) -> TrainingArguments:
    """Return the objective's configuration for TRL's trainer, `TrainingArguments` for Trainer."""
    values = recipe.training.collect_values()
    values.setdefault("include_num_input_tokens_seen", "non_padding")  # for tokens/s
    values.setdefault("fp16", recipe.model.dtype == "float16")
    values.setdefault("use_cpu", devices.find_device(recipe.quantized).type == "cpu")
    _take_newer_names(values)
    # Trainer would log the mean so far in place of a loss that is not finite; lora stops the run
    values["logging_nan_inf_filter"] = False
    values["disable_tqdm"] = True
    # a row's picture becomes what the model takes in a batch, and a pair is cut in two there
    if recipe.task_row.reads_pictures or recipe.objective_row.compares:
        values["remove_unused_columns"] = False
    _settle_best(recipe, values)
    for name in (*OURS, *COMPILING):
        values.pop(name, None)
    if values["packing"] == "step":  # our trainers take a step's sequences one at a time
        values["per_device_train_batch_size"] *= values.pop("gradient_accumulation_steps")
    values["packing"] = values["packing"] in (True, "dataset")
    if not recipe.uses_trl:
        # max_length and the like, which lora itself acts on for both trainers
        for name in recipe.objective_row.list_own_fields():
            values.pop(name, None)
        return _use_one_gpu(
            _build(
                recipe,
                "training",
                values,
                lambda given: TrainingArguments(recipe.output_dir, **given),
            )
        )
    if not values.get("packing"):
        values["max_length"] = None  # long rows are already cut or dropped
    config_class = recipe.objective_row.find_config_class()
    return _use_one_gpu(
        _build(recipe, "training", values, lambda given: config_class(recipe.output_dir, **given))
    )


def _take_newer_names(values: dict[str, Any]) -> None:
    """Call what the installed transformers has a newer name for by that."""
    known = upstream_fields.read_fields(upstream_fields.TRAINING_ARGUMENTS)
    for new in NEWER_NAMES:
        old = new.replace("activation", "gradient")
        if old in values and new in known:
            values.setdefault(new, values.pop(old))


def _settle_best(recipe: Recipe, values: dict[str, Any]) -> None:
    """Say in the arguments by what evaluations are compared, and which is the better one."""
    if recipe.training.tells_best:
        values.setdefault("metric_for_best_model", "loss")
    if str(values.get("metric_for_best_model")).endswith("perplexity"):
        values.setdefault("greater_is_better", False)  # transformers' guess is by the name `loss`
    options = values.get("lr_scheduler_kwargs") or {}
    if recipe.training.lr_scheduler_type in BY_METRIC and isinstance(options, dict):
        metric = str(values.get("metric_for_best_model") or "loss")
        greater = values.get("greater_is_better")
        rises = not metric.endswith("loss") if greater is None else greater
        # both take every metric for one that is better where it is smaller
        values["lr_scheduler_kwargs"] = {"mode": "max" if rises else "min", **options}


def _use_one_gpu(arguments: TrainingArguments) -> TrainingArguments:
    """Let one process use one GPU. Of several, transformers would make nn.DataParallel, which
    multiplies the batch by their number, and the loss with it."""
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _build(
    recipe: Recipe, section: str, values: dict[str, Any], build: Callable[[dict[str, Any]], Any]
) -> Any:
    """Return `build(values)`; raise UsageError naming the file and line of the values without which
    it is not refused."""
    refusal = _find_refusal(build, values)
    if refusal is None:
        return build(values)
    said = _describe(refusal)
    what, _, allowed = said.partition(", please select one of ")
    given = [name for name in values if recipe.find_place(section, name)]
    others = {name: _find_refusal(build, _without(values, name)) for name in given}
    blamed = [name for name, other in others.items() if other is None] or [
        name for name, other in others.items() if other and _describe(other) != said
    ]
    hint = missing_packages.suggest_package(refusal)
    if len(blamed) == 1:
        guess = find_nearest(str(values[blamed[0]]), re.findall(r"'([^']+)'", allowed))
        listed = f"one of {allowed}" if allowed else "change or remove it"
        hint = hint or (f"did you mean {guess}?" if guess else listed)
        raise UsageError(f"{recipe.where(section, blamed[0])}: {what}", hint)
    names = [f"{section}.{name}" for name in blamed]
    pair = f"change or remove {' or '.join(names)}" if names else "lora schema --markdown"
    raise UsageError(f"{recipe.where(section)}: {what}", hint or pair)


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _describe(refusal: Exception) -> str:
    """Return an exception's text on one line, with its type where the text alone says little."""
    text = " ".join(str(refusal).split())
    short = isinstance(refusal, (LookupError, AttributeError))
    return f"{type(refusal).__name__}: {text}" if short else text


def _find_refusal(
    build: Callable[[dict[str, Any]], Any], values: dict[str, Any]
) -> Exception | None:
    """Return what `build` raises for `values`, or None if it accepts them."""
    try:
        build(copy.deepcopy(values))  # PEFT writes into them
    except (ValueError, TypeError, ImportError, OSError) as error:
        return error
    except (LookupError, AttributeError) as error:  # it is looked up, or taken for another type
        return error
    return None
