"""Every shipped recipe trains a step: its own settings, on the tiny model, or a tiny one of the
base's family, and a few rows of the shape that the recipe reads.

What is replaced: the base, the rows' place, how many steps, rows and tokens there are; and the
schedule of saving, since a run of one step saves at its end. Hermetic: no network.
Alone: pytest tests/train/test_a_step_of_each_recipe.py
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_cli.recipe import load_recipe, shipped_recipes
from tests import pictures, tasks

NAMES = [recipe.name for recipe in shipped_recipes.list_recipes()]
REQUIRED = {
    "instruct", "chat", "tools", "classify", "pretrain", "qlora-8b", "qlora-7b-t4", "two-gpus",
    "new-tokens", "extract", "dpo", "orpo", "kto",
}  # fmt: skip
"""What the table of recipes is to have at least."""
TOOLS_TEMPLATE = """\
{{- bos_token }}{% if tools %}{{ '<|system|>\n' + tools | tojson + eos_token }}{% endif %}
{%- for message in messages %}{{- '<|' + message['role'] + '|>\n' }}
{%- if message['role'] == 'assistant' %}{%- generation %}
{%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
{{- (message.content or '') + eos_token }}{%- endgeneration %}
{%- else %}{{- message['content'] + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}
"""
"""Writes tools and calls, as the template of the base of tools.yaml does."""
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
COUNT = 80


def write_rows(file: Path, make: Callable[[int], dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(make(number)) + "\n" for number in range(COUNT)))
    return file


def make_turns(number: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"Copy: tea {number}"}
    return {"messages": [asked, {"role": "assistant", "content": f"tea {number}"}]}


def make_call(number: int) -> dict[str, Any]:
    call = {"name": "weather", "arguments": {"city": f"tea {number}"}}
    answer = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    asked = {"role": "user", "content": f"Rain in tea {number}?"}
    return {"messages": [asked, answer], "tools": [WEATHER]}


def make_pair(number: int) -> dict[str, Any]:
    return {"prompt": f"Copy: tea {number}", "chosen": f"tea {number}", "rejected": "ice"}


def make_vote(number: int) -> dict[str, Any]:
    wanted = number % 2 == 0
    answer = f"tea {number}" if wanted else "ice"
    return {"prompt": f"Copy: tea {number}", "completion": answer, "label": wanted}


BY_COLUMNS: dict[str, Callable[[int], dict[str, Any]]] = {
    "alpaca": lambda n: {"instruction": f"Copy {n}.", "input": "tea ice", "output": f"tea {n}"},
    "prompt_completion": lambda n: {
        "prompt": f"Copy: tea {n}", "completion": f"tea {n}",
        "question": f"Copy: ice {n}", "answer": f"ice {n}",
    },
    "messages": make_turns,
    "text": lambda n: {"text": f"The copy of tea ice {n} is tea ice {n}. " * 3},
}  # fmt: skip


def find_stand_ins(name: str, tiny: Path, folder: Path) -> tuple[Path, Path]:
    """The base and the rows that stand for a recipe's own."""
    recipe = load_recipe(Path(name))
    if recipe.task == "image_classification":
        base = pictures.make_base(folder / "base", "vit")
        return base, pictures.write_folder(folder / "photos", 6)
    if recipe.task != "causal_lm":
        family = "t5" if recipe.task == "seq2seq_lm" else "modernbert"
        file, write = tasks.ROWS[recipe.task]
        return tasks.make_base(folder / "base", family), write(folder / file, 40)
    makers = {"tools": make_call, "dpo": make_pair, "orpo": make_pair, "kto": make_vote}
    make = makers.get(name) or BY_COLUMNS[recipe.data.format]
    base = tiny / "model"
    if name == "tools":
        base = folder / "base"
        shutil.copytree(tiny / "model", base)
        (base / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    return base, write_rows(folder / "rows.jsonl", make)


def test_the_table_has_what_people_do() -> None:
    assert set(NAMES) >= REQUIRED
    assert len(NAMES) >= 20


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_trains_a_step(name: str, tiny: Path, tmp_path: Path, lora) -> None:
    base, rows = find_stand_ins(name, tiny, tmp_path)
    recipe = load_recipe(Path(name))
    changes: dict[str, object] = {
        "model.name_or_path": base,
        "data.path": rows,
        "output_dir": tmp_path / "run",
        "training.max_steps": 1,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.save_strategy": "no",
        "training.logging_steps": 1,
    }
    if recipe.model.revision:
        changes["model.revision"] = "null"
    if recipe.data.name:
        changes["data.name"] = "null"
    if recipe.task != "image_classification":
        changes["training.max_length"] = 256 if recipe.task == "causal_lm" else 64
    if recipe.training.packed_length not in (None, "auto"):
        changes["training.packed_length"] = 256
    if recipe.data.eval_split and recipe.task == "causal_lm":
        changes |= {"data.split": "train[:76]", "data.eval_split": "train[76:]"}
    if recipe.training.sample_prompts:
        changes["training.sample_tokens"] = 4
    if recipe.data.eval_rows:
        changes["data.eval_rows"] = 2
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    several = ["--nproc", "2"] if recipe.distributed.shards else []
    done = lora("train", name, *several, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in metrics if '"loss"' in line]
    assert len(losses) == 1
    assert math.isfinite(losses[0])
