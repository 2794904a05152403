"""Make rows of pictures and of what they are told apart by: the picture's file, as it is, and its
labels. Decoding and the processor come when a batch is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lora_cli.data import formats, pictures
from lora_cli.data.classify import NUMBERS, LabelEncoder
from lora_cli.data.encode import Batch, Encoded, Made
from lora_cli.data.formats import BadRow
from lora_cli.data.readers import Place, Row
from lora_cli.data.selection import Kept
from lora_cli.models import PictureProcessor
from lora_cli.recipe import Recipe

ONE = np.zeros(1, np.int32)
"""A picture counts as one, where texts count tokens."""


class Picture(NamedTuple):
    """A picture, by its file's name or content, and what the row says of it."""

    name: str | None
    content: bytes | None
    label: Any


class PictureEncoder(LabelEncoder):
    """Encodes rows for models that classify pictures; `recipe` is settled."""

    row_formats: ClassVar[formats.Formats] = {"images": ("image", "label")}
    column_sets: ClassVar[formats.ColumnSets] = tuple(
        {"image": image, "label": label}
        for image in (
            *("image", "path", "file", "file_name", "filename", "image_path", "file_path"),
            *("img", "image_file", "image_id", "picture", "photo"),
        )
        for label in ("label", "labels", "class", "category", "target", "fine_label", "class_name")
        if (image, label) != ("image", "label")
    )

    def __init__(self, reader: PictureProcessor, recipe: Recipe, day: date | None = None) -> None:
        self.tokenizer = reader
        self.day = day or date.today()
        self.problem = recipe.model.problem_type
        labels = recipe.model.labels
        self.names: Sequence[str] = [] if labels == "auto" else labels
        self.numbers = {name: number for number, name in enumerate(self.names)}

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns of a row, and the type of their numbers."""
        return {"image": np.uint8, "labels": np.float32 if self.problem == NUMBERS else np.int32}

    @staticmethod
    def suggest_columns(columns: list[str]) -> str:
        """Return the option that names a picture and a label among columns of other names."""
        if len(columns) == 1:
            return "add a column with the labels"
        return formats.suggest_columns(image=columns[0], label=columns[-1])

    def find_converter(self, style: str) -> formats.Converter:
        """Return the function that makes a row of format `style` a Picture."""
        return convert_picture

    def split_by_loss(self, row: Kept) -> list[tuple[bool, str]]:
        """Return what the row's picture is, and after it what is learnt of it."""
        content = row.read("image").tobytes()
        seen = pictures.look(content, row.place)
        said = f"{seen.kind}, {seen.width}x{seen.height}, {len(content):,} bytes "
        return [(False, said), (True, self.name_labels(row.labels))]

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Made]]:
        """Yield each batch of rows with what each became, or why it has none."""
        for batch in batches:  # one row at a time: a batch of pictures may be all of the memory
            for item in batch:
                yield [item], [self._look(*item)]

    def _look(self, place: str, row: Picture) -> list[Encoded] | BadRow:
        """Return a row whose picture can be decoded, and whose label is known."""
        try:
            labels = self.find_labels(row.label)
            content, name = row.content, row.name or f"of {place}"
            if content is None:
                if not isinstance(place, Place):
                    raise BadRow(
                        "a row has no picture",
                        f"the row names {name}, and has not the picture itself",
                        "keep the pictures in the table, or read the table from its file",
                    )
                folder = place.file.parent
                content, name = pictures.read_file(folder, name), str(folder / name)
            seen = pictures.look(content, name)
        except BadRow as bad:
            return bad
        return [
            Encoded(
                ONE,
                labels,
                False,
                others={"image": np.frombuffer(content, np.uint8)},
                seen=f"{seen.kind}, {seen.width}x{seen.height}",
            )
        ]


def find_named(place: str, row: Row, names: Mapping[Any, str]) -> tuple[Path, str] | None:
    """Return the folder of the table that a row is from, and the name in it of the row's picture;
    None of a row that has the picture itself, or none. `names` are its columns': ours, theirs."""
    if isinstance(row, BadRow) or not isinstance(place, Place):
        return None
    try:
        found = convert_picture({"label": None, **formats.rename_columns(row, names)})
    except BadRow:
        return None
    named = found.name is not None and found.content is None
    return (place.file.parent, str(found.name)) if named else None


def convert_picture(row: Mapping[str, Any]) -> Picture:
    """Return a row's picture, the name of its file or what `datasets` keeps of one, with its
    label."""
    given, label = formats.get_value(row, "image"), formats.get_value(row, "label")
    if isinstance(given, dict):
        name, content = given.get("path"), given.get("bytes")
        if isinstance(content, bytes):
            return Picture(name if isinstance(name, str) else None, content, label)
        given = name
    if isinstance(given, bytes):
        return Picture(None, given, label)
    if isinstance(given, str) and given.strip():
        return Picture(given, None, label)
    raise BadRow(
        "a row has no picture",
        f"image is {str(given)[:40]!r}, and neither a file's name nor a picture's bytes",
    )
