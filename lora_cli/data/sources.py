"""Find where rows come from: local files, a folder, or a data set on the hub. Each row carries its
place.

Local files are read here, not by `datasets`: its readers stop at the first row whose types differ
from the rows before, and do not say in which file and line. Everything is read in batches, and
nothing is held in memory.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import re
from collections.abc import Container, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from datasets import (
    Dataset,
    DatasetDict,
    DownloadMode,
    Image,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError

from lora_cli.common import LoraError, find_nearest, library_errors, plain_files, quote
from lora_cli.data import class_labels, json_rows, picture_folder, readers, remote, stores
from lora_cli.models import hub
from lora_cli.recipe import Data


class Source(NamedTuple):
    """Rows to be read: from files, or from a data set of the `datasets` library."""

    files: list[Path]
    table: Dataset | IterableDataset | None
    split: str
    commit: str | None = None
    columns: json_rows.Columns = frozenset()
    """Those of the files that were named."""

    @property
    def name(self) -> str:
        """What is read, for messages."""
        if len(self.files) > 1 and self.is_of_pictures:
            return str(self.files[0].parent.parent)
        return str(self.files[0]) if self.files else "the data set"

    @property
    def is_of_pictures(self) -> bool:
        """Whether the files are the pictures themselves, and not of rows."""
        return bool(self.files) and readers.guess_kind(self.files[0]) == "picture"

    @property
    def names(self) -> list[str]:
        """The paths of the files, as the rows' places spell them."""
        return [str(file) for file in self.files]

    def read_rows(self) -> Iterator[tuple[str, readers.Row]]:
        """Yield every row with its place: `rows.jsonl:17`, or `row 17` of a table; both count from
        1."""
        if self.table is not None:
            number, classes = 0, self.read_class_names()
            for batch in self.table.iter(batch_size=readers.BATCH):
                names = list(batch)
                for values in zip(*batch.values()):
                    number += 1
                    row = readers.drop_nulls(dict(zip(names, values)))
                    yield f"row {number}", class_labels.name_classes(row, classes)
            return
        if self.split == "train":
            yield from self._read_files()
            return
        total = sum(1 for _ in self._read_files())
        for part in ReadInstruction.from_spec(self.split).to_absolute({"train": total}):
            yield from islice(self._read_files(), part.from_ or 0, part.to)

    def read_class_names(self) -> class_labels.Names:
        """Return the names of classes that stand beside the rows, by column: what `datasets` calls
        ClassLabel."""
        if self.table is None:
            return readers.read_class_names(self.files[0])
        features: Any = self.table.features
        described = {"info": {"features": features.to_dict() if features else {}}}
        return class_labels.read_names(json.dumps(described, default=str))

    def _read_files(self) -> Iterator[tuple[str, readers.Row]]:
        """Return the rows of all files, one file after another."""
        return (row for file in self.files for row in readers.read(file, self.columns))

    def hash_content(self, ends_only: bool = False) -> str:
        """Return a hash of the content that is read, not of file times.

        With `ends_only`, hash only the size and the first and last megabyte of each file.
        """
        total = hashlib.sha256(self.split.encode())
        for file in self.files:
            with file.open("rb") as stream:
                if ends_only:
                    size = file.stat().st_size
                    total.update(b"%d" % size + stream.read(1 << 20))
                    stream.seek(max(0, size - (1 << 20)))
                while block := stream.read(1 << 20):
                    total.update(block)
        if isinstance(self.table, Dataset):
            with pyarrow.ipc.new_stream(
                pyarrow.PythonFile(_Hashing(total), "w"), self.table.data.schema
            ) as writer:
                for batch in self.table.with_format("arrow").iter(readers.BATCH):
                    writer.write_table(batch)
        elif self.table is not None:
            total.update(f"{self.commit} {self.table.info.config_name}".encode())
        return total.hexdigest()[:32]


class _Hashing(io.RawIOBase):
    """A file that only hashes what is written to it."""

    def __init__(self, total: Any) -> None:
        self.total = total

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self.total.update(block)
        return len(block)


def find_source(data: Data, field: str, path: str | list[str], split: str) -> Source:
    """Return the source that data.`field` names; raise LoraError when it is missing, empty or of an
    unknown kind."""
    paths = [path] if isinstance(path, str) else path
    for name in paths:
        _refuse_unreadable(field, name)
    try:
        found = {name: _find_files(field, name) for name in paths}
        if any(found.values()) or len(paths) > 1:
            for name, matched in found.items():
                if not matched:
                    raise LoraError(
                        f"data.{field}: {name} is not a file; a list must name local files",
                        plain_files.suggest_other(Path(name)),
                    )
            files = [file for some in found.values() for file in some]
            return _open_files(field, files, split)._replace(columns=_list_named(data))
        if Path(paths[0]).is_dir():
            return _open_folder(field, data, Path(paths[0]), split)
        return _open_hub(data, paths[0], split)
    except (ValueError, IndexError) as error:
        if library_errors.translate(error) is not None:
            raise
        said = " ".join(str(error).split())
        raise LoraError(
            f"data.{field}: {path}, split {split!r}: {said}", "check the path and the split"
        ) from error


def _list_named(data: Data) -> frozenset[str]:
    """Return the columns of theirs that are named, without the places in them."""
    return frozenset({name.partition(".")[0] for name in data.columns.values()})


def is_elsewhere(name: str) -> bool:
    """Return whether a name of data is an address, or a pattern, and no single path here."""
    return stores.is_address(name) or glob.has_magic(name)


def _find_files(field: str, name: str) -> list[Path]:
    """Return the files that a path, an address or a pattern such as `data/*.jsonl` names; none for
    a folder or a hub name."""
    if stores.is_address(name):
        return remote.fetch_all(field, name)
    if glob.has_magic(name) and not Path(name).exists():
        found = sorted(Path(match) for match in glob.glob(name, recursive=True))  # noqa: PTH207 – absolute patterns too
        files = [file for file in found if file.is_file()]
        if not files:
            raise LoraError(
                f"data.{field}: no file matches {name}", plain_files.suggest_other(Path(name))
            )
        return files
    path = Path(name)
    if path.is_file() or (readers.guess_kind(path) is not None and not path.is_dir()):
        return [path]
    return []


def _open_files(field: str, files: list[Path], split: str) -> Source:
    """Return local files as a source; raise LoraError where one is missing, empty or of an unknown
    kind."""
    for file in files:
        if not file.is_file():
            raise readers.missing_file(field, file)
        if readers.guess_kind(file) is None:
            raise readers.unknown_kind(field, file)
        if file.stat().st_size == 0 and readers.guess_kind(file) != "picture":
            raise LoraError(f"data.{field}: {file} is empty", f"ls -l {quote(file)}")
    if not re.fullmatch(r"train(\[.*\])?(\+train(\[.*\])?)*", split):
        raise LoraError(
            f"data.{field.replace('path', 'split')}: local files have the split train only, not "
            f"{split!r}",
            "split: train, or train[:1000]",
        )
    ReadInstruction.from_spec(split)
    if all(readers.guess_kind(file) == "picture" for file in files):
        files = picture_folder.mix(files)
    return Source(files, None, split)


def _refuse_unreadable(field: str, name: str) -> None:
    """Raise LoraError for an address that is not taken, a pipe or a device: what is read is read
    several times."""
    if stores.is_address(name):
        readers.refuse_address(field, name)
        return
    if Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir():
        raise LoraError(
            f"data.{field}: {name} is a pipe or a device, not a file",
            "copy its contents into a file",
        )


OF_THE_LIBRARY = {"dataset_info.json", "dataset_dict.json", "state.json"}
"""Files beside those of rows in a folder that `datasets` saved."""


def _list_files(folder: Path) -> list[Path]:
    """Return the files of rows that lie in a folder."""
    found = (file for file in folder.iterdir() if file.name not in OF_THE_LIBRARY)
    rows = (file for file in found if readers.guess_kind(file) not in (None, "picture"))
    return sorted(file for file in rows if file.is_file())


def _suggest_file(field: str, folder: Path, files: list[Path]) -> str:
    """Return the hint that names the first of a folder's files in its place."""
    if not files or field not in ("path", "eval_path"):
        return f"ls {quote(folder)}"
    return f"--set data.{field}={quote(files[0])}"


def _open_folder(field: str, data: Data, folder: Path, split: str) -> Source:
    """Return a folder that `datasets` saved, or one of files, as a source.

    Files are read anew each time, since `datasets` would go by their times.
    """
    refused = f"data.{field}: the folder {folder} cannot be read as rows"
    plain_files.refuse_odd_files(folder)
    files = _list_files(folder)
    hint = _suggest_file(field, folder, files)
    if picture_folder.has_pictures(field, folder):
        return _open_files(field, *picture_folder.find_pictures(field, folder, split))
    with library_errors.translate_file_errors(refused, hint):
        found = {file: _find_lists(data, file) for file in files}
        holders = {file: keys for file, keys in found.items() if keys}
        if holders and not _has_other_rows(folder, holders):
            raise _refuse_holder(field, folder, next(iter(holders)))
        try:
            return _read_folder(data, folder, split, refused, hint)
        except DatasetGenerationError as error:
            said = str(error.__cause__ or error)
            for file, keys in holders.items():
                if any(re.search(rf"(?m)^{re.escape(key)}: \w*list<", said) for key in keys):
                    raise _refuse_holder(field, folder, file) from error
            raise LoraError(f"{refused}: {said}", hint) from error


def _find_lists(data: Data, file: Path) -> list[str]:
    """Return the keys of the lists of rows in a file that is one JSON object; none of one that
    cannot be opened, of which `datasets` says so if it reads it."""
    try:
        is_one = file.suffix.lower() == ".json"
        return json_rows.find_lists(file, _list_named(data)) if is_one else []
    except OSError:
        return []


def _has_other_rows(folder: Path, holders: Container[Path]) -> bool:
    """Return whether `datasets` saved a folder, or finds files of rows in it besides `holders`."""
    found = (path for path in folder.rglob("*") if path.is_file() and path not in holders)
    return _is_saved(folder) or any(
        readers.guess_kind(path) not in (None, "picture")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        for path in found
    )


def _refuse_holder(field: str, folder: Path, file: Path) -> LoraError:
    said = f"data.{field}: {file} is one object that holds its rows"
    return LoraError(f"{said}: it is read alone", _suggest_file(field, folder, [file]))


def _is_saved(folder: Path) -> bool:
    """Return whether `datasets` saved a folder."""
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _read_folder(data: Data, folder: Path, split: str, refused: str, hint: str) -> Source:
    if _is_saved(folder):
        saved = load_from_disk(str(folder))
        parts = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        for part in parts.values():
            part.data.table.validate(full=True)  # or damaged offsets end the process
        table = _select_split(folder, parts.with_format(None), split)
        return Source([], _keep_packed(table), split)
    if glob.has_magic(str(folder.resolve())):
        raise LoraError(f"{refused}: `datasets` takes its brackets for a pattern", hint)
    try:
        rebuilt = None if data.streaming else DownloadMode.REUSE_CACHE_IF_EXISTS
        table = load_dataset(
            str(folder), data.name, split=split, streaming=data.streaming, download_mode=rebuilt
        )
    except RuntimeError as error:  # a script among the files: datasets does not run it
        raise LoraError(f"{refused}: {' '.join(str(error).split())}", hint) from None
    return Source([], _keep_packed(table), split)


def _keep_packed(table: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return a table whose pictures come as the bytes of their files: they are decoded here."""
    for name, kind in (table.features or {}).items():
        if isinstance(kind, Image):
            table = table.cast_column(name, Image(decode=False))
    return table


def _select_split(folder: Path, parts: DatasetDict, split: str) -> Dataset:
    """Return the split, or the slices of splits, of a saved data set."""
    instruction = ReadInstruction.from_spec(split)
    for name in re.findall(r"(?:^|\+)\s*([^\[+\s]+)", split):
        if name not in parts:
            raise LoraError(
                f"{folder} has no split {name!r}; it has {', '.join(parts)}",
                f"split: {find_nearest(name, parts) or next(iter(parts))}",
            )
    slices = instruction.to_absolute({name: len(part) for name, part in parts.items()})
    chosen = []
    for each in slices:
        part = parts[each.splitname]
        chosen.append(part.select(range(len(part))[each.from_ : each.to]))
    return concatenate_datasets(chosen)


def _open_hub(data: Data, name: str, split: str) -> Source:
    """Return a hub data set at one commit as a source.

    Raise LoraError where only another commit is cached: offline, `load_dataset` takes whatever it
    built last.
    """
    commit = hub.resolve_commit(name, data.revision, "dataset")
    table = load_dataset(name, data.name, split=split, revision=commit, streaming=data.streaming)
    if isinstance(table, Dataset) and not all(
        commit in Path(file["filename"]).parts for file in table.cache_files
    ):
        raise LoraError(
            f"data.path: {name} is cached at another revision than {commit}", "unset HF_HUB_OFFLINE"
        )
    return Source([], _keep_packed(table), split, commit)
