"""lora beside TRL and plain PEFT, on the same 8B model and rows with the lengths of Alpaca's:
tokens that are no padding, a second, after the first steps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import bench_train
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from gpu_parts import levers, models, runs, speed_8b, speeds
from gpu_parts.part import Bench, Case, Figures
from gpu_parts.report import Column
from lora_cli.models import attach

MODEL = "1B"
TITLE = f"Beside others: {MODEL}, Alpaca-like rows, rank 16 on all linear layers"
COLUMNS = (
    Column("tokens/s", "tokens_per_s"),
    Column("of lora train", "of_lora", 2),
    Column("step ms", "step_ms"),
    Column("tokens a step", "step_tokens"),
    Column("allocated MiB", "allocated_mib"),
    Column("reserved MiB", "reserved_mib"),
    Column("last loss", "loss", 4),
)
LONGEST = {False: 1024, True: 64}
"""Tokens of the longest row, and of a packed sequence, by whether it is a dry run."""
STEPS, MANY = 8, 64
"""Steps of each run, and the rows of a step where there are many: as many tokens as TRL's packed
step of eight sequences."""


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    packed = {"packing": True, "gradient_checkpointing": False, "optim": "adamw_torch_fused"}
    if bench.clock.on_gpu and find_spec("liger_kernel"):
        packed["use_liger_kernel"] = True
    padded = {"gradient_checkpointing": False, "optim": "adamw_torch_fused"}
    measures: dict[str, Callable[[Bench], Figures]] = {
        "lora train": partial(train_lora, bench_train.STEP_ROWS),
        "SFTTrainer, model loaded": partial(train_peer, bench_train.stock, {}),
        "SFTTrainer, packing, no checkpointing, Liger": partial(
            train_peer, bench_train.stock, packed
        ),
        f"lora train, {MANY} rows a step": partial(train_lora, MANY),
        f"lora train, {MANY} rows a step, Liger's layers": partial(train_lora, MANY, liger=True),
        "Trainer and PEFT, no checkpointing": partial(train_peer, make_plain, padded),
        "SFTTrainer, no checkpointing": partial(train_peer, bench_train.stock, padded),
    }
    made = {"made": Case(partial(models.measure_making, name=MODEL), speed_8b.MAKING)}
    return made | {name: Case(measure, 60) for name, measure in measures.items()}


def _find_rows(bench: Bench) -> Path:
    return models.write_mixed_rows(bench, MANY * STEPS, LONGEST[bench.small])


def train_lora(number: int, bench: Bench, liger: bool = False) -> Figures:
    """Run `lora train` with so many rows in a step."""
    # each step is logged, as the peers' are, though that waits for its numbers
    training = {"per_device_train_batch_size": number, "max_steps": STEPS, "logging_steps": 1}
    found = speeds.measure(
        bench,
        "lora beside others",
        models.find_made(bench, MODEL),
        _find_rows(bench),
        {"training": training | ({"use_liger_kernel": True} if liger else {})},
        ["liger"] if liger else [],
    )
    return _compare(bench, found)


def train_peer(make: Any, flags: Figures, bench: Bench) -> Figures:
    """Run the trainer that `make` returns, with these of its options."""
    folder = runs.make_folder(bench, "peer")
    (folder / "model").symlink_to(models.find_made(bench, MODEL))
    (folder / "rows.jsonl").symlink_to(_find_rows(bench))
    options = argparse.Namespace(
        method="lora", dtype="bfloat16", rank=16, dropout=0.0, max_length=LONGEST[bench.small]
    )
    counted = {"max_steps": STEPS, "include_num_input_tokens_seen": "non_padding"}
    with levers.keep_llama():
        trainer = make(folder, options, **counted, **flags)
        observer = runs.Observer(bench.clock)
        trainer.add_callback(observer)
        bench.clock.free()
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    found = observer.measure_speed() | bench.clock.read_memory() | {"loss": losses[-1]}
    return _compare(bench, found | {"adapted": len(attach.find_lora_layers(trainer.model))})


def _compare(bench: Bench, found: Figures) -> Figures:
    """Add the tokens of a step, and the speed as a share of `lora train`'s in this very run."""
    found["step_tokens"] = found["tokens_per_s"] * found["step_ms"] / 1e3
    ours = bench.read_earlier("peers", "lora train").get("tokens_per_s")
    return found | ({"of_lora": found["tokens_per_s"] / ours} if ours else {})


def make_plain(folder: Path, options: argparse.Namespace, **flags: Any) -> Any:
    """Return transformers' Trainer around PEFT's model, with padded batches."""
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=options.dtype)
    network.config.use_cache = False
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    arguments = TrainingArguments(
        str(folder / "out"),
        per_device_train_batch_size=bench_train.STEP_ROWS,
        learning_rate=bench_train.RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        **flags,
    )
    return Trainer(
        get_peft_model(network, config),
        arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder / "model")),
    )
