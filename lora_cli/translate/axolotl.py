"""axolotl's YAML: what each of its keys becomes, by its schemas (axolotl/utils/schemas) and the
arguments that its builder makes of them (axolotl/core/builders/base.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_cli.common import quote
from lora_cli.translate import rules
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.rows import RowsDraft, open_rows, put_rows
from lora_cli.translate.rules import Rule, ask, expect, leave, refuse, take, turn
from lora_cli.translate.source import Keys

MARKS = ("base_model", "micro_batch_size", "sequence_len", "num_epochs", "sample_packing")
PASSED_ON = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "weight_decay", "seed"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_drop_last", "optim_args", "optim_target_modules", "remove_unused_columns"),
    *("gradient_accumulation_steps", "learning_rate", "loraplus_lr_ratio", "loraplus_lr_embedding"),
    *("save_only_model", "max_steps", "save_steps", "eval_steps", "save_strategy", "eval_strategy"),
    *(
        "save_total_limit",
        "logging_steps",
        "early_stopping_patience",
        "neftune_noise_alpha",
        "tf32",
    ),
    *("metric_for_best_model", "greater_is_better", "lr_scheduler_kwargs", "torch_compile"),
    *("torch_compile_backend", "torch_compile_mode", "accelerator_config", "warmup_steps"),
    *("ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters"),
    *("gradient_checkpointing_kwargs", "hub_strategy", "activation_offloading"),
)
"""Keys that reach transformers' arguments, or PEFT's, under their own names."""


def adapter(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the method."""
    if value == "qlora":
        rules.quantised(draft, keys, True)
    elif value == "lora":
        draft.take(keys, "method", draft.values.get("method", "lora"))
    else:
        draft.ask(keys, "lora trains LoRA and DoRA adapters: method: lora is written")


def targets(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which modules get an adapter."""
    if value in ("all-linear", "all_linear"):
        draft.take(keys, "lora.target_modules", "all-linear")
    elif not rules.is_on(draft.get("lora_target_linear")):
        draft.take(keys, "lora.target_modules", value)
    elif re.search("embed|lm_head", str(value)):
        draft.ask(keys, "all-linear, as lora_target_linear says, is without embeddings and head")
    else:
        draft.tell(keys, Kind.taken, "lora_target_linear adds the other linear layers: all-linear")


def loss_on(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which tokens are learnt."""
    draft.take(keys, "data.train_on", "all" if rules.is_on(value) else "assistant")


def per_epoch(kind: str) -> Rule:
    """Return the rule for so many evaluations, or checkpoints, in each epoch."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if kind == "eval" and not draft.get("val_set_size") and not draft.get("test_datasets"):
            draft.leave(keys, "no rows are held out: data.eval_fraction would")
            return
        epochs = draft.get("num_epochs") or 1
        if not value:
            draft.tell(keys, Kind.taken, "none, as here")
            return
        if not (rules.is_number(value) and value > 0 and rules.is_number(epochs) and epochs > 0):
            draft.ask(keys, f"training.{kind}_strategy, or training.{kind}_steps")
            return
        share = round(1 / (value * epochs), 6)
        if share >= 1:
            draft.take(keys, f"training.{kind}_strategy", "epoch")
        else:
            draft.take(keys, f"training.{kind}_steps", share, "a share of all steps")
            draft.values[f"training.{kind}_strategy"] = "steps"
            draft.reasons[f"training.{kind}_strategy"] = str(keys[-1])

    return rule


def checkpointing(draft: Draft, keys: Keys, value: Any) -> None:
    """Say whether activations are computed anew; where they are kept meanwhile is another key."""
    if value in ("offload", "offload_disk"):
        draft.take(keys, "training.gradient_checkpointing", True, "axolotl's also moves them away")
    else:
        rules.pass_on(draft, keys, value)


def attention(kernel: str) -> Rule:
    """Return the rule for a switch that chooses an attention kernel."""
    note = "auto takes flash attention where it is installed" if kernel == "auto" else ""
    return turn("model.attn_implementation", kernel, note)


def special_tokens(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the tokens that fill and end rows."""
    if not isinstance(value, dict):
        draft.ask(keys, "training.pad_token, training.eos_token")
        return
    for name, token in value.items():
        inner = (*keys, name)
        if token in rules.EMPTY:
            draft.tell(inner, Kind.empty, "")
        elif name in ("pad_token", "eos_token"):
            draft.take(inner, f"training.{name}", token)
        else:
            draft.leave(inner, "lora keeps the tokenizer's own; most bases have this one")


def watch_loss(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that lora's watch has no patience."""
    draft.leave(
        keys,
        f"training.stop_on_loss_above: {value} stops at the first such step; add it if you like",
    )


KERNELS = ("LigerPlugin", "CutCrossEntropyPlugin")
"""Plugins that make the same training faster."""


def plugged(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that lora has no plugins, and needs none for what is a kernel."""
    names = value if isinstance(value, list) else [value]
    if all(str(name).rpartition(".")[2] in KERNELS for name in names):
        draft.leave(keys, "faster kernels: see training.loss_head and training.use_liger_kernel")
    else:
        draft.ask(keys, "lora has none: see training.loss_head and training.use_liger_kernel")


def long_rows(draft: Draft, keys: Keys, value: Any) -> None:
    """Say what becomes of rows that are too long."""
    known = {"drop": "drop", "truncate": "truncate", "raise": "error"}
    if isinstance(value, str) and value in known:
        draft.take(keys, "data.on_long_row", known[value])
    else:
        draft.ask(keys, "data.on_long_row: drop, truncate, split or error")


def report_to_wandb(draft: Draft, keys: Keys, value: Any) -> None:
    """Say where the run is logged; the project's name is wandb's own to read."""
    draft.values["training.report_to"] = "wandb"
    draft.reasons["training.report_to"] = str(keys[-1])
    draft.ask(keys, f"training.report_to: wandb is written; export WANDB_PROJECT={quote(value)}")


def upload(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that the run is uploaded, privately as axolotl does."""
    draft.take(keys, "training.hub_model_id", value)
    for name in ("push_to_hub", "hub_private_repo"):
        draft.values[f"training.{name}"] = True
        draft.reasons[f"training.{name}"] = str(keys[-1])


def preferred(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that pairs of answers are compared; other ways to train on preferences are refused."""
    if value in ("dpo", "ipo"):
        rules.prefer(draft, keys, "sigmoid" if value == "dpo" else "ipo")
    elif value in ("orpo", "simpo", "kto"):
        rules.prefer(draft, keys, value, rules.ANSWER_ALONE if value == "orpo" else "")
    else:
        refuse("a training on rewards, and not on answers")(draft, keys, value)


def weigh_odds(draft: Draft, keys: Keys, value: Any) -> None:
    """Say how much the odds weigh, which `rl_beta` says first."""
    if draft.get("rl_beta") is None:
        draft.take(keys, "preference.beta", value)
    else:
        draft.leave(keys, "rl_beta goes before it")


def read_datasets(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which rows are trained on."""
    if keys == ("datasets",) and draft.get("pretraining_dataset"):
        draft.leave(keys, "pretraining_dataset goes before it, as in axolotl")
        return
    if keys == ("pretraining_dataset",):
        _stream(draft)
    if keys == ("pretraining_dataset",) and isinstance(value, str):
        draft.take(keys, "data.path", value)
        draft.values["data.format"] = "text"
        draft.reasons["data.format"] = "pretraining_dataset has texts"
        return
    entries = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    if not entries:
        draft.ask(keys, "axolotl's list of data sets: data.path")
        return
    drafts = open_rows(draft, len(entries))
    for index, (entry, rows) in enumerate(zip(entries, drafts)):
        for name, inner in entry.items():
            _read_dataset_key(rows, (*keys, index, name), name, inner)
        _name_path(rows, (*keys, index), entry)
    put_rows(draft, drafts, keys)


def _stream(draft: Draft) -> None:
    """Say that rows are read while training, as axolotl reads what is to be pretrained on."""
    draft.values["data.streaming"] = True
    draft.reasons["data.streaming"] = "pretraining_dataset is read while training"


def _name_path(rows: RowsDraft, keys: Keys, entry: dict[str, Any]) -> None:
    """Say where the rows lie: `data_files` goes before `path`, which then names a loader."""
    files = entry.get("data_files")
    if files:
        single = isinstance(files, list) and len(files) == 1
        rows.take((*keys, "data_files"), "path", files[0] if single else files)
        if entry.get("path"):
            rows.draft.leave((*keys, "path"), "data_files says which files are read")
    elif entry.get("path"):
        rows.take((*keys, "path"), "path", entry["path"])


TYPES = {
    "alpaca": ("alpaca", "alpaca"),
    "chat_template": ("messages", None),
    "sharegpt": ("sharegpt", None),
    "completion": ("text", None),
    "pretrain": ("text", None),
}
"""axolotl's types of data sets: lora's format, and the template that goes with it."""
STYLES: Mapping[str, str | None] = {"chatml": "chatml", "chat": None, "phi": None}
"""What may stand after `alpaca:` beside `instruct`, which is Alpaca's own prompt: the template of
that prompt, where lora has it (axolotl/prompters.py)."""
COLUMNS = {
    "field": "text",
    "text_column": "text",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "field_tools": "tools",
}


OF_PAIRS = {
    "field_prompt": "prompt",
    "field_chosen": "chosen",
    "field_rejected": "rejected",
    "field_completion": "completion",
    "field_label": "label",
}
"""axolotl's keys of columns that pairs of answers, and answers with a label, have alone."""
PAIRS: Mapping[str, str | None] = {
    "chat_template.default": "messages",
    "chat_template.argilla": None,
    "chat_template.argilla_chat": None,
    **{
        f"{template}.{name}": prompt
        for template in ("chatml", "llama3")
        for name, prompt in {
            "argilla_chat": None,
            "prompt_pairs": None,
            "ultra": None,
            "intel": "question",
            "icr": "input",
        }.items()
    },
}
"""axolotl's types of pairs, and where each has the prompt, unless that is in the column prompt, or
in both answers (axolotl/prompt_strategies/dpo)."""


LABELLED: Mapping[str, str | None] = {
    f"{template}.{name}": "question" if name == "intel" else None
    for template in ("chatml", "llama3")
    for name in ("argilla", "intel", "prompt_pairs", "ultra")
}
"""… and the same of its types of answers with a label (axolotl/prompt_strategies/kto); that of
argilla is in the column instruction, which is read as here."""


def _read_dataset_key(rows: RowsDraft, keys: Keys, name: str, value: Any) -> None:
    """Say what a key of a data set becomes."""
    if value in rules.EMPTY:
        rows.draft.tell(keys, Kind.empty, "")
    elif name in ("path", "data_files"):
        return
    elif name == "type":
        _read_type(rows, keys, value)
    elif name in ("name", "split", "revision"):
        rows.take(keys, name, value)
    elif name in COLUMNS:
        rows.name_column(keys, COLUMNS[name], value)
    elif name in OF_PAIRS and _has_pairs(rows):
        rows.name_column(keys, OF_PAIRS[name], value)
    elif name in ("field_messages", *ROLE_KEYS):
        _read_message_key(rows, keys, name, value)
    else:
        _read_rare_key(rows, keys, name, value)


def _read_type(rows: RowsDraft, keys: Keys, value: Any) -> None:
    """Say the format of the rows, and the template that goes with it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _read_dataset_key(rows, (*keys, name), name, inner)
        if not _has_pairs(rows):
            rows.values["format"] = "alpaca"
        return
    if _has_pairs(rows):
        _read_type_of_pairs(rows, keys, str(value))
        return
    kind, _, style = str(value).partition(":")
    kind = kind.partition(".")[0]
    if kind not in TYPES:
        rows.draft.ask(keys, "lora has no format of this name: data.format, or data.columns")
        return
    form, chat_template = TYPES[kind]
    rows.take(keys, "format", form)
    if chat_template and not rows.draft.get("chat_template"):
        _read_prompt(rows, keys, value, STYLES.get(style, chat_template))


def _read_prompt(rows: RowsDraft, keys: Keys, value: Any, chat_template: str | None) -> None:
    """Say the template of the prompt that a type of data sets has, unless others are beside it."""
    draft = rows.draft
    if chat_template is None:
        draft.ask(
            keys, "its prompt as a template is yours to write: model.chat_template: FILE.jinja"
        )
    elif _has_its_own_template(draft, str(keys[0])):
        draft.ask(
            keys,
            f"a recipe has one chat template for all its rows: the model's own is kept for the "
            f"chats beside these; model.chat_template: {chat_template} is this prompt",
        )
    else:
        draft.values["model.chat_template"] = chat_template
        draft.reasons["model.chat_template"] = f"type: {value} has this prompt"


def _has_pairs(rows: RowsDraft) -> bool:
    return rules.is_on(rows.draft.get("rl"))


def _read_type_of_pairs(rows: RowsDraft, keys: Keys, value: str) -> None:
    """Say where pairs have their prompt, and the template that goes with their type."""
    unpaired = rows.draft.get("rl") == "kto"
    known = LABELLED if unpaired else PAIRS
    if value not in known:
        read = "prompt, completion and label" if unpaired else "prompt, chosen and rejected"
        rows.draft.ask(
            keys,
            f"lora reads {read}, texts or turns; data.columns: {{prompt: …}} says what yours are "
            "called",
        )
        return
    prompt, what = known[value], "answers" if unpaired else "pairs"
    if prompt is None or "field_messages" in _find_entry(rows, keys):
        rows.draft.tell(keys, Kind.taken, f"as here: {what}, texts or turns")
    else:
        rows.name_column(keys, "prompt", prompt)
    if rows.draft.get("chat_template"):
        return
    if value.startswith("chatml."):
        rows.draft.values["model.chat_template"] = "chatml"
        rows.draft.reasons["model.chat_template"] = f"type: {value} has this prompt"
    elif value.startswith("llama3."):
        rows.draft.ask(
            keys,
            f"the {what} are read as here; their prompt is that of Llama 3's instruct models: for "
            "a base without a template, model.chat_template: FILE.jinja",
        )


def _find_entry(rows: RowsDraft, keys: Keys) -> dict[str, Any]:
    """Return the data set that a key of it belongs to."""
    entry: dict[str, Any] = rows.draft.source.data[str(keys[0])][int(keys[1])]
    return entry


def _has_its_own_template(draft: Draft, key: str) -> bool:
    """Return whether rows beside those of a fixed prompt are written by the model's template."""
    kinds = (entry.get("type") for entry in draft.get(key) if isinstance(entry, dict))
    return any(str(kind).partition(".")[0] in ("chat_template", "sharegpt") for kind in kinds)


ROLE_KEYS = ("message_property_mappings", "message_field_role", "message_field_content", "roles")
OPENAI = {"role": "role", "content": "content"}
SHAREGPT = {"role": "from", "content": "value"}


def _read_message_key(rows: RowsDraft, keys: Keys, name: str, value: Any) -> None:
    """Say how a conversation is written: OpenAI's way or ShareGPT's."""
    draft, said = rows.draft, {"message_field_role": "role", "message_field_content": "content"}
    if name == "field_messages":
        if _has_pairs(rows):
            rows.name_column(keys, "prompt", value)
            return
        entry = _find_entry(rows, keys)
        mapping = entry.get("message_property_mappings")
        role = mapping.get("role") if isinstance(mapping, dict) else None
        sharegpt = SHAREGPT["role"] in (role, entry.get("message_field_role"))
        rows.name_column(keys, "conversations" if sharegpt else "messages", value)
        return
    mapping = {said[name]: value} if name in said else value
    if name == "roles":
        _read_roles(rows, keys, value)
    elif not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        draft.ask(keys, "lora reads role/content and from/value")
    elif mapping.items() <= SHAREGPT.items():
        rows.take(keys, "format", "sharegpt")
    elif mapping.items() <= OPENAI.items():
        rows.draft.tell(keys, Kind.taken, "as here")
    else:
        draft.ask(keys, "lora reads role/content and from/value: rename the keys of the turns")


KNOWN_ROLES = {
    "user": {"user", "human"}, "assistant": {"assistant", "gpt"}, "system": {"system"},
    "tool": {"tool"},
}  # fmt: skip


def _read_roles(rows: RowsDraft, keys: Keys, value: Any) -> None:
    known = isinstance(value, dict) and all(
        isinstance(names, list) and {*names} <= KNOWN_ROLES.get(role, set())
        for role, names in value.items()
    )
    if known:
        rows.draft.tell(keys, Kind.taken, "as here")
    else:
        rows.draft.ask(keys, "lora knows user, human, assistant, gpt, system and tool")


def _read_rare_key(rows: RowsDraft, keys: Keys, name: str, value: Any) -> None:
    """Say what becomes of the keys of a data set that few files have."""
    draft = rows.draft
    if name == "ds_type":
        draft.leave(keys, "a file's name says what is in it")
    elif name == "roles_to_train" and value in (["assistant"], ["gpt"]):
        draft.tell(keys, Kind.taken, "as here: data.train_on: assistant")
    elif name == "train_on_eos" and value in ("turn", "all"):
        draft.tell(keys, Kind.taken, "as here: the end of each answer is learnt")
    elif name == "trust_remote_code":
        rules.TRAINER[name](draft, keys, value)
    elif name == "chat_template":
        rules.template(draft, keys, value)
    elif name == "message_field_training":
        draft.ask(keys, "lora leaves turns with train: false out of the loss: rename the key")
    elif name in ("shards", "shards_idx", "preprocess_shards"):
        draft.ask(keys, "lora reads all rows: data.max_rows, or data.split: train[:10%]")
    elif name == "conversation":
        draft.ask(keys, "the prompt's form: model.chat_template")
    else:
        draft.ask(keys, "lora has no such key for a data set: look whether the rows need it")


RULES: Mapping[str, Rule] = {
    **rules.TRAINER,
    "base_model": take("model.name_or_path"),
    "revision_of_model": take("model.revision"),
    "adapter": adapter,
    "load_in_4bit": rules.quantised,
    "load_in_8bit": rules.eight_bits,
    "peft_use_dora": rules.dora,
    "lora_model_dir": take("model.adapter"),
    "lora_r": take("lora.r"),
    "lora_alpha": take("lora.lora_alpha"),
    "lora_dropout": take("lora.lora_dropout"),
    "lora_target_modules": targets,
    "lora_target_linear": turn("lora.target_modules", "all-linear"),
    "lora_target_parameters": take("lora.target_parameters"),
    "lora_modules_to_save": take("lora.modules_to_save"),
    "lora_fan_in_fan_out": take("lora.fan_in_fan_out"),
    "peft_use_rslora": take("lora.use_rslora"),
    "peft_init_lora_weights": take("lora.init_lora_weights"),
    "peft_layers_to_transform": take("lora.layers_to_transform"),
    "peft_layers_pattern": take("lora.layers_pattern"),
    "peft_trainable_token_indices": take("lora.trainable_token_indices"),
    "peft_autocast_adapter_dtype": take("lora.autocast_adapter_dtype"),
    "datasets": read_datasets,
    "pretraining_dataset": read_datasets,
    "test_datasets": ask("data.eval_path, or data.eval_split"),
    "val_set_size": rules.held_out,
    "chat_template": rules.template,
    "chat_template_jinja": ask("write it into FILE.jinja: model.chat_template: FILE.jinja"),
    "default_system_message": take("model.system_prompt"),
    "eot_tokens": leave("lora learns the end of each answer, and says where a token is untrained"),
    "train_on_inputs": loss_on,
    "sequence_len": take("training.max_length"),
    "sample_packing": rules.pack("a batch is so many filled sequences"),
    "eval_sample_packing": leave("rows that are evaluated share sequences where trained ones do"),
    "pad_to_sequence_len": leave("lora pads no row to the longest length; the loss is the same"),
    "batch_flattening": leave("lora joins the rows of a step: training.packing"),
    "micro_batch_size": take("training.per_device_train_batch_size"),
    "eval_batch_size": take("training.per_device_eval_batch_size"),
    "batch_size": ask("training.gradient_accumulation_steps is this by micro_batch_size and GPUs"),
    "num_epochs": take("training.num_train_epochs"),
    "optimizer": take("training.optim"),
    "lr_scheduler": take("training.lr_scheduler_type"),
    "evals_per_epoch": per_epoch("eval"),
    "saves_per_epoch": per_epoch("save"),
    "special_tokens": special_tokens,
    "tokens": take("model.add_tokens"),
    "float16": rules.precision,
    "bfloat16": rules.precision,
    "flash_attention": attention("auto"),
    "sdp_attention": attention("sdpa"),
    "eager_attention": attention("eager"),
    "flex_attention": attention("flex_attention"),
    "xformers_attention": leave("lora has sdpa and flash attention: the result is the same"),
    "s2_attention": leave("lora has no shifted attention"),
    "hub_model_id": upload,
    "use_tensorboard": turn("training.report_to", "tensorboard"),
    "wandb_project": report_to_wandb,
    "wandb_name": take("training.run_name"),
    "wandb_entity": ask("export WANDB_ENTITY with this value"),
    "wandb_mode": ask("export WANDB_MODE with this value"),
    "wandb_watch": ask("export WANDB_WATCH with this value"),
    "wandb_log_model": ask("export WANDB_LOG_MODEL with this value"),
    "loss_watchdog_threshold": watch_loss,
    "loss_watchdog_patience": leave("it belongs to loss_watchdog_threshold"),
    "dataset_processes": take("training.dataset_num_proc"),
    "dataset_prepared_path": leave("lora keeps prepared rows in its cache"),
    **dict.fromkeys(
        ("shuffle_merged_datasets", "shuffle_before_merging_datasets"),
        leave("rows are drawn in random order"),
    ),
    "streaming": turn("data.streaming", True),
    **dict.fromkeys(
        ("streaming_multipack_buffer_size", "pretrain_multipack_buffer_size"),
        leave("it tunes axolotl's own packing"),
    ),
    "pretrain_multipack_attn": expect((True,), "lora keeps rows that share a sequence apart"),
    "gradient_checkpointing": checkpointing,
    **dict.fromkeys(
        ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"),
        leave("lora cuts no row over GPUs: each has rows of its own, and the result is the same"),
    ),
    "dpo_use_logits_to_keep": leave("lora makes logits at the answers alone"),
    "model_type": leave("the model's config.json says its class"),
    "tokenizer_type": leave("the model's files say its tokenizer"),
    "strict": leave("lora is strict about its base, and has no such switch"),
    "debug": leave("lora check shows rows as the model sees them"),
    "eval_table_size": ask("training.sample_prompts shows answers at each evaluation"),
    "eval_max_new_tokens": leave("training.sample_tokens, for training.sample_prompts"),
    "eval_table_max_new_tokens": leave("training.sample_tokens, for training.sample_prompts"),
    "unfrozen_parameters": leave("an adapter is trained, and nothing of the base"),
    "plugins": plugged,
    "liger_fused_linear_cross_entropy": leave("training.loss_head does the same without Liger"),
    "liger_cross_entropy": leave("training.loss_head does the same without Liger"),
    "cut_cross_entropy": leave("training.loss_head does the same"),
    **dict.fromkeys(
        ("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation"),
        leave("training.use_liger_kernel: auto takes Liger's kernels where they help"),
    ),
    "cosine_min_lr_ratio": ask(
        "training.lr_scheduler_type: cosine_with_min_lr, and training.lr_scheduler_kwargs: "
        "{min_lr_rate: THIS}"
    ),
    "curriculum_sampling": turn("training.train_sampling_strategy", "sequential"),
    "excess_length_strategy": long_rows,
    "noisy_embedding_alpha": take("training.neftune_noise_alpha"),
    "torch_dtype": take("model.dtype"),
    "added_tokens_overrides": ask("lora adds tokens, and renames none: model.add_tokens"),
    "auto_resume_from_checkpoints": leave("use lora train --resume"),
    "hf_use_auth_token": leave("lora uses the token of hf auth login, or HF_TOKEN"),
    "lora_on_cpu": leave("lora merge goes part by part, in little memory"),
    "skip_prepare_dataset": leave("lora prepares rows once, and keeps them in its cache"),
    "resize_token_embeddings_to_32x": leave("model.add_tokens grows the embeddings as they must"),
    **dict.fromkeys(
        ("tokenizer_use_fast", "tokenizer_legacy"), leave("the model's files say its tokenizer")
    ),
    **dict.fromkeys(
        ("sample_packing_eff_est", "sample_packing_group_size", "sample_packing_bin_size"),
        leave("it tunes axolotl's own packing"),
    ),
    "total_num_tokens": leave("lora counts them"),
    "fsdp_version": leave("lora shards by FSDP2"),
    **dict.fromkeys(
        ("processor_type", "processor_config", "is_multimodal", "image_size"), rules.PICTURES
    ),
    "image_resize_algorithm": leave("it says more of image_size"),
    "rl": preferred,
    "rl_beta": take("preference.beta"),
    "dpo_beta": take("preference.beta"),
    "dpo_label_smoothing": take("preference.label_smoothing"),
    "orpo_alpha": weigh_odds,
    "simpo_gamma": take("preference.gamma"),
    "cpo_alpha": take("preference.sft_weight"),
    "rpo_alpha": take("preference.sft_weight"),
    "kto_desirable_weight": take("preference.desirable_weight"),
    "kto_undesirable_weight": take("preference.undesirable_weight"),
    "max_prompt_len": leave("training.max_length is of a prompt with an answer"),
    "reward_model": refuse("training of a reward model"),
    "process_reward_model": refuse("training of a reward model"),
    **dict.fromkeys(
        ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "unsloth_lora_mlp"),
        leave("a faster way to the same result; lora has its own"),
    ),
    **dict.fromkeys(
        ("is_llama_derived_model", "is_mistral_derived_model", "is_falcon_derived_model"),
        leave("the model's config.json says its family"),
    ),
}
DEFAULTS: Mapping[str, Any] = {
    "training.max_length": 512,
    "training.per_device_train_batch_size": 1,
    "training.save_strategy": "epoch",
    "training.seed": 42,
}
"""What axolotl does where its file says nothing, and lora would do something else."""


def pass_on(draft: Draft, keys: Keys, value: Any) -> bool:
    """Take a key that axolotl hands on under its own name; return whether it is one."""
    return keys[-1] in PASSED_ON and rules.pass_on(draft, keys, value)


def finish(draft: Draft) -> None:
    """Say what no key says: an adapter where the whole model was trained."""
    rules.set_apart(draft, 1.0)
    if not draft.get("adapter"):
        draft.asked.append(
            "no adapter: axolotl trains the whole model here, and lora an adapter, which wants a "
            "learning rate about ten times as high"
        )
    if "lora.target_modules" not in draft.values:
        draft.asked.append("no lora_target_modules: lora.target_modules is all-linear")
    if "training.save_steps" in draft.values:
        draft.put_default("training.save_strategy", "steps")
