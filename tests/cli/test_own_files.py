"""Files that lora reads back, each field of each changed in every way: a refusal that names the
file, or the value does not matter.

Hermetic: the tiny model. Alone: pytest tests/cli/test_own_files.py; the verbs themselves, on every
field, are tests/torture/own_files.py, of which a part is here as slow.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_cli.common import LoraError
from lora_cli.merge.merge import MergeRecord, merge
from lora_cli.models import TRAINED, TrainingRecord, measure_trained
from lora_cli.recipe import load
from lora_cli.train import run
from lora_cli.train.checkpoints import Manifest
from lora_cli.train.random_state import State
from lora_cli.train.saved_state import RunState, SavedTrainerState
from tests.torture import own_files

ROOT = Path(__file__).parent.parent.parent
READERS: dict[str, Callable[[Path], Any]] = {
    "run/record.json": TrainingRecord.read,
    "run/adapter/lora_record.json": TrainingRecord.read,
    "run/checkpoint-2/manifest.json": Manifest.read,
    "run/checkpoint-2/trainer_state.json": SavedTrainerState.read,
    "run/checkpoint-2/run_state.json": RunState.read,
    "run/checkpoint-2/rng_state_0.json": State.read,
    "merged/lora_record.json": MergeRecord.read,
}
LARGE = ("deep", "20 MB")
REFUSED = (  # shapes that no field takes
    "a long number",
    "half a character",
    "deep",
    "20 MB",
    "2^80",
)
NEVER = {
    "run/record.json": {
        ("base", "commit"): ("outside", "a text", "true", "a number"),
        ("recipe", "model", "dtype"): ("a text", "a list", "true", "outside"),
        ("status",): ("a text", "null", "missing"),
        ("started",): ("a text", "missing", "a number"),
        ("data", "stop_token_ids", 0): ("true", "negative", "a fraction", "NaN", "huge"),
        ("choices", 0): ("a mapping", "a text", "null"),
        ("results", "steps"): ("negative", "true", "a text", "missing"),
        ("device", "kind"): ("outside", "a number"),
        ("base", "fingerprint", "tensors"): ("a list", "a mapping"),
    },
    "run/checkpoint-2/rng_state_0.json": {
        ("numpy", 2): ("negative", "huge", "true"),
        ("python", 1, 0): ("NaN", "negative", "true"),
        ("torch", "cpu"): ("a text", "missing", "outside"),
    },
    "run/checkpoint-2/run_state.json": {
        ("watch", "lines"): ("negative", "a fraction", "true"),
        ("loss_since_log",): ("NaN", "a text", "missing"),
        ("epoch_rng", "numpy", 0): ("a text", "null"),
    },
    "run/checkpoint-2/trainer_state.json": {("global_step",): ("negative", "true", "missing")},
    "merged/lora_record.json": {("base",): ("null", "a mapping"), ("parent",): ("a list",)},
}  # fmt: skip


@pytest.fixture
def valid(write_recipe, tmp_path: Path) -> Path:
    """A run with a checkpoint and an adapter, and the model that this is merged into."""
    training = (
        "{max_steps: 2, save_strategy: steps, save_steps: 2, logging_steps: 1, max_length: 64}"
    )
    text = f"lora: {{r: 2}}\ntraining: {training}\noutput_dir: {tmp_path / 'run'}\n"
    merge(run.train(load.load_recipe(write_recipe(text))), tmp_path / "merged")
    return tmp_path


def test_no_field_of_a_file_of_ours_is_believed(valid: Path) -> None:
    ends = Counter[str]()
    for name, read in READERS.items():
        file = valid / name
        text = file.read_text()
        data, seen = json.loads(text), set()
        read(file)
        for keys in own_files.walk_fields(data):
            for shape in own_files.SHAPES:
                if shape in LARGE and len(keys) != 1:
                    continue
                file.write_text(own_files.change(data, keys, shape) or "")
                refused = True
                try:
                    json.dumps(read(file).to_data()).encode()
                    refused = False
                except LoraError as error:
                    assert str(file) in error.message, (name, keys, shape, error.message)
                    assert error.hint
                    assert len(error.message) < 600
                ends[f"refused: {refused}"] += 1
                if shape in REFUSED:
                    assert refused or shape == "2^80", (name, keys, shape)
                if shape in NEVER.get(name, {}).get(keys, ()):
                    assert refused, (name, keys, shape)
                    seen.add(keys)
        assert seen == set(NEVER.get(name, {}))
        file.write_text(text)
    assert min(ends.values()) > 500, ends
    assert ends.total() > 3000


PROBES: dict[str, dict[str, torch.Tensor]] = {
    "three probes": {"logits": torch.zeros(3, 8)},
    "five probes": {"logits": torch.zeros(5, 8)},
    "whole numbers": {"logits": torch.zeros(4, 8, dtype=torch.int64)},
    "in half": {"logits": torch.zeros(4, 8, dtype=torch.float16)},
    "without logits": {"other": torch.zeros(4, 8)},
    "one row": {"logits": torch.zeros(8)},
    "three dimensions": {"logits": torch.zeros(4, 8, 1)},
    "not finite": {"logits": torch.full((4, 8), float("nan"))},
}


@pytest.mark.parametrize("what", PROBES)
def test_probes_that_training_did_not_leave_are_refused(what: str, tmp_path: Path) -> None:
    given = [torch.zeros(3, 8)] * 4
    save_file({"logits": torch.zeros(4, 8)}, tmp_path / TRAINED)
    assert measure_trained(tmp_path, given) is not None
    save_file(PROBES[what], tmp_path / TRAINED)
    with pytest.raises(LoraError, match=rf"{TRAINED} is damaged or not ours"):
        measure_trained(tmp_path, given)


@pytest.mark.slow
def test_each_verb_refuses_or_succeeds_and_leaves_a_refused_run_as_it_was(tiny: Path) -> None:
    command = [sys.executable, "-m", "tests.torture.own_files", "--only", "25"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    counts = [line for line in done.stdout.splitlines() if line.startswith("== ")]
    assert len(counts) == len(own_files.FILES), done.stderr
    assert all(" 0 of " in line for line in counts), done.stdout
