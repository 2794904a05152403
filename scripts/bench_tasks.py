"""Compare training a classifier by lora's defaults with transformers' Trainer and its own defaults:
how much of the batches is padding, and how much text is trained on in a second of the processor.

    python scripts/docstrings.py build/docstrings
    python scripts/bench_tasks.py build/minilm/model build/docstrings/train.jsonl [--steps 30]

Both sides train the same LoRA on the same rows of one length limit, in turn, each in a process of
its own; the first step of each is not timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT, ROWS, RANK = 128, 16, 8


def measure_stock(base: str, data: str, steps: int) -> dict[str, float]:
    """Train by PEFT and Trainer alone, with DataCollatorWithPadding and random batches."""
    from datasets import load_dataset
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    rows = load_dataset("json", data_files=data, split="train")
    labels = sorted(set(rows["label"]))
    tokenizer = AutoTokenizer.from_pretrained(base)

    def encode(row: dict[str, str]) -> dict[str, object]:
        ids = tokenizer(row["text"], truncation=True, max_length=LIMIT)
        return {**ids, "label": labels.index(row["label"])}

    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    config = LoraConfig(r=RANK, target_modules="all-linear", task_type="SEQ_CLS")
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=ROWS, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(
            get_peft_model(network, config),
            arguments,
            DataCollatorWithPadding(tokenizer),
            rows.map(encode, remove_columns=rows.column_names),
        )
        return measure(trainer, trainer.train)


def measure_ours(base: str, data: str, steps: int) -> dict[str, float]:
    """Train by a recipe that says nothing of speed."""
    from lora_cli.recipe import load_recipe
    from lora_cli.train import run, setup

    found: dict[str, float] = {}
    make: Any = setup.make_trainer

    def make_watched(*given: Any) -> Any:
        trainer = make(*given)
        train, kept = trainer.train, list[Any]()

        def train_watched(**options: Any) -> Any:
            found.update(measure(trainer, lambda: kept.append(train(**options))))
            return kept[0]

        trainer.train = train_watched
        return trainer

    vars(setup)["make_trainer"] = make_watched
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "r.yaml"
        recipe.write_text(
            f"task: sequence_classification\nmodel: {{name_or_path: {base}}}\n"
            f"lora: {{r: {RANK}}}\ndata: {{path: {data}, on_long_row: truncate}}\n"
            f"training: {{max_length: {LIMIT}, max_steps: {steps}, use_cpu: true, "
            f"per_device_train_batch_size: {ROWS}, save_strategy: 'no'}}\n"
            f"output_dir: {folder}/run\n"
        )
        run.train(load_recipe(recipe))
    return found


def measure(trainer: Any, train: Callable[[], Any]) -> dict[str, float]:
    """Train, and return the share of padding and the tokens of text in a second of the processor,
    from the second step on."""
    steps = list[tuple[int, int, float]]()
    step = trainer.training_step

    def watched(model: Any, inputs: Any, *more: Any) -> Any:
        counted = int(inputs["attention_mask"].sum()), inputs["input_ids"].numel()
        made = step(model, inputs, *more)
        steps.append((*counted, time.process_time()))
        return made

    trainer.training_step = watched
    train()
    text, padded = (sum(each[at] for each in steps[1:]) for at in (0, 1))
    spent = steps[-1][2] - steps[0][2]
    return {"padding": 1 - text / padded, "tokens_per_cpu_second": text / spent}


def main() -> None:
    """Measure both sides in turn and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=("ours", "stock"))
    args = parser.parse_args()
    if args.side:
        side = measure_ours if args.side == "ours" else measure_stock
        sys.stdout.write("\n" + json.dumps(side(args.base, args.data, args.steps)) + "\n")
        return
    for number in range(args.rounds):
        found = {}
        for side in ("stock", "ours"):
            command = [sys.executable, __file__, args.base, args.data, "--side", side]
            command += ["--steps", str(args.steps)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
        (pad, speed), (our_pad, our_speed) = (found[side].values() for side in ("stock", "ours"))
        sys.stdout.write(
            f"round {number + 1}: padding {pad:.1%} stock, {our_pad:.1%} ours; tokens of text per "
            f"CPU second {speed:,.0f} and {our_speed:,.0f}, ratio {our_speed / speed:.2f}\n"
        )


if __name__ == "__main__":
    main()
