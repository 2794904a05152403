"""`lora export-gguf`: write a merged model, or an adapter merged on the way, as GGUF files checked
in llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from lora_cli.common import (
    LoraError,
    UsageError,
    files,
    plain_files,
    privacy,
    provenance,
    quote,
    ui,
)
from lora_cli.gguf import check, ggml, imatrix, mixture, modelfile, parity, preflight, quantize
from lora_cli.gguf.tools import CONVERTER_TYPES, EXACT, VERSION, Found, convert, find_converter
from lora_cli.merge import merge
from lora_cli.models import Adapter, Base, names, quantised, read_adapter, save_tokenizer


def export(
    path: Path | None,
    types: Sequence[str],
    output: Path | None,
    base: str | None,
    llama_cpp_dir: Path | None,
    weighted: str | None = None,
    base_cost: bool = True,
) -> list[Path]:
    """Write one GGUF per type, each compared in llama.cpp with the model; returns their paths.

    `path` is a merged model or an adapter (`base` overrides the base it names); None takes the
    newest result below the current folder. Files are named after the folder, in `output` or beside
    the weights. `base_cost`: measure what a quantised type costs the base, too. Raises LoraError
    for missing tools and files in the way before anything is converted, and for a wrong file; those
    finished before it are kept.
    """
    wanted = list(dict.fromkeys(_spell_type(name, weighted is not None) for name in types))
    path = path or find_newest_result()
    kind = _classify(path)
    _check_quantizer(wanted, weighted)
    adapter = _read_adapter(path, kind, base)
    converter = find_converter(llama_cpp_dir)
    folder, stem = output or _find_folder(path, kind), files.name_artefact(path)
    targets = {name: folder / f"{stem}-{name}.gguf" for name in wanted}
    with files.scratch_beside(folder, targets.values(), folder / "Modelfile") as scratch:
        ui.say(f"exporting {path} with the converter {converter}")
        means = Means(converter, scratch, weighted, parity.find_engine())
        measured = _find_base(path, adapter) if base_cost and means.has_engine else None
        merged = _merge_on_the_way(path, adapter, targets, means, measured)
        made = []
        try:
            for file in _make_each(merged, targets, means, measured):
                made.append(file)
        finally:
            if made:
                modelfile.write_modelfile(folder, made, merged)
    modelfile.say_how(made, path if kind == "model" else None, adapter)
    return made


def _read_adapter(path: Path, kind: str, base: str | None) -> Adapter | None:
    """Return the adapter of a path, None for a model; raise LoraError where it does not write."""
    adapter = read_adapter(path, base) if kind == "adapter" else None
    model = adapter.base if adapter else Base.of_model(str(path))
    preflight.refuse_other_task(path, model.task, adapter is not None)
    return adapter


def _find_folder(path: Path, kind: str) -> Path:
    """Return the folder beside the weights; the current one for an adapter on the hub."""
    if kind == "model":
        return path
    return path.parent if path.exists() else Path()


class Means(NamedTuple):
    """What the files of one export are made with: the converter, a folder for what is needed for a
    while, `--imatrix`, and whether there is an engine to open them in."""

    converter: Found
    scratch: Path
    weighted: str | None
    has_engine: bool


def _merge_on_the_way(
    path: Path,
    adapter: Adapter | None,
    targets: dict[str, Path],
    means: Means,
    measured: Base | None,
) -> Path:
    """Refuse what can be refused before weights are read; return the folder of the model to be
    converted: `path`, or one where the adapter is merged. `measured`: a base whose own cost is
    measured, which takes room on the disk."""
    config = _check_first(path, adapter, means)
    base = adapter.base if adapter else Base(str(path))
    exact = _choose_exact_type(base.dtype if adapter else base.exact_dtype)
    passing = [exact] if _needs_exact(targets, means) and exact not in targets else []
    rounded = [name for name in targets if is_rounded(name)]
    if measured is not None and rounded:
        passing += [exact, max(rounded, key=preflight.estimate_bits_per_weight)]  # the base's
    folder = next(iter(targets.values())).parent
    preflight.check_disk(folder, config, [*targets, *passing], base.dtype if adapter else None)
    if adapter is None:
        return path
    # named as what comes of it; a folder of its own, as that may be any name
    merged = means.scratch / "merged" / files.name_artefact(path)
    merge.merge_adapter(adapter, merged)
    return merged


def _classify(path: Path) -> str:
    """Return `adapter` or `model`; raise UsageError for anything else.

    OWNER/NAME may be an adapter on the hub, and NAME or a longer path is none.
    """
    asked = names.may_be_adapter_on_hub(path) or path.exists() or plain_files.has_gguf_name(path)
    kind = names.classify(str(path)) if asked else "hub"
    if kind == "hub":
        raise UsageError(
            f"{path} is not a folder here, and of the hub adapters alone are exported",
            f"lora merge ADAPTER {quote(path)} makes one; lora runs lists what was trained",
        )
    if kind not in ("adapter", "model"):
        raise UsageError(f"{path} is neither a merged model nor an adapter", "give a folder")
    return kind


def _check_quantizer(wanted: Sequence[str], weighted: str | None) -> None:
    """Raise LoraError where one of the types is the quantiser's and that is not installed,
    UsageError for an importance matrix that does not exist or is not needed."""
    if weighted is not None:
        imatrix.refuse_missing_file(weighted)
    wants_quantizer = any(name not in CONVERTER_TYPES for name in wanted)
    if weighted is not None and not wants_quantizer:
        raise UsageError(
            f"--imatrix is for the quantiser's types, not for {', '.join(wanted)}", "-q Q4_K_M"
        )
    if wants_quantizer:
        ggml.Ggml()  # loading it raises LoraError where it is not installed


def _choose_exact_type(dtype: torch.dtype) -> str:
    """Choose the converter's type that holds the model's weights exactly, for the quantiser to
    start from."""
    return EXACT[str(dtype).removeprefix("torch.")]


def _check_first(path: Path, adapter: Adapter | None, means: Means) -> PretrainedConfig:
    """Refuse what can be refused before weights are read; return the configuration of the model to
    be converted."""
    if adapter is None:
        model = Base(str(path))
        preflight.refuse_quantised(model)
        preflight.check_convertible(path, model.config, model.load_tokenizer(), means.converter)
        return model.config
    merge.refuse_unmergeable(adapter)
    config = quantised.without_quantisation(adapter.base.config)
    tokenizer = adapter.load_tokenizer()
    # an adapter with tokens of its own grows the base to them
    config.get_text_config().vocab_size = max(config.get_text_config().vocab_size, len(tokenizer))
    unmerged = means.scratch / "unmerged"
    config.save_pretrained(str(unmerged))
    save_tokenizer(tokenizer, unmerged, adapter.base.name, adapter.base.revision)
    preflight.check_convertible(unmerged, config, tokenizer, means.converter)
    return config


def _spell_type(name: str, weighted: bool) -> str:
    """Spell a type as the converter or the quantiser does; the converter's come first, since it
    writes q8_0 without a quantiser."""
    if name.lower() in CONVERTER_TYPES:
        return name.lower()
    return mixture.pick(name, weighted)


def find_newest_result() -> Path:
    """Find the merged model or adapter below the current folder that was written last. Raises
    LoraError if there is none."""
    found = [
        file
        for file in Path().rglob(provenance.ARTEFACT_RECORD)
        if not any(p.startswith(".") for p in file.parts)
    ]
    if not found:
        raise LoraError(
            "no merged model or adapter made by lora is below this folder", "lora export-gguf PATH"
        )
    newest = max(found, key=lambda file: file.stat().st_mtime).parent
    ui.say(f"the newest result here is {newest}")
    return newest


class Exact(NamedTuple):
    """The GGUF that holds the model's weights as they are, from which others are rounded and with
    which they are compared; and the importance matrix for rounding."""

    file: Path
    type: str
    matrix: Path | None


def _make_each(
    merged: Path, targets: dict[str, Path], means: Means, base: Base | None
) -> Iterator[Path]:
    """Make each file inside the scratch folder, check it, give it its final name and yield that.
    Files that were yielded stay where a later one is refused; `base` is what the model was merged
    into."""
    exact, checker = None, None
    if _needs_exact(targets, means):
        exact = _make_exact(Base(str(merged)), f"{merged.name}.gguf", means)
        checker = _make_checker(merged, exact, targets, means, base)
    for name, target in targets.items():
        made, digests = _make(name, means.scratch / target.name, exact, merged, means)
        report, figures = parity.NO_ENGINE, None
        if checker and exact:
            report = checker.check(made, name, digests, exact.file)
            figures = checker.list_figures(name)
        record = _write_record(made, _describe(name, report, figures, means), merged)
        files.move_together({made: target, record: target.with_name(f"{target.name}.json")})
        if exact and made == exact.file:
            exact = exact._replace(file=target)
        ui.say(f"  {target.name}: {target.stat().st_size / 2**20:.1f} MiB, {report}")
        yield target


def _needs_exact(types: Iterable[str], means: Means) -> bool:
    """Whether a GGUF is needed that holds the weights as they are: to be rounded from, or to be
    compared with."""
    return means.has_engine or any(name not in CONVERTER_TYPES for name in types)


def is_rounded(name: str) -> bool:
    """Whether weights of a GGUF type are rounded to blocks."""
    return name not in EXACT.values()


def _make_exact(model: Base, name: str, means: Means) -> Exact:
    """Convert the model as it is to the file `name`, and find or measure the importance matrix of
    `--imatrix`."""
    type_name = _choose_exact_type(model.exact_dtype)
    file, merged = means.scratch / "exact" / name, Path(model.name)
    convert(merged, file, type_name, means.converter)
    return Exact(file, type_name, _find_imatrix(means, merged, file))


def _make_checker(
    merged: Path, exact: Exact, targets: Iterable[str], means: Means, base: Base | None
) -> check.Checker | None:
    """Return what checks the files; None without an engine."""
    if not means.has_engine:
        return None
    checker = check.Checker(Base(str(merged)), exact.file, exact.type)
    rounded = [name for name in targets if is_rounded(name)]
    if base is not None and rounded:
        checker.measure_base(base, rounded, means.converter, means.scratch, exact.matrix)
    return checker


def _make(
    name: str, file: Path, exact: Exact | None, merged: Path, means: Means
) -> tuple[Path, dict[str, str]]:
    """Make a GGUF of type `name` as `file`, or take the exact one. Return it, and digests of the
    tensors that our quantiser made."""
    if exact and name == exact.type:
        return exact.file, {}
    if name in CONVERTER_TYPES:
        convert(merged, file, name, means.converter)
        return file, {}
    assert exact is not None, "the quantiser starts from the exact file"
    return file, quantize.quantize(exact.file, file, name, exact.matrix)


def _describe(
    name: str, report: str, figures: dict[str, Any] | None, means: Means
) -> dict[str, Any]:
    """Return what a file's record says of its type, and of how it was checked."""
    return {
        "type": name,
        "llama_cpp": VERSION,
        "imatrix": means.weighted,
        "checked": report,
        "figures": figures,
    }


def _write_record(made: Path, described: dict[str, Any], merged: Path) -> Path:
    """Write beside a file what it is, how it was checked, and the record of the model it was made
    from."""
    record = _read_record(merged)
    contents = provenance.new_record("export-gguf", **described, parent=record and record.to_data())
    file = made.with_name(f"{made.name}.json")
    files.write_json(file, contents)
    return file


def _read_record(merged: Path) -> merge.MergeRecord | None:
    """Read what a merged model was made from; None for a model made elsewhere."""
    file = merged / provenance.ARTEFACT_RECORD
    return merge.MergeRecord.read(file) if file.is_file() else None


def _find_base(merged: Path, adapter: Adapter | None) -> Base | None:
    """Find the base that a model was merged into, where it is on this machine and the converter
    reads it."""
    if adapter is None:
        record = _read_record(merged)
        name = privacy.expand_home(record.base) if record else ""
        base = Base(name) if name and (Path(name) / "config.json").is_file() else None
    else:
        base = adapter.base
    return base if base and preflight.is_convertible(base) else None


def _find_imatrix(means: Means, merged: Path, exact: Path) -> Path | None:
    """Find the importance matrix of `--imatrix`, or measure it where that names data."""
    if means.weighted is None:
        return None
    if imatrix.is_imatrix(means.weighted):
        return Path(means.weighted)
    made = exact.with_name("imatrix.gguf")
    imatrix.make_imatrix(means.weighted, merged, exact, made, means.converter)
    return made
