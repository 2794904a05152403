"""A canary for a token: whatever lora does, it is in no file and no log; nor is the user's home
folder.

A run with checkpoints, check, merge, combine, convert, export, generate, verify and several errors,
with the canary in the environment and among the arguments. All that is in the folder, home and
cache is searched, and what was printed. Hermetic: the tiny model. Alone: pytest
tests/cli/test_secrets.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from lora_cli.gguf.tools import find_managed_home

ROOT = Path(__file__).parent.parent.parent

CANARY = "hf_canaryInTheCoalMine0123456789"
# One process for all commands, since importing takes longer than they do; it prints the exit
# statuses last
ALL = """
import json, sys
from lora_cli.cli import main
statuses = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["lora", *words]
    try:
        main()
    except SystemExit as end:
        statuses.append(end.code or 0)
print(json.dumps(statuses))
"""
NAMES = (
    "HF_TOKEN",
    "WANDB_API_KEY",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "GITHUB_TOKEN",
    "MY_PASSWORD",
)


def found(text: bytes, folder: Path) -> list[str]:
    """The files below `folder` that hold the text, in their names or their content."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    return [
        str(path.relative_to(folder))
        for path in files
        if text in path.read_bytes() or text.decode() in path.name
    ]


def test_no_secret_and_no_home_folder_is_in_any_file_or_log(tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "people" / "canaryowner"
    home.mkdir(parents=True)
    shutil.copytree(tiny / "model", home / "model")
    shutil.copy(tiny / "train.jsonl", home)
    recipe = (
        f"model: {{name_or_path: {home}/model}}\ndata: {{path: ~/train.jsonl, max_rows: 16}}\n"
        "training: {max_steps: 2, save_steps: 1, max_length: 128, per_device_train_batch_size: 2}\n"
        f"output_dir: {home}/run\n"
    )
    (home / "r.yaml").write_text(recipe)
    (home / "leak.yaml").write_text(f"{recipe}method: {CANARY}\n")
    secrets = {name: f"{CANARY}-{name}" for name in NAMES}
    cache = tmp_path / "cache" / "lora-cli"
    cache.mkdir(parents=True)
    (cache / find_managed_home().name).symlink_to(find_managed_home())
    calls = {
        "train r.yaml": 0,
        "check r.yaml": 0,
        "merge run/adapter out": 0,
        "combine run/adapter run/adapter both --weights 0.5,0.5": 0,
        "convert run/adapter small --r 2": 0,
        "export-gguf out -q f16": 0,
        "generate run/adapter out --prompt x --max-new-tokens 2": 0,
        "verify run/adapter out": 0,
        # errors, with the canary where somebody may type it
        f"train r.yaml --set training.hub_token={CANARY}": 2,
        f"train r.yaml --token {CANARY}": 2,
        f"train r.yaml --token={CANARY}": 2,
        f"train r.yaml --set model.name_or_path=https://me:{CANARY}@hf.co/a/b": 2,
        f"train r.yaml --set model.system_prompt={secrets['HF_TOKEN']}": 2,
        "train leak.yaml": 2,
    }
    done = subprocess.run(
        [sys.executable, "-c", ALL, json.dumps([call.split() for call in calls])],
        capture_output=True,
        text=True,
        cwd=home,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "HF_HUB_OFFLINE": "1",
            "LORA_CACHE_DIR": str(cache.parent), **secrets,
        },
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == list(calls.values()), done.stderr
    assert (home / "run" / "checkpoint-2").is_dir()
    assert "error: " in done.stderr
    assert CANARY not in done.stdout + done.stderr
    (home / "leak.yaml").unlink()
    # Trainer's own pickle in a checkpoint holds the token where a recipe gives one, which none can:
    # it is searched too
    assert not found(CANARY.encode(), tmp_path)

    # what stays on this machine: the cache, and checkpoints, which only resuming reads; the recipe
    # is the user's
    for folder in (tmp_path / "cache", home / "model", *(home / "run").glob("checkpoint-*")):
        shutil.rmtree(folder)
    (home / "r.yaml").unlink()
    assert not found(str(home).encode(), tmp_path)


def test_a_bug_is_reported_without_secrets(lora, tmp_path: Path) -> None:
    """A bug is made by a module that breaks at import: its traceback holds the home folder, its
    message the canary."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "sitecustomize.py").write_text(
        "import lora_cli.distributed.place\n"
        "def check(environment, **_):\n    raise AssertionError(environment['HF_TOKEN'])\n"
        "lora_cli.distributed.place.take_place = check\n"
    )
    environment = {
        "HOME": str(tmp_path),
        "HF_TOKEN": CANARY,
        "PYTHONPATH": f"{tmp_path / 'lib'}:{ROOT}",
    }
    done = lora("train", "r.yaml", env=environment, cwd=tmp_path)
    assert done.returncode == 70
    assert "AssertionError: ***" in done.stderr
    assert (
        f'File "~/{(tmp_path / "lib" / "sitecustomize.py").relative_to(tmp_path)}"' in done.stderr
    )
    assert str(tmp_path) not in done.stderr
    assert done.stderr.rstrip().endswith("Tokens and your home folder are left out above.")
    assert "This is a bug in lora" in done.stderr


def test_a_path_that_merely_contains_the_home_folder_s_is_read_back(
    tiny: Path, tmp_path: Path
) -> None:
    home = tmp_path / "user"
    for base in (Path(f"{tmp_path}/bak{home}"), tmp_path / "user2"):
        shutil.copytree(tiny / "model", base)
        out = tmp_path / f"run-{base.name}"
        (tmp_path / "r.yaml").write_text(
            f"model: {{name_or_path: {base}}}\ndata: {{path: {tiny}/train.jsonl, max_rows: 4}}\n"
            f"training: {{max_steps: 1, max_length: 64}}\noutput_dir: {out}\n"
        )
        calls = f"train r.yaml|merge {out}/adapter {out}-m|verify {out}/adapter {out}-m".split("|")
        done = subprocess.run(
            [sys.executable, "-c", ALL, json.dumps([call.split() for call in calls])],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home), "HF_HUB_OFFLINE": "1"},
        )
        assert json.loads(done.stdout.splitlines()[-1]) == [0, 0, 0], done.stderr
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base)


def test_a_recipe_with_a_secret_is_refused_with_its_place(lora, write_recipe) -> None:
    for text, place in (
        (f"run:\n  a: {CANARY}\n", "3: run.a"),
        (f"training:\n  run_name: x_{CANARY}\n", "3: training.run_name"),
        (f"lora:\n  {CANARY}: 1\n", "3: lora.***"),
        ("data:\n  path: postgres://me:hunter2@db/x\n", "3: data.path"),
    ):
        path = write_recipe(text)
        done = lora("train", path)
        assert done.returncode == 2
        assert f"{path.name}:{place} holds what looks like a" in done.stderr
        assert CANARY not in done.stderr
        assert "hunter2" not in done.stderr
    assert not (path.parent / "run").exists()
