"""What a person can get wrong with pictures, and the one message each gets. Compared with
bad_pictures.txt. What can be wrong with single pictures: tests/data/test_images.py.

Each case is a whole `lora check` in this process. Hermetic: random bases of two layers. Alone:
pytest tests/cli/test_bad_pictures.py. After a change of a message:
python -m tests.cli.test_bad_pictures > tests/cli/bad_pictures.txt
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file
from transformers import BitConfig, BitModel, MobileNetV2Config, MobileNetV2Model

from lora_cli import cli
from lora_cli.models import processor
from tests import pictures, snapshots

SNAPSHOT = Path(__file__).parent / "bad_pictures.txt"


def without_processor(base: Path) -> None:
    (base / processor.FILE).unlink()


def processor_with(**changed: object) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        file = base / processor.FILE
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))

    return change


def cut_off(base: Path) -> None:
    (base / processor.FILE).write_text('{"size": ')


def no_mapping(base: Path) -> None:
    (base / processor.FILE).write_text("[1]")


def without_means(base: Path) -> None:
    file = base / "model.safetensors"
    kept = {name: each for name, each in load_file(file).items() if "running_var" not in name}
    save_file(kept, file, {"format": "pt"})


def without_a_convolution(base: Path) -> None:
    file = base / "model.safetensors"
    kept = load_file(file)
    del kept[next(name for name in kept if "stages.0" in name and "convolution" in name)]
    save_file(kept, file, {"format": "pt"})


def grey(base: Path) -> None:
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_channels": 1}))
    weights = base / "model.safetensors"
    kept = load_file(weights)
    name = next(name for name in kept if "patch_embeddings.projection.weight" in name)
    kept[name] = kept[name][:, :1].contiguous()
    save_file(kept, weights, {"format": "pt"})


def deep(base: Path) -> None:
    shutil.rmtree(base)
    pictures.make_base(base, "resnet", hidden_sizes=[8] * 4, depths=[1] * 4)


def bit(base: Path) -> None:
    shape = {"embedding_size": 16, "hidden_sizes": [32, 32], "depths": [1, 1]}
    shutil.rmtree(base)
    BitModel(BitConfig(**shape, num_groups=4)).save_pretrained(base)
    pictures.save_processor(base)


def mobilenet(base: Path) -> None:
    shutil.rmtree(base)
    MobileNetV2Model(MobileNetV2Config(depth_multiplier=0.25, image_size=32)).save_pretrained(base)
    pictures.save_processor(base)


def as_they_are(base: Path) -> None:
    pass


Case = tuple[str, Callable[[Path], None], tuple[str, ...]]
BAD: dict[str, Case] = {
    # name: (the base's family, what is done to it, options)
    "no processor": ("vit", without_processor, ()),
    "a processor cut off": ("vit", cut_off, ()),
    "a processor that is no mapping": ("vit", no_mapping, ()),
    "a processor of no known kind": ("vit", processor_with(image_processor_type="Eyes"), ()),
    "pictures as they are": ("vit", processor_with(do_resize=False), ()),
    "the shorter side alone": ("vit", processor_with(size={"shortest_edge": 32}), ()),
    "pictures that fill the memory": ("vit", processor_with(
        size={"height": 100_000, "width": 100_000}), ()),
    "a cut of nothing": ("vit", processor_with(crop_pct=0.001), ()),
    "no deviation": ("vit", processor_with(image_std=[0, 0, 0]), ()),
    "another size than the base's": ("vit", processor_with(size={"height": 48, "width": 48}), ()),
    "a base of grey pictures": ("vit", grey, ()),
    "a base without its variances": ("resnet", without_means, ()),
    "a base without a layer": ("resnet", without_a_convolution, ()),
    "nothing for 4 bits": ("resnet", as_they_are, ("method=qlora",)),
    "nothing for 4 bits with DoRA": ("resnet", as_they_are, ("method=qdora",)),
    "convolutions of their own kind": ("bit", bit, ()),
    "convolutions that others look into": ("mobilenet", mobilenet, ()),
    "grouped convolutions": ("convnext", as_they_are, ("lora.target_modules=[encoder.stages.0.layers.0.dwconv]",)),
    "an embedding that is none": ("vit", as_they_are, ("lora.target_modules=[patch_embeddings]",)),
    "a start that is not defined": ("resnet", as_they_are, ("lora.init_lora_weights=pissa",)),
    "rows of tokens": ("vit", as_they_are, ("lora.trainable_token_indices=[1]",)),
    "added tokens": ("vit", as_they_are, ("model.add_tokens=[x]",)),
    "a length": ("vit", as_they_are, ("training.max_length=128",)),
    "groups by length": ("vit", as_they_are, ("training.train_sampling_strategy=group_by_length",)),
    "packing": ("vit", as_they_are, ("training.packing=step",)),
    "a chat template": ("vit", as_they_are, ("model.chat_template=chatml",)),
    "a format of texts": ("vit", as_they_are, ("data.format=labelled",)),
    "texts": ("vit", as_they_are, ("data.path=DIR/texts.csv",)),
    "rows without labels": ("vit", as_they_are, ("data.path=DIR/names.csv",)),
    "a label that is not known": ("vit", as_they_are, ("model.labels=[blue, gren, red]",)),
    "one picture at a time": ("resnet", deep, ("training.per_device_train_batch_size=1",)),
    "one picture left": ("resnet", deep, ("training.per_device_train_batch_size=17",)),
    "a base of texts": ("text", as_they_are, ()),
    "pictures for texts": ("vit", as_they_are, ("task=sequence_classification",)),
    "pictures for writing": ("vit", as_they_are, ("task=causal_lm",)),
    "no Pillow": ("vit", as_they_are, ()),
}  # fmt: skip


@cache
def shared() -> Path:
    """Bases and rows that are made once."""
    folder = Path(tempfile.mkdtemp()).resolve()
    for family in pictures.FAMILIES:
        pictures.make_base(folder / family, family)
    pictures.make_base(folder / "mobilenet", "vit")
    pictures.make_base(folder / "bit", "vit")
    (folder / "text").mkdir()
    shape = {"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 1}
    (folder / "text" / "config.json").write_text(json.dumps(shape))
    pictures.write_folder(folder / "photos", 6)
    (folder / "texts.csv").write_text("text,label\nx,red\ny,blue\n")
    (folder / "names.csv").write_text("image\nphotos/red/0.png\n")
    return folder


def said(name: str, folder: Path) -> str:
    """What `lora check` says, beside what it reads and chooses."""
    family, change, options = BAD[name]
    base = folder / "base"
    shutil.copytree(shared() / family, base)
    change(base)
    (folder / "r.yaml").write_text(
        f"task: image_classification\nmodel:\n  name_or_path: {base}\n"
        f"data:\n  path: {shared() / 'photos'}\noutput_dir: {folder / 'out'}\n"
    )
    given = [str(each).replace("DIR", str(shared())) for each in options]
    arguments = ["check", str(folder / "r.yaml"), *(part for o in given for part in ("--set", o))]
    with contextlib.ExitStack() as stack:
        out, heard = io.StringIO(), io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(heard))
        stack.enter_context(mock.patch.object(sys, "argv", ["lora", *arguments]))
        if name == "no Pillow":
            stack.enter_context(mock.patch.object(processor, "find_spec", lambda _: None))
        processor.find_picture_shape.cache_clear()
        with pytest.raises(SystemExit) as ended:
            cli.main()
    lines = [line for line in heard.getvalue().splitlines() if line and line[0] != " "]
    text = "\n".join([*lines, f"[{ended.value.code}]"])
    return text.replace(f"{folder}/", "").replace(f"{shared()}/", "")


def test_the_snapshot_covers_every_case() -> None:
    assert len(BAD) >= 35
    assert snapshots.list_names(SNAPSHOT) == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_of_bad_pictures(name: str, tmp_path: Path) -> None:
    found = said(name, tmp_path.resolve())
    assert found == snapshots.find(SNAPSHOT, name)
    assert found.startswith("error: ")


if __name__ == "__main__":
    os.environ["LORA_CACHE_DIR"] = tempfile.mkdtemp()
    sys.stdout.write(snapshots.render(BAD, said))
