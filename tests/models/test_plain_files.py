"""Folders of others: nothing but plain files inside them is opened or copied, and a pipe keeps nobody waiting.

Hermetic. Each case has a deadline, for what would hang. Alone: pytest tests/models/test_plain_files.py
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from lora_cli.common import LoraError, files, plain_files
from lora_cli.data import cache, sources
from lora_cli.gguf import imatrix, modelfile
from lora_cli.models import Base, read_adapter
from lora_cli.recipe import Data, load

SECRET = "nobody else may read this"


@pytest.fixture(autouse=True)
def deadline() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(SECRET)
    return path


def bind(path: Path) -> None:
    """A socket of that name, which may be longer than an address."""
    here = Path.cwd()
    os.chdir(path.parent)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def link_out(path: Path) -> None:
    path.symlink_to(path.parents[1] / "secret")


def link_out_and_back(path: Path) -> None:
    """By a link inside that leads out."""
    (path.parent / "hop").symlink_to(path.parents[1])
    path.symlink_to("hop/secret")


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (os.mkfifo, "is a pipe, not a file"),
    "a socket": (bind, "is a socket, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a link out of its folder"),
    "a link out": (link_out, "is a link out of its folder"),
    "a link to nothing": (lambda path: path.symlink_to("../none"), "is a link out of its folder"),
    "two links": (link_out_and_back, "is a link out of its folder"),
}
IN_A_BASE = [
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "chat_template.jinja", "generation_config.json", "additional_chat_templates/tool_use.jinja",
    "lora_record.json", "adapter_config.json",
]  # fmt: skip


@pytest.mark.parametrize("kind", ODD)
def test_a_base_with_odd_files_is_refused_before_it_is_opened(
    kind: str, tiny: Path, tmp_path: Path, secret: Path
) -> None:
    make, said = ODD[kind]
    for name in IN_A_BASE:
        if "/" in name and kind in ("a link out", "a link to nothing", "two links"):
            continue  # a folder deeper
        folder = tmp_path / "base"
        shutil.copytree(tiny / "model", folder)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(LoraError, match=said):
            Base(str(folder))
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    made = get_peft_model(Base(str(tiny / "model")).load(), config)
    made.peft_config["default"].base_model_name_or_path = str(tiny / "model")
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    made.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("kind", ODD)
def test_an_adapter_with_odd_files_is_refused_before_it_is_opened(
    kind: str, adapter: Path, tmp_path: Path, secret: Path
) -> None:
    make, said = ODD[kind]
    names = ["adapter_config.json", "adapter_model.safetensors", "lora_record.json", "tokenizer.json", "probes.safetensors"]  # fmt: skip
    for name in names:
        folder = tmp_path / "adapter"
        shutil.copytree(adapter, folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        # where there is no plain file of the name, an adapter lacks it
        with pytest.raises(LoraError, match=rf"{said}|has no adapter_"):
            read_adapter(folder)
        shutil.rmtree(folder)


def test_links_of_the_user_and_of_the_hub_s_cache_are_followed(
    tiny: Path, adapter: Path, tmp_path: Path
) -> None:
    """As huggingface_hub lays them: blobs, and snapshots of links to them."""
    (tmp_path / "mine").symlink_to(tiny / "model")
    assert Base(str(tmp_path / "mine")).load_tokenizer()
    inside = tmp_path / "inside"
    shutil.copytree(tiny / "model", inside)
    (inside / "config.json").rename(inside / "real.json")
    (inside / "config.json").symlink_to("real.json")
    assert Base(str(inside)).config
    for made, source in (("models--a--b", tiny / "model"), ("models--c--d", adapter)):
        blobs, snapshot = tmp_path / made / "blobs", tmp_path / made / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        shutil.copytree(source, blobs)
        for path in blobs.iterdir():
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
        assert Base(str(snapshot)).load_tokenizer() if source != adapter else read_adapter(snapshot)
        (snapshot / "README.md").unlink(missing_ok=True)
        (snapshot / "README.md").symlink_to("../../../secret")
        with pytest.raises(LoraError, match="is a link out of its folder"):
            Base(str(snapshot)) if source != adapter else read_adapter(snapshot)


def test_data_run_cache_matrix_and_modelfile_that_are_pipes_keep_nobody_waiting(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], secret: Path
) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    for make in (os.mkfifo, link_out):
        make(rows / "train.jsonl")
        with pytest.raises(LoraError, match=r"train\.jsonl is a "):
            sources.find_source(Data(path=str(rows)), "path", str(rows), "train")
        (rows / "train.jsonl").unlink()
    os.mkfifo(rows / "counts.json")
    encoder: Any = None  # it is not asked for what is refused
    assert cache.read(rows, encoder, Data(path=str(rows))) is None
    assert "are damaged" in capsys.readouterr().err
    rows.mkdir(exist_ok=True)
    os.mkfifo(rows / "matrix.gguf")
    with pytest.raises(LoraError, match="is a pipe"):
        imatrix.refuse_missing_file(str(rows / "matrix.gguf"))
    os.mkfifo(rows / "Modelfile")
    modelfile.write_modelfile(rows, [], tiny / "model")
    assert "is not ours and was left" in capsys.readouterr().err
    for name in ("r.yaml", "extended.yaml"):
        os.mkfifo(rows / name)
        with pytest.raises(LoraError, match="is a pipe"):
            load.load_recipe(rows / name)
    for odd in ("/dev/zero", "/dev/stdin"):
        with pytest.raises(LoraError, match="is a "):
            plain_files.read_small(Path(odd))


def test_a_run_with_odd_files_is_not_resumed(tiny: Path, tmp_path: Path, secret: Path) -> None:
    from lora_cli.train.run import train

    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\ndata: {{path: {tiny / 'train.jsonl'}}}\n"
        f"training: {{max_steps: 1}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    for name in ("record.json", "metrics.jsonl", "checkpoint-1/manifest.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True)
        os.mkfifo(tmp_path / "run" / name)
        with pytest.raises(LoraError, match="is a pipe"):
            train(load.load_recipe(recipe), resume=True)
        shutil.rmtree(tmp_path / "run")


def test_a_small_file_is_read_within_its_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("ä" * 10)
    assert plain_files.read_small(tmp_path / "file", 20) == "ä" * 10
    with pytest.raises(LoraError, match="too large: 20 bytes, and at most 19"):
        plain_files.read_small(tmp_path / "file", 19)
    with pytest.raises(LoraError, match="is a folder"):
        files.read_json(tmp_path)
