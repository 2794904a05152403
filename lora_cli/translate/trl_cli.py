"""The YAML of TRL's command line (`trl sft --config FILE`): what each key becomes, by `SFTConfig`,
`ModelConfig`, `ScriptArguments` and `DatasetMixtureConfig`; and the mixtures of the alignment
handbook and of Open R1, which extend them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_cli.translate import rules
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.rows import RowsDraft, open_rows, put_rows
from lora_cli.translate.rules import Rule, ask, expect, leave, refuse, take, turn
from lora_cli.translate.source import Keys

MARKS = (
    *("dataset_name", "use_peft", "dataset_train_split", "dataset_config", "dataset_mixture"),
    *(
        "assistant_only_loss",
        "completion_only_loss",
        "dataset_text_field",
        "max_length",
        "datasets",
    ),
    *("use_bnb_nested_quant", "chat_template_path", "model_name_or_path", "accelerate_config"),
)
MODULES = ["q_proj", "v_proj"]
"""What PEFT adapts in Llama, Mistral, Qwen, Gemma and most others where nobody names modules
(peft.utils.constants)."""


def evaluated(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the part that is evaluated on, where evaluations are asked for."""
    if _evaluates(draft):
        draft.take(keys, "data.eval_split", value)
    else:
        draft.leave(keys, "eval_strategy is no: nothing is evaluated")


def _evaluates(draft: Draft) -> bool:
    given = draft.get("eval_strategy") or draft.get("evaluation_strategy")
    return rules.is_on(given)


def mixture(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the data sets of a mixture."""
    entries = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    if not entries:
        draft.ask(keys, "a list of data sets: data.path")
        return
    drafts = open_rows(draft, len(entries))
    for index, (entry, rows) in enumerate(zip(entries, drafts)):
        for name, inner in entry.items():
            _read_entry_key(rows, (*keys, index, name), inner)
    put_rows(draft, drafts, keys)


def single(to: str) -> Rule:
    """Return the rule for a key of one data set, which TRL passes over where there is a list."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if draft.get("datasets"):
            draft.leave(keys, "datasets goes before it")
        else:
            draft.take(keys, to, value)

    return rule


NAMES = {
    "path": "path",
    "id": "path",
    "data_files": "path",
    "name": "name",
    "config": "name",
    "split": "split",
    "weight": "weight",
    "fraction": "weight",
}


def _read_entry_key(rows: RowsDraft, keys: Keys, value: Any) -> None:
    """Say what a key of a data set becomes."""
    name = str(keys[-1])
    if value in rules.EMPTY:
        rows.draft.tell(keys, Kind.empty, "")
    elif name == "fraction":
        rows.draft.ask(keys, "a share of the mixture; data.mix: weight is of the data set's rows")
    elif name == "weight" and rows.place == "data":
        rows.draft.ask(keys, "a share of the rows: data.split: train[:N%]")
    elif name in NAMES:
        rows.take(keys, NAMES[name], value)
    elif name == "columns":
        rows.draft.tell(keys, Kind.taken, "lora looks at the columns that its format has")
    else:
        rows.draft.ask(keys, "lora has no such key for a data set")


def nested_mixture(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the mixture of a file for the alignment handbook or Open R1."""
    if not isinstance(value, dict):
        draft.ask(keys, "a mapping with a list of datasets: data.mix")
        return
    for name, inner in value.items():
        here = (*keys, name)
        if name == "datasets":
            mixture(draft, here, inner)
        elif name == "test_split_size":
            rules.held_out(draft, here, inner)
        elif name == "seed":
            draft.leave(here, "training.seed draws all that is drawn")
        else:
            draft.ask(here, "lora has no such key for a mixture")


def old_mixture(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the data sets of the alignment handbook's first files, each with its share."""
    if isinstance(value, dict) and len(value) == 1 and next(iter(value.values())) == 1:
        draft.take(keys, "data.path", next(iter(value)))
    else:
        draft.ask(keys, "data.mix: a list of {path: NAME, weight: SHARE}")


def splits(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the parts of a data set that are trained and evaluated on, as they are listed."""
    parts: dict[str, list[Any]] = {"train": [], "test": []}
    for name in value if isinstance(value, list) else ():
        parts["test" if "test" in str(name) or "eval" in str(name) else "train"].append(name)
    if len(parts["train"]) != 1 or len(parts["test"]) > 1:
        draft.ask(keys, "data.split, and data.eval_split")
        return
    draft.take(keys, "data.split", parts["train"][0])
    if parts["test"] and (_evaluates(draft) or rules.is_on(draft.get("do_eval"))):
        draft.take(keys, "data.eval_split", parts["test"][0])
        draft.tell(keys, Kind.taken, "data.split, data.eval_split")


def answers_only(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that the answers alone are learnt, or all tokens."""
    on = "assistant" if keys[-1] == "assistant_only_loss" else "completion"
    if value is False and draft.values.get("data.train_on"):
        draft.tell(keys, Kind.taken, "off, as here")
    else:
        draft.take(keys, "data.train_on", on if rules.is_on(value) else "all")


def text_column(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the column of texts."""
    if value == "text":
        draft.tell(keys, Kind.taken, "as here")
    else:
        draft.take(keys, "data.columns", {"text": value})


def trains_adapter(draft: Draft, keys: Keys, value: Any) -> None:
    """Say whether an adapter is trained."""
    if rules.is_on(value):
        draft.take(keys, "method", draft.values.get("method", "lora"))
    else:
        draft.ask(keys, "TRL trains the whole model here, and lora an adapter: method: lora")


OF_OTHERS = ("num_generations", "reward_funcs", "reward_model_path")
"""Keys of GRPO's and RLOO's configurations, which have a beta, too."""
OF_KTO = ("desirable_weight", "undesirable_weight")
"""Keys of KTO's configuration alone, and of `preference`."""
OF_DPO = (
    *("loss_type", "loss_weights", "label_smoothing", "rpo_alpha", "ld_alpha", "reference_free"),
    *("precompute_ref_log_probs", "precompute_ref_batch_size", "sync_ref_model"),
    *("ref_model_name_or_path", "f_divergence_type", "use_weighting", "force_use_ref_model"),
)
"""Keys of DPO's configuration that ORPO's has not."""
LOSSES = ("sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down")


def preferred(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that pairs of answers are compared, and how close the model stays to its start."""
    if draft.source.data.keys() & set(OF_OTHERS):
        refuse("of GRPO or RLOO")(draft, keys, value)
    if _is_kto(draft):
        rules.prefer(draft, keys, "kto")
        draft.take(keys, "preference.beta", value)
    elif (
        draft.source.data.keys() & {"cpo_alpha", "simpo_gamma"} or draft.get("loss_type") == "simpo"
    ):
        draft.take(keys, "preference.beta", value)
    else:
        rules.prefer(draft, keys, "sigmoid")
        draft.take(keys, "preference.beta", value)
        if not draft.source.data.keys() & set(OF_DPO):
            draft.asked.append(
                "beta is of trl dpo, orpo and kto, and no other key tells which: objective: dpo is "
                "written; for trl orpo, write objective: orpo, for trl kto, objective: kto"
            )


def _is_kto(draft: Draft) -> bool:
    return bool(draft.source.data.keys() & set(OF_KTO)) or draft.get("loss_type") == "kto"


def weigh(name: str) -> Rule:
    """Return the rule for a key of KTO's configuration alone."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        rules.prefer(draft, keys, "kto")
        draft.take(keys, f"preference.{name}", value)

    return rule


def contrast(to: str) -> Rule:
    """Return the rule for a key of CPO's and SimPO's configuration alone."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        rules.prefer(draft, keys, "simpo" if draft.get("loss_type") == "simpo" else "cpo")
        draft.take(keys, to, value)

    return rule


def loss(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the loss: of pairs, where the file has a beta, or of texts."""
    name = value[0] if isinstance(value, list) and len(value) == 1 else value
    if name in ("simpo", "kto"):
        rules.prefer(draft, keys, name)
    elif _is_kto(draft):
        refuse("a loss of single answers")(draft, keys, value)
    elif not draft.source.data.keys() & {"beta", "cpo_alpha"}:
        draft.take(keys, "training.loss_type", name)
    elif name in LOSSES:
        draft.take(keys, "preference.loss", name)
    else:
        refuse("a loss of pairs")(draft, keys, value)


def in_four_bits(name: str) -> Rule:
    """Return the rule for a key of 4-bit storage."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if draft.get("load_in_4bit"):
            draft.take(keys, f"quantization.{name}", value)
        else:
            draft.leave(keys, "the base is not stored in 4 bits")

    return rule


def targets(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which modules get an adapter: a list of one name is that name."""
    single = isinstance(value, list) and len(value) == 1
    whole = value[0] if single and value[0] == "all-linear" else value
    draft.take(keys, "lora.target_modules", [whole] if _is_a_name(whole) else whole)


def _is_a_name(value: Any) -> bool:
    return isinstance(value, str) and value != "all-linear" and value.isidentifier()


def launched(draft: Draft, keys: Keys, value: Any) -> None:
    """Say how processes share the base, by accelerate's profile."""
    name = str(value)
    if name.startswith("fsdp"):
        draft.take(keys, "distributed.strategy", "fsdp", "with lora train --nproc N")
    elif name in ("single_gpu", "multi_gpu"):
        draft.take(keys, "distributed.strategy", "ddp", "with lora train --nproc N")
    else:
        rules.deepspeed(draft, keys, name)


ENVIRONMENT = "set it before the command: lora reads no environment from a recipe"
RULES: Mapping[str, Rule] = {
    **rules.TRAINER,
    "model_name_or_path": take("model.name_or_path"),
    "model_revision": take("model.revision"),
    "dtype": take("model.dtype"),
    "torch_dtype": take("model.dtype"),
    "use_peft": trains_adapter,
    "lora_r": take("lora.r"),
    "lora_alpha": take("lora.lora_alpha"),
    "lora_dropout": take("lora.lora_dropout"),
    "lora_target_modules": targets,
    "lora_target_parameters": take("lora.target_parameters"),
    "lora_modules_to_save": take("lora.modules_to_save"),
    "lora_task_type": expect(("CAUSAL_LM",), "task says what the model does"),
    "use_dora": rules.dora,
    "load_in_4bit": rules.quantised,
    "load_in_8bit": rules.eight_bits,
    "bnb_4bit_quant_type": in_four_bits("bnb_4bit_quant_type"),
    "use_bnb_nested_quant": in_four_bits("bnb_4bit_use_double_quant"),
    "bnb_4bit_quant_storage": in_four_bits("bnb_4bit_quant_storage"),
    "dataset_name": single("data.path"),
    "dataset_config": single("data.name"),
    "dataset_train_split": take("data.split"),
    "dataset_test_split": evaluated,
    "dataset_streaming": turn("data.streaming", True),
    "streaming": turn("data.streaming", True),
    "datasets": mixture,
    "dataset_mixture": nested_mixture,
    "test_split_size": rules.held_out,
    "dataset_text_field": text_column,
    "assistant_only_loss": answers_only,
    "completion_only_loss": answers_only,
    "max_seq_length": take("training.max_length"),
    "truncation_mode": expect(("keep_start",), "data.on_long_row"),
    "shuffle_dataset": leave("rows are drawn in random order"),
    "packing": rules.pack(),
    "chat_template_path": rules.template,
    "chat_template": ask("write it into FILE.jinja: model.chat_template: FILE.jinja"),
    "system_prompt": take("model.system_prompt"),
    "no_remove_unused_columns": leave("lora keeps what it reads of the rows"),
    "ignore_bias_buffers": leave("lora exchanges the adapter's gradients alone"),
    "model_init_kwargs": ask("model.revision, model.dtype and model.attn_implementation"),
    "dataset_kwargs": ask("lora prepares the rows itself: see data in the reference"),
    "num_processes": ask("lora train RECIPE --nproc N, with this number"),
    "accelerate_config": launched,
    "env": ask(ENVIRONMENT),
    "wandb_project": ask("export WANDB_PROJECT with this value"),
    "wandb_entity": ask("export WANDB_ENTITY with this value"),
    "hub_token": rules.secret,
    "max_train_samples": take("data.max_rows"),
    "train_split": take("data.split"),
    "beta": preferred,
    "loss_type": loss,
    "label_smoothing": take("preference.label_smoothing"),
    "rpo_alpha": take("preference.sft_weight"),
    "cpo_alpha": contrast("preference.sft_weight"),
    "simpo_gamma": contrast("preference.gamma"),
    **dict.fromkeys(
        ("max_prompt_length", "max_completion_length"),
        leave("max_length is of a prompt with an answer"),
    ),
    "disable_dropout": leave("lora.lora_dropout says it"),
    "generate_during_eval": ask("training.sample_prompts shows answers at each evaluation"),
    "ref_model_name_or_path": ask("pairs are held against the model as training begins"),
    "dataset_mixer": old_mixture,
    "dataset_splits": splits,
    "preprocessing_num_workers": take("training.dataset_num_proc"),
    "precompute_ref_log_probs": leave("lora always computes them before the first step"),
    **{name: weigh(name) for name in OF_KTO},
    **dict.fromkeys(OF_OTHERS, refuse("of GRPO or RLOO")),
}
DEFAULTS: Mapping[str, Any] = {
    "lora.lora_dropout": 0.05,
    "data.on_long_row": "truncate",
    "training.learning_rate": 2e-5,
    "training.lr_scheduler_type": "linear",
    "training.num_train_epochs": 3.0,
    "training.warmup_steps": 0,
    "training.seed": 42,
}
"""What TRL does where its file says nothing, and lora would do something else."""


def pass_on(draft: Draft, keys: Keys, value: Any) -> bool:
    """Take a key of `SFTConfig`'s, which lora has all of; return whether it is one."""
    return rules.pass_on(draft, keys, value)


def finish(draft: Draft) -> None:
    """Say what no single key says: TRL's own choices where they are not lora's."""
    if "method" not in draft.values:
        draft.values["method"] = "lora"
        draft.reasons["method"] = "what lora trains"
    if not draft.get("use_peft"):
        if "use_peft" not in draft.source.data:
            draft.asked.append(
                "no use_peft: TRL trains the whole model here, and lora an adapter, which wants a "
                "learning rate about ten times as high"
            )
    elif "lora.target_modules" not in draft.values:
        draft.put_default("lora.target_modules", MODULES, "PEFT's for most families")
        draft.asked.append("no lora_target_modules: PEFT adapts q_proj and v_proj of most families")
    rules.set_apart(draft, 1.0)
    if rules.compares(draft):
        draft.put_default("training.learning_rate", 1e-6, "of pairs")
        rules.drop_long_pairs(draft)
    elif "data.train_on" not in draft.values:
        draft.put_default("data.train_on", "all", "of texts and conversations")
        draft.asked.append(
            "TRL learns all tokens of texts and conversations, but only the completion of rows of "
            "prompt and completion: data.train_on: completion, if yours are such"
        )
    if draft.get("load_in_4bit"):
        draft.put_default("quantization.bnb_4bit_use_double_quant", False)
    splits = ("data.eval_split", "data.eval_fraction", "data.eval_rows")
    if _evaluates(draft) and not [name for name in splits if name in draft.values]:
        draft.put_default("data.eval_split", "test")
