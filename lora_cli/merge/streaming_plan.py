"""Plan how an adapter is merged in constant memory, by letting PEFT attach it to a base without
weights."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import get_peft_model_state_dict
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from lora_cli.common import LoraError, devices, library_errors
from lora_cli.merge.streaming import (
    NAME,
    REFUSALS,
    Changed,
    Plan,
    Weights,
    fill_buffers,
    strip_peft_steps,
)
from lora_cli.models import (
    Adapter,
    Base,
    Tensors,
    attach,
    four_bit,
    is_finite,
    read_field,
    token_rows,
)
from lora_cli.recipe import find_initialisation


class Unstreamable(Exception):
    """Why an adapter must be merged with the whole model in memory, in words."""


def make_plan(
    adapter: Adapter, trained: torch.dtype, quantization: Mapping[str, Any] | None
) -> tuple[Plan, PeftModel]:
    """Return how each tensor is merged, and the adapter on its base without weights.

    `trained` is the type that the base's weights had in training, `quantization` how they were
    stored in 4 bits (None: they were not, or the original weights are wanted). Raise Unstreamable
    where that is not possible.
    """
    if adapter.base.tensors is None:
        raise Unstreamable("the base has no safetensors files")
    config = attach.read_adapter_config(adapter.folder)
    _check_config(config)
    empty = adapter.base.build_unweighted()
    base = _name_as_part(adapter.base.tensors, empty)
    carried = Tensors([adapter.folder / "adapter_model.safetensors"])
    parameters = _match_tensors(empty, base, _read_shapes(carried), adapter.base.head.left_over)
    wanted = {name: tuple(empty.state_dict()[name].shape) for name in parameters}
    packed = find_packed(empty, adapter, quantization) if quantization else {}
    _refuse_larger_embeddings(empty, adapter, carried)
    attach.refuse_slow_patterns(empty, adapter.folder)
    adapted = _attach(empty, config, adapter.folder)
    places = _find_places(adapted)
    _check_names(adapted, places, carried, adapter)
    by_name = {name: key for key, name in places.items()}
    layers = _find_layers(adapted, by_name, parameters)
    own = {key for changed in layers.values() for key in changed.own.values()}
    replaced = {
        strip_peft_steps(places.get(key, key)): key for key in carried.entries if key not in own
    }
    _check_shapes(replaced, wanted, carried)
    _check_tied(adapted)
    weights = Weights(base, carried, replaced, trained, packed, choose_quantiser(adapter))
    plan = Plan(weights, layers, parameters, by_name)
    fill_buffers(adapted, parameters, plan.read)
    return plan, adapted


def _read_shapes(carried: Tensors) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an adapter's tensors, by the names that whole ones have in the model."""
    return {
        key.removeprefix("base_model.model."): entry.shape for key, entry in carried.entries.items()
    }


def _refuse_larger_embeddings(empty: PreTrainedModel, adapter: Adapter, carried: Tensors) -> None:
    embeddings = token_rows.find_embeddings(empty)
    shapes = {key: entry.shape for key, entry in carried.entries.items()}
    if embeddings is not None and embeddings.num_embeddings < token_rows.count_rows_trained(
        empty, adapter.folder, shapes
    ):
        raise Unstreamable("the adapter makes its embeddings larger")


def _check_shapes(
    replaced: Mapping[str, str], wanted: Mapping[str, tuple[int, ...]], carried: Tensors
) -> None:
    """Raise Unstreamable where a whole tensor of the adapter has no place in the model, whose
    tensors have the shapes `wanted`."""
    for name, key in replaced.items():
        if name not in wanted or carried.entries[key].shape != wanted[name]:
            raise Unstreamable(f"{key} has no tensor of its shape in the model")


def choose_quantiser(adapter: Adapter) -> torch.device:
    """Return the device that quantises weights to 4 bits as in training, or this machine's CPU.

    bitsandbytes' kernels for CUDA and for a CPU round ties another way: one code in 100,000.
    """
    here = devices.find_device(in_4bit=True)
    return here if here.type == adapter.trained_on else torch.device("cpu")


def find_packed(
    empty: PreTrainedModel, adapter: Adapter, quantization: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return bitsandbytes' options for each tensor that transformers would quantise with these
    settings."""
    from bitsandbytes.nn import Linear4bit

    settings = BitsAndBytesConfig(load_in_4bit=True, **quantization)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    other = adapter.base.build_unweighted()
    quantizer.preprocess_model(model=other, device_map=None)
    found = {
        name: module for name, module in other.named_modules() if isinstance(module, Linear4bit)
    }
    for length in sorted({module.in_features for module in found.values()}):
        if four_bit.misreads_rows(length):
            raise Unstreamable(f"bitsandbytes misreads rows of {length} weights here")
    return {f"{name}.weight": dict(module.weight.__dict__) for name, module in found.items()}


def _check_config(config: PeftConfig) -> None:
    """Raise Unstreamable for an adapter whose start is computed again, or whose layers change their
    base's weights."""
    assert isinstance(config, LoraConfig), "read_adapter has refused others"
    start = find_initialisation(config.init_lora_weights)
    if start and start.repeated_at_load:
        raise Unstreamable(
            f"PEFT computes its start, {config.init_lora_weights}, from the base's weights again"
        )
    if config.kasa_config:
        raise Unstreamable("a KaSA takes part of each weight out the first time that it is used")


def find_own_names(model: Base) -> dict[str, bool]:
    """Return the tensors of a model's files, and whether each is a parameter, if they name them as
    the model does, so that they can be read one by one; else nothing."""
    try:
        if model.tensors is not None:
            return _match_tensors(model.build_unweighted(), model.tensors)
    except Unstreamable:
        pass
    return {}


def _name_as_part(base: Tensors, empty: PreTrainedModel) -> Tensors:
    """Return the tensors of a base that was saved without any head under the names that they have
    as a part of a model with one: `vit.layers…` for `layers…`."""
    prefix, known = f"{empty.base_model_prefix}.", empty.state_dict()
    named = {f"{prefix}{name}": entry for name, entry in base.entries.items()}
    as_part = type(base) is Tensors and not any(map(known.__contains__, base.entries))
    if not as_part or not any(map(known.__contains__, named)):
        return base
    made = copy.copy(base)
    made.entries = named
    return made


def _match_tensors(
    empty: PreTrainedModel,
    base: Tensors,
    head: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    left_over: Collection[str] = (),
) -> dict[str, bool]:
    """Return the tensors to write, by name, and whether each is a parameter.

    An adapter may have a `head` that the base's files lack, or have of another size, and these a
    `left_over` one of another task. Raise Unstreamable unless names and shapes are the model's own.
    """
    parameters = dict(empty.named_parameters())
    whole = empty.state_dict()
    left_over = {*left_over, *(f"{empty.base_model_prefix}.{name}" for name in left_over)}
    added = [name for name in parameters if name not in base.entries and name in head]
    missing = sorted(parameters.keys() - base.entries.keys() - {*added})
    foreign = sorted(base.entries.keys() - whole.keys() - left_over)
    if missing or foreign:
        name = (missing or foreign)[0]
        raise Unstreamable(
            f"its files use other names for the tensors than the model, or lack some ({name})"
        )
    kept = {name: entry for name, entry in base.entries.items() if name not in left_over}
    for name, entry in kept.items():
        if tuple(whole[name].shape) not in (entry.shape, head.get(name)):
            raise Unstreamable(f"{name} has another shape in its files")
        if name not in parameters and name not in dict(empty.named_buffers()):
            # transformers ties such weights only if they are equal
            raise Unstreamable(
                f"{name} is in its files, and tied to another tensor by its configuration"
            )
    return {name: name in parameters for name in (*kept, *added)}


def _attach(empty: PreTrainedModel, config: PeftConfig, folder: Path) -> PeftModel:
    """Let PEFT attach the adapter to its base; raise Unstreamable where it refuses a base without
    weights."""
    refusal = library_errors.translate_file_errors(
        f"PEFT cannot put the adapter {folder} on its base", "copy the adapter again", REFUSALS
    )
    try:
        with attach.quiet_peft(), refusal:
            return get_peft_model(empty, config, low_cpu_mem_usage=True).eval()
    except REFUSALS as error:
        raise Unstreamable(f"PEFT: {' '.join(str(error).split())[:200]}") from error


def _find_places(adapted: PeftModel) -> dict[str, str]:
    """Return the parameter that each key in the adapter's file is for, as PEFT saves it."""
    state = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}
    names = {id(tensor): name for name, tensor in state.items()}
    with attach.quiet_peft():
        saved = get_peft_model_state_dict(adapted, state_dict=state, save_embedding_layers=False)
    if unknown := [key for key, tensor in saved.items() if id(tensor) not in names]:
        raise Unstreamable(f"PEFT changes {unknown[0]} when it loads it")
    return {key: names[id(tensor)] for key, tensor in saved.items()}


def _check_names(
    adapted: PeftModel, places: Mapping[str, str], carried: Tensors, adapter: Adapter
) -> None:
    """Raise LoraError unless the adapter's file has all its tensors, of the right shapes and
    finite."""
    state = {**dict(adapted.named_parameters()), **dict(adapted.named_buffers())}
    whole = {name.replace(f".{NAME}.", ".") for name in adapted.state_dict()}
    attach.refuse_incomplete(adapter.folder, set(carried.entries), set(places), whole)
    for key in carried.entries:
        if not is_finite(carried.rows(key)):
            raise LoraError(
                f"{adapter.folder}: {key} holds values that are not finite", "train again"
            )
    for key, name in places.items():
        if carried.entries[key].shape != tuple(state[name].shape):
            shapes = f"{list(carried.entries[key].shape)}, the model has {list(state[name].shape)}"
            raise LoraError(
                f"{adapter.folder} does not fit its base model: {key} is {shapes}",
                "give the base it was trained on with --base",
            )


def _find_layers(
    adapted: PeftModel, by_name: Mapping[str, str], parameters: Mapping[str, bool]
) -> dict[str, Changed]:
    """Return the layer that changes each tensor."""
    found: dict[str, Changed] = {}
    for path, layer in adapted.named_modules():
        if isinstance(layer, MultiheadAttention):
            raise Unstreamable(f"{strip_peft_steps(path)} is adapted as a whole")
        if isinstance(layer, (LoraLayer, TrainableTokensLayer)):
            changed = _describe_layer(path, layer, by_name)
            if not changed.own:  # tied rows, which another layer has
                continue
            for name in changed.base.values():
                if name in found:
                    raise Unstreamable(f"{name} is adapted twice")
                if name not in parameters:
                    raise Unstreamable(f"{name} is not in the base's files")
                found[name] = changed
    return found


def _describe_layer(
    path: str, layer: LoraLayer | TrainableTokensLayer, by_name: Mapping[str, str]
) -> Changed:
    """Return a layer with the paths inside it of the adapter's and the base's tensors."""
    own = {
        name.removeprefix(f"{path}."): key
        for name, key in by_name.items()
        if name.startswith(f"{path}.") and not name.startswith(f"{path}.base_layer.")
    }
    leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    inside = [path for path, module in layer.named_modules() if module is layer.get_base_layer()][0]
    base = {f"{inside}.{leaf}": strip_peft_steps(f"{path}.{leaf}")}
    if any(getattr(layer, "lora_bias", {}).values()):
        base[f"{inside}.bias"] = strip_peft_steps(f"{path}.bias")
    return Changed(path, layer, own, base)


def _check_tied(adapted: PeftModel) -> None:
    """Raise Unstreamable where tied embeddings and head get separate weights."""
    if not read_field(adapted.config, "tie_word_embeddings"):
        return
    ends = (token_rows.find_embeddings(adapted), adapted.get_output_embeddings())
    saved = {
        strip_peft_steps(name)
        for name, _ in adapted.named_parameters()
        if ".modules_to_save." in name
    }
    weights = {
        strip_peft_steps(name)
        for name, module in adapted.named_modules()
        if any(module is end for end in ends)
    }
    if any(name.rpartition(".")[0] in weights for name in saved):
        raise Unstreamable("it gives the tied embeddings and head separate weights")
