"""Time of a whole `lora train` of one step on the tiny model, its rows cached, against importing
its libraries.

    python scripts/bench_startup.py [--repeat 5]

Both are processes of their own, one after the other. The first step is over before the process is:
what it takes to save the adapter is in the time as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTS = "import torch, transformers, peft, datasets, bitsandbytes; from trl import SFTTrainer"


def seconds(command: list[str]) -> float:
    """Wall time of a process that succeeds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    """Alternate the two after a warm-up of each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    imports, runs = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_CACHE_DIR"] = f"{folder}/cache"
        recipe = Path(folder) / "r.yaml"
        tiny = ROOT / "build" / "tiny"
        for number in range(repeat + 1):
            recipe.write_text(
                f"method: lora\noutput_dir: {folder}/run{number}\nmodel: "
                f"{{name_or_path: {tiny / 'model'}}}\n"
                f"data: {{path: {tiny / 'train.jsonl'}}}\ntraining: "
                f"{{max_steps: 1, save_strategy: 'no'}}\n"
            )
            imports.append(seconds([sys.executable, "-c", IMPORTS]))
            runs.append(seconds([sys.executable, "-m", "lora_cli", "train", str(recipe)]))
    first, second = (statistics.median(each[1:]) for each in (imports, runs))
    print(
        f"importing {first:.2f} s, lora train of one step {second:.2f} s: {second / first:.2f} "
        "times"
    )


if __name__ == "__main__":
    main()
