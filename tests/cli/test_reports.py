"""What people have complained of in public, about tools like this one: each case is one command.

Every case was tried on this tool before it was mended, and was wrong, a traceback, or a message that
led nowhere; what it does now is written down here. The tests of the rooms hold the details against
other programs. Hermetic. Alone: pytest tests/cli/test_reports.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import architectures, quantised


@dataclass
class Place:
    """A folder to put things in, with the tiny model beside it."""

    folder: Path
    model: Path

    def write_recipe(self, text: str = "", base: Path | None = None) -> Path:
        """A recipe of two steps on the tiny model's rows; `text` adds to it or replaces values."""
        (self.folder / "base.yaml").write_text(
            f"model: {{name_or_path: {base or self.model}}}\n"
            f"data: {{path: {self.model.parent / 'train.jsonl'}, max_rows: 16}}\n"
            "training: {max_steps: 2, per_device_train_batch_size: 4, max_length: 128}\n"
            f"output_dir: {self.folder / 'run'}\n"
        )
        path = self.folder / "recipe.yaml"
        path.write_text(f"extends: base.yaml\n{text}")
        return path

    def write_rows(self, *rows: dict[str, Any], **data: Any) -> Path:
        """A recipe on these rows."""
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (self.folder / "rows.jsonl").write_text(lines)
        return self.write_recipe(
            f"data: {json.dumps({'path': str(self.folder / 'rows.jsonl'), **data})}\n"
        )

    def write_table(self, text: str, name: str = "rows.csv") -> Path:
        """A recipe on this table."""
        (self.folder / name).write_text(text)
        return self.write_recipe(f"data: {{path: {self.folder / name}}}\n")

    def make_base(self, family: str, **more: Any) -> Path:
        """A small random model of another family."""
        return architectures.make_folder(family, self.folder / family, self.model, **more)

    def make_adapter(self, name: str = "adapter", **options: Any) -> Path:
        """An adapter of the tiny model by PEFT alone."""
        return quantised.save_adapter(self.model, self.folder / name, **options)


Made = tuple[list[Any], int, list[str]]
"""A command, its exit status, and what it says."""
CASES: dict[str, Callable[[Place], Made]] = {}
TURN = {"role": "user", "content": "red dog"}
ANSWER = {"role": "assistant", "content": "dog red"}


def case(make: Callable[[Place], Made]) -> Callable[[Place], Made]:
    """Add a case under its function's name."""
    CASES[make.__name__] = make
    return make


# A base that is quantised already ----------------------------------------------------------------


@case
def a_base_in_nf4_is_trained(place: Place) -> Made:
    base = quantised.save_bitsandbytes(place.model, place.folder / "nf4", **quantised.DOUBLY)
    recipe = place.write_recipe("method: qlora\n", base)
    return ["train", recipe], 0, ["already quantised (bitsandbytes NF4"]


@case
def a_base_in_nf4_is_merged_into(place: Place) -> Made:
    base = quantised.save_bitsandbytes(place.model, place.folder / "nf4", **quantised.DOUBLY)
    adapter = quantised.save_adapter(base, place.folder / "adapter")
    return ["merge", adapter, place.folder / "out"], 0, ["merging into the dequantised base"]


@case
def a_base_in_gptq_says_so_before_weights_are_looked_for(place: Place) -> Made:
    settings = {"quant_method": "gptq", "bits": 4}
    base = quantised.save_configured(place.model, place.folder / "gptq", settings)
    return ["check", place.write_recipe("", base)], 1, ["already quantised (GPTQ, 4 bits"]


@case
def a_base_in_fp8_is_trained_dequantised(place: Place) -> Made:
    base = quantised.save_fp8(place.model, place.folder / "fp8", (32, 32))
    return ["train", place.write_recipe("", base)], 0, ["FP8", "dequantised"]


@case
def a_quantised_folder_is_not_converted(place: Place) -> Made:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, **quantised.NF4}
    base = quantised.save_configured(place.model, place.folder / "nf4", settings)
    return ["export-gguf", base], 1, ["which is not converted to GGUF"]


# Other shapes than Llama's -----------------------------------------------------------------------


@case
def bert_is_no_causal_model(place: Place) -> Made:
    recipe = place.write_recipe("", place.make_base("bert"))
    return ["check", recipe], 1, ["is an encoder", '"is_decoder": true']


@case
def xlnet_is_none_either(place: Place) -> Made:
    return ["train", place.write_recipe("", place.make_base("xlnet"))], 1, ["is an encoder"]


@case
def a_head_that_transforms_is_not_skipped(place: Place) -> Made:
    recipe = place.write_recipe("", place.make_base("modernbert-decoder"))
    return ["train", recipe], 0, ["training.loss_head = stock"]


@case
def learned_positions_do_not_stop_a_merge(place: Place) -> Made:
    adapter = quantised.save_adapter(place.make_base("opt"), place.folder / "adapter")
    return ["merge", adapter, place.folder / "out"], 0, ["merged again: "]


@case
def a_state_space_model_is_trained(place: Place) -> Made:
    recipe = place.write_recipe("", place.make_base("mamba"))
    return ["train", recipe], 0, ["out_proj, which PEFT does not adapt"]


@case
def a_state_space_model_is_planned(place: Place) -> Made:
    return ["plan", place.write_recipe("", place.make_base("mamba"))], 0, ["memory"]


@case
def a_tower_for_pictures_is_left_out(place: Place) -> Made:
    recipe = place.write_recipe("", place.make_base("llava"))
    return (
        ["check", recipe],
        0,
        ["of vision_tower, multi_modal_projector, which no text passes through"],
    )


@case
def a_base_that_sees_pictures_is_no_other_kind_of_model(place: Place) -> Made:
    return ["train", place.write_recipe("", place.make_base("mistral3"))], 0, ["adapter in"]


# What a row says ---------------------------------------------------------------------------------


@case
def a_key_that_nobody_reads_is_counted(place: Place) -> Made:
    recipe = place.write_rows({"messages": [TURN, {**ANSWER, "mood": "glad"}]})
    return ["check", recipe], 0, ["mood"]


@case
def tools_may_be_texts(place: Place) -> Made:
    tool = json.dumps({"type": "function", "function": {"name": "find", "parameters": {}}})
    return ["check", place.write_rows({"messages": [TURN, ANSWER], "tools": [tool]})], 0, []


@case
def loss_is_on_the_completion_alone(place: Place) -> Made:
    row = {"prompt": [TURN, {**ANSWER, "content": "before"}, TURN], "completion": [ANSWER]}
    return ["check", place.write_rows(row), "--samples", "1"], 0, ["⟦dog red"]


@case
def parts_of_a_text_are_joined(place: Place) -> Made:
    parts = [{"type": "text", "text": "red "}, {"type": "text", "text": "dog"}]
    recipe = place.write_rows({"messages": [{**TURN, "content": parts}, ANSWER]})
    return ["check", recipe, "--samples", "1"], 0, ["red dog"]


@case
def a_developer_is_a_system(place: Place) -> Made:
    row = {"messages": [{"role": "developer", "content": "be short"}, TURN, ANSWER]}
    return ["check", place.write_rows(row), "--samples", "1"], 0, ["be short"]


@case
def old_function_calls_are_read(place: Place) -> Made:
    call = {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}
    row = {"messages": [TURN, call, {"role": "function", "name": "f", "content": "1"}, ANSWER]}
    return ["check", place.write_rows(row), "--samples", "1"], 0, []


@case
def dollys_columns_are_known(place: Place) -> Made:
    row = {"instruction": "red", "context": "dog", "response": "dog red", "category": "qa"}
    return ["check", place.write_rows(row), "--samples", "1"], 0, ["⟦dog red"]


@case
def a_table_has_spaces_around_its_names(place: Place) -> Made:
    return ["check", place.write_table("prompt , completion\nred,dog\n")], 0, ["1 of 1 row,"]


@case
def a_table_is_separated_by_semicolons(place: Place) -> Made:
    said = ["separated by semicolons", "1 of 1 row,"]
    return ["check", place.write_table("prompt;completion\nred, blue;dog\n")], 0, said


@case
def a_table_has_no_names(place: Place) -> Made:
    return ["check", place.write_table("Who are you?,a model\nask,answer\n")], 1, ["sed -i '1i"]


# Hints -------------------------------------------------------------------------------------------


@case
def an_innocent_key_is_not_blamed(place: Place) -> Made:
    text = "training: {save_strategy: 'no', optim: galore_adamw, optim_target_modules: [q_proj]}\n"
    return ["check", place.write_recipe(text)], 2, ["training.optim was rejected"]


@case
def a_missing_package_is_named(place: Place) -> Made:
    recipe = place.write_recipe("model: {attn_implementation: flash_attention_2}\n")
    return ["check", recipe], 2, ["model.attn_implementation", "pip install flash-attn"]


@case
def an_adapter_without_pefts_prefix_is_read(place: Place) -> Made:
    adapter = place.make_adapter()
    file = adapter / "adapter_model.safetensors"
    named = {name.removeprefix("base_model.model."): t for name, t in load_file(file).items()}
    save_file(named, file)
    return ["merge", adapter, place.folder / "out"], 0, ["14 of 14 modules merged"]


@case
def an_adapter_a_folder_below_is_named(place: Place) -> Made:
    place.make_adapter("runs/default" if (place.folder / "runs").mkdir() is None else "")
    return ["merge", place.folder / "runs", place.folder / "out"], 1, ["runs/default"]


@case
def fp16_means_f16(place: Place) -> Made:
    words = ["export-gguf", place.model, "-q", "fp16"]
    return words, 2, ["did you mean f16?"]


@case
def a_path_with_spaces_can_be_pasted(place: Place) -> Made:
    place.folder = place.folder / "my runs"
    place.folder.mkdir()
    recipe = place.write_table("Who are you?,a model\nask,answer\n")
    return ["check", recipe], 1, [f"prompt,completion' '{place.folder / 'rows.csv'}'"]


# Effects that are none, and what can be known beforehand ------------------------------------------


@case
def a_prompt_longer_than_the_model_reads_is_refused(place: Place) -> Made:
    words = ["generate", place.model, "--prompt", "red dog " * 400]
    return words, 1, ["tokens", "512"]


@case
def an_adapter_that_changes_nothing_says_so(place: Place) -> Made:
    adapter = place.make_adapter()
    file = adapter / "adapter_model.safetensors"
    zero = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in load_file(file).items()}
    save_file(zero, file)
    return ["merge", adapter, place.folder / "out"], 0, ["changes nothing: every B is zero"]


@case
def of_two_chat_templates_one_is_chosen(place: Place) -> Made:
    base = place.folder / "two"
    shutil.copytree(place.model, base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": name, "template": "{{ messages[0]['content'] }}"} for name in ("rag", "default")
    ]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    return ["check", place.write_recipe("", base)], 0, ["default"]


@case
def the_best_step_is_by_a_metric_there_is(place: Place) -> Made:
    text = (
        f"data: {{eval_path: {place.model.parent / 'eval.jsonl'}}}\n"
        "training: {metric_for_best_model: accuracy, keep: best, "
        "eval_strategy: steps, eval_steps: 1, save_steps: 1}\n"
    )
    return ["check", place.write_recipe(text)], 2, ["training.metric_for_best_model"]


@case
def a_schedule_lacks_its_arguments(place: Place) -> Made:
    recipe = place.write_recipe("training: {lr_scheduler_type: cosine_with_min_lr}\n")
    return ["check", recipe], 2, ["training.lr_scheduler_type"]


@case
def an_adapter_is_trained_on(place: Place) -> Made:
    recipe = place.write_recipe(f"model: {{adapter: {place.make_adapter()}}}\n")
    return ["train", recipe], 0, ["trains on: "]


@pytest.mark.parametrize("name", CASES)
def test_what_was_complained_of(lora, tiny: Path, tmp_path: Path, name: str) -> None:
    words, status, said = CASES[name](Place(tmp_path, tiny / "model"))
    done = lora(*words)
    heard = done.stdout + done.stderr
    assert done.returncode == status, heard[-3000:]
    assert "Traceback" not in heard
    assert "This is a bug in lora" not in heard
    assert all(each in heard for each in said), (said, heard[-3000:])


def test_any_encoding_takes_any_text(lora, tiny: Path, tmp_path: Path) -> None:
    recipe = Place(tmp_path, tiny / "model").write_recipe()
    for encoding in ("ascii", "cp1252"):
        done = lora("check", recipe, "--samples", "1", env={"PYTHONIOENCODING": encoding})
        assert done.returncode == 0, done.stderr


def test_the_files_that_are_right_are_handed_over(lora, tiny: Path, tmp_path: Path) -> None:
    """A type that is refused does not keep the ones before it back."""
    done = lora("export-gguf", tiny / "model", "-q", "f16", "-q", "q8_0", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.glob("*.gguf")} == {
        "model-f16.gguf",
        "model-q8_0.gguf",
    }
