"""kill -9 at random instants, half of them inside a save: every run resumes, and ends with the same
bytes as one that was left alone.

    python tests/torture/kill.py [--kills 500] [--seed 0] [--methods lora qlora dora qdora]

Children are forked from a process that holds the imports already. Each run is killed a few times,
resumed each time by `train(..., resume=True)`, and then left to end; adapter and metrics.jsonl are
compared. Exit 1 at the first difference, or at the first resumption that fails. Needs build/tiny
(make test makes it).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402, F401

from lora_cli.recipe import load  # noqa: E402
from lora_cli.train import run as train  # noqa: E402
from lora_cli.train.resume import Resumable  # noqa: E402

METHODS = ["lora", "qlora", "dora", "qdora"]
PER_RUN = 4
"""Kills before a run is left to end."""
STEPS = 6


class Ending(NamedTuple):
    """How a child ended: killed inside a save, killed elsewhere, or by itself."""

    status: int
    inside: bool
    seconds: float


def write_recipe(folder: Path, method: str, run: str) -> Path:
    """A recipe of STEPS steps with a checkpoint after each."""
    tiny, path = ROOT / "build" / "tiny", folder / f"{method}-{run}.yaml"
    path.write_text(
        f"method: {method}\nmodel: {{name_or_path: {tiny / 'model'}}}\n"
        f"data: {{path: {tiny / 'train.jsonl'}, max_rows: 12, eval_path: {tiny / 'eval.jsonl'}, "
        "eval_split: 'train[:4]'}\nlora: {r: 2, lora_dropout: 0.1}\n"
        f"training: {{max_steps: {STEPS}, per_device_train_batch_size: 4, learning_rate: 1e-2, max_length: 64, "
        "save_strategy: steps, save_steps: 1, logging_steps: 2, gradient_accumulation_steps: 1}\n"
        f"output_dir: {folder / f'{method}-{run}'}\n"
    )
    return path


def child(path: Path, pipe: int, log: Path) -> None:
    """Train or resume, telling the parent of each save as it begins and ends."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    save = Resumable._save_checkpoint

    def told(self: Any, *args: Any) -> None:
        os.write(pipe, b"(")
        save(self, *args)
        os.write(pipe, b")")

    Resumable._save_checkpoint = told  # type: ignore[method-assign]
    recipe = load.load_recipe(path)
    train.train(recipe, resume=(Path(recipe.output_dir) / "record.json").is_file())


def run(path: Path, log: Path, save: int | None = None, delay: float | None = None) -> Ending:
    """A child's life: killed `delay` seconds after its start, or after its save number `save` has
    begun."""
    reading, writing = os.pipe()
    began = time.monotonic()
    process = os.fork()
    if not process:
        status = 1
        try:
            os.close(reading)
            child(path, writing, log)
            status = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(status)
    os.close(writing)
    heard, deadline = b"", None if save is not None or delay is None else began + delay
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            os.kill(process, signal.SIGKILL)
            deadline = None
            continue
        said = os.read(reading, 100)
        if not said:
            break
        heard += said
        if save is not None and deadline is None and heard.count(b"(") == save:
            deadline = time.monotonic() + (delay or 0.0)
    os.close(reading)
    status = os.waitpid(process, 0)[1]
    return Ending(os.waitstatus_to_exitcode(status), heard[-1:] == b"(", time.monotonic() - began)


def result(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The adapter's bytes, and metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("runtime", "per_second", "peak_memory")
    kept = [
        {key: value for key, value in line.items() if not any(word in key for word in timed)}
        for line in lines
    ]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), kept


def torture(folder: Path, method: str, kills: int, draw: random.Random) -> Counter[str]:
    """Kill runs of `method` until there were so many kills; SystemExit where one is not what it
    should be."""
    counts: Counter[str] = Counter()
    whole, log = write_recipe(folder, method, "whole"), folder / "log"
    first = run(whole, log)  # prepares the rows
    shutil.rmtree(folder / f"{method}-whole")
    alone = run(whole, log)
    if first.status or alone.status:
        sys.exit(f"{method}: the run that is left alone failed:\n{log.read_text()}")
    expected, length = result(folder / f"{method}-whole"), alone.seconds
    number = 0
    while counts["kills"] < kills:
        number += 1
        path, target = write_recipe(folder, method, str(number)), folder / f"{method}-{number}"
        for _ in range(PER_RUN):
            inside = draw.random() < 0.5 + 0.5 * (counts["inside a save"] < counts["kills"] / 2)
            if inside:
                ending = run(path, log, draw.randint(1, 3), draw.uniform(0, 0.06))
            else:
                ending = run(path, log, None, draw.uniform(0, length))
            if ending.status == 0:
                counts["ended before the kill"] += 1
                length = min(length, ending.seconds)  # the machine had been busier
                break
            if ending.status != -signal.SIGKILL:
                sys.exit(f"{method}, run {number} did not resume:\n{log.read_text()}")
            counts["kills"] += 1
            counts["inside a save"] += ending.inside
        if ending.status != 0:
            last = run(path, log)
            if last.status:
                sys.exit(f"{method}, run {number} did not resume:\n{log.read_text()}")
        counts["runs compared"] += 1
        if result(target) != expected:
            sys.exit(f"{method}, run {number}: another result in {target}")
        shutil.rmtree(target)
    return counts


def main() -> None:
    """Print a line per method, and the sum."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--kills", type=int, default=500)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--methods", nargs="+", default=METHODS)
    given = options.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    gc.collect()
    gc.freeze()
    draw, total = random.Random(given.seed), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="kill-") as folder:
        os.environ["LORA_CACHE_DIR"] = f"{folder}/cache"
        for method in given.methods:
            began = time.monotonic()
            counts = torture(Path(folder), method, -(-given.kills // len(given.methods)), draw)
            total += counts
            print(f"{method:6} {dict(counts)} in {time.monotonic() - began:.0f} s", flush=True)
    print(f"all resumed, all bitwise equal: {dict(total)}")


if __name__ == "__main__":
    main()
