"""Speed of `lora train` on a quiet and on a busy machine, by how OpenMP's threads wait.

    python scripts/bench_threads.py --model FOLDER --data ROWS.jsonl [--steps 3] [--rounds 2]

Every side is a process of its own, in turn: OpenMP's own default, `lora` as it is, waiting at rest
(OMP_WAIT_POLICY=PASSIVE), one thread. Then the same beside a process for each core that counts.
Printed are tokens per second of the steps after the first, and ratios to the default's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# libgomp's own count, since naming any keeps lora from setting one
DEFAULT = {"GOMP_SPINCOUNT": "300000"}
SIDES: dict[str, dict[str, str]] = {
    "OpenMP's default": DEFAULT,
    "lora": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def busy(num: int) -> Iterator[None]:
    """Keep `num` processes counting."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    try:
        yield
    finally:
        for each in others:
            each.kill()
            each.wait()


def measure(model: str, rows: str, steps: int, environ: dict[str, str]) -> float:
    """Tokens per second of a run's steps after the first."""
    ours = {"OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "r.yaml"
        recipe.write_text(
            f"extends: gsm8k\noutput_dir: {folder}/run\nmodel: {{name_or_path: {model}}}\n"
            f"data: {{path: {rows}, max_rows: 200}}\ntraining: {{max_steps: {steps}, "
            "gradient_accumulation_steps: 1, logging_steps: 1, save_strategy: 'no'}\n"
        )
        command = [sys.executable, "-m", "lora_cli", "train", str(recipe)]
        subprocess.run(command, check=True, capture_output=True, env=kept | environ)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    speeds = [row["tokens_per_second"] for row in map(json.loads, lines) if row.get("loss")]
    return statistics.median(speeds[1:])


def main() -> None:
    """Measure each side in turn, on the machine as it is and beside a process for each core."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--spins", help="also these GOMP_SPINCOUNTs, separated by commas")
    options = parser.parse_args()
    sides = dict(SIDES)
    for spins in (options.spins or "").split(","):
        if spins:
            sides[f"{spins} spins"] = {"GOMP_SPINCOUNT": spins}
    for num in (0, os.cpu_count() or 1):
        print(f"beside {num} busy processes" if num else "on the machine as it is")
        found: dict[str, list[float]] = {side: [] for side in sides}
        with busy(num):
            for _ in range(options.rounds):
                for side, environ in sides.items():
                    speed = measure(options.model, options.data, options.steps, environ)
                    found[side].append(speed)
        first = statistics.median(found["OpenMP's default"])
        for side, speeds in found.items():
            middle = statistics.median(speeds)
            listed = " ".join(f"{speed:.0f}" for speed in speeds)
            print(f"  {side:18} {middle:8.1f} tokens/s  {middle / first:5.2f}  ({listed})")


if __name__ == "__main__":
    main()
