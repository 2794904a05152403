"""`lora export-gguf`: write a merged model, or an adapter merged on the way, as GGUF files checked
in llama.cpp."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lora_cli.common import LoraError, UsageError, files, provenance, ui
from lora_cli.gguf import imatrix, mixture, modelfile, parity, preflight, quantize
from lora_cli.gguf.tools import CONVERTER_TYPES, EXACT, VERSION, Found, convert, find_converter
from lora_cli.merge import merge
from lora_cli.models import (
    KL_LIMIT,
    Adapter,
    Base,
    compute_logits,
    convert_to_float32,
    make_probes,
    names,
    read_adapter,
    save_tokenizer,
)


def export(
    path: Path | None,
    types: Sequence[str],
    output: Path | None,
    base: str | None,
    llama_cpp_dir: Path | None,
    weighted: str | None = None,
) -> list[Path]:
    """Write one GGUF per type and compare each, in llama.cpp, with the Hugging Face model; returns
    their paths.

    `path` is a merged model or an adapter (`base` overrides the base it names); None takes the
    newest result below the current folder. Files are named after the folder, in `output` or beside
    the weights. Raises LoraError for missing tools and files in the way before anything is
    converted, and when a file's answers differ; nothing is left then.
    """
    wanted = list(dict.fromkeys(_spell_type(name, weighted is not None) for name in types))
    path = path or find_newest_result()
    kind = _classify(path)
    wants_quantizer = _check_quantizer(wanted, weighted)
    converter = find_converter(llama_cpp_dir)
    beside = path if kind == "model" else path.parent if path.exists() else Path()
    folder, stem = output or beside, files.name_artefact(path)
    targets = {name: folder / f"{stem}-{name}.gguf" for name in wanted}
    files.refuse_existing(targets.values())
    ui.say(f"exporting {path} with the converter {converter}")
    with files.scratch_beside_results(".lora-export-", folder) as scratch:
        merged, adapter = path, read_adapter(path, base) if kind == "adapter" else None
        config = _check_first(path, adapter, converter, scratch)
        model = adapter.base if adapter else Base(str(path))
        exact = _choose_exact_type(model.dtype) if wants_quantizer else None
        preflight.check_disk(folder, config, wanted, adapter.base.dtype if adapter else None, exact)
        if adapter is not None:
            merged = scratch / stem
            merge.merge_adapter(adapter, merged)
        _convert_all(merged, targets, converter, scratch, weighted)
        modelfile.write_modelfile(folder, list(targets.values()), merged)
    modelfile.say_how(list(targets.values()), path if kind == "model" else None, adapter)
    return list(targets.values())


def _classify(path: Path) -> str:
    """Return `adapter` or `model`; raise UsageError for anything else."""
    kind = names.classify(str(path))
    if kind not in ("adapter", "model"):
        raise UsageError(f"{path} is neither a merged model nor an adapter", "give a folder")
    return kind


def _check_quantizer(wanted: Sequence[str], weighted: str | None) -> bool:
    """Return whether one of the types is the quantiser's. Raise LoraError where it is not
    installed, UsageError for an importance matrix that does not exist or is not needed."""
    if weighted is not None:
        imatrix.refuse_missing_file(weighted)
    wants_quantizer = any(name not in CONVERTER_TYPES for name in wanted)
    if weighted is not None and not wants_quantizer:
        raise UsageError(
            f"--imatrix is for the quantiser's types, not for {', '.join(wanted)}", "-q Q4_K_M"
        )
    if wants_quantizer:
        quantize.Ggml()  # loading it raises LoraError where it is not installed
    return wants_quantizer


def _choose_exact_type(dtype: torch.dtype) -> str:
    """Choose the converter's type that holds the model's weights exactly, for the quantiser to
    start from."""
    return EXACT[str(dtype).removeprefix("torch.")]


def _check_first(
    path: Path, adapter: Adapter | None, converter: Found, scratch: Path
) -> PretrainedConfig:
    """Refuse what can be refused before weights are read; return the configuration of the model to
    be converted."""
    if adapter is None:
        model = Base(str(path))
        preflight.check_convertible(path, model.config, model.load_tokenizer(), converter)
        return model.config
    config, tokenizer = copy.deepcopy(adapter.base.config), adapter.load_tokenizer()
    # an adapter with tokens of its own grows the base to them
    config.get_text_config().vocab_size = max(config.get_text_config().vocab_size, len(tokenizer))
    unmerged = scratch / "unmerged"
    config.save_pretrained(str(unmerged))
    save_tokenizer(tokenizer, unmerged, adapter.base.name, adapter.base.revision)
    preflight.check_convertible(unmerged, config, tokenizer, converter)
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


def _convert_all(
    merged: Path, targets: dict[str, Path], converter: Found, scratch: Path, weighted: str | None
) -> None:
    """Convert and quantise inside `scratch`; a file gets its final name once llama.cpp has answered
    from it rightly."""
    model = Base(str(merged))
    made = {name: scratch / target.name for name, target in targets.items()}
    exact: Path | None = None
    matrix: Path | None = None
    for name, file in made.items():
        if name in CONVERTER_TYPES:
            convert(merged, file, name, converter)
            continue
        if exact is None:
            exact = scratch / "exact.gguf"
            convert(merged, exact, _choose_exact_type(model.dtype), converter)
            matrix = _find_imatrix(weighted, merged, exact, converter)
        quantize.quantize(exact, file, name, matrix)
    reports = _compare_all(model, made)
    parent = (
        files.read_json(merged / provenance.ARTEFACT_RECORD)
        if (merged / provenance.ARTEFACT_RECORD).is_file()
        else None
    )
    for name, target in targets.items():
        contents = provenance.new_record(
            "export-gguf",
            type=name,
            llama_cpp=VERSION,
            imatrix=weighted,
            checked=reports[name],
            parent=parent,
        )
        files.write_json(target.with_name(f"{target.name}.json"), contents)
        made[name].rename(target)
        ui.say(f"  {target.name}: {target.stat().st_size / 2**20:.1f} MiB, {reports[name]}")


def _find_imatrix(weighted: str | None, merged: Path, exact: Path, converter: Found) -> Path | None:
    """Find the importance matrix of `--imatrix`, or measure it where that names data."""
    if weighted is None:
        return None
    if Path(weighted).suffix in imatrix.FILES:
        return Path(weighted)
    made = exact.with_name("imatrix.gguf")
    imatrix.make_imatrix(weighted, merged, exact, made, converter)
    return made


def _compare_all(model: Base, made: dict[str, Path]) -> dict[str, str]:
    """Compare each file with the Hugging Face model and report by type. Raises LoraError if one may
    not be handed over."""
    if not parity.find_engine():
        return dict.fromkeys(made, parity.NO_ENGINE)
    tokenizer = model.load_tokenizer()
    probes = make_probes(tokenizer)
    weights = convert_to_float32(model.load())
    expected = [logits[-1] for logits in compute_logits(weights, probes)]
    source = parity.Source(model.config, tokenizer, weights.num_parameters())
    return {
        name: parity.compare_gguf(file, probes, expected, KL_LIMIT.get(name), source)
        for name, file in made.items()
    }
