"""`lora export-onnx`: write a merged or whole model as an ONNX file that is compared with it in
onnxruntime."""

from __future__ import annotations

import copy
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lora_cli.common import LoraError, RejectedError, files, provenance, quote, ui
from lora_cli.merge import merge
from lora_cli.models import Base, names, refuse_not_finite, save_reader
from lora_cli.onnx_export import compare, graph
from lora_cli.onnx_export.feeds import Feed, make_feeds


def export(name: str, out: Path) -> None:
    """Write the model `name` (a folder, or on the hub) to the folder `out`: model.onnx in float32,
    configuration, tokenizer and record.

    Raise LoraError for a model that does not answer in one pass, one that torch's exporter does not
    know, an `out` that is occupied, and missing packages; RejectedError where onnxruntime does not
    say what the model says in torch: what was made is then left in OUT.rejected.
    """
    started = time.monotonic()
    files.refuse_occupied(out)
    graph.refuse_missing_packages()
    model = _open(name)
    ui.say(f"exporting {model} ({model.config.architectures[0]})")
    rejected = out.with_name(f"{out.name}.rejected")
    try:
        with files.staged_folder(out, rejected) as staging:
            _refuse_full_disk(model, staging, out)
            _write(model, staging)
    except RejectedError as error:
        raise RejectedError(f"{error.message}; left in {rejected}", error.hint) from error
    ui.say(f"{out}: {_list_sizes(out)}, {ui.format_duration(time.monotonic() - started)}")


def _open(name: str) -> Base:
    """Return a model that ONNX can hold. Raises LoraError for others, with another way."""
    kind = names.classify(name)
    if kind == "gguf":
        raise LoraError(f"{name} is a GGUF file", "give the folder of the model it was made from")
    if kind == "adapter":
        raise LoraError(
            f"{name} is an adapter, and ONNX has whole models",
            f"lora merge {quote(name)} MODEL, then lora export-onnx MODEL OUT",
        )
    model = Base.of_model(name, Base(name).resolve().revision)
    refuse_unanswering(model)
    if model.quantised is not None:
        raise LoraError(
            f"{model} is already quantised ({model.quantised}), which is not written as ONNX",
            "export the model it was made from",
        )
    return model


def refuse_unanswering(model: Base) -> None:
    """Raise LoraError for a model that does not give its whole answer in one pass."""
    kinds = [kind for kind in model.config.architectures or [] if isinstance(kind, str)]
    known = any(kind.endswith(model.task.architectures) for kind in kinds)
    if not known:
        kind = kinds[0] if kinds else "of a class that config.json does not name"
        raise LoraError(
            f"{model} is {kind}, and has no answers of a task",
            "train an adapter of a task on it, merge that, and export what comes of it",
        )
    if model.task.writes_next_tokens:
        raise LoraError(
            f"{model} writes text, token by token, and one ONNX file holds a single pass",
            f"lora export-gguf {quote(model.name)}"
            if model.is_folder
            else "lora export-gguf, of a folder with it",
        )
    if model.build_empty().can_generate():
        raise LoraError(
            f"{model} writes text, token by token, and one ONNX file holds a single pass",
            graph.keep_model(model.name),
        )


def _refuse_full_disk(model: Base, folder: Path, out: Path) -> None:
    """Raise LoraError naming the megabytes that the disk of a folder, which is to become `out`,
    lacks for the weights in float32."""
    weights = model.build_empty().parameters()
    needed = int(1.05 * sum(4 * weight.numel() for weight in weights))
    free = shutil.disk_usage(folder).free
    if needed > free:
        megabytes, missing = (needed >> 20) + 1, (needed - free >> 20) + 1
        raise LoraError(
            f"{out} needs about {megabytes} MB, {missing} MB more than are free there",
            "give a folder on another disk",
        )


def _write(model: Base, folder: Path) -> None:
    """Write everything that the folder of an exported model holds."""
    network = model.load(torch.float32)
    refuse_not_finite(network, model.name)
    config = copy.deepcopy(network.config)
    feeds = make_feeds(model, network)
    expected = compare.run_torch(network, feeds, model.name)
    if not compare.is_same_on_either_side(feeds, expected):
        del feeds[1], expected[1]
    file = folder / graph.FILE
    graph.write_graph(network, feeds[0], list(expected[0]), file, model.name)
    _write_settings(model, config, folder)
    distances = _compare(model, file, feeds, expected)
    _write_record(model, network, folder, feeds, distances)
    files.leave_out_home(folder)


def _compare(
    model: Base, file: Path, feeds: list[Feed], expected: list[compare.Outputs]
) -> dict[str, compare.Distance]:
    """Return how far the file lies from the model, which is said. Raises RejectedError where that
    is further than sums in another order explain."""
    import onnxruntime

    given = compare.run_onnx(file, feeds, list(expected[0]))
    distances = compare.measure(feeds, expected, given)
    compare.refuse_different(distances, model.name, onnxruntime.__version__)
    said = ", ".join(f"{name} {each}" for name, each in distances.items())
    ui.say(
        f"  onnxruntime {onnxruntime.__version__} against torch, both in float32, over "
        f"{len(feeds)} batches: largest difference of {said}"
    )
    return distances


def _write_settings(model: Base, config: PretrainedConfig, folder: Path) -> None:
    """Write configuration and tokenizer, or image processor."""
    config.architectures = model.config.architectures
    config.save_pretrained(str(folder))
    save_reader(model.load_reader(), folder, model.name, model.revision)


def _write_record(
    model: Base,
    network: PreTrainedModel,
    folder: Path,
    feeds: list[Feed],
    distances: dict[str, compare.Distance],
) -> None:
    """Write beside the file what it is, how it was checked, and the record of the model."""
    import onnx
    import onnxruntime
    import onnxscript

    record = provenance.new_record(
        "export-onnx",
        model=model.name,
        revision=model.revision,
        weights={"stored": _name(model.dtype), "written": _name(network.dtype)},
        opset=graph.OPSET,
        inputs={name: list(feeds[0].axes.values()) for name in feeds[0].inputs},
        checked={name: each._asdict() for name, each in distances.items()},
        parent=_read_parent(model),
    )
    record["versions"] |= {
        each.__name__: each.__version__ for each in (onnx, onnxscript, onnxruntime)
    }
    files.write_json(folder / f"{graph.FILE}.json", record)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _read_parent(model: Base) -> dict[str, Any] | None:
    """Return the record of a model that was merged here."""
    file = Path(model.name) / provenance.ARTEFACT_RECORD
    return merge.MergeRecord.read(file).to_data() if file.is_file() else None


def _list_sizes(folder: Path) -> str:
    """Return the files of a graph with their sizes."""
    found = sorted(folder.glob(f"{graph.FILE}*"))
    sizes = [(file.name, file.stat().st_size) for file in found if file.suffix != ".json"]
    return " and ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in sizes)
