"""What a tool's key can become, as functions that a tool's table names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from lora_cli.common import LoraError
from lora_cli.recipe import Lora, Training
from lora_cli.translate.draft import Draft, Kind
from lora_cli.translate.source import Keys

Rule = Callable[[Draft, Keys, Any], None]
"""Says in the draft what becomes of a key that has a value."""
OFF = (False, "false", "False", "no", "off", "none", 0)
EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing."""
SECRET = re.compile(r"((hf|wandb|hub|ms_hub|om_hub)_token|api_key|secret)$")
"""Keys whose values are never copied, nor shown."""


def is_on(value: Any) -> bool:
    """Return whether a value turns something on: YAML 1.1 also knows `yes` and `off`."""
    return value not in OFF and value not in EMPTY


def split_names(value: Any) -> list[str]:
    """Return the names that a text has with commas between them, or a list."""
    if isinstance(value, list):
        return [str(name) for name in value]
    return [name.strip() for name in str(value).split(",") if name.strip()]


def is_number(value: Any) -> bool:
    """Return whether a value is a number, and no switch."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def take(to: str, convert: Callable[[Any], Any] | None = None, note: str = "") -> Rule:
    """Return the rule for a key that the recipe has under another name."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        draft.take(keys, to, convert(value) if convert else value, note)

    return rule


def turn(to: str, on: Any, note: str = "") -> Rule:
    """Return the rule for a key that, where it is on, is a value of another key."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if is_on(value):
            draft.take(keys, to, on, note)
        else:
            draft.tell(keys, Kind.taken, "off, as here")

    return rule


def leave(why: str) -> Rule:
    """Return the rule for a key without a counterpart; where it is off, nothing is missed."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if value is False:
            draft.tell(keys, Kind.taken, "off, as here")
        else:
            draft.leave(keys, why)

    return rule


def ask(what: str) -> Rule:
    """Return the rule for a key that the user has to look at where it is on."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if value is False:
            draft.tell(keys, Kind.taken, "off, as here")
        else:
            draft.ask(keys, what)

    return rule


def expect(usual: tuple[Any, ...], otherwise: str) -> Rule:
    """Return the rule for a key that has one usual value, which is what lora does; any other needs
    the user's hand."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if value in usual:
            draft.tell(keys, Kind.taken, "as here")
        else:
            draft.ask(keys, otherwise)

    return rule


def refuse(what: str, instead: str | None = None) -> Rule:
    """Return the rule for a key, where it is on, that makes the file one for another kind of
    training: the recipe would be no translation of it. `instead` is what can be done."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if not is_on(value):
            draft.tell(keys, Kind.taken, "off, as here")
            return
        raise LoraError(
            f"{draft.source.show_place(keys)}: {keys[-1]}: {value} is {what}, which lora does not "
            "do",
            instead
            or f"take a file of {draft.tool}'s for answers, or for DPO, ORPO or KTO; such a "
            "training can go on with what lora trains: a plain PEFT adapter",
        )

    return rule


ANSWER_ALONE = "its loss is of the answer, as in the paper; TRL's is of the prompt as well"


def prefer(draft: Draft, keys: Keys, name: str, note: str = "") -> None:
    """Say that better answers are made likelier, by an objective or a loss of DPO's."""
    if name in OWN_LOSS:
        draft.take(keys, "objective", name, note)
        return
    draft.take(keys, "objective", "dpo", note)
    if name != "sigmoid":
        draft.values["preference.loss"] = name
        draft.reasons["preference.loss"] = f"{keys[-1]}: {name}"


OWN_LOSS = ("orpo", "simpo", "cpo", "kto")
"""Objectives with a loss of their own."""


def compares(draft: Draft) -> bool:
    """Return whether rows say which answers are better."""
    return draft.values.get("objective") in ("dpo", *OWN_LOSS)


def set_apart(draft: Draft, sft_weight: float) -> None:
    """Write what a tool takes for the numbers of SimPO and CPO, where its file says nothing."""
    objective = draft.values.get("objective")
    if objective in ("simpo", "cpo"):
        draft.put_default("preference.beta", 0.1)
        draft.put_default("preference.sft_weight", sft_weight)
    if objective == "simpo":
        draft.put_default("preference.gamma", 0.5)


def drop_long_pairs(draft: Draft) -> None:
    """Say that pairs that are too long are left out, where the other tool cuts them."""
    rows = "rows" if draft.values.get("objective") == "kto" else "pairs"
    draft.asked.append(
        f"{rows} over training.max_length are left out: {draft.tool} cuts them, and an answer "
        "without its end teaches no end"
    )
    draft.values["data.on_long_row"] = "drop"
    draft.reasons["data.on_long_row"] = "no answer is cut"


def precision(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the type of weights and computation by `bf16`, `fp16` and their like."""
    kind = "float16" if "16" in str(keys[-1]) and "b" not in str(keys[-1]) else "bfloat16"
    if value == "auto":
        draft.take(keys, "model.dtype", "auto")
    elif is_on(value):
        draft.take(keys, "model.dtype", kind)
    else:
        draft.tell(keys, Kind.taken, "off, as here")


PICTURES = refuse(
    "a training on pictures in conversations",
    "without such keys, and on rows of texts, lora import takes the model's part for texts",
)
"""The rule for a key that files have for models of pictures and texts."""
READS_PICTURES = re.compile(
    r"llava|pixtral|paligemma|idefics|smolvlm|internvl|minicpm-?v|phi-?[\d.]+-vision|vision-instruct"
    r"|(?<![a-z])vl(?![a-z])",
    re.IGNORECASE,
)
"""What models are called that read pictures, too."""


def say_pictures(draft: Draft) -> None:
    """Say of a model that reads pictures, too, what lora trains of it."""
    name = str(draft.values.get("model.name_or_path", ""))
    if READS_PICTURES.search(name):
        draft.asked.append(
            f"{name} seems to read pictures, too: lora trains its part for texts, on rows of texts"
        )


def quantised(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that a base is stored in 4 bits."""
    if is_on(value):
        draft.take(keys, "method", "qdora" if draft.values.get("method") == "dora" else "qlora")
    else:
        draft.tell(keys, Kind.taken, "off, as here")


def dora(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that DoRA is trained."""
    if is_on(value):
        draft.take(keys, "method", "qdora" if draft.values.get("method") == "qlora" else "dora")
    else:
        draft.tell(keys, Kind.taken, "off, as here")


def eight_bits(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that lora stores no base in 8 bits."""
    if is_on(value):
        draft.ask(keys, "lora stores a base in 16 bits, as now, or in 4: method: qlora")
    else:
        draft.tell(keys, Kind.taken, "off, as here")


def held_out(draft: Draft, keys: Keys, value: Any) -> None:
    """Say how many rows are held out: a share below 1, a number from 1 on."""
    if not value:
        draft.tell(keys, Kind.taken, "none, as here")
    elif is_number(value) and value < 1:
        draft.take(keys, "data.eval_fraction", value)
    else:
        rows = int(value) if isinstance(value, float) and value.is_integer() else value
        draft.take(keys, "data.eval_rows", rows)


def pack(note: str = "") -> Rule:
    """Return the rule for a switch that fills whole sequences with rows."""

    def rule(draft: Draft, keys: Keys, value: Any) -> None:
        if is_on(value):
            draft.take(keys, "training.packing", "dataset", note)
        else:
            same = "the same rows a step, without their padding"
            draft.take(keys, "training.packing", "auto", same)

    return rule


def warm_up(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the warm-up as a share of the steps."""
    if draft.get("warmup_steps"):
        draft.leave(keys, "warmup_steps is given, and goes before it")
    else:
        draft.take(keys, "training.warmup_steps", value, "a share of the steps")


TEMPLATES = {"alpaca": "alpaca", "chatml": "chatml", "tokenizer_default": "auto"}


def template(draft: Draft, keys: Keys, value: Any) -> None:
    """Say the chat template, where lora has one of that name."""
    name = str(value).removeprefix("tokenizer_default_fallback_")
    if name in TEMPLATES:
        draft.take(keys, "model.chat_template", TEMPLATES[name])
    elif str(value).endswith(".jinja"):
        draft.take(keys, "model.chat_template", value)
    else:
        draft.ask(
            keys,
            "lora uses the tokenizer's own template, which an instruct model has; for a base "
            "without one: model.chat_template: FILE.jinja, or chatml",
        )


STRATEGIES = {"3": "deepspeed-zero3", "2": "deepspeed-zero2", "1": "ddp", "0": "ddp"}


def deepspeed(draft: Draft, keys: Keys, value: Any) -> None:
    """Say how processes share the base, by the stage in DeepSpeed's file or in its name."""
    if isinstance(value, dict):
        zero = value.get("zero_optimization")
        stage = str(zero.get("stage", "")) if isinstance(zero, dict) else ""
    else:
        found = re.search(
            r"(?:z|zero|zero_?stage|stage|ds_z)_?-?([0-3])", PurePath(str(value)).name
        )
        stage = found[1] if found else ""
    if stage in STRATEGIES:
        draft.take(keys, "distributed.strategy", STRATEGIES[stage], "with lora train --nproc N")
    else:
        draft.ask(keys, "distributed.strategy: deepspeed-zero2, or deepspeed-zero3")


def secret(draft: Draft, keys: Keys, value: Any) -> None:
    """Leave a secret where it is."""
    draft.leave(keys, "a secret: it belongs in the environment, not in a recipe")


def pass_on(draft: Draft, keys: Keys, value: Any) -> bool:
    """Take a key that the other tool hands to transformers, TRL or PEFT, as lora does, under the
    same name; return whether there is one."""
    name = str(keys[-1])
    for section, fields in (("training", Training.model_fields), ("lora", Lora.model_fields)):
        if name in fields:
            draft.take(keys, f"{section}.{name}", value)
            return True
    return False


def trains(draft: Draft, keys: Keys, value: Any) -> None:
    """Say that the file is one for a training; LoraError where it says that it is not."""
    if is_on(value):
        draft.leave(keys, "lora train always trains")
    else:
        raise LoraError(
            f"{draft.source.show_place(keys)}: {keys[-1]}: {value}: the file is for no training",
            "lora predict, lora evaluate and lora generate are for what was trained",
        )


TRAINER: Mapping[str, Rule] = {
    "bf16": precision,
    "fp16": precision,
    "pure_bf16": precision,
    "warmup_ratio": warm_up,
    "deepspeed": deepspeed,
    "fsdp": turn("distributed.strategy", "fsdp", "with lora train --nproc N"),
    "fsdp_config": leave("lora shards by FSDP2 and settles its options itself"),
    "evaluation_strategy": take("training.eval_strategy"),
    "group_by_length": turn("training.train_sampling_strategy", "group_by_length"),
    "output_dir": take("output_dir"),
    "overwrite_output_dir": leave(
        "lora never writes over a run: name another output_dir, or remove it"
    ),
    "load_best_model_at_end": turn("training.keep", "best"),
    "do_train": trains,
    "logging_dir": leave("lora keeps what it logs in the run's folder"),
    "do_eval": leave(
        "training.eval_strategy says when; auto: after each epoch, where rows are held out"
    ),
    "do_predict": leave("use lora generate"),
    "disable_tqdm": leave("lora draws its own progress line"),
    "resume_from_checkpoint": leave("use lora train --resume"),
    "auto_find_batch_size": turn("training.on_oom", "reduce", "each step keeps its rows"),
    "ignore_data_skip": leave("a resumed run goes on with the next rows"),
    "local_rank": leave("the launcher sets it"),
    "trust_remote_code": ask("give --trust-remote-code on the command line if you trust the model"),
    "no_cuda": take("training.use_cpu"),
    "attn_implementation": take("model.attn_implementation"),
    "save_safetensors": leave("lora writes safetensors only"),
}
"""The keys of transformers' TrainingArguments that lora has under other names, or not at all."""
