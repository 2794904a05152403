"""Runs written by hand, as `lora train`, `lora evaluate`, `lora merge` and `lora export-gguf` leave
them, for the tests of the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ID = "0123456789abcdef0123456789abcdef"
STARTED = "2026-11-27T04:33:25+00:00"


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def make_record(**changes: Any) -> dict[str, Any]:
    """The record of a finished run, with `changes`."""
    return {
        "command": "train",
        "started": STARTED,
        "updated": "2026-11-27T04:38:25+00:00",
        "versions": {"lora-cli": "0.1.0", "torch": "2.13.0"},
        "id": ID,
        "status": "finished",
        "recipe": {
            "task": "causal_lm",
            "method": "lora",
            "trainer": "sft",
            "model": {"name_or_path": "owner/base", "dtype": "float32"},
            "lora": {"r": 8, "lora_alpha": 32},
            "data": {"path": "rows.jsonl", "on_long_row": "drop"},
            "training": {"learning_rate": 0.0005, "max_length": 128, "packing": "step"},
            "output_dir": "runs/one",
        },
        "choices": [{"name": "training.packing", "value": "step", "reason": "no padding"}],
        "base": {
            "name": "owner/base",
            "commit": "a" * 40,
            "fingerprint": {"config": {"hidden_size": 64}, "tensors": {"w": "b" * 64}},
        },
        "device": {"kind": "cpu", "name": "this machine's memory"},
        "data": {
            "fingerprint": "f" * 32,
            "read": 600,
            "rows": 450,
            "tokens": 45_123,
            "trained_tokens": 21_001,
            "left_out": {"dropped: over 128 tokens": 149, "dropped: bad": 1},
        },
        "holdout": {"rows": 50, "of": 650, "fingerprint": "e" * 32},
        "results": {
            "steps": 100,
            "train_loss": 1.25,
            "tokens_per_second": 1234.5,
            "peak_memory_gb": 1.75,
            "duration_s": 321.5,
        },
        "parameters": {"trainable": 36_864, "total": 203_520, "modules": 32},
        **changes,
    }


def make_metrics(steps: int = 100, every: int = 20, turn: int = 60) -> list[dict[str, Any]]:
    """Loss that falls with some noise, and evaluations that are best at step `turn`."""
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        noise = math.sin(step * 12.9898) * 0.11 + math.sin(step * 3.1) * 0.06
        rate = 5e-4 * 0.5 * (1 + math.cos(math.pi * step / steps))
        lines.append(
            {
                "step": step,
                "loss": 0.6 + 1.9 * math.exp(-3 * step / steps) + noise,
                "grad_norm": 0.4 + 0.3 * math.exp(-step / 15) + abs(noise) / 3,
                "learning_rate": rate,
                "epoch": step / steps,
                "tokens_per_second": 1200 + 40 * noise,
                "peak_memory_gb": 1.2 + 0.5 * (1 - math.exp(-step / 10)),
            }
        )
        if step % every == 0:
            loss = 0.9 + 0.6 * ((step - turn) / steps) ** 2
            lines.append(
                {
                    "step": step,
                    "eval_loss": loss,
                    "eval_perplexity": math.exp(loss),
                    "eval_runtime": 0.5,
                }
            )
    lines.append({"step": steps, "train_runtime": 320.1, "train_loss": 1.25})
    return lines


def write_run(folder: Path, **changes: Any) -> Path:
    """A finished run of 100 steps, evaluated five times, best at step 60."""
    write_json(folder / "record.json", make_record(**changes))
    write_lines(folder / "metrics.jsonl", *make_metrics())
    (folder / "adapter").mkdir()
    return folder


def write_samples(folder: Path, *answers: tuple[int, str, str]) -> None:
    lines = [{"step": step, "prompt": prompt, "answer": text} for step, prompt, text in answers]
    write_lines(folder / "samples.jsonl", *lines)


def write_evaluation(
    folder: Path,
    name: str = "eval",
    exact: tuple[float, float] = (0.03, 0.61),
    rows: int = 4,
    paired: bool = True,
) -> Path:
    """What `lora evaluate` leaves of base and adapter, whose exact matches are given."""
    models = []
    for kind, share, loss, general in zip(("base", "adapter"), exact, (2.5, 0.875), (3.25, 3.3125)):
        metrics = {
            "exact": {"value": share, "low": share - 0.02, "high": share + 0.02, "count": 200},
            "loss": {"value": loss, "low": None, "high": None, "count": 200, "tokens": 4321},
        }
        apart = exact[1] - exact[0]
        differences = {"exact": {"value": apart, "low": apart - 0.015, "high": apart + 0.015}}
        label = "owner/base" if kind == "base" else "runs/one/adapter"
        forgetting = {"loss": general, "tokens": 2048}
        models.append(
            {
                "label": label,
                "kind": kind,
                "path": label,
                "metrics": metrics,
                "differences": differences if kind == "adapter" and paired else {},
                "forgetting": forgetting,
            }
        )
    where = folder / "evaluations" / name
    write_json(
        where / "evaluation.json",
        {
            "command": "evaluate",
            "started": "2026-11-27T05:00:00+00:00",
            "versions": {"lora-cli": "0.1.0"},
            "data": {"name": "eval.jsonl", "sha256": "c" * 64, "rows": 200},
            "sampling": {"temperature": 0.0},
            "against": "owner/base",
            "models": models,
            "differing": 150,
        },
    )
    lines = []
    for row in range(rows):
        same = row % 2 == 0
        for kind, model in (("base", "owner/base"), ("adapter", "runs/one/adapter")):
            answer = f"answer {row}" if same or kind == "adapter" else f"no idea about {row}"
            exact_match = {"exact": float(answer == f"answer {row}")}
            said = {"row": row, "place": f"eval.jsonl:{row + 1}", "model": model}
            said |= {"prompt": f"question {row}", "expected": f"answer {row}"}
            lines.append(said | {"answer": answer, "scores": exact_match})
    write_lines(where / "answers.jsonl", *lines)
    return where


def write_merged(folder: Path, run_id: str = ID, checked: Any = True) -> Path:
    """The folder of a merged model, without its weights."""
    figures = {"max_abs": 5.5e-5, "mean_kl": 1.25e-11, "top1": 1.0, "spread": 7.0}
    said = {
        "before_rounding": figures,
        "weights": "merged again: 272 of 272 tensors equal",
        "rounded": figures | {"max_abs": 0.652},
        "trained": "largest |Δlogit| 3.86e-01",
    }
    record = {"command": "merge", "started": STARTED, "versions": {}, "base": "owner/base"}
    record |= {"checked": said if checked else None, "parent": make_record(id=run_id)}
    write_json(folder / "lora_record.json", record)
    write_json(folder / "config.json", {})
    return folder


def write_gguf(file: Path, run_id: str = ID, engine: bool = True) -> Path:
    """A GGUF file's name and record."""
    likeness = {"mean_kl": 4.9e-2, "top1": 0.975, "perplexity": 10.96, "other_perplexity": 11.23}
    record: dict[str, Any] = {"command": "export-gguf", "started": STARTED, "versions": {}}
    record |= {"type": "Q4_K_M", "llama_cpp": "b1"}
    record["checked"] = (
        "in llama.cpp: mean KL 4.9e-02" if engine else "not compared: no llama.cpp engine"
    )
    if engine:
        record["figures"] = {"likeness": likeness | {"num_positions": 579}, "base": None}
    merged = {"command": "merge", "started": STARTED, "parent": make_record(id=run_id)}
    write_json(file.with_name(f"{file.name}.json"), record | {"parent": merged})
    file.write_bytes(b"GGUF")
    return file
