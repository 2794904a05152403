"""The device that models train and answer on, of machines that are not here.

Hermetic: torch is told what there is. Alone: pytest tests/common/test_devices.py
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments

from lora_cli.common import devices
from lora_cli.models import Base
from lora_cli.plan import auto, hardware
from lora_cli.plan.auto_choices import Situation, choose_dtype
from lora_cli.recipe import load, upstream
from lora_cli.train import adapted_base, random_state, run
from tests.cards import pretend


def test_the_accelerator_that_is_here_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", 1)
    assert devices.find_device() == torch.device("cuda:1")
    assert devices.find_device(in_4bit=True) == torch.device("cuda:1")
    assert devices.find_device(use_cpu=True) == torch.device("cpu")
    pretend(monkeypatch, "xpu")
    assert devices.find_device() == torch.device("xpu:0")
    pretend(monkeypatch, "mps")
    assert devices.find_device() == torch.device("mps")
    assert devices.find_device(in_4bit=True) == torch.device("cpu")
    pretend(monkeypatch, None)
    assert devices.find_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("method", "more", "device"),
    [
        ("lora", "", "cuda:0"),
        ("dora", "", "cuda:0"),
        ("qlora", "", "cuda:0"),
        ("lora", ", use_cpu: true", None),
        ("qlora", ", use_cpu: true", None),
    ],
)
def test_every_method_s_base_is_loaded_where_it_trains(
    write_recipe, monkeypatch: pytest.MonkeyPatch, method: str, more: str, device: str | None
) -> None:
    pretend(monkeypatch, "cuda")
    recipe = load.load_recipe(
        write_recipe(
            f"method: {method}\ntraining: {{max_steps: 1{more}}}\nmodel: {{dtype: float32}}\n"
        )
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    chip = hardware.Hardware("cuda", "H100", 80 << 30, (9, 0), bf16=True)
    recipe, _ = auto.settle(recipe, Base.of_recipe(recipe).config, chip)

    class Loaded(Exception):
        """Instead of loading."""

    def load_nothing(*given: object, **named: object) -> None:
        raise Loaded(named.get("device_map"))

    base = Base.of_recipe(recipe)
    monkeypatch.setattr(base.task.find_auto_class(base.config), "from_pretrained", load_nothing)
    with pytest.raises(Loaded) as told:
        adapted_base.load_recipe_base(recipe, base)
    wanted = {"": torch.device(device)} if device else None
    assert told.value.args[0] == wanted


def test_what_is_trained_whole_is_float32_beside_a_float16_base(write_recipe) -> None:
    # a loss scaler refuses gradients of float16
    recipe = load.load_recipe(
        write_recipe("model: {dtype: float16}\nlora: {modules_to_save: [lm_head]}\n")
    )
    base = Base.of_recipe(recipe)
    recipe, _ = auto.settle(recipe, base.config, hardware.parse_gpu("T4"))
    network = adapted_base.load_recipe_base(recipe, base)
    inputs = SimpleNamespace(reader=base.load_tokenizer(), new_ids=[], parent=None)
    inputs.train_rows = SimpleNamespace(rows=Dataset.from_list([]))
    adapted = adapted_base.attach_adapter(
        recipe, base, network, SimpleNamespace(folder=None), inputs
    )
    trained = {each.dtype for each in adapted.parameters() if each.requires_grad}
    assert trained == {torch.float32}
    assert network.dtype == torch.float16


def test_two_visible_gpus_are_no_other_run(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers would multiply batch and loss by their number
    begin = TrainingArguments.__post_init__

    def begin_with_two(self: TrainingArguments) -> None:
        begin(self)
        self._n_gpu = 2

    losses = []
    for name in ("one", "two"):
        run.train(
            load.load_recipe(
                write_recipe(
                    f"trainer: trainer\ntraining: {{logging_steps: 1}}\noutput_dir: {tmp_path / name}\n"
                )
            )
        )
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line).get("loss") for line in lines])
        monkeypatch.setattr(TrainingArguments, "__post_init__", begin_with_two)
    assert losses[0] == losses[1]
    recipe, _ = auto.settle(load.load_recipe(write_recipe("trainer: sft\n")))
    assert upstream.build_training_arguments(recipe).n_gpu == 1


def test_a_card_without_bfloat16_trains_in_float16() -> None:
    found = {
        name: choose_dtype(Situation(None, hardware.parse_gpu(name), None))[0]
        for name in ("T4", "V100", "L4", "24GB")
    }
    assert found == {"T4": "float16", "V100": "float16", "L4": "bfloat16", "24GB": "bfloat16"}


def test_a_run_goes_on_on_another_kind_of_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_state.capture_state()
    random_state.restore_state(state)
    assert "goes on on" not in capsys.readouterr().err
    pretend(monkeypatch, "cuda")
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    for _ in range(2):
        random_state.restore_state(state)
    assert seeds == [torch.initial_seed()] * 2
    assert capsys.readouterr().err.count("was on cpu and goes on on cuda") == 1
    pretend(monkeypatch, None)
    random_state.restore_state(state.model_copy(update={"torch": {**state.torch, "cuda": ""}}))
    assert "was on cpu and cuda and goes on on cpu" in capsys.readouterr().err


def test_the_memory_of_a_gpu_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "get_device_name": "H100",
        "mem_get_info": (60 << 30, 80 << 30),
        "memory_reserved": 4 << 30,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True,
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    assert hardware.detect_device(torch.device("cuda:0")).memory == 64 << 30
