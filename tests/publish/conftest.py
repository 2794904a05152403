"""Fixtures of the tests of publish: a loopback hub with a base, and what lora made of it there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.hub import LoopbackHub
from tests.warm import WarmCLI

BASE = "org/base"
TOKEN = "hf_" + "canaryToken" * 3
KEY = "canary-key-7f3a-of-a-service"
ROW = "canary row 5d81 that nobody may read"


class Place(NamedTuple):
    """A hub, a command line that asks it, and the folder with what was made."""

    hub: LoopbackHub
    cli: WarmCLI
    folder: Path

    def run(self, *words: object, **given):
        return self.cli.run([str(word) for word in words], self.folder, **given)


@pytest.fixture(scope="session")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A run, a merged model and a GGUF, made by commands from rows with a canary in each, in a home
    folder whose name is one, with secrets in the environment."""
    home = tmp_path_factory.mktemp("canary-home")
    folder = home / "work"
    folder.mkdir()
    rows = [{"prompt": f"{ROW} {number}", "completion": "map"} for number in range(8)]
    (folder / "private").mkdir()
    (folder / "private" / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "recipe.yaml").write_text(
        f"model: {{name_or_path: {BASE}}}\n"
        "data: {path: private/rows.jsonl}\n"
        "training: {max_steps: 3, per_device_train_batch_size: 4, learning_rate: 1e-2}\n"
        "output_dir: runs/canary\n"
    )
    served = tmp_path_factory.mktemp("served") / "base"
    served.mkdir()
    for file in (tiny / "model").iterdir():
        (served / file.name).write_bytes(file.read_bytes())
    (served / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base\n")
    with LoopbackHub() as hub:
        hub.add_model(BASE, {"main": served})
        environ = {**hub.environ(tmp_path_factory.mktemp("hf")), "HF_TOKEN": TOKEN}
        environ |= {"HOME": str(home), "SERVICE_API_KEY": KEY}
        cli = WarmCLI(environ)
        made = Place(hub, cli, folder)
        for words in (
            ("train", "recipe.yaml"),
            ("merge", "runs/canary/adapter", "runs/canary/merged"),
            ("export-gguf", "runs/canary/merged"),
        ):
            done = made.run(*words)
            assert done.returncode == 0, done.stderr
        yield made
        cli.close()
