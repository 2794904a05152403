"""What can be learnt from rows: the task, by their columns and by the base, and which columns are
read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lora_cli.common import LoraError, quote_words
from lora_cli.data import formats, load, preferences, text_files, unpaired
from lora_cli.drafts.rows import Seen
from lora_cli.recipe import DEFAULT_OBJECTIVE, DEFAULT_TASK, TASKS, Recipe, Task, recognise_task

BASES = {
    "causal_lm": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "seq2seq_lm": "google/flan-t5-base",
    "image_classification": "google/vit-base-patch16-224-in21k",
}
ENCODER = "answerdotai/ModernBERT-base"
"""What is fine-tuned where nobody names a base."""
LABEL_WORDS = 4
"""Words that the texts that are labels have at most, on average."""
TWO_ANSWERS = preferences.PreferenceEncoder.column_sets
WRITTEN = {name: columns for name, columns in formats.FORMATS.items() if name != "text"}


class Kind(NamedTuple):
    """A task, and the columns that it reads where they have other names: ours, theirs."""

    task: str
    columns: dict[str, str]
    is_open: bool = False
    """Whether the same rows may be meant to teach writing."""
    compares: bool = False
    """Whether a row has two answers, of which one is better."""
    unpaired: bool = False
    """Whether a row says of its answer whether it is wanted."""


def tell_kind(rows: Sequence[Mapping[str, Any]], config: PretrainedConfig | None) -> Kind:
    """Return what the first rows of a data set are for, on a base of this configuration, or on any
    where that is open."""
    columns = formats.list_columns(rows)
    if config is not None and (only := _tell_base(config)) is not None:
        fitting = [task for task in only if _fits(task, columns, rows)]
        return Kind((fitting or only)[0], {})
    if _fits("image_classification", columns, rows):
        return Kind("image_classification", {})
    if _has_wanted_answers(columns, rows):
        return Kind(DEFAULT_TASK.name, {}, unpaired=True)
    answers = {*formats.ANSWERS, "conversations"}.issubset(columns)  # which end before the answer
    if not answers and _recognise(columns, WRITTEN, formats.COLUMN_SETS):
        return Kind(DEFAULT_TASK.name, {})
    if _recognise(columns, preferences.PreferenceEncoder.row_formats, TWO_ANSWERS):
        return Kind(DEFAULT_TASK.name, _find_prompt(columns), compares=True)
    for task in ("question_answering", "token_classification", "sequence_classification"):
        if _fits(task, columns, rows):
            return Kind(task, {}, is_open=task == "sequence_classification" and "text" in columns)
    return Kind(DEFAULT_TASK.name, _find_pair(columns) if "text" not in columns else {})


def find_default_base(task: str) -> str:
    """Return the base that is trained where nobody names one."""
    return BASES.get(task, ENCODER)


def _tell_base(config: PretrainedConfig) -> list[str] | None:
    """Return the tasks of a base, likeliest first; None of one that writes what comes next."""
    task = recognise_task(config.architectures)
    if task.has_targets or getattr(config, "is_encoder_decoder", False):
        return ["seq2seq_lm"]
    if task is not DEFAULT_TASK:
        return [task.name]
    named = config.architectures or [""]
    writes = named[0].endswith(DEFAULT_TASK.architectures)
    if writes or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return None
    return ["question_answering", "token_classification", "sequence_classification"]


def _fits(name: str, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether rows of these columns are rows of a task."""
    task: Task = next(task for task in TASKS if task.name == name)
    encoder = load.find_encoder(task)
    if not _recognise(columns, encoder.row_formats, encoder.column_sets):
        return False
    return name != "sequence_classification" or _has_labels(columns, rows)


def _recognise(columns: list[str], known: formats.Formats, sets: formats.ColumnSets) -> str | None:
    names = formats.guess_columns(columns, known, sets)
    return formats.recognise_format(formats.name_columns(columns, names), known)


def _has_labels(columns: list[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether what stands in the column of labels is short, as a class's name is."""
    encoder = load.find_encoder(next(t for t in TASKS if t.name == "sequence_classification"))
    names = formats.guess_columns(columns, encoder.row_formats, encoder.column_sets)
    found = [row.get(names.get("label", "label")) for row in rows]
    texts = [len(value.split()) for value in found if isinstance(value, str)]
    return not texts or mean(texts) <= LABEL_WORDS


def _has_wanted_answers(columns: list[str], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether rows have an answer each that is said to be wanted, or not to be, and both are
    there."""
    encoder = unpaired.UnpairedEncoder
    names = formats.guess_columns(columns, encoder.row_formats, encoder.column_sets)
    label = names.get("label", "label")
    beside = [name for name in columns if name != label]
    if label not in columns or formats.recognise_labelled(beside)[0] is None:
        return False
    return {True, False} <= {formats.read_switch(row.get(label)) for row in rows}


def _find_prompt(columns: list[str]) -> dict[str, str]:
    """Return what is answered beside two answers, where it is called otherwise than prompt."""
    if "prompt" in columns or "chosen" not in columns:
        return {}
    found = next((name for name in formats.PROMPTS if name in columns), None)
    return {"prompt": found} if found else {}


def find_better(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of the better one of a row's two answers, as an answer alone; `names` are
    those of the row's columns, where they are no preference format's own, nor guessed."""
    encoder = preferences.PreferenceEncoder
    names = names or formats.guess_columns(row, encoder.row_formats, encoder.column_sets)
    asked, better = names.get("prompt", "prompt"), names.get("chosen", "chosen")
    if asked in row:
        return {"prompt": asked, "completion": better}
    turns = row.get(better)
    first = turns[0] if isinstance(turns, list) and turns else None
    is_sharegpt = isinstance(first, Mapping) and "from" in first
    return {"conversations" if is_sharegpt else "messages": better}


def _find_pair(columns: list[str]) -> dict[str, str]:
    """Return the columns of a text and one that is made of it as a question and its answer, for a
    base that has no encoder."""
    task = next(task for task in TASKS if task.name == "seq2seq_lm")
    encoder = load.find_encoder(task)
    known = {"pairs": encoder.row_formats["pairs"]}
    sets = [names for names in encoder.column_sets if "source" in names]
    names = formats.guess_columns(columns, known, sets)
    if not formats.recognise_format(formats.name_columns(columns, names), known):
        return {}
    return {
        "prompt": names.get("source", "source"),
        "completion": names.get("target", "target"),
    }


def refuse_unwanted_answers(seen: Seen, style: str, recipe: Recipe, chosen: bool) -> None:
    """Raise LoraError where answers alone are learnt, and a row says that its answer is not wanted;
    `chosen` says whether somebody asked for that objective."""
    learns_all = recipe.objective_row is DEFAULT_OBJECTIVE and recipe.task == DEFAULT_TASK.name
    if not learns_all or style == "text" or seen.first_unwanted is None:
        return
    place, column = seen.first_unwanted
    alone = _suggest_wanted(Path(str(recipe.data.path)), column)
    kto = "--set objective=kto learns from both kinds"
    raise LoraError(
        "the rows say of each answer whether it is wanted, and all would be learnt "
        f"(objective: sft): {column} is false at {place}",
        alone if chosen else kto,
    )


READ_ROWS = {".jsonl": "map(json.loads, sys.stdin)", ".json": "json.load(sys.stdin)"}


def _suggest_wanted(file: Path, column: str) -> str:
    """Return the hint that keeps the rows whose answer is wanted, without that column."""
    plain = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    rows = READ_ROWS.get(plain.suffix.lower())
    if rows is None or not file.is_file():
        return f"keep the rows whose {column} is true, without that column, and name that file"
    wanted = f"str(row.pop('{column}', 0)).lower() == 'true'"
    code = f"[print(json.dumps(row)) for row in {rows} if {wanted}]"
    command = quote_words(["python3", "-c", f"import json, sys; {code}"])
    return text_files.suggest_edit(file, command, prefix="wanted-")
