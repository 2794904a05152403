"""Make a plain LoRA: `lora extract` from a fine-tuned model, `lora convert` from a DoRA or larger
adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_cli.common import LoraError, files, provenance, spell_count, ui
from lora_cli.merge import derived, low_rank
from lora_cli.merge.low_rank import PREFIX
from lora_cli.models import (
    Adapter,
    Base,
    adapter_contents,
    attach,
    compare_logits,
    compute_logits,
    convert_to_float32,
    make_probes,
    read_adapter,
)

START = "give the model that the fine-tuning started from"


def extract(base: str, finetuned: str, out: Path, r: int) -> None:
    """Write to `out` the LoRA adapter of rank `r` that comes closest to what fine-tuning changed in
    `base`.

    Changes outside linear weights (norms, embeddings, biases, a tied head) are named: the adapter
    lacks them. Raise LoraError when the architectures differ, or no linear weight does.
    """
    with files.staged_folder(out) as staging:
        first, second = _open(base), _open(finetuned)
        before = convert_to_float32(first.load_plain())
        after = convert_to_float32(second.load_plain())
        linear, others = _find_changed(before, after, base, finetuned)
        deltas = {name: partial(_measure_delta, before, after, name) for name in linear}
        fan_in_fan_out = any(isinstance(before.get_submodule(name), Conv1D) for name in linear)
        cut = _save_closest(deltas, r, staging, first, fan_in_fan_out)
        if others:
            ui.warn(f"not in the adapter, since they are not linear weights: {_name_some(others)}")
        tokenizer = second.load_tokenizer()
        probes = make_probes(tokenizer)
        wanted = compute_logits(after, probes)
        given = compute_logits(_load_saved(before, staging, deltas, cut), probes)
        if given[0].shape == wanted[0].shape:
            difference = str(compare_logits(wanted, given))
        else:
            difference = "not compared, since the vocabularies differ"
        contents: dict[str, Any] = {
            "finetuned": {"name": finetuned, "commit": second.revision},
            "left_out": others,
            "r": r,
            "modules": low_rank.describe_modules(cut),
            "difference": difference,
        }
        made = Adapter(staging, first, None, True)
        derived.finish_folder(staging, tokenizer, "extract", [made], **contents)
    ui.say(*low_rank.format_table(cut))
    ui.say(
        f"  {spell_count(len(cut), 'module')}; base with adapter against {finetuned}: {difference}"
    )


def _open(name: str) -> Base:
    """Return a model with its task."""
    found = Base(name).resolve()
    return Base.of_model(found.name, found.revision)


def convert(folder: Path, out: Path, r: int | None, base: str | None) -> None:
    """Write to `out` the plain LoRA of rank `r` closest to the LoRA or DoRA adapter in `folder`,
    and say what that costs.

    `r` None keeps the adapter's largest rank. Raise LoraError for an adapter that holds more than
    linear updates.
    """
    adapter = read_adapter(folder, base)
    adapter_contents.refuse_beyond(adapter.folder, [adapter_contents.DORA, adapter_contents.BLOCKS])
    adapter.refuse_other_base()
    with files.staged_folder(out) as staging:
        tokenizer = adapter.load_tokenizer()
        network = convert_to_float32(adapter.load_plain_base())
        adapted = attach.load_adapter(network, adapter.folder)
        probes = make_probes(tokenizer)
        wanted = compute_logits(adapted, probes)
        layers = attach.find_lora_layers(adapted)
        rank = r or max(layer.r["default"] for layer in layers.values())
        deltas = {
            name.removeprefix(PREFIX): partial(_measure_merged_delta, layer)
            for name, layer in layers.items()
        }
        fan_in_fan_out = adapted.peft_config["default"].fan_in_fan_out
        cut = _save_closest(deltas, rank, staging, adapter.base, fan_in_fan_out)
        given = compute_logits(_load_saved(adapted.unload(), staging, deltas, cut), probes)
        difference = str(compare_logits(wanted, given))
        derived.finish_folder(
            staging,
            tokenizer,
            "convert",
            [adapter],
            r=rank,
            modules=low_rank.describe_modules(cut),
            difference=difference,
        )
    ui.say(*low_rank.format_table(cut))
    ui.say(
        f"  {spell_count(len(cut), 'module')} of rank {rank}; against the adapter as it was: "
        f"{difference}"
    )


def _save_closest(
    deltas: Mapping[str, Callable[[], torch.Tensor]],
    r: int,
    folder: Path,
    base: Base,
    fan_in_fan_out: bool,
) -> dict[str, low_rank.Factors]:
    """Write the adapter of rank `r` closest to the changes of weights; return its factors.

    A change is computed when it is asked for: all of them in float64 are larger than the model.
    """
    cut = {name: low_rank.truncate(deltas[name](), r) for name in _show_progress(list(deltas))}
    low_rank.save({name: each[:2] for name, each in cut.items()}, folder, base, fan_in_fan_out)
    return cut


def _load_saved(
    network: PreTrainedModel,
    folder: Path,
    deltas: Mapping[str, Callable[[], torch.Tensor]],
    cut: Mapping[str, low_rank.Factors],
) -> Any:
    """Return `network` with the adapter in `folder`, each update compared with its change."""
    return low_rank.check_saved(
        network, folder, ((name, deltas[name](), each) for name, each in cut.items())
    )


def _find_changed(
    before: PreTrainedModel, after: PreTrainedModel, base: str, finetuned: str
) -> tuple[list[str], list[str]]:
    """Return the names of the linear modules whose weights differ, and of the other tensors that
    do.

    Raise LoraError where none of the linear ones does.
    """
    old = dict(before.named_parameters())  # a tied head is there once
    new = dict(after.named_parameters())
    _refuse_other_architecture(before, after, base, finetuned)
    modules = {
        name for name, module in before.named_modules() if isinstance(module, (nn.Linear, Conv1D))
    }
    linear: list[str] = []
    others: list[str] = []
    for name, weight in new.items():
        module = name.removesuffix(".weight")
        if old[name].shape != weight.shape:
            others.append(f"{name} ({_format_sizes(old[name], weight)})")
        elif torch.equal(old[name], weight):
            continue
        elif module in modules:
            linear.append(module)
        else:
            others.append(name)
    if not linear:
        found = (
            f"they differ only in {spell_count(len(others), 'other tensor')}, such as {others[0]}"
            if others
            else "they are the same"
        )
        raise LoraError(f"no linear weight of {finetuned} differs from {base}", found)
    return linear, others


def _refuse_other_architecture(
    before: PreTrainedModel, after: PreTrainedModel, base: str, finetuned: str
) -> None:
    """Raise LoraError unless both have the same tensors, of the same sizes except for the
    vocabulary's."""
    old = dict(before.named_parameters())
    new = dict(after.named_parameters())
    if type(before) is not type(after) or old.keys() != new.keys():
        kinds = f"{type(before).__name__} and {type(after).__name__}"
        odd = min(old.keys() ^ new.keys(), default="")
        raise LoraError(
            f"{base} and {finetuned} have different architectures: {kinds}"
            + (f", only one of them has {odd}" if odd else ""),
            START,
        )
    ends = [
        end.weight
        for end in (before.get_input_embeddings(), before.get_output_embeddings())
        if end is not None
    ]
    for name, weight in new.items():
        if old[name].shape != weight.shape and not any(old[name] is end for end in ends):
            raise LoraError(
                f"{base} and {finetuned} have different sizes: {name} "
                f"({_format_sizes(old[name], weight)})",
                START,
            )


def _format_sizes(old: torch.Tensor, new: torch.Tensor) -> str:
    return f"{'x'.join(map(str, old.shape))} -> {'x'.join(map(str, new.shape))}"


def _measure_delta(before: PreTrainedModel, after: PreTrainedModel, name: str) -> torch.Tensor:
    """Return what fine-tuning changed in a linear weight (out, in), in float64."""
    module = after.get_submodule(name)
    delta = module.weight.data.double() - before.get_submodule(name).weight.data.double()
    return delta.T if isinstance(module, Conv1D) else delta


def _measure_merged_delta(layer: Linear) -> torch.Tensor:
    """Return what merging by PEFT changes in the layer's weight (out, in), in float64; the layer
    stays as it was."""
    if not isinstance(layer, Linear):
        raise LoraError(
            f"{type(layer).__name__} is not a linear layer", "merge the adapter instead: lora merge"
        )
    layer.double()
    weight = layer.get_base_layer().weight
    before = weight.data.clone()
    layer.merge()
    delta = weight.data - before
    weight.data = before
    layer.merged_adapters.clear()
    layer.float()
    return delta.T if layer.fan_in_fan_out else delta


def _show_progress(names: Sequence[str]) -> Iterator[str]:
    """Yield the names one after the other, under a progress line."""
    progress = ui.Progress()
    for number, name in enumerate(names, 1):
        progress.update(f"decomposing {number}/{len(names)}", name)
        yield name
    progress.clear()


def _name_some(names: Sequence[str]) -> str:
    """Return the first four names, and how many more there are."""
    shown = ", ".join(names[:4])
    if len(names) <= 4:
        return shown
    return f"{shown} and {len(names) - 4} more (all in {provenance.ARTEFACT_RECORD})"
