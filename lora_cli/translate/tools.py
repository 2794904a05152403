"""The tools whose files are known: their tables by name, and a file's tool by its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lora_cli.common import LoraError, UsageError, find_nearest, quote
from lora_cli.translate import axolotl, llama_factory, trl_cli, unsloth
from lora_cli.translate.draft import Draft
from lora_cli.translate.rules import Rule
from lora_cli.translate.source import Keys, Source, read_source


class Tool(NamedTuple):
    """A tool's name, the keys that tell its files, and what each of its keys becomes."""

    name: str
    marks: tuple[str, ...]
    rules: Mapping[str, Rule]
    passes_on: Callable[[Draft, Keys, Any], bool]
    """Takes a key that no rule is about, where the tool hands it on as lora does."""
    defaults: Mapping[str, Any]
    finish: Callable[[Draft], None]
    """Says what no single key says, before the defaults are written."""
    has_sections: bool = False
    """Whether its files have sections, whose keys are known without them, too."""


TOOLS: Mapping[str, Tool] = {
    "axolotl": Tool(
        "axolotl",
        axolotl.MARKS,
        axolotl.RULES,
        axolotl.pass_on,
        axolotl.DEFAULTS,
        axolotl.finish,
    ),
    "llama-factory": Tool(
        "LLaMA-Factory",
        llama_factory.MARKS,
        llama_factory.RULES,
        llama_factory.pass_on,
        llama_factory.DEFAULTS,
        llama_factory.finish,
    ),
    "trl": Tool(
        "TRL", trl_cli.MARKS, trl_cli.RULES, trl_cli.pass_on, trl_cli.DEFAULTS, trl_cli.finish
    ),
    "unsloth": Tool(
        "Unsloth",
        unsloth.MARKS,
        unsloth.RULES,
        unsloth.pass_on,
        unsloth.DEFAULTS,
        unsloth.finish,
        has_sections=True,
    ),
}


def name_tool(name: str) -> Tool:
    """Return the tool that `--from` names."""
    if name in TOOLS:
        return TOOLS[name]
    guess = find_nearest(name, TOOLS)
    hint = f"did you mean --from {guess}?" if guess else f"the tools are {', '.join(TOOLS)}"
    raise UsageError(f"--from {name} is no tool whose files lora knows", hint)


def recognise(source: Source) -> Tool:
    """Return the tool whose keys the file has most of.

    UsageError for a file of none, and for two kinds that are easily taken for one: accelerate's
    configuration, and a recipe of lora's.
    """
    keys = _list_keys(source)
    _refuse_others(source, keys)
    has_model = isinstance(source.data.get("model"), dict) and "model_name" in keys
    if has_model or isinstance(source.data.get("training"), dict):  # no other tool has sections
        return TOOLS["unsloth"]
    found = {name: len(keys & {*tool.marks}) for name, tool in TOOLS.items()}
    name = max(found, key=lambda each: found[each])
    if not found[name]:
        raise UsageError(
            f"{source.path} has no key by which a tool is told",
            f"lora import {quote(source.path)} --from axolotl; or llama-factory, trl, unsloth",
        )
    return TOOLS[name]


def _list_keys(source: Source) -> set[str]:
    """Return a file's keys, and those of its sections."""
    keys = {*source.data}
    for section in source.data.values():
        keys |= {*section} if isinstance(section, dict) else set()
    return keys


ENOUGH = 2
"""Keys of a tool that tell its file: each of their public examples has as many, and a recipe of
lora's one at most, `max_length`."""


def refuse_other_tools(path: Path) -> None:
    """Raise UsageError naming the tool where a file that is no recipe is one of its files; else do
    nothing, as for what is no YAML."""
    try:
        source = read_source(path)
        tool = recognise(source)
    except LoraError:
        return
    is_ours = isinstance(source.data.get("model"), dict)
    if not is_ours and len(_list_keys(source) & {*tool.marks}) >= ENOUGH:
        raise UsageError(
            f"{path} is no recipe: its keys are {tool.name}'s", f"lora import {quote(path)}"
        )


def _refuse_others(source: Source, keys: set[str]) -> None:
    path: Path = source.path
    if "_component_" in keys:
        raise UsageError(
            f"{path} is torchtune's, which lora import does not know",
            f"the tools are {', '.join(TOOLS)}; lora init writes a recipe from rows and a model",
        )
    if keys & {"compute_environment", "distributed_type"}:
        raise UsageError(
            f"{path} configures accelerate: how processes are started, and no training",
            "lora train RECIPE --nproc N starts them; distributed.strategy says how they share",
        )
    if isinstance(source.data.get("model"), dict) and "name_or_path" in keys:
        raise UsageError(f"{path} is a recipe of lora already", f"lora check {quote(path)}")
    if "extends" in source.data:
        raise UsageError(f"{path} is a recipe of lora already", f"lora check {quote(path)}")
