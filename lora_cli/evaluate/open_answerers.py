"""Open what answers for a path: a base, an adapter, a merged model or a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lora_cli.common import LoraError, quote, ui
from lora_cli.evaluate.answerers import Answerer
from lora_cli.evaluate.gguf_answerer import GGUFAnswerer
from lora_cli.evaluate.hf_answerers import HFAnswerer, PairAnswerer
from lora_cli.evaluate.loaded_bases import Bases
from lora_cli.models import (
    Adapter,
    Base,
    chat_template,
    load_tokenizer,
    names,
    read_adapter,
    read_merged_recipe,
)
from lora_cli.recipe import Task


def open_models(paths: Sequence[str], base: str | None = None) -> dict[str, Answerer]:
    """Open what answers for each path, by a short label. Adapters come first, so that a base among
    the paths shares theirs."""
    bases = Bases()
    kinds = {path: names.classify(path) for path in paths}
    answerers: dict[str, Answerer] = {}
    for path in sorted(kinds, key=lambda path: kinds[path] != "adapter"):
        if kinds[path] == "gguf":
            answerers[path] = GGUFAnswerer(Path(path))
        elif kinds[path] == "adapter":
            answerers[path] = open_adapter(read_adapter(Path(path), base), bases, len(answerers))
        else:
            answerers[path] = _open_model(path, bases, answerers.values())
    return {path: answerers[path] for path in paths}


def open_adapter(adapter: Adapter, bases: Bases, number: int) -> HFAnswerer:
    """Open the adapter that is the so many-th that answers."""
    refuse_other_task(str(adapter), adapter.base.task)
    name = f"adapter_{number}"
    key, tokenizer = bases.with_adapter(adapter, name), adapter.load_tokenizer()
    if not adapter.base.task.has_targets:
        return HFAnswerer(bases, key, name, tokenizer, adapter.stop_token_ids)
    made = PairAnswerer(bases, key, name, tokenizer)
    made.prefix = adapter.recipe.source_prefix
    return made


def _open_model(path: str, bases: Bases, others: Iterable[Answerer]) -> HFAnswerer:
    """Open a base or a merged model. A base reads what the adapters on it do."""
    task = Base.of_model(path).task
    refuse_other_task(path, task)
    if not task.has_targets:
        return open_base(path, bases, others)
    made = PairAnswerer(bases, bases.plain(path), None, load_tokenizer(path))
    made.prefix = read_merged_recipe(Path(path)).source_prefix
    for other in others:
        if isinstance(other, PairAnswerer) and other.key.base.name == path:
            made.tokenizer, made.prefix = other.tokenizer, other.prefix
    return made


def open_base(path: str, bases: Bases, others: Iterable[Answerer]) -> HFAnswerer:
    """Open a causal model without an adapter, on the weights of adapters where they are its own."""
    tokenizer = _load_base_tokenizer(path, others)
    return HFAnswerer(bases, bases.plain(path), None, tokenizer)


def refuse_other_task(path: str, task: Task) -> None:
    """Raise LoraError for a model that writes no text."""
    if not task.writes_text:
        raise LoraError(
            f"{path} is for models that {task.does}, and writes no text",
            f"lora predict {quote(path)} --data FILE",
        )


def _load_base_tokenizer(name: str, others: Iterable[Answerer]) -> PreTrainedTokenizerBase:
    """Load the base's own tokenizer, with the template of an adapter on it where it has none, so
    that prompts compare."""
    tokenizer = load_tokenizer(name)
    if chat_template.find_template(tokenizer) is not None:
        return tokenizer
    for other in others:
        if isinstance(other, HFAnswerer) and other.key.base.name == name:
            tokenizer.chat_template = other.tokenizer.chat_template
            ui.say(f"{name} has no chat template: it gets that of the adapter on it")
            return tokenizer
    what = "no chat template"
    if tokenizer.chat_template is not None:
        what = f"the chat templates {', '.join(sorted(tokenizer.chat_template))} and no default"
    ui.say(f"{name} has {what}: prompts are given as plain text")
    return tokenizer
