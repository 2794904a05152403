"""A real model in minutes: SmolLM2-135M-Instruct learns to answer an order, in whatever words, with
JSON.

    python scripts/demo.py [--out runs/demo]

fetches the model (scripts/real_model.py) and writes the rows (scripts/make_orders.py) unless they
are there; trains an adapter by the shipped recipe `extract`, merges it, exports the merged model as
GGUF files, asks one of them over HTTP, and scores every form of the model on 200 orders of people,
things, towns and numbers that no training row has. Prints three questions with every form's answer,
the share of exact answers, and what each step took. Exit status 1 where the base knew the task, or
a form of the trained model does not.

No GPU, no compiler and no account: pip fetches all of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_orders import write_rows

from lora_cli.common import ui

REAL, ROWS = Path("build/smollm2"), Path("build/orders")
TYPES = ("f16", "q8_0", "Q4_K_M")
NUM_TRAIN, NUM_HELD_OUT = 320, 200
SHOWN = 3
KNEW, LEARNED = 0.1, 0.9
"""The base answers less than the one share exactly, every form of the trained model at least the
other."""
LONGEST = 48
"""Tokens of an answer: the longest expected one has 35. The base ends few of its own."""
LORA = str(Path(sys.executable).with_name("lora"))
Scores = dict[str, float]


class Clock:
    """What each step took."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        """Time what is inside."""
        started = time.monotonic()
        yield
        self.steps[step] = time.monotonic() - started

    def list_rows(self) -> list[list[str]]:
        """Return the rows of a table, the sum last."""
        steps = {**self.steps, "together": sum(self.steps.values())}
        return [[step, ui.format_duration(seconds)] for step, seconds in steps.items()]


def main() -> int:
    """Run every step and print what came of it; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="the run's folder")
    run = parser.parse_args().out
    clock = Clock()
    shutil.rmtree(run, ignore_errors=True)
    with clock.measure("fetch and convert the model"):
        fetch_model()
    with clock.measure("fetch llama.cpp's converter"):
        run_lora("setup-llama-cpp")
    train_rows, held_out = write_rows(ROWS, NUM_TRAIN, NUM_HELD_OUT)
    with clock.measure("train"):
        train(run, train_rows)
    with clock.measure("merge"):
        run_lora("merge", run / "adapter", run / "merged")
    with clock.measure("export"):
        options = [word for kind in TYPES for word in ("--quantize", kind)]
        run_lora("export-gguf", run / "merged", *options, "--no-base-cost")
    ggufs = {kind: run / "merged" / f"{run.name}-{kind}.gguf" for kind in TYPES}
    with clock.measure("serve"):
        ask_over_http(ggufs["q8_0"], held_out)
    forms = {"base": REAL / "model", "adapter": run / "adapter", "merged": run / "merged", **ggufs}
    with clock.measure("evaluate"):
        scores = evaluate(forms, run, held_out)
    report(run, scores, clock)
    failures = list(find_problems(scores))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def fetch_model() -> None:
    """Make the base model's folder, unless it is there."""
    if (REAL / "DONE").is_file():
        print(f"the model is in {REAL} already")
        return
    shutil.rmtree(REAL, ignore_errors=True)
    script = Path(__file__).with_name("real_model.py")
    if subprocess.run([sys.executable, script, REAL]).returncode:
        sys.exit(1)


def train(run: Path, rows: Path) -> None:
    """Train by the shipped recipe."""
    given = {"model.name_or_path": REAL / "model", "data.path": rows, "output_dir": run}
    run_lora("train", "extract", *(w for k, v in given.items() for w in ("--set", f"{k}={v}")))


def run_lora(*words: object) -> None:
    """Run one `lora` command, what it says shown as it comes. Ends the demo if it fails."""
    print(f"\n$ lora {' '.join(map(str, words))}", flush=True)
    if subprocess.run([LORA, *map(str, words)]).returncode:
        sys.exit(f"error: lora {words[0]} failed")


def ask_over_http(gguf: Path, held_out: Path) -> None:
    """Serve a GGUF file and ask it one held-out order, as any client of OpenAI's API would."""
    row = json.loads(held_out.read_text(encoding="utf-8").splitlines()[0])
    print(f"\n$ lora serve {gguf} --port 0", flush=True)
    key = secrets.token_hex()
    server = subprocess.Popen(
        [LORA, "serve", str(gguf), "--port", "0"],
        env={**os.environ, "LORA_API_KEY": key},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        name, url = wait_for_server(server)
        asked = {"model": name, "messages": [{"role": "user", "content": row["prompt"]}]}
        asked["temperature"] = 0
        print(f"POST {url}/chat/completions\n{json.dumps(asked)}")
        answer = post(f"{url}/chat/completions", key, asked)
        print(answer["choices"][0]["message"]["content"])
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_for_server(server: subprocess.Popen[str]) -> tuple[str, str]:
    """Return what a server that was started calls its model, and where it listens."""
    assert server.stderr is not None
    said = ""
    for line in server.stderr:
        said += line
        if found := re.match(r"serving (\S+) at (http://\S+/v1)", line):
            return found[1], found[2]
    sys.exit(f"error: lora serve ended\n{said}")


def post(url: str, key: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Post JSON and return the JSON that is answered."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    # a proxy of the environment must not get what is asked of this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as reply:
        return json.load(reply)


def evaluate(forms: Mapping[str, Path], run: Path, held_out: Path) -> Scores:
    """Score every form on the held-out rows, and print the first with what each answered; the share
    of exact answers by form.

    Two commands at a time, each with half of the processors: an answer is written token by token,
    which two threads of one process do not do in half the time.
    """
    names = list(forms)
    # a GGUF file takes twice as long as the others: about half of the work in each
    *first, f16, q8_0, last = names
    halves = [*first, last], [f16, q8_0]
    parts = {run / "evaluations" / name: half for name, half in zip(("one", "two"), halves)}
    half = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    started = []
    for folder, some in parts.items():
        words = ["evaluate", *(forms[name] for name in some), "--data", held_out, "--out", folder]
        words += ["--metrics", "exact", "--no-forgetting", "--batch-size", 32, "--show", 0]
        words += ["--max-new-tokens", LONGEST]
        print(f"\n$ lora {' '.join(map(str, words))}", flush=True)
        started.append(
            subprocess.Popen([LORA, *map(str, words)], env=half, stdout=subprocess.DEVNULL)
        )
    if any([process.wait() for process in started]):
        sys.exit("error: lora evaluate failed")
    show_answers(forms, [folder / "answers.jsonl" for folder in parts])
    scores: Scores = {}
    for folder, some in parts.items():
        found = json.loads((folder / "evaluation.json").read_text())["models"]
        values = [each["metrics"]["exact"]["value"] for each in found]
        scores |= dict(zip(some, values, strict=True))  # they stand as they were given
    return {name: scores[name] for name in names}


def show_answers(forms: Mapping[str, Path], files: Sequence[Path]) -> None:
    """Print the first questions with every form's answer."""
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for number in sorted({line["row"] for line in lines})[:SHOWN]:
        some = [line for line in lines if line["row"] == number]
        print(f"\nquestion: {some[0]['prompt']}\nexpected: {some[0]['expected']}")
        for name, line in zip(forms, some, strict=True):
            print(f"  {name:8} {' '.join(line['answer'].split())}")


def find_problems(scores: Scores) -> Iterator[str]:
    """Say in words what is wrong with the shares of exact answers."""
    for name, share in scores.items():
        if name == "base" and share >= KNEW:
            yield f"the base knew the task already: {share:.1%} answered exactly"
        if name != "base" and share < LEARNED:
            yield f"{name} answers {share:.1%} exactly, and {LEARNED:.0%} are asked for"


def report(run: Path, scores: Scores, clock: Clock) -> None:
    """Print the table of scores, that of times, and where the report is."""
    shares = [f"{share:.1%}" for share in scores.values()]
    print(f"\nanswered exactly, of {NUM_HELD_OUT} held-out orders")
    print(*ui.format_table(list(scores), [shares]), sep="\n")
    print()
    print(*ui.format_table(["step", "time"], clock.list_rows()), sep="\n")
    print(f"\nreport: {run / 'report.html'}\nnext: lora chat {run / 'adapter'}")


if __name__ == "__main__":
    sys.exit(main())
