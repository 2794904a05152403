"""A canary for a token: whatever lora does, it is in no file and no log; nor is the user's home folder.

A run with checkpoints, merge, combine, convert, export, generate, check and several errors, each a process of its own,
with the canary in the environment and among the arguments. All that is in the folder, home and cache is searched, and
all that was printed. Hermetic: the tiny model. Alone: pytest tests/e2e/test_secrets.py
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

CANARY = "hf_canaryInTheCoalMine0123456789"
NAMES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "MY_PASSWORD")


def found(text: bytes, folder: Path) -> list[str]:
    """The files below `folder` that hold the text, in their names or their content."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    return [str(path.relative_to(folder)) for path in files if text in path.read_bytes() or text.decode() in path.name]


def test_no_secret_and_no_home_folder_is_in_any_file_or_log(lora, tiny: Path, tmp_path: Path) -> None:
    home = tmp_path / "people" / "canaryowner"
    home.mkdir(parents=True)
    shutil.copytree(tiny / "model", home / "model")
    shutil.copy(tiny / "train.jsonl", home)
    (home / "r.yaml").write_text(
        f"model: {{name_or_path: {home}/model}}\ndata: {{path: ~/train.jsonl, max_rows: 16}}\n"
        "training: {max_steps: 2, save_steps: 1, max_length: 128, per_device_train_batch_size: 2}\n"
        f"output_dir: {home}/run\n"
    )
    secrets = {name: f"{CANARY}-{name}" for name in NAMES}
    environment = {"HOME": str(home), "HF_HUB_OFFLINE": "1", "LORA_CACHE_DIR": str(tmp_path / "cache"), **secrets}
    printed = []

    def run(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = lora(*arguments, env=environment, cwd=home)
        assert done.returncode == status, done.stderr
        printed.append(done.stdout + done.stderr)
        return done

    run("train", "r.yaml")
    assert (home / "run" / "checkpoint-2").is_dir()
    run("check", "r.yaml")
    run("merge", "run/adapter", "out")
    run("combine", "run/adapter", "run/adapter", "both", "--weights", "0.5,0.5")
    run("convert", "run/adapter", "small", "--r", "2")
    run("generate", "run/adapter", "out", "--prompt", "x", "--max-new-tokens", "2")
    run("verify", "run/adapter", "out")
    # errors, with the canary where somebody may type it
    run("train", "r.yaml", "--set", f"training.hub_token={CANARY}", status=2)
    run("train", "r.yaml", "--token", CANARY, status=2)
    run("train", "r.yaml", f"--token={CANARY}", status=2)
    run("train", "r.yaml", "--set", f"model.name_or_path=https://me:{CANARY}@hf.co/a/b", status=1)
    run("train", "r.yaml", "--set", f"model.system_prompt={secrets['HF_TOKEN']}", status=2)
    (home / "leak.yaml").write_text((home / "r.yaml").read_text() + f"method: {CANARY}\n")
    run("train", "leak.yaml", status=2)
    (home / "leak.yaml").unlink()
    everything = "".join(printed)
    assert "error: " in everything
    assert CANARY not in everything
    assert not found(CANARY.encode(), tmp_path)

    # what stays on this machine: the cache, and checkpoints, which only resuming reads; the recipe is the user's
    shutil.rmtree(tmp_path / "cache")
    (home / "r.yaml").unlink()
    shutil.rmtree(home / "model")
    for checkpoint in (home / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert not found(str(home).encode(), tmp_path)


def test_a_bug_is_reported_without_secrets(lora, tmp_path: Path) -> None:
    """A bug is made by a module that breaks at import: its traceback holds the home folder, its message the canary."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "sitecustomize.py").write_text(
        "import lora_cli.launcher\n"
        "def check(environment):\n    raise AssertionError(environment['HF_TOKEN'])\n"
        "lora_cli.launcher.check = check\n"
    )
    root = Path(__file__).parent.parent.parent
    environment = {"HOME": str(tmp_path), "HF_TOKEN": CANARY, "PYTHONPATH": f"{tmp_path / 'lib'}:{root}"}
    done = lora("train", "r.yaml", env=environment, cwd=tmp_path)
    assert done.returncode == 70
    assert "AssertionError: ***" in done.stderr
    assert f'File "~/{(tmp_path / "lib" / "sitecustomize.py").relative_to(tmp_path)}"' in done.stderr
    assert str(tmp_path) not in done.stderr
    assert done.stderr.rstrip().endswith("Tokens and your home folder are left out above.")
    assert "This is a bug in lora" in done.stderr
