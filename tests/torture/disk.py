"""A disk that fills at every file boundary of a checkpoint: the checkpoints before stay usable, one
message, and with room again the run ends as the one that had it all along.

    python tests/torture/disk.py

Needs Linux, and root or user namespaces: a small tmpfs is mounted, and a ballast file leaves
exactly as much room as the files up to the boundary take. Needs build/tiny (make test makes it).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
PAGE = 4096
SIZE = 64 << 20


def pages(path: Path) -> int:
    """Bytes of tmpfs that a file takes."""
    return -(-path.stat().st_size // PAGE) * PAGE


def boundaries(checkpoint: Path) -> list[int]:
    """Room after each file of a checkpoint, in the order they were written, and amid each of more
    than a page."""
    room, found = 0, [0]
    for path in sorted(
        (path for path in checkpoint.iterdir()), key=lambda path: path.stat().st_mtime_ns
    ):
        size = pages(path)
        found += [room + size // 2 // PAGE * PAGE] if size > PAGE else []
        room += size
        found.append(room)
    return sorted(set(found))


def main() -> None:
    """Print how many boundaries were tried; AssertionError at the first that is not as it should
    be."""
    if os.environ.get("TORTURE_MOUNTED") != "1":
        mount = [
            "unshare",
            "--mount",
            *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
        ]
        again = [*mount, sys.executable, __file__]
        sys.exit(subprocess.run(again, env={**os.environ, "TORTURE_MOUNTED": "1"}).returncode)
    with tempfile.TemporaryDirectory(prefix="disk-") as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
        try:
            torture(Path(folder))
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def torture(folder: Path) -> None:
    """Fill the file system before the last step's checkpoint, for each boundary."""
    import torch

    from lora_cli.common import files
    from lora_cli.common.errors import LoraError
    from lora_cli.recipe import load
    from lora_cli.train import checkpoints, disk_space
    from lora_cli.train import run as train

    torch.set_num_threads(1)
    tiny, path, run = ROOT / "build" / "tiny", folder / "recipe.yaml", folder / "run"
    path.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\noutput_dir: {run}\nlora: {{r: 2, lora_dropout: 0.1}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 8}}\n"
        "training: {max_steps: 3, per_device_train_batch_size: 2, max_length: 64, save_strategy: steps, "
        "save_steps: 1}\n"
    )
    recipe = load.load_recipe(path)
    adapter = train.train(recipe)
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    record = files.read_json(run / "record.json")
    rooms = boundaries(run / "checkpoint-3")
    rooms.append(rooms[-1] + pages(adapter / "adapter_model.safetensors") // 2)
    before = 0
    shutil.rmtree(run / "checkpoint-3")
    shutil.rmtree(adapter)
    files.write_json(run / "record.json", {**record, "status": "running"})
    kept = folder / "kept"
    run.rename(kept)
    check, disk_space.refuse_too_little = (
        disk_space.refuse_too_little,
        lambda *_: None,
    )  # which refuses such a disk before the run
    for room in rooms:
        shutil.copytree(kept, run)
        ballast, free = folder / "ballast", shutil.disk_usage(folder).free
        # metrics.jsonl is written anew, record.json and recipe.yaml too, before the checkpoint is
        ballast.write_bytes(b"\0" * max(0, free - room - 4 * PAGE))
        try:
            train.train(recipe, resume=True)
            raise AssertionError(f"{room} bytes were enough")
        except LoraError as error:
            assert "MB are missing" in error.message, error.message
        left = checkpoints.find_newest(run, record["id"])
        assert left is not None and left.step >= 2  # 3 where it was the adapter that did not fit
        before += left.step == 2
        assert not list(run.glob("*.tmp"))
        ballast.unlink()
        adapter = train.train(recipe, resume=True)
        assert (adapter / "adapter_model.safetensors").read_bytes() == whole
        shutil.rmtree(run)
    disk_space.refuse_too_little = check
    assert before > len(rooms) / 2
    print(
        f"{len(rooms)} boundaries: each told in one message, {before} resumed from the checkpoint before and the rest"
    )
    print("from the last, where the adapter did not fit; all bitwise equal")


if __name__ == "__main__":
    main()
