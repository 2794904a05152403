"""`lora init`: rows and a base become a recipe that fits this machine, with what was found beside
each value.

Rows -> task and columns -> base and template -> lengths, bad rows -> method and batch that fit ->
steps, timed -> the file.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from lora_cli.common import LoraError, UsageError, files, find_nearest, quote, spell_count, ui
from lora_cli.data import formats, load, selection, sources
from lora_cli.drafts import bad_rows, columns, data_here, fit, kinds, lengths, schedule, templates
from lora_cli.drafts import rows as rows_of
from lora_cli.drafts.draft import Draft
from lora_cli.drafts.questions import Questions
from lora_cli.models import Base, load_recipe_reader
from lora_cli.plan import hardware, settled
from lora_cli.recipe import DEFAULT_TASK, Data, load_recipe, override_values, strict_yaml

METHODS = ("lora", "qlora", "dora", "qdora")


class Asked(NamedTuple):
    """What the command line asks for."""

    data: str | None
    model: str | None = None
    method: str | None = None
    overrides: Sequence[str] = ()
    out: Path | None = None
    asks: bool = False
    """Whether a person is asked what is open."""
    gpu: str | None = None
    """What the recipe is to fit, where that is not this machine."""
    measures: bool = True
    """Whether a step is timed."""


def write_recipe(asked: Asked) -> Path:
    """Write a recipe for rows, and return its path.

    Raises UsageError where its file is there already, LoraError for rows of which nothing can be
    learnt, and a base that is not found or does not fit this machine.
    """
    questions = Questions(asked.asks)
    _refuse_unknown_method(asked.method)
    device = hardware.parse_gpu(asked.gpu) if asked.gpu else None
    path = data_here.find_data(asked.data, questions)
    out = asked.out or Path(f"{_name_data(path)}.yaml")
    _refuse_there(out, path)
    draft = Draft(out, asked.overrides)
    draft.put("data.path", path)
    source, first = rows_of.read_first(_read_data(draft))
    base = _find_base(draft, asked, questions, first)
    draft.put("output_dir", _find_free_folder(out.stem))
    chosen = columns.settle_columns(draft, source, first, questions)
    template = templates.settle_template(draft, base, chosen)
    seen = _look(draft, source, chosen, base)
    is_asked = draft.is_given("objective")
    kinds.refuse_unwanted_answers(seen, chosen.style, draft.build(), is_asked)
    _settle_bad_rows(draft, seen, chosen, questions)
    lengths.settle_length(draft, seen, chosen.style, base)
    schedule.settle_holdout(draft, seen, path, questions)
    schedule.settle_steps(draft, seen)
    _fit(draft, asked, questions, base, device)
    ui.say(*([f"  chat template: {template}"] if template else []))
    if asked.measures and asked.gpu is None:
        schedule.time_steps(draft, questions)
    return _write(draft, path)


def _refuse_unknown_method(method: str | None) -> None:
    if method is not None and method not in METHODS:
        guess = find_nearest(method, METHODS)
        hint = f"did you mean {guess}?" if guess else f"one of {', '.join(METHODS)}"
        raise UsageError(f"--method {method} is not known", hint)


def _name_data(path: str) -> str:
    """Return what a recipe for these rows is called: the file's, the folder's, or the data set's
    name."""
    name = Path(path.rstrip("/*")).resolve().name if Path(path).is_dir() else Path(path).name
    name = re.sub(r"\.gz$", "", name, flags=re.IGNORECASE)
    plain = re.sub(r"[^\w.-]+", "-", Path(name).stem).strip("-.")
    return plain or "recipe"


def _refuse_there(out: Path, data: str) -> None:
    """Raise UsageError where the recipe's file is there, before anything is looked at."""
    if out.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--out {out}: a recipe is a .yaml file", f"--out {quote(out)}.yaml")
    if not out.parent.is_dir():
        raise UsageError(f"{out.parent} is not a folder", f"mkdir -p {quote(out.parent)}")
    if os.path.lexists(out):
        free = files.find_free(out)
        another = f"lora init {quote(data)} --out {quote(free)} writes another"
        raise UsageError(f"{out} already exists", f"lora train {quote(out)} trains it; {another}")


def _read_data(draft: Draft) -> Data:
    """Return what the draft and its overrides say of the rows."""
    document = override_values(
        strict_yaml.Document({"data": {"path": draft.read("data.path")}}, {}),
        draft.path,
        draft.overrides,
    )
    try:
        return Data.model_validate(document.data["data"])
    except ValidationError:
        draft.put("model.name_or_path", "auto")
        return draft.build().data  # which says what is wrong, and where


def _find_base(
    draft: Draft, asked: Asked, questions: Questions, first: Sequence[dict[str, Any]]
) -> Base:
    """Put the task and the base into the draft, and return the base."""
    named = draft.read("model.name_or_path") or asked.model
    kind = None
    if named is None:
        kind = kinds.tell_kind(first, None)
        usual = kinds.find_default_base(draft.read("task") or kind.task)
        asked_for = "base model: a folder, or a name on the hub"
        named = questions.ask(asked_for, usual, lambda text: _name_base(draft, text))
        if not questions.asks:
            ui.say(f"base: {named}, as no --model is given")
    draft.put("model.name_or_path", named)
    config = _read_base(draft, is_chosen=kind is not None).config
    kind = kinds.tell_kind(first, config)
    task = kind.task
    if kind.is_open and not draft.is_given("task"):
        task = questions.choose(
            "what is learnt, to tell texts apart or to write them",
            [task, DEFAULT_TASK.name],
            task,
        )
    draft.put("task", task if task != DEFAULT_TASK.name else None, "what the columns are for")
    names = kind.columns
    if kind.compares and draft.read("task") in (None, DEFAULT_TASK.name):
        is_better_alone = _settle_objective(draft, questions) == "sft"
        names = kinds.find_better(first[0], names) if is_better_alone else names
    if kind.unpaired and draft.read("task") in (None, DEFAULT_TASK.name):
        draft.put("objective", "kto", "each answer is wanted or not")
    if names and draft.read("task") in (None, kind.task):
        draft.put("data.columns", names)
    return Base.of_recipe(draft.build())


def _name_base(draft: Draft, name: str) -> str:
    """Return the name of a base; LoraError where that cannot be read."""
    draft.put("model.name_or_path", name)
    Base.of_recipe(_leave_out_the_rest(draft).build())
    return name


OF_THE_BASE = ("model.name_or_path", "model.revision", "method")
"""Keys that a base is read by."""


def _leave_out_the_rest(draft: Draft) -> Draft:
    """Return what the draft says of its base alone: what else is set may belong to a task or an
    objective that is not told yet."""
    set_ones = [each for each in draft.overrides if each.partition("=")[0] in OF_THE_BASE]
    plain = Draft(draft.path, set_ones)
    for key in ("data.path", "model.name_or_path"):
        plain.put(key, draft.read(key))
    return plain


def _settle_objective(draft: Draft, questions: Questions) -> str:
    """Put into the draft what is learnt of two answers, and return it: which is better, or the
    better one."""
    if not draft.is_given("objective"):
        asked = "what is learnt, which answer is better (dpo) or the better one alone (sft)"
        objective = questions.choose(asked, ["dpo", "sft"], "dpo")
        draft.put("objective", objective, "of two answers the better one is made likelier")
        if objective == "sft":
            draft.put("objective", None)
            return objective
    return str(draft.read("objective"))


def _read_base(draft: Draft, is_chosen: bool) -> Base:
    """Return the draft's base; LoraError where it cannot be read, with how to name another where
    that one `is_chosen` here."""
    try:
        return Base.of_recipe(_leave_out_the_rest(draft).build())
    except LoraError as error:
        if not is_chosen:
            raise
        path = draft.read("data.path")
        hint = f"lora init {quote(path)} --model FOLDER takes a base that lies here"
        raise LoraError(error.message, hint) from error


def _find_free_folder(stem: str) -> str:
    """Return the folder of the recipe's run: one where no other run lies."""
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(f"runs/{name}" for name in names if not os.path.lexists(f"runs/{name}"))


def _look(draft: Draft, source: sources.Source, chosen: columns.Chosen, base: Base) -> rows_of.Seen:
    """Return what the rows are, as the base's tokenizer and template make them, and say it."""
    lengths.put_limits(draft, base)
    with ui.hush():
        found = settled.settle_recipe(draft.build())
        reader, _, _ = load_recipe_reader(found.recipe, found.base)
        encoder = load.make_encoder(found.recipe, reader)
        seen = rows_of.look(source, found.recipe, encoder, chosen.style, chosen.names)
    _say_rows(draft.read("data.path"), seen, chosen, draft.read("objective"))
    selection.warn_of_counts(encoder, seen.counts)
    return seen


def _say_rows(path: str, seen: rows_of.Seen, chosen: columns.Chosen, objective: Any) -> None:
    """Say what was found of the rows."""
    named = ", ".join(f"{theirs} as {ours}" for ours, theirs in chosen.names.items())
    ui.say(
        f"{path}: {spell_count(format(seen.count, ','), 'row')}; "
        f"{chosen.style}{f' ({named})' if named else ''}"
    )
    if chosen.unread:
        ui.say(f"  not read: {', '.join(chosen.unread)}")
    if chosen.style == "preference":
        ui.say(f"  which of two answers is better is learnt (objective: {objective})")
    if chosen.style == "unpaired":
        ui.say(f"  what makes an answer wanted is learnt (objective: {objective})")
    if seen.first_repeated:
        place, earlier = seen.first_repeated
        ui.say(
            f"  {spell_count(format(seen.num_repeated, ','), 'row says', 'rows say')} the same as "
            "an earlier "
            f"one: {place} as {earlier}"
        )
    for kind, listed in seen.bad.items():
        ui.warn(f"rows that cannot be used: {kind}")
        ui.say(*(f"  {each}" for each in listed))


def _settle_bad_rows(
    draft: Draft, seen: rows_of.Seen, chosen: columns.Chosen, questions: Questions
) -> None:
    """Leave bad rows out, which is said; LoraError where they are not to be, or none is good."""
    draft.put("data.on_bad_row", None)
    if seen.first_bad is None or (seen.lengths and draft.is_given("data.on_bad_row")):
        return
    place, bad = seen.first_bad
    hint = bad_rows.suggest_mending(place, bad, chosen)
    rows = spell_count(format(seen.count, ","), "row")
    said = f"{seen.num_bad:,} of {rows} cannot be used; {place}: {bad.said}"
    if not seen.lengths:
        raise LoraError(said, hint)
    if seen.num_bad > seen.usable and not questions.asks:
        raise LoraError(said, f"{hint}; or {formats.SKIP} trains on the others")
    bad_ones = spell_count(format(seen.num_bad, ","), "bad row")
    if not questions.confirm(f"leave the {bad_ones} out"):
        raise LoraError("nothing was written", hint)
    draft.put("data.on_bad_row", "skip", f"{seen.num_bad:,} of {seen.count:,} cannot be used")
    are = "is" if seen.num_bad == 1 else "are"
    ui.say(f"  {bad_ones} {are} left out (data.on_bad_row: skip)")


def _fit(
    draft: Draft, asked: Asked, questions: Questions, base: Base, device: hardware.Hardware | None
) -> None:
    """Put a method and a batch that fit into the draft, and the adapter's size."""
    draft.put("lora.r", 16, "the rank: more of it learns more, for more memory")
    draft.put("lora.lora_alpha", 32, "the update is scaled by lora_alpha / r")
    found = fit.fit(draft, fit.list_methods(draft, asked.method, base), device)
    if questions.asks and asked.method is None and not draft.is_given("method"):
        usual = draft.read("method")
        method = questions.choose("method", METHODS, usual)
        found = found if method == usual else fit.fit(draft, [method], device)
    recipe = found.found.recipe
    schedule.settle_rate(draft, recipe, found.total)
    draft.put("method", draft.read("method"), found.describe())
    share = f", {found.trained:,} of {found.total:,} parameters trained" if found.total else ""
    ui.say(f"{base.describe()}: {draft.read('method')}{share}", f"  {found.describe()}")
    if recipe.training.gradient_checkpointing:
        ui.say("  with gradient checkpointing, which takes longer")


def _write(draft: Draft, data: str) -> Path:
    """Write the file, and return its path."""
    out, base = draft.path, draft.read("model.name_or_path")
    head = [
        f"{Path(data).name} on {base}, drafted {date.today()} by lora init.",
        f"  lora train {quote(out)}",
    ]
    built = draft.build()
    files.write_new(
        out, draft.render(head), f"--out {quote(files.find_free(out))} takes another name"
    )
    assert load_recipe(out).to_data() == built.to_data(), "what is read is what was drafted"
    ui.say(f"wrote {out}")
    return out
