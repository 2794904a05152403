"""Checkpoints: every damage is seen and the one before is taken; only our own are deleted; one
process owns a run.

Hermetic: the tiny model and its data, CPU. Alone: pytest tests/train/test_checkpoints.py
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_cli.common import lock
from lora_cli.common.errors import LoraError
from lora_cli.recipe import load
from lora_cli.train import checkpoints, objectives, random_state, run_folder
from lora_cli.train import run as train
from lora_cli.train.signals import Signals

STEPS = "training: {max_steps: 4, save_strategy: steps, save_steps: 1, save_total_limit: 3, logging_steps: 1}\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A run of four steps with the checkpoints of the last three; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\ndata: {{path: {tiny / 'train.jsonl'}, max_rows: 16}}\n"
        "training: {max_steps: 4, per_device_train_batch_size: 2, save_strategy: steps, save_steps: 1, "
        f"save_total_limit: 3, max_length: 64}}\noutput_dir: {folder / 'run'}\n"
    )
    train.train(load.load_recipe(path))
    return folder / "run"


def run_id(folder: Path) -> str:
    return str(json.loads((folder / "record.json").read_text())["id"])


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "missing": lambda path, other: path.unlink(),
    "empty": lambda path, other: path.write_bytes(b""),
    "truncated": lambda path, other: os.truncate(path, path.stat().st_size - 1),
    "halved": lambda path, other: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path, other: path.write_bytes(path.read_bytes() + b"\0"),
    "first bit": lambda path, other: flipped(path, 0),
    "a bit": lambda path, other: flipped(path, path.stat().st_size // 3),
    "last bit": lambda path, other: flipped(path, path.stat().st_size - 1),
    "of another step": lambda path, other: shutil.copy(other, path),
    "a link": lambda path, other: (path.unlink(), path.symlink_to(other)),
    "a folder": lambda path, other: (path.unlink(), path.mkdir()),
}


def test_every_damage_of_every_file_is_seen_and_the_one_before_is_taken(
    trained: Path, tmp_path: Path, capsys
) -> None:
    folder, run = tmp_path / "run", run_id(trained)
    shutil.copytree(trained, folder)
    names = sorted(path.name for path in (folder / "checkpoint-4").iterdir())
    needed = {
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.pt",
        "rng_state_0.json",
        "run_state.json",
    }
    assert needed < set(names)
    assert "training_args.bin" not in names
    seen = 0
    for name in names:
        for kind, damage in DAMAGES.items():
            before, target = (folder / f"checkpoint-{step}" / name for step in (3, 4))
            if kind == "of another step" and before.read_bytes() == target.read_bytes():
                continue  # the tokenizer's files are the same
            damage(target, before)
            found = checkpoints.find_newest(folder, run)
            assert found is not None and found.step == 3, (name, kind)
            said = capsys.readouterr().err
            assert said.startswith("  checkpoint-4 skipped: ") and said.count("\n") == 1, (
                name,
                kind,
                said,
            )
            shutil.rmtree(folder / "checkpoint-4")
            shutil.copytree(trained / "checkpoint-4", folder / "checkpoint-4")
            seen += 1
    assert seen > 100
    found = checkpoints.find_newest(folder, run)
    assert found is not None and found.step == 4


def test_no_flipped_bit_of_a_manifest_is_overlooked(trained: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "checkpoint-4", run_id(trained)
    shutil.copytree(trained / "checkpoint-4", folder)
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(0, len(whole), 5):
        flipped(manifest, at)
        assert isinstance(checkpoints.read_checkpoint(folder, run), checkpoints.Unusable), at
        manifest.write_bytes(whole)
    assert isinstance(checkpoints.read_checkpoint(folder, run), checkpoints.Checkpoint)


def test_folders_that_are_not_this_run_s_checkpoints_are_not_taken(
    trained: Path, tmp_path: Path, capsys
) -> None:
    folder, run = tmp_path / "run", run_id(trained)
    shutil.copytree(trained, folder)
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-5")
    (folder / "checkpoint-6").mkdir()
    (folder / "checkpoint-7").symlink_to(folder / "checkpoint-4")
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-8")
    (folder / "checkpoint-8" / "model.safetensors").write_bytes(b"what Trainer would prefer")
    other = json.loads((folder / "checkpoint-3" / "manifest.json").read_text())
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-9")
    (folder / "checkpoint-9" / "manifest.json").write_text(
        checkpoints.Manifest(run="another", step=9, files=other["files"]).to_text()
    )
    found = checkpoints.find_newest(folder, run)
    assert found is not None and found.folder.name == "checkpoint-4"
    assert capsys.readouterr().err.splitlines() == [
        "  checkpoint-9 skipped: it belongs to another run",
        "  checkpoint-8 skipped: it is the checkpoint of step 4 under another name",
        "  checkpoint-7 skipped: it is a link, which is not followed",
        "  checkpoint-6 skipped: it has no manifest: saving it was interrupted, or it is not ours",
        "  checkpoint-5 skipped: it is the checkpoint of step 3 under another name",
    ]


def test_a_whole_checkpoint_of_a_lost_best_model_is_not_taken(
    trained: Path, tmp_path: Path, capsys
) -> None:
    folder, run = tmp_path / "run", run_id(trained)
    shutil.copytree(trained, folder)
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best_global_step": 2}))
    (folder / "checkpoint-4" / "manifest.json").unlink()
    checkpoints._seal_folder(folder / "checkpoint-4", run, 4)
    found = checkpoints.find_newest(folder, run)
    assert found is not None and found.step == 4
    shutil.rmtree(folder / "checkpoint-2")
    found = checkpoints.find_newest(folder, run)
    assert found is not None and found.step == 3
    assert (
        "checkpoint-4 skipped: the best model so far, checkpoint-2, is missing "
        "(--set training.keep=last does without)"
    ) in capsys.readouterr().err
    found = checkpoints.find_newest(folder, run, keeps_best=False)
    assert found is not None and found.step == 4


def test_rotation_deletes_only_this_run_s_own(trained: Path, tmp_path: Path) -> None:
    folder, run = tmp_path / "run", run_id(trained)

    def left() -> list[str]:
        return sorted(path.name for path in folder.glob("checkpoint-*"))

    shutil.copytree(trained, folder)
    for name in ("checkpoint-1", "checkpoint-1000", "checkpoint-best"):
        (folder / name).mkdir()
    foreign = ["checkpoint-1", "checkpoint-1000", "checkpoint-best"]
    checkpoints.delete_old(folder, run, None, last=4, best=None)
    checkpoints.delete_old(folder, "another run", 1, last=4, best=None)
    assert left() == sorted([*foreign, "checkpoint-2", "checkpoint-3", "checkpoint-4"])
    checkpoints.delete_old(folder, run, 2, last=4, best=2)
    assert left() == sorted([*foreign, "checkpoint-2", "checkpoint-4"])
    (
        folder / "checkpoint-4" / "optimizer.pt"
    ).unlink()  # so that the run went on from an earlier one
    checkpoints.delete_old(folder, run, 1, last=2, best=None)
    assert left() == sorted([*foreign, "checkpoint-2"])


def test_the_last_step_is_that_of_the_newest_manifest_of_this_run(
    trained: Path, tmp_path: Path
) -> None:
    folder, run = tmp_path / "run", run_id(trained)
    shutil.copytree(trained, folder)
    (folder / "checkpoint-1000").mkdir()
    flipped(
        folder / "checkpoint-4" / "adapter_model.safetensors", 0
    )  # seen when it is read, to resume from it
    assert checkpoints.find_last_step(folder, run) == 4
    (folder / "checkpoint-4" / "manifest.json").unlink()
    assert checkpoints.find_last_step(folder, run) == 3
    assert checkpoints.find_last_step(folder, "another run") == 0
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    (folder / "checkpoint-3" / "manifest.json").unlink()
    checkpoints._seal_folder(folder / "checkpoint-3", run, 3)  # as with training.save_only_model
    assert checkpoints.find_last_step(folder, run) == 2


def test_generators_go_on_where_they_were() -> None:
    import random

    import numpy as np

    def drawn() -> list[float]:
        return [
            random.random(),
            random.gauss(0, 1),
            float(np.random.normal()),
            float(torch.rand(())),
        ]

    random.gauss(0, 1)  # leaves its second number for the next call
    np.random.normal()
    state = random_state.State.model_validate_json(random_state.capture_state().model_dump_json())
    first = drawn()
    assert drawn() != first
    random_state.restore_state(state)
    assert drawn() == first


def test_a_run_has_one_owner(trained: Path, tmp_path: Path, write_recipe) -> None:
    recipe = load.load_recipe(write_recipe())
    Path(recipe.output_dir).mkdir()
    (heard, told), (ended, end) = os.pipe(), os.pipe()
    owner = os.fork()
    if not owner:
        os.close(end)
        with lock.hold_folder(Path(recipe.output_dir)):
            if not os.fork():  # as a data loader's worker: its copy of the lock must not count
                os.write(told, b"x")
            os.read(ended, 1)  # until the test closes the other end
            os._exit(0)
    os.read(heard, 1)
    message = rf"is in use by process {owner} on {socket.gethostname()}"
    with pytest.raises(LoraError, match=message):
        train.train(recipe)
    with pytest.raises(LoraError, match=message):
        train.train(recipe, resume=True)
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    train.train(recipe)  # what a dead process held is no lock, though its child lives
    os.close(end)


def test_a_folder_of_others_is_not_touched(write_recipe, tmp_path: Path) -> None:
    recipe = load.load_recipe(write_recipe())
    folder = Path(recipe.output_dir)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(LoraError, match="already exists"):
            train.train(recipe, resume=resume)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    (folder / ".lock").write_text("host 1\n")  # what a kill at the very start leaves
    (folder / ".lora-1-1-012345-01234567.tmp").write_text("{")
    with pytest.raises(LoraError, match="holds no run to resume"):
        train.train(recipe, resume=True)
    assert train.train(recipe).is_dir()


def test_a_changed_recipe_is_refused_unless_it_may_change(
    write_recipe, tmp_path: Path, capsys
) -> None:
    path = write_recipe(STEPS)
    train.train(load.load_recipe(path))
    longer = ["training.max_steps=6"]
    edited = path.with_name("edited.yaml")
    edited.write_text(path.read_text().replace("max_steps: 4", "max_steps: 6"))
    with pytest.raises(
        LoraError, match=r"differs from the run in .*: training.max_steps 4 -> 6"
    ) as caught:
        train.train(load.load_recipe(edited), resume=True)
    assert caught.value.hint == "undo the change, or allow it: --allow-changes training.max_steps"
    with pytest.raises(LoraError, match="lora.r: a resumed run cannot change it"):
        train.train(load.load_recipe(path, ["lora.r=4"]), resume=True, allowed=["lora.r"])
    with pytest.raises(LoraError, match=r"run: lora.r 16 -> 4$") as caught:
        train.train(
            load.load_recipe(path, [*longer, "lora.r=4"]),
            resume=True,
            allowed=["training.max_steps"],
        )
    capsys.readouterr()
    train.train(load.load_recipe(path, longer), resume=True)
    assert "resuming from" in (said := capsys.readouterr().err) and "checkpoint-4" in said
    assert "had the learning rates of a cosine schedule of the number before" in said
    run = tmp_path / "run"
    written = json.loads((run / "record.json").read_text())
    assert (written["results"]["steps"], written["changed"]) == (6, ["training.max_steps 4 -> 6"])
    assert sorted(path.name for path in run.glob("adapter*")) == ["adapter", "adapter-4"]
    for most, *more in (("5",), ("-1", "training.num_train_epochs=0.01")):
        fewer = load.load_recipe(path, [f"training.max_steps={most}", *more])
        made = f"has made 6 steps already: training.max_steps 6 -> {most}$"
        with pytest.raises(LoraError, match=made):
            train.train(fewer, resume=True)
    assert json.loads((run / "record.json").read_text()) == written
    with pytest.raises(LoraError, match="is finished"):
        train.train(load.load_recipe(path, longer), resume=True)


def test_what_may_change_is_in_every_recipe() -> None:
    from lora_cli.recipe.keys import Data, Distributed, Training

    sections = {"training": Training, "data": Data, "distributed": Distributed}
    known = {f"{name}.{key}" for name, each in sections.items() for key in each.model_fields}
    assert set(run_folder.EXTENDING) <= known


def test_signals_are_noted_once_and_then_do_what_they_did() -> None:
    before = signal.default_int_handler
    inherited = signal.signal(
        signal.SIGINT, before
    )  # a shell's background jobs begin with SIGINT ignored
    signals = Signals()
    with signals.listen():
        os.kill(os.getpid(), signal.SIGUSR1)
        signals.agree()
        assert (signals.save, signals.stopping) == (True, None)
        os.kill(os.getpid(), signal.SIGINT)
        signals.agree()
        assert signals.stopping is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, inherited) is before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As nohup and a shell's background jobs ask for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals()
        with signals.listen():
            os.kill(os.getpid(), signal.SIGHUP)
        signals.agree()
        assert signals.stopping is None
    finally:
        signal.signal(signal.SIGHUP, before)


def take_signals() -> None:
    """Let a process begin with no signal ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def test_a_signal_saves_and_says_how_to_go_on(write_recipe, tmp_path: Path) -> None:
    """On the command line, in processes of their own."""
    path, started = write_recipe("training: {max_steps: 100000, logging_steps: 1}\n"), {}
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        folder = tmp_path / str(status)
        arguments = [
            sys.executable,
            "-m",
            "lora_cli",
            "train",
            str(path),
            "--set",
            f"output_dir={folder}",
        ]
        started[folder, number, status] = subprocess.Popen(
            arguments, stderr=subprocess.PIPE, text=True, preexec_fn=take_signals
        )
    for (folder, number, status), process in started.items():
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGUSR1)
            if line.startswith("SIGUSR1: saved checkpoint-"):
                process.send_signal(number)
        assert process.wait() == status
        saved = [int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")]
        assert len(saved) in (1, 2)  # one, where the second signal comes before the next step
        recipe = folder / "recipe.yaml"
        assert (
            f"stopped; from step {max(saved)} it goes on with: lora train {recipe} --resume\n"
            in said
        )
        assert json.loads((folder / "record.json").read_text())["status"] == "interrupted"
        reported = json.loads((folder / "report.json").read_text())["runs"][0]
        assert (reported["state"], reported["summary"]["steps"] >= max(saved)) == (
            "interrupted",
            True,
        )
    resolved = load.load_recipe(recipe, [f"training.max_steps={max(saved) + 1}"])
    train.train(resolved, resume=True, allowed=["training.max_steps"])


def test_allowed_changes_are_for_resuming(lora, write_recipe) -> None:
    done = lora("train", write_recipe(), "--allow-changes", "training.max_steps")
    assert (done.returncode, done.stderr) == (
        2,
        "error: --allow-changes is for a run that is resumed\n\nhint: add --resume\n",
    )


def test_the_best_model_is_kept_and_is_the_result_of_a_resumed_run_too(
    write_recipe, tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    """The first, as its evaluation is made to say. With one checkpoint kept, Trainer would delete
    others' folders."""
    text = (
        f"data: {{max_rows: 16, eval_path: {tiny / 'eval.jsonl'}, eval_split: 'train[:8]'}}\n"
        "training: {max_steps: 4, save_strategy: steps, save_steps: 1, eval_strategy: steps, eval_steps: 1, "
        "keep: best, save_total_limit: 1}\n"
    )
    evaluate = objectives.WatchedSFTTrainer.evaluate

    def worse(self, *args, **kwargs):
        return {**evaluate(self, *args, **kwargs), "eval_loss": float(self.state.global_step)}

    monkeypatch.setattr(objectives.WatchedSFTTrainer, "evaluate", worse)
    whole = train.train(load.load_recipe(write_recipe(f"{text}output_dir: {tmp_path / 'whole'}\n")))
    recipe = load.load_recipe(write_recipe(f"{text}output_dir: {tmp_path / 'stopped'}\n"))
    inner = objectives.WatchedSFTTrainer.training_step

    def third(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(objectives.WatchedSFTTrainer, "training_step", third)
        with pytest.raises(SystemExit):
            train.train(recipe)
    foreign = tmp_path / "stopped" / "checkpoint-77"
    foreign.mkdir()
    resumed = train.train(recipe, resume=True)
    best = json.loads((tmp_path / "stopped" / "checkpoint-4" / "trainer_state.json").read_text())[
        "best_global_step"
    ]
    assert best == 1
    names = {"checkpoint-4", "checkpoint-1"}
    assert {path.name for path in tmp_path.glob("stopped/checkpoint-*")} == {
        *names,
        "checkpoint-77",
    }
    for folder in (whole, resumed):
        weights = folder / "adapter_model.safetensors"
        kept = folder.parent / f"checkpoint-{best}" / "adapter_model.safetensors"
        assert weights.read_bytes() == kept.read_bytes() == (whole / weights.name).read_bytes()
