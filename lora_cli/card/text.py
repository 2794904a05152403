"""The card of an artefact: what it is, how it was made and checked, how it is used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_cli.card.evaluations import list_evaluated
from lora_cli.card.facts import Facts
from lora_cli.card.markdown import code, fence, listed, plain, table
from lora_cli.card.metadata import list_data, list_parts
from lora_cli.card.portable import is_public_name
from lora_cli.card.usage import list_usage
from lora_cli.common import quote, quote_words, spell_count
from lora_cli.recipe import strict_yaml

HUB = "https://huggingface.co"
MOST = 8
"""Names of data that are listed."""
DISTANCES = {"max_abs": "largest |Δlogit|", "mean_kl": "mean KL", "top1": "top-1 agreement"}
"""How the screen calls what a merge measures."""


def make_text(facts: Facts) -> str:
    """Return the card's Markdown without its metadata."""
    return "\n\n".join(part for part in _list_parts(facts) if part)


def _list_parts(facts: Facts) -> Iterator[str]:
    yield f"# {plain(facts.title)}"
    yield _say_what(facts)
    yield table(["", "This model"], _list_attributes(facts))
    yield "## How to use it"
    yield from list_usage(facts)
    yield from _list_results(facts)
    yield from list_evaluated(facts.evaluations)
    yield from _list_parity(facts)
    yield from _list_repetition(facts)
    if facts.training:
        yield from _list_versions(facts)


def _say_what(facts: Facts) -> str:
    base = _link_base(facts)
    method = _name_method(facts)
    if facts.kind == "adapter":
        return f"{method} adapter for {base}, to {facts.task.does}."
    if facts.kind == "merged":
        return f"A {method} adapter merged into {base}, to {facts.task.does}."
    return f"A {method} adapter merged into {base}, as GGUF, to {facts.task.does}."


def _name_method(facts: Facts) -> str:
    names = {"lora": "LoRA", "qlora": "QLoRA", "dora": "DoRA", "qdora": "QDoRA"}
    method = facts.recipe.get("method")
    if method is None and facts.config:
        method = "dora" if facts.config.get("use_dora") else "lora"
    return names.get(str(method), "LoRA")


def _link_base(facts: Facts) -> str:
    if not facts.base:
        return "a base that is not recorded"
    if facts.source:
        return f"{code(facts.source['file'])} (a GGUF file of whoever trained it)"
    if not facts.is_on_hub:
        return f"{code(facts.base)} (a folder of whoever trained it)"
    return f"[{plain(facts.base)}]({HUB}/{facts.base})"


def _list_attributes(facts: Facts) -> Iterator[list[str]]:
    commit = f", commit {code(facts.base_commit)}" if facts.base_commit else ""
    yield ["Base", _link_base(facts) + commit]
    if source := facts.source:
        yield [
            "Base made from",
            f"{code(source['file'])}, most of it {plain(source.get('type'))}, dequantised to "
            f"{plain(source.get('dtype'))}; sha256 {code(source.get('sha256'))}",
        ]
    yield ["Task", code(facts.task.name)]
    yield ["Method", _describe_method(facts)]
    if objective := _describe_objective(facts):
        yield ["Objective", objective]
    if data := _describe_data(facts):
        yield ["Data", data]
    parameters = facts.part("parameters")
    if {"trainable", "total", "modules"} <= parameters.keys():
        trained, total = parameters["trainable"], parameters["total"]
        modules = parameters["modules"]
        yield [
            "Trained",
            f"{_count(trained)} of {spell_count(_count(total), 'parameter')}, in "
            f"{spell_count(modules, 'module')}",
        ]
    if parent := facts.part("parent"):
        yield [
            "Trained on from",
            f"{code(parent.get('name'))} (sha256 {code(parent.get('sha256'))})",
        ]
    if device := facts.part("device"):
        named = device.get("name") if device.get("kind") != "cpu" else "CPU"
        yield ["Device", plain(named or device.get("kind"))]
    for gguf in facts.ggufs:
        yield [code(gguf.name), f"{plain(gguf.type or 'GGUF')}, {gguf.size / 2**20:,.1f} MiB"]


def _describe_method(facts: Facts) -> str:
    lora = facts.recipe.get("lora") or facts.config
    lora = lora if isinstance(lora, dict) else {}
    said = [_name_method(facts)]
    for key in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        if lora.get(key) is not None:
            value = lora[key]
            shown = ", ".join(sorted(map(str, value))) if isinstance(value, list) else value
            said.append(f"{key} {code(shown)}")
    return ", ".join(said)


def _describe_objective(facts: Facts) -> str:
    """Return by which loss answers were preferred, with its numbers; empty where none were."""
    given = facts.recipe.get("preference")
    if not isinstance(given, dict):
        return ""
    numbers = [
        f"{plain(key)} {code(value)}"
        for key, value in given.items()
        if value and (given.get("loss") == "kto" or not key.endswith("desirable_weight"))
    ]
    return ", ".join([code(facts.recipe.get("objective")), *numbers])


def _describe_data(facts: Facts) -> str:
    """Return the data by its names, how much it was, and its fingerprint; no row of it."""
    found = facts.part("data")
    if not facts.training or not list_data(facts):
        return ""
    named = [
        f"[{plain(name)}]({HUB}/datasets/{name})" if is_public else code(name)
        for name, is_public in list_data(facts)
    ]
    more = [f"{_count(len(named) - MOST)} more"] if len(named) > MOST else []
    said = [", ".join([*named[:MOST], *more])]
    for key, words in (("rows", "rows"), ("tokens", "tokens"), ("trained_tokens", "with loss")):
        if isinstance(found.get(key), int):
            said.append(f"{_count(found[key])} {words}")
    if held := facts.part("holdout"):
        said.append(f"{_count(held.get('rows'))} rows held out")
    if found.get("fingerprint"):
        said.append(f"fingerprint {code(found['fingerprint'])}")
    return ", ".join(said)


def _count(number: Any) -> str:
    return f"{number:,}" if isinstance(number, int) else plain(number)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _count(value)


def _list_results(facts: Facts) -> Iterator[str]:
    """Yield how the training went."""
    results, kept = facts.part("results"), facts.part("kept")
    if not results and not kept:
        return
    rows = [[plain(key), _number(value)] for key, value in results.items() if value is not None]
    if kept:
        metric = kept.get("metric") or "eval_loss"
        rows.append([f"kept step ({plain(kept.get('which'))})", _number(kept.get("step"))])
        for key, words in (("value", "there"), ("last_value", "at the last step")):
            if kept.get(key) is not None:
                rows.append([f"{plain(metric)} {words}", _number(kept[key])])
    yield "## Training"
    yield table(["Measured", "Value"], rows)


def _list_parity(facts: Facts) -> Iterator[str]:
    """Yield how what was made was compared with what it was made from."""
    rows = []
    if into := facts.made.get("into"):
        rows.append(["the base's weights that it was merged into", plain(into)])
    if _is_checked(facts):
        rows.append(["weights that were written", plain(facts.made["checked"]["weights"])])
        for key, words in (("before_rounding", "before rounding"), ("rounded", "as written")):
            found = facts.made["checked"].get(key)
            if isinstance(found, dict):
                said = ", ".join(
                    f"{plain(DISTANCES[name])} {_number(value)}"
                    for name, value in found.items()
                    if name in DISTANCES
                )
                rows.append([f"merged against base with adapter, {words}", said])
    rows += [[code(each.name), plain(each.checked)] for each in facts.ggufs if each.checked]
    if facts.ggufs or _is_checked(facts):
        yield "## Compared with what it was made from"
        yield table(["Compared", "Found"], rows)


def _is_checked(facts: Facts) -> bool:
    checked = facts.made.get("checked")
    return isinstance(checked, dict) and bool(checked.get("weights"))


def _list_repetition(facts: Facts) -> Iterator[str]:
    """Yield the whole recipe, and the command that trains by it."""
    if not facts.recipe:
        return
    yield "## How to repeat it"
    yield (
        "Save the recipe as `recipe.yaml`, put data and base where it says if they are no names on "
        "the hub, and:"
    )
    version = facts.part("versions").get("lora-cli")
    commands = [
        "pip install " + quote_words([f"lora-cli=={version}" if version else "lora-cli"]),
        "lora train recipe.yaml",
    ]
    if facts.kind != "adapter":
        name = str(facts.recipe.get("output_dir") or "run")
        commands.append(f"lora merge {quote(f'{name}/adapter')} merged")
    yield fence("sh", "\n".join(commands))
    whole = fence("yaml", strict_yaml.dump(_pin(facts)))
    yield f"<details><summary>The recipe in full</summary>\n\n{whole}\n\n</details>"


def _pin(facts: Facts) -> dict[str, Any]:
    """Return the recipe with the commits of base and data that it was trained on."""
    recipe = facts.recipe
    model, data = recipe.get("model"), recipe.get("data")
    if isinstance(model, dict) and facts.is_on_hub and facts.base_commit:
        recipe["model"] = model | {"revision": facts.base_commit}
    if isinstance(data, dict):
        parts = [
            part if commit is None else part | {"revision": commit}
            for part, commit in list_parts(facts)
        ]
        other = data.get("eval_path")
        if isinstance(data.get("mix"), list):
            recipe["data"] = data | {"mix": parts}
        elif other == data.get("path") or not is_public_name(str(other or ".")):
            recipe["data"] = parts[0]  # the revision would be that of another data set, too
    return recipe


def _list_versions(facts: Facts) -> Iterator[str]:
    versions = facts.part("versions")
    if versions:
        said = listed(f"{name} {version}" for name, version in versions.items())
        yield f"Made by {said}; begun {plain(facts.training.get('started'))}."
