"""`lora export-gguf`: a merged model, or an adapter merged on the way, as GGUF files checked in llama.cpp."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers import PretrainedConfig

from lora_cli import (
    files,
    fold,
    gguf_mixture,
    gguf_quantize,
    imatrix,
    llama_cpp,
    model,
    origin,
    parity,
    preflight,
    record,
    serving,
    tokenizing,
    ui,
    verify,
)
from lora_cli.errors import LoraError, UsageError
from lora_cli.llama_cpp import Found


def export(
    path: Path | None,
    types: Sequence[str],
    output: Path | None,
    base: str | None,
    llama_cpp_dir: Path | None,
    weighted: str | None = None,
) -> list[Path]:
    """Write one GGUF per type and compare each, in llama.cpp, with the Hugging Face model; returns their paths.

    `path` is a merged model or an adapter (`base` overrides the base it names); None takes the newest result below the
    current folder. Files are named after the folder, in `output` or beside the weights. Raises LoraError for missing
    tools and files in the way before anything is converted, and when a file's answers differ; nothing is left then.
    """
    names = list(dict.fromkeys(_type(name, weighted is not None) for name in types))
    path = path or newest_result()
    kind = record.kind(str(path))
    if kind not in ("adapter", "model"):
        raise UsageError(f"{path} is neither a merged model nor an adapter", "give a folder")
    if weighted is not None:
        imatrix.check(weighted)
    wants_quantizer = any(name not in llama_cpp.CONVERTER_TYPES for name in names)
    if weighted is not None and not wants_quantizer:
        raise UsageError(f"--imatrix is for the quantiser's types, not for {', '.join(names)}", "-q Q4_K_M")
    if wants_quantizer:
        gguf_quantize.Ggml()  # says so where there is none
    converter = llama_cpp.find_converter(llama_cpp_dir)
    folder, stem = output or (path if kind == "model" else path.parent), files.stem(path)
    targets = {name: folder / f"{stem}-{name}.gguf" for name in names}
    files.refuse_existing(targets.values())
    ui.say(f"exporting {path} with the converter {converter}")
    files.make_folder(folder)
    with tempfile.TemporaryDirectory(prefix=".lora-export-", dir=folder) as scratch:
        merged, adapter = path, record.read_adapter(path, base) if kind == "adapter" else None
        config = _check_first(path, adapter, converter, Path(scratch))
        exact = _exact(config) if wants_quantizer else None
        preflight.check_disk(folder, config, names, adapter is not None, exact)
        if adapter is not None:
            merged = Path(scratch) / stem
            fold.merge(adapter, merged)
        _convert_all(merged, targets, converter, Path(scratch), weighted)
        serving.write_modelfile(folder, list(targets.values()), merged)
    serving.say_how(list(targets.values()), path if kind == "model" else None, adapter)
    return list(targets.values())


def _exact(config: PretrainedConfig) -> str:
    """The converter's type that holds the model's weights as they are, from which the quantiser starts."""
    return llama_cpp.EXACT[str(model.checkpoint_dtype(config)).removeprefix("torch.")]


def _check_first(path: Path, adapter: record.Adapter | None, converter: Found, scratch: Path) -> PretrainedConfig:
    """What can be refused before weights are touched is; returns the configuration of the model to be converted."""
    if adapter is None:
        config = model.load_config(str(path))
        preflight.check(path, config, tokenizing.load_tokenizer(str(path)), converter)
        return config
    config, tokenizer = model.load_config(adapter.base, adapter.revision), origin.load_tokenizer(adapter)
    # an adapter with tokens of its own grows the base to them
    config.get_text_config().vocab_size = max(config.get_text_config().vocab_size, len(tokenizer))
    unmerged = scratch / "unmerged"
    config.save_pretrained(str(unmerged))
    tokenizing.save_tokenizer(tokenizer, unmerged, adapter.base, adapter.revision)
    preflight.check(unmerged, config, tokenizer, converter)
    return config


def _type(name: str, weighted: bool) -> str:
    """The converter's own types first: it writes q8_0 without a quantiser."""
    if name.lower() in llama_cpp.CONVERTER_TYPES:
        return name.lower()
    return gguf_mixture.pick(name, weighted)


def newest_result() -> Path:
    """The merged model or adapter below the current folder that was written last; LoraError if there is none."""
    found = [file for file in Path().rglob(record.ARTEFACT_RECORD) if not any(p.startswith(".") for p in file.parts)]
    if not found:
        raise LoraError("there is no merged model or adapter of ours below this folder", "lora export-gguf PATH")
    newest = max(found, key=lambda file: file.stat().st_mtime).parent
    ui.say(f"the newest result here is {newest}")
    return newest


def _convert_all(merged: Path, targets: dict[str, Path], converter: Found, scratch: Path, weighted: str | None) -> None:
    """Convert and quantise inside `scratch`; a file gets its final name once llama.cpp has answered from it rightly."""
    config = model.load_config(str(merged))
    made = {name: scratch / target.name for name, target in targets.items()}
    exact: Path | None = None
    matrix: Path | None = None
    for name, file in made.items():
        if name in llama_cpp.CONVERTER_TYPES:
            llama_cpp.convert(merged, file, name, converter)
            continue
        if exact is None:
            exact = scratch / "exact.gguf"
            llama_cpp.convert(merged, exact, _exact(config), converter)
            matrix = _imatrix(weighted, merged, exact, converter)
        gguf_quantize.quantize(exact, file, name, matrix)
    reports = _compare_all(merged, config, made)
    parent = files.read_json(merged / record.ARTEFACT_RECORD) if (merged / record.ARTEFACT_RECORD).is_file() else None
    for name, target in targets.items():
        contents = record.new(
            "export-gguf",
            type=name,
            llama_cpp=llama_cpp.VERSION,
            imatrix=weighted,
            checked=reports[name],
            parent=parent,
        )
        files.write_json(target.with_name(f"{target.name}.json"), contents)
        made[name].rename(target)
        ui.say(f"  {target.name}: {target.stat().st_size / 2**20:.1f} MiB, {reports[name]}")


def _imatrix(weighted: str | None, merged: Path, exact: Path, converter: Found) -> Path | None:
    """The importance matrix named by `--imatrix`, measured where that is data."""
    if weighted is None:
        return None
    if Path(weighted).suffix in imatrix.FILES:
        return Path(weighted)
    made = exact.with_name("imatrix.gguf")
    imatrix.make(weighted, merged, exact, made, converter)
    return made


def _compare_all(merged: Path, config: PretrainedConfig, made: dict[str, Path]) -> dict[str, str]:
    """What comparing each file with the Hugging Face model showed, by type; LoraError if one may not be handed over."""
    if not parity.engine_found():
        return dict.fromkeys(made, parity.NO_ENGINE)
    tokenizer = tokenizing.load_tokenizer(str(merged))
    probes = verify.probes(tokenizer)
    weights = origin.to_float32(model.load_base(str(merged), None, model.checkpoint_dtype(config)))
    expected = [logits[-1] for logits in verify.logits(weights, probes)]
    source = parity.Source(config, tokenizer, weights.num_parameters())
    return {
        name: parity.compare(file, probes, expected, verify.KL_LIMIT.get(name), source) for name, file in made.items()
    }
