"""The commands of the how-to pages, run one after the other in a folder as their reader has one:
a base, rows, a recipe `my.yaml`, another's adapter; and in another, with a small base of each
task's own under the name that the page or the recipe has for it.

Slow: some 60 commands, among them runs and exports of the tiny model. Hermetic, but for llama.cpp's
converters. Alone: pytest -m slow tests/docs/test_how_to_runs.py
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import pictures, tasks

HOW_TO = Path(__file__).parent.parent.parent / "docs" / "how-to"
MINE = {
    "model": {"name_or_path": "base"},
    "data": {"path": "rows.jsonl", "eval_fraction": 0.1},
    "training": {
        "max_steps": 40, "learning_rate": 5e-3, "per_device_train_batch_size": 16,
        "max_length": 128, "save_steps": 20, "eval_strategy": "steps", "eval_steps": 20,
    },
}  # fmt: skip
RECIPES = {
    "mix.yaml": ("mix-data-sets", {}),
    "stream.yaml": ("stream", {"training": {"max_steps": 20}}),
    "chat.yaml": ("templates", {}),
    "tokens.yaml": ("add-tokens", {}),
}
"""Files of the reader's: the first recipe on a page, and what of it is made smaller here."""
TYPED: list[tuple[str, str, str]] = [
    ("fit-in-memory", "lora plan my.yaml", r"fits: "),
    ("fit-in-memory", "lora plan my.yaml --gpu 24GB", r"fits: .* of 24GB"),
    ("fit-in-memory", 'lora plan my.yaml --gpu "RTX 3090"', r"fits: .* of RTX 3090"),
    ("debug-a-bad-run", "lora check my.yaml --samples 3", r"between ⟦ and ⟧"),
    ("choose-a-method", "lora plan my.yaml --set method=qlora", r"qlora on base\n(.*\n)*fits: "),
    ("gpu", "lora plan my.yaml --gpu A100-40GB", r"fits: .* of A100-40GB"),
    ("rows", "lora check my.yaml --samples 3", r"between ⟦ and ⟧"),
    ("choose-a-method", "lora train my.yaml", r"adapter in runs/my/adapter"),
    ("choose-a-method", "lora train my.yaml --set method=qlora --set output_dir=runs/my-qlora", ""),
    ("choose-a-method", "lora train my.yaml --set method=dora --set output_dir=runs/my-dora", ""),
    ("choose-a-method", "lora runs", r"my-dora .* dora .* finished"),
    ("choose-a-method", "lora report runs/my runs/my-dora -o compare.html", r"compare\.html"),
    ("choose-a-method", "lora evaluate runs/my/adapter runs/my-dora/adapter", r"exact +0\.0"),
    ("mix-data-sets", "lora check mix.yaml --samples 1", r"more\.jsonl x 2: 60 of 60 rows"),
    ("stream", "lora check stream.yaml", r"data: a stream, of its first rows"),
    ("stream", "lora train stream.yaml", r"trained 20 steps"),
    ("templates", "lora check chat.yaml --samples 1", r"⟦[a-z ]+<\|im_end\|>⟧"),
    ("add-tokens", "lora check tokens.yaml --samples 0", r"adapter: 132,096 parameters"),
    ("resume-and-extend", "lora train my.yaml --resume --set training.max_steps=120",
     r"the adapter after 40 steps is now runs/my/adapter-40"),
    ("merge", "lora merge runs/my/adapter my-model", r"14 of 14 modules merged"),
    ("merge", "lora verify runs/my/adapter my-model", r"21 of 21 tensors equal"),
    ("export", "lora export-gguf my-model --quantize q8_0 --quantize Q4_K_M", r"Q4_K_M\.gguf"),
    ("export", "lora export-gguf runs/my/adapter --adapter-only -o over", r"base with adapter"),
    ("merge", "lora verify my-model my-model/my-model-q8_0.gguf", r"top-1 agreement"),
    ("small-quants", "lora export-gguf my-model -o small --quantize Q4_K_M --quantize Q3_K_M", ""),
    ("evaluate", 'lora generate base runs/my/adapter my-model/my-model-Q4_K_M.gguf --prompt '
     '"Reverse: jet fan red"', r"runs/my/adapter: red fan jet"),
    ("evaluate", "lora generate base runs/my/adapter --file held_out.jsonl --show 2", r"exact"),
    ("someone-elses-adapter", 'lora generate theirs --prompt "Reverse: jet fan red"',
     r"theirs was made elsewhere; it names as its base base"),
    ("someone-elses-adapter", "lora evaluate theirs --data held_out.jsonl", r"loss"),
    ("someone-elses-adapter", "lora merge theirs theirs-merged", r"4 of 4 modules merged"),
    ("someone-elses-adapter", "lora verify theirs theirs-merged", r"21 of 21 tensors equal"),
    ("someone-elses-adapter", "lora convert runs/my-dora/adapter plain", r"14 modules of rank 16"),
    ("someone-elses-adapter", "lora convert runs/my/adapter small-rank --r 4", r"of rank 4"),
    ("someone-elses-adapter", "lora extract base finetuned extracted --r 16", r"14 modules"),
    ("combine", "lora combine runs/my/adapter runs/more/adapter both --weights 0.7,0.3",
     r"cat of 2 adapters of base: 14 modules, rank 32"),
    ("combine", "lora combine runs/my/adapter runs/more/adapter both-ties --combination ties "
     "--density 0.5", r"\(ties differs on purpose\)"),
    ("combine", "lora merge runs/my/adapter runs/more/adapter both-merged --weights 0.7,0.3",
     r"merging the combination into base"),
    ("combine", "lora evaluate both runs/my/adapter runs/more/adapter --data held_out.jsonl", r"exact +0\.0"),
    ("run", "lora runs", r"more .* finished"),
    ("small-quants", "lora export-gguf my-model -o small --quantize IQ3_XXS --imatrix rows.jsonl", r"IQ3_XXS"),
    ("several-gpus", "lora plan my.yaml --nproc 4", r"idle for uneven shares"),
    ("write-a-recipe", "lora recipes", r"own-data"),
    ("write-a-recipe", "lora recipes copy own-data own.yaml", r"own\.yaml"),
    ("write-a-recipe", "lora init rows.jsonl --model base --yes", r"wrote rows\.yaml"),
    ("write-a-recipe", "lora train my.yaml --set training.learning_rate=1e-4 --set output_dir=runs/slower",
     r"adapter in runs/slower/adapter"),
]  # fmt: skip
"""The page, what it says to type, and what is then said."""
OF_TASKS: list[tuple[str, str, str]] = [
    ("tasks", "lora train classify --set data.path=mail.csv --set model.name_or_path=bert-base-uncased",
     r"model\.labels = \['bad', 'good', 'neutral'\] \(auto: those of the data, sorted\)"),
    ("tasks", "lora predict runs/classify/adapter --data mail.csv --out answers.jsonl", r"accuracy"),
    ("tasks", 'lora predict runs/classify/adapter --text "You have won"', r'"label": "(bad|good|neutral)"'),
    ("questions", "lora check answer --set data.path=questions.jsonl --set model.name_or_path=BASE", r"⟦[a-z ]+⟧"),
    ("questions", "lora train answer --set data.path=questions.jsonl --set model.name_or_path=BASE",
     r"adapter in runs/answer/adapter"),
    ("questions", "lora predict runs/answer/adapter --data questions.jsonl --out places.jsonl", r"f1"),
    ("seq2seq", "lora train summarize --set data.path=rows.jsonl --set model.name_or_path=google/flan-t5-small",
     r"adapter in runs/summarize/adapter"),
    ("seq2seq", 'lora generate runs/summarize/adapter --prompt "summarize: …"', r"runs/summarize/adapter: "),
    ("seq2seq", "lora predict runs/summarize/adapter --data rows.jsonl --out texts.jsonl", r"rougeL"),
    ("pictures", "lora check pictures --set data.path=photos/", r"photos"),
    ("pictures", "lora train pictures --set data.path=photos/", r"adapter in runs/pictures/adapter"),
    ("pictures", "lora predict runs/pictures/adapter --data photos/", r"accuracy"),
    ("preferences", "lora recipes copy dpo", r"dpo\.yaml"),
    ("preferences", "lora check dpo.yaml --set data.path=pairs.jsonl", r"chosen"),
    ("preferences", "lora train dpo.yaml --set data.path=pairs.jsonl", r"of the start it is 0\.693147 \(log 2\)"),
]  # fmt: skip
"""The same of the tasks' own pages."""


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(tiny / "model", folder / "base")
    lines = (tiny / "train.jsonl").read_text().splitlines(keepends=True)
    held = (tiny / "eval.jsonl").read_text().splitlines(keepends=True)
    for name, some in (("rows", lines[:240]), ("more", lines[240:300]), ("held_out", held[:16])):
        (folder / f"{name}.jsonl").write_text("".join(some))
    (folder / "data").mkdir()
    shutil.copy(folder / "rows.jsonl", folder / "data")
    (folder / "my.yaml").write_text(yaml.safe_dump(MINE))
    for name, (page, smaller) in RECIPES.items():
        (folder / name).write_text(yaml.safe_dump(take_recipe(page, smaller)))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    shape = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = get_peft_model(base, shape)
    theirs.peft_config["default"].base_model_name_or_path = "base"
    theirs.save_pretrained(folder / "theirs", save_embedding_layers=False)
    return folder


def take_recipe(page: str, smaller: dict[str, dict[str, object]]) -> dict[str, object]:
    """Return the first recipe of a page, on top of the reader's own."""
    found = re.search(r"^```yaml\n(.*?)^```$", (HOW_TO / f"{page}.md").read_text(), re.S | re.M)
    assert found is not None
    given = yaml.safe_load(found[1])
    if "mix" in given.get("data", {}):  # the third part is of the reader's alone
        given["data"]["mix"] = given["data"]["mix"][:2]
    for section, values in smaller.items():
        given[section] |= values
    return {"extends": "my.yaml", **given}


def find_on_page(page: str, command: str) -> bool:
    """Whether a page has a command on a line of its own."""
    text = (HOW_TO / f"{page}.md").read_text()
    return bool(re.search(rf"^(\$ )?{re.escape(command)}( +#.*)?$", text, re.M))


@pytest.mark.slow
def test_what_the_pages_say_to_type_works(folder: Path, lora) -> None:
    for page, command, said in TYPED:
        shown = command.replace("small-rank", "small").replace("own.yaml", "my.yaml")
        assert find_on_page(page, shown), (page, command)
        if command.startswith("lora extract"):
            shutil.copytree(folder / "my-model", folder / "finetuned")
        if "runs/more" in command and not (folder / "runs" / "more").exists():
            more = ("--set", "data.path=more.jsonl", "--set", "output_dir=runs/more")
            assert lora("train", "my.yaml", *more, cwd=folder).returncode == 0
        done = lora(*shlex.split(command)[1:], cwd=folder)
        assert done.returncode == 0, (page, command, done.stderr)
        assert re.search(said, done.stdout + done.stderr), (page, command, done.stderr)


@pytest.fixture(scope="module")
def folder_of_tasks(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder with rows and a base of each task; a folder is looked for before the hub."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, family in (
        ("bert-base-uncased", "bert"),
        ("BASE", "modernbert"),
        ("google/flan-t5-small", "t5"),
    ):
        tasks.make_base(folder / name, family)
    pictures.make_base(folder / "google" / "vit-base-patch16-224-in21k", "vit")
    shutil.copytree(tiny / "model", folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct")
    tasks.write_classes(folder / "mail.csv", 40)
    tasks.write_questions(folder / "questions.jsonl", 40)
    tasks.write_pairs(folder / "rows.jsonl", 40)
    pictures.write_folder(folder / "photos", 6)
    rows = [
        {"prompt": f"Copy: tea {n}", "chosen": f"tea {n}", "rejected": "ice"} for n in range(40)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.mark.slow
def test_what_the_pages_of_tasks_say_to_type_works(folder_of_tasks: Path, lora) -> None:
    for page, command, said in OF_TASKS:
        assert find_on_page(page, command), (page, command)
        done = lora(*shlex.split(command)[1:], cwd=folder_of_tasks)
        assert done.returncode == 0, (page, command, done.stderr)
        assert re.search(said, done.stdout + done.stderr), (page, command, done.stdout, done.stderr)
