"""`lora verify`: compare two forms of a model, any two of adapter, model and GGUF file.

Each answers the same probe prompts, in constant memory where that is possible. The logits after the
last tokens of each probe are compared; those of a GGUF file are llama.cpp's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lora_cli.common import LoraError, RejectedError, ui
from lora_cli.gguf import engine, llama_api, parity
from lora_cli.merge import compare_weights, layerwise_logits, merge, rounding
from lora_cli.models import (
    PROBES,
    Adapter,
    Base,
    Difference,
    Limit,
    PictureProcessor,
    Probe,
    Reader,
    choose_limit,
    compare_logits,
    make_probes,
    names,
    num_layers,
    read_adapter,
)


class Form(NamedTuple):
    """What one form says: logits of some positions per probe, the type that its weights have, and
    the number of its layers (0 for a GGUF)."""

    logits: list[torch.Tensor]
    type: str
    layers: int = 0


def verify(first: str, second: str, base: str | None) -> str:
    """Compare two forms and return the difference in words. Raises RejectedError where it is more
    than their types explain.

    `base` is for adapters. LoraError when the two split a probe into other tokens, or cannot be
    compared.
    """
    kinds = {path: names.classify(path) for path in (first, second)}
    by_model = next((path for path in kinds if kinds[path] != "gguf"), None)
    # one side's tokenizer and template make the prompts of both
    probes = (
        make_probes(_load_reader(by_model, kinds[by_model], base))
        if by_model
        else _plain_probes(Path(first))
    )
    forms = {path: _load_form(path, kinds[path], base, probes) for path in dict.fromkeys(kinds)}
    one, other = forms[first], forms[second]
    difference = compare_logits(one.logits, other.logits)
    said = f"{first} ({one.type}) and {second} ({other.type}): {difference}"
    pair = _find_pair(kinds, base)
    if pair is not None:
        rounding.refuse_other_settings(pair.adapter, pair.merged)
    limit = _choose_limit(difference, one, other, "gguf" in kinds.values())
    if limit is None:
        return f"{said} (reported: {' and '.join(sorted({one.type, other.type}))} has no limit)"
    said = f"{said} ({limit})"
    may_be_rounding = limit.what == "mean KL" and difference.mean_kl <= merge.ROUNDED_KL
    if pair is None or not (limit.kept or may_be_rounding):
        found = None
    else:
        found = _compare_weights(pair, forms[pair.merged.name].logits, probes, limit)
    if not limit.kept and found is None:
        raise RejectedError(
            f"not the same function: {said}", "merge or export again; lora generate shows answers"
        )
    if pair is not None and found is None:
        found = "the weights cannot be compared one by one"
    return f"{said}; {found}" if found else said


class Pair(NamedTuple):
    """An adapter, and the model that it was merged into."""

    adapter: Adapter
    merged: Base


def _find_pair(kinds: Mapping[str, str], base: str | None) -> Pair | None:
    """Return the adapter and the merged model; None where it is not these."""
    adapters = [path for path in kinds if kinds[path] == "adapter"]
    models = [path for path in kinds if kinds[path] in ("model", "hub")]
    if not adapters or not models:
        return None
    return Pair(read_adapter(Path(adapters[0]), base), Base.of_model(models[0]))


def _compare_weights(
    pair: Pair, given: Sequence[torch.Tensor], probes: Sequence[Probe], limit: Limit
) -> str | None:
    """Compare the weights of an adapter and a merged model, whose logits are `given`, and in 16
    bits, which hide as much, what its configuration makes of them. Return what was found; None
    where they cannot be compared, or the logits are over the `limit`, and by more than rounding.
    Raises RejectedError."""
    adapter, merged = pair
    weights = compare_weights.compare_weights(adapter, merged)
    if limit.what == "mean KL":
        rounding.refuse_other_function(adapter, merged, given, probes)
    if limit.kept or weights is None:
        return weights
    rounded = merge.choose_way(adapter, None, False).compute_rounded(probes, merged.dtype)
    if rounded is None:
        return None
    apart = compare_logits(layerwise_logits.keep_last(merged.task, rounded), given)
    if not choose_limit(apart, merged.dtype, num_layers(merged.config)).kept:
        return None
    ui.warn(
        "their logits lie further apart than 16 bits mostly do: that is rounding, as the adapter "
        f"merged anew and rounded once lies this far from {merged}: {apart}"
    )
    return weights


def _choose_limit(difference: Difference, one: Form, other: Form, gguf: bool) -> Limit | None:
    """Choose the limit; None where a type is rounded so far that there is none."""
    if not gguf:
        types = [getattr(torch, form.type) for form in (one, other)]
        coarser = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        return choose_limit(difference, coarser, one.layers)
    known = [parity.limit_any_kl(form.type) for form in (one, other)]
    if None in known:
        return None
    return Limit("mean KL", max(limit for limit in known if limit), difference.mean_kl)


def _load_reader(path: str, kind: str, base: str | None) -> Reader:
    if kind == "adapter":
        return read_adapter(Path(path), base).load_reader()
    return Base.of_model(path).load_reader()


def _plain_probes(path: Path) -> list[Probe]:
    """Make probes for two GGUF files: plain text, with the ids of the first."""
    with engine.GGUFModel(path) as model:
        return [Probe(text, model.tokenize(text), True) for text in PROBES]


def _load_form(path: str, kind: str, base: str | None, probes: Sequence[Probe]) -> Form:
    """Compute the logits of the model at `path` on the probes."""
    if kind == "gguf":
        return _load_gguf_form(Path(path), probes)
    _refuse_other_inputs(path, _load_reader(path, kind, base), probes)
    if kind == "adapter":
        adapter = read_adapter(Path(path), base)
        adapter.refuse_other_base()
        model = adapter.base
        ui.say(f"{path}: on {model}")
        dtype = adapter.trained_dtype
        logits = merge.choose_way(adapter, stream=None, original=False).compute_expected(probes)
        logits = logits and layerwise_logits.keep_last(model.task, logits)
    else:
        model = Base.of_model(path)
        dtype = model.dtype
        logits = layerwise_logits.walk_logits_of(model, dtype, probes)
    if logits is None:
        raise LoraError(
            f"{path} could not be read weight by weight", "compare it where there is more memory"
        )
    layers = num_layers(model.config)
    return Form(logits, str(dtype).removeprefix("torch."), layers)


def _refuse_other_inputs(path: str, reader: Reader, probes: Sequence[Probe]) -> None:
    """Raise RejectedError or LoraError where what reads a model's input makes something else of the
    probes."""
    own = make_probes(reader)
    if isinstance(reader, PictureProcessor):
        if not all(probe.is_same(other) for probe, other in zip(probes, own)):
            raise RejectedError(
                f"the image processors differ: {path} makes something else of the same pictures",
                "diff their preprocessor_config.json",
            )
        return
    if any(probe.text != other.text for probe, other in zip(probes, own) if not probe.plain):
        raise RejectedError(
            f"the chat templates differ: {path} renders the same prompts differently",
            "diff the two",
        )
    for probe in probes:
        ids = reader(probe.text, add_special_tokens=probe.plain)["input_ids"]
        _require_same_ids(path, probe, ids)


def _load_gguf_form(path: Path, probes: Sequence[Probe]) -> Form:
    with engine.GGUFModel(path, exact=True) as model:
        for probe in probes:
            _require_same_ids(str(path), probe, model.tokenize(probe.text, add_special=probe.plain))
        type_name = str(model.metadata["ftype"]).lower().removeprefix("all ")
    given = llama_api.compute_logits(path, [probe.ids for probe in probes])
    return Form([rows[-layerwise_logits.KEPT :] for rows in given], type_name)


def _require_same_ids(path: str, probe: Probe, ids: Sequence[int]) -> None:
    if list(ids) != probe.ids:
        raise LoraError(
            f"the tokenizers differ: {path} splits {probe.text[:60]!r} into other tokens",
            "they are two models",
        )
