"""Train a miniature for one step as the recipe says, before the recipe's own model is loaded.

A recipe reaches every field of TRL's and transformers' configurations, and most of their values are
looked at only when something uses them: a schedule's arguments, an optimiser's package, the metric
that is best, what a loader of rows needs. So all of it is used once, by the run's own trainer on a
network of some thousand weights, and what is refused there is said of the keys without which it is
not.
"""

from __future__ import annotations

import gc
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import constants, get_token
from huggingface_hub.utils._validators import validate_repo_id
from peft import LoraConfig, PeftModel
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.llama import modeling_llama
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import SchedulerType

from lora_cli.common import UsageError, files, find_nearest, library_errors, ui
from lora_cli.data import preferences, unpaired
from lora_cli.models import attach
from lora_cli.plan import auto, configurations, flops
from lora_cli.recipe import DEFAULT_TASK, Recipe, upstream
from lora_cli.speed import install
from lora_cli.train import collators, pair_batches, setup, unpaired_batches
from lora_cli.train.options import RunOptions
from lora_cli.train.step_numbers import NonFiniteError
from lora_cli.train.task_trainer import find_trainer

WORDS = 16
LENGTH = 8
ROWS = 2
STEPS = 10_000
"""Schedules are made for a run of so many steps where the recipe does not say how many."""
OTHERS = {
    "report_to": [],  # whether they are installed is known
    "push_to_hub": False,
    "dataset_num_proc": None,
    "dataloader_drop_last": False,
    "eos_token": None,
    "pad_token": None,
    "router_aux_loss_coef": None,
}
"""Arguments that speak of the run's own model, rows or surroundings, and what the miniature has."""
UNUSED = {
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "eval_strategy": "no",
    "eval_on_start": False,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": None,
    "dataloader_persistent_workers": False,
    "dataloader_multiprocessing_context": None,
}
"""Arguments that the trainer and its loaders are made with, and the miniature is trained without:
nothing is saved, no process is started, and the evaluation comes at the end."""
TRAINERS_OWN = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
"""Arguments of a schedule that the trainer gives."""


class StopAtOnce(TrainerCallback):
    """Ends a training after its first step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = True


def try_training(recipe: Recipe) -> None:
    """Raise UsageError for values of `training` that the libraries refuse, or cannot use here.

    A recipe that sets none of those which only the libraries can judge costs nothing. What goes
    wrong whichever key is left out is none of the recipe's, and the run itself will say it.
    """
    configurations.try_configurations(recipe)
    given = recipe.list_untried()
    error = _find_refusal(recipe) if given else None
    if isinstance(error, UsageError):
        raise error
    if error is None:
        return
    others = {keys: _find_refusal(recipe.leave_out(*keys)) for keys in given}
    mended = [keys for keys, other in others.items() if other is None]
    changed = [keys for keys, other in others.items() if repr(other) != repr(error)]
    if blamed := mended or changed:
        places = [recipe.where(*keys) for keys in blamed]
        hint = _list_arguments(recipe, [key for _, key in blamed])
        raise library_errors.blame(error, places, hint, UsageError) from error


def _find_refusal(recipe: Recipe) -> Exception | None:
    """Return what is raised when the miniature is trained as the recipe says, or None."""
    metrics = recipe.task_row.metrics
    recipe = recipe.model_copy(update={"task": DEFAULT_TASK.name})  # as the miniature does
    recipe, _ = auto.settle(recipe)
    with (
        files.scratch_folder() as folder,
        warnings.catch_warnings(),
        ui.hush(),
        attach.quiet_peft(),
        _keep_module(modeling_llama),
    ):
        warnings.simplefilter("ignore")  # the run says them again
        gc.freeze()  # the trainer collects garbage, which takes longer than all else
        try:
            _train_miniature(recipe, folder, metrics)
        except NonFiniteError:  # numbers of the miniature's own
            return None
        except Exception as error:  # of any type: it is a library's answer to a value
            return error
        finally:
            gc.unfreeze()
    return None


@contextmanager
def _keep_module(module: ModuleType) -> Iterator[None]:
    """Put back after the block what is replaced in a module inside, such as by Liger's kernels,
    which end what then computes with fake tensors."""
    before = dict(vars(module))
    try:
        yield
    finally:
        vars(module).update(before)


def _train_miniature(recipe: Recipe, folder: Path, metrics: Sequence[str]) -> None:
    """Make the recipe's trainer around a miniature, train it for a step and evaluate it."""
    arguments = upstream.build_training_arguments(recipe)
    _refuse_idle_arguments(recipe, arguments)
    _refuse_upload(recipe, arguments)
    adapted = _build_miniature(recipe)
    tokenizer = _make_tokenizer()
    evaluates = recipe.data.evaluates
    trainer = find_trainer(recipe)(
        _make_options(recipe),
        model=adapted,
        args=_adjust(arguments, folder),
        train_dataset=_make_rows(recipe),
        eval_dataset=_make_rows(recipe) if evaluates else None,
        processing_class=tokenizer,
        data_collator=collators.make_collator(recipe, tokenizer, LENGTH * ROWS),
    )
    trainer.get_train_dataloader()
    if evaluates:
        trainer.get_eval_dataloader()
    for name, none in UNUSED.items():
        setattr(arguments, name, none)
    trainer.add_callback(StopAtOnce())
    trainer.train()
    if evaluates:
        given = [name for name in trainer.evaluate() if name.startswith("eval_")]
        _refuse_unknown_metric(recipe, [*given, *metrics])
    if (options := upstream.read_compile_options(recipe)) is not None:
        install.compile_layers(adapted, options)


def _adjust(arguments: Any, folder: Path) -> Any:
    """Return the arguments, changed to those of the miniature's run in a folder."""
    arguments.output_dir = str(folder)
    if arguments.max_steps < 0:
        arguments.max_steps = STEPS
    for name, value in OTHERS.items():
        if hasattr(arguments, name):
            setattr(arguments, name, value)
    if arguments.optim_target_modules is not None:
        arguments.optim_target_modules = "all-linear"
    return arguments


def _build_miniature(recipe: Recipe) -> PeftModel:
    """Return a small Llama with a fresh adapter."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        dtype=getattr(torch, recipe.model.dtype),
        attn_implementation=recipe.model.attn_implementation or "sdpa",
    )
    network = LlamaForCausalLM(config).to(config.dtype)
    network.config.use_cache = False
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type=recipe.task_row.peft_type)
    return attach.attach_adapter(network, lora, recipe.lora.autocast_adapter_dtype)


def _make_tokenizer() -> LlamaTokenizer:
    """Return a tokenizer of WORDS words."""
    vocabulary = {str(number): number for number in range(WORDS)}
    special = {"unk_token": "0", "bos_token": "0", "eos_token": "1", "pad_token": "2"}
    return LlamaTokenizer(vocab=vocabulary, merges=[], **special)


def _make_rows(recipe: Recipe) -> Any:
    """Return ROWS rows of LENGTH tokens, all with loss; pairs of halves where rows have two."""
    ids = [list(range(3, 3 + LENGTH))] * ROWS
    rows: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if recipe.objective_row.unpaired:
        wanted = Dataset.from_dict(rows | {unpaired.DESIRABLE: [[1], [0]] * (ROWS // 2)})
        return unpaired_batches.HeldAgainst(wanted, torch.full((ROWS, 2), -1.0), LENGTH)
    if recipe.objective_row.compares:
        rows |= {preferences.DOCUMENTS: [[LENGTH // 2] * 2] * ROWS}
    if recipe.objective_row.needs_reference:
        rows |= {pair_batches.REFERENCE: [[-1.0, -1.0]] * ROWS}
    return Dataset.from_dict(rows)


def _make_options(recipe: Recipe) -> RunOptions:
    """Return what the recipe asks of its trainer, without what ends or slows a run."""
    return RunOptions(
        run_id="trial",
        work=flops.Work(1.0, None),
        keep_checkpoints=None,
        loss_limit=None,
        reduce_on_oom=False,
        own_loss_head=recipe.training.loss_head == "trained_tokens",
        loraplus=setup.read_loraplus(recipe),
        dora_layers=[],
        preference=recipe.preference if recipe.objective_row.compares else None,
    )


def _refuse_idle_arguments(recipe: Recipe, arguments: Any) -> None:
    """Raise UsageError for arguments that the optimiser or the schedule would not be given."""
    place = recipe.where("training", "lr_scheduler_kwargs")
    if arguments.lr_scheduler_kwargs and str(arguments.lr_scheduler_type.value).startswith("const"):
        kind = arguments.lr_scheduler_type.value
        raise UsageError(f"{place} has no effect with lr_scheduler_type: {kind}", "remove it")
    if arguments.optim_args:
        place = recipe.where("training", "optim_args")
        network: Any = torch.nn.Linear(1, 1)
        given = Trainer.get_optimizer_cls_and_kwargs(arguments, network)
        kept, arguments.optim_args = arguments.optim_args, None
        without = Trainer.get_optimizer_cls_and_kwargs(arguments, network)
        arguments.optim_args = kept
        if given == without:
            raise UsageError(
                f"{place} has no effect with optim: {recipe.training.optim}", "remove it"
            )


def _refuse_upload(recipe: Recipe, arguments: Any) -> None:
    """Raise UsageError where what is to be uploaded could not be."""
    if not arguments.push_to_hub:
        return
    if arguments.hub_model_id:
        validate_repo_id(arguments.hub_model_id)
    place = recipe.where("training", "push_to_hub")
    if constants.is_offline_mode():
        raise UsageError(f"{place}: the hub is not asked: offline", "unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise UsageError(f"{place} needs a token that may write", "hf auth login")


def _refuse_unknown_metric(recipe: Recipe, metrics: Sequence[str]) -> None:
    """Raise UsageError where no evaluation gives the metric that tells the best model."""
    given = getattr(recipe.training, "metric_for_best_model", None)
    known = [name.removeprefix("eval_") for name in metrics]
    if given is None or given.removeprefix("eval_") in known:
        return
    guess = find_nearest(given.removeprefix("eval_"), known)
    place = recipe.where("training", "metric_for_best_model")
    raise UsageError(
        f"{place}: no evaluation gives {given}; there are {', '.join(known)}",
        f"did you mean {guess}?" if guess else "--set training.metric_for_best_model=loss",
    )


def _list_arguments(recipe: Recipe, keys: list[str]) -> str | None:
    """Return as a hint which arguments the recipe's schedule takes, where that is refused."""
    name = recipe.training.lr_scheduler_type
    if not any(key.startswith("lr_scheduler") for key in keys):
        return None
    takes = dict(inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(name)]).parameters)
    if "kwargs" in takes and name == SchedulerType.REDUCE_ON_PLATEAU:
        takes = dict(inspect.signature(torch.optim.lr_scheduler.ReduceLROnPlateau).parameters)
    own = [key for key in takes if key not in (*TRAINERS_OWN, "kwargs")]
    return f"the arguments of {name} are {', '.join(own)}" if own else None
