"""The metadata of a card, as the hub reads it: YAML between two lines of dashes."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from lora_cli.card.facts import Facts
from lora_cli.card.portable import is_public_name

LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}
RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
"""What the hub calls the way from the base to it; `merge` is its word for several models in one."""
PIPELINES = {
    "causal_lm": "text-generation",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "question_answering": "question-answering",
    "image_classification": "image-classification",
}
"""The hub's name of what a model does; it has none for writing from a text."""


def make_metadata(facts: Facts) -> dict[str, Any]:
    """Return what the hub is to know: library, base and how it relates to it, task, license, data
    on the hub, tags. What is not known is left out."""
    data: dict[str, Any] = {"library_name": LIBRARIES[facts.kind], **facts.license}
    if facts.base and facts.is_on_hub:
        data |= {"base_model": facts.base, "base_model_relation": RELATIONS[facts.kind]}
    if facts.task.name in PIPELINES:
        data["pipeline_tag"] = PIPELINES[facts.task.name]
    if sets := [name for name, is_public in list_data(facts) if is_public]:
        data["datasets"] = list(dict.fromkeys(sets))
    data["tags"] = _list_tags(facts)
    return dict(ModelCardData(**data).to_dict())


def _list_tags(facts: Facts) -> list[str]:
    method = facts.recipe.get("method")
    found = [str(method)] if method else (["lora"] if facts.kind == "adapter" else [])
    found += ["gguf"] if facts.ggufs else []
    return [*dict.fromkeys(found), "lora-cli"]


def list_data(facts: Facts) -> list[tuple[str, bool]]:
    """Return the names of the data that was trained on, each with whether it is a data set on the
    hub."""
    found = []
    for part, commit in list_parts(facts):
        path = part.get("path")
        paths = path if isinstance(path, list) else [path]
        found += [(each, commit is not None) for each in paths if isinstance(each, str)]
    return found


def list_parts(facts: Facts) -> list[tuple[dict[str, Any], str | None]]:
    """Return each data set of the recipe with its commit on the hub; None for what is not there,
    or where it cannot be told.

    A record has the commits in order, without saying whose they are; and what was a folder is
    called by its last name there.
    """
    data, said = facts.recipe.get("data"), facts.part("data").get("commit")
    data = data if isinstance(data, dict) else {}
    mixed = data.get("mix")
    given = mixed if isinstance(mixed, list) else [data]
    parts = [part for part in given if isinstance(part, dict)]
    commits = said.split(", ") if isinstance(said, str) else []
    for with_owner in (False, True):
        there = [_is_set(part.get("path"), with_owner) for part in parts]
        if sum(there) == len(commits):
            left = iter(commits)
            return [(part, next(left) if each else None) for part, each in zip(parts, there)]
    return [(part, None) for part in parts]


def _is_set(path: Any, with_owner: bool) -> bool:
    """Return whether a path may be the name of a data set, of an OWNER where that is asked for."""
    return isinstance(path, str) and is_public_name(path) and ("/" in path or not with_owner)
