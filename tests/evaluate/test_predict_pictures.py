"""`lora predict` on pictures: what it says is what transformers' pipeline says of the merged model,
whichever way the rows are kept; a picture that cannot be read has a line that says so.

Hermetic: random bases of two layers and pictures made here, CPU.
Alone: pytest tests/evaluate/test_predict_pictures.py
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from lora_cli.common import LoraError, UsageError
from lora_cli.evaluate.predict import Options, Reading, predict
from lora_cli.merge.merge import merge
from lora_cli.recipe import load_recipe
from lora_cli.train import run
from tests import pictures


@pytest.fixture(scope="module", params=["vit", "resnet"])
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    base = pictures.make_base(folder / "base", request.param)
    return run.train(load_recipe(pictures.write_recipe(folder, base)))


def ask(adapter: Path, data: Path, out: Path, **given: Any) -> list[dict[str, Any]]:
    """The lines that `lora predict --out` writes."""
    columns, reading = given.pop("columns", []), given.pop("reading", Reading(everything=True))
    predict([str(adapter)], str(data), [], out, None, columns, Options(reading, **given))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_labels_are_those_of_transformers_pipeline(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = pictures.write_folder(tmp_path / "photos", 7)
    said = ask(
        trained, photos, tmp_path / "said.jsonl", reading=Reading(everything=True, batch_size=4)
    )
    assert {line["place"] for line in said} == {str(each) for each in photos.rglob("*.png")}
    merge(trained, tmp_path / "merged", None, None, False)
    classify = pipeline(
        "image-classification",
        model=str(tmp_path / "merged"),
        image_processor=AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil"),
    )
    wanted = classify([line["place"] for line in said], top_k=3)
    right = 0
    for line, each in zip(said, wanted, strict=True):
        scores = {found["label"]: found["score"] for found in each}
        assert line["probabilities"] == pytest.approx(scores, abs=1e-5)
        assert line["label"] == max(scores, key=lambda name: scores[name])
        right += line["label"] == Path(line["place"]).parent.name
    table = dict(line.split() for line in capsys.readouterr().out.splitlines() if "acc" in line)
    assert float(table["accuracy"]) == pytest.approx(right / 21, abs=1e-4)
    assert {line["label"] for line in said} > {said[0]["label"]}  # else the test could not fail


def test_every_kind_of_rows_gives_the_same_answers(trained: Path, tmp_path: Path) -> None:
    photos = pictures.write_folder(tmp_path / "photos", 2)
    files = sorted(photos.rglob("*.png"))
    in_folder = ask(trained, photos, tmp_path / "folder.jsonl")
    wanted = {line["place"]: line["probabilities"] for line in in_folder}
    names = [str(file.relative_to(tmp_path)) for file in files]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps({"shot": name, "id": 3}) + "\n" for name in names))
    with (tmp_path / "rows.csv").open("w") as table:
        csv.writer(table).writerows([["image", "label"], *([name, "red"] for name in names)])
    for data, given in (
        (lines, {"columns": ["image=shot"], "keep": ["id"]}),
        (tmp_path / "rows.csv", {}),
    ):
        said = ask(
            trained,
            data,
            tmp_path / f"{data.suffix}.out",
            reading=Reading(everything=True, batch_size=5),
            **given,
        )
        for file, line in zip(files, said, strict=True):
            assert (line.get("row"), line.get("expected")) == (
                ({"id": 3}, None) if data == lines else (None, "red")
            )
            assert line["probabilities"] == pytest.approx(wanted[str(file)], abs=1e-6)
    one = ask(trained, files[-1], tmp_path / "one.jsonl")
    assert [line["probabilities"] for line in one] == [
        pytest.approx(wanted[str(files[-1])], abs=1e-6)
    ]


def test_a_picture_that_cannot_be_read_has_a_line_that_says_so(
    trained: Path, tmp_path: Path
) -> None:
    pictures.draw("red", 0).save(tmp_path / "red.png")
    whole = pictures.encode(pictures.draw("red", 0))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("a text")
    names = ["red.png", "cut.png", "text.png", "gone.png", "../red.png", "red.png"]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"image": name}) + "\n" for name in names))
    said = ask(trained, data, tmp_path / "said.jsonl", skips_bad=True)
    assert ["error" in line for line in said] == [False, True, True, True, True, False]
    assert [line["place"] for line in said] == [f"{data}:{at}" for at in range(1, 7)]
    for line, name in zip(said[1:5], names[1:5], strict=True):
        assert Path(name).name in line["error"]
    with pytest.raises(LoraError, match=r"rows.jsonl:2: .*cut.png"):
        ask(trained, data, tmp_path / "none.jsonl")
    assert not (tmp_path / "none.jsonl").exists()


def test_rows_on_stdin_name_no_files(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows in which folder they lie; in a file beside them they do."""
    pictures.draw("red", 0).save(tmp_path / "red.png")
    line = json.dumps({"image": "red.png"})
    stream = io.TextIOWrapper(io.BytesIO(line.encode()))
    monkeypatch.setattr("sys.stdin", stream)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraError, match=r"stdin:1: the row names red.png") as caught:
        ask(trained, Path("-"), tmp_path / "none.jsonl")
    assert caught.value.hint == "--data with a file of such rows in the folder of the pictures"
    (tmp_path / "rows.jsonl").write_text(line)
    [said] = ask(trained, tmp_path / "rows.jsonl", tmp_path / "said.jsonl")
    assert said["label"] in pictures.COLOURS


def test_a_text_is_no_picture(trained: Path) -> None:
    with pytest.raises(UsageError, match="--text"):
        predict([str(trained)], None, ["a red house"], None, None, [], Options())


def test_a_label_that_is_not_known_is_said_unless_labels_are_not_read(
    trained: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos" / "lilac").mkdir(parents=True)
    Image.new("RGB", (9, 9), (200, 160, 200)).save(tmp_path / "photos" / "lilac" / "1.png")
    with pytest.raises(LoraError, match=r"1.png: the label 'lilac' is not known; .* blue, green"):
        ask(trained, tmp_path / "photos", tmp_path / "none.jsonl")
    reading = Reading(with_labels=False)
    [line] = ask(trained, tmp_path / "photos", tmp_path / "said.jsonl", reading=reading)
    assert line["label"] in pictures.COLOURS


def test_which_split_of_a_folder_is_read_is_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    for split in ("train", "test"):
        pictures.write_folder(photos / split, 1)
    said = ask(trained, photos, tmp_path / "1")
    assert [f"{photos}/train" in line["place"] for line in said] == [True] * 3
    assert f"train is read, and not test: --data {photos}/test" in capsys.readouterr().err
    assert len(ask(trained, photos / "test", tmp_path / "2")) == 3
    assert "is read" not in capsys.readouterr().err
    (photos / "train").rename(photos / "val")
    with pytest.raises(LoraError, match="--data .* has no split 'train'; it has test, val") as no:
        ask(trained, photos, tmp_path / "3")
    assert no.value.hint == f"--data {photos}/test"
