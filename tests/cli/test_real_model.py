"""A real model through the whole chain, as a user types it: SmolLM2-135M-Instruct is trained on
orders to be answered with JSON by each method, merged, exported, asked, and its forms compared.

What the tiny model cannot show: 30 layers of width 576, which 256 does not divide, three key heads
for nine, tied embeddings of 49,152 tokens, a byte-level tokenizer, bfloat16, and weights that were
trained at length. Hermetic: the model is made of a package, the rows are drawn by
scripts/make_orders.py. All three
GGUF types are made of lora and qdora, q8_0 of all four. Alone: pytest -m slow
tests/cli/test_real_model.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.make_orders import write_rows

pytestmark = pytest.mark.slow
TYPES = {
    "lora": ("f16", "q8_0", "Q4_K_M"),
    "qlora": ("q8_0",),
    "dora": ("q8_0",),
    "qdora": ("f16", "q8_0", "Q4_K_M"),
}
NUM_ROWS, NUM_HELD_OUT = 128, 16
LEARNED = 0.5
"""Of the held-out orders, answered exactly, at least. The base answers none."""
APART = {"f16": 1, "q8_0": 3, "Q4_K_M": 6}
"""Answers of the 16 by which a GGUF may differ from the merged model in number: rounding turns the
answers that the model is unsure of."""
RECIPE = """
model: {{name_or_path: {model}, dtype: bfloat16, system_prompt: Write the order as JSON.}}
method: {method}
lora: {{r: 16}}
data: {{path: {rows}}}
training: {{max_steps: 16, per_device_train_batch_size: 8, learning_rate: 1e-3, save_strategy: "no"}}
output_dir: {out}
"""


@pytest.fixture
def run(lora):
    """`run(*arguments)` is a command that succeeds: its stdout and its prose."""

    def succeed(*arguments: object) -> tuple[str, str]:
        done = lora(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return succeed


def count_exact(answers: str) -> dict[str, int]:
    """How many answers of `generate --json` are the expected ones, by the model's path."""
    exact: dict[str, int] = {}
    for row in map(json.loads, answers.splitlines()):
        right = row["answer"].strip() == row["expected"]
        exact[row["model"]] = exact.get(row["model"], 0) + right
    return exact


def check_merge(merged: Path, said: str) -> None:
    """The three checks of a merge, in its record: exact before rounding, the files' weights, and
    what rounding does. transformers alone reads 30 layers of what was written."""
    assert "210 of 210 modules merged" in said
    checked = json.loads((merged / "lora_record.json").read_text())["checked"]
    assert checked["weights"].startswith("merged again: 272 of 272 tensors equal, 0.00%")
    exact, rounded = checked["before_rounding"], checked["rounded"]
    assert exact["max_abs"] < 1e-2 * rounded["max_abs"], "bfloat16 has 16 bits fewer than float32"
    assert exact["top1"] == 1.0
    assert exact["mean_kl"] < 1e-8 < rounded["mean_kl"] < 5e-3


def check_export(folder: Path, stdout: str, said: str, with_base: bool) -> None:
    """Each file is reported with its KL; a rounded one, where that is asked for, beside the
    base's."""
    for file in map(Path, stdout.splitlines()):
        report = json.loads(file.with_name(f"{file.name}.json").read_text())["checked"]
        assert report in said
        (kl, *base) = [float(number) for number in re.findall(r"mean KL (\S+?),", report)]
        if "f16" in file.name:
            assert kl < 1e-4
            continue
        assert len(base) == with_base
        # rounding costs what was trained about what it costs the base: measured 0.9 to 1.5 times
        assert all(0.3 * of_base < kl < 3 * of_base for of_base in base)


@pytest.mark.parametrize("method", TYPES)
def test_what_a_real_model_learned_is_in_every_form(
    run, real: Path, tmp_path: Path, method: str
) -> None:
    rows, held_out = write_rows(tmp_path, NUM_ROWS, NUM_HELD_OUT)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=real, method=method, rows=rows, out=tmp_path / method))
    run("train", recipe)
    adapter, merged = tmp_path / method / "adapter", tmp_path / method / "merged"
    _, said = run("merge", adapter, merged)
    check_merge(merged, said)
    with_base = method == "lora"
    options = [word for name in TYPES[method] for word in ("-q", name)]
    options += [] if with_base else ["--no-base-cost"]
    stdout, said = run("export-gguf", merged, *options)
    ggufs = stdout.splitlines()
    assert len(ggufs) == len(TYPES[method])
    check_export(merged, stdout, said, with_base)

    forms = [*([real] if with_base else []), adapter, merged, *ggufs]
    asked = ("--file", held_out, "--max-new-tokens", 48, "--json")
    exact = count_exact(run("generate", *forms, *asked)[0])
    print(f"{method}: answered exactly: {list(exact.values())} of {NUM_HELD_OUT}")
    assert exact.pop(str(real), 0) == 0, "the base does not know the form of the answer"
    assert len(exact) == 2 + len(ggufs)
    assert min(exact.values()) >= LEARNED * NUM_HELD_OUT, exact
    for gguf, name in zip(ggufs, TYPES[method], strict=True):
        assert abs(exact[gguf] - exact[str(merged)]) <= APART[name], exact

    assert "272 of 272 tensors equal" in run("verify", adapter, merged)[0]
    assert "mean KL" in run("verify", merged, ggufs[-1])[0]
    check_by_transformers(real, merged)


def check_by_transformers(real: Path, merged: Path) -> None:
    """transformers alone opens what was made, and reads another function than the base's."""
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write this order as JSON."}], return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits.float()
            for folder in (real, merged)
        )
    assert (after - before).abs().max() > 1.0
