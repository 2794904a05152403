"""Rows as token ids and labels, the same for both trainers: load, recognise the format, render, mask, count.

Every row becomes a conversation (or plain text), is rendered by the chat template that is saved with the adapter, and
tokenised as one text, so the ids trained on are those that inference feeds. Labels are -100 outside what is trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import resolve_revision
from transformers import PreTrainedTokenizerBase

from lora_cli import foreign, ui
from lora_cli.errors import LoraError, nearest
from lora_cli.recipe import Data, Recipe

IGNORED = -100  # the label that cross entropy skips
READERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# The columns each format needs, most specific first; alpaca's `input` may be missing or empty.
FORMATS = {
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
ROLES = ("system", "user", "assistant")
Message = dict[str, str]


class Prepared(NamedTuple):
    """Rows with `input_ids` and `labels`, and what became of the rows read."""

    rows: Dataset
    read: int
    tokens: int
    trained_tokens: int
    counts: Counter[str]
    fingerprint: str
    commit: str | None

    def summary(self) -> str:
        """`571 of 1000 rows, 229563 tokens, 39% with loss (429 dropped: over 512 tokens)`."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        left_out = ", ".join(f"{count} {reason}" for reason, count in self.counts.items() if count)
        text = f"{len(self.rows)} of {self.read} rows, {self.tokens} tokens, {share:.0f}% with loss"
        return f"{text} ({left_out})" if left_out else text


def load(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Prepared, Prepared | None]:
    """The rows to train on and, where the recipe gives any, those to evaluate on."""
    data = recipe.data
    train = prepare(*_read(data, "path", data.path, data.split), recipe, tokenizer)
    if not (data.eval_path or data.eval_split):
        return train, None
    evaluation = _read(data, "eval_path", data.eval_path or data.path, data.eval_split or "train")
    return train, prepare(*evaluation, recipe, tokenizer)


def _read(data: Data, field: str, path: str | list[str], split: str) -> tuple[Dataset, str | None]:
    """A split of what data.`field` names, as it stands, and the commit where that is on the hub."""
    try:
        return _load(data, field, path, split)
    except (ValueError, IndexError) as error:
        if foreign.translate(error) is not None:
            raise
        said = " ".join(str(error).split())
        raise LoraError(f"data.{field}: {path}, split {split!r}: {said}", "check the path and the split") from error


def _load(data: Data, field: str, path: str | list[str], split: str) -> tuple[Dataset, str | None]:
    """A local file, several of one kind, a folder, or a data set on the hub."""
    paths = [path] if isinstance(path, str) else path
    local = [Path(name) for name in paths]
    if len(local) == 1 and local[0].is_dir():
        if (local[0] / "dataset_info.json").is_file() or (local[0] / "dataset_dict.json").is_file():
            saved = load_from_disk(str(local[0]))
            return (saved[split] if isinstance(saved, DatasetDict) else saved), None
        return load_dataset(str(local[0]), data.name, split=split), None
    if any(file.suffix in READERS or file.exists() for file in local):
        for file in local:
            if not file.is_file():
                raise LoraError(f"data.{field}: {file} does not exist", f"ls {file.parent}")
            if file.suffix not in READERS:
                raise LoraError(f"data.{field}: {file} is none of {', '.join(READERS)}", f"mv {file} {file}.jsonl")
            if file.stat().st_size == 0:
                raise LoraError(f"data.{field}: {file} is empty", f"ls -l {file}")
        if len({file.suffix for file in local}) > 1:
            raise LoraError(f"data.{field}: the files are of different kinds", "give files of one kind")
        return load_dataset(READERS[local[0].suffix], data_files=[str(file) for file in local], split=split), None
    if len(paths) > 1:
        raise LoraError(
            f"data.{field}: {paths[0]} does not exist; a list must name local files", f"ls {local[0].parent}"
        )
    return _read_hub(data, paths[0], split)


def _read_hub(data: Data, name: str, split: str) -> tuple[Dataset, str]:
    """A hub data set at one commit. Offline, `load_dataset` would take whatever it built last: LoraError then."""
    commit = str(resolve_revision(name, repo_type="dataset", revision=data.revision).resolved)
    dataset = load_dataset(name, data.name, split=split, revision=commit)
    if not all(commit in Path(file["filename"]).parts for file in dataset.cache_files):
        raise LoraError(f"data.path: {name} is cached at another revision than {commit}", "unset HF_HUB_OFFLINE")
    return dataset, commit


def prepare(dataset: Dataset, commit: str | None, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Render, tokenise and mask each row. LoraError when a row is malformed or nothing is left to learn from."""
    data, max_length = recipe.data, recipe.training.max_length
    fingerprint = dataset._fingerprint
    if data.max_rows is not None:
        dataset = dataset.select(range(min(data.max_rows, len(dataset))))
    dataset = _renamed(dataset, data.columns)
    style = _format(data, dataset.column_names)
    encoded = dataset.map(
        _encode_batch,
        batched=True,
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=recipe.training.dataset_num_proc,
        load_from_cache_file=False,
        fn_kwargs={"style": style, "tokenizer": tokenizer, "train_on": data.train_on},
    )
    rows, counts = _select(encoded, data, max_length)
    ends = set(tokenizer.all_special_ids)
    endless = sum(next((i for i in reversed(labels) if i != IGNORED), None) not in ends for labels in rows["labels"])
    if endless > counts[f"cut at {max_length} tokens"]:
        ui.warn(f"{endless} of {len(rows)} rows teach no token that ends the answer: the model may never stop")
    return Prepared(
        rows,
        len(dataset),
        sum(len(ids) for ids in rows["input_ids"]),
        sum(label != IGNORED for labels in rows["labels"] for label in labels),
        counts,
        fingerprint,
        commit,
    )


def _renamed(dataset: Dataset, columns: Mapping[Any, str]) -> Dataset:
    """The data set under our column names (`columns` is ours: theirs); a column of theirs in the way is left out."""
    renames = {theirs: ours for ours, theirs in columns.items()}
    for theirs in renames:
        if theirs not in dataset.column_names:
            raise _missing_column(theirs, dataset.column_names, "data.columns")
    clashes = [name for name in dataset.column_names if name in renames.values() and name not in renames]
    return dataset.remove_columns(clashes).rename_columns(renames)


def _select(encoded: Dataset, data: Data, max_length: int) -> tuple[Dataset, Counter[str]]:
    """The rows to train on, long ones treated as data.on_long_row says, and how many were left out or cut, and why."""
    lengths = [len(ids) for ids in encoded["input_ids"]]
    trained = [sum(label != IGNORED for label in labels) for labels in encoded["labels"]]
    counts: Counter[str] = Counter()
    keep = []
    for index, (length, learned) in enumerate(zip(lengths, trained)):
        if length > max_length and data.on_long_row == "error":
            raise LoraError(
                f"row {index} has {length} tokens, over training.max_length {max_length}",
                f"--set training.max_length={max(lengths)}, or --set data.on_long_row=drop",
            )
        if learned == 0:
            counts["dropped: nothing to learn"] += 1
        elif length > max_length and data.on_long_row == "drop":
            counts[f"dropped: over {max_length} tokens"] += 1
        else:
            counts[f"cut at {max_length} tokens"] += length > max_length
            keep.append(index)
    rows = encoded.select(keep)
    if max(lengths, default=0) > max_length and data.on_long_row == "truncate":
        rows = rows.map(_truncate, fn_kwargs={"max_length": max_length}, load_from_cache_file=False)
        with_loss = [any(label != IGNORED for label in labels) for labels in rows["labels"]]
        counts["dropped: the answer was cut off whole"] += with_loss.count(False)
        rows = rows.select([index for index, keeps in enumerate(with_loss) if keeps])
    if len(rows) == 0:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        hint = f"--set training.max_length={max(lengths, default=1024)}, or look at the rows"
        raise LoraError(f"no row is left to train on: {len(encoded)} read ({reasons or 'none'})", hint)
    return rows, counts


def _format(data: Data, columns: Sequence[str]) -> str:
    """The format of the rows, told by their columns unless the recipe says."""
    if data.format != "auto":
        for column in FORMATS[data.format]:
            if column not in columns:
                raise _missing_column(column, columns, f"data.format: {data.format}")
        return data.format
    for style, needed in FORMATS.items():
        if all(column in columns for column in needed):
            return style
    shapes = "; ".join(f"{style}: {', '.join(needed)}" for style, needed in FORMATS.items())
    raise LoraError(
        f"data.path: the columns {', '.join(columns)} are of no known format ({shapes})",
        f"--set data.columns='{{prompt: {columns[0]}, completion: {columns[-1]}}}'",
    )


def _missing_column(column: str, columns: Sequence[str], where: str) -> LoraError:
    guess = nearest(column, columns)
    hint = f"did you mean {guess}?" if guess else "data.columns: {ours: theirs} names them"
    return LoraError(f"{where}: there is no column {column}; there are {', '.join(columns)}", hint)


def _encode_batch(
    batch: dict[str, list[Any]],
    indices: list[int],
    style: str,
    tokenizer: PreTrainedTokenizerBase,
    train_on: str,
) -> dict[str, list[list[int]]]:
    """`input_ids` and `labels` of a batch of rows."""
    texts, spans = [], []
    for position, index in enumerate(indices):
        row = {name: values[position] for name, values in batch.items()}
        if style == "text":
            text = _plain_text(row, index, tokenizer)
            texts.append(text)
            spans.append([(0, len(text))])
        else:
            messages = to_messages(row, style, index, uses_alpaca(tokenizer.chat_template))
            text, answers = render(tokenizer, messages)
            texts.append(text)
            spans.append({"all": [(0, len(text))], "assistant": answers, "completion": answers[-1:]}[train_on])
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        _label(ids, offsets, inside)
        for ids, offsets, inside in zip(encoded["input_ids"], encoded["offset_mapping"], spans)
    ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def _label(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """The ids that lie wholly inside one of the character `spans`; -100 for the others."""
    labels = []
    span = iter(spans)
    start, end = next(span, (0, 0))
    for token, (first, last) in zip(ids, offsets):
        while first >= end and (following := next(span, None)):
            start, end = following
        labels.append(token if first < last and start <= first and last <= end else IGNORED)
    return labels


def _plain_text(row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text with one BOS where the tokenizer puts one, and one EOS."""
    text = _text(row["text"], index, "text")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    if eos is None:
        raise LoraError("the tokenizer has no token that ends a text", "--set training.eos_token=TOKEN")
    if bos and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and not text.startswith(bos):
        text = bos + text
    return text if text.endswith(eos) else text + eos


def _text(value: Any, index: int, column: str) -> str:
    if not isinstance(value, str):
        raise LoraError(f"data row {index}: {column} is {value!r}, but must be text", "mend or remove the row")
    return value


def uses_alpaca(template: str | None) -> bool:
    """Whether the chat template has Alpaca's own place for a row's `input`."""
    return "### Input:" in (template or "")


def to_messages(row: dict[str, Any], style: str, index: int, alpaca_prompt: bool = False) -> list[Message]:
    """One row as a conversation; `index` (0-based) names it in errors."""
    if style == "alpaca":
        question, more = _text(row["instruction"], index, "instruction"), row.get("input")
        if more:
            question += ("\n\n### Input:\n" if alpaca_prompt else "\n\n") + _text(more, index, "input")
        return [
            {"role": "user", "content": question},
            {"role": "assistant", "content": _text(row["output"], index, "output")},
        ]
    if style == "prompt_completion":
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _checked([*prompt, *completion], index)
        return [
            {"role": "user", "content": _text(prompt, index, "prompt")},
            {"role": "assistant", "content": _text(completion, index, "completion")},
        ]
    return _checked(row["messages"], index)


def _checked(messages: Any, index: int) -> list[Message]:
    """`messages` if each has a known role and text, and one is an answer."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise LoraError(f"data row {index}: messages must be a list of {{role, content}}", "mend or remove the row")
    checked = []
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            guess = nearest(str(role), ROLES)
            hint = f"did you mean {guess}?" if guess else f"roles are {', '.join(ROLES)}"
            raise LoraError(f"data row {index}: the role {role!r} is not known", hint)
        checked.append({"role": role, "content": _text(message.get("content"), index, "content")})
    if next((message["role"] for message in checked if message["role"] != "system"), None) == "assistant":
        raise LoraError(f"data row {index}: the assistant speaks first", "begin with a message of the role user")
    if not any(message["role"] == "assistant" for message in checked):
        raise LoraError(f"data row {index}: no message has the role assistant", "mend or remove the row")
    return checked


def render(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and the character span of each answer with the token that ends its turn.

    An answer begins where the template's generation prompt ends, which is what inference feeds, and ends with the
    turn, white space after the end-of-turn token left out. LoraError for a template that renders the beginning of a
    conversation otherwise than the whole.
    """
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return text, list(_answers(tokenizer, messages, text))


def _answers(tokenizer: PreTrainedTokenizerBase, messages: list[Message], text: str) -> Iterator[tuple[int, int]]:
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = text
        if turn + 1 < len(messages):
            after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False).rstrip()
        if not (text.startswith(before) and text.startswith(after)):
            raise LoraError(
                "the chat template renders the beginning of a conversation otherwise than the whole, "
                "so where the answers are cannot be told",
                "--set model.chat_template=chatml",
            )
        yield len(before), len(after.rstrip())


def _truncate(row: dict[str, list[int]], max_length: int) -> dict[str, list[int]]:
    return {name: values[:max_length] for name, values in row.items()}
