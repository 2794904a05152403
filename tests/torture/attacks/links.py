"""Kind 4: links, pipes, devices and other things that are no plain files."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from tests.torture.attacks import SPECIAL, Attack, Place, link, special
from tests.torture.attacks.verbs import (
    SHORT,
    use_adapter,
    use_base,
    use_imatrix,
    use_recipe,
    use_rows,
)


def draw_special(chance: random.Random) -> str:
    """A kind of thing that is no plain file of the folder's."""
    return chance.choice(SPECIAL)


def base_file(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    files = sorted(path.name for path in base.iterdir())
    extra = [
        "special_tokens_map.json",
        "added_tokens.json",
        "model.safetensors.index.json",
        "lora_record.json",
        "vocab.json",
        "merges.txt",
    ]
    special(
        base / chance.choice(files if chance.random() < 0.7 else extra),
        draw_special(chance),
        place.victim,
    )
    return use_base(place, chance, base)


def adapter_file(place: Place, chance: random.Random) -> Attack:
    adapter = place.adapter(kind=chance.choice(["adapter", "run/adapter"]))
    files = sorted(path.name for path in adapter.iterdir())
    special(
        adapter
        / chance.choice(
            [*files, "lora_record.json", "lora_probes.safetensors", "chat_template.jinja"]
        ),
        draw_special(chance),
        place.victim,
    )
    return use_adapter(place, chance, adapter)


def copied_link(place: Place, chance: random.Random) -> Attack:
    """What is copied into what is made must not be what a link leads to."""
    folder = place.adapter(kind="run/adapter") if chance.random() < 0.5 else place.copy("base")
    others = ["README.md", "LICENSE", "NOTICE", "tokenizer.model", "extra.txt", "vocab.txt", "additional_chat_templates/x.jinja", "merges.txt", "extra.jinja",
              "tokenizer.txt", "vocab.bpe", "model.sentencepiece.model", "USE_POLICY.md"]  # fmt: skip
    template = ["chat_template.jinja"] if chance.random() < 0.6 else []
    for name in [*template, *chance.sample(others, 3)]:
        (folder / name).parent.mkdir(exist_ok=True)
        link(folder / name, place.victim / "secret.txt")
    if folder.name == "base":
        words = chance.choice([["merge", str(place.stage / "adapter"), "out", "--base", "base"], ["extract", "base", str(place.stage / "tuned"), "out", "--r", "2"], ["train", "recipe.yaml"]])  # fmt: skip
        place.recipe(base=folder)
    else:
        words = chance.choice([["merge", str(folder), "out"], ["convert", str(folder), "out", "--r", "1"], ["combine", str(folder), str(place.stage / "second"), "out"], ["train", "onward.yaml"]])  # fmt: skip
        place.recipe(adapter=folder, name="onward.yaml")
    return Attack(words, output="out")


def rows_file(place: Place, chance: random.Random) -> Attack:
    name = chance.choice(
        [
            "rows.jsonl",
            "rows.csv",
            "rows.parquet",
            "rows.arrow",
            "rows.txt",
            "rows.json",
            "rows.jsonl.gz",
        ]
    )
    folder = place.work / "data"
    folder.mkdir()
    kind = draw_special(chance)
    special(folder / name, kind, place.victim)
    # a link that is itself named is followed: it is the user's
    named = [] if kind in ("secret", "out", "victim") else [folder / name]
    return use_rows(place, chance, chance.choice([folder, folder / "*", *named]))


def recipe_file(place: Place, chance: random.Random) -> Attack:
    recipe = place.recipe()
    kind = chance.choice([each for each in SPECIAL if each not in ("secret", "out", "victim")])
    special(place.work / "sound.yaml" if chance.random() < 0.3 else recipe, kind, place.victim)
    return use_recipe(chance, recipe)


def run_file(place: Place, chance: random.Random) -> Attack:
    """A run's folder with links in it, gone on with."""
    run = place.run()
    files = [path for path in run.rglob("*") if path.is_file()]
    path = chance.choice(
        [
            *files,
            run / ".lock",
            run / "checkpoint-2",
            run / "adapter",
            run / "metrics.jsonl",
            run / "checkpoint-2" / "manifest.json",
            run / ".saving.tmp",
            run / "checkpoint-3",
        ]
    )
    special(path, draw_special(chance), place.victim)
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1, save_total_limit: 1}\n",
        data=place.stage / "rows.jsonl",
    )
    words = [
        "train",
        "recipe.yaml",
        "--resume",
        "--allow-changes",
        "training.max_steps",
        "--allow-changes",
        "training.save_total_limit",
        "--set",
        "training.max_steps=3",
    ]
    return Attack(words)


def output_link(place: Place, chance: random.Random) -> Attack:
    """The name that is written to is a link, or something else."""
    special(place.work / "out", draw_special(chance), place.victim)
    if chance.random() < 0.3:
        link(place.work / "out", place.victim / "folder" / "empty")
    adapter = str(place.stage / "adapter")
    words = chance.choice([["merge", adapter, "out"], ["convert", adapter, "out", "--r", "1"], ["combine", adapter, str(place.stage / "second"), "out"],
                           ["extract", str(place.stage / "base"), str(place.stage / "tuned"), "out", "--r", "2"], ["recipes", "copy", "own-data", "out"],
                           ["train", "recipe.yaml"]])  # fmt: skip
    place.recipe(f"output_dir: {str(place.work / 'out')!r}\n")
    return Attack(words)


def output_parent(place: Place, chance: random.Random) -> Attack:
    """A folder above the output is a link, or a file inside it is, or beside it."""
    folder = place.work / "made"
    folder.mkdir()
    adapter = str(place.stage / "adapter")
    name = chance.choice(
        ["out.rejected", ".out.lock", ".lora.lock", ".out.tmp", "Modelfile", "README.md"]
    )
    special(folder / name, chance.choice(["secret", "victim", "dangling", "pipe"]), place.victim)
    words = chance.choice(
        [
            ["merge", adapter, "made/out"],
            ["convert", adapter, "made/out", "--r", "1"],
            ["export-gguf", adapter, "--adapter-only", "-o", "made"],
        ]
    )
    return Attack(words)


def taken_name(place: Place, chance: random.Random) -> Attack:
    """What is in the making gets a name that something of a stranger's has just taken."""
    target = chance.choice(["victim", "secret", "dangling", "pipe", "loop"])
    verb = chance.choice(["merge", "convert", "combine", "extract", "train", "recipes"])
    program = PLANT.format(target=target, verb=verb)
    place.recipe(f"output_dir: {str(place.work / 'out')!r}\n")
    adapter, second, base = (str(place.stage / name) for name in ("adapter", "second", "base"))
    words = {
        "merge": ["merge", adapter, "out"], "convert": ["convert", adapter, "out", "--r", "1"], "combine": ["combine", adapter, second, "out"],
        "extract": ["extract", base, str(place.stage / "tuned"), "out", "--r", "2"], "train": ["train", "recipe.yaml"], "recipes": ["recipes", "copy", "own-data", "out"],
    }[verb]  # fmt: skip
    return Attack(words, program=program)


PLANT = """
import os
from pathlib import Path
from lora_cli.common import files

here = Path.cwd()
victim = here.parent / "victim"
target = {{"victim": victim / "folder", "secret": victim / "secret.txt", "dangling": victim / "new", "loop": "."}}.get({target!r})
planted, own = [], files._name_passing


def name_passing(parent):
    path = own(parent)
    if Path(parent).resolve() == here and not planted:
        os.mkfifo(path) if target is None else path.symlink_to(str(target))
        planted.append(path)
    return path


files._name_passing = name_passing
from lora_cli.cli import main
try:
    main()
finally:
    for path in planted:
        if path.is_symlink() or (path.exists() and path.is_fifo()):
            path.unlink()
"""


def taken_folder(place: Place, chance: random.Random) -> Attack:
    """The same by a folder with a stranger's files: they are in no result."""
    program = """
from pathlib import Path
from lora_cli.common import files
here, planted, own = Path.cwd(), [], files._name_passing


def name_passing(parent):
    path = own(parent)
    if Path(parent).resolve() == here and not planted:
        path.mkdir()
        (path / "evil.py").write_text("evil")
        planted.append(path)
    return path


files._name_passing = name_passing
from lora_cli.cli import main
try:
    main()
finally:
    import shutil
    for folder in planted:
        shutil.rmtree(folder, ignore_errors=True)
"""
    adapter = str(place.stage / "adapter")
    words = chance.choice(
        [
            ["merge", adapter, "out"],
            ["convert", adapter, "out", "--r", "1"],
            ["combine", adapter, str(place.stage / "second"), "out"],
        ]
    )
    return Attack(words, program=program, absent=["out/evil.py"])


def cache_link(place: Place, chance: random.Random) -> Attack:
    """The cache's folders and entries are links or pipes of somebody's."""
    rows = place.cache / "lora-cli" / "rows"
    if chance.random() < 0.4:
        rows.parent.mkdir(parents=True)
        special(
            chance.choice([rows, rows.parent]),
            # one to a folder is the user's own, who wants it on another disk
            chance.choice(["dangling", "pipe", "secret", "loop"]),
            place.victim,
        )
    else:
        shutil.copytree(place.stage / "cache", place.cache, dirs_exist_ok=True)
        [entry] = rows.iterdir()
        special(
            chance.choice([entry, entry / "counts.json", entry / "rows.arrow"]),
            draw_special(chance),
            place.victim,
        )
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    return Attack([chance.choice(["check", "train"]), "recipe.yaml"])


def gguf_folder(place: Place, chance: random.Random) -> Attack:
    """Around a GGUF: Modelfile, the file itself, the importance matrix, llama.cpp's folder."""
    kind = draw_special(chance)
    how = chance.choice(["Modelfile", "gguf", "imatrix", "llama", "record"])
    if how == "gguf":
        special(place.work / "model.gguf", kind, place.victim)
        return Attack(
            chance.choice(
                [
                    ["generate", "model.gguf", "--prompt", "x", *SHORT],
                    ["verify", "model.gguf", str(place.stage / "merged")],
                    ["chat", "model.gguf"],
                ]
            )
        )
    (place.work / "gg").mkdir()
    if how == "imatrix":
        special(place.work / "m.imatrix", kind, place.victim)
        return use_imatrix(place)
    if how == "llama":
        (place.work / "llama").mkdir()
        special(place.work / "llama" / "convert_hf_to_gguf.py", kind, place.victim)
        return Attack(
            ["export-gguf", str(place.stage / "merged"), "-o", "gg", "--llama-cpp", "llama"]
        )
    special(
        place.work / "gg" / ("Modelfile" if how == "Modelfile" else "merged-f16.gguf"),
        kind,
        place.victim,
    )
    return Attack(["export-gguf", str(place.stage / "merged"), "-o", "gg"])


def prompts_file(place: Place, chance: random.Random) -> Attack:
    kind = chance.choice([each for each in SPECIAL if each not in ("secret", "out", "victim")])
    special(place.work / "p.txt", kind, place.victim)
    return Attack(["generate", str(place.stage / "base"), "--file", "p.txt", *SHORT])


def index_out(place: Place, chance: random.Random) -> Attack:
    """An index that names files elsewhere, and shards that are links."""
    base = place.copy("base")
    shard = base / "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(shard)
    from tests.torture.attacks import read_tensors

    names = sorted(read_tensors(shard))
    file = chance.choice(
        [
            "../other.safetensors",
            "/dev/zero",
            str(place.victim / "secret.txt"),
            shard.name,
            "sub/../model-00001-of-00001.safetensors",
            "",
            ".",
            "..",
            "a/b",
            "\0",
        ]
    )
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, file)})
    )
    if file == shard.name:
        special(shard, draw_special(chance), place.victim)
    return use_base(place, chance, base)


def installed(place: Place, chance: random.Random) -> Attack:
    """Where llama.cpp is installed is something else already; the package index has none."""
    home = place.cache / "lora-cli" / Path(os.environ["LLAMA_CPP_DIR"]).name
    path = chance.choice([home, home.parent, home / "convert_hf_to_gguf.py", home / "conversion"])
    path.parent.mkdir(parents=True, exist_ok=True)
    special(path, draw_special(chance), place.victim)
    environment = {"LLAMA_CPP_DIR": "", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}
    words = chance.choice([["setup-llama-cpp"], ["doctor"], ["doctor", "--json"]])
    return Attack(words, environment=environment)


def unreadable(place: Place, chance: random.Random) -> Attack:
    """Files and folders that the user may not read."""
    kind = chance.choice(["base", "adapter", "run"])
    folder = place.run() if kind == "run" else place.copy(kind)
    path = chance.choice([folder, *folder.rglob("*")])
    path.chmod(chance.choice([0, 0o200, 0o111]) if path.is_dir() else 0)
    place.recipe(
        f"output_dir: {str(folder)!r}\ntraining: {{save_strategy: steps, save_steps: 1}}\n"
        if folder.name == "run"
        else "",
        data=place.stage / "rows.jsonl",
    )
    if folder.name == "run":
        made = Attack(["train", "recipe.yaml", *chance.choice([[], ["--resume"]])])
    else:
        made = (use_base if folder.name == "base" else use_adapter)(place, chance, folder)
    made.surroundings = [("powerless", True)]
    return made


ATTACKS = [
    base_file, adapter_file, copied_link, rows_file, recipe_file, run_file, output_link, output_parent, taken_name,
    taken_folder, cache_link, gguf_folder, prompts_file, index_out, unreadable, installed,
]  # fmt: skip
