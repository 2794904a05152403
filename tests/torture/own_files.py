"""Change every field of every file that lora reads back, in every way, and see what its reader says.

    python -m tests.torture.own_files [FILE …] [--only N]

Each file of a run, an adapter or a model is valid JSON; one field of it at a time becomes something
else (`SHAPES`), a checkpoint's manifest is made to fit, and the verb that reads the file is run. It
must succeed, or exit 1 or 2 with an `error:` that names the file; and a refused `train --resume` must
leave the run's folder as it was, byte for byte. Hermetic: the tiny model, forked warm processes.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.torture.attacks.stage import find_llama_cpp
from tests.warm import ROOT, WarmCLI

MARK = "@@changed@@"
SHAPES = {
    "missing": None,
    "null": "null",
    "a text": '"x"',
    "a number": "7",
    "a list": "[1]",
    "a mapping": '{"a": {"b": [null]}}',
    "huge": "1e308",
    "a long number": "9" * 5000,
    "2^80": str(2**80),
    "NaN": "NaN",
    "negative": "-1",
    "a fraction": "0.5",
    "half a character": '"\\ud800"',
    "deep": "[" * 100_000 + "]" * 100_000,
    "true": "true",
    "20 MB": '"' + "a" * 20_000_000 + '"',
    "outside": '"../../x"',
}
RECIPE = """
method: lora
model: {{name_or_path: {model}}}
lora: {{r: 2, target_modules: [q_proj, v_proj]}}
data: {{path: rows.jsonl}}
training: {{max_steps: 4, save_steps: 2, logging_steps: 1, max_length: 64, num_train_epochs: 3}}
output_dir: run
"""
RESUME = ["train", "recipe.yaml", "--resume"]
FILES: dict[str, list[list[str]]] = {
    "run/record.json": [RESUME],
    "run/checkpoint-2/manifest.json": [RESUME],
    "run/checkpoint-2/trainer_state.json": [RESUME],
    "run/checkpoint-2/run_state.json": [RESUME],
    "run/checkpoint-2/rng_state_0.json": [RESUME],
    "adapter/lora_record.json": [
        ["merge", "adapter", "out"],
        ["combine", "adapter", "second", "out"],
        ["convert", "adapter", "out", "--r", "2"],
        ["verify", "adapter", "merged"],
        ["generate", "adapter", "--prompt", "hello", "--max-new-tokens", "1"],
    ],
    "adapter/adapter_config.json": [["merge", "adapter", "out"]],
    "merged/lora_record.json": [["export-gguf", "merged", "-q", "f32"]],
    "rows/counts.json": [["train", "other.yaml"]],
    "merged/config.json": [["generate", "merged", "--prompt", "hello", "--max-new-tokens", "1"]],
    "merged/generation_config.json": [["generate", "merged", "--prompt", "hello", "--max-new-tokens", "1"]],
    "merged/tokenizer_config.json": [["generate", "merged", "--prompt", "hello", "--max-new-tokens", "1"]],
    "merged/tokenizer.json": [["generate", "merged", "--prompt", "hello", "--max-new-tokens", "1"]],
    "merged/model.safetensors.index.json": [["generate", "merged", "--prompt", "hello", "--max-new-tokens", "1"]],
}  # fmt: skip
Keys = tuple[str | int, ...]


class Case(NamedTuple):
    """One field of one file, what it becomes, and which of the file's verbs is run."""

    file: str
    keys: Keys
    shape: str
    verb: int

    def __str__(self) -> str:
        return f"{self.file}: {'.'.join(map(str, self.keys)) or 'all of it'} = {self.shape}"


def walk_fields(value: Any, keys: Keys = ()) -> Iterator[Keys]:
    """Yield the paths of all fields; of a long list, and of a large mapping within others, the
    first two and the last."""
    yield keys
    inner: list[Any] = []
    if isinstance(value, (dict, list)):
        inner = list(value.items() if isinstance(value, dict) else enumerate(value))
    if len(inner) > 12 and (isinstance(value, list) or len(keys) > 1):
        inner = [*inner[:2], *inner[2:][-1:]]
    for key, each in inner:
        yield from walk_fields(each, (*keys, key))


def change(data: Any, keys: Keys, shape: str) -> str | None:
    """Return the file's text with the field at `keys` changed; None where that cannot be."""
    text = SHAPES[shape]
    if not keys:
        return text
    data = json.loads(json.dumps(data))
    holder = data
    for key in keys[:-1]:
        holder = holder[key]
    if text is None:
        del holder[keys[-1]]
        return json.dumps(data)
    holder[keys[-1]] = MARK
    return json.dumps(data).replace(json.dumps(MARK), text)


def list_cases(folder: Path, names: list[str]) -> list[Case]:
    """List all cases of these files, whose valid forms are in `folder`."""
    return [
        Case(name, keys, shape, verb)
        for name in names
        for keys in walk_fields(json.loads((folder / name).read_text()))
        for shape in SHAPES
        for verb in range(len(FILES[name]))
    ]


def make_valid(cli: WarmCLI, folder: Path, model: Path) -> None:
    """Make a run that was stopped after two of four steps, its adapter, a merged model and kept rows."""
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.format(model=model)
    (folder / "recipe.yaml").write_text(text)
    (folder / "other.yaml").write_text(text.replace("output_dir: run", "output_dir: out"))
    for arguments in (["train", "recipe.yaml"], ["merge", "run/adapter", "merged"]):
        done = cli.run(arguments, folder)
        assert done.returncode == 0, done.stderr
    shutil.move(folder / "run" / "adapter", folder / "adapter")
    shutil.copytree(folder / "adapter", folder / "second")
    shutil.rmtree(folder / "run" / "checkpoint-4")
    record = json.loads((folder / "run" / "record.json").read_text())
    for gone in ("results", "parameters"):
        record.pop(gone)
    (folder / "run" / "record.json").write_text(json.dumps(record | {"status": "interrupted"}))
    names = json.loads((folder / "merged" / "config.json").read_text())
    assert names["model_type"] == "llama"
    (kept,) = (folder / "cache" / "lora-cli" / "rows").iterdir()
    (folder / "rows").symlink_to(kept)
    _split(folder / "merged")


def _split(model: Path) -> None:
    """Give the model's weights an index: all of them in one file of another name."""
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", framework="pt") as stored:
        index = {
            "metadata": {"total_size": 1},
            "weight_map": dict.fromkeys(stored.keys(), "model-00001-of-00001.safetensors"),
        }
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def seal(checkpoint: Path, file: Path) -> None:
    """Make the checkpoint's manifest one of the file as it is now."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    data = file.read_bytes()
    manifest["files"][file.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def digest(folder: Path) -> dict[str, str]:
    """Return a hash of each file below a folder."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    }


def try_case(cli: WarmCLI, valid: Path, case: Case) -> str | None:
    """Return what is wrong with how the case ends; None where nothing is."""
    name, changed = (
        case.file,
        change(json.loads((valid / case.file).read_text()), case.keys, case.shape),
    )
    if changed is None:
        return None
    with tempfile.TemporaryDirectory(dir=valid.parent) as made:
        folder = Path(made) / "w"
        shutil.copytree(
            valid, folder, symlinks=True, ignore=shutil.ignore_patterns("cache", "rows")
        )
        kept, before = (valid / name).read_bytes(), {}
        file = valid / name if name.startswith("rows/") else folder / name
        try:
            file.write_text(changed)
            if "checkpoint" in name and file.name != "manifest.json":
                seal(file.parent, file)
            before = digest(folder)
            done = cli.run(FILES[name][case.verb], folder)
        finally:
            if file.is_relative_to(valid):
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(kept)
        return judge(case, done.returncode, done.stderr, before, digest(folder))


def judge(
    case: Case, code: int, said: str, before: dict[str, str], after: dict[str, str]
) -> str | None:
    """Return what is wrong with how a verb ended."""
    last = said.strip().splitlines()[-1][:200] if said.strip() else ""
    if "Traceback" in said or code not in (0, 1, 2):
        return f"exit {code}: {last}"
    if code == 0:
        return None
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if not lines:
        return f"no error: {last}"
    if not re.search(rf"\b{Path(case.file).parent.name}\b", " ".join(lines)) and case.keys:
        return f"names no file: {lines[0][:200]}"
    if len(said) > 5000:
        return f"{len(said)} characters of text"
    if case.file.startswith("run/") and before != after:
        return f"changed {[name for name in after if before.get(name) != after[name]]}: {lines[0][:100]}"
    return None


def main() -> None:
    """Try all cases, or `--only N` drawn ones of each file; print each that ends badly."""
    arguments = sys.argv[1:]
    only = int(arguments.pop()) if "--only" in arguments else None
    names = [each for each in arguments if each in FILES] or list(FILES)
    with tempfile.TemporaryDirectory() as made:
        valid = Path(made) / "valid"
        valid.mkdir()
        cli = WarmCLI(
            {
                "LORA_CACHE_DIR": str(valid / "cache"),
                "LLAMA_CPP_DIR": str(find_llama_cpp()),
                "PYTHONPATH": str(ROOT),
                "HF_HUB_OFFLINE": "1",
            }
        )
        make_valid(cli, valid, ROOT / "build" / "tiny" / "model")
        for name in names:
            cases = list_cases(valid, [name])
            if only is not None:
                cases = random.Random(0).sample(cases, min(only, len(cases)))
            ends: Counter[bool] = Counter()
            for case in cases:
                bad = try_case(cli, valid, case)
                ends[bad is None] += 1
                if bad:
                    print(f"{case} ({FILES[name][case.verb][0]}): {bad}", flush=True)
            print(f"== {name}: {ends[False]} of {len(cases)} end badly", flush=True)
        cli.close()


if __name__ == "__main__":
    main()
