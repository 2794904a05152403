"""LLaMA-Factory's YAML: what each of its keys becomes, by its arguments (llamafactory/hparams),
which extend transformers' `Seq2SeqTrainingArguments`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_cli.translate import dataset_info, rules
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.rules import Rule, ask, expect, leave, refuse, split_names, take, turn
from lora_cli.translate.source import Keys

MARKS = (
    *("stage", "finetuning_type", "cutoff_len", "template", "lora_target", "lora_rank", "dataset"),
    *("dataset_dir", "preprocessing_num_workers", "quantization_bit"),
)


def stage(draft: Draft, keys: Keys, value: Any) -> None:
    """Say what is learnt: answers, or whole texts in filled sequences."""
    if value == "sft":
        draft.tell(keys, Kind.taken, "as here: answers are learnt")
    elif value == "pt":
        draft.take(keys, "data.train_on", "all", "whole texts are learnt")
        draft.values["data.format"] = "text"
        draft.reasons["data.format"] = "stage: pt"
        if draft.get("packing") is not False:
            for name, packed in (("packing", "dataset"), ("packing_strategy", "wrapped")):
                draft.values[f"training.{name}"] = packed
                draft.reasons[f"training.{name}"] = "stage: pt joins all texts and cuts them"
    elif value == "dpo" and draft.get("pref_loss") in PAIRED:
        rules.prefer(draft, keys, draft.get("pref_loss") or "sigmoid")
    elif value == "dpo":
        refuse("a loss of pairs")(draft, ("pref_loss",), draft.get("pref_loss"))
    elif value == "kto":
        rules.prefer(draft, keys, "kto")
    else:
        refuse("a training on rewards, and not on answers")(draft, keys, value)


APART = "rows are kept apart in a sequence"
PAIRED = (None, "sigmoid", "hinge", "ipo", "orpo", "simpo")
"""What `pref_loss` may be; the last two have no reference."""


def own_loss(draft: Draft, keys: Keys, value: Any) -> None:
    """Say how much the better answer's own loss counts: with ORPO beside the 1 that it has."""
    more = draft.get("pref_loss") == "orpo" and rules.is_number(value)
    draft.take(keys, "preference.sft_weight", value + 1 if more else value)


def method(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that an adapter is trained."""
    if value == "lora":
        draft.take(keys, "method", draft.values.get("method", "lora"))
    else:
        draft.ask(
            keys,
            "lora trains an adapter, which wants a learning rate about ten times that of a whole "
            "model",
        )


def targets(draft: Draft, keys: Keys, value: Any) -> None:
    """Say which modules get an adapter."""
    names = "all-linear" if value == "all" else split_names(value)
    draft.take(keys, "lora.target_modules", names)


def bits(draft: Draft, keys: Keys, value: Any) -> None:
    """Say whether the base is stored in 4 bits."""
    if value == 4:
        rules.quantised(draft, keys, True)
    else:
        draft.ask(keys, "lora stores a base in 16 bits, as now, or in 4: method: qlora")


def nested(draft: Draft, keys: Keys, value: Any) -> None:
    """Say how 4-bit storage is done, where there is any."""
    if draft.get("quantization_bit") != 4:
        draft.leave(keys, "the base is not stored in 4 bits")
    elif keys[-1] == "double_quantization":
        draft.take(keys, "quantization.bnb_4bit_use_double_quant", value)
    else:
        draft.take(keys, "quantization.bnb_4bit_quant_type", value)


def pissa(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that the adapter starts from the base's largest singular values."""
    rounds = draft.get("pissa_iter")
    rounds = 16 if rounds is None else rounds
    if rules.is_on(value):
        name = "pissa" if rounds == -1 else f"pissa_niter_{rounds}"
        draft.take(keys, "lora.init_lora_weights", name)
    else:
        draft.tell(keys, Kind.taken, "off, as here")


def belongs(other: str) -> Rule:
    """Return the rule for a key that says more of another one."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if draft.get(other):
            draft.tell(keys, Kind.taken, f"with {other}")
        else:
            draft.leave(keys, f"it says more of {other}, which is off")

    return rule


def history(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that the last answer alone is learnt."""
    turn("data.train_on", "completion")(draft, keys, value)


def attention(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the attention kernel."""
    names = {"auto": "auto", "fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager"}
    if isinstance(value, str) and value in names:
        draft.take(keys, "model.attn_implementation", names[value])
    else:
        draft.ask(keys, "model.attn_implementation")


def adapters(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the adapter that is trained on."""
    names = split_names(value)
    if len(names) == 1 and not draft.get("create_new_adapter"):
        draft.take(keys, "model.adapter", names[0])
    else:
        draft.ask(keys, "lora merge puts them into the base first; then name that base")


def packing(draft: Draft, keys: Keys, value: Any) -> None:
    """Say whether whole sequences are filled, which `neat_packing` turns on as well."""
    if rules.is_on(draft.get("neat_packing")) and not rules.is_on(value):
        draft.leave(keys, "neat_packing turns it on")
    else:
        rules.pack(APART)(draft, keys, value)


def streaming(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that rows are prepared while training."""
    turn("data.streaming", True)(draft, keys, value)


def evaluated(draft: Draft, keys: Keys, value: Any) -> None:
    """Say what is evaluated on."""
    draft.take(keys, "data.eval_path", dataset_info.find_paths(draft, split_names(value)))


def count_rows(draft: Draft, keys: Keys, value: Any) -> None:
    """Say how many rows are used: of each data set."""
    names = split_names(draft.get("dataset") or "")
    if len(names) > 1:
        draft.tell(keys, Kind.taken, "data.mix: max_rows of each")
    else:
        draft.take(keys, "data.max_rows", value)


RULES: Mapping[str, Rule] = {
    **rules.TRAINER,
    "model_name_or_path": take("model.name_or_path"),
    "model_revision": take("model.revision"),
    "adapter_name_or_path": adapters,
    "create_new_adapter": leave("adapter_name_or_path says what is trained on"),
    "stage": stage,
    "pref_beta": take("preference.beta"),
    "pref_loss": belongs("stage"),
    "pref_ftx": own_loss,
    "simpo_gamma": take("preference.gamma"),
    "dpo_label_smoothing": take("preference.label_smoothing"),
    "kto_chosen_weight": take("preference.desirable_weight"),
    "kto_rejected_weight": take("preference.undesirable_weight"),
    "ref_model": ask("lora compares with the model as training starts it"),
    "finetuning_type": method,
    "lora_rank": take("lora.r"),
    "lora_alpha": take("lora.lora_alpha"),
    "lora_dropout": take("lora.lora_dropout"),
    "lora_target": targets,
    "additional_target": take("lora.modules_to_save", split_names),
    "use_rslora": turn("lora.use_rslora", True),
    "use_dora": rules.dora,
    "pissa_init": pissa,
    "pissa_iter": belongs("pissa_init"),
    "pissa_convert": leave("lora always saves a plain adapter on the base as it is"),
    "quantization_bit": bits,
    "quantization_method": expect(
        ("bitsandbytes", "bnb", "bitsandbytes (4/8)"), "lora stores 4 bits by bitsandbytes only"
    ),
    "double_quantization": nested,
    "quantization_type": nested,
    "dataset": dataset_info.read_datasets,
    "dataset_dir": leave("paths in a recipe are whole: data.path"),
    "media_dir": leave("lora trains no model on pictures in a conversation"),
    "eval_dataset": evaluated,
    "template": rules.template,
    "default_system": take("model.system_prompt"),
    "cutoff_len": take("training.max_length"),
    "max_samples": count_rows,
    "train_on_prompt": turn("data.train_on", "all"),
    "mask_history": history,
    "packing": packing,
    "neat_packing": turn("training.packing", "dataset", APART),
    "streaming": streaming,
    "buffer_size": take("data.shuffle_buffer"),
    "val_size": rules.held_out,
    "mix_strategy": expect(("concat",), "data.mix has a weight for each data set"),
    "interleave_probs": ask("data.mix has a weight for each data set"),
    "tool_format": ask("tools are written as the chat template does: see lora check"),
    "preprocessing_num_workers": take("training.dataset_num_proc"),
    "preprocessing_batch_size": leave("lora settles it"),
    "overwrite_cache": leave(
        "lora prepares rows anew where they, or what is made of them, changed"
    ),
    "tokenized_path": leave("lora keeps prepared rows in its cache"),
    "plot_loss": leave("lora report draws the loss, of every run"),
    "flash_attn": attention,
    "enable_liger_kernel": turn("training.use_liger_kernel", True),
    "disable_gradient_checkpointing": turn("training.gradient_checkpointing", False),
    "use_reentrant_gc": leave("lora does not re-enter; the gradients are the same"),
    "rope_scaling": ask("put it into the base's config.json: lora trains what that says"),
    "add_tokens": take("model.add_tokens", split_names),
    "add_special_tokens": take("model.add_special_tokens", split_names),
    "resize_vocab": leave("model.add_tokens grows the embeddings where they must"),
    "use_fast_tokenizer": leave("lora uses fast tokenizers"),
    "use_unsloth": leave("a faster way to the same result; lora has its own"),
    "use_unsloth_gc": leave("a way to the same result with less memory: gradient_checkpointing"),
    "low_cpu_mem_usage": leave("lora loads a base once, where it is used"),
    "use_swanlab": turn("training.report_to", "swanlab"),
    "use_dft_loss": turn("training.loss_type", "dft"),
    "compute_accuracy": leave("lora evaluate --metrics, on what the model writes"),
    "disable_shuffling": turn("training.train_sampling_strategy", "sequential"),
    "predict_with_generate": leave("use lora evaluate"),
    "freeze_vision_tower": leave("all-linear leaves towers for pictures out"),
    "freeze_multi_modal_projector": leave("all-linear leaves towers for pictures out"),
    "freeze_language_model": refuse("training of a tower for pictures"),
    **dict.fromkeys(
        (
            *("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels"),
            *("video_fps", "video_maxlen", "image_do_pan_and_scan", "crop_to_patches"),
            *("audio_sampling_rate", "use_audio_in_video"),
        ),
        leave("it is of pictures and sounds, and lora trains the model's part for texts, on texts"),
    ),
    "shift_attn": leave("lora has no shifted attention"),
    "upcast_layernorm": leave("lora keeps the adapter in float32, and the base in model.dtype"),
    "upcast_lmhead_output": leave("lora computes the loss in float32"),
    "enable_thinking": ask("the chat template says whether answers have a thought: lora check"),
    "use_galore": refuse("training of the whole model"),
    "use_badam": refuse("training of the whole model"),
    "use_apollo": refuse("training of the whole model"),
    "hf_hub_token": rules.secret,
    "ms_hub_token": rules.secret,
    "export_dir": refuse(
        "an export, and no training", "lora merge and lora export-gguf do that for an adapter"
    ),
    "infer_backend": refuse(
        "an inference, and no training", "lora serve, lora chat and lora generate do that"
    ),
    "ray_run_name": leave("lora launch writes files for SLURM, Kubernetes and SkyPilot"),
    "ray_num_workers": ask("lora train --nproc N, with this number"),
}
DEFAULTS: Mapping[str, Any] = {
    "lora.r": 8,
    "data.on_long_row": "truncate",
    "training.learning_rate": 5e-5,
    "training.lr_scheduler_type": "linear",
    "training.num_train_epochs": 3.0,
    "training.warmup_steps": 0,
    "training.max_length": 2048,
    "training.seed": 42,
}
"""What LLaMA-Factory does where its file says nothing, and lora would do something else."""


def pass_on(draft: Draft, keys: Keys, value: Any) -> bool:
    """Take a key that LLaMA-Factory hands to transformers; return whether it is one."""
    return rules.pass_on(draft, keys, value)


def finish(draft: Draft) -> None:
    """Say what two keys say together."""
    if "lora.lora_alpha" not in draft.values:
        rank = draft.values.get("lora.r", DEFAULTS["lora.r"])
        if isinstance(rank, int):
            draft.put_default("lora.lora_alpha", 2 * rank, "twice the rank")
    rules.set_apart(draft, 0.0)
    if rules.compares(draft):
        rules.drop_long_pairs(draft)
    if draft.values.get("training.packing_strategy") == "wrapped":
        draft.put_default("data.on_long_row", "split", "texts are cut, and nothing is left out")
