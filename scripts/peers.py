"""Other command lines of fine-tuning beside `lora train`, whole processes: what `bench_train.py
--peers ENV` runs.

Each tool that is installed in the environments trains on the same rows (`--data FILE` as
bench_train.py takes it, or made ones spelt out as text), for the same steps, with its own defaults
for all else; once on all rows and once on those of a single step. Tokens of the questions and
answers, as the tiny model's tokenizer has them, by the difference of the two runs' times: starting
and loading are in neither.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

Command = Callable[[Path, Path, int, argparse.Namespace], list[str | Path]]
"""The arguments of a run: the environment's `bin`, the folder of a run, the rows of a step, the
options."""


class Spent(NamedTuple):
    """Seconds of a process and its children."""

    cpu: float
    wall: float


def lora(_: Path, folder: Path, step_rows: int, options: argparse.Namespace) -> list[str | Path]:
    """This checkout's, with a recipe that says nothing of speed."""
    recipe = {
        "method": "lora",
        "output_dir": str(folder / "run"),
        "model": {"name_or_path": str(folder / "model")},
        "lora": {"r": options.rank, "lora_alpha": 2 * options.rank},
        "data": {"path": str(folder / "data" / "rows.jsonl"), "on_long_row": "truncate"},
        "training": {
            "per_device_train_batch_size": step_rows,
            "max_length": options.max_length,
            "save_strategy": "no",
        },
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "lora_cli", "train", folder / "r.yaml"]


def trl(
    binaries: Path, folder: Path, step_rows: int, options: argparse.Namespace
) -> list[str | Path]:
    """TRL's command line."""
    return [
        *(
            binaries / "trl",
            "sft",
            "--model_name_or_path",
            folder / "model",
            "--dataset_name",
            folder / "data",
        ),
        *("--output_dir", folder / "run", "--use_peft", "--lora_r", str(options.rank)),
        *(
            "--lora_alpha",
            str(2 * options.rank),
            "--lora_target_modules",
            "all-linear",
            "--use_cpu",
            "true",
        ),
        *("--per_device_train_batch_size", str(step_rows), "--max_length", str(options.max_length)),
        *(
            "--num_train_epochs",
            "1",
            "--save_strategy",
            "no",
            "--report_to",
            "none",
            "--dtype",
            options.dtype,
        ),
    ]


def llamafactory(
    binaries: Path, folder: Path, step_rows: int, options: argparse.Namespace
) -> list[str | Path]:
    """LLaMA-Factory's command line."""
    columns = {"prompt": "prompt", "response": "completion"}
    (folder / "data" / "dataset_info.json").write_text(
        json.dumps({"rows": {"file_name": "rows.jsonl", "columns": columns}})
    )
    given = {
        "model_name_or_path": str(folder / "model"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": options.rank,
        "lora_alpha": 2 * options.rank,
        "lora_target": "all",
        "dataset": "rows",
        "dataset_dir": str(folder / "data"),
        "template": "empty",
        "cutoff_len": options.max_length,
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": step_rows,
        "num_train_epochs": 1.0,
        "bf16": options.dtype == "bfloat16",
        "save_strategy": "no",
        "report_to": "none",
    }
    (folder / "llamafactory.yaml").write_text(yaml.safe_dump(given))
    return [binaries / "llamafactory-cli", "train", folder / "llamafactory.yaml"]


PEERS: dict[str, Command] = {"trl": trl, "llamafactory-cli": llamafactory}
UNKNOWN = ("litgpt", "soup", "axolotl", "unsloth")
"""Tools that are named when installed: how to run them on a model of any shape without a GPU is not
written."""


def spent(command: list[str | Path], folder: Path) -> Spent | None:
    """Run it; None, and the end of what it said is printed, where it fails."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - started
    if done.returncode:
        print(f"{command[0]} failed:\n{done.stderr[-1000:]}")
        return None
    return Spent(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall)


def compare(
    environments: list[Path],
    rows: list[tuple[str, str, int]],
    make_folder: Callable[[], Path],
    step_rows: int,
    options: argparse.Namespace,
) -> list[list[str]]:
    """A table's lines: tool, tokens a CPU second, a second, and the first as a share of lora's.
    `rows` are prompt, completion and tokens; `make_folder` gives a new folder with the base in
    `model`."""
    tools: dict[str, tuple[Path, Command]] = {"lora train": (Path(), lora)}
    for environment in environments:
        binaries = environment.absolute() / "bin"
        there = {name: command for name, command in PEERS.items() if (binaries / name).exists()}
        tools |= {
            f"{name} of {environment.absolute().name}": (binaries, command)
            for name, command in there.items()
        }
        for name in UNKNOWN:
            if (binaries / name).exists():
                print(f"{name}: not measured")
    found: dict[str, list[Spent]] = {name: [] for name in tools}
    for _ in range(options.rounds):
        for name, (binaries, command) in tools.items():
            both = list[Spent | None]()
            for some in (rows[:step_rows], rows):
                folder = make_folder()
                (folder / "data").mkdir()
                text = "".join(
                    json.dumps({"prompt": ask, "completion": say}) + "\n" for ask, say, _ in some
                )
                (folder / "data" / "rows.jsonl").write_text(text)
                both.append(spent(command(binaries, folder, step_rows, options), folder))
            less, more = both
            if less and more:
                found[name].append(Spent(more.cpu - less.cpu, more.wall - less.wall))
    tokens = sum(count for _, _, count in rows[step_rows:])
    speeds = {
        name: [tokens / statistics.median(each) for each in zip(*runs)]
        for name, runs in found.items()
        if runs
    }
    ours = speeds["lora train"][0]
    return [
        [name, f"{cpu:,.0f}", f"{wall:,.0f}", f"{cpu / ours:.2f}"]
        for name, (cpu, wall) in speeds.items()
    ]
