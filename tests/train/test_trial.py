"""The miniature that is trained before the model is loaded: it refuses what the libraries refuse,
each time of the key that is to blame, and nothing else.

Compared with transformers' own schedules and optimisers, asked by themselves. Hermetic: no model is
loaded but in the last test. Alone: pytest tests/train/test_trial.py
"""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments, get_scheduler, trainer
from transformers.models.llama import modeling_llama
from transformers.trainer_utils import SchedulerType

from lora_cli.common.errors import LoraError, UsageError
from lora_cli.models.base import Base
from lora_cli.recipe.load import load_recipe
from lora_cli.train import run, trial

REFUSED = {
    "adam_beta1: 2.0": ("adam_beta1 was rejected by torch", "change or remove it"),
    "optim: schedule_free_adamw": ("optim was rejected", "pip install schedulefree"),
    "optim: galore_adamw": ("optim was", "pip install git+https://github.com/jiaweizzhao/GaLore"),
    "optim: adamw_anyprecision": ("optim was", "pip install git+https://github.com/pytorch/tor"),
    "optim_args: nonsense": ("optim_args was rejected", "change or remove it"),
    "optim_args: 'nonsense=1'": ("optim_args has no effect with optim: adamw_torch_fused", "remove it"),
    "use_liger_kernel: true": ("use_liger_kernel was", "pip install liger-kernel"),
    "lr_scheduler_type: warmup_stable_decay": ("'num_decay_steps'", "are num_decay_steps, num_sta"),
    "lr_scheduler_type: constant, lr_scheduler_kwargs: {power: 2}": ("has no effect", "remove it"),
    "neftune_noise_alpha: -1": ("neftune_noise_alpha was rejected", "change or remove it"),
    "gradient_checkpointing: true, gradient_checkpointing_kwargs: {reentrant: 1}": (
        "gradient_checkpointing_kwargs was rejected", "change or remove it"),
    "dataloader_persistent_workers: true": ("persistent_workers option needs", "change or remove"),
    "dataloader_num_workers: 1, dataloader_multiprocessing_context: forc": (
        "dataloader_multiprocessing_context was rejected", "change or remove it"),
    "torch_compile_mode: max": ("training.torch_compile_mode: Unrecognized mode", "remove it"),
    "push_to_hub: true, hub_model_id: a b": ("Repo id must use alphanumeric", "change or remove it"),
    "log_level: loud": ("log_level was rejected", "change or remove it"),
    "eval_accumulation_steps: 0": ("eval_accumulation_steps was rejected", "change or remove it"),
    "per_device_eval_batch_size: -1": ("per_device_eval_batch_size was rejected", "change or"),
    "metric_for_best_model: acuracy": ("no evaluation gives acuracy; there are loss, perp", "loss"),
    "metric_for_best_model: eval_perplexty": ("no evaluation gives", "did you mean perplexity?"),
    "activation_checkpointing: true, activation_checkpointing_kwargs: {every_n_layers: 0}": (
        "ZeroDivisionError", "change or remove r.yaml:3: training.activation_checkpointing or"),
}  # fmt: skip
"""What is added to `training`, and what of the message and of the hint it gets."""
ACCEPTED = (
    "metric_for_best_model: loss, keep: best, save_strategy: epoch",
    "metric_for_best_model: eval_perplexity, greater_is_better: false, save_strategy: best",
    "optim: sgd, optim_args: 'momentum=0.9', loraplus_lr_ratio: 16",
    "optim: adamw_bnb_8bit, optim_target_modules: [c_attn]",
    "dataloader_num_workers: 2, dataloader_persistent_workers: true, dataloader_prefetch_factor: 2",
    "dataloader_num_workers: 2, dataloader_multiprocessing_context: spawn",
    "dataloader_drop_last: true, per_device_train_batch_size: 64, packing: false",
    "packing: true, packing_strategy: wrapped, dataset_num_proc: 2",
    "eos_token: </s>, pad_token: <pad>, label_smoothing_factor: 0.1, neftune_noise_alpha: 5",
    "router_aux_loss_coef: 0.1, stop_on_loss_above: 0.001, gradient_accumulation_steps: 9",
    "lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 50}",
    "eval_strategy: steps, eval_steps: 0.5, eval_on_start: true, include_for_metrics: [inputs]",
    "torch_compile: true, full_determinism: true, debug: underflow_overflow",
)


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`attempt(text)` tries a recipe with this in `training`; returns its refusal, or None."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Base, "load", None)
    datasets.disable_progress_bars()  # as the command line does

    def run(text: str, model: str = "") -> LoraError | None:
        Path("r.yaml").write_text(
            f"model: {{name_or_path: base{model}}}\ndata: {{path: r.jsonl, eval_path: r.jsonl}}\n"
            f"training: {{{text}}}\n"
        )
        try:
            trial.try_training(load_recipe(Path("r.yaml")))
        except LoraError as error:
            return error
        return None

    return run


@pytest.mark.parametrize("text", REFUSED)
def test_what_the_libraries_refuse_is_said_of_its_key(attempt, text: str) -> None:
    error = attempt(text)
    message, hint = REFUSED[text]
    assert isinstance(error, UsageError)
    assert message in error.message
    assert hint in error.hint
    # the command line puts the place before a message that begins with its key
    assert "r.yaml:3: training." in error.message + error.hint or error.message[:9] == "training."


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_trains_is_accepted_in_silence(attempt, text: str, capfd, tmp_path: Path) -> None:
    assert attempt(text) is None
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_what_a_library_replaces_in_the_trial_does_not_last(
    attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger's kernels, left in the process, ran on the plan's tensors without memory: on a GPU that
    ends the process's CUDA."""
    applied, before = [], modeling_llama.apply_rotary_pos_emb

    def apply(model, config) -> None:
        applied.append(config)
        modeling_llama.apply_rotary_pos_emb = before_again

    def before_again(*given, **more):
        return before(*given, **more)

    monkeypatch.setattr(trainer, "apply_liger_kernel", apply)
    assert attempt("use_liger_kernel: true") is None
    assert applied == [{"fused_linear_cross_entropy": False}]
    assert modeling_llama.apply_rotary_pos_emb is before


@pytest.mark.parametrize("arguments", ["{}", "{num_cycles: 2}", "{min_lr: 1e-5}", "{lr_end: 1}"])
def test_schedules_are_refused_where_transformers_refuses_them(attempt, arguments: str) -> None:
    given = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=2e-4)
    values = {} if arguments == "{}" else dict([arguments.strip("{}").split(": ")])
    numbers = {name: float(value) for name, value in values.items()}
    asked = 0
    for kind in SchedulerType:
        if str(kind.value).startswith("constant"):
            continue  # transformers ignores their arguments, and lora says so
        try:
            get_scheduler(kind, given, 3, 100, numbers)
            refused = False
        except (TypeError, ValueError):
            refused = True
        text = f"lr_scheduler_type: {kind.value}, lr_scheduler_kwargs: {arguments}"
        assert (attempt(text) is not None) is refused, kind
        asked += refused
    assert asked >= 3


def test_optimisers_are_refused_where_transformers_refuses_them(attempt, tmp_path: Path) -> None:
    names = ("adafactor", "sgd", "adagrad", "rmsprop", "lion_8bit", "ademamix", "lomo", "grokadamw")
    refused = []
    for name in names:
        try:
            Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name))
        except (ImportError, ValueError):
            refused.append(name)
    assert [name for name in names if attempt(f"optim: {name}")] == refused


def test_attention_that_is_not_installed_is_refused(attempt) -> None:
    error = attempt("", ", attn_implementation: flash_attention_2")
    assert "model.attn_implementation was rejected by transformers" in error.message
    assert error.hint == "pip install flash-attn"
    assert attempt("", ", attn_implementation: eager") is None


def test_a_recipe_of_known_values_costs_nothing(attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_train_miniature", None)
    assert attempt("learning_rate: 1e-3, max_steps: 5, save_total_limit: 1, seed: 3") is None


def test_what_no_key_is_to_blame_for_is_left_to_the_run(
    attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the machine's, not the recipe's")

    monkeypatch.setattr(trial, "_build_miniature", fail)
    assert attempt("weight_decay: 0.1") is None


def test_a_run_is_the_same_after_a_trial(write_recipe, tmp_path: Path) -> None:
    """`weight_decay: 0.0` is the default: all it does is to have the miniature trained."""
    made = []
    for number, text in enumerate(("seed: 3", "seed: 3, weight_decay: 0.0")):
        folder = tmp_path / f"run{number}"
        recipe = write_recipe(f"training: {{{text}}}\noutput_dir: {folder}\n")
        adapter = run.train(load_recipe(recipe))
        made.append((adapter / "adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]
