"""Merge an adapter into its base: one plain model, written and compared with what it came from.

PEFT folds the adapter in float32, and each weight is rounded once to the base's type: tensor by
tensor in constant memory (`streamed`), or, where that is not possible, by `merge_and_unload` on the
whole model (`in_memory`). A base that was trained in 4 bits is dequantised first: the adapter was
fitted to those values, not to the original 16-bit ones (measured mean |Δlogit|: 1.5e-7 against
5.9e-2).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_cli.card import write_card
from lora_cli.common import (
    LoraError,
    RejectedError,
    UsageError,
    files,
    provenance,
    spell_count,
    stored,
    ui,
)
from lora_cli.merge import (
    compare_weights,
    in_memory,
    layerwise_logits,
    output,
    rounding,
    streamed,
    streaming_plan,
)
from lora_cli.models import (
    TRAINED,
    Adapter,
    Base,
    Difference,
    Probe,
    Reader,
    adapter_contents,
    attach,
    check_trained,
    choose_limit,
    compare_logits,
    compute_logits,
    make_probes,
    measure_trained,
    num_experts,
    num_layers,
    quantised,
    read_adapter,
    save_reader,
)

ROUNDED_KL = 0.5
"""The mean KL up to which rounding may move a model of which all else is shown to be right: its
files hold each weight rounded once, and its settings are the base's (rounding.py). It lets nothing
pass that these do not; beyond it a model is refused for what rounding has made of it."""
# Tokens of each probe prompt that are enough to compare a merged model with what it was made from
SHORT = 32


class Merged(NamedTuple):
    """What a merge did: how many modules it folded, into weights of what type, and how that was
    checked."""

    modules: int
    dtype: torch.dtype
    checked: Checked | None


class MergeRecord(provenance.Record):
    """The record of a merged model: the base and its commit, what was checked, and the record of
    the adapter."""

    base: str
    revision: stored.Commit | None = None
    parent: dict[str, Any] | None = None


class Checked(NamedTuple):
    """How a merged model was checked. `exact`: the distance of its logits from those of base with
    adapter before the weights were rounded, both in float32, and `rounded` after, None where it was
    not measured; `weights`: the files against the adapter merged again; `trained`: base with
    adapter against the end of training, None for an adapter that was saved without its logits."""

    exact: Difference | None
    weights: str
    rounded: Difference | None
    trained: str | None = None


def merge_adapter(
    adapter: Adapter,
    out: Path,
    stream: bool | None = None,
    original: bool = False,
    rejected: Path | None = None,
    check: bool = True,
) -> Merged:
    """Merge `adapter` into its base and write the plain model to `out`.

    `stream`: in constant memory (None: where that is possible), or with the whole model in memory.
    `original`: an adapter trained on 4-bit weights goes into the base's own weights, not the
    dequantised ones. `check`: read what was written again, and compare logits.

    Raise LoraError when `out` is occupied or PEFT cannot merge. Raise RejectedError when what was
    made is not base with adapter; it is then left in `rejected`, if that is given.
    """
    adapter = replace(adapter, base=adapter.base.resolve())  # what the record is to name
    refuse_unmergeable(adapter)
    adapter.refuse_other_base()
    with files.staged_folder(out, rejected) as staging:
        reader = adapter.load_reader()
        way = choose_way(adapter, stream, original)
        probes = _make_probes(adapter, reader)
        dtype = adapter.base.dtype
        expected = way.compute_expected(probes) if check else None
        exact = trained = checked = None
        if expected is not None:
            trained = check_against_training(adapter, way, probes, expected, original)
            exact = _check_exact(adapter, way, probes, expected)
        modules = way.write(staging, dtype, [reader.eos_token_id, *adapter.stop_token_ids])
        output.begin_where_trained(adapter, reader, staging)
        ui.say(f"  {modules} of {spell_count(modules, 'module')} merged")
        if check:
            weights = _check_files(way, adapter, staging, original)
            rounded = _check_rounded(adapter, way, probes, expected, staging, exact is not None)
            checked = Checked(exact, weights, rounded, trained)
        add_reader_and_record(adapter, reader, staging, original, checked)
        write_card(staging, files.name_artefact(out))
    return Merged(modules, dtype, checked)


def _check_exact(
    adapter: Adapter,
    way: streamed.Streamed | in_memory.Whole,
    probes: Sequence[Probe],
    expected: Sequence[torch.Tensor],
) -> Difference | None:
    """Return how far the merged model lies from base with adapter before its weights are rounded,
    None where that cannot be computed, or nothing is rounded and the files will tell as much.

    Both are computed in float32, where only the order of sums differs: a module left out, or merged
    with another strength, shows, which the rounding of every weight to 16 bits would hide. Raise
    RejectedError for such.
    """
    unrounded = None if adapter.base.dtype == torch.float32 else way.compute_unrounded(probes)
    if unrounded is None:
        return None
    return refuse_different(adapter, unrounded, expected, torch.float32, "before rounding, ")


def _check_rounded(
    adapter: Adapter,
    way: streamed.Streamed | in_memory.Whole,
    probes: Sequence[Probe],
    expected: Sequence[torch.Tensor] | None,
    folder: Path,
    was_exact: bool,
) -> Difference | None:
    """Return how far the model that was written lies from base with adapter, None where that cannot
    be computed; before it was rounded it `was_exact`. Raise RejectedError for another function, and
    for settings that are not the base's."""
    dtype, merged = adapter.base.dtype, Base.of_model(str(folder))
    with _call_merged(folder):
        rounding.refuse_other_settings(adapter, merged)
    given = None if expected is None else way.compute_merged(folder, dtype, probes)
    if expected is None or given is None:
        return None
    if was_exact and is_maybe_rounding(adapter, compare_logits(expected, given), dtype):
        with _call_merged(folder):
            rounding.refuse_other_function(adapter, merged, given, probes)
    when = "" if dtype == torch.float32 else "rounded, "
    return refuse_different(adapter, given, expected, dtype, when, was_exact)


def _check_files(
    way: streamed.Streamed | in_memory.Whole, adapter: Adapter, folder: Path, original: bool
) -> str:
    """Check what was written; merge each tensor again, compare it with the one there, and return
    what that found, which is said."""
    way.check_files(folder, adapter.base.dtype)
    with _call_merged(folder):
        found = compare_weights.compare_weights(
            adapter, Base.of_model(str(folder)), original, repeated=way.is_repeatable
        )
    said = f"merged again: {found}" if found else "read again: every weight is the one written"
    ui.say(f"  {said}")
    return said


@contextmanager
def _call_merged(folder: Path) -> Iterator[None]:
    """Let errors name what stands in `folder`, which has not got its name yet, the merged model."""
    try:
        yield
    except RejectedError as error:
        raise error.with_message(error.message.replace(str(folder), "the merged model")) from error


def is_maybe_rounding(adapter: Adapter, difference: Difference, dtype: torch.dtype) -> bool:
    """Return whether a merged model of type `dtype` lies further from base with adapter than 16
    bits mostly do, and no further than rounding may move it."""
    if dtype == torch.float32 or not difference.mean_kl <= ROUNDED_KL:
        return False
    return not choose_limit(difference, dtype, num_layers(adapter.base.config)).kept


def _make_probes(adapter: Adapter, reader: Reader) -> list[Probe]:
    """Return the probe prompts: whole where training left its logits of them, else their
    beginnings, which take less time."""
    probes = make_probes(reader)
    if (adapter.folder / TRAINED).is_file():
        return probes
    return [probe._replace(ids=probe.ids[:SHORT]) for probe in probes]


def _describe_weights(adapter: Adapter, original: bool) -> str:
    """Return which of the base's weights the adapter is merged into."""
    if adapter.base.quantised:
        return f"dequantised, from {adapter.base.quantised}"
    if adapter.replaced:
        return f"its own; trained on {adapter.replaced}, which is quantised"
    return "dequantised, from 4 bits" if adapter.quantization and not original else "its own"


def add_reader_and_record(
    adapter: Adapter,
    reader: Reader,
    folder: Path,
    original: bool,
    checked: Checked | None,
) -> None:
    """Write what belongs to a merged model beside weights and configurations: tokenizer and
    template, or image processor, and record."""
    found = checked and {
        "before_rounding": checked.exact and checked.exact._asdict(),
        "weights": checked.weights,
        "rounded": checked.rounded and checked.rounded._asdict(),
        "trained": checked.trained,
    }
    save_reader(reader, folder, adapter.base.name, adapter.base.revision)
    record = MergeRecord.model_validate(
        provenance.new_record(
            "merge",
            base=adapter.base.name,
            revision=adapter.base.revision,
            into=_describe_weights(adapter, original),
            checked=found,
            parent=adapter.record and adapter.record.to_data(),
        )
    )
    files.write_json(folder / provenance.ARTEFACT_RECORD, record.to_data())
    files.leave_out_home(folder)


def choose_way(
    adapter: Adapter, stream: bool | None, original: bool
) -> streamed.Streamed | in_memory.Whole:
    """Return the way to merge.

    Constant memory is the default: at each size measured it merged faster, with the same result.
    """
    if stream is not False:
        try:
            return streamed.Streamed(adapter, adapter.trained_dtype, original)
        except streaming_plan.Unstreamable as reason:
            if stream:
                raise LoraError(
                    f"it cannot be merged in constant memory: {reason}", "leave --stream out"
                ) from reason
            ui.say(f"  the whole model is loaded: {reason}")
    in_memory.say_needed(adapter)
    return in_memory.Whole(adapter, original)


def check_against_training(
    adapter: Adapter,
    way: streamed.Streamed | in_memory.Whole,
    probes: Sequence[Probe],
    expected: Sequence[torch.Tensor],
    original: bool,
) -> str | None:
    """Check that base with adapter is the function that training left, and say so; return how far
    it lies from it in words, None where that is not known.

    For an adapter trained on 4-bit weights, also say how far off the original weights are.
    """
    other = way.compute_on_other_weights(probes) if adapter.quantization else expected
    if adapter.replaced:
        _say_replaced(adapter, probes, expected)
        return None
    if other is None:
        return None
    trained = other if original else expected
    kept = check_trained(
        adapter.folder,
        trained,
        adapter.trained_dtype,
        lambda: _compute_rough(adapter, probes),
        adapter.base.task,
    )
    if kept:
        ui.say(f"  base with adapter against the end of training: {kept}")
    if adapter.quantization:
        apart = compare_logits(expected, other)
        into = "original weights, as asked" if original else "dequantised weights"
        which = "they lie" if original else "the original ones would lie"
        ui.say(f"  merged into the {into}; {which} this far from what was trained: {apart}")
    return kept


def _compute_rough(adapter: Adapter, probes: Sequence[Probe]) -> list[torch.Tensor] | None:
    """Return logits of base with adapter in the type it was trained in; None where that would take
    more memory than there may be, since the way to merge was to need little."""
    stored = adapter.base.tensors
    if stored is None or not layerwise_logits.fits_memory(stored):
        return None
    return compute_logits(attach.load_adapter(adapter.load_base(), adapter.folder), probes)


def _say_replaced(
    adapter: Adapter, probes: Sequence[Probe], expected: Sequence[torch.Tensor]
) -> None:
    """Say how far the adapter on the base that takes a quantised one's place is from the function
    that was trained."""
    assert adapter.replaced is not None, "merge_adapter has looked"
    trained = replace(adapter, base=adapter.replaced, replaced=None)
    apart: Difference | None
    if trained.base.is_readable():
        logits = choose_way(trained, None, False).compute_expected(probes)
        task = adapter.base.task
        both = (layerwise_logits.keep_last(task, each) for each in (logits or [], expected))
        apart = compare_logits(*both) if logits else None
    else:
        apart = measure_trained(adapter.folder, expected, adapter.base.task)
    if apart is None:
        ui.warn(f"how far it lies from what was trained is not known: {trained.base} is not here")
    else:
        ui.say(f"  merged into {adapter.base}; it lies this far from what was trained: {apart}")


def refuse_different(
    adapter: Adapter,
    given: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    dtype: torch.dtype,
    when: str = "",
    was_exact: bool = False,
) -> Difference:
    """Return how far a merged model, its weights of type `dtype`, lies from base with adapter, and
    say it.

    Raise RejectedError where float32 lies further than the order of sums explains; or 16 bits
    further than most arithmetic in them would. What rounding does is what a user will see, and no
    measure of whether the merge is right: of one that `was_exact` before, it is a warning; that its
    settings are the base's has been seen.
    """
    difference = compare_logits(expected, given)
    layers = num_layers(adapter.base.config)
    limit = choose_limit(difference, dtype, layers)
    distance = f"{difference} ({limit})"
    ui.say(f"  {when}merged against base with adapter: {distance}")
    over = not limit.kept
    if over and _has_experts(adapter) and difference.mean_kl <= rounding.ROUTED_KL:
        ui.say(
            "  over the limit at a few tokens only, as the mean KL shows: rounding sends those to "
            "another expert"
        )
    elif over and was_exact and difference.mean_kl <= ROUNDED_KL:
        ui.warn(
            f"rounding the merged weights to {str(dtype).removeprefix('torch.')} changes what the "
            "model says: lora evaluate ADAPTER MERGED tells how much, and serving the adapter "
            "beside its base rounds nothing"
        )
    elif over:
        raise RejectedError(
            f"{when}the merged model differs from base with adapter: {distance}",
            f"is {adapter.base} the base it was trained on? --base gives another",
        )
    return difference


def _has_experts(adapter: Adapter) -> bool:
    """Return whether the base chooses among experts: a rounded weight may tip a close choice, and
    with it a token's logits."""
    return bool(num_experts(adapter.base.config))


def refuse_unmergeable(adapter: Adapter) -> None:
    """Raise LoraError for an adapter of which no plain model can be made, and for a base whose
    files hold weights in a form that nothing can be added to."""
    adapter_contents.refuse_unmergeable(adapter.folder)
    if adapter.base.quantised:
        quantised.refuse_unmergeable(adapter.base.name, adapter.base.quantised)


def _say_into(adapter: Adapter, original: bool) -> None:
    """Say what the adapter is merged into where that is not simply its base; UsageError for
    `--base-weights original` where there are no other weights."""
    if adapter.base.quantised:
        if original:
            raise UsageError(
                f"{adapter.base} is already quantised ({adapter.base.quantised}): it has no "
                "original weights",
                "--base MODEL, the 16-bit model it was made from",
            )
        ui.say(
            f"  already quantised ({adapter.base.quantised}): merging into the dequantised base, "
            "the function that was trained"
        )
    elif adapter.replaced:
        ui.say(
            f"  trained on {adapter.replaced}, which is quantised: merging into {adapter.base}'s "
            "own weights instead"
        )
    elif adapter.quantization:
        into = "original weights" if original else "dequantised base, the function that was trained"
        ui.say(f"  trained on 4-bit weights: merging into the {into}")
        used = streaming_plan.choose_quantiser(adapter).type
        if used != adapter.trained_on and not original:
            ui.warn(
                f"trained on {adapter.trained_on}, and quantised on {used} here: a few 4-bit codes "
                "may be others; merge where it was trained to have the same"
            )
    elif original:
        raise UsageError(f"{adapter} was not trained on 4-bit weights", "leave --base-weights out")


def merge(
    adapter_folder: Path,
    out: Path,
    base: str | None = None,
    stream: bool | None = None,
    original: bool = False,
    called: str | None = None,
) -> None:
    """Fold the adapter into its base (`base` overrides the one it names), write `out`, and verify
    it.

    `stream` and `original` are as in `merge_adapter`; a model that fails the check is left in
    OUT.rejected. `called`: what it is to the user, where its folder is none of theirs.
    """
    started = time.monotonic()
    files.refuse_occupied(out)
    adapter = read_adapter(adapter_folder, base)
    made = (
        ""
        if adapter.record
        else " (it has no record, so its base is the one that adapter_config.json names)"
    )
    ui.say(f"merging {called or adapter} into {adapter.base}{made}")
    refuse_unmergeable(adapter)
    _say_into(adapter, original)
    rejected = out.with_name(f"{out.name}.rejected")
    try:
        merged = merge_adapter(adapter, out, stream, original, rejected)
    except RejectedError as error:
        raise RejectedError(f"{error.message}; left in {rejected}", error.hint) from error
    ui.say(
        f"{out}: {str(merged.dtype).removeprefix('torch.')} model, "
        f"{ui.format_duration(time.monotonic() - started)}"
    )
