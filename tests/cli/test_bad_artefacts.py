"""Bad adapters, models and options, and the one message each gets from merge, export, combine,
extract and convert.

Nothing may be left behind, whatever went wrong. Compared with bad_artefacts.txt. Hermetic: small
random models with the tiny model's tokenizer. Alone: pytest tests/cli/test_bad_artefacts.py. After
a change of a message: python -m tests.cli.test_bad_artefacts > tests/cli/bad_artefacts.txt
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedModel,
)

from lora_cli.cli import start
from lora_cli.common import files, library_errors, provenance, ui
from lora_cli.common.errors import LoraError
from lora_cli.common.shown import name_given
from lora_cli.gguf import preflight, tools
from lora_cli.gguf.adapter import export_adapter
from lora_cli.gguf.export import export
from lora_cli.merge.combine import combine, join_adapters
from lora_cli.merge.extract import convert, extract
from lora_cli.merge.merge import merge
from lora_cli.models import attach
from tests import snapshots

SNAPSHOT = Path(__file__).parent / "bad_artefacts.txt"
TINY = Path(__file__).parent.parent.parent / "build" / "tiny" / "model"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja")
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}


def base(folder: Path, name: str = "base", **changes) -> Path:
    """A random Llama with the tiny model's tokenizer."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **changes}))
    return _saved(network, folder / name)


def _saved(network: PreTrainedModel, path: Path) -> Path:
    network.save_pretrained(path)
    for file in TOKENIZER:
        shutil.copy(TINY / file, path / file)
    return path


def adapter(on: Path, name: str = "adapter", config: type = LoraConfig, **options) -> Path:
    """An adapter with B ≠ 0 on the model in `on`, beside it."""
    torch.manual_seed(0)
    if config is LoraConfig:
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"], **options}
    with attach.quiet_peft():
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(on), config(task_type="CAUSAL_LM", **options)
        )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(on.parent / name)
    return on.parent / name


def named(folder: Path, on: Path | str) -> Path:
    """The adapter, saying that its base is the model in `on`."""
    return changed(folder / "adapter_config.json", base_model_name_or_path=str(on)).parent


def changed(path: Path, **values) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path


def tensors(
    folder: Path, change: Callable[[dict], dict], name: str = "adapter_model.safetensors"
) -> Path:
    """The folder with its tensors changed."""
    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})
    return folder


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def cut(path: Path, size: int) -> Path:
    path.write_bytes(path.read_bytes()[:size])
    return path.parent


def pickled(folder: Path) -> Path:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    return without(folder, "adapter_model.safetensors")


def gpt2(folder: Path) -> Path:
    """A random GPT-2 with the tiny model's tokenizer."""
    return _saved(
        GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2)), folder / "gpt2"
    )


def gguf(folder: Path) -> Path:
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    return folder / "model.gguf"


def occupied(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("keep")
    return folder / "out"


def touched(path: Path) -> Path:
    path.write_text("keep")
    return path


def fills_up(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on_full_disk(run: Callable[[], object], where: object, name: str) -> object:
    """What `run` does when the function `name` of `where` finds the disk full."""
    whole = getattr(where, name)
    setattr(where, name, fills_up)
    try:
        return run()
    finally:
        setattr(where, name, whole)


def _merge(d: Path, given: Path, base_name: str | None = None) -> None:
    merge(given, d / "out", base_name)


def _twice(
    d: Path, *given: Path, weights: str | None = None, how: str = "cat", density=None, r=None
) -> None:
    combine(list(given), d / "out", weights, how, density, r, None)


def _export(path: Path, *types: str) -> None:
    export(path, types or ("f16",), None, None, None)


def _alone(d: Path, given: Path, *types: str) -> None:
    export_adapter(given, types or ("f16",), d / "out", None, None)


def _disk(d: Path) -> object:
    small = lambda _: type("Usage", (), {"free": 2**16})  # noqa: E731
    usage, preflight.shutil.disk_usage = preflight.shutil.disk_usage, small
    try:
        return _export(base(d))
    finally:
        preflight.shutil.disk_usage = usage


def _several(d: Path) -> None:
    with join_adapters([adapter(base(d))], d / "out", "0.5", "cat", None, None):
        pass


BAD: dict[str, Callable[[Path], object]] = {
    # lora merge
    "merge: no such folder": lambda d: _merge(d, d / "adapter"),
    "merge: a model, not an adapter": lambda d: _merge(d, base(d)),
    "merge: a GGUF": lambda d: _merge(d, gguf(d)),
    "merge: a run's folder": lambda d: _merge(d, adapter(base(d), "run/adapter").parent),
    "merge: no weights": lambda d: _merge(d, without(adapter(base(d)), "adapter_model.safetensors")),
    "merge: pickle only": lambda d: _merge(d, pickled(adapter(base(d)))),
    "merge: weights cut off": lambda d: _merge(d, cut(adapter(base(d)) / "adapter_model.safetensors", 999)),
    "merge: empty weights": lambda d: _merge(d, cut(adapter(base(d)) / "adapter_model.safetensors", 0)),
    "merge: no tensors": lambda d: _merge(d, tensors(adapter(base(d)), lambda t: {})),
    "merge: configuration is no JSON": lambda d: _merge(d, cut(adapter(base(d)) / "adapter_config.json", 50)),
    "merge: configuration is a list": lambda d: _merge(d, files.write_json(
        adapter(base(d)) / "adapter_config.json", []) or d / "adapter"),
    "merge: not LoRA": lambda d: _merge(d, adapter(
        base(d), config=IA3Config, target_modules=["k_proj"], feedforward_modules=[])),
    "merge: no base named": lambda d: _merge(d, named(adapter(base(d)), "")),
    "merge: the base is gone": lambda d: _merge(d, named(adapter(base(d)), d / "gone")),
    "merge: the base is a GGUF": lambda d: _merge(d, adapter(base(d)), str(gguf(d))),
    "merge: the base is an adapter": lambda d: _merge(d, named(adapter(base(d)), d / "adapter")),
    "merge: the base has no weights": lambda d: _merge(d, adapter(base(d)), str(without(
        base(d, "bare"), "model.safetensors"))),
    "merge: the base is cut off": lambda d: _merge(d, adapter(base(d)), str(cut(
        base(d, "short") / "model.safetensors", 9999))),
    "merge: another architecture": lambda d: _merge(d, adapter(
        gpt2(d), target_modules=["c_attn"], fan_in_fan_out=True), str(base(d))),
    "merge: a shallower base": lambda d: _merge(d, adapter(base(d)), str(base(d, "shallow", num_hidden_layers=1))),
    "merge: a deeper base": lambda d: _merge(d, adapter(base(d)), str(base(d, "deep", num_hidden_layers=3))),
    "merge: a wider base": lambda d: _merge(d, adapter(base(d)), str(base(d, "wide", hidden_size=64))),
    "merge: wrong key prefix": lambda d: _merge(d, tensors(
        adapter(base(d)), lambda t: {f"net.{key[17:]}": value for key, value in t.items()})),
    "merge: no module of that name": lambda d: _merge(d, changed(
        adapter(base(d)) / "adapter_config.json", target_modules=["query"]).parent),
    "merge: half the tensors": lambda d: _merge(d, tensors(
        adapter(base(d)), lambda t: {key: value for key, value in t.items() if "q_proj" in key})),
    "merge: another rank than it says": lambda d: _merge(d, changed(
        adapter(base(d)) / "adapter_config.json", r=4).parent),
    "merge: not a number": lambda d: _merge(d, tensors(
        adapter(base(d)), lambda t: {key: value / 0 for key, value in t.items()})),
    "merge: output is occupied": lambda d: merge(adapter(base(d)), occupied(d)),
    "merge: output is a file": lambda d: merge(adapter(base(d)), touched(d / "out")),
    "merge: output is the current folder": lambda d: merge(adapter(base(d)), Path()),
    "merge: the disk fills up": lambda d: on_full_disk(
        lambda: _merge(d, adapter(base(d))), PreTrainedModel, "save_pretrained"),
    "merge: the output is missing": lambda d: start.two_or_more([d / "adapter"], "lora merge "
                                                                                "ADAPTER OUT"),
    "merge: weights for one adapter": _several,
    # lora export-gguf
    "export: unknown type": lambda d: _export(d, "Q4_KM"),
    "export: unlike any type": lambda d: _export(d, "small"),
    "export: a type that needs an importance matrix": lambda d: _export(d, "IQ2_XS"),
    "export: the importance matrix is not there": lambda d: export(
        base(d), ["IQ2_XS"], None, None, None, str(d / "x.gguf")),
    "export: an importance matrix for nothing": lambda d: export(base(d), ["q8_0"], None, None, None, str(base(d))),
    "export: no such folder": lambda d: _export(d / "out"),
    "export: a GGUF": lambda d: _export(gguf(d)),
    "export: neither model nor adapter": lambda d: _export(occupied(d)),
    "export: the file is there": lambda d: _export(touched(base(d) / "base-f16.gguf").parent),
    "export: the tokenizer is larger": lambda d: _export(base(d, vocab_size=500)),
    "export: a tied head that is none": lambda d: _export(changed(
        base(d) / "config.json", tie_word_embeddings=True).parent),
    "export: unknown architecture": lambda d: _export(gpt2x(d)),
    "export: the disk is too small": _disk,
    "export: an adapter cut off": lambda d: _export(cut(adapter(base(d)) / "adapter_model.safetensors", 999)),
    "export: an adapter as a K-quant": lambda d: _alone(d, adapter(base(d)), "Q4_K_M"),
    "export: a model as an adapter": lambda d: _alone(d, base(d)),
    "export: DoRA as an adapter": lambda d: _alone(d, adapter(base(d), use_dora=True)),
    "export: whole modules as an adapter": lambda d: _alone(d, adapter(base(d), modules_to_save=["lm_head"])),
    "export: embeddings as an adapter": lambda d: _alone(d, adapter(base(d), target_modules=["embed_tokens"])),
    "export: no llama.cpp there": lambda d: export(base(d), ["f16"], None, None, d),
    # lora combine
    "combine: one adapter": lambda d: _twice(d, d / "adapter"),
    "combine: too few weights": lambda d: _twice(d, d, d, d, weights="1,2"),
    "combine: weights are no numbers": lambda d: _twice(d, d, d, weights="a,b"),
    "combine: misspelt": lambda d: _twice(d, d, d, how="lineal"),
    "combine: unlike any": lambda d: _twice(d, d, d, how="mean"),
    "combine: no density": lambda d: _twice(d, d, d, how="ties"),
    "combine: density for nothing": lambda d: _twice(d, d, d, how="svd", density=0.5),
    "combine: rank for nothing": lambda d: _twice(d, d, d, r=8),
    "combine: rank over a module's size": lambda d: _twice(
        d, adapter(base(d)), adapter(d / "base", "second"), how="svd", r=64
    ),
    "combine: different bases": lambda d: _twice(d, adapter(base(d)), adapter(base(d, "other"), "second")),
    "combine: different ranks": lambda d: _twice(
        d, adapter(base(d)), adapter(d / "base", "second", r=4), how="linear"),
    "combine: DoRA": lambda d: _twice(d, adapter(base(d)), adapter(d / "base", "second", use_dora=True)),
    "combine: whole modules": lambda d: _twice(
        d, adapter(base(d)), adapter(d / "base", "second", modules_to_save=["lm_head"])),
    "combine: the disk fills up": lambda d: on_full_disk(
        lambda: _twice(d, adapter(base(d)), adapter(d / "base", "second")), files, "write_json"),
    # lora extract
    "extract: another architecture": lambda d: extract(str(base(d)), str(gpt2(d)), d / "out", 4),
    "extract: another depth": lambda d: extract(str(base(d)), str(base(d, "deep", num_hidden_layers=3)), d / "out", 4),
    "extract: another width": lambda d: extract(str(base(d)), str(base(d, "wide", intermediate_size=64)), d / "out", 4),
    "extract: the same model": lambda d: extract(str(base(d)), str(d / "base"), d / "out", 4),
    "extract: only norms differ": lambda d: extract(str(base(d)), str(tensors(
        base(d, "tuned"), lambda t: {k: v * 2 if "norm" in k else v for k, v in t.items()}, "model.safetensors")),
        d / "out", 4),
    "extract: an adapter": lambda d: extract(str(base(d)), str(adapter(d / "base")), d / "out", 4),
    "extract: a GGUF": lambda d: extract(str(base(d)), str(gguf(d)), d / "out", 4),
    "extract: output is occupied": lambda d: extract(str(base(d)), str(d / "base"), occupied(d), 4),
    # lora convert
    "convert: a model": lambda d: convert(base(d), d / "out", 4, None),
    "convert: whole modules": lambda d: convert(adapter(base(d), modules_to_save=["lm_head"]), d / "out", 4, None),
    "convert: single rows": lambda d: convert(adapter(base(d), trainable_token_indices=[3]), d / "out", 4, None),
    "convert: another base": lambda d: convert(adapter(base(d)), d / "out", 4, str(base(d, "wide", hidden_size=64))),
    "convert: output is occupied": lambda d: convert(adapter(base(d)), occupied(d), 4, None),
}  # fmt: skip


def gpt2x(folder: Path) -> Path:
    """A model whose configuration names a class that the converter does not know."""
    return changed(base(folder) / "config.json", architectures=["MadeUpForCausalLM"]).parent


def said(name: str, folder: Path) -> str:
    """The error that a user gets to see, with its hint; an exception that is none goes through."""
    say, ui.say, here = ui.say, lambda *_: None, Path.cwd()
    os.chdir(folder)
    try:
        BAD[name](folder)
    except LoraError as error:
        text = name_given("\n".join(ui.list_lines(error)))
    except Exception as error:
        known = library_errors.translate(error)
        if known is None:
            raise
        text = name_given("\n".join(ui.list_lines(known)))
    else:
        text = "nothing"
    finally:
        ui.say = say
        os.chdir(here)
    home = str(tools.find_managed_home())
    return (
        text.replace("\n\n", "\n")
        .replace(f"{folder}/", "")
        .replace(str(folder), ".")
        .replace(home, "LLAMA_CPP")
    )


def test_the_snapshot_covers_every_case() -> None:
    assert len(BAD) >= 70
    assert snapshots.list_names(SNAPSHOT) == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_of_bad_input_and_that_nothing_is_left(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    assert tiny / "model" == TINY
    found = said(name, tmp_path)
    assert found == snapshots.find(SNAPSHOT, name)
    assert found.startswith("error: ")
    assert "\nhint: " in found
    assert len(found.splitlines()) <= 4
    out = tmp_path / "out"
    assert not out.exists() or out.is_file() or {path.name for path in out.iterdir()} <= {"mine"}
    made = [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")]
    assert not made
    ggufs = {path.name for path in tmp_path.rglob("*.gguf")} - {"model.gguf"}
    assert ggufs <= ({"base-f16.gguf"} if "is there" in name else set())
    assert not list(tmp_path.rglob(provenance.ARTEFACT_RECORD))


if __name__ == "__main__":
    sys.stdout.write(snapshots.render(BAD, said))
