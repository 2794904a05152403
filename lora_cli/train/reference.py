"""How likely each answer is before the first step: what a model that prefers is held against.

The model is asked as training starts it, with its adapter: a new one that changes nothing, one that
has moved a part of the base into itself, or `model.adapter`. So no second model is held, and a step
costs what it costs without a reference. What comes out is kept in the cache, under a hash of the
base, the adapter, the rows and all else that it hangs on.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora_cli import __version__
from lora_cli.common import LoraError, files, plain_files, spell_count, ui
from lora_cli.data import preferences, unpaired
from lora_cli.distributed import ranks
from lora_cli.models import Base, attach
from lora_cli.recipe import Recipe
from lora_cli.speed import document_attention, dora_norms, loss_head, step_packing
from lora_cli.train import pair_batches, preference_losses, unpaired_batches

PACKAGES = ("torch", "transformers", "peft")
NAME, DIGEST = "logps", "sha256"
BATCH = 1000


def find_folder() -> Path:
    """Return the folder of all that is kept."""
    return files.find_cache_home() / "reference"


def find_reference(
    recipe: Recipe,
    base: Base,
    adapted: PeftModel,
    rows: Dataset,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> torch.Tensor:
    """Return the log-probabilities (rows, 2; float32) of the chosen and the rejected answers of all
    rows under the adapted model as it is now; from the cache if they were computed before. Of rows
    with one answer, of that and of the one that it is held against.

    `collate` puts answers together as training does. Of several processes each computes a share.
    """
    file = find_folder() / f"{_make_key(recipe, base, adapted, rows)}.safetensors"
    kept = ranks.share(_read(file, len(rows)) if ranks.is_first() else None)
    if kept is not None:
        ui.say(f"  reference: computed before, in {file}")
        return torch.tensor(kept)
    began = time.monotonic()
    if recipe.objective_row.unpaired:
        every = unpaired_batches.EachAnswer(rows, recipe.training.max_length)
        found = _compute(recipe, adapted, every, collate).view(2, len(rows)).T.contiguous()
    else:
        found = _compute(recipe, adapted, rows, collate)
    if ranks.is_first():
        _write(file, found)
    took = ui.format_duration(time.monotonic() - began)
    what = "row" if recipe.objective_row.unpaired else "pair"
    ui.say(
        "  reference: how likely each answer is before the first step, "
        f"{spell_count(len(rows), what)}, {took}"
    )
    return found


def _compute(
    recipe: Recipe,
    adapted: PeftModel,
    rows: Dataset | unpaired_batches.EachAnswer,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
) -> torch.Tensor:
    """Return the log-probabilities of the answers of all rows (rows, as many as each has)."""
    network = adapted.get_base_model()
    wanted = recipe.training.loss_head == "trained_tokens"
    has_loss_head = wanted and loss_head.install(network) is None
    takes_bounds = document_attention.takes_bounds(network)
    size = recipe.training.per_device_train_batch_size
    if recipe.training.packing == "step":
        size = recipe.count_step_rows()
    answers = len(rows[0][preferences.DOCUMENTS])
    found = torch.zeros(len(rows), answers, dtype=torch.float64)
    starts = range(size * ranks.number(), len(rows), size * ranks.count())
    progress = ui.Progress()
    with _as_in_training(recipe, adapted):
        for start in starts:
            places = range(start, min(start + size, len(rows)))
            # in place of numbers that are not known, each row's place comes through the collator
            marks = [[at - start] * answers for at in places]
            given = [{**rows[at], pair_batches.REFERENCE: mark} for at, mark in zip(places, marks)]
            batch = collate(given)
            parts = [batch]
            if step_packing.CUTS in batch:
                parts = step_packing.split_sequences(batch, has_loss_head, takes_bounds)
            for part in pair_batches.split(batch, parts):
                there = {name: _move(value, adapted.device) for name, value in part.items()}
                logps, _ = preference_losses.score_each(adapted, there, has_loss_head)
                own = there[pair_batches.REFERENCE].view(-1, answers)[:, 0].long()
                found[start + own.cpu()] = logps.view(-1, answers).double().cpu()
            progress.update(f"reference {places[-1] + 1}/{len(rows)}")
    progress.clear()
    return ranks.add_up(found).float()


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextmanager
def _as_in_training(recipe: Recipe, adapted: PeftModel) -> Iterator[None]:
    """Compute inside in the types of training, without dropout and gradients."""
    given = recipe.training.collect_values()
    half = given.get("fp16", recipe.model.dtype == "float16")
    kind = torch.bfloat16 if recipe.training.bf16 else torch.float16 if half else None
    cast = torch.autocast(adapted.device.type, kind) if kind else nullcontext()
    norms = dora_norms.keep_norms(dora_norms.find_layers(adapted))
    training = adapted.training
    adapted.eval()
    with torch.no_grad(), cast, norms, attach.keep_input_types(adapted, kind is not None):
        yield
    adapted.train(training)


def _make_key(recipe: Recipe, base: Base, adapted: PeftModel, rows: Dataset) -> str:
    """Return a hash (32 hex digits) of all that the numbers hang on, to the last bit."""
    training = recipe.training
    decides = {
        "versions": {"lora": __version__} | {name: version(name) for name in PACKAGES},
        "base": base.fingerprint,
        "adapter": _hash_adapter(adapted),
        "rows": _hash_rows(rows),
        "model": recipe.model.collect_values(),
        "quantization": recipe.quantization.collect_values() if recipe.quantized else None,
        "device": [adapted.device.type, ranks.count(), torch.get_num_threads()],
        "training": [training.bf16, training.collect_values().get("fp16"), training.loss_head],
        "batches": [training.packing, training.packed_length, recipe.count_step_rows()],
        "size": training.per_device_train_batch_size,
    }
    if recipe.objective_row.unpaired:  # who lends whom an answer, and where it is cut
        matched = unpaired.match_answers(rows).tobytes()
        decides["matched"] = [hashlib.sha256(matched).hexdigest(), training.max_length]
    text = json.dumps(decides, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hash_adapter(adapted: PeftModel) -> str:
    """Return a hash of what is trained, as it is now, and of how it is put on the base."""
    found = hashlib.sha256(_describe_config(adapted.peft_config["default"]).encode())
    for name, parameter in attach.walk_trainable(adapted):
        found.update(name.encode())
        found.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _describe_config(config: PeftConfig) -> str:
    """Return an adapter's configuration as text, the same in each process: sets have another order
    in each."""
    settings = sorted(config.to_dict().items())
    return repr([(key, sorted(v) if isinstance(v, set) else v) for key, v in settings])


def _hash_rows(rows: Dataset) -> str:
    """Return a hash of the rows in their order."""
    found = hashlib.sha256()
    known = ("input_ids", "labels", preferences.DOCUMENTS)
    columns = [name for name in known if name in rows.column_names]
    for batch in rows.select_columns(columns).with_format("arrow").iter(BATCH):
        for name in columns:
            found.update(batch[name].combine_chunks().flatten().to_numpy().tobytes())
    return found.hexdigest()


def _read(file: Path, number: int) -> list[list[float]] | None:
    """Return what is kept of so many rows; None where it is missing, damaged or another user's."""
    if not file.exists():
        return None
    try:
        plain_files.refuse_odd(file, file.lstat())
        if hasattr(os, "getuid") and file.stat().st_uid != os.getuid():
            raise ValueError("it is another user's")
        with safe_open(file, framework="pt") as opened:
            kept, written = opened.get_tensor(NAME), (opened.metadata() or {}).get(DIGEST)
        if kept.shape != (number, 2) or kept.dtype != torch.float32 or not kept.isfinite().all():
            raise ValueError(f"it has not two numbers for each of {number} rows")
        if _hash_numbers(kept) != written:
            raise ValueError("it differs from what was written")
        os.utime(file)
    except (LoraError, OSError, ValueError, KeyError, SafetensorError) as error:
        ui.warn(f"what is kept in {file} is damaged ({error}): it is computed anew")
        files.remove(file)
        return None
    numbers: list[list[float]] = kept.tolist()
    return numbers


def _hash_numbers(numbers: torch.Tensor) -> str:
    return hashlib.sha256(numbers.cpu().contiguous().numpy().tobytes()).hexdigest()


def _write(file: Path, found: torch.Tensor) -> None:
    """Keep the numbers, whole or not at all, and remove what was not used for long."""
    folder = file.parent
    try:
        files.make_cache_folder(folder)
    except OSError as error:
        raise LoraError(
            f"{folder} cannot be made: {error.strerror}", "set LORA_CACHE_DIR to another folder"
        ) from error
    with files.scratch_folder(folder) as staging:
        digest = {DIGEST: _hash_numbers(found)}
        save_file({NAME: found.contiguous()}, staging / file.name, digest)
        files.remove_unused(folder, "")
        (staging / file.name).replace(file)
