"""What else is worth knowing: DoRA and dropout beside LoRA, steps of few tokens, and answers of an
adapter beside its merged model."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu_parts import models, runs, speeds
from gpu_parts.part import Bench, Case, Figures, NotHereError
from gpu_parts.report import Column
from lora_cli.evaluate import generate

TITLE = "1B: other adapters, short steps, answers"
COLUMNS = (
    *speeds.COLUMNS[:4],
    Column("of LoRA", "of_lora", 2),
    *speeds.COLUMNS[6:8],
    Column("answers, tokens/s", "answered_per_s"),
    Column("adapter/merged", "of_merged", 2),
)
LENGTH, ROWS = 512, 16
RUNS: dict[str, tuple[int, int, Figures, list[str]]] = {
    "lora": (LENGTH, ROWS, {}, []),
    "dora": (LENGTH, ROWS, {"method": "dora"}, []),
    "lora, dropout 0.05": (LENGTH, ROWS, {"lora": {"lora_dropout": 0.05}}, []),
    "dora as PEFT has it": (LENGTH, ROWS, {"method": "dora"}, ["peft"]),
    "qlora": (LENGTH, ROWS, {"method": "qlora"}, []),
    "lora, 8 rows of 64 tokens": (64, 8, {}, []),
}
"""Tokens of a row, rows of a step, what the recipe says, and levers."""
PROMPTS, NEW = 16, 64


def list_cases(bench: Bench) -> dict[str, Case]:
    """Return the cases by name, in order of their value."""
    cases = {name: Case(partial(measure, name), 30) for name in RUNS}
    return {
        **{name: cases.pop(name) for name in [*cases][:3]},
        "merged": Case(partial(answer, "merged"), 60),
        "adapter": Case(partial(answer, "adapter"), 30),
        **cases,
    }


def measure(name: str, bench: Bench) -> Figures:
    """Train as the recipe of this name says; return its speed, and that as a share of LoRA's."""
    length, number, changes, names = RUNS[name]
    alike = length == LENGTH
    length, number = (length // 8, number // 4) if bench.small else (length, number)
    rows = models.write_even_rows(bench, length, number * speeds.STEPS)
    training = {"per_device_train_batch_size": number, "gradient_checkpointing": False}
    model = models.make_model(bench, "1B")
    given = changes | {"training": training}
    found = speeds.measure(bench, f"rest {name}", model, rows, given, names)
    ours = bench.read_earlier("rest", "lora").get("tokens_per_s")
    return found | ({"of_lora": found["tokens_per_s"] / ours} if ours and alike else {})


def answer(form: str, bench: Bench) -> Figures:
    """Answer prompts with what the case `lora` has trained; return tokens a second."""
    folder = bench.scratch / "runs" / "rest-lora"
    paths = {"adapter": folder / "run/adapter", "merged": folder / "merged"}
    if not paths["adapter"].is_dir():
        raise NotHereError("lora has trained nothing")
    if form == "merged" and not paths["merged"].is_dir():
        runs.call("merge", *paths.values())
    found = time_answers(paths[form], 4 if bench.small else PROMPTS, bench)
    merged = bench.read_earlier("rest", "merged").get("answered_per_s")
    return found | ({"of_merged": found["answered_per_s"] / merged} if merged else {})


def time_answers(path: Path, number: int, bench: Bench) -> Figures:
    """Return new tokens a second of `number` prompts answered at once."""
    (answerer,) = generate.open_models([str(path)]).values()
    network: Any = answerer.bases.loaded[answerer.key]
    own, made = network.generate, list[int]()

    def counted(**given: Any) -> Any:
        output = own(**given)
        made.append(output.shape[0] * (output.shape[1] - given["input_ids"].shape[1]))
        return output

    network.generate = counted
    prompt = [{"role": "user", "content": "Reverse: tea ice kit gas map"}]
    asked, sampling = [generate.Asked(prompt)] * number, generate.Sampling(NEW, 0.0)
    answerer.answer(asked[:1], sampling)
    bench.clock.finish()
    began = time.perf_counter()
    answerer.answer(asked, sampling)
    bench.clock.finish()
    spent = time.perf_counter() - began
    return {"answered_per_s": made[-1] / spent, "answered": made[-1], "answer_s": spent}
