"""`lora export-gguf`: a merged model, or an adapter merged on the way, as GGUF files checked in llama.cpp."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lora_cli import files, fold, llama_cpp, model, record, ui, verify
from lora_cli.errors import LoraError, UsageError
from lora_cli.gguf import GGUFModel
from lora_cli.llama_cpp import Found

# The converter's type that holds a model's weights exactly, from which the quantiser starts.
EXACT = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


class Tools(NamedTuple):
    """llama.cpp's converter, and its quantiser where a wanted type needs it."""

    converter: Found
    quantizer: Found | None


def export(
    path: Path | None, types: Sequence[str], output: Path | None, base: str | None, llama_cpp_dir: Path | None
) -> list[Path]:
    """Write one GGUF per type and compare each, in llama.cpp, with the Hugging Face model; returns their paths.

    `path` is a merged model or an adapter (`base` overrides the base it names); None takes the newest result below the
    current folder. Files are named after the folder, in `output` or beside the weights. Raises LoraError for missing
    tools and files in the way before anything is converted, and when a file's answers differ; nothing is left then.
    """
    names = list(dict.fromkeys(_type(name) for name in types))
    path = path or newest_result()
    kind = record.kind(str(path))
    if kind not in ("adapter", "model"):
        raise UsageError(f"{path} is neither a merged model nor an adapter", "give a folder")
    wants_quantizer = any(name not in llama_cpp.CONVERTER_TYPES for name in names)
    quantizer = llama_cpp.find_quantizer(llama_cpp_dir) if wants_quantizer else None
    tools = Tools(llama_cpp.find_converter(llama_cpp_dir), quantizer)
    folder = output or (path if kind == "model" else path.parent)
    stem = path.resolve().name if path.resolve().name not in ("adapter", "merged") else path.resolve().parent.name
    targets = {name: folder / f"{stem}-{name}.gguf" for name in names}
    for target in targets.values():
        if target.exists():
            raise LoraError(f"{target} already exists", f"rm {target}")
    ui.say(f"exporting {path} with the converter {tools.converter}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lora-export-", dir=folder) as scratch:
        merged = path
        if kind == "adapter":
            merged = Path(scratch) / stem
            fold.merge(record.read_adapter(path, base), merged)
        _convert_all(merged, targets, tools, Path(scratch))
    return list(targets.values())


def _type(name: str) -> str:
    """The converter's own types first: it writes q8_0 without a quantiser."""
    if name.lower() in llama_cpp.CONVERTER_TYPES:
        return name.lower()
    return llama_cpp.quantizer_type(name)


def newest_result() -> Path:
    """The merged model or adapter below the current folder that was written last; LoraError if there is none."""
    found = [file for file in Path().rglob(record.ARTEFACT_RECORD) if not any(p.startswith(".") for p in file.parts)]
    if not found:
        raise LoraError("there is no merged model or adapter of ours below this folder", "lora export-gguf PATH")
    newest = max(found, key=lambda file: file.stat().st_mtime).parent
    ui.say(f"the newest result here is {newest}")
    return newest


def _convert_all(merged: Path, targets: dict[str, Path], tools: Tools, scratch: Path) -> None:
    """Convert and quantise inside `scratch`; a file gets its final name once llama.cpp has answered from it rightly."""
    dtype = model.checkpoint_dtype(model.load_config(str(merged)))
    made = {name: scratch / target.name for name, target in targets.items()}
    exact: Path | None = None
    for name, file in made.items():
        if name in llama_cpp.CONVERTER_TYPES:
            llama_cpp.convert(merged, file, name, tools.converter)
            continue
        assert tools.quantizer is not None, "export looked for it"
        if exact is None:
            exact = scratch / "exact.gguf"
            llama_cpp.convert(merged, exact, EXACT[dtype], tools.converter)
        llama_cpp.quantize(exact, file, name, tools.quantizer)
    reports = _compare_all(merged, dtype, made)
    parent = files.read_json(merged / record.ARTEFACT_RECORD) if (merged / record.ARTEFACT_RECORD).is_file() else None
    for name, target in targets.items():
        contents = record.new(
            "export-gguf", type=name, llama_cpp=llama_cpp.VERSION, checked=reports[name], parent=parent
        )
        files.write_json(target.with_name(f"{target.name}.json"), contents)
        made[name].rename(target)
        ui.say(f"  {target.name}: {target.stat().st_size / 2**20:.1f} MiB, {reports[name]}")


def _compare_all(merged: Path, dtype: torch.dtype, made: dict[str, Path]) -> dict[str, str]:
    """What comparing each file with the Hugging Face model showed, by type; LoraError if one may not be handed over."""
    if importlib.util.find_spec("xllamacpp") is None:
        ui.warn("not compared with the Hugging Face model: no llama.cpp engine here (pip install 'lora-cli[gguf]')")
        return dict.fromkeys(made, "not compared: no llama.cpp engine")
    probes = verify.probes(model.load_tokenizer(str(merged)))
    weights = fold.to_float32(model.load_base(str(merged), None, dtype))
    expected = [logits[-1] for logits in verify.logits(weights, probes)]
    return {name: compare(file, probes, expected, verify.KL_LIMIT.get(name)) for name, file in made.items()}


def compare(
    gguf: Path, probes: Sequence[verify.Probe], expected: Sequence[torch.Tensor], kl_limit: float | None
) -> str:
    """llama.cpp's token ids and next-token distributions on the probes against the Hugging Face model's, in words.

    `expected` holds the logits after each probe's last token. Raises LoraError when ids differ, or the mean KL is over
    `kl_limit` (None: reported only).
    """
    with GGUFModel(gguf, exact=True) as engine:
        for probe in probes:
            if engine.tokenize(probe.text, add_special=probe.plain) != probe.ids:
                raise LoraError(f"{gguf.name}: llama.cpp splits {probe.text!r} into other tokens", "report it")
        given = torch.tensor([engine.logprobs(probe.ids) for probe in probes], dtype=torch.float64)
    wanted = torch.stack(list(expected)).double().log_softmax(-1)
    if given.shape != wanted.shape:
        raise LoraError(f"{gguf.name} has {given.shape[-1]} tokens, the model {wanted.shape[-1]}", "report this model")
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
    agree = int((wanted.argmax(-1) == given.argmax(-1)).sum())
    report = f"in llama.cpp: mean KL {max(kl, 0.0):.1e}, top-1 agrees on {agree} of {len(probes)} probes"
    if kl_limit is not None and not kl <= kl_limit:
        raise LoraError(
            f"{gguf.name} differs from the model it was made from: {report} (limit {kl_limit:.0e})", "report it"
        )
    return report
