"""Attach a new or a trained adapter to a base model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    get_peft_model_state_dict,
    load_peft_weights,
)
from safetensors import safe_open
from transformers import (
    PreTrainedModel,
)

from lora_cli.common import LoraError, library_errors, spell_count, ui
from lora_cli.models import patterns, token_rows
from lora_cli.models.tensors import is_finite


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence PEFT's warnings about what lora checks itself, each for the reason beside it."""
    with warnings.catch_warnings():
        for message in (
            "Found missing adapter keys",  # check_adapter_complete refuses
            # also said where they did match, for experts; check_targets refuses, and of an adapter
            # that is loaded the shapes tell
            "The following (rank|alpha)_pattern keys",
            "fan_in_fan_out is set to",  # PEFT sets it right itself
            # unsupported.py refuses what cannot be merged, and the rest is sound
            "Model has `tie_word_embeddings=True` and a tied layer",
            # lora_bias: its tensors have one dimension
            "Adapter '.*LoRA tensor\\(s\\) have invalid shape",
            "lora with eva initialization used with low_cpu_mem_usage",  # of memory, which suffices
            "Full backward hook is firing",  # lora_ga's, on inputs without a gradient
            "Unexpected keyword arguments",  # adapter_config.py warns of them
            "`lora_bias=True` was passed but",  # refused, or merged
            # of saving embeddings, which are not saved
            "Could not find a config file|Unable to fetch remote file",
            # the base that --base gives, which is said
            "The PEFT config's `base_model_name_or_path` was renamed",
            "Input and output embeddings are no longer tied",  # as config.json then says
        ):
            warnings.filterwarnings("ignore", message=message)
        yield


def attach_adapter(
    model: PreTrainedModel, config: LoraConfig, autocast_adapter_dtype: bool = True
) -> PeftModel:
    """Put a new adapter on `model`, in place. Raises LoraError with PEFT's words where it
    refuses."""
    try:
        with quiet_peft():
            return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    except (ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
        raise LoraError(
            f"lora: {' '.join(str(error).split())}", "mend the values of lora, or leave them out"
        ) from error


def load_adapter(
    model: PreTrainedModel | PeftModel, folder: Path, name: str = "default", **trained: Any
) -> PeftModel:
    """Put the trained adapter of `folder` on `model`, beside those it has. Raises LoraError unless
    every one of its tensors finds its place.

    `trained`, for one that is trained on, are further arguments of `PeftModel.from_pretrained`.
    """
    refuse_slow_patterns(model, folder)
    token_rows.fit_embeddings(model, folder)
    hint = "give the base it was trained on with --base"
    with (
        quiet_peft(),
        library_errors.translate_file_errors(
            f"PEFT cannot put the adapter {folder} on its base", hint
        ),
    ):
        try:
            if isinstance(model, PeftModel):
                peft_model = model
                model.load_adapter(str(folder), adapter_name=name)
            else:
                peft_model = PeftModel.from_pretrained(
                    model, str(folder), adapter_name=name, **trained
                )
        except KeyError as error:  # a head, which PEFT takes for granted
            raise LoraError(
                f"{folder} does not fit its base model: the adapter lacks {error.args[0]}",
                "copy the adapter again, with its head",
            ) from error
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise LoraError(
                f"PEFT cannot put the adapter {folder} on its base: {_explain_misfit(error)}", hint
            ) from error
    check_adapter_complete(peft_model, folder, name)
    return peft_model


def refuse_slow_patterns(model: torch.nn.Module, folder: Path) -> None:
    """Raise UsageError for an adapter whose regular expressions would not finish on the model's
    names."""
    named = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [name for name, _ in named.named_modules() if name]  # as PEFT will ask for them
    patterns.refuse_slow_patterns(
        read_adapter_config(folder),
        names,
        lambda field: f"{folder / 'adapter_config.json'}: {field}",
    )


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read the adapter's configuration with PEFT. Raises LoraError with PEFT's words where it
    refuses."""
    refusal = library_errors.translate_file_errors(
        f"PEFT cannot read {folder / 'adapter_config.json'}", "copy the adapter again"
    )
    with quiet_peft(), refusal:
        return LoraConfig.from_pretrained(str(folder))


def _explain_misfit(error: Exception) -> str:
    """Shorten PEFT's words: of tensors of another size, give their number and the first."""
    said = " ".join(str(error).split())
    sizes = re.findall(
        r"size mismatch for (\S+): .*?Size\(\[([^]]*)\]\).*?Size\(\[([^]]*)\]\)", said
    )
    if not sizes:
        return said[:300]
    name, given, wanted = sizes[0]
    first = f"{name}: ({given}), where ({wanted}) is wanted"
    return (
        f"{spell_count(len(sizes), 'tensor is', 'tensors are')} of another size, the first {first}"
    )


@quiet_peft()
def check_adapter_complete(model: PeftModel, folder: Path, name: str) -> None:
    """Raise LoraError for tensors that are missing, not placed, or not finite: PEFT only warns, and
    leaves B at zero."""
    stored = load_peft_weights(str(folder), device="cpu")
    _load_missed(model, folder, name, stored)
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    # An adapter may carry whole embeddings and heads as well, under the names the model has for
    # them.
    whole = {key.replace(f".{name}.", ".") for key in model.state_dict()}
    refuse_incomplete(folder, set(stored), set(loaded), whole)
    bad = [key for key, tensor in stored.items() if not is_finite(tensor)]
    if bad:
        raise LoraError(
            f"{folder}: {bad[0]} holds values that are not finite "
            f"({spell_count(len(bad), 'tensor does', 'tensors do')})",
            "train again",
        )


def refuse_unfit(model: PeftModel, folder: Path) -> None:
    """Raise LoraError unless the adapter in `folder` has the tensors, by name and shape, that are
    trained on `model`, which needs no weights."""
    with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {key: tuple(tensor.shape) for key, tensor in state.items()}
    whole = {key.replace(".default.", ".") for key in model.state_dict()}
    refuse_incomplete(folder, set(stored), set(wanted), whole)
    other = [key for key in sorted(wanted) if stored[key] != wanted[key]]
    if other:
        raise LoraError(
            f"{folder} does not fit its base model: "
            f"{spell_count(len(other), 'tensor is', 'tensors are')} of "
            "another size, the "
            f"first {other[0]}: {stored[other[0]]}, where {wanted[other[0]]} is wanted",
            "give the base it was trained on with --base",
        )


@torch.no_grad()
def _load_missed(
    model: PeftModel, folder: Path, name: str, stored: dict[str, torch.Tensor]
) -> None:
    """Load tensors that PEFT has missed, and warn of them.

    It renames tensors as transformers does those of old checkpoints; where a name of today holds
    one of before (`shared_expert` in `shared_experts`), the tensor finds no place, in silence.
    """
    own, missed = dict(model.named_parameters()), []
    for key, tensor in stored.items():
        place = own.get(f"{key.removesuffix('.weight')}.{name}.weight")
        if place is None or place.shape != tensor.shape or place.is_meta:
            continue
        if not torch.equal(place.cpu(), tensor.to(place.dtype)):
            place.copy_(tensor)
            missed.append(key)
    if missed:
        ui.warn(
            f"PEFT does not load {spell_count(len(missed), 'tensor')} of {folder}, such as "
            f"{missed[0]}: they are "
            "loaded here, and other programs lose them"
        )


def refuse_incomplete(folder: Path, stored: set[str], loaded: set[str], whole: set[str]) -> None:
    """Raise LoraError unless the adapter's tensors are those the model has places for: `loaded`,
    and any of its `whole`."""
    unplaced = stored - loaded - whole
    for keys, what in (
        (unplaced, "the model has no place for"),
        (loaded - stored, "the adapter lacks"),
    ):
        if keys:
            raise LoraError(
                f"{folder} does not fit its base model: {what} "
                f"{spell_count(len(keys), 'tensor')}, such as "
                f"{min(keys)}",
                "give the base it was trained on with --base",
            )


@contextmanager
def keep_input_types(model: torch.nn.Module, active: bool) -> Iterator[None]:
    """Inside, where `active`, adapters do not cast their inputs to their own type: PEFT's
    `disable_input_dtype_casting`, which fails on trained rows of embeddings, as these cast
    nothing."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer):
            layer.cast_input_dtype_enabled = False
    with disable_input_dtype_casting(model, active=active):
        yield


def find_lora_layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """Return the adapted modules by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def find_untrained(
    model: torch.nn.Module, gather: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.detach
) -> list[str]:
    """Return the adapted modules whose every B is still zero, so that they are the base's; `gather`
    makes a tensor whole."""
    return [
        name
        for name, layer in find_lora_layers(model).items()
        if not any(
            gather(weight).any()
            for key, weight in layer.named_parameters()
            if key.startswith(("lora_B.", "lora_embedding_B."))
        )
    ]


def walk_trainable(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """Yield the names and tensors that training changes."""
    return (
        (name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad
    )
