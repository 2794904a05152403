"""Combine several adapters of one base into one, by PEFT's `add_weighted_adapter` (`lora
combine`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from peft import LoraModel, PeftModel
from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, UsageError, files, find_nearest, lock, spell_count, ui
from lora_cli.merge import derived, low_rank
from lora_cli.merge.low_rank import PREFIX
from lora_cli.models import Adapter, Base, adapter_contents, attach, read_adapter

COMBINATIONS: tuple[str, ...] = get_args(
    get_type_hints(LoraModel.add_weighted_adapter)["combination_type"]
)
SEED = 0
"""The seed for combinations that drop weights at random (dare)."""
NAME = "adapter_{}"
"""What PEFT calls the adapters: a number alone it would find among those of layers."""


@contextmanager
def join_adapters(
    folders: Sequence[Path],
    out: Path,
    weights: str | None,
    combination: str,
    density: float | None,
    base: str | None,
) -> Iterator[Path]:
    """Yield a single adapter's folder as it is, or several adapters combined in a temporary
    folder."""
    if len(folders) == 1:
        if weights is not None:
            raise UsageError(
                "--weights is for several adapters, and there is one", "leave --weights out"
            )
        yield folders[0]
        return
    files.refuse_occupied(out)
    with files.made_folder(out.parent, out), lock.hold(out), files.scratch_folder() as scratch:
        combine(folders, scratch / "combined", weights, combination, density, None, base)
        yield scratch / "combined"


def combine(
    folders: Sequence[Path],
    out: Path,
    weights: str | None,
    combination: str,
    density: float | None,
    r: int | None,
    base: str | None,
) -> None:
    """Combine adapters of one base by PEFT's `add_weighted_adapter` and write the new adapter to
    `out`.

    `weights` is one number per adapter, `0.7,0.3` (None: 1 each); `density` the share of weights
    that ties, dare and magnitude_prune keep; `r` the rank of the svd kinds. The base's weights are
    not loaded. Raise UsageError for a wrong option, LoraError for adapters that cannot be combined.
    """
    numbers = _parse_weights(weights, len(folders))
    _check_combination(combination, density, r)
    adapters = _read_all(folders, base)
    first = adapters[0]
    with files.staged_folder(out) as staging:
        tokenizer = _load_tokenizer(adapters)
        adapted = _attach_side_by_side(adapters)
        _check_rank(adapted, r)
        fan_in_fan_out = adapted.peft_config[NAME.format(0)].fan_in_fan_out
        made, distance = _combine_tensors(adapted, numbers, combination, density, r)
        rank = low_rank.save(made, staging, first.base, fan_in_fan_out)
        attach.load_adapter(first.base.build_zero(), staging)
        options = {"combination": combination, "density": density, "seed": SEED}
        contents = {"weights": numbers, **options, "distance": distance}
        derived.finish_folder(staging, tokenizer, "combine", adapters, **contents)
    kind = f"{combination} of {spell_count(len(adapters), 'adapter')} of {first.base}"
    ui.say(f"{kind}: {spell_count(len(made), 'module')}, rank {rank}")
    explained = f"{distance:.1e}{_explain_distance(combination)}"
    ui.say(f"  relative distance from the weighted sum of their updates: {explained}")


def _read_all(folders: Sequence[Path], base: str | None) -> list[Adapter]:
    """Return the adapters; raise LoraError where they have no base in common, or hold more than
    linear updates."""
    adapters = [read_adapter(folder, base) for folder in folders]
    _refuse_other_bases(adapters)
    for adapter in adapters:
        adapter_contents.refuse_beyond(adapter.folder)
        adapter.refuse_other_base()
    return adapters


def _parse_weights(text: str | None, count: int) -> list[float]:
    """Return one number per adapter from `0.7,0.3`; raise UsageError for anything else."""
    if count < 2:
        raise UsageError("one adapter cannot be combined", "lora combine A B OUT")
    if text is None:
        return [1.0] * count
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights {text}: not numbers", "--weights 0.7,0.3") from None
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        example = ",".join([f"{1 / count:.2g}"] * count)
        raise UsageError(
            f"--weights {text}: {len(numbers)} numbers for {count} adapters", f"--weights {example}"
        )
    return numbers


def _check_combination(name: str, density: float | None, r: int | None) -> None:
    """Raise UsageError for an unknown combination, or an option that it does not have."""
    if name not in COMBINATIONS:
        guess = find_nearest(name, COMBINATIONS)
        hint = f"did you mean {guess}?" if guess else f"one of {', '.join(COMBINATIONS)}"
        raise UsageError(f"--combination {name} is not known", hint)
    drops = name.startswith(("ties", "dare", "magnitude_prune"))
    if drops and density is None:
        raise UsageError(f"{name} needs the share of weights to keep", "--density 0.5")
    if density is not None and not drops:
        raise UsageError(
            f"{name} keeps all weights: --density is for ties, dare and magnitude_prune",
            "leave it out",
        )
    if r is not None and not name.endswith("svd"):
        raise UsageError(
            f"--r is the rank of the svd combinations, not of {name}", "--combination svd"
        )


def _check_rank(adapted: PeftModel, r: int | None) -> None:
    """Raise UsageError where a module does not have an update of rank `r`."""
    layers = attach.find_lora_layers(adapted)
    most, path = min(
        (min(layer.in_features, layer.out_features), path) for path, layer in layers.items()
    )
    if r is not None and r > most:
        raise UsageError(
            f"--r {r}: an update of {path.removeprefix(PREFIX)} has at most rank {most}",
            f"--r {most}",
        )


def _refuse_other_bases(adapters: Sequence[Adapter]) -> None:
    """Raise LoraError, naming both, unless all adapters have the same base; warn where only some
    were trained on it in 4 bits."""
    first = adapters[0]
    for other in adapters[1:]:
        if _locate_base(first.base) != _locate_base(other.base):
            raise LoraError(
                f"the adapters have different bases: {first.folder} is for {_name_base(first)}, "
                f"{other.folder} for {_name_base(other)}",
                "if the two are the same model: --base MODEL",
            )
        if first.quantization != other.quantization:
            ui.warn(
                f"{first.folder} and {other.folder} were trained on the base in different "
                "precisions"
            )


def _locate_base(base: Base) -> tuple[str, str | None]:
    """Return what is equal for two spellings of one base: the folder's full path, or name and
    revision."""
    return (str(Path(base.name).resolve()) if base.is_folder else base.name), base.revision


def _name_base(adapter: Adapter) -> str:
    """Return an adapter's base as messages name it."""
    return adapter.base.name + (f" at {adapter.base.revision}" if adapter.base.revision else "")


def _load_tokenizer(adapters: Sequence[Adapter]) -> PreTrainedTokenizerBase:
    """Return the first adapter's tokenizer; warn where another renders chats differently."""
    tokenizers = [adapter.load_tokenizer() for adapter in adapters]
    for adapter, tokenizer in zip(adapters[1:], tokenizers[1:]):
        if tokenizer.chat_template != tokenizers[0].chat_template:
            ui.warn(f"{adapter.folder} has another chat template; {adapters[0].folder}'s is used")
    return tokenizers[0]


def _attach_side_by_side(adapters: Sequence[Adapter]) -> PeftModel:
    """Return one base without weights with all adapters, each with exactly the modules it adapts as
    targets.

    PEFT passes the first adapter's choice of layers and its start on to what it combines, so both
    are cleared.
    """
    adapted = adapters[0].base.build_zero()
    for number, adapter in enumerate(adapters):
        adapted = attach.load_adapter(adapted, adapter.folder, NAME.format(number))
    layers = attach.find_lora_layers(adapted)
    for name, config in adapted.peft_config.items():
        config.target_modules = {
            path.removeprefix(PREFIX) for path, layer in layers.items() if name in layer.lora_A
        }
        config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
        config.init_lora_weights = True
    return adapted


def _combine_tensors(
    adapted: PeftModel,
    weights: Sequence[float],
    combination: str,
    density: float | None,
    r: int | None,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], float]:
    """Return `(lora_A, lora_B)` by module, and the relative distance from the weighted sum of all
    updates."""
    names = [NAME.format(number) for number in range(len(weights))]
    torch.manual_seed(SEED)
    try:
        adapted.add_weighted_adapter(
            names, list(weights), "combined", combination, svd_rank=r, density=density
        )
    except (ValueError, RuntimeError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        raise LoraError(f"PEFT cannot combine them: {said}", "--combination cat, or svd") from error
    made = {}
    off = whole = 0.0
    for path, layer in attach.find_lora_layers(adapted).items():
        lora_A = layer.lora_A["combined"].weight.data
        lora_B = layer.lora_B["combined"].weight.data
        given = lora_B.double() @ lora_A.double()
        wanted = sum(
            weight * layer.get_delta_weight(name).double()
            for weight, name in zip(weights, names)
            if name in layer.lora_A
        )
        wanted = wanted.T if layer.fan_in_fan_out else wanted
        off += (given - wanted).square().sum().item()
        whole += wanted.square().sum().item()
        made[path.removeprefix(PREFIX)] = (lora_A, lora_B)
    return made, (off / whole) ** 0.5 if whole else 0.0


def _explain_distance(combination: str) -> str:
    """Return why a combination is not that sum, in brackets, or nothing."""
    if combination == "linear":
        return " (linear sums the A's and the B's, whose products mix the adapters; cat is exact)"
    return "" if combination in ("cat", "svd") else f" ({combination} differs on purpose)"
