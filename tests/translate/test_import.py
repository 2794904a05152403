"""`lora import`: public example files of four tools become recipes that load and train, and each of
their keys is told of exactly once. What is said and written is compared with imports.txt.

The examples hold keys and values of files in axolotl-ai-cloud/axolotl (examples/), hiyouga/
LLaMA-Factory (examples/), huggingface/trl (examples/cli_configs), huggingface/alignment-handbook
(recipes/zephyr-7b-beta, with a shorter template) and unslothai/unsloth (studio/backend/assets/
configs). Hermetic: no network; steps on the tiny model. Alone: pytest tests/translate
After a change of a message: python -m tests.translate.test_import > tests/translate/imports.txt
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_cli.cli.start import open_recipe
from lora_cli.common import LoraError, UsageError, ui
from lora_cli.recipe import load_recipe
from lora_cli.translate import import_file
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.import_file import make_draft
from lora_cli.translate.tools import TOOLS
from tests import snapshots

EXAMPLES = {path.name: path for path in (Path(__file__).parent / "examples").iterdir()}
SNAPSHOT = Path(__file__).parent / "imports.txt"
WITHOUT_A_MODEL = {"unsloth-llama-1b-defaults.yaml"}
IMPORTED = sorted(EXAMPLES)


def said(name: str, folder: Path) -> str:
    """What is said of an example, and the recipe that it becomes."""
    shutil.copy(EXAMPLES[name], folder)
    model = "unsloth/Llama-3.2-1B-Instruct" if name in WITHOUT_A_MODEL else None
    before, screen = Path.cwd(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(screen):
            recipe = import_file(Path(name), None, Path("recipe.yaml"), model, None)
        written = recipe.read_text()
    except LoraError as error:
        written = "\n".join(ui.list_lines(error))
    finally:
        os.chdir(before)
    return f"{screen.getvalue()}{written}".rstrip()


def draft_of(name: str, tmp_path: Path, text: str | None = None, **options: Any) -> Draft:
    path = tmp_path / name
    path.write_text(EXAMPLES[name].read_text() if text is None else text)
    model = options.pop("model", "some/model" if name in WITHOUT_A_MODEL else None)
    return make_draft(path, options.pop("tool", None), model, options.pop("data", None))


def recipe_of(tmp_path: Path, text: str, **options: Any) -> dict[str, Any]:
    """The recipe that a file of this text becomes, as its YAML's data."""
    path = tmp_path / "theirs.yml"
    path.write_text(text)
    made = import_file(
        path,
        options.get("tool"),
        tmp_path / "ours.yaml",
        options.get("model"),
        options.get("data"),
    )
    load_recipe(made)
    return yaml.safe_load(made.read_text())


def test_there_are_examples_of_four_tools() -> None:
    assert len(EXAMPLES) >= 12
    assert {name.split("-")[0] for name in EXAMPLES} == {"axolotl", "llama", "trl", "unsloth"}
    assert snapshots.list_names(SNAPSHOT) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_who_trains_such_a_file_is_told_to_import_it(name: str) -> None:
    with pytest.raises(UsageError, match="is no recipe: its keys are") as caught:
        open_recipe(EXAMPLES[name], []).__enter__()
    assert caught.value.hint == f"lora import {EXAMPLES[name]}"


def test_a_recipe_with_mistakes_is_told_of_these(tmp_path: Path) -> None:
    wrong = tmp_path / "r.yaml"
    for text in (
        "model: {name_or_path: m}\nbase_model: m\nsequence_len: 4\n",
        "model: {name: m}\nmicro_batch_size: 1\nnum_epochs: 3\n",
        "modl: {name_or_path: m}\ntraining: {max_length: 12}\ndata: {path: x}\n",
        "extends: alpaca\nnum_epochs: 3\nsample_packing: true\n",
        "- a list\n",
        "{",
    ):
        wrong.write_text(text)
        with pytest.raises(UsageError) as caught:
            open_recipe(wrong, []).__enter__()
        assert "lora import" not in f"{caught.value.message} {caught.value.hint}", text


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_what_is_said_and_written(name: str, tmp_path: Path) -> None:
    assert said(name, tmp_path) == snapshots.find(SNAPSHOT, name)


def walk(value: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every value of a document that is no mapping and no list of such, by PyYAML alone."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from walk(inner, (*keys, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, inner in enumerate(value):
            yield from walk(inner, (*keys, index))
    else:
        yield keys


@pytest.mark.parametrize("name", IMPORTED)
def test_every_key_is_told_of_exactly_once(name: str, tmp_path: Path) -> None:
    draft = draft_of(name, tmp_path)
    leaves = list(walk(yaml.safe_load(EXAMPLES[name].read_text())))
    assert len(leaves) >= 5
    for keys in leaves:
        told = [keys[:n] for n in range(1, len(keys) + 1) if keys[:n] in draft.fates]
        assert len(told) == 1, keys
    inside = {keys[:n] for keys in leaves for n in range(1, len(keys) + 1)}
    assert draft.fates.keys() <= inside


@pytest.mark.parametrize("name", IMPORTED)
def test_an_imported_recipe_loads_and_holds_what_the_file_says(name: str, tmp_path: Path) -> None:
    """The numbers that every tool has, read by PyYAML from both files."""
    path = tmp_path / name
    path.write_text(EXAMPLES[name].read_text())
    model = "some/model" if name in WITHOUT_A_MODEL else None
    made = import_file(path, None, tmp_path / "ours.yaml", model, None)
    recipe = load_recipe(made)
    theirs = yaml.safe_load(path.read_text())
    flat = {**theirs, **theirs.get("training", {}), **theirs.get("lora", {})}
    for names, ours in (
        (("learning_rate",), recipe.training.learning_rate),
        (("lora_r", "lora_rank"), recipe.lora.r),
        (("lora_alpha",), recipe.lora.lora_alpha),
        (("gradient_accumulation_steps",), recipe.training.gradient_accumulation_steps),
        (
            ("micro_batch_size", "per_device_train_batch_size", "batch_size"),
            recipe.training.per_device_train_batch_size,
        ),
        (("sequence_len", "cutoff_len", "max_seq_length"), recipe.training.max_length),
        (("lr_scheduler", "lr_scheduler_type"), recipe.training.lr_scheduler_type),
    ):
        given = [flat[key] for key in names if flat.get(key) is not None]
        assert [float(x) if ours != x else x for x in given[:1]] in ([], [ours]), names
    default = "training" in theirs  # Unsloth's own
    four = flat.get("load_in_4bit", flat.get("quantization_bit", default))
    assert recipe.quantized == bool(four)


def test_what_a_tool_does_by_itself_is_written_out(tmp_path: Path) -> None:
    trl = recipe_of(tmp_path, "model_name_or_path: a\ndataset_name: b\nuse_peft: true\n")
    assert trl["training"] == {
        "learning_rate": 2e-5, "lr_scheduler_type": "linear", "num_train_epochs": 3.0,
        "warmup_steps": 0, "seed": 42,
    }  # fmt: skip
    assert trl["data"] == {"path": "b", "train_on": "all", "on_long_row": "truncate"}
    assert trl["lora"] == {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.05}
    (tmp_path / "ours.yaml").unlink()
    factory = recipe_of(tmp_path, "model_name_or_path: a\nstage: sft\ndataset: d\n")
    assert factory["lora"] == {"lora_alpha": 16, "r": 8}
    assert factory["training"]["learning_rate"] == 5e-5
    assert factory["training"]["max_length"] == 2048
    (tmp_path / "ours.yaml").unlink()
    unsloth = recipe_of(tmp_path, "model: a\ntraining: {training_type: lora}\n")
    assert unsloth["method"] == "qlora"
    assert (unsloth["lora"]["r"], unsloth["lora"]["lora_alpha"]) == (64, 16)
    assert unsloth["data"] == {
        "path": "my-data.jsonl", "train_on": "all", "on_long_row": "truncate",
    }  # fmt: skip
    (tmp_path / "ours.yaml").unlink()
    text = "base_model: a\ndatasets: [{path: b, type: completion, field: body}]\nadapter: lora\n"
    axolotl = recipe_of(tmp_path, text)
    assert axolotl["data"] == {"format": "text", "columns": {"text": "body"}, "path": "b"}
    assert axolotl["training"]["max_length"] == 512
    assert axolotl["training"]["save_strategy"] == "epoch"


def test_pairs_of_answers_are_compared_as_there(tmp_path: Path) -> None:
    trl = "model_name_or_path: a\ndataset_name: b\nuse_peft: true\nbeta: 0.3\nloss_type: ipo\n"
    recipe = recipe_of(tmp_path, trl)
    assert recipe["objective"] == "dpo"
    assert recipe["preference"] == {"beta": 0.3, "loss": "ipo"}
    assert recipe["training"]["learning_rate"] == 1e-6
    assert recipe["data"] == {"path": "b", "on_long_row": "drop"}
    (tmp_path / "ours.yaml").unlink()
    factory = "model_name_or_path: a\nstage: dpo\ndataset: d\npref_loss: hinge\n"
    factory += "pref_ftx: 0.5\n"
    recipe = recipe_of(tmp_path, factory + "pref_beta: 0.2\n")
    assert recipe["preference"] == {"loss": "hinge", "sft_weight": 0.5, "beta": 0.2}
    (tmp_path / "ours.yaml").unlink()
    axolotl = (
        "base_model: a\nadapter: lora\nrl: ipo\nrl_beta: 0.4\ndatasets: [{path: b, type: x}]\n"
    )
    assert recipe_of(tmp_path, axolotl)["preference"] == {"loss": "ipo", "beta": 0.4}
    with pytest.raises(
        LoraError, match=r"pref_loss: kto_pair is a loss of pairs, which lora does not"
    ):
        recipe_of(tmp_path, factory.replace("hinge", "kto_pair"), tool="llama-factory")


OWN_LOSS = {
    "axolotl orpo": (
        "base_model: a\nadapter: lora\nrl: orpo\norpo_alpha: 0.2\ndatasets: [{path: b}]\n",
        ("orpo", {"beta": 0.2}),
    ),
    "axolotl orpo, both": (
        "base_model: a\nadapter: lora\nrl: orpo\norpo_alpha: 0.2\nrl_beta: 0.3\n"
        "datasets: [{path: b}]\n",
        ("orpo", {"beta": 0.3}),
    ),
    "axolotl simpo": (
        "base_model: a\nadapter: lora\nrl: simpo\nrl_beta: 2\nsimpo_gamma: 1.5\n"
        "datasets: [{path: b}]\n",
        ("simpo", {"beta": 2, "gamma": 1.5, "sft_weight": 1.0}),
    ),
    "factory orpo": (
        "model_name_or_path: a\nstage: dpo\ndataset: d\npref_loss: orpo\npref_ftx: 0.5\n",
        ("orpo", {"sft_weight": 1.5}),
    ),
    "factory simpo": (
        "model_name_or_path: a\nstage: dpo\ndataset: d\npref_loss: simpo\nsimpo_gamma: 0.7\n",
        ("simpo", {"beta": 0.1, "gamma": 0.7, "sft_weight": 0.0}),
    ),
    "trl simpo": (
        "model_name_or_path: a\ndataset_name: d\nloss_type: simpo\nbeta: 2.5\ncpo_alpha: 0.0\n",
        ("simpo", {"beta": 2.5, "gamma": 0.5, "sft_weight": 0.0}),
    ),
    "trl cpo": (
        "model_name_or_path: a\ndataset_name: d\nloss_type: hinge\ncpo_alpha: 0.5\n",
        ("cpo", {"beta": 0.1, "loss": "hinge", "sft_weight": 0.5}),
    ),
    "axolotl kto": (
        "base_model: a\nadapter: lora\nrl: kto\nrl_beta: 0.2\nkto_desirable_weight: 0.5\n"
        "kto_undesirable_weight: 2\ndatasets: [{path: b, type: llama3.ultra}]\n",
        ("kto", {"beta": 0.2, "desirable_weight": 0.5, "undesirable_weight": 2}),
    ),
    "factory kto": (
        "model_name_or_path: a\nstage: kto\ndataset: d\npref_beta: 0.1\nkto_chosen_weight: 2\n"
        "kto_rejected_weight: 1.5\n",
        ("kto", {"beta": 0.1, "desirable_weight": 2, "undesirable_weight": 1.5}),
    ),
    "trl kto": (
        "model_name_or_path: a\ndataset_name: d\nbeta: 0.2\nundesirable_weight: 3.0\n",
        ("kto", {"beta": 0.2, "undesirable_weight": 3.0}),
    ),
    "trl kto, by its loss": (
        "model_name_or_path: a\ndataset_name: d\nbeta: 0.2\nloss_type: kto\n",
        ("kto", {"beta": 0.2}),
    ),
}


@pytest.mark.parametrize("name", OWN_LOSS)
def test_objectives_with_a_loss_of_their_own(name: str, tmp_path: Path) -> None:
    """What a tool takes where its file says nothing is written out where lora takes another."""
    text, wanted = OWN_LOSS[name]
    recipe = recipe_of(tmp_path, text)
    assert (recipe["objective"], recipe["preference"]) == wanted


PAIRS = {
    "type: chat_template.default, field_messages: talk": {"prompt": "talk"},
    "type: chat_template.default, field_chosen: good, field_rejected: bad": {
        "prompt": "messages", "chosen": "good", "rejected": "bad",
    },
    "type: chatml.intel": {"prompt": "question"},
    "type: llama3.argilla_chat": None,
    "type: {field_prompt: ask, field_chosen: good}": {"prompt": "ask", "chosen": "good"},
}  # fmt: skip


@pytest.mark.parametrize("entry", PAIRS)
def test_pairs_are_read_from_the_columns_they_stand_in(entry: str, tmp_path: Path) -> None:
    """Where each of axolotl's types has them (axolotl/prompt_strategies/dpo)."""
    text = f"base_model: a\nadapter: lora\nrl: dpo\ndatasets: [{{path: b, {entry}}}]\n"
    data = recipe_of(tmp_path, text)["data"]
    assert data.get("columns") == PAIRS[entry]
    assert "format" not in data
    kinds = {fate.kind for fate in draft_of("x.yml", tmp_path, text).fates.values()}
    assert kinds == ({Kind.taken, Kind.hand} if "llama3" in entry else {Kind.taken})


def test_dpo_is_not_taken_for_granted(tmp_path: Path, capsys) -> None:
    """TRL's files for ORPO have no key that those for DPO lack."""
    text = "model_name_or_path: a\ndataset_name: b\nuse_peft: true\nbeta: 0.1\n"
    assert recipe_of(tmp_path, text)["objective"] == "dpo"
    assert "write objective: orpo" in capsys.readouterr().err.partition("needs your hand")[2]
    assert "write objective: orpo" in (tmp_path / "ours.yaml").read_text()
    for key in ("loss_type: [sigmoid]", "rpo_alpha: 1.0", "precompute_ref_log_probs: true"):
        draft = draft_of("x.yaml", tmp_path, f"{text}{key}\n")
        assert not [each for each in draft.asked if "orpo" in each], key


BECOMES: list[tuple[str, str, str, Any]] = [
    ("axolotl", "curriculum_sampling: true", "training.train_sampling_strategy", "sequential"),
    ("axolotl", "excess_length_strategy: raise", "data.on_long_row", "error"),
    ("axolotl", "liger_rms_norm: true", "", Kind.none),
    ("axolotl", "plugins: [axolotl.integrations.liger.LigerPlugin]", "", Kind.none),
    ("axolotl", "plugins: [axolotl.integrations.grokfast.GrokfastPlugin]", "", Kind.hand),
    ("axolotl", "gradient_checkpointing: offload", "training.gradient_checkpointing", True),
    ("axolotl", "gradient_checkpointing: false", "training.gradient_checkpointing", False),
    ("axolotl", "pretraining_dataset: org/set", "data.streaming", True),
    ("axolotl", "pretraining_dataset: [{path: b, name: en}]", "data.streaming", True),
    ("axolotl", "streaming: true", "data.streaming", True),
    ("axolotl", "pretrain_multipack_attn: false", "", Kind.hand),
    ("axolotl", "context_parallel_size: 2", "", Kind.none),
    ("llama-factory", "image_max_pixels: 262144", "", Kind.none),
    ("llama-factory", "neat_packing: true\npacking: false", "training.packing", "dataset"),
    ("llama-factory", "packing: false\nneat_packing: true", "training.packing", "dataset"),
    ("trl", "dataset_mixer: {org/set: 1.0}", "data.path", "org/set"),
    ("trl", "dataset_mixer: {org/set: 0.5, org/other: 1.0}", "", Kind.hand),
    ("trl", "dataset_splits: [train_prefs, test_prefs]", "data.split", "train_prefs"),
    ("trl", "dataset_splits: [one, two]", "", Kind.hand),
    ("trl", "do_eval: true\ndataset_splits: [train_x, test_x]", "data.eval_split", "test_x"),
    ("unsloth", "chat_template: llama-3.1", "", Kind.hand),
    ("unsloth", "chat_template: chatml", "model.chat_template", "chatml"),
]


@pytest.mark.parametrize(("tool", "line", "key", "wanted"), BECOMES, ids=lambda each: str(each))
def test_what_becomes_of_a_key(tool: str, line: str, key: str, wanted: Any, tmp_path: Path) -> None:
    draft = draft_of("x.yaml", tmp_path, f"{ASKED[tool]}{line}\n", tool=tool)
    if key:
        assert draft.values[key] == wanted
    else:
        fate = draft.fates[line.rpartition("\n")[2].partition(":")[0],]
        assert fate.kind == wanted
        assert "no key of" not in fate.text


def test_pairs_stay_pairs_where_the_base_was_sharded(tmp_path: Path) -> None:
    text = "model_name_or_path: a\nstage: dpo\ndataset: d\ndeepspeed: ds_z3_config.json\n"
    recipe = recipe_of(tmp_path, text + "pref_beta: 0.2\n")
    assert recipe["objective"] == "dpo"
    assert recipe["preference"]["beta"] == 0.2
    assert recipe["distributed"] == {"strategy": "deepspeed-zero3"}


def test_rows_with_a_label_keep_their_columns(tmp_path: Path) -> None:
    """As axolotl's own formats and LLaMA-Factory's register name them."""
    axolotl = (
        "base_model: a\nadapter: lora\nrl: kto\ndatasets:\n  - path: b\n    type:\n"
        "      {field_prompt: ask, field_completion: completion, field_label: good}\n"
    )
    data = recipe_of(tmp_path, axolotl)["data"]
    assert data["columns"] == {"prompt": "ask", "label": "good"}
    assert "format" not in data
    (tmp_path / "ours.yaml").unlink()
    intel = "base_model: a\nadapter: lora\nrl: kto\ndatasets: [{path: b, type: chatml.intel}]\n"
    recipe = recipe_of(tmp_path, intel)
    assert recipe["data"]["columns"] == {"prompt": "question"}
    assert recipe["model"]["chat_template"] == "chatml"
    (tmp_path / "ours.yaml").unlink()
    (tmp_path / "data").mkdir()
    entry = {
        "file_name": "votes.json",
        "formatting": "sharegpt",
        "columns": {"messages": "messages", "kto_tag": "label"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"votes": entry}))
    factory = "model_name_or_path: a\nstage: kto\ndataset: votes\n"
    data = recipe_of(tmp_path, factory)["data"]
    assert (data["format"], data["path"]) == ("unpaired", "data/votes.json")
    assert data["columns"] == {"conversations": "messages"}
    with pytest.raises(LoraError, match="loss_type: apo_zero_unpaired is a loss of single answers"):
        text = "model_name_or_path: a\ndataset_name: d\ndesirable_weight: 1.0\n"
        recipe_of(tmp_path, text + "loss_type: apo_zero_unpaired\n", tool="trl")


@pytest.mark.parametrize("turned", [False, True])
def test_a_list_of_data_sets_goes_before_one(tmp_path: Path, turned: bool) -> None:
    """TRL warns, and uses the list."""
    keys = ["dataset_name: one\ndataset_config: en\n", "datasets: [{path: b}, {path: c}]\n"]
    text = "model_name_or_path: a\nuse_peft: true\n" + "".join(keys[::-1] if turned else keys)
    data = recipe_of(tmp_path, text)["data"]
    assert data["mix"] == [{"path": "b"}, {"path": "c"}]
    assert not {"path", "name"} & data.keys()
    draft = draft_of("x.yml", tmp_path, text)
    assert draft.fates["dataset_name",].text == "datasets goes before it"


def test_two_data_sets_are_a_mix(tmp_path: Path) -> None:
    text = (
        "base_model: a\nadapter: lora\ndatasets:\n"
        "  - {path: b, type: alpaca, split: 'train[:10%]'}\n"
        "  - {path: json, data_files: [x.jsonl], type: chat_template, field_messages: talk,\n"
        "     message_property_mappings: {role: from, content: value}}\n"
    )
    assert recipe_of(tmp_path, text)["data"]["mix"] == [
        {"format": "alpaca", "split": "train[:10%]", "path": "b"},
        {"columns": {"conversations": "talk"}, "format": "sharegpt", "path": "x.jsonl"},
    ]


def test_rows_with_the_models_own_template_keep_it(tmp_path: Path) -> None:
    """One prompt written for all rows would be that of chats, too."""
    alone = "base_model: a\nadapter: lora\ndatasets:\n  - {path: b, type: alpaca}\n"
    assert recipe_of(tmp_path, alone)["model"]["chat_template"] == "alpaca"
    (tmp_path / "ours.yaml").unlink()
    both = alone + "  - {path: c, type: chat_template}\n"
    assert "chat_template" not in recipe_of(tmp_path, both)["model"]
    fate = draft_of("x.yml", tmp_path, both).fates["datasets", 0, "type"]
    assert fate.kind == Kind.hand
    assert "model.chat_template: alpaca is this prompt" in fate.text


@pytest.mark.parametrize("turned", [False, True])
def test_all_linear_layers_and_some_named_are_all(tmp_path: Path, turned: bool) -> None:
    """axolotl adds the names to the linear layers that it finds, whichever key comes first."""
    keys = ["lora_target_linear: true\n", "lora_target_modules: [q_proj]\n"]
    text = "base_model: a\nadapter: lora\n" + "".join(keys[::-1] if turned else keys)
    assert recipe_of(tmp_path, text)["lora"]["target_modules"] == "all-linear"
    draft = draft_of("x.yml", tmp_path, text.replace("q_proj", "embed_tokens"))
    assert draft.fates["lora_target_modules",].kind == Kind.hand


def test_registered_data_sets_are_looked_up(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    entries = {
        "mine": {
            "file_name": "mine.json",
            "formatting": "sharegpt",
            "columns": {"messages": "talk"},
        },
        "hub": {"hf_hub_url": "org/set", "subset": "en", "columns": {"prompt": "ask"}},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(entries))
    text = "model_name_or_path: a\nstage: sft\ndataset: mine, hub\nmax_samples: 7\n"
    assert recipe_of(tmp_path, text)["data"]["mix"] == [
        {"path": "data/mine.json", "format": "sharegpt", "columns": {"conversations": "talk"},
         "max_rows": 7},
        {"path": "org/set", "name": "en", "format": "alpaca", "columns": {"instruction": "ask"},
         "max_rows": 7},
    ]  # fmt: skip
    draft = draft_of("x.yaml", tmp_path, text)
    assert draft.fates["dataset",].kind == Kind.taken
    draft = draft_of("x.yaml", tmp_path, text.replace("hub", "other"))
    assert draft.fates["dataset",].kind == Kind.hand


def test_a_value_that_lora_refuses_needs_a_hand(tmp_path: Path, capsys) -> None:
    text = (
        "base_model: a\nadapter: lora\ndatasets: [{path: b, type: alpaca}]\n"
        "gradient_checkpointing: at times\nlora_r: '16'\nnum_epochs: yes please\nlora_alpha: 8\n"
        "eval_strategy: steps\n"
    )
    recipe = recipe_of(tmp_path, text)
    assert recipe["lora"]["r"] == 16  # text that means a number is one
    assert "gradient_checkpointing" not in recipe["training"]
    assert "eval_strategy" not in recipe["training"]
    shown = capsys.readouterr().err.partition("needs your hand")[2]
    assert "gradient_checkpointing: at times  training.gradient_checkpointing is" in shown
    assert "num_epochs: yes please" in shown
    assert "eval_strategy: steps" in shown
    assert "needs evaluation data" in shown


ASKED = {
    "axolotl": "base_model: a\nadapter: lora\n",
    "llama-factory": "model_name_or_path: a\nstage: sft\n",
    "trl": "model_name_or_path: a\n",
    "unsloth": "model: a\n",
}
ODD = ["5", "0.5", "text", "[a, b]", "{a: 1}", "[{path: 3, type: [x], roles: 1, columns: 2}]"]


@pytest.mark.parametrize("name", TOOLS)
def test_a_value_of_any_kind_is_answered(name: str, tmp_path: Path) -> None:
    """Every key that a tool's table has, with values of every kind: told of once, or refused."""
    path, count = tmp_path / "odd.yml", 0
    for key in TOOLS[name].rules:
        section, _, inner = key.rpartition(".")
        for odd in ODD:
            text = f"{section}: {{{inner}: {odd}}}\n" if section else f"{inner}: {odd}\n"
            fixed = [each for each in ASKED[name].splitlines() if not each.startswith(f"{key}:")]
            path.write_text("\n".join([*fixed, text]))
            try:
                draft = make_draft(path, name, "m", None)
            except LoraError as error:
                assert "which lora does not do" in error.message
                continue
            count += 1
            for keys in walk(yaml.safe_load(path.read_text())):
                told = [keys[:n] for n in range(1, len(keys) + 1) if keys[:n] in draft.fates]
                assert len(told) == 1, (key, odd)
    assert count > 150


def test_a_secret_is_neither_written_nor_shown(tmp_path: Path, capsys) -> None:
    token = "sesame" + "-open"
    text = f"model: a\ntraining: {{batch_size: 1}}\nlogging: {{wandb_token: {token}}}\n"
    recipe_of(tmp_path, text)
    assert token not in (tmp_path / "ours.yaml").read_text()
    shown = capsys.readouterr().err
    assert token not in shown
    assert "logging.wandb_token: ***" in shown


def test_options_go_before_the_file(tmp_path: Path) -> None:
    name = "axolotl-lora-1b.yml"
    recipe = recipe_of(tmp_path, EXAMPLES[name].read_text(), model="mine", data="rows.csv")
    assert recipe["model"]["name_or_path"] == "mine"
    assert recipe["data"]["path"] == "rows.csv"
    draft = draft_of(name, tmp_path, model="mine", data="rows.csv")
    assert draft.fates["base_model",].text == "--model goes before it"
    assert draft.fates["datasets", 0, "path"].text == "--data goes before it"


def test_other_rows_are_read_by_their_own_columns(tmp_path: Path) -> None:
    """What a file says of rows that it names is not said of those of --data; what it says of rows
    that it does not name is."""
    text = (
        "base_model: a\nadapter: lora\ndatasets:\n  - {path: b, split: x, type: chat_template,\n"
        "     field_messages: talk, message_property_mappings: {role: from, content: value}}\n"
    )
    assert recipe_of(tmp_path, text, data="rows.csv")["data"] == {"path": "rows.csv"}
    (tmp_path / "ours.yaml").unlink()
    draft = draft_of("x.yml", tmp_path, text, data="rows.csv")
    assert {
        draft.fates["datasets", 0, key].text for key in ("path", "split", "field_messages")
    } == {"--data goes before it"}
    factory = "model_name_or_path: a\nstage: pt\ndataset: d\neval_dataset: e\n"
    data = recipe_of(tmp_path, factory, data="rows.csv")["data"]
    assert data == {"path": "rows.csv", "train_on": "all", "on_long_row": "split"}
    (tmp_path / "ours.yaml").unlink()
    unsloth = "model: a\ndata: {format_type: alpaca}\ntraining: {batch_size: 1}\n"
    data = recipe_of(tmp_path, unsloth, data="rows.csv")["data"]
    assert (data["path"], data["format"]) == ("rows.csv", "alpaca")


def test_a_prompt_of_another_style_is_not_alpacas(tmp_path: Path) -> None:
    for style, template in (("", "alpaca"), (":instruct", "alpaca"), (":chatml", "chatml")):
        text = f"base_model: a\nadapter: lora\ndatasets: [{{path: b, type: 'alpaca{style}'}}]\n"
        draft = draft_of("x.yml", tmp_path, text)
        assert draft.values["model.chat_template"] == template
    draft = draft_of("x.yml", tmp_path, text.replace("chatml", "phi"))
    assert "model.chat_template" not in draft.values
    assert draft.fates["datasets", 0, "type"].kind == Kind.hand


def test_registered_pictures_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    entry = {"file_name": "m.json", "formatting": "sharegpt", "columns": {"images": "images"}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mllm": entry}))
    text = "model_name_or_path: a\nstage: sft\ndataset: mllm\nimage_max_pixels: 9\n"
    asked = draft_of("x.yaml", tmp_path, text).asked
    assert [each for each in asked if "gives data/m.json images" in each]


def test_texts_of_others_stay_in_their_comments(tmp_path: Path) -> None:
    text = 'base_model: a\nadapter: lora\ntype_of_x: "one\\n two: [\\e[31m"\nmicro_batch_size: 1\n'
    recipe = recipe_of(tmp_path, text + "default_system_message: 'be\n\n  brief: # and: kind'\n")
    assert recipe["model"]["system_prompt"] == "be\nbrief: # and: kind"
    assert "\x1b" not in (tmp_path / "ours.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "tool", "message", "hint"),
    [
        ("", None, "has no keys", "YAML file of another tool"),
        ("- a\n", None, "has no keys", "YAML file of another tool"),
        ("a: [\n", None, "theirs.yml:2", "mend line 2"),
        ("a: 1\n", None, "has no key by which a tool is told", "--from axolotl; or llama-factory"),
        ("a: 1\n", "axolot", "--from axolot is no tool", "did you mean --from axolotl?"),
        (
            "a: 1\n",
            "zzz",
            "--from zzz is no tool",
            "the tools are axolotl, llama-factory, trl, unsloth",
        ),
        ("a: 1\n", "trl", "theirs.yml names no model", "--model NAME_OR_FOLDER"),
        ("distributed_type: FSDP\n", None, "configures accelerate", "--nproc N"),
        ("model: {name_or_path: a}\n", None, "is a recipe of lora already", "lora check"),
        ("extends: alpaca\n", None, "is a recipe of lora already", "lora check"),
        ("base_model: a\nrl: grpo\n", None, "theirs.yml:2: rl: grpo is a training on", "adapter"),
        (
            "model_name_or_path: a\nbeta: 0.1\nnum_generations: 8\n",
            "trl",
            "yml:2: beta: 0.1 is",
            "",
        ),
        ("model_name_or_path: a\nstage: rm\n", None, "theirs.yml:2: stage: rm is", "adapter"),
        ("base_model: [a]\nmicro_batch_size: 1\n", None, "model.name_or_path is ['a']", ""),
    ],
)
def test_what_is_no_file_to_import(
    text: str, tool: str | None, message: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraError) as error:
        recipe_of(tmp_path, text, tool=tool)
    assert message in error.value.message
    assert hint in (error.value.hint or "")
    assert not (tmp_path / "ours.yaml").exists()


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "mine.yaml"
    theirs.write_text("model: a\ntraining: {batch_size: 1}\n")
    assert str(import_file(Path("mine.yaml"), None, None, None, None)) == "mine-lora.yaml"
    with pytest.raises(UsageError, match=r"mine-lora\.yaml already exists"):
        import_file(Path("mine.yaml"), None, None, None, None)
    assert theirs.read_text().startswith("model: a\n")


ONE_EACH = ["axolotl-instruct-8b.yml", "llama-factory-loraplus.yaml", "trl-example.yaml",
            "unsloth-lora-text.yaml", "llama-factory-dpo.yaml"]  # fmt: skip


@pytest.mark.parametrize("name", ONE_EACH)
def test_an_imported_recipe_trains(name: str, tiny: Path, tmp_path: Path, lora) -> None:
    """A step with the tiny model and its rows in the base's and the rows' place."""
    path = tmp_path / name
    path.write_text(EXAMPLES[name].read_text())
    out, rows = tmp_path / "ours.yaml", tiny / "train.jsonl"
    changes: dict[str, object] = {"data.format": "prompt_completion"}
    if "dpo" in name:
        pairs = [{"prompt": f"Copy: {n}", "chosen": f"{n}", "rejected": "ice"} for n in range(40)]
        rows, changes = tmp_path / "pairs.jsonl", {}
        rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    made = lora("import", path, "--model", tiny / "model", "--data", rows, "--out", out)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f"{out}\n"
    assert made.stderr.endswith(f"next: lora check {out}\n")
    changes |= {
        "output_dir": tmp_path / "run", "training.max_steps": 1, "data.max_rows": 40,
        "training.pad_token": "null", "model.dtype": "float32", "training.optim": "adamw_torch",
        "method": "lora", "lora.target_modules": "all-linear", "training.dataset_num_proc": 1,
        "training.dataloader_num_workers": 0,
    }  # fmt: skip
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    done = lora("train", out, *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


if __name__ == "__main__":
    sys.stdout.write(snapshots.render(sorted(EXAMPLES), said))


AXOLOTL = "base_model: a/b\nadapter: lora\nmicro_batch_size: 2\nsequence_len: 512\n"


def test_keys_are_read_as_options_spell_them(tmp_path: Path) -> None:
    text = "model-name-or-path: a\ndataset_name: b\nuse-peft: true\nlearning-rate: 3e-4\n"
    draft = draft_of("a.yaml", tmp_path, text)
    assert draft.tool == "TRL"
    assert draft.values["training.learning_rate"] == 3e-4
    assert draft.source.show_place(("learning_rate",)).endswith("a.yaml:4")
    with pytest.raises(UsageError, match=r"a.yaml:5: use_peft is given twice \(first on line 3\)"):
        draft_of("a.yaml", tmp_path, f"{text}use_peft: true\n")


@pytest.mark.parametrize(
    ("before", "twice", "line"),
    [
        ("", "use-peft: true\n", 5),
        ("", "lora-target-modules: [q_proj, v_proj]\n", 5),
        ("", "lora-target-modules:\n  - q_proj\n  - v_proj\n", None),
        ("", "lora-target-modules: [q_proj,\n  v_proj]\n", None),
        ("", "output-dir: >-\n  a\n  b\n", None),
        ("", "output-dir: a\n  b\n", None),
        ("", "lora-r: &rank 8\nlora-alpha: *rank\n", None),
        ("x: &one\n  use-peft: true\n", "<<: *one\n", None),
    ],
)
def test_a_key_given_twice_is_taken_out_whole_or_not_at_all(
    before: str, twice: str, line: int | None, tmp_path: Path
) -> None:
    names = ("use_peft: false", "lora_target_modules: [k_proj]", "output_dir: c", "lora_r: 4")
    path = tmp_path / "a b.yaml"
    first = "".join(f"{each}\n" for each in names)
    path.write_text(f"{before}{first}{twice}")
    with pytest.raises(UsageError, match="is given twice") as refused:
        make_draft(path, None, None, None)
    command, takes, _ = (refused.value.hint or "").partition(" takes this one out")
    assert bool(takes) == (line is not None), refused.value.hint
    if line is None:
        assert refused.value.hint == "leave one of the two out"
    else:
        assert command.startswith(f"sed -i {line}d ")
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert path.read_text() == first


def test_aliases_and_merges_are_followed_to_their_lines(tmp_path: Path) -> None:
    text = (
        f"{AXOLOTL}lora_target_modules: &names [q_proj]\nlora_modules_to_save: *names\n"
        "datasets:\n  - &one\n    path: c/d\n    type: completion\n    split: train\n"
        "  - <<: *one\n    path: e/f\n  - {<<: [{split: test}, *one], path: g/h}\n"
    )
    theirs = yaml.safe_load(text)
    draft = draft_of("a.yaml", tmp_path, text)
    assert draft.source.data == theirs
    mix = draft.values["data.mix"]
    assert [(each["path"], each["split"]) for each in mix] == [
        ("c/d", "train"), ("e/f", "train"), ("g/h", "test"),
    ]  # fmt: skip
    lines = {
        keys: draft.source.find_line(keys)
        for keys in (("datasets", 1, "path"), ("datasets", 1, "type"), ("lora_modules_to_save",))
    }
    assert list(lines.values()) == [13, 10, 6]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: &a {b: 1}\nc:\n  <<: 3\n", "a.yaml:3: << merges a mapping"),
        ("a: &a\n  <<: *a\n", "a.yaml:2: << merges a mapping"),
        ("a: &a [*a]\n", "a.yaml: nested too deeply"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{name}: &{name} [{', '.join([f'*{of}'] * 9)}]\n" for of, name in zip("abcde", "bcdef")
        ), "a.yaml:1: aliases that stand for over 20,000 values"),
        ("a: &a {}\n" + "".join(
            f"{name}: &{name} {{<<: [{', '.join([f'*{of}'] * 9)}]}}\n"
            for of, name in zip("abcdefg", "bcdefgh")
        ), "a.yaml:1: aliases that stand for over 20,000 values"),
        (f"{AXOLOTL}---\nbase_model: c\n", "a.yaml:5: a second document begins here"),
        ("a: !!python/name:os.system x\n", "a.yaml:1: tags"),
    ],
)  # fmt: skip
def test_yaml_that_cannot_be_followed_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as refused:
        draft_of("a.yaml", tmp_path, text)
    assert said in refused.value.message


def test_the_first_of_several_documents_is_had_by_the_hint(tmp_path: Path) -> None:
    path = tmp_path / "my file.yaml"
    path.write_text(f"{AXOLOTL}---\nbase_model: c\n")
    with pytest.raises(UsageError) as refused:
        make_draft(path, None, None, None)
    command, _, name = (refused.value.hint or "").partition("; then name ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    made = make_draft(tmp_path / name.strip("'"), None, None, None)
    assert made.values["model.name_or_path"] == "a/b"


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_keys_for_rows_the_one_that_axolotl_reads_is_taken(
    order: int, tmp_path: Path
) -> None:
    sets = ["datasets: [{path: c/d, type: alpaca}]\n", "pretraining_dataset: [{path: e/f}]\n"]
    draft = draft_of("a.yaml", tmp_path, AXOLOTL + "".join(sets[::order]))
    assert draft.values["data.path"] == "e/f"
    assert "model.chat_template" not in draft.values
    assert draft.fates[("datasets",)].kind == Kind.none
    one = draft_of("b.yaml", tmp_path, f"{AXOLOTL}pretraining_dataset: e/f\n")
    assert (one.values["data.path"], one.values["data.format"]) == ("e/f", "text")


@pytest.mark.parametrize(
    "text",
    [
        f"{AXOLOTL}processor_type: AutoProcessor\n",
        f"{AXOLOTL}image_size: 512\n",
    ],
)
def test_pictures_in_conversations_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="is a training on pictures in conversations") as refused:
        draft_of("a.yaml", tmp_path, text)
    assert "DPO" not in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        ("llava-hf/llava-1.5-7b-hf", True),
        ("Qwen/Qwen2.5-VL-7B-Instruct", True),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", True),
        ("mistralai/Pixtral-12B", True),
        ("meta-llama/Llama-3.2-1B-Instruct", False),
        ("tiiuae/vlogger", False),
        ("AI-Revision/Model", False),
    ],
)
def test_of_a_model_of_pictures_it_is_told_what_trains(
    model: str, reads: bool, tmp_path: Path
) -> None:
    text = f"model_name_or_path: {model}\ndataset_name: b\nuse_peft: true\n"
    asked = " ".join(draft_of("a.yaml", tmp_path, text).asked)
    assert ("seems to read pictures" in asked) == reads


def test_unsloths_names_are_known_without_sections(tmp_path: Path) -> None:
    flat = "model_name: a\nmax_seq_length: 1024\nload_in_4bit: false\nlora_r: 8\nrandom_seed: 7\n"
    draft = draft_of("a.yaml", tmp_path, flat)
    nested = (
        "model: a\ntraining: {max_seq_length: 1024, load_in_4bit: false, random_seed: 7}\n"
        "lora: {lora_r: 8}\n"
    )
    of_its_loader = (
        "model: {model_name: a, max_seq_length: 1024, load_in_4bit: false}\n"
        "lora: {r: 8, random_state: 7}\n"
    )
    assert draft.tool == "Unsloth"
    assert draft.values["method"] == "lora"
    for other in (nested, of_its_loader):
        assert draft_of("b.yaml", tmp_path, other).values == draft.values
    many = draft_of("c.yaml", tmp_path, f"{flat}dataset: [{{name: x}}]\n")
    assert many.fates[("dataset",)].kind == Kind.hand


FACTORY = "model_name_or_path: a\nfinetuning_type: lora\ntemplate: qwen\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{FACTORY}export_dir: out\n", "a.yaml:4: export_dir: out is an export, and no training"),
        (f"{FACTORY}infer_backend: vllm\n", "a.yaml:4: infer_backend: vllm is an inference"),
        (
            f"{FACTORY}stage: sft\ndo_train: false\n",
            "a.yaml:5: do_train: False: the file is for no",
        ),
        ("model:\n  _component_: x\nepochs: 1\n", "a.yaml is torchtune's"),
    ],
)
def test_what_is_no_training_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(LoraError) as refused:
        draft_of("a.yaml", tmp_path, text)
    assert refused.value.message.startswith(str(tmp_path / said.partition(" ")[0]))
    assert said.partition(" ")[2] in refused.value.message
