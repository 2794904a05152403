"""What ends a run from within: numbers that are none, memory that runs out, a disk that is full.

Each leaves what was saved before whole, and says in one message what to do. Hermetic: the tiny
model and its data, CPU; exhaustion is injected (`tests/torture/disk.py` fills a real disk). Alone:
pytest tests/train/test_failures.py
"""

from __future__ import annotations

import errno
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from lora_cli.common import files
from lora_cli.common.errors import LoraError
from lora_cli.data.load import load_rows
from lora_cli.distributed.place import Nodes
from lora_cli.models.tokenizer import load_tokenizer
from lora_cli.recipe import Recipe, load
from lora_cli.speed import step_packing
from lora_cli.train import checkpoints, disk_space, out_of_memory, progress
from lora_cli.train import run as train
from lora_cli.train.objectives import WatchedSFTTrainer, WatchedTrainer
from lora_cli.train.progress import Watch
from lora_cli.train.resume import Resumable
from lora_cli.train.step_numbers import NonFiniteError
from tests.units import STEADY_ADAM, assert_same_training

SAVING = "save_strategy: steps, save_steps: 1"


def weights(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / "adapter_model.safetensors")


def broken_base(tiny: Path, folder: Path, value: float) -> Path:
    """The tiny model with one weight that is no number."""
    shutil.copytree(tiny / "model", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_base_with_a_weight_that_is_no_number_is_refused(
    write_recipe, tiny: Path, tmp_path: Path, method: str, value: float
) -> None:
    base = broken_base(tiny, tmp_path / "broken", value)
    path = write_recipe(f"method: {method}\nmodel: {{name_or_path: {base}}}\n")
    with pytest.raises(
        LoraError, match=r"in 1 tensor, the first model.layers.0.mlp.up_proj.weight"
    ):
        train.train(load.load_recipe(path))
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_single_quantised_base_too(write_recipe, tiny: Path, tmp_path: Path) -> None:
    base = broken_base(tiny, tmp_path / "broken", float("nan"))
    path = write_recipe(
        f"method: qlora\nmodel: {{name_or_path: {base}}}\nquantization: {{bnb_4bit_use_double_quant: false}}\n"
    )
    with pytest.raises(LoraError, match="the first model.layers.0.mlp.up_proj.weight"):
        train.train(load.load_recipe(path))


def spoil(
    patch: pytest.MonkeyPatch, step: int, change: Callable[[Any, torch.Tensor], torch.Tensor]
) -> None:
    """In this step, `change(trainer, loss)` is what the forward pass gave."""
    for kind in (WatchedSFTTrainer, WatchedTrainer):
        inner = kind.compute_loss

        def compute_loss(self, *args, inner=inner, **kwargs):
            loss = inner(self, *args, **kwargs)
            return (
                change(self, loss)
                if self.state.global_step + 1 == step and self.model.training
                else loss
            )

        patch.setattr(kind, "compute_loss", compute_loss)


class Collated(list):
    """The rows of each batch, as the collator got them."""

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        inner = DataCollatorForLanguageModeling.__call__

        def called(collator, rows, *args, **kwargs):
            self.append([tuple(row["input_ids"]) for row in rows])
            return inner(collator, rows, *args, **kwargs)

        patch.setattr(DataCollatorForLanguageModeling, "__call__", called)


@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_a_loss_that_is_no_number_stops_the_run_and_names_step_rows_and_checkpoint(
    write_recipe, tmp_path: Path, monkeypatch, order: str
) -> None:
    """The rows are those that the collator got for that step; the run had been resumed before."""
    path = write_recipe(
        f"trainer: trainer\ndata: {{max_rows: 24}}\ntraining: {{packing: false, {SAVING}, max_steps: 9, "
        f"gradient_accumulation_steps: 2, train_sampling_strategy: {order}}}\n"
    )
    recipe, collated = load.load_recipe(path), Collated()
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_end", _interrupt_at(4))
        with pytest.raises(KeyboardInterrupt):
            train.train(recipe)
    with monkeypatch.context() as patch:
        collated.watch(patch)
        spoil(patch, 5, lambda trainer, loss: loss * float("nan"))
        with pytest.raises(NonFiniteError) as caught:
            train.train(recipe, resume=True)
    said = caught.value.message
    assert said.startswith("stopped at step 5: the loss is nan, on rows ")
    assert said.endswith(
        "of the prepared data (counted from 0); checkpoint-4 is the last good one; nothing was saved from this step"
    ), said
    named = [int(word) for word in said.partition("on rows ")[2].partition(" of")[0].split(", ")]
    rows = load_rows(recipe, load_tokenizer(recipe.model.name_or_path))[0].rows
    batches = [batch for batch in collated if len(batch) == 4]
    assert len(named) == 8
    wanted = {tuple(rows[place]["input_ids"]) for place in named}
    assert any(
        set(map(tuple, first + second)) == wanted for first, second in itertools.pairwise(batches)
    )
    assert not (tmp_path / "run" / "adapter").exists()
    train.train(recipe, resume=True)  # nothing of that step was kept


def _interrupt_at(step: int) -> Callable[..., None]:
    ended = Watch.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == step + 1:
            raise KeyboardInterrupt

    return interrupted


def test_a_gradient_that_is_no_number_stops_the_run(write_recipe, monkeypatch) -> None:
    losses: list[float] = []

    def endless(trainer: Any, loss: torch.Tensor) -> torch.Tensor:
        losses.append(loss.item())
        return (
            loss
            + 0 * next(iter(trainer.model.parameters())).sum()
            + _Overflow.apply(loss)
            - loss.detach()
        )

    spoil(monkeypatch, 2, endless)
    with pytest.raises(
        NonFiniteError, match=r"stopped at step 2: a gradient is not finite \(loss "
    ) as caught:
        train.train(load.load_recipe(write_recipe()))
    told = float(caught.value.message.partition("(loss ")[2].partition(")")[0])
    assert told == pytest.approx(sum(losses), rel=1e-3)


@pytest.mark.parametrize("late", [False, True])
def test_where_an_optimiser_leaves_a_step_out_its_numbers_may_be_read_later(
    write_recipe, monkeypatch, tmp_path: Path, late: bool
) -> None:
    """As on a GPU, whose optimiser is torch's own there; it is the same run."""
    if late:
        monkeypatch.setattr(progress, "find_leaving_out", lambda optimizer: optimizer.optimizer)
    path = write_recipe(
        "training: {max_steps: 6, save_strategy: 'no', per_device_train_batch_size: 4}\n"
    )
    recipe, seen, before = load.load_recipe(path), [], {}

    def elsewhere(name: str) -> Recipe:
        return recipe.model_copy(update={"output_dir": str(tmp_path / name)})

    stepped = Watch.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        stepped(self, args, state, control, **kwargs)
        if state.global_step in (2, 3):
            copied = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters()}
            before[state.global_step] = {n: p for n, p in copied.items() if "lora_" in n}
        seen.append((state.global_step, self.unread is not None))

    monkeypatch.setattr(Watch, "on_step_end", on_step_end)
    changes = (lambda _, loss: loss * float("nan"), lambda _, loss: loss + _Overflow.apply(loss))
    for number, change in enumerate(changes):
        seen.clear()
        before.clear()
        with monkeypatch.context() as patch:
            spoil(patch, 3, change)
            with pytest.raises(NonFiniteError) as caught:
                train.train(elsewhere(f"spoilt-{number}"))
        assert caught.value.message.startswith("stopped at step 3: ")
        assert ", on rows " in caught.value.message
        assert seen[1:] == [(1, False), (2, late), *([(3, True)] if late else [])]
        if late:  # the step was left out; the first that was seen is the trial's
            assert all(torch.equal(before[3][name], tensor) for name, tensor in before[2].items())
    folder = train.train(recipe)
    monkeypatch.undo()
    again = weights(train.train(elsewhere("again")))
    assert all(torch.equal(again[name], tensor) for name, tensor in weights(folder).items())


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, above: torch.Tensor) -> torch.Tensor:
        return above * float("inf")


def test_a_loss_above_the_recipe_s_limit_stops_the_run(
    write_recipe, tmp_path: Path, monkeypatch
) -> None:
    spoil(monkeypatch, 3, lambda trainer, loss: loss + 1000)
    with pytest.raises(
        NonFiniteError,
        match=r"step 3: the loss is \d+(\.\d+)?, above training.stop_on_loss_above: 900, on r",
    ):
        train.train(load.load_recipe(write_recipe("training: {stop_on_loss_above: 900}\n")))


def exhaust(patch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Let a forward pass and every one of its size run out of memory, from this call on.

    It is one that can be halved: of more than the 32 tokens that the longest row has at most.
    """
    calls = itertools.count(1)
    sizes: list[int] = []
    for kind in (WatchedSFTTrainer, WatchedTrainer):
        inner = kind.compute_loss

        def compute_loss(self, network, inputs, *args, inner=inner, **kwargs):
            size = inputs["input_ids"].numel()
            if self.model.training:
                if not sizes and next(calls) >= call and size > 32:
                    sizes.append(size)
                if sizes and size >= sizes[0]:
                    raise error
            return inner(self, network, inputs, *args, **kwargs)

        patch.setattr(kind, "compute_loss", compute_loss)


HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory: you tried to"
)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), MemoryError(), HOST],
)
@pytest.mark.parametrize(
    ("packing", "way"),
    [
        ("step", "sequences of 64 tokens: .* training.on_oom=reduce goes on with sequences of 3"),
        (
            "false",
            "batches of 4, 1 per step: .*_train_batch_size=2 --set training.gradient_accumulation_steps=2",
        ),
    ],
)
def test_out_of_memory_is_one_message_with_what_would_fit(
    write_recipe, monkeypatch, error: BaseException, packing: str, way: str
) -> None:
    exhaust(monkeypatch, 2, error)
    with pytest.raises(LoraError) as caught:
        train.train(
            load.load_recipe(write_recipe(f"training: {{packing: {packing}, max_length: 64}}\n"))
        )
    said = f"{caught.value.message} {caught.value.hint}"
    assert re.search(way, said), said
    assert "\n" not in said


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "HIP error: out of memory",
        "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1 MB)",
    ],
)
def test_memory_runs_out_in_other_words(said: str) -> None:
    assert out_of_memory.is_out_of_memory(RuntimeError(said))
    assert not out_of_memory.is_out_of_memory(RuntimeError("CUDA error: device-side assert"))


def step_with(watch: Watch, loss: float, norm: float) -> None:
    """Let a watch see a step of this loss and gradient."""
    watch.step_loss, watch.gradient_norm = loss, norm
    watch.on_pre_optimizer_step(
        SimpleNamespace(learning_rate=1e-3, fp16=True), SimpleNamespace(global_step=0), None,
        model=torch.nn.Linear(1, 1), optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]),
    )  # fmt: skip


def test_a_step_that_a_loss_scaler_skips_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch(tmp_path, None, None, lambda step: "")
    infinite = float("inf")
    with pytest.raises(NonFiniteError, match="a gradient is not finite"):
        step_with(watch, 1.0, infinite)
    watch.has_scaler, watch.skipped = True, 0
    # torch's own: starts at 2^16, halves at each overflow
    scaler = torch.amp.GradScaler("cpu")
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for overflows in (True, True, False, True):
        scaler.scale(weight.sum()).backward()
        weight.grad *= infinite if overflows else 1
        scaler.unscale_(optimizer)
        step_with(watch, 1.0, float(weight.grad.norm()))
        before = weight.item()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert (weight.item() == before) is overflows
    assert (scaler.get_scale(), watch.skipped) == (2.0**13, 1)
    with pytest.raises(NonFiniteError, match="a gradient is not finite"):
        for _ in range(30):
            step_with(watch, 1.0, infinite)
    watch.skipped = 0
    with pytest.raises(NonFiniteError, match="the loss is inf") as stopped:
        step_with(watch, infinite, 1.0)
    assert "--set model.dtype=float32, since some models overflow float16" in stopped.value.hint
    watch.overflowed, watch.untouched = 2, set()
    with pytest.raises(NonFiniteError, match="each of the 2 steps overflowed float16 and"):
        watch.on_train_end(None, SimpleNamespace(global_step=2), None)
    watch.on_train_end(None, SimpleNamespace(global_step=3), None)
    assert "2 of 3 steps overflowed float16, and were skipped" in capsys.readouterr().err


@pytest.mark.parametrize(("trainer", "packing"), [("sft", "step"), ("trainer", "false")])
def test_memory_that_runs_out_in_the_first_step_gives_the_run_with_smaller_pieces_bit_for_bit(
    write_recipe, tmp_path: Path, monkeypatch, trainer: str, packing: str
) -> None:
    """With dropout too: the numbers are drawn as in the run that began with them."""
    common = (
        f"trainer: {trainer}\nlora: {{lora_dropout: 0.1}}\nmodel: {{dtype: bfloat16}}\n"
        f"training: {{packing: {packing}, max_length: 64, {SAVING}, on_oom: reduce"
    )
    path = write_recipe(f"{common}}}\noutput_dir: {tmp_path / 'reduced'}\n")
    with monkeypatch.context() as patch:
        exhaust(patch, 1, MemoryError())
        reduced = train.train(load.load_recipe(path))
    [entry] = json.loads((tmp_path / "reduced" / "record.json").read_text())["reduced"]
    assert entry["step"] == 0
    small = f"{common}, per_device_train_batch_size: 2, gradient_accumulation_steps: 2}}\n"
    if packing == "step":
        small = f"{common}}}\n"
        monkeypatch.setattr(step_packing, "SEQUENCE", entry["pieces"]["sequence"])
    from_the_start = train.train(
        load.load_recipe(write_recipe(f"{small}output_dir: {tmp_path / 'small'}\n"))
    )
    first, second = weights(reduced), weights(from_the_start)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("packing", ["step", "false"])
def test_memory_that_runs_out_later_changes_rounding_only(
    write_recipe, tmp_path: Path, monkeypatch, packing: str
) -> None:
    """In the third step, inside an epoch; the first two steps are not made again, and a later
    resumption keeps it."""
    text = (
        f"training: {{packing: {packing}, max_length: 64, max_steps: 5, on_oom: reduce, "
        f"{STEADY_ADAM}}}\n"
    )
    whole = train.train(load.load_recipe(write_recipe(f"{text}output_dir: {tmp_path / 'whole'}\n")))
    recipe = load.load_recipe(write_recipe(f"{text}output_dir: {tmp_path / 'reduced'}\n"))
    with monkeypatch.context() as patch:
        exhaust(patch, 6 if packing == "step" else 3, MemoryError())
        reduced = train.train(recipe)
    run = json.loads((tmp_path / "reduced" / "record.json").read_text())
    assert run["reduced"][0]["step"] >= 1
    assert run["results"]["steps"] == 5
    assert_same_training(weights(reduced), weights(whole))


STAGES = {
    "the adapter": (PeftModel, "save_pretrained"),
    "the optimiser": (torch, "save"),
    "generators": (Resumable, "_save_rng_state"),
    "trainer_state.json": (checkpoints, "_seal_folder"),
    "a file's flush": (checkpoints, "_flush"),
    "the manifest": (checkpoints.Manifest, "to_text"),
    "the name": (Path, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(
    write_recipe, tmp_path: Path, monkeypatch, stage: str
) -> None:
    text = f"training: {{{SAVING}}}\n"
    recipe = load.load_recipe(write_recipe(f"{text}output_dir: {tmp_path / 'run'}\n"))
    owner, name = STAGES[stage]
    inner, armed = getattr(owner, name), []

    def full(*args, **kwargs):
        if armed:
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(*args, **kwargs)

    save = Resumable._save_checkpoint

    def second(self, *args):
        if self.state.global_step == 2:
            armed.append(True)
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        patch.setattr(Resumable, "_save_checkpoint", second)
        with pytest.raises(LoraError, match=r"the disk is full: .* MB are missing") as caught:
            train.train(recipe)
    assert (
        caught.value.hint
        == f"make room, then: lora train {tmp_path / 'run' / 'recipe.yaml'} --resume"
    )
    assert sorted(path.name for path in (tmp_path / "run").glob("*checkpoint*")) == ["checkpoint-1"]
    assert not list((tmp_path / "run").glob("*.tmp"))
    if stage == "the name":
        train.train(recipe, resume=True)


def test_a_disk_too_small_is_told_before_the_run(write_recipe, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        disk_space.shutil, "disk_usage", lambda path: usage._replace(free=3_000_000)
    )
    with pytest.raises(
        LoraError, match=r"the run needs about .* MB in .* \(3 checkpoints of .*, 3.0 MB are free, "
    ):
        train.train(load.load_recipe(write_recipe(f"training: {{{SAVING}}}\n")))


def test_what_several_machines_prepare_makes_no_folder_that_another_may_be_looking_at(
    write_recipe, monkeypatch
) -> None:
    recipe = load.load_recipe(write_recipe(f"training: {{{SAVING}}}\n"))
    measured, inner = [], disk_space.refuse_too_little
    monkeypatch.setattr(
        disk_space,
        "refuse_too_little",
        lambda *given: measured.append(given[0].exists()) or inner(*given),
    )
    train.prepare(recipe, False, [], Nodes(2))
    assert measured == [False]
    with pytest.raises(LoraError, match="the disk is too small"):
        disk_space.refuse_too_little(Path(recipe.output_dir), disk_space.Need(2**60, 0, 0))


@pytest.mark.parametrize("more", ["", "lora: {r: 64}", "training: {optim: adamw_torch}"])
def test_the_estimate_is_near_what_is_written(
    write_recipe, tmp_path: Path, monkeypatch, more: str
) -> None:
    found: list[disk_space.Need] = []
    inner = disk_space.estimate_need
    monkeypatch.setattr(
        disk_space, "estimate_need", lambda *given: found.append(inner(*given)) or found[-1]
    )
    text = f"training: {{{SAVING}, max_steps: 2}}\n" if not more.startswith("training") else ""
    text = text or more.replace("}", f", {SAVING}, max_steps: 2}}")
    train.train(
        load.load_recipe(write_recipe(f"{text}\n{'' if more.startswith('training') else more}\n"))
    )
    saved = checkpoints.find_newest(
        tmp_path / "run", json.loads((tmp_path / "run" / "record.json").read_text())["id"]
    )
    assert saved is not None
    assert saved.size <= found[0].checkpoint <= 2 * saved.size + 2**21


def test_a_file_that_could_not_be_written_is_as_it_was(tmp_path: Path, monkeypatch) -> None:
    files.write_text(tmp_path / "a.json", "before")

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(tmp_path / "a.json", "after")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.json", "before")]
