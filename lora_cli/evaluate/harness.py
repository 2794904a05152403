"""Hand a loaded model to lm-eval (the extra `bench`), EleutherAI's harness of standard tasks.

It is given the model that answers here, and its tokenizer: it loads nothing, moves nothing to
another device, and neither ties nor resizes embeddings, which would change what is measured.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_cli.common import LoraError, UsageError, find_nearest, library_errors, quote, ui
from lora_cli.evaluate.answerers import Answerer
from lora_cli.evaluate.hf_answerers import HFAnswerer
from lora_cli.speed import dora_norms

DEVICE_MOVES = ("to", "tie_weights", "resize_token_embeddings")
"""Methods of a model that lm-eval calls, or might, and that must not be."""


class Tasks(NamedTuple):
    """Tasks that lm-eval knows."""

    names: list[str]
    manager: Any
    key: str
    """A hash of their names, and of the files that describe them."""


def find_tasks(names: Sequence[str], folder: Path | None) -> Tasks:
    """Return lm-eval's tasks of these names, also those that files in `folder` describe. Raises
    LoraError where lm-eval is not installed, UsageError for a task that it does not know."""
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tasks-path {folder} is not a folder", f"ls {quote(folder.parent)}")
    try:
        tasks = importlib.import_module("lm_eval.tasks")
    except ImportError as error:
        raise LoraError(
            f"--tasks needs lm-eval, which is not installed ({error})",
            "pip install 'lora-cli[bench]'",
        ) from None
    with _quiet():
        manager = tasks.TaskManager(include_path=str(folder) if folder else None)
    known = manager.all_tasks
    for name in names:
        if not manager.match_tasks([name]):
            guess = find_nearest(name, known)
            look = "lm-eval ls tasks" + (f" --include_path {quote(folder)}" if folder else "")
            raise UsageError(
                f"--tasks {name}: lm-eval knows no such task, or cannot read its file",
                f"did you mean {guess}?" if guess else look,
            )
    hashed = hashlib.sha256("\n".join(sorted(names)).encode())
    for file in sorted(folder.rglob("*")) if folder else []:
        if file.is_file():
            hashed.update(file.read_bytes())
    return Tasks(list(names), manager, hashed.hexdigest())


Result = tuple[str, float, float | None]
"""A metric, its value and its standard error."""


def run_tasks(
    tasks: Tasks, label: str, answerer: Answerer, batch_size: int
) -> dict[str, list[Result]] | None:
    """Return what each task measures of a model; None of a GGUF file, which lm-eval would load by
    itself."""
    if not isinstance(answerer, HFAnswerer):
        ui.say(f"{label}: no lm-eval tasks: it takes models that transformers has loaded")
        return None
    ui.say(f"{label}: lm-eval: {', '.join(tasks.names)}")
    harness = importlib.import_module("lm_eval")
    network = answerer.network
    norms = dora_norms.keep_norms(dora_norms.find_layers(network))
    with _quiet(), torch.inference_mode(), answerer.switched(), norms, _unchanged(network):
        try:
            found = harness.simple_evaluate(
                model=_wrap(answerer, batch_size),
                tasks=tasks.names,
                task_manager=tasks.manager,
                log_samples=False,
                verbosity="ERROR",
            )
        except Exception as error:  # of a task's file, its data, or what these need
            if library_errors.translate(error) is not None:
                raise
            raise LoraError(
                f"lm-eval could not run {', '.join(tasks.names)}: {type(error).__name__}: {error}",
                f"lm-eval validate --tasks {quote(tasks.names[0])}",
            ) from error
    return {name: _read_results(values) for name, values in found["results"].items()}


def _wrap(answerer: HFAnswerer, batch_size: int) -> Any:
    """Return the model as lm-eval takes it, with a copy of the tokenizer, which it changes."""
    models = importlib.import_module("lm_eval.models.huggingface")
    tokenizer = copy.deepcopy(answerer.tokenizer)
    if tokenizer.pad_token is None:  # lm-eval would take the unknown token, or add one
        tokenizer.pad_token = tokenizer.eos_token
    return models.HFLM(
        pretrained=answerer.network,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=answerer.positions,
    )


@contextmanager
def _unchanged(network: Any) -> Iterator[None]:
    """Let nobody move, tie or resize the model inside: these methods return it as it is."""
    rows = network.get_input_embeddings().weight.shape[0]
    for name in DEVICE_MOVES:
        object.__setattr__(network, name, lambda *args, **kwargs: network)
    try:
        yield
    finally:
        for name in DEVICE_MOVES:
            object.__delattr__(network, name)
    assert network.get_input_embeddings().weight.shape[0] == rows, "lm-eval resized it"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's own words and bars off the screen."""
    before, nowhere = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(nowhere), redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)


def _read_results(values: Mapping[str, Any]) -> list[Result]:
    """Return a task's metrics; lm-eval names them `acc,none` and `acc_stderr,none`."""
    found: list[Result] = []
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not isinstance(value, (int, float)) or name.endswith("_stderr") or not filtered:
            continue
        error = values.get(f"{name}_stderr,{filtered}")
        shown = name if filtered == "none" else f"{name} ({filtered})"
        told = (
            float(error) if isinstance(error, (int, float)) else None
        )  # "N/A" where there is none
        found.append((shown, float(value), told))
    return found
