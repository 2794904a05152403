"""Pictures as rows: folders, tables and packed ones, their labels, what is kept of them, and what is
refused.

Hermetic: pictures made here, no model. Alone: pytest tests/data/test_images.py
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as pillow

from lora_cli.common import LoraError
from lora_cli.data import cache, class_labels, labels, load, pictures, readers
from lora_cli.data.collate import PictureCollator
from lora_cli.data.prepare import Prepared
from lora_cli.models.processor import PictureProcessor, load_processor
from lora_cli.recipe.load import load_recipe
from tests.pictures import COLOURS, draw, encode, save_processor, write_folder


@pytest.fixture
def processor(tmp_path: Path) -> PictureProcessor:
    save_processor(tmp_path / "base")
    return load_processor(str(tmp_path / "base"))


def settle(tmp_path: Path, path: Any, **data: Any) -> Any:
    """The recipe over these rows, its labels found."""
    given = json.dumps({"path": path if isinstance(path, list) else str(path), **data})
    (tmp_path / "r.yaml").write_text(
        f"task: image_classification\nmodel: {{name_or_path: base}}\ndata: {given}\n"
        f"training: {{max_steps: 1}}\noutput_dir: {tmp_path / 'out'}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    found = labels.find_labels(recipe, load.find_encoder(recipe.task_row))
    values = {"labels": found.labels, "problem_type": found.problem_type}
    return recipe.replace("trainer", {"model": values})


def prepare(
    tmp_path: Path, processor: PictureProcessor, path: Any, **data: Any
) -> tuple[Prepared, Any]:
    recipe = settle(tmp_path, path, **data)
    train, _ = load.load_rows(recipe, processor)
    return train, recipe


def refused(tmp_path: Path, processor: PictureProcessor, path: Any, **data: Any) -> str:
    with pytest.raises(LoraError) as error:
        prepare(tmp_path, processor, path, **data)
    return f"{error.value.message} | {error.value.hint}".replace(f"{tmp_path}/", "")


def write_table(tmp_path: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    """A table beside two pictures, red and blue."""
    for label in ("red", "blue"):
        draw(label, 0).save(tmp_path / f"{label}.png")
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


TWO = [{"image": "red.png", "label": "red"}, {"image": "blue.png", "label": "blue"}]


def test_a_folder_for_each_label(tmp_path: Path, processor: PictureProcessor) -> None:
    """The rows are the files, byte for byte; any part of them has each label."""
    folder = write_folder(tmp_path / "photos", 8)
    (folder / "red" / ".hidden.png").write_bytes(b"")
    train, recipe = prepare(tmp_path, processor, folder)
    assert recipe.model.labels == sorted(COLOURS)
    assert len(train.rows) == 24
    assert train.counts.seen == {"PNG, RGB, 40x24": 24}
    for row in train.first:
        file = Path(row.place)
        assert row.read("image").tobytes() == file.read_bytes()
        assert recipe.model.labels[row.labels[0]] == file.parent.name
    for split in ("train[:50%]", "train[50%:]"):
        part, _ = prepare(tmp_path, processor, folder, split=split)
        assert len(part.rows) == 12
        assert len(set(np.concatenate(part.rows["labels"]).tolist())) == 3


def test_the_order_is_the_same_wherever_the_folder_lies(
    tmp_path: Path, processor: PictureProcessor
) -> None:
    train, _ = prepare(tmp_path, processor, write_folder(tmp_path / "a", 3))
    other, _ = prepare(tmp_path, processor, write_folder(tmp_path / "b" / "c", 3))
    assert train.fingerprint == other.fingerprint


def test_folders_of_splits(
    tmp_path: Path, processor: PictureProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "photos" / "train", 4)
    write_folder(tmp_path / "photos" / "test", 2)
    (tmp_path / "photos" / "train" / "red" / "notes.doc").write_text("x")
    (tmp_path / "photos" / "train" / "pink").mkdir()
    train, _ = prepare(tmp_path, processor, tmp_path / "photos")
    said = capsys.readouterr().err
    assert "1 file of" in said and "notes.doc" in said
    assert "no pictures in pink" in said
    test, _ = prepare(tmp_path, processor, tmp_path / "photos", split="test[:50%]")
    assert (len(train.rows), len(test.rows)) == (12, 3)
    said = refused(tmp_path, processor, tmp_path / "photos", split="dev")
    assert said == "data.split: photos has no split 'dev'; it has test, train | split: test"


def test_files_by_a_pattern(tmp_path: Path, processor: PictureProcessor) -> None:
    folder = write_folder(tmp_path / "photos", 3)
    whole, _ = prepare(tmp_path, processor, folder)
    train, recipe = prepare(tmp_path, processor, [f"{folder}/red/*.png", f"{folder}/blue/*"])
    assert recipe.model.labels == ["blue", "red"]
    assert len(train.rows) == 6
    again, _ = prepare(tmp_path, processor, f"{folder}/*/*.png")
    assert again.fingerprint == whole.fingerprint


@pytest.mark.parametrize("header", ["image,label", "path,class", "file_name,target"])
def test_a_table_names_files_beside_it(
    tmp_path: Path, processor: PictureProcessor, header: str
) -> None:
    folder = write_folder(tmp_path / "photos" / "all", 2).parent
    files = sorted(folder.rglob("*.png"))
    with (folder / "rows.csv").open("w", newline="") as opened:
        rows = [(file.relative_to(folder), file.parent.name) for file in files]
        csv.writer(opened).writerows([header.split(","), *rows])
    train, recipe = prepare(tmp_path, processor, folder / "rows.csv")
    assert recipe.model.labels == sorted(COLOURS)
    for row, file in zip(train.first, files, strict=True):
        assert row.read("image").tobytes() == file.read_bytes()


def test_several_labels_and_numbers(tmp_path: Path, processor: PictureProcessor) -> None:
    several = [{"image": "red.png", "label": ["warm", "dark"]}, {"image": "blue.png", "label": []}]
    train, recipe = prepare(tmp_path, processor, write_table(tmp_path, several))
    assert recipe.model.problem_type == "multi_label_classification"
    assert [row.labels.tolist() for row in train.first] == [[1, 1], [0, 0]]
    numbers = [{"image": "red.png", "label": 0.5}, {"image": "blue.png", "label": 2}]
    train, recipe = prepare(tmp_path, processor, write_table(tmp_path, numbers, "n.jsonl"))
    assert recipe.model.problem_type == "regression"
    assert [row.labels.tolist() for row in train.first] == [[0.5], [2.0]]


def pack(count: int) -> Dataset:
    """Pictures in a table of `datasets`, of numbers whose names are not in order."""
    names = ["red", "blue", "green", "never"]
    rows = [
        {"image": {"bytes": encode(draw(label, at)), "path": f"{at}.png"}, "label": label}
        for at in range(count)
        for label in COLOURS
    ]
    kinds = Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_list(rows, features=kinds)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved"])
def test_packed_pictures_with_the_names_of_their_labels(
    tmp_path: Path, processor: PictureProcessor, kind: str
) -> None:
    """The order of the labels is the table's own, and one that no row has stays."""
    made, path = pack(8), tmp_path / ("rows" if kind == "saved" else f"rows.{kind}")
    if kind == "parquet":
        made.to_parquet(path)
    elif kind == "saved":
        made.save_to_disk(path)
    else:
        table = made.data.table
        with path.open("wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    train, recipe = prepare(tmp_path, processor, path)
    assert recipe.model.labels == ["red", "blue", "green", "never"]
    shown = [recipe.model.labels[row.labels[0]] for row in train.first]
    assert shown == [*COLOURS] * 6 + ["blue", "green"]
    assert train.first[4].read("image").tobytes() == encode(draw("green", 1))


def test_names_of_classes_are_read_of_lists_too() -> None:
    kinds = Features(
        {
            "tags": List(ClassLabel(names=["O", "B-X"])),
            "label": ClassLabel(names=["a", "b"]),
            "text": Value("string"),
        }
    )
    described = json.dumps({"info": {"features": kinds.to_dict()}})
    names = class_labels.read_names(described)
    assert names == {"tags": ["O", "B-X"], "label": ["a", "b"]}
    row = {"tags": [0, 1, -1], "label": 2, "text": 1}
    assert class_labels.name_classes(row, names) == {
        "tags": ["O", "B-X", -1],
        "label": 2,
        "text": 1,
    }
    for damaged in (None, "", "{", "[1]", '{"info": 3}', '{"info": {"features": {"a": 3}}}'):
        assert class_labels.read_names(damaged) == {}


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"]
)  # what Pillow makes RGB of
def test_every_mode_becomes_red_green_and_blue(
    tmp_path: Path, processor: PictureProcessor, mode: str
) -> None:
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    content = encode(draw("red", 0).convert(mode), kind)
    assert pictures.look(content, "x").kind == f"{kind}, {mode}"
    decoded = pictures.decode(content)
    assert decoded.mode == "RGB"
    if mode not in ("1", "L", "LA"):
        red, green, blue = np.asarray(decoded).reshape(-1, 3).mean(0)
        assert red > green + 80 and red > blue + 80
    batch = PictureCollator(processor, False, 1, torch.float32)(
        [{"image": np.frombuffer(content, np.uint8), "labels": [0]}]
    )
    assert batch["pixel_values"].shape == (1, 3, 32, 32)


def test_a_picture_is_turned_as_its_camera_was_held() -> None:
    wide = draw("red", 0)
    exif = pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    assert pictures.decode(encode(wide, "JPEG", exif=exif)).size == wide.size[::-1]


def test_what_is_large_is_written_some_at_a_time(
    tmp_path: Path, processor: PictureProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The offsets of one batch of a thousand pictures would be over 2 GiB."""
    folder = write_folder(tmp_path / "photos", 4)
    whole, _ = prepare(tmp_path, processor, folder)
    monkeypatch.setattr(cache, "LARGEST", 1000)
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    parts, _ = prepare(tmp_path, processor, folder)
    assert len(parts.rows.data.table.to_batches()) > 4 * len(whole.rows.data.table.to_batches())
    assert [row["image"].tobytes() for row in parts.rows] == [
        row["image"].tobytes() for row in whole.rows
    ]


@pytest.mark.parametrize("kind", ["folder", "table"])
def test_kept_rows_are_those_of_the_files_as_they_are(
    kind: str, tmp_path: Path, processor: PictureProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    """A picture that was drawn anew is trained on, also where a table names it that is as it was:
    its rows were kept with the old one."""
    if kind == "folder":
        rows = write_folder(tmp_path / "photos", 2)
    else:
        rows = write_table(tmp_path, TWO)
    changed = rows / "red" / "0.png" if kind == "folder" else tmp_path / "red.png"
    first, _ = prepare(tmp_path, processor, rows)
    again, _ = prepare(tmp_path, processor, rows)
    assert "prepared before" in capsys.readouterr().err
    assert again.fingerprint == first.fingerprint
    draw("red", 77).save(changed)
    other, _ = prepare(tmp_path, processor, rows)
    assert other.fingerprint != first.fingerprint
    kept = [np.asarray(row["image"], np.uint8).tobytes() for row in other.rows]
    assert changed.read_bytes() in kept


def test_a_stream_of_pictures(tmp_path: Path, processor: PictureProcessor) -> None:
    folder = write_folder(tmp_path / "photos", 3)
    train, _ = prepare(tmp_path, processor, folder, streaming=True, shuffle_buffer=1)
    assert train.stream is not None
    rows = [row for row, _ in zip(train.stream, range(12))]
    kept = [bytes(row["image"]) for row in rows]
    assert kept[:9] == [row["image"].astype(np.uint8).tobytes() for row in train.rows]
    assert kept[9:] == kept[:3]  # again and again


def damaged(tmp_path: Path) -> dict[str, tuple[bytes | None, str]]:
    """What is in a file, and what is said of it."""
    good = encode(draw("red", 0))
    deep = pillow.fromarray(np.full((4, 4), 40_000, np.uint16))
    return {
        "cut off": (good[: len(good) // 2], "is damaged"),
        "a text": (b"hello", "is no picture: none of PNG, JPEG, WEBP, GIF, BMP, TIFF, PPM"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
        "empty": (b"", "is an empty file"),
        "sixteen bits": (encode(deep), "of Pillow's mode I;16, of which RGB keeps only"),
        "not there": (None, "there is no picture"),
    }


@pytest.mark.parametrize("name", damaged(Path()))
def test_what_is_no_picture_is_a_bad_row(
    tmp_path: Path, processor: PictureProcessor, name: str
) -> None:
    content, said = damaged(tmp_path)[name]
    table = write_table(tmp_path, [*TWO, {"image": "bad.png", "label": "red"}])
    if content is not None:
        (tmp_path / "bad.png").write_bytes(content)
    message = refused(tmp_path, processor, table)
    assert message.startswith("rows.jsonl:3: ")
    assert "bad.png" in message and said in message
    train, _ = prepare(tmp_path, processor, table, on_bad_row="skip")
    assert len(train.rows) == 2
    assert train.counts.bad.total() == 1


def test_a_picture_larger_than_is_read(
    tmp_path: Path, processor: PictureProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LARGEST", 100)
    said = refused(tmp_path, processor, write_table(tmp_path, TWO))
    assert said.startswith("rows.jsonl:1: the picture red.png has over 0 MiB (2 of 2 rows are bad")


def test_a_bomb_is_an_error_whatever_the_policy(
    tmp_path: Path, processor: PictureProcessor
) -> None:
    table = write_table(tmp_path, [*TWO, {"image": "bomb.png", "label": "red"}])
    pillow.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    said = refused(tmp_path, processor, table, on_bad_row="skip")
    assert said.startswith("bomb.png is a decompression bomb, or a picture too large to train on: ")
    assert "400000000 pixels" in said
    assert said.endswith(" | make it smaller, or take it out of the data")


OUTSIDE = "is not in rows, where the rows are"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../red.png", OUTSIDE),
        ("ABSOLUTE", OUTSIDE),
        ("link.png", OUTSIDE),
        ("folder/red.png", OUTSIDE),
        ("itself.png", ""),
        ("pipe.png", "pipe.png is a pipe, not a file"),
        ("inside", "inside is a folder, not a file"),
        ("https://x.test/red.png", "the picture https://x.test/red.png is an address"),
        ("", "image is '', and neither a file's name nor a picture's bytes"),
        (None, "image is 'None', and neither a file's name nor a picture's bytes"),
        (3, "image is '3', and neither a file's name nor a picture's bytes"),
        ({"path": "gone.png"}, "there is no picture rows/gone.png"),
        ({"bytes": None}, "image is 'None', and neither"),
        ("null\0.png", ""),
    ],
)
def test_only_files_in_the_table_s_folder_are_opened(
    tmp_path: Path, processor: PictureProcessor, name: Any, said: str
) -> None:
    folder = tmp_path / "rows"
    (folder / "inside").mkdir(parents=True)
    draw("red", 0).save(tmp_path / "red.png")
    (folder / "link.png").symlink_to(tmp_path / "red.png")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "itself.png").symlink_to(folder / "itself.png")
    os.mkfifo(folder / "pipe.png")
    name = str(tmp_path / "red.png") if name == "ABSOLUTE" else name
    table = write_table(folder, [*TWO, {"image": name, "label": "red"}])
    message = refused(tmp_path, processor, table)
    assert message.startswith("rows/rows.jsonl:3: ")
    assert said in message


def test_a_link_out_of_a_folder_of_pictures_is_refused(
    tmp_path: Path, processor: PictureProcessor
) -> None:
    folder = write_folder(tmp_path / "photos", 2)
    draw("red", 0).save(tmp_path / "secret.png")
    (folder / "red" / "9.png").symlink_to(tmp_path / "secret.png")
    said = refused(tmp_path, processor, folder)
    assert said.startswith("photos/red/9.png is a link out of its folder, to secret.png")


def test_pictures_that_lie_elsewhere(tmp_path: Path, processor: PictureProcessor) -> None:
    folder = write_folder(tmp_path / "photos", 2)
    draw("red", 0).save(folder / "loose.png")
    said = refused(tmp_path, processor, folder)
    assert said == (
        "data.path: photos/loose.png lies in no label's folder | a label's pictures lie in its "
        "folder: photos/LABEL/loose.png"
    )
    (folder / "loose.png").unlink()
    (folder / "red" / "dark").mkdir()
    draw("red", 0).save(folder / "red" / "dark" / "1.png")
    said = refused(tmp_path, processor, folder)
    assert said.startswith("data.path: photos/red/dark/1.png lies deeper than in a label's folder")


def test_a_table_that_says_what_pictures_are(tmp_path: Path, processor: PictureProcessor) -> None:
    folder = write_folder(tmp_path / "photos", 2)
    (folder / "metadata.csv").write_text("file_name,label\nred/0.png,x\nblue/0.png,y\n")
    said = refused(tmp_path, processor, folder)
    assert said == (
        "data.path: photos has pictures and a table of them, photos/metadata.csv | --set "
        "data.path=photos/metadata.csv"
    )
    train, recipe = prepare(tmp_path, processor, folder / "metadata.csv")
    assert recipe.model.labels == ["x", "y"]
    assert len(train.rows) == 2


def test_one_label_in_all(tmp_path: Path, processor: PictureProcessor) -> None:
    table = write_table(tmp_path, [{**row, "label": "x"} for row in TWO])
    said = refused(tmp_path, processor, table)
    assert said.startswith("data.path: the rows have only the label x")


def test_rows_that_both_are_trained_and_evaluated_on_are_told(
    tmp_path: Path, processor: PictureProcessor, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_folder(tmp_path / "photos", 2)
    recipe = settle(tmp_path, folder, eval_path=str(folder))
    load.load_rows(recipe, processor)
    assert "6 of 6 evaluation rows are trained on as well" in capsys.readouterr().err


def test_a_mix_of_pictures(tmp_path: Path, processor: PictureProcessor) -> None:
    one, two = (write_folder(tmp_path / name, 2) for name in ("a", "b"))
    (tmp_path / "r.yaml").write_text(
        f"task: image_classification\nmodel: {{name_or_path: base, labels: [blue, green, red]}}\n"
        f"data: {{mix: [{{path: {one}}}, {{path: {two}, weight: 1.5}}]}}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    values = {"problem_type": "single_label_classification"}
    train, _ = load.load_rows(recipe.replace("trainer", {"model": values}), processor)
    assert len(train.rows) == train.counts.tokens == 6 + 6 + 3


def test_places_know_their_files(tmp_path: Path) -> None:
    table = write_table(tmp_path, TWO)
    places = [place for place, _ in readers.read(table)]
    assert places == [f"{table}:1", f"{table}:2"]
    assert all(isinstance(place, readers.Place) and place.file == table for place in places)
