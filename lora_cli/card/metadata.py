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
    data = facts.recipe.get("data")
    data = data if isinstance(data, dict) else {}
    mixed = data.get("mix")
    parts = mixed if isinstance(mixed, list) else [data]
    given = [part.get("path") for part in parts if isinstance(part, dict)]
    paths = [path for each in given for path in (each if isinstance(each, list) else [each])]
    on_hub = bool(facts.part("data").get("commit"))
    return [(path, on_hub and is_public_name(path)) for path in paths if isinstance(path, str)]
