"""Let a Trainer's run be stopped anywhere and go on as the same run, bit for bit on one machine.

What a checkpoint holds is put back where the run goes on, and what was due then is done. An
evaluation draws no random numbers of the training's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from lora_cli.common import ui
from lora_cli.distributed import ranks
from lora_cli.speed import dora_norms
from lora_cli.train import random_state, sharding
from lora_cli.train.early_stopping import EarlyStopping
from lora_cli.train.options import RunOptions
from lora_cli.train.saving_trainer import SavingTrainer
from lora_cli.train.signals import Signals

BY_METRIC = ("ReduceLROnPlateau", "GreedyLR")
"""torch's and transformers' classes of schedules that go by what is measured."""


class StoppedError(Exception):
    """Ends an evaluation that a signal interrupts; caught in this file."""


class Resumable(SavingTrainer):
    """Overrides Trainer to stop between steps where it is asked to, and to go on from there."""

    in_step = False
    """Between a step's beginning and its optimiser's: the weights are those of the step before."""
    _between_steps = False

    def __init__(self, options: RunOptions, **given: Any) -> None:
        self.signals = Signals()
        self.stopping = EarlyStopping(options.patience, options.least_gain)
        self.boundary: dict[str, Any] | None = {} if options.reduce_on_oom else None
        """What `save_last_step` puts back; None where it is never called."""
        super().__init__(options, **given)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.stopping.is_over:
            self.control.should_training_stop = True  # Trainer would train one more step
            return
        super()._run_epoch(*args, **kwargs)

    def _evaluate(
        self, trial: Any, ignore_keys: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        before = random_state.capture_state()
        try:
            answers = self._answer_samples() if self.state.global_step else None
            metrics: dict[str, float] = super()._evaluate(trial, ignore_keys, skip_scheduler=True)
            if not skip_scheduler:
                self._step_by_metric(metrics)
        finally:
            random_state.restore_state(before)
        self.evaluation_due = False
        if answers is not None:  # once all is done that would be done again
            self.watch.show_samples(answers)
        return metrics

    def _step_by_metric(self, metrics: dict[str, float]) -> None:
        """Tell a schedule that goes by evaluations what was measured, as Trainer does; but where
        that is not defined (a correlation with what is constant), nothing, as for the best step."""
        name = self.name_best_metric()
        if type(self.lr_scheduler).__name__ in BY_METRIC and name in metrics:
            self.lr_scheduler.step(metrics[name])

    def sample(self) -> None:
        """Answer the sample prompts before or after all steps, if that is not done."""
        if self.watch.samples.last == self.state.global_step:
            return
        before = random_state.capture_state()
        answers = self._answer_samples()
        random_state.restore_state(before)
        if answers is not None:
            self.watch.show_samples(answers)

    def _answer_samples(self) -> list[str] | None:
        """Return what the model answers to the sample prompts now; None where there are none, and
        on all processes but the first, whose model is the others' too."""
        samples = self.watch.samples
        self.obey_amid_evaluation()
        if not samples.asked.prompts or not ranks.is_first():
            return None
        self.watch.show_doing("answering", force=True)
        network, trained = self.model.get_base_model(), self.model.training
        self.model.eval()
        norms = dora_norms.keep_norms(self.options.dora_layers)
        # each length would be compiled anew, and what is compiled too often is given up
        eager = torch.compiler.set_stance("force_eager")
        try:
            with torch.no_grad(), self.compute_loss_context_manager(), norms, eager:
                return samples.answer(network, self.processing_class)
        finally:
            self.model.train(trained)

    def obey_amid_evaluation(self) -> None:
        """End an evaluation that a signal has come in; for each of its batches."""
        if self._between_steps:
            self.signals.agree()
            if self.signals.stopping:
                raise StoppedError

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do as Trainer does between steps, and obey signals: a checkpoint notes what is due."""
        self.signals.agree()
        asked = self.signals.save
        self.control.should_save = self.control.should_save or asked
        self.evaluation_due = self.control.should_evaluate
        if self.signals.stopping:
            self.control.should_evaluate = False
            self.control.should_save = False
        self._between_steps = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except StoppedError:
            assert self.evaluation_due
        finally:
            self._between_steps = False
        self.mark_boundary(random_state.capture_state)
        if self.signals.stopping:
            self._save_checkpoint(self.model, None)
            self.signals.end()
        if asked:
            self.watch.progress.clear()
            ui.say(f"SIGUSR1: saved checkpoint-{self.state.global_step}")

    def mark_boundary(self, capture: Callable[[], random_state.State]) -> None:
        """Remember what the next step will change beside weights and optimiser."""
        if self.boundary is not None:
            self.boundary = {
                "rng": capture(),
                "loss": self._tr_loss.clone(),
                "sums": None if self.sums is None else self.sums.clone(),
                "tokens": self.state.num_input_tokens_seen,
                "epoch_ended": self.epoch_ended,
            }

    def save_last_step(self) -> Path:
        """Save the checkpoint of the last completed step, after one that broke off `in_step`."""
        assert self.boundary and self.in_step
        self.model.zero_grad()
        random_state.restore_state(self.boundary["rng"])
        self._tr_loss, self.sums = self.boundary["loss"], self.boundary["sums"]
        self.epoch_ended = self.boundary["epoch_ended"]
        self.state.num_input_tokens_seen = self.boundary["tokens"]
        self._save_checkpoint(self.model, None)
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def restore_run(self) -> None:
        """Put back what Trainer does not, and do what was due when the checkpoint was saved."""
        if self.resumed is None:
            return
        self.args.eval_on_start = False
        self.name_best(Path(self.args.output_dir))
        self._tr_loss += self.resumed.find_loss(ranks.number(), ranks.count())
        if self.sums is not None:
            sums = self.resumed.find_sums(ranks.number(), ranks.count())
            self.sums += self.sums.new_tensor(sums) if sums else 0
        self._globalstep_last_logged = self.resumed.last_logged
        self.epoch_rng = self.resumed.epoch_rng
        self.watch.restore_state(self.resumed.watch)
        self.epoch_ended = self.resumed.epoch_ended
        if self.resumed.evaluation_due:
            self.control.should_evaluate = True
            self._catch_up()
        at_end = self.is_at_edge() or self.state.global_step >= self.state.max_steps
        if at_end and self.state.global_step and not self.epoch_ended:
            self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._catch_up()
            self.control.should_training_stop = False

    def _catch_up(self) -> None:
        """Do what the control asks for, as after the step that the checkpoint is of."""
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model, None, self.state.epoch, None, time.time()
        )
        self.control.should_log = False
        self.control.should_evaluate = False
        self.control.should_save = False


class Boundaries(TrainerCallback):
    """What a resumable run does where it begins, and where epochs and steps begin and end."""

    def __init__(self, trainer: Resumable) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The run goes on as it was when its checkpoint was saved."""
        if self.trainer.options.sharded:
            ui.say(f"  sharded: {sharding.describe(self.trainer.model)}")
        self.trainer.restore_run()
        if not state.global_step:
            self.trainer.sample()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the order of the epoch's rows from the numbers that it was first drawn from."""
        trainer = self.trainer
        if trainer.resumed is not None and not trainer.is_at_edge():
            random_state.restore_state(trainer.epoch_rng)
        else:
            trainer.epoch_rng = random_state.capture_state()
        trainer.resumed = None
        trainer.mark_boundary(lambda: trainer.epoch_rng)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Another step: the epoch goes on."""
        self.trainer.epoch_ended = False
        self.trainer.in_step = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The weights change from now on."""
        self.trainer.in_step = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A checkpoint saved from now on comes after the end of its epoch."""
        self.trainer.epoch_ended = True
