"""Training an adapter on: a run starts from the very function that PEFT loads, goes on as plain
PEFT and Trainer would, and stays the same run whatever becomes of the adapter it began with.

Hermetic: adapters that PEFT made on small random models, CPU. Alone: pytest
tests/train/test_parent.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli.common.errors import LoraError
from lora_cli.data.load import load_rows
from lora_cli.evaluate import verify
from lora_cli.merge.merge import merge
from lora_cli.models import attach
from lora_cli.models.tokenizer import load_tokenizer
from lora_cli.plan import check, settled, show
from lora_cli.recipe import load
from lora_cli.train import run as train
from lora_cli.train import trial
from lora_cli.train.progress import Watch
from tests.units import STEADY_ADAM, assert_same_training

WEIGHTS = "adapter_model.safetensors"
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "plain": TARGETS,
    "patterns": {
        **TARGETS,
        "rank_pattern": {"q_proj": 7, "layers.1.mlp.down_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "use_rslora": True,
        "lora_dropout": 0.0,
    },
    "expression": {"target_modules": r".*\.layers\.1\..*_proj", "exclude_modules": ["up_proj"]},
    "dora": {**TARGETS, "use_dora": True},
    "whole modules": {**TARGETS, "modules_to_save": ["lm_head", "model.norm"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 300]}},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "names of another model": {"target_modules": ["q_proj", "v_proj", "Wqkv", "fc1"]},
    "eva's ranks": {**TARGETS, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 12}},
}


def make_adapter(base: Path, folder: Path, **config: Any) -> Path:
    """An adapter with B ≠ 0 that PEFT made and saved, without a tokenizer."""
    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_pretrained(base)
    if new := config.pop("new_rows", 0):
        network.resize_token_embeddings(network.config.vocab_size + new, mean_resizing=False)
    settings = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **config}
    with attach.quiet_peft():
        adapted = get_peft_model(network, LoraConfig(**settings))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def write(path: Path, **values: Any) -> None:
    """Replace values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.fixture
def parent(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """`parent(**LoraConfig's fields)` is a plain PEFT adapter on the tiny model."""
    return lambda **config: make_adapter(tiny / "model", tmp_path / "parent", **config)


def onward(write_recipe, parent: Path, text: str = "", *overrides: str) -> Path:
    """Train on from an adapter; return the new one."""
    path = write_recipe(f"model: {{adapter: {parent}}}\n{text}")
    return train.train(load.load_recipe(path, overrides))


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_starts_from_what_peft_loads(
    write_recipe, parent, tiny: Path, tmp_path: Path, kind: str
) -> None:
    folder = parent(**KINDS[kind])
    # a rate that no number of the adapter notices; the data evaluated before the first step
    text = (
        f"data: {{eval_path: {tiny / 'eval.jsonl'}, max_rows: 8}}\ntraining: {{learning_rate: "
        "1e-30, eval_on_start: true, max_steps: 1}\n"
    )
    made = onward(write_recipe, folder, text)
    begun, ended = tensors(folder), tensors(made)
    assert begun.keys() == ended.keys()
    assert all(torch.equal(begun[key], ended[key]) for key in begun)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    measured = next(
        each["eval_loss"] for line in lines if "eval_loss" in (each := json.loads(line))
    )

    recipe = load.load_recipe(tmp_path / "run" / "recipe.yaml")
    _, rows = load_rows(recipe, load_tokenizer(str(made)))
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with attach.quiet_peft():
        network = PeftModel.from_pretrained(base, folder).eval()
    total = count = 0.0
    with torch.no_grad():
        for row in rows.rows:
            logits = network(torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"])[1:]
            total += functional.cross_entropy(logits, labels, reduction="sum").item()
            count += (labels != -100).sum().item()
    assert measured == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["plain", "patterns", "dora", "whole modules", "rows"])
def test_it_trains_as_plain_peft_and_trainer_do(
    write_recipe, parent, tiny: Path, tmp_path: Path, kind: str
) -> None:
    folder = parent(**KINDS[kind])
    made = onward(
        write_recipe, folder, f"trainer: trainer\ntraining: {{packing: false, {STEADY_ADAM}}}\n"
    )
    recipe = load.load_recipe(tmp_path / "run" / "recipe.yaml")
    tokenizer = load_tokenizer(str(made))
    rows, _ = load_rows(recipe, tokenizer)
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with attach.quiet_peft():
        network = PeftModel.from_pretrained(base, folder, is_trainable=True)
    arguments = TrainingArguments(
        str(tmp_path / "plain"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        adam_epsilon=1e-4,
        seed=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(
        network,
        arguments,
        train_dataset=rows.rows,
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
    ).train()
    with attach.quiet_peft():
        network.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    given, wanted, before = tensors(made), tensors(tmp_path / "plain"), tensors(folder)
    assert_same_training(given, wanted)
    assert max((wanted[key] - before[key]).abs().max() for key in before) > 1e-4


@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_what_was_trained_on_is_recorded_merged_and_verified(
    write_recipe, tmp_path: Path, capsys, method: str
) -> None:
    first = train.train(
        load.load_recipe(
            write_recipe(f"method: {method}\nlora: {{r: 3}}\noutput_dir: {tmp_path / 'a'}\n")
        )
    )
    chosen = "" if method == "dora" else f"method: {method}\n"  # DoRA is taken over
    second = onward(write_recipe, first, f"{chosen}output_dir: {tmp_path / 'b'}\n")
    said = capsys.readouterr().err
    run = json.loads((tmp_path / "a" / "record.json").read_text())["id"]
    kind = "DoRA" if method == "dora" else "LoRA"
    assert f"  trains on: {first} ({kind} r 3 on 14 modules, run {run[:8]})\n" in said
    assert "another function" not in said
    third = onward(write_recipe, second, f"{chosen}output_dir: {tmp_path / 'c'}\n")
    record = json.loads((third / "lora_record.json").read_text())
    assert record["recipe"]["method"] == method
    assert (record["parent"]["name"], record["parent"]["parent"]["name"]) == (
        str(second),
        str(first),
    )
    assert record["parent"]["parent"]["id"] == run
    assert record["parent"]["sha256"] in (third / "README.md").read_text()
    assert not all(torch.equal(t, tensors(second)[key]) for key, t in tensors(third).items())
    merge(third, tmp_path / "merged")
    verify.verify(str(third), str(tmp_path / "merged"), None)  # raises where they differ


def interrupt(patch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C at the end of a step."""
    ended = Watch.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == at:
            raise KeyboardInterrupt

    patch.setattr(trial, "try_training", lambda recipe: None)  # it ends a step, too
    patch.setattr(Watch, "on_step_end", interrupted)


@pytest.mark.parametrize(("stopped", "gone"), [(3, True), (1, True), (3, False)])
def test_a_run_resumes_to_the_same_bytes_whatever_became_of_the_adapter(
    write_recipe, parent, tmp_path: Path, monkeypatch, capsys, stopped: int, gone: bool
) -> None:
    folder = parent(**KINDS["patterns"])
    steps = "training: {max_steps: 4, save_strategy: steps, save_steps: 2}\n"
    whole = onward(write_recipe, folder, f"{steps}output_dir: {tmp_path / 'a'}\n")
    path = write_recipe(f"model: {{adapter: {folder}}}\n{steps}output_dir: {tmp_path / 'b'}\n")
    interrupt(monkeypatch, stopped)
    with pytest.raises(KeyboardInterrupt):
        train.train(load.load_recipe(path))
    monkeypatch.undo()
    assert (tmp_path / "b" / "checkpoint-2").is_dir() == (stopped == 3)
    if gone:
        shutil.rmtree(folder)
    # the recipe that was written, or the resolved one that the message names
    again = path if gone else tmp_path / "b" / "recipe.yaml"
    resumed = train.train(load.load_recipe(again), resume=True)
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    said = f"  {folder} is not here any more: the run's own copy is taken\n"
    assert (said in capsys.readouterr().err) == gone


def test_a_run_does_not_go_on_with_another_adapter(
    write_recipe, parent, tmp_path: Path, monkeypatch
) -> None:
    folder = parent(**KINDS["plain"])
    path = write_recipe(
        f"model: {{adapter: {folder}}}\ntraining: {{save_strategy: steps, save_steps: 1}}\n"
    )
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        train.train(load.load_recipe(path))
    monkeypatch.undo()
    changed = {key: tensor + 1e-3 for key, tensor in tensors(folder).items()}
    save_file(changed, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(LoraError, match="is not the adapter any more that the run in"):
        train.train(load.load_recipe(path), resume=True)
    shutil.rmtree(tmp_path / "run" / ".parent")  # such a run was killed before it had its copy
    with pytest.raises(LoraError, match="began with another adapter"):
        train.train(load.load_recipe(path), resume=True)


def test_an_adapter_of_other_programs_is_trained_on(
    write_recipe, parent, tmp_path: Path, capsys
) -> None:
    """Its names without PEFT's prefix, its base under another name, in 16 bits."""
    folder = parent(**KINDS["plain"])
    renamed = {
        key.removeprefix("base_model.model."): tensor.bfloat16()
        for key, tensor in tensors(folder).items()
    }
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    write(folder / "adapter_config.json", base_model_name_or_path="owner/elsewhere")
    before = (folder / WEIGHTS).read_bytes()
    made = onward(write_recipe, folder, "training: {learning_rate: 1e-30}\n")
    for key, tensor in tensors(made).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, renamed[key.removeprefix("base_model.model.")].float())
    assert (folder / WEIGHTS).read_bytes() == before
    assert "its tensors are read under PEFT's names" in capsys.readouterr().err


def test_its_tokens_and_template_are_taken_over(write_recipe, tmp_path: Path, capsys) -> None:
    tokens = "chat_template: chatml, system_prompt: Be brief., add_tokens: [lighthouse]"
    path = write_recipe(f"model: {{{tokens}}}\noutput_dir: {tmp_path / 'a'}\n")
    first = train.train(load.load_recipe(path))
    second = onward(write_recipe, first, f"output_dir: {tmp_path / 'b'}\n")
    assert "  chat template: the adapter's own\n" in capsys.readouterr().err
    assert (second / "chat_template.jinja").read_text() == (
        first / "chat_template.jinja"
    ).read_text()
    vocabulary = AutoTokenizer.from_pretrained(second).get_vocab()
    assert vocabulary["lighthouse"] == len(vocabulary) - 1
    assert {key: t.shape for key, t in tensors(first).items()} == {
        key: t.shape for key, t in tensors(second).items()
    }
    merge(second, tmp_path / "merged")
    # a recipe that extends the first one's says the same of them once more
    again = write_recipe(f"model: {{{tokens}, adapter: {first}}}\n", "b.yaml")
    found = settled.settle_recipe(load.load_recipe(again, [f"output_dir={tmp_path / 'c'}"]))
    assert found.recipe.lora.trainable_token_indices == {"embed_tokens": [512], "lm_head": [512]}
    check.show_check(load.load_recipe(again, [f"output_dir={tmp_path / 'c'}"]), 0, False)
    show.show_plan(load.load_recipe(again), None, None, False, False)
    shown = capsys.readouterr().out
    assert shown.count(f"  trains on: {first} (LoRA r 16 on 14 modules, embedding rows") == 2


def test_what_the_recipe_says_as_the_adapter_does_is_no_contradiction(
    write_recipe, parent, tmp_path: Path, capsys
) -> None:
    folder = parent(target_modules="all-linear", lora_dropout=0.1)
    assert "all-linear" not in (folder / "adapter_config.json").read_text()
    text = "method: lora\nlora: {r: 4, lora_alpha: 12.0, target_modules: all-linear, lora_dropout: 0.3}\n"
    made = onward(write_recipe, folder, text)
    said = capsys.readouterr().err
    assert "  lora.lora_dropout = 0.3 (the adapter was trained with 0.1)\n" in said
    assert json.loads((made / "adapter_config.json").read_text())["lora_dropout"] == 0.3


def test_another_storage_of_the_base_is_said(write_recipe, tmp_path: Path, capsys) -> None:
    first = train.train(
        load.load_recipe(write_recipe(f"method: qlora\noutput_dir: {tmp_path / 'a'}\n"))
    )
    onward(write_recipe, first, f"output_dir: {tmp_path / 'b'}\n")
    said = (
        "the adapter was trained on 4-bit weights: lora starts from another function than it left"
    )
    assert f"  {said} (method: qlora from the same)\n" in capsys.readouterr().err


def test_an_adapter_that_changes_nothing_is_said(write_recipe, parent, capsys) -> None:
    folder = parent(**KINDS["plain"])
    zero = {key: 0 * t if "lora_B" in key else t for key, t in tensors(folder).items()}
    save_file(zero, folder / WEIGHTS, metadata={"format": "pt"})
    onward(write_recipe, folder)
    assert "changes nothing: every B is zero" in capsys.readouterr().err


Case = tuple[str, Callable[[Path], Any], str, str]


def configured(**values: Any) -> Callable[[Path], Any]:
    return lambda folder: write(folder / "adapter_config.json", **values)


def reshaped(folder: Path) -> None:
    cut = {key: t[:, :100] if "lora_A" in key else t for key, t in tensors(folder).items()}
    save_file({key: t.contiguous() for key, t in cut.items()}, folder / WEIGHTS)


REFUSED: dict[str, Case] = {
    "rank": ("lora: {r: 8}", lambda _: 0, "recipe.yaml:3: lora.r is 8, but the adapter {parent} "
             "has 4", "leave it out"),
    "targets": ("lora: {target_modules: [q_proj]}", lambda _: 0, "lora.target_modules is "
                "['q_proj'], but the adapter {parent} has ['down_proj', 'q_proj', 'v_proj']",
                "leave it out"),
    "a field of PEFT's own": ("lora: {use_rslora: true}", lambda _: 0,
                              "lora.use_rslora is True, but", "leave it out"),
    "dora": ("method: dora", lambda _: 0, "recipe.yaml:3: method is dora, but the adapter {parent} "
             "is LoRA without DoRA", "method: lora"),
    "start": ("lora: {init_lora_weights: pissa}", lambda _: 0, "lora.init_lora_weights has no "
              "effect: A and B are those of model.adapter", "leave it out"),
    "pissa": ("", configured(init_lora_weights="pissa"), "recipe.yaml:2: model.adapter: {parent} "
              "starts from pissa, which PEFT takes out of the base anew at each load",
              "lora merge {parent} OUT, and a new adapter on that model"),
    "of a newer PEFT": ("", configured(use_xlora_next=True), "{parent} sets use_xlora_next, which "
                        "the installed PEFT does not know", "pip install -U peft"),
    "alora": ("", configured(alora_invocation_tokens=[5]), "{parent} sets alora_invocation_tokens: "
              "an aLoRA can be trained but not merged", "train a new adapter"),
    "no lora": ("", configured(peft_type="IA3"), "{parent} holds a IA3 adapter", "use PEFT itself"),
    "task": ("", configured(task_type="SEQ_CLS"), "{parent} is of models that classify texts", "task: sequence"),
    "another size": ("", reshaped, "does not fit its base model: 6 tensors are of another size, the "
                     "first base_model.model.model.layers.0.mlp.down_proj.lora_A.weight: (4, 100), "
                     "where (4, 512) is wanted", "give the base it was trained on with "
                     "model.name_or_path"),
    "another rank": ("", configured(r=5), "are of another size", ""),
    "fewer tensors": ("", configured(target_modules=["q_proj"]), "the model has no place for", ""),
    "into it": ("output_dir: {parent}/more", lambda _: 0, "output_dir is in the adapter {parent}",
                "output_dir: runs/NAME"),
    "new tokens": ("model: {adapter: {parent}, add_tokens: [lighthouse]}", lambda _: 0,
                   "model.add_tokens: the adapter {parent} has no row for 'lighthouse'", "leave"),
    "one folder up": ("model: {adapter: {parent}/..}", lambda _: 0, "is not an adapter: it has no "
                      "adapter_config.json", "did you mean {parent}/../parent?"),
    "no base": ("model: {adapter: {parent}, name_or_path: auto}",
                configured(base_model_name_or_path=None), "model.adapter: {parent} does not name its "
                "base model", "--set model.name_or_path=MODEL"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_on_is_refused(
    write_recipe, parent, tmp_path: Path, capsys, name: str
) -> None:
    text, spoil, said, hint = REFUSED[name]
    folder = parent(**KINDS["plain"])
    spoil(folder)
    lines = text.replace("{parent}", str(folder))
    if not lines.startswith("model:"):
        lines = f"model: {{adapter: {folder}}}\n{lines}"
    with pytest.raises(LoraError) as caught:
        path = write_recipe(f"{lines}\n")
        recipe = load.load_recipe(path)
        try:
            check.show_check(recipe, 0, False)
        except LoraError as error:  # as the command line does
            raise error.with_message(recipe.add_place(error.message)) from error
    assert said.replace("{parent}", str(folder)) in caught.value.message
    assert hint.replace("{parent}", str(folder)) in (caught.value.hint or "")
    with pytest.raises(LoraError):
        train.train(load.load_recipe(path))
    assert not list((tmp_path / "run").glob("adapter*"))


def test_dora_is_not_taken_over_against_the_recipe(write_recipe, parent) -> None:
    folder = parent(**KINDS["dora"])
    for text, said in (
        ("lora: {use_dora: false}", "lora.use_dora is False, but the adapter .* has True"),
        ("method: qlora", "method is qlora, but the adapter .* is DoRA"),
    ):
        with pytest.raises(LoraError, match=said):
            onward(write_recipe, folder, f"{text}\n")


def test_another_base_is_refused_by_its_fingerprint(
    write_recipe, tiny: Path, tmp_path: Path
) -> None:
    first = train.train(load.load_recipe(write_recipe(f"output_dir: {tmp_path / 'a'}\n")))
    other = tmp_path / "other"
    shutil.copytree(tiny / "model", other)
    weights = {key: 1.01 * t for key, t in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoraError, match="is not the base that .* was trained on") as caught:
        onward(write_recipe, first, "", f"model.name_or_path={other}")
    assert "model.name_or_path gives the one" in caught.value.hint


def test_another_template_is_refused(write_recipe, tmp_path: Path) -> None:
    first = train.train(load.load_recipe(write_recipe(f"output_dir: {tmp_path / 'a'}\n")))
    with pytest.raises(LoraError, match="model.chat_template makes another chat template"):
        onward(write_recipe, first, "", "model.chat_template=chatml")
    with pytest.raises(LoraError, match="model.system_prompt makes another chat template"):
        onward(write_recipe, first, "", "model.system_prompt=Be brief.")
