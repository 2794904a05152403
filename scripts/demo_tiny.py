"""The main job, end to end, on a model that is made here, for each method named: train, merge,
export to GGUF, answer held-out prompts with each.

    python scripts/demo_tiny.py lora [qlora dora qdora]

Each step is the `lora` command a user would type, printed before it runs. Afterwards one table says
how many held-out rows the base, the adapter, the merged model and each GGUF file answer exactly.
Exit 1 if an adapter did not learn its task (base under 10 %, adapter over 90 %), or if what was
made from it answers otherwise than the adapter does.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from lora_cli.common import ui

TINY = Path("build/tiny")
METHODS = ("lora", "qlora", "dora", "qdora")
SHOWN = 5
TYPES = ["f16", "q8_0", "Q4_K_M"]
LORA = str(Path(sys.executable).with_name("lora"))


def main(methods: list[str]) -> int:
    """Run the pipeline for each method and print the table; the exit code."""
    if unknown := set(methods) - set(METHODS):
        print(
            f"usage: python scripts/demo_tiny.py {' '.join(METHODS)} (not {', '.join(unknown)})",
            file=sys.stderr,
        )
        return 2
    started = time.monotonic()
    run_lora("setup-llama-cpp")
    rows, failures = [], []
    for method in methods:
        scores, distance = pipeline(method)
        rows.append([method, *(f"{100 * share:.1f}%" for share in scores.values()), distance])
        failures += [f"{method}: {problem}" for problem in problems(scores)]
    print(
        f"\nexact match on {len(TINY.joinpath('eval.jsonl').read_text().splitlines())} held-out "
        "rows"
    )
    print(
        *ui.format_table(["method", "base", "adapter", "merged", *TYPES, "merge |Δlogit|"], rows),
        sep="\n",
    )
    print(f"done in {ui.format_duration(time.monotonic() - started)}")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def pipeline(method: str) -> tuple[dict[str, float], str]:
    """Share of exact answers by form of the model, and the largest logit difference that the merge
    reported."""
    run = Path("runs") / ("demo" if method == "lora" else f"demo-{method}")
    shutil.rmtree(run, ignore_errors=True)
    run_lora(
        "train", "configs/demo.yaml", "--set", f"method={method}", "--set", f"output_dir={run}"
    )
    report = run_lora("merge", str(run / "adapter"), str(run / "merged"))
    distance = re.search(r"merged against base with adapter: largest \|Δlogit\| (\S+),", report)
    assert distance, "lora merge prints the largest difference"
    options = [option for kind in TYPES for option in ("--quantize", kind)]
    run_lora("export-gguf", str(run / "merged"), *options)
    ggufs = [str(run / "merged" / f"{run.name}-{kind}.gguf") for kind in TYPES]
    forms = dict(
        zip(
            ["base", "adapter", "merged", *TYPES],
            [str(TINY / "model"), str(run / "adapter"), str(run / "merged"), *ggufs],
        )
    )
    answers = run_lora(
        "generate",
        *forms.values(),
        "--file",
        str(TINY / "eval.jsonl"),
        "--max-new-tokens",
        "48",
        "--json",
    )
    return compare(
        forms, [json.loads(line) for line in answers.splitlines() if line.startswith("{")]
    ), distance[1]


def compare(forms: dict[str, str], answers: list[dict[str, str]]) -> dict[str, float]:
    """Print the first prompts with every form's answer; the share of exact answers by form."""
    given = {form: [row for row in answers if row["model"] == path] for form, path in forms.items()}
    for index in range(SHOWN):
        first = given["base"][index]
        print(f"\nprompt:   {first['prompt']}\nexpected: {first['expected']}")
        for form, rows in given.items():
            print(f"  {form:8} {rows[index]['answer'].strip()}")
    return {
        form: sum(r["answer"].strip() == r["expected"] for r in rows) / len(rows)
        for form, rows in given.items()
    }


def problems(scores: dict[str, float]) -> list[str]:
    """What is wrong with the shares, in words."""
    found = []
    if scores["base"] >= 0.1:
        found.append(f"the base knew the task already ({scores['base']:.1%})")
    if scores["adapter"] <= 0.9:
        found.append(f"the adapter did not learn it ({scores['adapter']:.1%})")
    for form in ("merged", "f16", "q8_0"):
        if abs(scores[form] - scores["adapter"]) > 0.02:
            found.append(
                f"{form} answers {scores[form]:.1%} exactly, the adapter {scores['adapter']:.1%}"
            )
    return found


def run_lora(*arguments: str) -> str:
    """Run one `lora` command, its prose shown as it comes; returns stdout and prose. Ends the demo
    if it fails."""
    print(f"\n$ lora {' '.join(arguments)}", flush=True)
    process = subprocess.Popen(
        [LORA, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = []
    for line in process.stdout:
        output.append(line)
        if not line.startswith("{"):  # the answers are compared below
            print(line, end="", flush=True)
    if process.wait() != 0:
        sys.exit(f"error: lora {arguments[0]} failed")
    return "".join(output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["lora"]))
