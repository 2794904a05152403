"""`lora serve --print`: the commands that start another engine with what was trained, and what that
engine will not load.

What each takes is told by its own files: vLLM's vllm/lora/peft_helper.py and vllm/config/lora.py,
SGLang's python/sglang/srt/lora/lora.py and its page on LoRA serving, Ollama's docs/modelfile.mdx,
llama.cpp's convert_lora_to_gguf.py. docs/how-to/serve.md says where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import UsageError, files, name_in_ollama, quote, quote_words, ui
from lora_cli.evaluate import open_answerers
from lora_cli.gguf import modelfile
from lora_cli.models import Adapter, Base, adapter_contents, names, read_adapter
from lora_cli.serve.adapters import name_model, name_served, refuse_other_bases

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""
TITLES = {"vllm": "vLLM", "sglang": "SGLang", "ollama": "Ollama", "llama.cpp": "llama.cpp"}


class Laid(NamedTuple):
    """An adapter under its name, and why an engine does not lay it over its base as it is."""

    name: str
    adapter: Adapter
    reasons: list[str]


def show(path: str, adapters: Sequence[str], base: str | None, engine: str) -> None:
    """Print the commands to stdout, a line each, and to stderr what they leave out. Raises
    LoraError where the engine has no way to serve it."""
    kind, given = names.classify(path), name_served(path, adapters, base)
    if kind == "gguf":
        ui.report(*_serve_gguf(Path(path), engine))
        return
    on = base if kind == "adapter" else path
    read = {name: read_adapter(Path(each), on) for name, each in given.items()}
    if kind == "adapter":
        refuse_other_bases({name: adapter.base for name, adapter in read.items()})
        on = base or str(read[name_model(path)].base)
    assert on is not None, "PATH, or the base of an adapter"
    open_answerers.refuse_other_task(path, Base.of_model(on).task)
    laid = [_judge(name, adapter, engine) for name, adapter in read.items()]
    for each in laid:
        for reason in each.reasons:
            ui.warn(f"{TITLES[engine]} does not lay {each.name} over its base: {reason}")
    ui.report(*_list_commands(on, laid, engine))


def _serve_gguf(path: Path, engine: str) -> list[str]:
    """Return the commands for a GGUF file."""
    if engine == "llama.cpp":
        return [f"llama-server -m {quote(path)}"]
    if engine == "ollama":
        return _create_ollama(path)
    raise UsageError(
        f"{TITLES[engine]} is not for GGUF files: it reads some, by ways that are on trial",
        "serve the merged folder that it was made from, or --print llama.cpp",
    )


def _create_ollama(path: Path) -> list[str]:
    """Return how Ollama gets a GGUF file: by the Modelfile beside it, or by one of a line, where
    there is none or it is of another file."""
    file, made = path.with_name("Modelfile"), []
    if not (file.is_file() and modelfile.reads_from(file, path)):
        file = path.with_name(f"{path.stem}.Modelfile") if file.exists() else file
        made = [f"echo FROM ./{quote(path.name)} > {quote(file)}"]
    name = name_in_ollama(path.stem)
    return [*made, f"ollama create {quote(name)} -f {quote(file)}", f"ollama run {quote(name)}"]


def _judge(name: str, adapter: Adapter, engine: str) -> Laid:
    """Return an adapter with the reasons why an engine does not take it as it is."""
    config = files.read_json(adapter.folder / "adapter_config.json")
    reasons = adapter_contents.list_beyond(adapter.folder)
    if engine in ("vllm", "sglang"):
        reasons = [*reasons, *_list_scalings(config, engine)]
    widest = _find_rank(config)
    if engine == "vllm" and widest > VLLM_RANKS[-1]:
        reasons.append(f"its rank is {widest}, and {VLLM_RANKS[-1]} the most")
    if adapter.quantization:
        reasons.append("it was trained on 4-bit weights, and would lie on others")
    return Laid(name, adapter, reasons)


def _list_scalings(config: Mapping[str, Any], engine: str) -> list[str]:
    """Return what is in a configuration that an engine, which scales by lora_alpha/r, does not
    read."""
    unread = ["rank_pattern", "alpha_pattern"] + ["use_rslora"] * (engine == "sglang")
    there = [name for name in unread if config.get(name)]
    return [f"it scales all modules by lora_alpha/r, not by {name}" for name in there]


def _find_rank(config: Mapping[str, Any]) -> int:
    return max(config.get("r", 8), *(config.get("rank_pattern") or {}).values(), 1)


def _list_commands(base: str, laid: Sequence[Laid], engine: str) -> list[str]:
    """Return the commands for a model, and for adapters on it: together where the engine takes
    them, merged where not."""
    if not laid:
        return _serve_folder(base, name_model(base), engine)
    good = [each for each in laid if not each.reasons]
    together = _lay_over(base, good, engine) if good and engine in ("vllm", "sglang") else []
    left = [each for each in laid if each not in good] if together else laid
    for each in left:
        merged = f"{each.name}-merged"
        made = [f"lora merge {quote(each.adapter)} {quote(merged)}"]
        together += made + _serve_folder(merged, each.name, engine)
    return together


def _serve_folder(path: str, name: str, engine: str) -> list[str]:
    """Return the commands for a model's folder."""
    if engine == "vllm":
        return [f"vllm serve {quote(path)} --served-model-name {quote(name)}"]
    if engine == "sglang":
        named = f"--model-path {quote(path)} --served-model-name {quote(name)}"
        return [f"python -m sglang.launch_server {named}"]
    folder = f"{name}-gguf"
    stem = files.name_artefact(Path(path))
    file = Path(folder) / f"{stem}-q8_0.gguf"
    made = f"lora export-gguf {quote(path)} --quantize q8_0 --output {quote(folder)}"
    if engine == "llama.cpp":
        return [made, f"llama-server -m {quote(file)}"]
    called = name_in_ollama(name)
    written = Path(folder) / "Modelfile"  # by export-gguf
    return [
        made,
        f"ollama create {quote(called)} -f {quote(written)}",
        f"ollama run {quote(called)}",
    ]


def _lay_over(base: str, laid: Sequence[Laid], engine: str) -> list[str]:
    """Return the command that lays adapters over one base."""
    paths = [f"{each.name}={each.adapter}" for each in laid]
    configs = [files.read_json(each.adapter.folder / "adapter_config.json") for each in laid]
    widest = max(map(_find_rank, configs))
    if engine == "vllm":
        rank = next(each for each in VLLM_RANKS if each >= max(widest, 8))
        more = f"--enable-lora --max-lora-rank {rank} --max-loras {len(laid)}"
        return [f"vllm serve {quote(base)} --lora-modules {quote_words(paths)} " + more]
    more = f"--enable-lora --max-lora-rank {widest} --lora-paths {quote_words(paths)}"
    return [f"python -m sglang.launch_server --model-path {quote(base)} {more}"]
