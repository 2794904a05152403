"""What a checkpoint holds beside tensors: where the run is, and what decides how it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from transformers import TrainerState

from lora_cli.common import LoraError, files, stored, ui
from lora_cli.train.random_state import State

TRAINER_STATE = "trainer_state.json"
RUN_STATE = "run_state.json"
Loss = Annotated[float, Field(gt=-3.4e38, lt=3.4e38)]
"""Float32 holds it."""
Number = Annotated[float, Field(ge=0)] | Annotated[int, Field(ge=0)]


class WatchState(stored.Stored):
    """See `progress.Watch`."""

    untouched: list[str] | None
    loss_sum: float
    lines: stored.Count
    samples: stored.Count = 0
    """Lines of samples.jsonl."""


class RunState(stored.Stored):
    """What Trainer's own checkpoint lacks; see `saving_trainer.py`."""

    epoch_rng: State
    evaluation_due: bool
    epoch_ended: bool
    loss_since_log: Loss
    """The mean over the processes that train together."""
    losses_since_log: list[Loss] = []
    """Of each of them."""
    sums_since_log: list[list[Loss]] = []
    """Of each of them, what else is averaged in the next line of metrics.jsonl."""
    last_logged: stored.Count
    watch: WatchState
    processes: Annotated[int, Field(ge=1)] = 1
    """How many trained together."""

    def find_loss(self, rank: int, count: int) -> float:
        """Return the loss since the last log of one of `count` processes."""
        same = len(self.losses_since_log) == count
        return self.losses_since_log[rank] if same else self.loss_since_log

    def find_sums(self, rank: int, count: int) -> list[float]:
        """Return the sums since the last log of one of `count` processes: of others than saved
        them, the first one has all."""
        if len(self.sums_since_log) == count:
            return self.sums_since_log[rank]
        return [] if rank else [sum(each) for each in zip(*self.sums_since_log)]


class ControlState(stored.Stored):
    """Trainer's flags, which it writes and does not put back."""

    model_config = ConfigDict(extra="forbid")

    args: dict[str, bool] = {}
    attributes: Annotated[dict[str, Any], Field(max_length=0)] = {}


class StoppingState(stored.Stored):
    """How long evaluations have been no better, as transformers' EarlyStoppingCallback has it."""

    model_config = ConfigDict(extra="forbid")

    args: dict[Literal["early_stopping_patience", "early_stopping_threshold"], Number | None] = {}
    attributes: dict[Literal["early_stopping_patience_counter"], stored.Count] = {}


class Callbacks(stored.Stored):
    """What Trainer writes of callbacks that have a state."""

    model_config = ConfigDict(extra="forbid")

    TrainerControl: ControlState = ControlState()
    EarlyStopping: StoppingState = StoppingState()


class SavedTrainerState(stored.Stored):
    """transformers' TrainerState as its file has it."""

    global_step: stored.Count
    epoch: Number
    max_steps: stored.Count
    num_train_epochs: stored.Count
    num_input_tokens_seen: stored.Count = 0
    logging_steps: Number | None = None
    eval_steps: Number | None = None
    save_steps: Number | None = None
    train_batch_size: Annotated[int, Field(ge=1)] | None = None
    total_flos: Number = 0
    log_history: list[dict[str, Any]] = []
    best_metric: Annotated[float, Field(allow_inf_nan=True)] | None = None
    best_global_step: stored.Count | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: Literal[False] = False
    trial_name: None = None
    trial_params: None = None
    stateful_callbacks: Callbacks = Callbacks()

    @model_validator(mode="after")
    def _refuse_unknown(self) -> Self:
        known = {field.name for field in dataclasses.fields(TrainerState)}
        if unknown := sorted({*(self.model_extra or {})} - known):
            raise ValueError(f"the installed transformers does not know {unknown[0][:80]}")
        return self


def read_states(checkpoint: Path, step: int) -> SavedTrainerState:
    """Return Trainer's state of the checkpoint of a step. Raise LoraError naming the field for a
    file of states that a run cannot go on from."""
    state = SavedTrainerState.read(checkpoint / TRAINER_STATE)
    if state.global_step != step:
        said = f"{state.global_step} in the checkpoint of step {step}"
        raise stored.explain_damage(checkpoint / TRAINER_STATE, said, ("global_step",))
    RunState.read(checkpoint / RUN_STATE)
    for file in sorted(checkpoint.glob("rng_state_*.json")):
        State.read(file)
    return state


def read_epoch(checkpoint: Path) -> float | None:
    """Return how often the run had gone through its rows at a checkpoint; None where that cannot be
    read, which is said where it is resumed from."""
    try:
        return float(SavedTrainerState.read(checkpoint / TRAINER_STATE).epoch)
    except LoraError:
        return None


def cut_lines(
    file: Path, lines: int, kinds: Mapping[str, type] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """Cut a run's file of JSON lines to the `lines` that it had at a checkpoint, and return what
    they say; each has a step, and under the names in `kinds` what is of that type.

    Warns where some of them are missing or damaged; these are left out.
    """
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    # split by nothing else: an answer may hold other ends of lines
    read = [(line, _read_line(line, {"step": int, **kinds})) for line in text.split("\n")[:lines]]
    whole = [(line, found) for line, found in read if found is not None]
    if len(whole) < lines:
        left = f"{len(whole)} of the {lines} lines up to the checkpoint"
        ui.warn(f"{file} has {left}: the others are missing or damaged")
    files.write_text(file, "".join(f"{line}\n" for line, _ in whole))
    return [found for _, found in whole]


def _read_line(line: str, kinds: Mapping[str, type]) -> dict[str, Any] | None:
    """Return what a line says; None where it is none of ours."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    is_ours = isinstance(found, dict) and all(
        isinstance(found.get(name), kind) for name, kind in kinds.items()
    )
    return found if is_ours else None
