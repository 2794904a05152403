"""What makes a Trainer's run one that can be stopped anywhere and goes on as the same run, bit for
bit on one machine.

Trainer's checkpoint lacks some of what decides how a run goes on: the generators' state at the
epoch's beginning (its order of rows may be drawn from it), whether the evaluation that was due has
been made, what was summed up for the next record in metrics.jsonl. Here that is saved as well
(`run_state.json`), and put back. An evaluation draws no random numbers of the training's, and no
pickle but those of plain tensors is written or read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_cli.common import LoraError, files, ui
from lora_cli.models import attach
from lora_cli.train import checkpoints, random_state
from lora_cli.train.progress import Watch
from lora_cli.train.signals import Signals

RUN_STATE = "run_state.json"


@contextmanager
def keep_types(network: torch.nn.Module) -> Iterator[None]:
    """Whatever happens inside, trained tensors keep their types."""
    kinds = {name: parameter.dtype for name, parameter in attach.walk_trainable(network)}
    yield
    for name, parameter in attach.walk_trainable(network):
        parameter.data = parameter.data.to(kinds[name])


class StoppedError(Exception):
    """An evaluation that a signal ended; never seen outside this file."""


class Resumable:
    """Overrides of Trainer: sealed checkpoints, and everything of the run in them. Comes before
    Trainer's classes."""

    watch: Watch
    run_id: str
    keep: int | None
    """Checkpoints kept; Trainer's own `save_total_limit` must be None: it deletes folders of
    others."""
    signals: Signals
    epoch_rng: random_state.State
    resumed: dict[str, Any] | None = None
    """What was read from the checkpoint's run_state.json, until the first epoch has begun."""
    evaluation_due, epoch_ended = False, False
    """At the end of this step or epoch: is an evaluation still to be made; has what is done between
    epochs begun?"""
    _between_steps = False
    in_step = False
    """Between a step's beginning and its optimiser's: the weights are those of the step before."""
    boundary: dict[str, Any] | None = None
    """What is no longer what it was at the end of the last step, for `save_last_step`; None where
    nobody asks."""

    def _save(self, output_dir: str, state_dict: Any = None) -> None:
        # Trainer adds training_args.bin, a pickle with the hub's token in clear
        with attach.quiet_peft():
            self.model.save_pretrained(
                output_dir, state_dict=state_dict, save_embedding_layers=False
            )  # type: ignore[attr-defined]
        self.processing_class.save_pretrained(output_dir)  # type: ignore[attr-defined]

    def _save_rng_state(self, output_dir: str) -> None:
        files.write_json(self._rng_file(output_dir), random_state.capture_state())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        assert checkpoint is not None
        state = files.read_json(self._rng_file(checkpoint))
        random_state.restore_state(state)
        if self._at_edge():  # the epoch that begins now began then
            self.epoch_rng = state

    def _rng_file(self, folder: str) -> Path:
        return Path(folder) / f"rng_state_{self.args.process_index}.json"  # type: ignore[attr-defined]

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving or super()._get_output_dir(trial)  # type: ignore[misc]

    _saving: str | None = None
    """The folder that Trainer writes `checkpoint-N` into, while it does."""

    def _save_checkpoint(self, network: Any, trial: Any) -> None:
        """Trainer's checkpoint with the run's state, sealed; one that is there already stays as it
        is."""
        folder, step = Path(self.args.output_dir), self.state.global_step  # type: ignore[attr-defined]
        state: TrainerState = self.state  # type: ignore[attr-defined]
        self._name_best(folder)
        final = folder / f"checkpoint-{step}"
        if final.is_dir() and isinstance(
            checkpoints.read_checkpoint(final, self.run_id), checkpoints.Checkpoint
        ):
            return
        with checkpoints.stage_checkpoint(folder, self.run_id, step) as staging:
            self._saving = str(staging.parent)
            try:
                Trainer._save_checkpoint(
                    self, network, trial
                )  # TRL's writes a model card into the run's folder too
            finally:
                self._saving = None
            self._name_best(folder)
            state.save_to_json(str(staging / checkpoints.STATE))
            files.write_json(staging / RUN_STATE, self._run_state())
        checkpoints.delete_old(folder, self.run_id, self.keep, step, state.best_global_step)

    def _name_best(self, folder: Path) -> None:
        state: TrainerState = self.state  # type: ignore[attr-defined]
        if state.best_global_step:
            state.best_model_checkpoint = str(folder / f"checkpoint-{state.best_global_step}")

    def _run_state(self) -> dict[str, Any]:
        return {
            "epoch_rng": self.epoch_rng,
            "evaluation_due": self.evaluation_due,
            "epoch_ended": self.epoch_ended,
            "loss_since_log": float(self._tr_loss),
            "last_logged": self._globalstep_last_logged,  # type: ignore[attr-defined]
            "watch": self.watch.state(),
        }

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with keep_types(self.model), attach.quiet_peft():  # type: ignore[attr-defined]  # PEFT loads in float32
            super()._load_from_checkpoint(checkpoint, *args, **kwargs)  # type: ignore[misc]
        attach.check_adapter_complete(self.model, Path(checkpoint), "default")  # type: ignore[attr-defined]
        self.resumed = files.read_json(Path(checkpoint) / RUN_STATE)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)  # type: ignore[attr-defined]
        found = checkpoints.read_checkpoint(best, self.run_id)
        if isinstance(found, checkpoints.Unusable):
            raise LoraError(
                f"the best model, {best}, cannot be loaded: {found.reason}",
                "--resume --allow-changes training.load_best_model_at_end takes the last one "
                "instead",
            )
        with keep_types(self.model), attach.quiet_peft():  # type: ignore[attr-defined]
            super()._load_best_model()  # type: ignore[misc]

    def _at_edge(self) -> bool:
        """Whether the last step was the last of its epoch."""
        return float(self.state.epoch).is_integer()  # type: ignore[attr-defined]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # type: ignore[attr-defined]
            self.control.should_training_stop = True  # type: ignore[attr-defined]  # Trainer would train one more step
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        before = random_state.capture_state()
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)  # type: ignore[misc]
        finally:
            random_state.restore_state(before)
        self.evaluation_due = False
        return metrics

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.signals.stopping and self._between_steps:
            raise StoppedError
        return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, between two steps; and here a signal is obeyed: the checkpoint notes what
        was still due."""
        control: TrainerControl = self.control  # type: ignore[attr-defined]
        asked, self.signals.save = self.signals.save, False
        control.should_save = control.should_save or asked
        self.evaluation_due = control.should_evaluate
        if self.signals.stopping:
            control.should_evaluate = control.should_save = False
        self._between_steps = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)  # type: ignore[misc]
        except StoppedError:
            assert self.evaluation_due
        finally:
            self._between_steps = False
        self.mark(random_state.capture_state)
        if self.signals.stopping:
            self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
            self.signals.end()
        if asked:
            self.watch.progress.clear()
            ui.say(f"SIGUSR1: saved checkpoint-{self.state.global_step}")  # type: ignore[attr-defined]

    def mark(self, generators: Callable[[], random_state.State]) -> None:
        """Remember what the next step will change beside weights and optimiser."""
        if self.boundary is not None:
            self.boundary = {
                "rng": generators(),
                "loss": self._tr_loss.clone(),
                "tokens": self.state.num_input_tokens_seen,  # type: ignore[attr-defined]
                "epoch_ended": self.epoch_ended,
            }

    def save_last_step(self) -> Path:
        """The checkpoint of the last step that was completed, after one that broke off
        `in_step`."""
        assert self.boundary and self.in_step
        self.model.zero_grad()  # type: ignore[attr-defined]
        random_state.restore_state(self.boundary["rng"])
        self._tr_loss, self.epoch_ended = self.boundary["loss"], self.boundary["epoch_ended"]
        self.state.num_input_tokens_seen = self.boundary["tokens"]  # type: ignore[attr-defined]
        self._save_checkpoint(self.model, None)  # type: ignore[attr-defined]
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]


class Boundaries(TrainerCallback):
    """What a resumable run does where it begins, and where epochs begin and end."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put back what Trainer does not, and make up for what was due when the checkpoint was
        saved."""
        trainer = self.trainer
        resumed = trainer.resumed
        if resumed is None:
            return
        args.eval_on_start = False
        trainer._name_best(Path(args.output_dir))
        trainer._tr_loss += resumed["loss_since_log"]
        trainer._globalstep_last_logged = resumed["last_logged"]
        trainer.epoch_rng = resumed["epoch_rng"]
        trainer.watch.restore(resumed["watch"])
        trainer.epoch_ended = resumed["epoch_ended"]
        if resumed["evaluation_due"]:
            control.should_evaluate = True
            self._catch_up(control)
        if (
            (trainer._at_edge() or state.global_step >= state.max_steps)
            and state.global_step
            and not trainer.epoch_ended
        ):
            trainer.callback_handler.on_epoch_end(args, state, control)
            self._catch_up(control)
            control.should_training_stop = False

    def _catch_up(self, control: TrainerControl) -> None:
        trainer = self.trainer
        trainer._maybe_log_save_evaluate(
            trainer._tr_loss, None, trainer.model, None, trainer.state.epoch, None, time.time()
        )
        control.should_log = control.should_evaluate = control.should_save = False

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The order of the epoch's rows may be drawn from now on: from the numbers it was drawn
        from."""
        trainer = self.trainer
        if trainer.resumed is not None and not trainer._at_edge():
            random_state.restore_state(trainer.epoch_rng)
        else:
            trainer.epoch_rng = random_state.capture_state()
        trainer.resumed = None
        trainer.mark(lambda: trainer.epoch_rng)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Another step: the epoch goes on."""
        self.trainer.epoch_ended, self.trainer.in_step = False, True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights change from now on."""
        self.trainer.in_step = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint saved from now on has this behind it."""
        self.trainer.epoch_ended = True
