"""Memory of a long run: what the process holds after its first steps may grow by no more than a few
megabytes.

    python tests/torture/rss.py [--steps 20000] [--after 1000] [--mib 5]

A run of the tiny model with records, evaluations and checkpoints; resident memory is read every
`after` steps. Exit 1 where it grows beyond `mib` after the first reading. Needs build/tiny (make
test makes it).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from lora_cli.recipe import load  # noqa: E402
from lora_cli.train import run  # noqa: E402
from lora_cli.train.progress import Watch  # noqa: E402


def readings(steps: int, after: int) -> list[float]:
    """Resident MiB after each `after` steps of a run."""
    found, process, inner = list[float](), psutil.Process(), Watch.on_step_end

    def read(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        inner(self, args, state, control, **kwargs)
        if state.global_step % after == 0:
            found.append(process.memory_info().rss / 2**20)
            print(f"step {state.global_step}: {found[-1]:.1f} MiB", flush=True)

    Watch.on_step_end = read  # type: ignore[method-assign]
    tiny = ROOT / "build" / "tiny"
    with tempfile.TemporaryDirectory(prefix="rss-") as folder:
        os.environ["LORA_CACHE_DIR"] = f"{folder}/cache"
        path = Path(folder) / "recipe.yaml"
        path.write_text(
            f"model: {{name_or_path: {tiny / 'model'}}}\noutput_dir: {folder}/run\nlora: {{r: 2}}\n"
            f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 64, eval_path: {tiny / 'eval.jsonl'}, "
            "eval_split: 'train[:8]'}\n"
            f"training: {{max_steps: {steps}, per_device_train_batch_size: 2, max_length: 64, logging_steps: 10, "
            f"save_strategy: steps, save_steps: {after // 2}, eval_strategy: steps, "
            f"eval_steps: {after // 2}}}\n"
        )
        run.train(load.load_recipe(path))
    Watch.on_step_end = inner  # type: ignore[method-assign]
    return found


def main() -> None:
    """Print each reading and the growth after the first."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=20_000)
    options.add_argument("--after", type=int, default=1_000)
    options.add_argument("--mib", type=float, default=5.0)
    given = options.parse_args()
    torch.set_num_threads(1)
    found = readings(given.steps, given.after)
    growth = max(found) - found[0]
    print(f"{given.steps} steps: {growth:+.1f} MiB after the first {given.after}")
    sys.exit(growth > given.mib)


if __name__ == "__main__":
    main()
