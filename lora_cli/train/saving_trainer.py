"""A Trainer whose checkpoints are there whole or not at all, and hold all that a run goes on from.

Trainer's own lacks some of that: the generators' state at the epoch's beginning (its order of rows
may be drawn from it), whether the evaluation that was due has been made, what was summed up for the
next record in metrics.jsonl. Here that is saved as well (`run_state.json`). The only pickles
written or read are those of plain tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from lora_cli.common import LoraError, files, ui
from lora_cli.distributed import ranks
from lora_cli.models import attach, host_blocks
from lora_cli.train import checkpoints, random_state, saved_state, sharding, zero3
from lora_cli.train.options import RunOptions
from lora_cli.train.progress import Watch
from lora_cli.train.typed_trainer import TypedTrainer


@contextmanager
def keep_types(network: torch.nn.Module) -> Iterator[None]:
    """Whatever happens inside, trained tensors keep their types."""
    kinds = {name: parameter.dtype for name, parameter in attach.walk_trainable(network)}
    yield
    for name, parameter in attach.walk_trainable(network):
        parameter.data = parameter.data.to(kinds[name])


class SavingTrainer(TypedTrainer):
    """Overrides Trainer to seal checkpoints and to keep everything of the run in them.

    Trainer's own `save_total_limit` must be None, as it deletes checkpoints of other runs.
    """

    watch: Watch
    """Created by the class that inherits, which adds it as a callback."""
    epoch_rng: random_state.State
    resumed: saved_state.RunState | None = None
    """What was read from the checkpoint's run_state.json, until the first epoch has begun."""
    sums: torch.Tensor | None = None
    """What else is summed up for the next line in metrics.jsonl, beside the loss."""
    evaluation_due = False
    """Whether the evaluation at the end of this step or epoch is still to be made."""
    epoch_ended = False
    """Whether what is done between two epochs has begun."""
    _gathered: Sequence[tuple[dict[str, Any], float, list[float]]] = ()
    """The generators' states, the loss and the sums since the last log of each process, to be
    saved."""
    _saving: str | None = None
    """The folder that Trainer writes `checkpoint-N` into, while it does."""

    def __init__(self, options: RunOptions, **given: Any) -> None:
        self.options = options
        self._network = given["model"]
        with keep_types(given["model"]):  # SFTTrainer casts adapters of a 4-bit base to bfloat16
            super().__init__(**given)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.options.sharded == "fsdp":
            sharding.turn_on(self, self._network, self.options.replicas)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not self.options.sharded:  # else what shards it moves it, part by part
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        host_blocks.release(self._network.get_base_model())
        if self.options.sharded == "deepspeed-zero3" and not sharding.is_on(model):
            zero3.turn_on(model)
        return super()._wrap_model(model, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; Trainer would gather the whole of a sharded model."""
        if self.options.sharded:
            self._save(str(output_dir), sharding.gather_trained(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with sharding.whole_optimizer(self):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with sharding.whole_optimizer(self):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _save(self, output_dir: str, state_dict: Any = None) -> None:
        if not ranks.is_first():
            return
        # Trainer adds training_args.bin, a pickle with the hub's token in clear
        with attach.quiet_peft():
            self.model.save_pretrained(
                output_dir, state_dict=state_dict, save_embedding_layers=False
            )
        self.processing_class.save_pretrained(output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        for rank, (state, *_) in enumerate(self._gathered):
            files.write_json(Path(output_dir) / f"rng_state_{rank}.json", state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        assert checkpoint is not None
        path = Path(checkpoint) / f"rng_state_{ranks.number()}.json"
        if not path.is_file():  # of more processes than the run was saved by
            random_state.seed_apart(self.args.seed + self.state.global_step)
            return
        state = random_state.State.read(path)
        random_state.restore_state(state)
        if self.is_at_edge():  # the epoch that begins now began then
            self.epoch_rng = state

    def store_flos(self) -> None:
        """Sum up what was computed: not amid a checkpoint, which one process alone writes."""
        if self._saving is None:
            super().store_flos()

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save Trainer's checkpoint with the run's state, unless it is there already.

        The first process writes it, with what the others give; all go through Trainer's own
        method, which waits for all.
        """
        folder = Path(self.args.output_dir)
        self.watch.read_step()  # nothing is saved of a step that is refused
        self.name_best(folder)
        self.store_flos()
        sums = [] if self.sums is None else self.sums.tolist()
        self._gathered = ranks.gather(
            (random_state.capture_state().to_data(), float(self._tr_loss), sums)
        )
        if ranks.share(self._has_saved(folder)):
            return
        if ranks.is_first():
            self._write_checkpoint(folder, model, trial)
        else:
            self._saving = os.devnull  # in which nothing can be written
            try:
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self._saving = None
            self.name_best(folder)

    def _has_saved(self, folder: Path) -> bool:
        """Return whether the checkpoint of this step is there, whole."""
        final = folder / f"checkpoint-{self.state.global_step}"
        return final.is_dir() and isinstance(
            checkpoints.read_checkpoint(final, self.options.run_id), checkpoints.Checkpoint
        )

    def _write_checkpoint(self, folder: Path, model: Any, trial: Any) -> None:
        run_id, step = self.options.run_id, self.state.global_step
        with checkpoints.stage_checkpoint(folder, run_id, step) as staging:
            self._saving = str(staging.parent)
            try:
                Trainer._save_checkpoint(
                    self, model, trial
                )  # TRL's writes a model card into the run's folder too
            finally:
                self._saving = None
            self.name_best(folder)
            self.state.save_to_json(str(staging / saved_state.TRAINER_STATE))
            files.write_json(staging / saved_state.RUN_STATE, self._run_state().to_data())
        best = self.state.best_global_step if self.options.keeps_best else None
        checkpoints.delete_old(folder, run_id, self.options.keep_checkpoints, step, best)

    def name_best(self, folder: Path) -> None:
        """Give the best checkpoint its final name: Trainer noted the folder of its staging. Where
        the last step is kept, Trainer tells a best one that need not have been saved."""
        best = self.state.best_global_step
        named = str(folder / f"checkpoint-{best}") if best and self.options.keeps_best else None
        self.state.best_model_checkpoint = named

    def _run_state(self) -> saved_state.RunState:
        losses = [loss for _, loss, _ in self._gathered]
        return saved_state.RunState(
            epoch_rng=self.epoch_rng,
            evaluation_due=self.evaluation_due,
            epoch_ended=self.epoch_ended,
            loss_since_log=sum(losses) / len(losses),
            losses_since_log=losses,
            sums_since_log=[sums for *_, sums in self._gathered],
            last_logged=self._globalstep_last_logged,
            watch=self.watch.capture_state(),
            processes=ranks.count(),
        )

    def _load_from_checkpoint(self, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        if self.options.sharded:
            sharding.load_adapter(self.model, Path(checkpoint))
        else:
            with keep_types(self.model), attach.quiet_peft():  # PEFT loads in float32
                super()._load_from_checkpoint(checkpoint, *args, **kwargs)
            attach.check_adapter_complete(self.model, Path(checkpoint), "default")
        self.resumed = saved_state.RunState.read(Path(checkpoint) / saved_state.RUN_STATE)
        if self.resumed.processes != ranks.count():
            ui.warn(
                f"this run was saved by {self.resumed.processes} processes and goes on "
                f"with {ranks.count()}: its steps have the same rows, but sums are rounded "
                "otherwise, and dropout draws other numbers"
            )

    def name_best_metric(self) -> str:
        """Return what evaluations call the metric that tells the best step, the loss where none is
        asked for."""
        return f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        name = self.name_best_metric()
        if (
            self.args.metric_for_best_model and name not in metrics
        ):  # as of questions without answers where all have some
            ui.warn(
                f"the evaluation gives no {name}, by which the best step is told "
                "(training.metric_for_best_model): this one does not count"
            )
            return False
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if is_best and self.options.keeps_best:
            self.state.best_global_step = self.state.global_step
            self.control.should_save = True
        return is_best

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if ranks.is_first():
            self._refuse_unusable(best)
        with checkpoints.fetched(best, self.options.run_id) as here:
            if self.options.sharded:
                sharding.load_adapter(self.model, here)
                return
            self.state.best_model_checkpoint = str(here)
            with keep_types(self.model), attach.quiet_peft():
                super()._load_best_model()
            self.state.best_model_checkpoint = str(best)

    def _refuse_unusable(self, best: Path) -> None:
        found = checkpoints.read_checkpoint(best, self.options.run_id)
        if isinstance(found, checkpoints.Unusable):
            option = "--set training.keep=last"
            raise LoraError(
                f"the best model, {best}, cannot be loaded: {found.reason}",
                f"--resume {option} takes the last one instead",
            )

    def is_at_edge(self) -> bool:
        """Return whether the last step was the last of its epoch."""
        return float(self.state.epoch).is_integer()
