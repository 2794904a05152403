"""How long preparing rows takes, against the tokenizer alone; and the memory that reading a large
file takes.

    python scripts/bench_data.py [--rows 50000] [--large 5000000]

Rows are made like Alpaca's (instruction, output; 5 to 30 and 5 to 120 common words). The ratio is
`data.prepare` over `tokenizer(texts)` in one batch call on the same rendered texts, both sides
alternating, the best of five; and what it takes when the same rows were prepared before. Then the
growth of the process's memory while the rows of a large .jsonl are prepared and read back, and
while they are streamed, against the same for a file a tenth as large.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from lora_cli.data import load

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
WORDS = (
    "the of and to in is that it was for on are as with they at be this have from or one had by "
    "word but not what all "
    "were we when your can said there use an each which she do how their if will up other about "
    "out many then them "
    "these so some her would make like him into time has look two more write go see number no way "
    "could people my than"
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
    from lora_cli.data import cache, formats, prepare, sources
    from lora_cli.data.encode import Renderer
    from lora_cli.models.tokenizer import load_tokenizer
    from lora_cli.recipe.load import load_recipe

    write_rows(folder / "rows.jsonl", count)
    recipe = folder / "r.yaml"
    recipe.write_text(f"model: {{name_or_path: x}}\ndata: {{path: {folder / 'rows.jsonl'}}}\n")
    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(str(ROOT / "build" / "tiny" / "model"))
    source = sources.find_source(loaded.data, "path", loaded.data.path, "train")
    convert, renderer = formats.find_converter("alpaca"), Renderer(tokenizer, "assistant")
    texts = [renderer.render_conversation(convert(row))[0][0] for _, row in source.read_rows()]
    alone, whole, again = [], [], []
    for _ in range(5):
        shutil.rmtree(cache.find_folder(), ignore_errors=True)
        started = time.perf_counter()
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        alone.append(time.perf_counter() - started)
        for times in (whole, again):
            started = time.perf_counter()
            prepared = prepare.prepare(source, loaded, renderer)
            times.append(time.perf_counter() - started)
    assert prepared.counts.tokens == sum(map(len, ids))
    print(f"{count:,} rows, {prepared.counts.tokens:,} tokens: tokenizer alone {min(alone):.2f} s")
    print(
        f"prepare {min(whole):.2f} s, ratio {min(whole) / min(alone):.2f}; from the cache "
        f"{min(again):.2f} s"
    )
    ratios = sorted(ours / theirs for ours, theirs in zip(whole, alone))
    print(f"the five ratios: {', '.join(f'{ratio:.2f}' for ratio in ratios)}", flush=True)


def memory_of(path: Path, streamed: bool) -> float:
    """Growth of the process's memory, in MB, while every row of `path` is prepared and read, or
    streamed."""
    from lora_cli.data import cache
    from lora_cli.models.tokenizer import load_tokenizer
    from lora_cli.recipe.load import load_recipe

    recipe = path.with_suffix(".yaml")
    steps = "training: {max_steps: 1}\n"
    recipe.write_text(
        f"model: {{name_or_path: x}}\ndata: "
        f"{{path: {path}, streaming: {str(streamed).lower()}}}\n{steps}"
    )
    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(str(ROOT / "build" / "tiny" / "model"))
    process, done = psutil.Process(), threading.Event()
    before = most = anonymous(process)

    def watch() -> None:
        nonlocal most
        while not done.wait(0.2):
            most = max(most, anonymous(process))

    watcher = threading.Thread(target=watch)
    watcher.start()
    prepared = load.load_rows(loaded, tokenizer)[0]
    with path.open(encoding="utf-8") as file:
        number = sum(1 for _ in file)
    rows = prepared.rows if prepared.stream is None else prepared.stream.take(number)
    passed = sum(len(batch["labels"]) for batch in rows.iter(cache.BATCH))
    assert passed == number, (passed, number)
    done.set()
    watcher.join()
    return (most - before) / 1e6


def anonymous(process: psutil.Process) -> int:
    """Memory of the process in bytes, without the pages of mapped files, which the system takes
    back at will."""
    info = process.memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def memory(folder: Path, large: int) -> None:
    """Print the growth for a tenth of the rows and for all, prepared and streamed, each in a
    process of its own."""
    for count in (large // 10, large):
        path = folder / "large.jsonl"
        write_rows(path, count)
        for how in ("prepared", "streamed"):
            started = time.perf_counter()
            command = [sys.executable, __file__, "--memory-of", str(path), "--how", how]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            grown, took = float(done.stdout.split()[-1]), time.perf_counter() - started
            size = path.stat().st_size / 1e6
            print(
                f"{count:,} rows, {size:,.0f} MB, {how}: memory grows by {grown:.0f} MB "
                f"({took:.0f} s)",
                flush=True,
            )


def main() -> None:
    """Both, in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--large", type=int, default=5_000_000)
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--how", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(memory_of(arguments.memory_of, arguments.how == "streamed"))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LORA_CACHE_DIR"] = folder
        speed(Path(folder), arguments.rows)
        memory(Path(folder), arguments.large)


if __name__ == "__main__":
    main()
