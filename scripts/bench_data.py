"""How long preparing rows takes, against the tokenizer alone; and the memory that reading a large file takes.

    python scripts/bench_data.py [--rows 50000] [--large 5000000]

Rows are made like Alpaca's (instruction, output; 5 to 30 and 5 to 120 common words). The ratio is `data.prepare` over
`tokenizer(texts)` in one batch call on the same rendered texts, both sides alternating, the best of five. Then the
growth of the process's memory while the rows of a large .jsonl pass through reading and encoding, against the same for
a file a tenth as large.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
WORDS = (
    "the of and to in is that it was for on are as with they at be this have from or one had by word but not what all "
    "were we when your can said there use an each which she do how their if will up other about out many then them "
    "these so some her would make like him into time has look two more write go see number no way could people my than"
).split()


def write_rows(path: Path, count: int) -> None:
    """Alpaca-like rows."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {
                "instruction": draw.choices(WORDS, k=draw.randint(5, 30)),
                "input": [],
                "output": draw.choices(WORDS, k=draw.randint(5, 120)),
            }
            file.write(json.dumps({name: " ".join(words) for name, words in row.items()}) + "\n")


def speed(folder: Path, count: int) -> None:
    """Print both times and their ratio."""
    from lora_cli import data, formats, model, recipe_file, sources
    from lora_cli.render import Renderer

    write_rows(folder / "rows.jsonl", count)
    recipe = folder / "r.yaml"
    recipe.write_text(f"model: {{name_or_path: x}}\ndata: {{path: {folder / 'rows.jsonl'}}}\n")
    loaded = recipe_file.load(recipe)
    tokenizer = model.load_tokenizer(str(ROOT / "build" / "tiny" / "model"))
    source = sources.find(loaded.data, "path", loaded.data.path, "train")
    convert, renderer = formats.converter("alpaca"), Renderer(tokenizer, "assistant")
    texts = [renderer.conversation(convert(row))[0][0] for _, row in source.rows()]
    times: dict[str, list[float]] = {"tokenizer": [], "prepare": []}
    for _ in range(5):
        started = time.perf_counter()
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        times["tokenizer"].append(time.perf_counter() - started)
        started = time.perf_counter()
        prepared = data.prepare(source, loaded, tokenizer)
        times["prepare"].append(time.perf_counter() - started)
    assert prepared.counts.tokens == sum(map(len, ids))
    alone, whole = min(times["tokenizer"]), min(times["prepare"])
    print(f"{count:,} rows, {prepared.counts.tokens:,} tokens: tokenizer alone {alone:.2f} s, prepare {whole:.2f} s")
    print(f"ratio {whole / alone:.2f}")


def memory_of(path: Path) -> float:
    """Growth of the process's memory, in MB, while every row of `path` is read and encoded, and nothing kept."""
    from lora_cli import data, model, recipe_file, sources

    recipe = path.with_suffix(".yaml")
    recipe.write_text(f"model: {{name_or_path: x}}\ndata: {{path: {path}}}\n")
    loaded = recipe_file.load(recipe)
    tokenizer = model.load_tokenizer(str(ROOT / "build" / "tiny" / "model"))
    process = psutil.Process()
    source = sources.find(loaded.data, "path", loaded.data.path, "train")
    before = most = process.memory_info().rss
    for number, _ in enumerate(data.stream(source, loaded, tokenizer)):
        if number % 5000 == 0:
            most = max(most, process.memory_info().rss)
    return (most - before) / 1e6


def memory(folder: Path, large: int) -> None:
    """Print the growth for a tenth of the rows and for all, each in a process of its own."""
    found = []
    for count in (large // 10, large):
        write_rows(folder / "large.jsonl", count)
        done = subprocess.run(
            [sys.executable, __file__, "--memory-of", str(folder / "large.jsonl")],
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(float(done.stdout.split()[-1]))
        size = (folder / "large.jsonl").stat().st_size / 1e6
        print(f"{count:,} rows, {size:,.0f} MB: memory grows by {found[-1]:.0f} MB while they pass")
    print(f"difference {found[1] - found[0]:.0f} MB for {large - large // 10:,} more rows")


def main() -> None:
    """Both, in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--large", type=int, default=5_000_000)
    parser.add_argument("--memory-of", type=Path)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments.memory_of))
        return
    with tempfile.TemporaryDirectory() as folder:
        speed(Path(folder), arguments.rows)
        memory(Path(folder), arguments.large)


if __name__ == "__main__":
    main()
