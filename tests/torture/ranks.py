"""Kill -9 of a random process of several that train together, at random instants, inside saves too: all have ended soon, one message
says which it was, and the run goes on as the same run, bit for bit.

    python tests/torture/ranks.py [--kills 100] [--seed 0] [--processes 2] [--strategy ddp]

One run is killed again and again and resumed until it has been killed so often, then ends, and is compared with one that nobody
killed. Prints a line for each kill; exit 1 where something was wrong. Linux. Needs build/tiny (make test makes it).
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from safetensors.torch import load_file  # noqa: E402

from tests.distributed.jobs import Job, count_steps, write_recipe  # noqa: E402

SOON = 10.0
"""Seconds in which all must have ended."""
STEPS_EACH = 30
"""Steps that a kill is given room for: so many more are made for each."""


def kill_once(
    folder: Path, arguments: list[str], chance: random.Random, processes: int
) -> tuple[str, list[str]]:
    """Start the run, or go on with it, and kill one of its processes; return what was done, and what was wrong."""
    resume = ["--resume"] if (folder / "out" / "record.json").is_file() else []
    staged = ".lora-*.tmp/checkpoint-*"  # what is being saved, or was as another was killed
    steps, left = count_steps(folder / "out"), set((folder / "out").glob(staged))
    job = Job([*arguments, *resume])
    # the lines of steps after the checkpoint are dropped first
    job.wait_until(lambda: count_steps(folder / "out") not in (0, steps))
    inside = chance.random() < 0.3
    if inside:
        job.wait_until(lambda: bool(set((folder / "out").glob(staged)) - left))
    else:
        time.sleep(chance.random() * 0.5)
        job.wait_until(lambda: True)
    victim = chance.choice(["launcher", *range(processes)])
    steps = count_steps(folder / "out")
    process = job.process if victim == "launcher" else job.ranks[victim]
    process.kill()
    status, said, seconds = job.end()
    faults = []
    if seconds > SOON:
        faults.append(f"took {seconds:.1f} s to end")
    if "Traceback" in said:
        faults.append(f"a traceback: {said[-2000:]}")
    if victim != "launcher" and (status != 1 or said.count("error: ") != 1):
        faults.append(f"status {status}, said {said[-2000:]}")
    where = "in a save" if inside else f"at step {steps}"
    return f"{victim} killed {where}: all ended in {seconds:.1f} s", faults


def read_losses(folder: Path) -> list[float]:
    """Return the loss of each step."""
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return [each["loss"] for each in map(json.loads, lines) if "loss" in each]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategy", default="ddp")
    options = parser.parse_args()
    chance, wrong = random.Random(options.seed), 0
    root = Path(tempfile.mkdtemp(prefix="ranks-"))
    tiny, steps = ROOT / "build" / "tiny", options.kills * STEPS_EACH + 20
    folders = {name: root / name for name in ("killed", "whole")}
    commands = {}
    for name, folder in folders.items():
        folder.mkdir()
        recipe = write_recipe(folder, tiny, max_steps=steps, save_steps=3)
        strategy = f"distributed.strategy={options.strategy}"
        commands[name] = [
            "train",
            str(recipe),
            "--nproc",
            str(options.processes),
            "--set",
            strategy,
        ]
    for number in range(options.kills):
        done, faults = kill_once(folders["killed"], commands["killed"], chance, options.processes)
        wrong += bool(faults)
        print(f"{number + 1}: {done}", *faults, sep="; ", flush=True)
    for name, resume in (("killed", ["--resume"]), ("whole", [])):
        status, said, _ = Job([*commands[name], *resume]).end(120.0 + steps)
        if status:
            print(f"the {name} run ends with {status}: {said[-2000:]}")
            return 1
    tensors = [
        load_file(folder / "out" / "adapter" / "adapter_model.safetensors")
        for folder in folders.values()
    ]
    same = all((tensors[0][name] == tensors[1][name]).all() for name in tensors[1])
    same = same and read_losses(folders["killed"]) == read_losses(folders["whole"])
    print(
        f"{options.kills} kills, {wrong} faults; {steps} steps, {'bitwise equal' if same else 'ANOTHER RUN'}"
    )
    shutil.rmtree(root)
    return int(bool(wrong) or not same)


if __name__ == "__main__":
    sys.exit(main())
