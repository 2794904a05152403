"""Unsloth's YAML (`unsloth train --config FILE`, and the defaults of its studio): what each key
becomes, by `unsloth_cli/config.py` and the trainer of its studio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_cli.common import quote
from lora_cli.translate import rules
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.rules import Rule, ask, leave, split_names, take, turn
from lora_cli.translate.source import Keys

MARKS = (
    *("training_type", "format_type", "local_dataset", "train_on_completions", "num_epochs"),
    *(
        "model_name",
        "random_seed",
        "finetune_language_layers",
        "vision_all_linear",
        "lora_r",
        "max_seq_length",
    ),
)
FORMATS = {
    "auto": "auto",
    "alpaca": "alpaca",
    "chatml": "messages",
    "conversational": "messages",
    "sharegpt": "sharegpt",
    "raw": "text",
}


def data_format(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the shape of a row."""
    if isinstance(value, str) and value in FORMATS:
        draft.take(keys, "data.format", FORMATS[value])
    else:
        draft.ask(keys, "data.format")


def local_files(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the files of rows, which go before a data set's name."""
    files = split_names(value)
    draft.take(keys, "data.path", files[0] if len(files) == 1 else files)


def named_set(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the data set's name on the hub."""
    if draft.get("data", "local_dataset") or draft.get("local_dataset"):
        draft.leave(keys, "local_dataset says which files are read")
    elif not isinstance(value, str):
        draft.ask(keys, "the name of a data set, or a file: data.path, or data.mix for several")
    else:
        draft.take(keys, "data.path", value)


def text_column(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the column of texts."""
    if value == "text":
        draft.tell(keys, Kind.taken, "as here")
    else:
        draft.take(keys, "data.columns", {"text": value})


def kind_of_training(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that an adapter is trained."""
    if value == "lora":
        draft.tell(keys, Kind.taken, "as here")
    else:
        draft.ask(
            keys,
            "Unsloth trains the whole model here, and lora an adapter, which wants a learning rate "
            "about ten times as high",
        )


def steps(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the number of steps; 0 leaves it to the epochs."""
    draft.take(keys, "training.max_steps", value or -1, "" if value else "as the epochs say")


def epochs(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the number of epochs; 0 leaves it to the steps."""
    if value:
        draft.take(keys, "training.num_train_epochs", value)
    else:
        draft.tell(keys, Kind.taken, "max_steps says how long")


def saves(draft: Draft, keys: Keys, value: Any) -> None:
    """Say when checkpoints are saved; 0 is at the end alone."""
    if value:
        draft.take(keys, "training.save_steps", value)
    else:
        draft.take(keys, "training.save_strategy", "no", "at the end alone")


def loss_on(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which tokens are learnt."""
    draft.take(keys, "data.train_on", "assistant" if rules.is_on(value) else "all")


def checkpointing(draft: Draft, keys: Keys, value: Any) -> None:
    """Say whether activations are computed anew; Unsloth's own way is lora's `true`."""
    on = rules.is_on(value)
    note = "Unsloth's also moves them to the CPU" if value == "unsloth" else ""
    draft.take(keys, "training.gradient_checkpointing", on, note)


def targets(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which modules get an adapter."""
    names = split_names(value)
    draft.take(keys, "lora.target_modules", "all-linear" if names == ["all-linear"] else names)


def towers(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that adapters stay out of what no text passes through."""
    if rules.is_on(value):
        draft.leave(keys, "of a model that reads pictures, too, lora trains the part for texts")
    else:
        draft.tell(keys, Kind.taken, "off, as here")


def part(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that a part of the layers is adapted, or is not."""
    if rules.is_on(value):
        draft.tell(keys, Kind.taken, "as lora.target_modules says")
    else:
        draft.ask(keys, "leave the modules of this part out of lora.target_modules")


def tracker(name: str) -> Rule:
    """Return the rule for a switch that logs the run elsewhere, too."""
    return turn("training.report_to", name)


def wandb_project(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the project, where wandb is used."""
    if rules.is_on(draft.get("logging", "enable_wandb") or draft.get("enable_wandb")):
        draft.ask(keys, f"export WANDB_PROJECT={quote(value)}")
    else:
        draft.leave(keys, "enable_wandb is off")


IN_SECTIONS: Mapping[str, Rule] = {
    "model": take("model.name_or_path"),
    "data.dataset": named_set,
    "data.local_dataset": local_files,
    "data.format_type": data_format,
    "training.training_type": kind_of_training,
    "training.max_seq_length": take("training.max_length"),
    "training.load_in_4bit": rules.quantised,
    "training.output_dir": take("output_dir"),
    "training.num_epochs": epochs,
    "training.batch_size": take("training.per_device_train_batch_size"),
    "training.max_steps": steps,
    "training.save_steps": saves,
    "training.random_seed": take("training.seed"),
    "training.packing": rules.pack(),
    "training.train_on_completions": loss_on,
    "training.gradient_checkpointing": checkpointing,
    "training.trust_remote_code": rules.TRAINER["trust_remote_code"],
    "lora.lora_r": take("lora.r"),
    "lora.lora_alpha": take("lora.lora_alpha"),
    "lora.lora_dropout": take("lora.lora_dropout"),
    "lora.target_modules": targets,
    "lora.vision_all_linear": ask(
        "of a model that reads pictures, too, lora trains the part for texts, on rows of texts"
    ),
    "lora.use_rslora": turn("lora.use_rslora", True),
    "lora.use_loftq": turn("lora.init_lora_weights", "loftq"),
    "lora.use_dora": rules.dora,
    "lora.finetune_vision_layers": towers,
    "lora.finetune_language_layers": part,
    "lora.finetune_attention_modules": part,
    "lora.finetune_mlp_modules": part,
    "logging.enable_wandb": tracker("wandb"),
    "logging.wandb_project": wandb_project,
    "logging.wandb_token": rules.secret,
    "logging.hf_token": rules.secret,
    "logging.enable_tensorboard": tracker("tensorboard"),
    "logging.tensorboard_dir": leave("lora keeps what it logs in the run's folder"),
    "logging.log_frequency": take("training.logging_steps"),
    "inference": ask("lora generate and lora chat have these as options"),
}
RULES: Mapping[str, Rule] = {
    "model_name": take("model.name_or_path"),
    "dtype": take("model.dtype"),
    "full_finetuning": ask(
        "lora trains an adapter, which wants a learning rate about ten times as high"
    ),
    "r": take("lora.r"),
    "lora_target_modules": targets,
    "bias": take("lora.bias"),
    "lora_bias": take("lora.bias"),
    "use_gradient_checkpointing": checkpointing,
    "random_state": take("training.seed"),
    "loftq_config": ask("lora.init_lora_weights: loftq"),
    "dataset_text_field": text_column,
    "chat_template": rules.template,
    **{name.rpartition(".")[2]: rule for name, rule in IN_SECTIONS.items()},
    **IN_SECTIONS,
}
"""Also of a file without sections, with the names that `FastLanguageModel` and its trainer have."""
DEFAULTS: Mapping[str, Any] = {
    "method": "qlora",
    "lora.r": 64,
    "lora.lora_alpha": 16,
    "lora.target_modules": [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ],
    "data.train_on": "all",
    "data.on_long_row": "truncate",
    "training.lr_scheduler_type": "linear",
    "training.optim": "adamw_8bit",
    "training.num_train_epochs": 3.0,
    "training.per_device_train_batch_size": 2,
    "training.gradient_accumulation_steps": 4,
    "training.warmup_steps": 5,
    "training.weight_decay": 0.01,
    "training.max_length": 2048,
    "training.seed": 3407,
}
"""What Unsloth does where its file says nothing, and lora would do something else."""


def pass_on(draft: Draft, keys: Keys, value: Any) -> bool:
    """Take a key of the training that Unsloth hands to TRL; return whether it is one."""
    is_trainers = len(keys) == 1 or keys[0] in ("training", "sftconfig")
    return is_trainers and rules.pass_on(draft, keys, value)


def finish(draft: Draft) -> None:
    """Say what no single key says."""
    given = dict(draft.source.data)
    for section in draft.source.data.values():
        given |= section if isinstance(section, dict) else {}
    if given.get("load_in_4bit") is False and "method" not in draft.values:
        draft.values["method"] = "lora"
        draft.reasons["method"] = "load_in_4bit: false"
    if draft.values.get("method") == "dora" and "load_in_4bit" not in given:
        draft.values["method"] = "qdora"
    if draft.values.get("training.max_steps", -1) != -1:
        draft.put_default("training.num_train_epochs", 1)
