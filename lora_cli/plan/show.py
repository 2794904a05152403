"""`lora plan`: show what a recipe will need, from its base's configuration and tokenizer.

It shows parameters, memory item by item, whether that fits a device, the largest batch and length
that do, steps, and hours at a speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import date
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from lora_cli.common import spell_count, threads, ui
from lora_cli.data import cache, load, prepare, selection, sources
from lora_cli.models import Base, Reader, attach, find_picture_shape, load_recipe_reader
from lora_cli.plan import flops, hardware, memory, settled, sizes, spread, weightless
from lora_cli.plan.hardware import Hardware
from lora_cli.plan.rehearsal import Batch
from lora_cli.recipe import Recipe, Task

SMALL = 32 << 20
"""Bytes up to which local files are prepared on the way, to count steps."""
ASSUMED_USE = 0.4
"""Assumed, not measured: the share of a GPU's peak that training reaches."""
LONGEST = 1 << 17
"""Tokens up to which the largest length is looked for."""


class Time(NamedTuple):
    """Seconds of training, and where the speed comes from."""

    seconds: float
    tokens_per_second: float
    source: str


def show_plan(
    recipe: Recipe,
    gpu: str | None,
    tokens_per_second: float | None,
    read_data: bool,
    as_json: bool,
    processes: int = 1,
) -> None:
    """Print the plan of a recipe; LoraError for what training refuses before its first step."""
    card = hardware.parse_gpu(gpu) if gpu else None
    found = settled.settle_recipe(recipe, card, processes=processes)
    recipe, base, parent, device = found.recipe, found.base, found.parent, found.device
    reader, new_ids, _ = load_recipe_reader(recipe, base, parent)
    rows = None
    if read_data or _are_rows_at_hand(recipe, reader):
        rows, _ = load.load_rows(recipe, reader)
    beyond = sizes.check_positions(recipe, base, reader, [rows] if rows else None)
    adapted = _build_adapted(found, len(reader), new_ids)
    trained, total = adapted.get_nb_trainable_parameters()
    kinds = count_by_kind(adapted)
    steps = sizes.count_steps(recipe, rows) if rows else None
    time = _estimate_time(recipe, adapted, device, rows, steps, tokens_per_second)
    report = {
        "base": base.describe(),
        "choices": [choice._asdict() for choice in found.choices],
        "parent": parent.to_record() if parent else None,
        "parameters": {"total": total, "trained": trained, "trained_by_kind": kinds},
        **(alone := _foresee(memory.Forecast(recipe, adapted, device), rows, base)),
        "beyond_positions": beyond,
        "steps": steps._asdict() if steps else None,
        "time": time._asdict() if time else None,
        "spread": _foresee_spread(recipe, processes, adapted, alone, rows),
    }
    if as_json:
        ui.report_json(report)
    else:
        ui.report(*_format_lines(recipe, device, report, found.list_lines()))


def _foresee(
    forecast: memory.Forecast, rows: prepare.Prepared | None, base: Base
) -> dict[str, Any]:
    """Return what the largest batch needs of the memory, and which larger ones fit."""
    batch = memory.largest_batch(forecast.recipe, rows)
    need = forecast.need(batch)
    return {
        "batch": batch._asdict(),
        "memory": {
            "items": need.items,
            "total": need.total,
            "device": forecast.device._asdict(),
            "fits": forecast.fits(batch),
        },
        "largest": _find_largest(forecast, batch, base.config),
    }


def _foresee_spread(
    recipe: Recipe,
    processes: int,
    adapted: PeftModel,
    alone: dict[str, Any],
    rows: prepare.Prepared | None,
) -> list[dict[str, Any]] | None:
    """Return what several processes need and lose, from what one needs `alone`; None where one is
    asked for."""
    if processes == 1:
        return None
    spread.refuse_statistics(adapted, processes)
    lengths = None
    if rows is not None and len(rows.rows):
        lengths = prepare.find_lengths(rows.rows).tolist()
    trained, _ = adapted.get_nb_trainable_parameters()
    parts = spread.take_apart(recipe, alone["memory"]["items"], adapted)
    return spread.to_data(spread.foresee(recipe, processes, trained, parts, lengths))


def _build_adapted(found: settled.Settled, vocabulary: int, new_ids: list[int]) -> PeftModel:
    """Return the base with its adapter, without weights; LoraError where the adapter that is
    trained on does not fit it."""
    config, parent = found.base.config, found.parent
    adapted = weightless.build_adapted(found.recipe, config, vocabulary, new_ids, parent)
    if parent is not None:
        parent.refuse_unfit(adapted)
    return adapted


def _are_rows_at_hand(recipe: Recipe, reader: Reader) -> bool:
    """Return whether the rows are counted in a moment: small local files, or rows prepared
    before."""
    data = recipe.data
    size = 0
    for given in [part.path for part in data.mix] if data.mix else [data.path]:
        for path in [given] if isinstance(given, str) else given or []:
            local = [Path(name) for name in glob(path)]  # noqa: PTH207 - also absolute ones
            if not local:
                return False
            size += sum(_measure_files(each) for each in local)
    if size <= SMALL:
        return True
    if data.mix or data.path is None:
        return False
    source = sources.find_source(data, "path", data.path, data.split)
    key = cache.make_key(source.hash_content(), source.names, recipe, reader, date.today())
    return (cache.find_folder() / key).exists()


def _measure_files(path: Path) -> int:
    """Bytes of a file, or of everything below a folder."""
    found = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in found)


def count_by_kind(adapted: PeftModel) -> dict[str, tuple[int, int]]:
    """Modules and trained parameters by the last part of the adapted module's name."""
    modules: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    layers = attach.find_lora_layers(adapted)
    for name in layers:
        modules[name.rpartition(".")[2]] += 1
    for name, parameter in attach.walk_trainable(adapted):
        owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
        plain = name.replace(".modules_to_save.default", "").rpartition(".")[0]
        kind = (owner or plain).rpartition(".")[2]
        trained[kind] += parameter.numel()
    return {kind: (modules[kind], trained[kind]) for kind in trained}


def _find_largest(forecast: memory.Forecast, batch: Batch, config: Any) -> dict[str, int | None]:
    """Return the largest batch size and the largest length that fit, the other as it is.

    None for the batch size where it does not matter.
    """
    training = forecast.recipe.training
    if forecast.recipe.task_row.reads_pictures:
        size = training.per_device_train_batch_size
        most = forecast.largest(lambda n: Batch(n, 1, batch.waiting), size, 4096)
        return {"per_device_train_batch_size": most, "max_length": None}
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = min(positions or LONGEST, LONGEST)
    texts = selection.list_limits(forecast.recipe)[0].texts
    if training.packing == "step":
        whole = -(-batch.length // texts)
        length = forecast.largest(lambda n: Batch(1, texts * n, waiting=True), whole, longest)
        return {"per_device_train_batch_size": None, "max_length": length}
    size = training.per_device_train_batch_size
    one_sequence = batch.rows == 1 and batch.length >= size > 1
    each = (batch.length // size if one_sequence else batch.length) // texts

    def shape(rows: int, length: int) -> Batch:
        if one_sequence:
            return Batch(1, rows * length * texts, batch.waiting)
        return batch._replace(rows=rows, length=length * texts)

    return {
        "per_device_train_batch_size": forecast.largest(lambda n: shape(n, each), size, 4096),
        "max_length": forecast.largest(lambda n: shape(size, n), each, longest),
    }


def _estimate_time(
    recipe: Recipe,
    adapted: PeftModel,
    device: Hardware,
    rows: prepare.Prepared | None,
    steps: sizes.Steps | None,
    tokens_per_second: float | None,
) -> Time | None:
    """Return how long the run takes at the given speed, or at an assumed share of the device's
    peak.

    None where neither is known, or the rows are not counted.
    """
    if rows is None or steps is None or rows.stream is not None:
        return None
    tokens = rows.counts.tokens * steps.steps / steps.steps_per_epoch
    if tokens_per_second is not None:
        return Time(tokens / tokens_per_second, tokens_per_second, "--tokens-per-second")
    peak = flops.find_peak(device.name, recipe.model.dtype) if device.kind == "cuda" else None
    if peak is None:
        return None
    each = _count_work(recipe, adapted, rows)
    if not each:
        return None
    speed = ASSUMED_USE * peak / each
    source = f"assumed, not measured: {ASSUMED_USE:.0%} of {peak / 1e12:.0f} TFLOP/s"
    return Time(tokens / speed, speed, source)


def _count_work(recipe: Recipe, adapted: PeftModel, rows: prepare.Prepared) -> float:
    """Return the operations of training on a token, or a picture; 0 where they are not known."""
    if recipe.task_row.reads_pictures:
        shape = find_picture_shape(recipe.model.name_or_path, recipe.model.revision)
        return flops.count_per_picture(adapted, shape)
    mean = rows.counts.tokens / max(len(rows.rows), 1)
    share = rows.counts.trained_tokens / max(rows.counts.tokens, 1)
    return flops.count_per_token(adapted, mean, share)


def _format_lines(
    recipe: Recipe, device: Hardware, report: dict[str, Any], settled_lines: list[str]
) -> Iterator[str]:
    parameters = report["parameters"]
    found = report["memory"]
    batch = Batch(**report["batch"])
    yield f"{recipe.method} on {report['base']}"
    yield from (f"  {line}" for line in settled_lines)
    total, trained = parameters["total"], parameters["trained"]
    yield ""
    yield f"{total:,} parameters, {trained:,} of them trained ({trained / total:.2%})"
    kinds = parameters["trained_by_kind"].items()
    lines = [[kind, str(modules), f"{number:,}"] for kind, (modules, number) in kinds]
    yield from ui.format_table(["kind of module", "modules", "trained"], lines)
    yield ""
    yield f"memory at the peak of a step: {_describe_batch(recipe, batch)} in one forward pass"
    items = [*found["items"].items(), ("total", found["total"])]
    yield from ui.format_table(
        ["", "GiB"], [[name, f"{size / hardware.GIB:.2f}"] for name, size in items]
    )
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    yield f"{verdict}: {found['total'] / hardware.GIB:.1f} of {device}"
    if device.kind == "cpu":
        yield f"threads: {torch.get_num_threads()}, waiting {threads.describe_waiting()}"
    if report["beyond_positions"]:
        yield report["beyond_positions"]
    yield from _format_limits(recipe, report["largest"])
    yield from _format_duration(report, recipe.task_row)
    if report["spread"]:
        found = [spread.Spread(**each) for each in report["spread"]]
        yield ""
        yield (
            "several processes, sharded: each has a part of the base, and at most what one has for "
            "a step; on paper"
            if recipe.distributed.shards
            else "several processes (DDP): each has the base, and at most what one has for a step"
        )
        yield from ui.format_table(spread.HEADER, spread.format_lines(found))


def _describe_batch(recipe: Recipe, batch: Batch) -> str:
    if not recipe.task_row.reads_pictures:
        targets = f", and {batch.targets} of targets" if batch.targets else ""
        return f"{batch.rows} x {spell_count(batch.length, 'token')}{targets}"
    height, width = find_picture_shape(recipe.model.name_or_path, recipe.model.revision)
    return f"{spell_count(batch.rows, 'picture')} of {width}x{height}"


def _format_limits(recipe: Recipe, largest: dict[str, int | None]) -> Iterator[str]:
    if recipe.task_row.reads_pictures:
        size = largest["per_device_train_batch_size"] or "none"
        yield f"largest that fits: training.per_device_train_batch_size {size}"
        return
    length = largest["max_length"] or "none"
    size = largest["per_device_train_batch_size"] or "none"
    other = f"or training.per_device_train_batch_size {size}"
    if recipe.training.packing == "step":
        other = "any batch size, as the rows of a step share sequences"
    yield f"largest that fits: training.max_length {length}; {other}"


def _format_duration(report: dict[str, Any], task: Task) -> Iterator[str]:
    steps = report["steps"]
    time = report["time"]
    if steps is None:
        yield "steps: not counted, as the rows are not prepared yet (--data prepares them)"
        return
    epoch = f"{steps['steps_per_epoch']:,} an epoch"
    if not task.reads_pictures:
        epoch += f"; {steps['fill']:.0%} of the batches is text"
    yield f"steps: {steps['steps']:,} ({epoch})"
    if time is None:
        of = f" (of {task.unit})" if task.reads_pictures else ""
        yield f"time: no speed is known; give --tokens-per-second N{of}, as a run prints it"
    else:
        speed = f"{time['tokens_per_second']:,.0f} {task.unit}/s ({time['source']})"
        yield f"time: {ui.format_duration(time['seconds'])} at {speed}"
