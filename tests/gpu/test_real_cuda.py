"""Training on a real GPU: each method's steps, merge and resumed run. Skipped where there is none;
what needs none is in test_fake_cuda.py, and `make gpu` measures more.

Alone: pytest -m gpu
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cli.common import ui
from lora_cli.evaluate import verify
from lora_cli.merge import merge
from lora_cli.models import read_adapter
from lora_cli.recipe import load
from lora_cli.train import run as train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no NVIDIA GPU here"),
]
STEPS = "max_steps: 6, logging_steps: 1, learning_rate: 1.0e-3"
METHODS = {
    "lora": "method: lora",
    "lora, dropout": "method: lora\nlora: {lora_dropout: 0.05}",
    "dora": "method: dora",
    "qlora": "method: qlora",
    "qdora": "method: qdora",
    "float16": "method: lora\nmodel: {dtype: float16}",
}


def read_losses(folder: Path) -> list[float]:
    """The loss of each step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def run(write_recipe, folder: Path, text: str, more: str = "") -> Path:
    """Train into a folder; return it."""
    written = f"output_dir: {folder}\n{text}\ntraining: {{{STEPS}{more}}}\n"
    train.train(load.load_recipe(write_recipe(written)))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_the_gpu_as_on_the_processor_and_merges(
    write_recipe, tmp_path: Path, method: str
) -> None:
    on_gpu = run(write_recipe, tmp_path / "gpu", METHODS[method])
    text = METHODS["lora"] if method == "float16" else METHODS[method]
    on_cpu = run(write_recipe, tmp_path / "cpu", text, ", use_cpu: true")
    # the first loss is the base's, whatever dropout draws
    assert read_losses(on_gpu)[0] == pytest.approx(read_losses(on_cpu)[0], rel=0.05)
    assert len(read_losses(on_gpu)) == 6
    merge.merge_adapter(read_adapter(on_gpu / "adapter", None), tmp_path / "merged")
    verify.verify(str(on_gpu / "adapter"), str(tmp_path / "merged"), None)


def test_rows_attend_by_themselves_in_one_kernel(write_recipe, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash attention needs a GPU of capability 8.0")
    folder = run(write_recipe, tmp_path / "run", "method: lora\nmodel: {dtype: bfloat16}")
    record = json.loads((folder / "record.json").read_text())
    chosen = {choice["name"]: choice["value"] for choice in record["choices"]}
    assert (chosen["model.attn_implementation"], chosen["training.packing"]) == ("varlen", "step")


def test_an_interrupted_run_goes_on_as_the_same_to_rounding(
    write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = ", save_strategy: steps, save_steps: 3"
    whole = run(write_recipe, tmp_path / "whole", METHODS["lora"], saving)
    written = f"output_dir: {tmp_path / 'cut'}\nmethod: lora\ntraining: {{{STEPS}{saving}}}\n"
    recipe = load.load_recipe(write_recipe(written))
    with monkeypatch.context() as patch:
        patch.setattr(ui.Progress, "update", _interrupt_at(4))
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe)
    train.train(recipe, resume=True)
    one, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors")
        for folder in (whole, tmp_path / "cut")
    )
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-4, msg=name)


def _interrupt_at(step: int):
    def update(progress: ui.Progress, first: str, *_: str, **__: bool) -> None:
        if first.startswith(f"step {step}/"):
            raise KeyboardInterrupt

    return update
