"""Training speed on this machine: lora against SFTTrainer as it is, with its best flags, and a bare
loop.

    python scripts/bench_train.py [--method lora] [--rows 192] [--rounds 3] [--vocabulary 32000] …
    python scripts/bench_train.py --peers ENV [--peers ENV …]   # the command lines installed there

A random Llama (10 million parameters beside the embeddings unless told otherwise, in bfloat16 where
the processor computes it) and rows with the lengths of Alpaca's (log-normal, median 95 tokens, at
most 1024; 55 % of the tokens carry loss; `--length`: all as long, `--data FILE`: questions and
answers of a .jsonl, spelt by the tiny model's tokenizer). Every side trains on every row once, with
rank 16 on all linear layers, 8 rows to a step, and in a process of its own; the sides alternate.
Printed: real tokens (no padding) per CPU second and per second, medians over the rounds and spread,
peak memory over what the process had when training began, and the mean loss of the last quarter of
the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from lora_cli.models.base import Base
from lora_cli.plan import auto

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
STEP_ROWS, RATE = 8, 2e-4
KNOWN = 500
"""Tokens that occur in the rows: those of the tiny model's tokenizer. The head has the whole
vocabulary."""


def write_rows(path: Path, options: argparse.Namespace) -> int:
    """The tokenised rows; returns the number of tokens."""
    rows = real_rows(options) if options.data else made_rows(options)
    with path.open("w", encoding="utf-8") as file:
        for ids, asked in rows:
            file.write(
                json.dumps({"input_ids": ids, "labels": [-100] * asked + ids[asked:]}) + "\n"
            )
    return sum(len(ids) for ids, _ in rows)


def made_rows(options: argparse.Namespace) -> list[tuple[list[int], int]]:
    """Tokens of which every one but the first follows from the one before, and how many carry no
    loss."""
    draw, rows = random.Random(0), []
    for _ in range(options.rows):
        length = options.length or max(
            16, min(options.max_length, round(draw.lognormvariate(4.55, 0.75)))
        )
        ids = [draw.randrange(10, KNOWN)]
        while len(ids) < length:
            ids.append((ids[-1] * 7 + 11) % (KNOWN - 10) + 10)
        rows.append((ids, round(length * 0.45)))
    return rows


def real_rows(options: argparse.Namespace) -> list[tuple[list[int], int]]:
    """The first questions and answers of at most `--max-length` tokens, and the length of each
    question."""
    from transformers import AutoTokenizer

    tokenizer, rows = AutoTokenizer.from_pretrained(ROOT / "build" / "tiny" / "model"), []
    for line in Path(options.data).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked, answered = (
            tokenizer(row[name], add_special_tokens=False).input_ids
            for name in ("question", "answer")
        )
        if len(asked) + len(answered) <= options.max_length and len(rows) < options.rows:
            rows.append((asked + answered, len(asked)))
    return rows


def make_model(folder: Path, options: argparse.Namespace) -> None:
    """A random Llama with the tiny model's tokenizer, whose few tokens are the first of the
    vocabulary."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 3,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        dtype=options.dtype,
    )
    LlamaForCausalLM(config).to(getattr(torch, options.dtype)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "build" / "tiny" / "model").save_pretrained(folder)


class Measured:
    """Wall and CPU seconds and peak memory of what runs inside, in this process."""

    def __enter__(self) -> Measured:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.most = self.process.memory_info().rss
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.done.set()
        self.watcher.join()

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.most = max(self.most, self.process.memory_info().rss)


def report(measured: Measured, losses: list[float]) -> None:
    """One line of JSON on stdout, for the process that compares."""
    last = losses[-max(1, len(losses) // 4) :]
    found = {
        "wall": measured.wall,
        "cpu": measured.cpu,
        "mb": (measured.most - measured.before) / 1e6,
    }
    print("FOUND " + json.dumps(found | {"loss": sum(last) / len(last)}))


def trained(build: Callable[[], Any]) -> None:
    """Train with what `build` makes, measured from the first step to the last."""
    trainer = build()
    with Measured() as measured:
        trainer.train()
    report(measured, [line["loss"] for line in trainer.state.log_history if "loss" in line])


def stock(folder: Path, options: argparse.Namespace, by_name: bool = False, **flags: Any) -> Any:
    """SFTTrainer with its own defaults but for what all sides share, and `flags`.

    `by_name`: it loads the model itself, in float32 as it does.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    quantised = {}
    if options.method.startswith("q"):
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        kind = getattr(torch, options.dtype)
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=kind, **nf4
        )
    model: Any = str(folder / "model")
    if not by_name or quantised:
        model = AutoModelForCausalLM.from_pretrained(model, dtype=options.dtype, **quantised)
    shared: dict[str, Any] = {
        "per_device_train_batch_size": STEP_ROWS,
        "learning_rate": RATE,
        "num_train_epochs": 1,
    }
    shared |= {
        "max_length": options.max_length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
    }
    arguments = SFTConfig(
        str(folder / "out"), use_cpu=not torch.cuda.is_available(), **shared, **flags
    )
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=options.dropout,
        target_modules="all-linear",
        use_dora="dora" in options.method,
    )
    return SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=config,
    )


def ours(folder: Path, options: argparse.Namespace) -> None:
    """`lora train` with a recipe that says nothing of speed."""
    from transformers import Trainer

    from lora_cli.recipe import load
    from lora_cli.train import run as train

    text = (
        f"method: {options.method}\noutput_dir: {folder / 'run'}\nmodel: "
        f"{{name_or_path: {folder / 'model'}}}\n"
        f"lora: {{r: {options.rank}, lora_alpha: {2 * options.rank}, "
        f"lora_dropout: {options.dropout}}}\n"
        f"data: {{path: {folder / 'rows.jsonl'}}}\n"
        f"training: {{per_device_train_batch_size: {STEP_ROWS}, learning_rate: {RATE}, "
        f"logging_steps: 1, "
        f"max_length: {options.max_length}, save_strategy: 'no', lr_scheduler_type: linear, "
        f"warmup_steps: 0}}\n"
    )
    (folder / "r.yaml").write_text(text)
    run = Trainer.train

    def measured_run(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        with Measured() as measured:
            result = run(self, *args, **kwargs)
        lines = [
            json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()
        ]
        report(measured, [line["loss"] for line in lines if "loss" in line])
        return result

    Trainer.train = measured_run
    train.train(load.load_recipe(folder / "r.yaml"))


def bare(folder: Path, options: argparse.Namespace, frozen: bool = False) -> None:
    """A loop around PEFT with lora's levers and nothing else; `frozen`: the base alone, with no
    adapter to learn."""
    import torch
    from peft import get_peft_model
    from peft.helpers import disable_input_dtype_casting
    from transformers import set_seed

    from lora_cli.recipe import keys, upstream
    from lora_cli.speed import document_attention, dora_norms, install, loss_head, step_packing

    chosen = keys.Recipe(
        method=options.method,
        model=keys.Model(name_or_path=str(folder / "model"), dtype=options.dtype),
        lora=keys.Lora(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout),
        data=keys.Data(path="x"),
        output_dir="x",
    )
    chosen, _ = auto.settle(chosen)
    set_seed(0)
    quantization = upstream.build_quantization_config(chosen)
    base = Base(str(folder / "model")).load(getattr(torch, options.dtype), quantization)
    document_attention.install(base)
    adapted: Any = base.requires_grad_(requires_grad=False)
    if frozen:
        base.enable_input_require_grads()
    else:
        adapted = get_peft_model(base, upstream.build_lora_config(chosen))
        install.install(adapted, base.device.type)
    assert loss_head.install(base) is None
    learned = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, RATE, weight_decay=0.0, fused=True) if learned else None
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    collate, losses = step_packing.StepCollator(min(options.max_length, step_packing.SEQUENCE)), []
    device, half = base.device.type, options.dtype == "bfloat16"
    adapted.train()
    layers = dora_norms.find_layers(adapted)
    with disable_input_dtype_casting(adapted, active=half), Measured() as measured:
        starts = range(0, len(order), STEP_ROWS)
        for step, start in enumerate(starts):
            batch = collate([rows[number] for number in order[start : start + STEP_ROWS]])
            labels = (batch["labels"] != -100).sum()
            total = 0.0
            with dora_norms.keep_norms(layers):
                for part in step_packing.split_sequences(batch):
                    with torch.autocast(device, torch.bfloat16, enabled=half):
                        found = adapted(**part, num_items_in_batch=labels, use_cache=False).loss
                    found.backward()
                    total += float(found.detach())
            if optimizer:
                optimizer.param_groups[0]["lr"] = RATE * (1 - step / len(starts))
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(total)
    report(measured, losses)


SIDES: dict[str, Callable[[Path, argparse.Namespace], None]] = {
    "lora train": ours,
    "SFTTrainer": lambda folder, options: trained(lambda: stock(folder, options, by_name=True)),
    "SFTTrainer, model loaded": lambda folder, options: trained(lambda: stock(folder, options)),
    "SFTTrainer, best flags": lambda folder, options: trained(
        lambda: stock(
            folder, options, packing=True, gradient_checkpointing=False, optim="adamw_torch_fused"
        )
    ),
    "bare loop": bare,
    "frozen base": lambda folder, options: bare(folder, options, frozen=True),
}


def measure(side: str, folder: Path, arguments: list[str]) -> dict[str, float]:
    """One side in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name in ("model", "rows.jsonl"):
            (Path(scratch) / name).symlink_to(folder / name)
        command = [sys.executable, __file__, *arguments, "--side", side, "--folder", scratch]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ}
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("FOUND "))
    return found


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model, the adapter and the rows."""
    parser.add_argument("--method", choices=("lora", "dora", "qlora", "qdora"), default="lora")
    numbers = {
        "rows": 192,
        "vocabulary": 32_000,
        "width": 320,
        "layers": 8,
        "rank": 16,
        "max-length": 1024,
        "length": 0,
    }
    for name, value in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data")


def compare_tools(options: argparse.Namespace) -> None:
    """`lora train` and the tools of `--peers`, on texts."""
    import peers
    from transformers import AutoTokenizer

    from lora_cli.common import ui

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "build" / "tiny" / "model")
    ids = real_rows(options) if options.data else made_rows(options)
    rows = [
        (*(tokenizer.decode(part) for part in (row[:asked], row[asked:])), len(row))
        for row, asked in ids
    ]
    with tempfile.TemporaryDirectory() as name:
        made = Path(name)
        make_model(made / "model", options)

        def folder() -> Path:
            fresh = Path(tempfile.mkdtemp(dir=made))
            (fresh / "model").symlink_to(made / "model")
            return fresh

        table = peers.compare(options.peers, rows, folder, STEP_ROWS, options)
    print(f"{len(rows)} rows, {sum(count for *_, count in rows):,} tokens, {options.rounds} rounds")
    print(*ui.format_table(["", "tokens/CPU s", "tokens/s", "of lora train"], table), sep="\n")


def main() -> None:
    """All sides in turn, as often as there are rounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    add_model_options(parser)
    parser.add_argument("--sides", default=",".join(side.replace(",", "") for side in SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--peers", type=Path, action="append", metavar="ENV", help="environments with other tools"
    )
    options = parser.parse_args()
    if options.peers:
        compare_tools(options)
        return
    if options.side:
        os.environ["LORA_CACHE_DIR"] = str(options.folder)
        SIDES[options.side](options.folder, options)
        return
    from lora_cli.common import ui

    arguments = sys.argv[1:]
    wanted = [side for side in SIDES if side.replace(",", "") in options.sides.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options)
        tokens = write_rows(folder / "rows.jsonl", options)
        found: dict[str, list[dict[str, float]]] = {side: [] for side in wanted}
        for _ in range(options.rounds):
            for side in wanted:
                found[side].append(measure(side, folder, arguments))
    print(f"{' '.join(arguments)}: {tokens:,} tokens, {options.dtype}, {options.rounds} rounds")
    reference = statistics.median(each["cpu"] for each in found[wanted[0]])
    table = []
    for side, runs in found.items():
        speeds = sorted(tokens / each["cpu"] for each in runs)
        cpu = statistics.median(each["cpu"] for each in runs)
        table.append(
            [
                side,
                f"{tokens / cpu:,.0f} ({speeds[0]:,.0f}-{speeds[-1]:,.0f})",
                f"{tokens / statistics.median(each['wall'] for each in runs):,.0f}",
                f"{reference / cpu:.2f}",
                f"{statistics.median(each['mb'] for each in runs):,.0f}",
                f"{statistics.median(each['loss'] for each in runs):.4f}",
            ]
        )
    print(
        *ui.format_table(["", "tokens/CPU s", "tokens/s", "of lora train", "MB", "loss"], table),
        sep="\n",
    )


if __name__ == "__main__":
    main()
