"""Several processes train the same run as one: rows, losses, adapter. `-s` prints the table.

Real processes on gloo, a random model of two layers; no network but the loopback. Several recipes share the processes.
Alone: pytest tests/distributed/test_same_run.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

from tests.distributed.jobs import find_packages

SEVERAL = Path(__file__).with_name("several.py")
LOSS, ADAPTER = 1e-5, 1e-4
"""Largest differences: Adam divides tiny gradients by themselves, so that adapters' are larger."""
STEP = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
PADDED = {"packing": False}
SHARDED = {"strategy": "fsdp"}
KINDS: dict[str, dict[str, Any]] = {
    "packed": STEP,
    "padded": STEP | PADDED,
    "passes": PADDED | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
}
OTHERS: dict[str, dict[str, Any]] = {
    "of the same length": PADDED
    | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    | {"train_sampling_strategy": "group_by_length"},
    "balanced": STEP | PADDED | {"train_sampling_strategy": "batch_rebalance"},
    "stream": STEP | {"data": {"streaming": True, "shuffle_buffer": 5}},
    "padded stream": STEP | PADDED | {"data": {"streaming": True, "shuffle_buffer": 5}},
    "Trainer": STEP | {"trainer": "trainer"},
    "TRL's loss": STEP | {"loss_head": "stock"},
    "TRL's loss, padded": STEP | PADDED | {"loss_head": "stock"},
    "TRL's packing": STEP | {"packing": "dataset", "trainer": "sft"},
    "a worker": STEP | {"dataloader_num_workers": 1},
    "checkpointing": STEP | {"gradient_checkpointing": True},
    "smoothing": STEP | PADDED | {"trainer": "trainer", "loss_head": "stock", "label_smoothing_factor": 0.1},
    "odd": PADDED | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
    "rows one by one": PADDED | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 5},
    "LoRA+": STEP | {"loraplus_lr_ratio": 4},
    "the best": STEP | {"save_strategy": "steps", "save_steps": 5, "keep": "best"},
}  # fmt: skip


class Difference(NamedTuple):
    """How a run in several processes differs from that in one."""

    losses: float
    evaluations: float
    adapter: float
    rows: bool


def write_recipe(path: Path, tiny: Path, method: str, given: Mapping[str, Any]) -> None:
    """Write a recipe of 10 steps of 45 rows, evaluated on 7, with these values of `training`."""
    training = {
        "max_length": 64,
        "max_steps": 10,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 2,
        **given,
    }
    trainer, data = training.pop("trainer", "auto"), training.pop("data", {})
    strategy, lora = training.pop("strategy", "ddp"), training.pop("lora", {})
    replicas = training.pop("replicas", 1)
    model = training.pop("model", {})
    rows = {"path": str(tiny / "train.jsonl"), "max_rows": 45, **data}
    held = {"eval_path": str(tiny / "eval.jsonl"), "eval_split": "train[:7]"}
    recipe = {
        "method": method,
        "trainer": trainer,
        "model": {"name_or_path": str(tiny / "model"), **model},
        "data": rows | held,
        "lora": {"r": 8, "lora_dropout": 0.0, **lora},
        "distributed": {"strategy": strategy, "replicas": replicas},
        "training": training,
    }
    path.write_text(json.dumps(recipe))


def train_all(folder: Path, count: int, more: Mapping[str, str] | None = None) -> None:
    """Train the recipes in a folder in so many processes, with `more` in their environment."""
    program = [sys.executable, str(SEVERAL), str(folder)]
    if count > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(count)]
        program = [sys.executable, *launcher, *program[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(more or {})}
    done = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-6000:]


def compare(folder: Path, name: str, count: int) -> Difference:
    """Return how the run of a recipe in so many processes differs from that in one."""
    one, several = folder / f"1-{name}", folder / f"{count}-{name}"
    first, second = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, several)
    )
    logged = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, several)
    ]
    assert len(logged[0]) == len(logged[1]) == 13

    def differ(key: str) -> float:
        pairs = [(a[key], b[key]) for a, b in zip(*logged) if key in a]
        assert pairs
        return max(abs(a - b) for a, b in pairs)

    assert any(tensor.any() for key, tensor in first.items() if "lora_B" in key)
    rows = [
        Counter(
            token for path in folder.glob(f"{number}-{name}.rows.*") for token in path.read_text().split()
        )
        for number in (1, count)
    ]  # fmt: skip
    return Difference(
        differ("loss"),
        differ("eval_loss"),
        max(float((first[key] - second[key]).abs().max()) for key in first),
        bool(rows[0]) and rows[0] == rows[1],
    )


def check_all(
    folder: Path,
    tiny: Path,
    cases: Mapping[str, tuple[str, Any]],
    counts: list[int],
    more: Mapping[str, str] | None = None,
) -> None:
    for name, (method, given) in cases.items():
        write_recipe(folder / f"{name}.yaml", tiny, method, given)
    for count in (1, *counts):
        train_all(folder, count, more)
    found = {(name, count): compare(folder, name, count) for name in cases for count in counts}
    for (name, count), each in found.items():
        rows = "the same" if each.rows else "OTHERS"
        print(f"{name:28} {count} processes: losses {each.losses:.1e}, evaluations {each.evaluations:.1e}, "
              f"adapter {each.adapter:.1e}, rows {rows}")  # fmt: skip
    assert len(found) == len(cases) * len(counts)
    wrong = {
        key: each
        for key, each in found.items()
        if each.losses > LOSS or each.evaluations > LOSS or each.adapter > ADAPTER or not each.rows
    }
    assert not wrong


def test_two_processes_train_the_run_of_one(tiny: Path, tmp_path: Path) -> None:
    cases = {f"{method} {kind}": (method, KINDS[kind]) for method, kind in
             (("lora", "packed"), ("dora", "passes"), ("qdora", "padded"))}  # fmt: skip
    cases |= {kind: ("lora", OTHERS[kind]) for kind in ("stream", "TRL's loss", "smoothing")}
    cases |= {"sharded dora packed": ("dora", STEP | SHARDED)}
    cases |= {"sharded qlora passes": ("qlora", KINDS["passes"] | SHARDED)}
    cases |= {"eva": ("lora", STEP | {"lora": {"init_lora_weights": "eva"}})}
    cases |= {"zero2": ("lora", STEP | {"strategy": "deepspeed-zero2"})}
    check_all(tmp_path, tiny, cases, [2])


@pytest.mark.slow
def test_every_method_and_way_of_batching(tiny: Path, tmp_path: Path) -> None:
    methods = ("lora", "dora", "qlora", "qdora")
    cases = {f"{method} {kind}": (method, KINDS[kind]) for method in methods for kind in KINDS}
    cases |= {kind: ("lora", given) for kind, given in OTHERS.items()}
    starts = ("eva", "corda", "lora_ga")
    cases |= {each: ("lora", STEP | {"lora": {"init_lora_weights": each}}) for each in starts}
    check_all(tmp_path, tiny, cases, [2, 4])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed-zero3"])
def test_every_method_and_way_of_batching_sharded(
    strategy: str, tiny: Path, tmp_path: Path
) -> None:
    methods, sharded = ("lora", "dora", "qlora", "qdora"), {"strategy": strategy}
    cases = {
        f"{strategy} {method} {kind}": (method, KINDS[kind] | sharded)
        for method in methods
        for kind in KINDS
    }
    cases |= {f"{strategy} {kind}": ("lora", given | sharded) for kind, given in OTHERS.items()}
    for kind, given in (
        ("head", {"lora": {"target_modules": ["q_proj", "lm_head"]}}),
        ("embeddings", {"lora": {"target_modules": ["q_proj", "embed_tokens"]}}),
        ("new tokens", {"model": {"add_tokens": ["<new>"]}}),
        ("PiSSA", {"lora": {"init_lora_weights": "pissa"}}),
    ):
        cases[f"{strategy} {kind}"] = ("lora", STEP | sharded | given)
    check_all(tmp_path, tiny, cases, [2], find_packages(strategy))


@pytest.mark.slow
def test_two_copies_of_a_sharded_base(tiny: Path, tmp_path: Path) -> None:
    """And one copy, on as many processes."""
    kinds = {"lora": "packed", "dora": "padded", "qlora": "passes", "qdora": "packed"}
    cases = {
        f"{copies} of {method} {kind}": (method, KINDS[kind] | SHARDED | {"replicas": copies})
        for method, kind in kinds.items()
        for copies in (1, 2)
    }
    check_all(tmp_path, tiny, cases, [4])


@pytest.mark.slow
def test_zero3_on_four_processes(tiny: Path, tmp_path: Path) -> None:
    kinds = {"lora": "packed", "dora": "padded", "qlora": "passes", "qdora": "packed"}
    zero3 = {"strategy": "deepspeed-zero3"}
    cases = {f"zero3 {method}": (method, KINDS[kind] | zero3) for method, kind in kinds.items()}
    check_all(tmp_path, tiny, cases, [4], find_packages("deepspeed-zero3"))


@pytest.mark.slow
def test_zero3_is_ddp_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    """Weights are gathered as they were; each process holds no more than its part between passes."""
    strategies = ("ddp", "deepspeed-zero3")
    once = {"eval_strategy": "no", "eval_steps": None}
    cases = {
        "packed": ("lora", STEP),
        "checkpointed": ("dora", STEP | {"gradient_checkpointing": True}),
        "4 bits": ("qdora", KINDS["passes"] | {"gradient_checkpointing": True}),
        "bfloat16": ("lora", STEP | {"bf16": True, "model": {"dtype": "bfloat16"}}),
        "head": ("lora", STEP | {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}}),
    }  # fmt: skip
    for name, (method, given) in cases.items():
        for each in strategies:
            write_recipe(
                tmp_path / f"{name} {each}.yaml", tiny, method, given | once | {"strategy": each}
            )
    train_all(tmp_path, 2, find_packages("deepspeed-zero3"))
    for name in cases:
        runs = [tmp_path / f"2-{name} {each}" for each in strategies]
        losses, others = (
            [
                json.loads(line).get("loss")
                for line in (run / "metrics.jsonl").read_text().splitlines()
            ]
            for run in runs
        )
        assert len(losses) == 11
        assert losses == others, name
        adapter, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
        assert adapter.keys() == other.keys()
        assert all((tensor == other[key]).all() for key, tensor in adapter.items()), name
