"""`lora export-gguf ADAPTER --adapter-only`: write a LoRA adapter as a GGUF that llama.cpp lays
over the base.

llama.cpp's converter writes the raw `lora_alpha` of the configuration, and llama.cpp multiplies
each B·A by that over the module's rank: rsLoRA and alpha_pattern would run at another strength. So
it is given B times what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from lora_cli.common import UsageError, files, provenance, quote, ui
from lora_cli.gguf import parity, preflight, tools
from lora_cli.gguf.tools import Found
from lora_cli.models import (
    Adapter,
    adapter_contents,
    attach,
    compare_logits,
    compute_logits,
    convert_to_float32,
    make_probes,
    read_adapter,
)

FOUR_BIT = (
    "trained on 4-bit weights: on a GGUF of the original base it computes something else; "
    "merge it to get what was trained"
)


def export_adapter(
    path: Path,
    types: Sequence[str],
    output: Path | None,
    base: str | None,
    llama_cpp_dir: Path | None,
) -> list[Path]:
    """Write the adapter in `path` as one GGUF per type (f32, f16, bf16, q8_0), each compared in
    llama.cpp, on its base, with base and adapter here; returns the files' paths, in `output` or
    beside `path`.

    Raises LoraError for an adapter that llama.cpp cannot hold, files in the way, and answers that
    differ; nothing is left then.
    """
    _refuse_quantizer_types(types)
    adapter = read_adapter(path, base)
    preflight.refuse_other_task(adapter, adapter.base.task, is_adapter=True)
    adapter_contents.refuse_beyond(adapter.folder)
    adapter.refuse_other_base()
    converter = tools.find_converter(llama_cpp_dir)
    folder = output or (Path() if adapter.hub_name else path.parent)
    stem, names = f"{files.name_artefact(path)}-lora", dict.fromkeys(map(str.lower, types))
    targets = {name: folder / f"{stem}-{name}.gguf" for name in names}
    files.refuse_existing(targets.values())
    ui.say(f"exporting the adapter {adapter} with the converter {converter}")
    if adapter.quantization:
        ui.warn(FOUR_BIT)
    preflight.refuse_quantised(adapter.base)
    with files.scratch_beside(folder, targets.values()) as scratch:
        scaled = scratch / "scaled"
        made = {name: scratch / file.name for name, file in targets.items()}
        base_folder = adapter.base.download()
        _write_scaled(adapter, scaled)
        for name, file in made.items():
            tools.convert(scaled, file, name, converter, base_folder)
        reports = _compare_all(adapter, base_folder, made, converter, scratch)
        for name, target in targets.items():
            _finish_file(made[name], target, name, reports[name], adapter)
    ui.say(f"to run it: llama-server -m BASE.gguf --lora {quote(next(iter(targets.values())))}")
    return list(targets.values())


def _refuse_quantizer_types(types: Sequence[str]) -> None:
    """Raise UsageError for a type that only the quantiser writes: it does not read adapters."""
    if kquants := [name for name in types if name.lower() not in tools.CONVERTER_TYPES]:
        known = ", ".join(tools.CONVERTER_TYPES)
        raise UsageError(
            f"an adapter cannot be written as {kquants[0]}",
            f"one of {known}; the base may be any type",
        )


def _finish_file(made: Path, target: Path, name: str, report: str, adapter: Adapter) -> None:
    """Move a checked file of type `name` to its place, its record beside it."""
    contents = provenance.new_record(
        "export-gguf",
        type=name,
        llama_cpp=tools.VERSION,
        checked=report,
        parent=adapter.record and adapter.record.to_data(),
    )
    record = made.with_name(f"{made.name}.json")
    files.write_json(record, contents)
    files.move_together({made: target, record: target.with_name(record.name)})
    size = target.stat().st_size / 2**20
    ui.say(f"  {target.name}: {size:.1f} MiB, base with adapter {report}")


def _write_scaled(adapter: Adapter, folder: Path) -> None:
    """Write the adapter with every B multiplied so that `lora_alpha` over the module's rank is its
    scale: by 1 for plain LoRA."""
    adapted = attach.load_adapter(adapter.base.build_zero(), adapter.folder)
    config, tensors = adapted.peft_config["default"], {}
    for path, layer in attach.find_lora_layers(adapted).items():
        factor = layer.scaling["default"] * layer.r["default"] / config.lora_alpha
        tensors[f"{path}.lora_A.weight"] = layer.lora_A["default"].weight.data
        tensors[f"{path}.lora_B.weight"] = layer.lora_B["default"].weight.data * factor
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


def _compare_all(
    adapter: Adapter, base_folder: Path, made: dict[str, Path], converter: Found, scratch: Path
) -> dict[str, str]:
    """Compare base and adapter, here and in llama.cpp, and report by type. Raises LoraError where
    one differs."""
    if not parity.find_engine():
        return dict.fromkeys(made, parity.NO_ENGINE)
    dtype = adapter.base.exact_dtype
    base = convert_to_float32(adapter.base.load_plain(dtype))
    exact = scratch / "base.gguf"
    tools.convert(base_folder, exact, tools.EXACT[str(dtype).removeprefix("torch.")], converter)
    tokenizer = adapter.load_tokenizer()
    probes = make_probes(tokenizer)
    without = compute_logits(base, probes)
    adapted = attach.load_adapter(base, adapter.folder)
    given = compute_logits(adapted, probes)
    ui.say(f"  what the adapter does to the base here: {compare_logits(without, given)}")
    reference = parity.make_reference(adapted, adapter.base.config, tokenizer, None)
    return {
        name: f"in llama.cpp: {parity.compare_gguf(exact, name, reference, adapter=file)}"
        for name, file in made.items()
    }
