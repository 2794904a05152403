"""What is said at a run's end is what its record says, and each `next:` line works as pasted.

Hermetic: the tiny model and its data, CPU. Alone: pytest tests/train/test_receipt.py
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from lora_cli.common import remote_code
from lora_cli.distributed import ranks
from lora_cli.models import TrainingRecord
from lora_cli.recipe import load
from lora_cli.train import receipt


def read_receipt(said: str) -> tuple[dict[str, str], list[str]]:
    """The table's texts by their names, and the commands."""
    after = said[said.index("\ntrained ") + 1 :].splitlines()[1:]
    rows = dict(re.fullmatch(r"  (\w+) +(.*)", line).groups() for line in after if line[0] == " ")
    return rows, [line[6:] for line in after if line.startswith("next: ")]


def split(command: str) -> list[str]:
    """The words that a shell makes of a command."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True
    )
    return done.stdout.decode().split("\0")[:-1]


def test_the_commands_of_a_receipt_work_as_pasted(
    lora, write_recipe, tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "it's a $run"
    text = (
        f'output_dir: "{folder}"\n'
        f"data: {{eval_path: {tiny / 'eval.jsonl'}, eval_split: 'train[:4]'}}\n"
        'training: {eval_strategy: steps, eval_steps: 2, sample_prompts: ["it\'s $1"], sample_tokens: 2}\n'
    )
    done = lora("train", write_recipe(text))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}/adapter\n"
    rows, commands = read_receipt(done.stderr)
    record = json.loads((folder / "record.json").read_text())
    results, kept = record["results"], record["kept"]
    assert rows["steps"] == "3"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert int(re.match(r"[\d,]+", rows["tokens"])[0].replace(",", "")) > 0
    assert rows["tokens"].endswith(f" {results['tokens_per_second']:,.0f} a second")
    assert rows["loss"] == f"{results['train_loss']:.4f}, the mean of all steps"
    assert rows["adapter"].startswith(f"eval_loss {kept['value']:.4f} at step {kept['step']}")
    assert kept["value"] == min(line["eval_loss"] for line in lines if "eval_loss" in line)
    assert rows["memory"] == f"{results['peak_memory_gb']:.1f} GB at most"
    assert rows["folder"] == str(folder)
    verbs = [split(command)[1] for command in commands]
    assert verbs == ["generate", "evaluate", "merge", "report"]
    for command in commands:
        program, *words = split(command)
        ended = lora(*words)
        assert (program, ended.returncode) == ("lora", 0), f"{command}\n{ended.stderr}"
    assert "it's $1" in words or any("it's $1" in split(command) for command in commands)
    assert (folder / "merged" / "config.json").is_file()


def test_each_task_gets_the_verbs_that_it_has(write_recipe, tiny: Path, tmp_path: Path) -> None:
    evaluated = f"data: {{eval_path: {tiny / 'eval.jsonl'}}}\n"
    cases = {
        "": ["chat", "merge", "report"],
        evaluated: ["chat", "evaluate", "merge", "report"],
        "data: {eval_rows: 2}\n": ["chat", "evaluate", "merge", "report"],
        f"task: sequence_classification\n{evaluated}": ["predict", "merge", "report"],
        "task: seq2seq_lm\n": ["merge", "report"],
        "training: {sample_prompts: [-rf]}\n": ["chat", "merge", "report"],
        'training: {sample_prompts: ["a\\nb"]}\n': ["chat", "merge", "report"],
        f"data: {{eval_path: {tiny / 'eval.jsonl'}, columns: {{prompt: a, completion: b}}}}\n": [
            *("chat", "merge", "report")
        ],
    }
    for text, verbs in cases.items():
        commands = receipt.list_commands(tmp_path, load.load_recipe(write_recipe(text)))
        assert [command.split()[1] for command in commands] == verbs, text


def test_code_of_a_repository_is_allowed_where_it_was(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_code, "is_allowed", lambda: True)
    commands = list(receipt.list_commands(tmp_path, load.load_recipe(write_recipe())))
    assert [line.endswith(" --trust-remote-code") for line in commands] == [True, True, False]
    monkeypatch.setattr(ranks, "may_start_again", lambda: True)
    monkeypatch.setattr(ranks, "count", lambda: 2)
    again = f"lora train {tmp_path}/recipe.yaml --resume --nproc 2 --trust-remote-code"
    assert receipt.write_resumption(tmp_path) == again


def test_numbers_are_those_of_the_record(write_recipe, tmp_path: Path) -> None:
    record = TrainingRecord.model_validate(
        {
            "started": "2026-01-01T00:00:00+00:00",
            "status": "finished",
            "recipe": {},
            "base": {"name": "x"},
            "planned_memory_gb": 14.25,
            "resumed": ["2026-01-02T00:00:00+00:00"],
            "results": {"steps": 1500, "train_loss": None, "duration_s": 3725.0,
                        "tokens_per_second": 14676.4, "peak_memory_gb": 12.345},
            "kept": {"which": "best", "step": 900, "metric": "eval_loss", "value": 1.25,
                     "last_step": 1500, "last_value": 1.75},
        }
    )  # fmt: skip
    recipe = load.load_recipe(write_recipe())
    assert receipt.list_lines(tmp_path, record, recipe, 1_234_567)[:6] == [
        "  time     1h02m, since it was resumed",
        "  steps    1,500",
        "  tokens   1,234,567, 14,676 a second",
        "  adapter  eval_loss 1.2500 at step 900; 1.7500 at 1500",
        "  memory   12.3 GB at most, 14.2 GB planned",
        f"  folder   {tmp_path}",
    ]
