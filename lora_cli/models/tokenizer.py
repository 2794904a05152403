"""Load a base's tokenizer, change it as the recipe says, and save it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from lora_cli.common import (
    LoraError,
    UsageError,
    files,
    find_nearest,
    quote,
    remote_code,
    ui,
)
from lora_cli.models import (
    chat_template,
    languages,
    names,
    settings,
    tokenizer_budget,
    tokenizer_faults,
)
from lora_cli.recipe import Recipe, Task

if TYPE_CHECKING:
    from lora_cli.models.base import Base
    from lora_cli.models.parent import Parent

TEMPLATES = Path(__file__).parent / "templates"


def load_recipe_tokenizer(
    recipe: Recipe, base: Base, parent: Parent | None = None
) -> tuple[PreTrainedTokenizerBase, list[int], str]:
    """Load the base's tokenizer as the recipe changes it, or that of the adapter that it trains on;
    return it, the ids of the added tokens, and its chat template in words."""
    roles = {"eos_token": recipe.training.eos_token, "pad_token": recipe.training.pad_token}
    if parent is None:
        added = {*recipe.model.add_tokens, *recipe.model.add_special_tokens}
        own_roles = {kind: token for kind, token in roles.items() if token not in added}
        tokenizer = base.load_tokenizer(**own_roles)
        new_ids = add_tokens(recipe, tokenizer)
        for kind in roles.keys() - own_roles.keys():
            setattr(tokenizer, kind, roles[kind])
        return tokenizer, new_ids, _apply_template(recipe, tokenizer)
    own = replace(parent.adapter, base=base)
    tokenizer = own.load_tokenizer(**roles)
    _refuse_new_tokens(recipe, tokenizer, str(parent))
    if not (own.has_tokenizer and tokenizer.chat_template):
        return tokenizer, [], _apply_template(recipe, tokenizer)
    if recipe.model.chat_template != "auto" or recipe.model.system_prompt:
        other = base.load_tokenizer(**roles)
        _apply_template(recipe, other)
        if other.chat_template != tokenizer.chat_template:
            key = "chat_template" if recipe.model.chat_template != "auto" else "system_prompt"
            raise UsageError(
                f"{recipe.where('model', key)} makes another chat template than the one of the "
                f"adapter {parent}",
                "leave it out, or take the template out of a copy of the adapter",
            )
    return tokenizer, [], "the adapter's own"


def _apply_template(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> str:
    """Give the tokenizer the recipe's chat template and system prompt; return them in words, none
    for a model that reads whole texts."""
    if not recipe.task_row.writes_next_tokens:
        tokenizer.chat_template = None
        _find_padding(tokenizer)
        leave_out_inputs(tokenizer, recipe.task_row)
        languages.set_languages(recipe, tokenizer)
        return ""
    template = set_chat_template(tokenizer, recipe.model.chat_template)
    if recipe.model.system_prompt:
        set_system_prompt(tokenizer, recipe.model.system_prompt)
        template += ", with the recipe's system prompt"
    return template


def leave_out_inputs(tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Let the tokenizer not make what PEFT's class for a task does not hand on to the model: a
    merged model would be given what was not trained with."""
    kept = [name for name in tokenizer.model_input_names if name not in task.lost_inputs]
    left = [name for name in tokenizer.model_input_names if name not in kept]
    if left:
        ui.say(
            f"  {', '.join(left)} are left out: PEFT's class for this task does not hand them on"
        )
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = kept


def _find_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the end token fill short rows where the tokenizer has no token for that."""
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise LoraError(
                "the tokenizer has no token that fills short rows", "--set training.pad_token=TOKEN"
            )
        tokenizer.pad_token = tokenizer.eos_token


def _refuse_new_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, parent: str) -> None:
    """Raise UsageError for tokens that the recipe adds and the adapter it trains on has no rows
    for."""
    known = tokenizer.get_vocab()
    for field in ("add_tokens", "add_special_tokens"):
        for token in getattr(recipe.model, field):
            if token not in known:
                where = recipe.where("model", field)
                raise UsageError(
                    f"{where}: the adapter {parent} has no row for {token!r}",
                    "leave it out, or train a new adapter",
                )


def load_tokenizer(
    name: str, revision: str | None = None, **roles: str | None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model on the hub or in a folder, with `eos_token` or `pad_token`
    replaced where given.

    LoraError if it is not a fast one (it must give offsets), or has no such token.
    """
    with names.explain_hub_failure(name):
        read = partial(settings.read_settings, name, revision)
        tokenizer_budget.refuse_excess(name, revision, [*map(read, settings.TOKENIZER_SETTINGS)])
        with tokenizer_faults.explain_faults(name, revision):
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=remote_code.is_allowed()
            )
            tokenizer.decode(tokenizer(tokenizer_faults.SAMPLE)["input_ids"])
    if not tokenizer.is_fast:
        raise LoraError(f"{name} has only a slow tokenizer", "convert it to tokenizer.json first")
    vocabulary = tokenizer.get_vocab()
    for kind, token in roles.items():
        if token is not None:
            if token not in vocabulary:
                guess = find_nearest(token, vocabulary)
                hint = f"did you mean {guess}?" if guess else f"leave training.{kind} out"
                raise LoraError(
                    f"training.{kind}: the tokenizer of {name} has no token {token!r}", hint
                )
            setattr(tokenizer, kind, token)
    return tokenizer


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, base: str, revision: str | None
) -> None:
    """Save the tokenizer with its template, and the base's `tokenizer.model` where there is one:
    llama.cpp's converter reads a SentencePiece vocabulary from it, and tokens beyond it from
    `added_tokens_decoder`; transformers 5 writes neither."""
    tokenizer.save_pretrained(str(folder))
    pieces = cached_file(
        base, "tokenizer.model", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if pieces is not None:
        shutil.copyfile(pieces, folder / "tokenizer.model")
        written = files.read_json(folder / "tokenizer_config.json")
        added = {
            str(number): token.__getstate__()
            for number, token in tokenizer.added_tokens_decoder.items()
        }
        files.write_json(
            folder / "tokenizer_config.json", written | {"added_tokens_decoder": added}
        )


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> str:
    """Give the tokenizer the chosen chat template (a name, a file, or `auto`) and return what was
    chosen, in words."""
    if isinstance(tokenizer.chat_template, dict):
        chosen = _choose_of_several(tokenizer, tokenizer.chat_template, choice)
        if chosen is not None:
            return chosen
    elif choice == "auto" and tokenizer.chat_template:
        return "the tokenizer's own"
    name = "alpaca" if choice == "auto" else choice
    known = {path.stem: path for path in TEMPLATES.glob("*.jinja")}
    path = known.get(name, Path(name))
    if not path.is_file():
        guess = find_nearest(name, known)
        hint = (
            f"did you mean {guess}?"
            if guess
            else f"one of {', '.join(sorted(known))}, or the path of a .jinja file"
        )
        raise LoraError(
            f"model.chat_template: there is no template {name!r} and no such file", hint
        )
    template = path.read_text(encoding="utf-8")
    if name in known and adds_bos(tokenizer):
        template = (
            "{{- bos_token -}}" + template
        )  # the rendered text is tokenised without special tokens
    tokenizer.chat_template = template
    return f"{name} (the tokenizer has none)" if choice == "auto" else name


def _choose_of_several(
    tokenizer: PreTrainedTokenizerBase, templates: dict[str, str], choice: str
) -> str | None:
    """Let conversations be rendered by one of the tokenizer's templates and return which, in words;
    None where none of them is chosen. LoraError where the choice is open."""
    listed = ", ".join(sorted(templates))
    if choice in templates:
        tokenizer.chat_template = templates[choice]
        return f"the tokenizer's own, {choice} of {listed}"
    if choice != "auto":
        return None
    if "default" not in templates:
        raise LoraError(
            f"model.chat_template: the tokenizer has {listed}, and none is called default",
            f"--set model.chat_template={quote(sorted(templates)[0])}",
        )
    tools = "; tool_use for rows with tools" if "tool_use" in templates else ""
    return f"the tokenizer's own, default of {listed}{tools}"


def set_system_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
    """Let the chat template begin conversations without a system message with `prompt`.

    LoraError where the template has no place for system messages.
    """
    message = f"{{'role': 'system', 'content': {json.dumps(prompt, ensure_ascii=False)}}}"
    opening = (
        "{%- if messages and messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{message}] + messages %}}"
        "{%- endif %}{{- '' }}"
    )
    template = tokenizer.chat_template
    given = template if isinstance(template, dict) else {"default": template}
    made = {name: opening + text for name, text in given.items()}
    for text in made.values():
        try:
            asked = [{"role": "user", "content": "x"}]
            shown = chat_template.render(tokenizer, asked, source=text)
        except TemplateError:
            shown = ""
        if prompt.strip() not in shown:
            raise LoraError(
                "model.system_prompt: the chat template has no place for system messages",
                "remove it, or --set model.chat_template=chatml",
            )
    tokenizer.chat_template = made if isinstance(template, dict) else made["default"]


def add_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Give the tokenizer the recipe's tokens and return their ids. UsageError for one that it has
    already."""
    first = len(tokenizer)
    for field, special in (("add_tokens", False), ("add_special_tokens", True)):
        known = tokenizer.get_vocab()
        for token in getattr(recipe.model, field):
            if token in known:
                where = recipe.where("model", field)
                raise UsageError(
                    f"{where}: the tokenizer has {token!r} already", "remove it from the list"
                )
            tokenizer.add_tokens(
                [AddedToken(token, special=special, normalized=False)], special_tokens=special
            )
    return list(range(first, len(tokenizer)))


IGNORED = -100
"""The label that cross entropy skips."""


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether it puts its BOS before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [
        tokenizer.bos_token_id
    ]
