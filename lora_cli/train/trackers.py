"""Let trackers (wandb, tensorboard, trackio, mlflow, …) follow a run, and never stop it.

transformers has a callback for each, which gets what Trainer logs. Here each is kept from ending
the run when it fails, and four of them get more: the settled recipe, the answers to sample prompts,
and at the end which step was best and the numbers of the receipt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_cli.common import library_errors, provenance, ui

COLUMNS = ("prompt", "answer")
Sample = Mapping[str, Any]
ListReceipt = Callable[[TrainerState], Mapping[str, float]]
EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Tracker(TrainerCallback):
    """One tracker, by the callback that transformers has for it."""

    def __init__(
        self, callback: TrainerCallback, recipe: str, folder: Path, list_receipt: ListReceipt
    ) -> None:
        self.callback = callback
        self.list_receipt = list_receipt
        self.recipe = recipe
        """The settled recipe, as YAML."""
        self.samples = folder / provenance.SAMPLES
        self.told = 0
        """Lines of it that the tracker has."""
        self.failed = False
        self.teller = TELLERS.get(type(callback).__name__)

    def pass_on(
        self, event: str, args: TrainingArguments, state: TrainerState, **given: Any
    ) -> None:
        """Tell the tracker of an event; one that has failed hears no more."""
        if self.failed:
            return
        try:
            if state.is_world_process_zero and event == "on_train_end":
                self._tell_samples()
                self._tell("final", describe_end(args, state, self.list_receipt(state)))
            getattr(self.callback, event)(args, state, **given)
            if state.is_world_process_zero and event == "on_train_begin":
                self._tell("recipe", self.recipe)
            elif state.is_world_process_zero and event in ("on_log", "on_save"):
                self._tell_samples()
        # whatever a tracker's own code raises, as its service is down: the run is what matters
        except Exception as error:
            self._give_up(error)

    def _tell_samples(self) -> None:
        text = self.samples.read_text("utf-8") if self.samples.is_file() else ""
        lines = text.split("\n")[:-1]  # an answer may hold other ends of lines
        if new := [json.loads(line) for line in lines[self.told :]]:
            self._tell("samples", new)
        self.told = len(lines)

    def _tell(self, what: str, content: Any) -> None:
        if self.teller is not None:
            self.teller(self.callback, what, content)

    def _give_up(self, error: Exception) -> None:
        self.failed = True
        name = type(self.callback).__name__.removesuffix("Callback").lower()
        known = library_errors.translate(error)
        said = known.message if known else f"{type(error).__name__}: {error}"
        first = " ".join(said.split())[:200]
        ui.warn(f"training.report_to: {name} gets nothing more of this run: {first}")


def _make_event(name: str) -> Callable[..., None]:
    def event(
        self: Tracker,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        self.pass_on(name, args, state, control=control, **given)

    return event


for _name in EVENTS:
    setattr(Tracker, _name, _make_event(_name))


def guard(callback: Any, recipe: str, folder: Path, list_receipt: ListReceipt) -> Any:
    """Return a tracker's callback as a Tracker, any other as it is."""
    its_own = type(callback).__module__.startswith("transformers.integrations")
    return Tracker(callback, recipe, folder, list_receipt) if its_own else callback


def describe_end(
    args: TrainingArguments, state: TrainerState, receipt: Mapping[str, float]
) -> dict[str, float]:
    """Return what the end of a run tells beside what Trainer logs."""
    found: dict[str, float] = {"final/step": state.global_step}
    found |= {f"final/{name}": value for name, value in receipt.items()}
    if state.best_global_step and state.best_metric is not None:
        metric = str(args.metric_for_best_model).removeprefix("eval_")
        found |= {"final/best_step": state.best_global_step}
        found |= {f"final/best_{metric}": state.best_metric}
    return found


def _group(samples: Sequence[Sample]) -> dict[int, list[list[str]]]:
    """Return the samples as rows of COLUMNS, by step."""
    steps = dict[int, list[list[str]]]()
    for each in samples:
        steps.setdefault(int(each["step"]), []).append([str(each[name]) for name in COLUMNS])
    return steps


def _write_text(rows: Sequence[Sequence[str]]) -> str:
    """Return samples as Markdown that shows their text as it is."""
    blocks = []
    for prompt, answer in rows:
        said = [f"    {line}" for line in answer.splitlines() or [""]]
        blocks.append("\n".join([f"    > {line}" for line in prompt.splitlines()] + said))
    return "\n\n----\n\n".join(blocks)


def _tell_tensorboard(callback: Any, what: str, content: Any) -> None:
    writer = callback.tb_writer
    if what == "recipe":
        lines = [f"    {line}" for line in content.splitlines()]
        writer.add_text("recipe", "\n".join(lines))
    elif what == "samples":
        for step, rows in _group(content).items():
            writer.add_text("samples", _write_text(rows), step)
    else:
        for name, value in content.items():
            writer.add_scalar(name, value)
    writer.flush()


def _tell_wandb(callback: Any, what: str, content: Any) -> None:
    wandb = callback._wandb
    if what == "recipe":
        wandb.config.update({"recipe": content}, allow_val_change=True)
    elif what == "samples":
        for step, rows in _group(content).items():
            table = wandb.Table(columns=list(COLUMNS), data=rows)
            wandb.log({"samples": table, "train/global_step": step})
    else:
        wandb.run.summary.update(content)


def _tell_trackio(callback: Any, what: str, content: Any) -> None:
    trackio = callback._trackio
    if what == "recipe":
        trackio.config.update({"recipe": content}, allow_val_change=True)
    elif what == "samples":
        for step, rows in _group(content).items():
            frame = pyarrow.table(dict(zip(COLUMNS, zip(*rows)))).to_pandas()
            trackio.log({"samples": trackio.Table(dataframe=frame), "train/global_step": step})
    else:
        trackio.log(content)


def _tell_mlflow(callback: Any, what: str, content: Any) -> None:
    mlflow = callback._ml_flow
    if what == "recipe":
        mlflow.log_text(content, "recipe.yaml")
    elif what == "samples":
        for step, rows in _group(content).items():
            mlflow.log_text(_write_text(rows), f"samples/step-{step}.md")
    else:
        mlflow.log_metrics(content)


TELLERS: dict[str, Callable[[Any, str, Any], None]] = {
    "TensorBoardCallback": _tell_tensorboard,
    "WandbCallback": _tell_wandb,
    "TrackioCallback": _tell_trackio,
    "MLflowCallback": _tell_mlflow,
}
"""What gives a tracker the recipe, the samples and the end of a run, by transformers' callback."""
