"""Find values of a recipe that are right alone and wrong together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_cli.recipe import initialisations
from lora_cli.recipe.keys import BY_METRIC, Recipe, TrainingFields
from lora_cli.recipe.tasks import DPO_LOSSES, OBJECTIVES, TASKS, WRITTEN_METRICS

Problem = tuple[str, str | None]
"""A message and its hint."""


def list_contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Yield (message, hint) for each pair of values that are right alone and wrong together."""
    yield from _check_method(recipe)
    yield from _check_task(recipe)
    yield from _check_labels(recipe)
    yield from _check_rows_of_task(recipe)
    yield from _check_trainer(recipe)
    yield from _check_preference(recipe)
    yield from _check_steps(recipe)
    yield from _check_schedule(recipe)
    yield from _check_data(recipe)
    yield from _check_targets(recipe)
    yield from _check_checkpointing(recipe)
    yield from _check_initialisation(recipe)
    yield from _check_parent(recipe)
    yield from _check_output(recipe)
    yield from _check_evaluation(recipe)
    yield from _check_best_model(recipe)
    yield from _check_upload(recipe)
    yield from _check_sharding(recipe)


def _check_method(recipe: Recipe) -> Iterator[Problem]:
    """`method` says whether DoRA is trained and whether the base is stored in 4 bits."""
    dora = recipe.method in ("dora", "qdora")
    if recipe.lora.use_dora is not None and recipe.lora.use_dora != dora:
        says = str(recipe.lora.use_dora).lower()
        yield (
            f"{recipe.where('lora', 'use_dora')} is {says}, but method is {recipe.method}",
            "change one of them",
        )
    if recipe.find_place("quantization") and not recipe.quantized:
        place = recipe.where("quantization")
        yield (
            f"{place} has no effect with method: {recipe.method}",
            "use method: qlora, or remove the section",
        )


OF_WRITING: dict[tuple[str, str], tuple[Any, ...]] = {
    ("model", "chat_template"): ("auto",),
    ("model", "system_prompt"): (None,),
    ("data", "train_on"): ("assistant",),
    ("training", "packing"): ("auto", False),
    ("training", "packed_length"): ("auto", None),
    ("training", "loss_head"): ("auto", "stock"),
    ("training", "use_liger_kernel"): ("auto", False),
    ("training", "sample_prompts"): ([],),
}
"""Keys that say how a model learns to write, and the values that say nothing."""


def _check_task(recipe: Recipe) -> Iterator[Problem]:
    """What is said of conversations, and of how they share sequences, is for models that write."""
    task = recipe.task_row
    if task.writes_next_tokens:
        return
    for (section, key), usual in OF_WRITING.items():
        if recipe.find_place(section, key) and getattr(getattr(recipe, section), key) not in usual:
            place = recipe.where(section, key)
            yield f"{place} is for models that write text, and task is {task.name}", "leave it out"
    if task.reads_pictures:
        yield from _check_pictures(recipe)
    if recipe.trainer == recipe.objective_row.name:
        place, trl = recipe.where("trainer"), recipe.objective_row.trainer
        yield f"{place}: {trl} trains models that write text", "trainer: auto"


OF_TEXTS = (
    *(("data", "on_long_row"), ("model", "add_tokens"), ("model", "add_special_tokens")),
    *(("training", key) for key in ("max_length", "pad_token", "eos_token", "pad_to_multiple_of")),
    ("lora", "trainable_token_indices"),
)
"""What is said of tokens."""


def _check_pictures(recipe: Recipe) -> Iterator[Problem]:
    """Pictures have no tokens, and one length."""
    for section, key in OF_TEXTS:
        owner = getattr(recipe, section)
        field = type(owner).model_fields.get(key)
        usual = field.get_default(call_default_factory=True) if field else None
        if recipe.find_place(section, key) and getattr(owner, key, usual) not in (usual, None):
            yield (
                f"{recipe.where(section, key)} is for models that read texts, and task is "
                f"{recipe.task}",
                "leave it out",
            )
    if _read(recipe, "train_sampling_strategy") == "group_by_length":
        place = recipe.where("training", "train_sampling_strategy")
        yield f"{place}: pictures are of one length", "leave it out"


def _check_labels(recipe: Recipe) -> Iterator[Problem]:
    """Labels are of tasks that tell some apart, and of one kind."""
    task, model = recipe.task_row, recipe.model
    given = [key for key in ("labels", "problem_type") if getattr(model, key) != "auto"]
    for key in given:
        if not task.counts_labels:
            place = recipe.where("model", key)
            yield f"{place} has no effect with task: {task.name}", "name the task, or leave it out"
    one = "single_label_classification"
    if task.places_labels and model.problem_type not in ("auto", one):
        place = recipe.where("model", "problem_type")
        yield f"{place}: with task: {task.name} each word has one label", "leave it out"
    if model.labels != "auto" and (twice := _find_twice(model.labels)):
        yield f"{recipe.where('model', 'labels')}: {twice} is there twice", "give each label once"
    classes = model.problem_type in ("auto", one)
    if task.counts_labels and classes and model.labels != "auto" and len(model.labels) < 2:
        yield (
            f"{recipe.where('model', 'labels')}: there is nothing to tell apart",
            "give two or more",
        )
    if not classes and _read(recipe, "label_smoothing_factor"):
        place = recipe.where("training", "label_smoothing_factor")
        yield f"{place} is for rows with one label each", "leave it out"


def _find_twice(names: list[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def _check_rows_of_task(recipe: Recipe) -> Iterator[Problem]:
    """What is said of rows has to have a meaning for the recipe's task."""
    task, data = recipe.task_row, recipe.data
    for key in sorted({key for other in TASKS for key in other.own_keys} - {*task.own_keys}):
        if getattr(data, key) != type(data).model_fields[key].default:
            place = recipe.where("data", key)
            yield f"{place} has no effect with task: {task.name}", "leave it out"
    if "on_long_row" in data.model_fields_set and data.on_long_row not in task.long_rows:
        place = recipe.where("data", "on_long_row")
        yield (
            f"{place}: {data.on_long_row} has no meaning for rows of task: {task.name}",
            f"on_long_row: {task.long_rows[0]}, or {' or '.join(task.long_rows[1:])}",
        )


def _check_trainer(recipe: Recipe) -> Iterator[Problem]:
    """The settings of TRL's trainer need that trainer, which cannot adapt the output head."""
    if recipe.objective_row.compares:
        return
    ours, theirs = recipe.objective_row.name, recipe.objective_row.trainer
    if recipe.uses_trl and recipe.adapts_head:
        yield f"{recipe.where('trainer')}: {theirs} cannot adapt the output head", "trainer: auto"
    if recipe.trainer == "trainer":
        remedy = f"trainer: {ours}"
    elif recipe.trainer == "auto" and recipe.adapts_head:
        remedy = f"{theirs} cannot adapt the output head: remove it"
    else:
        return
    own = recipe.objective_row.list_own_fields() - TrainingFields.model_fields.keys()
    for key in sorted(recipe.training.model_fields_set & own):
        yield f"{recipe.where('training', key)} works only with trainer: {ours}", remedy
    if recipe.training.packing in (True, "dataset"):
        place = recipe.where("training", "packing")
        yield (
            f"{place}: packing the whole data set works only with trainer: {ours}",
            "packing: step",
        )


AGAINST_PAIRS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("data", "train_on"): ("assistant",),
    ("data", "on_long_row"): ("drop", "error"),
    ("training", "packing"): ("auto", "step", False),
    ("training", "use_liger_kernel"): ("auto", False),
}
"""Keys that a pair of answers leaves few values, and these; of all others of SFTTrainer's, none."""


SMOOTHED = ("sigmoid", "simpo", "robust")
"""Losses that take some pairs to be the wrong way round."""
NUMBERS_OF_LOSSES = {
    "label_smoothing": SMOOTHED,
    "gamma": ("simpo",),
    "sft_weight": (*DPO_LOSSES, "odds_ratio", "simpo"),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""Numbers that some losses alone take."""


def _check_preference(recipe: Recipe) -> Iterator[Problem]:
    """Pairs of answers are for models that write; with a reference, which is computed first."""
    objective, given = recipe.objective, recipe.objective_row
    if objective != "auto" and not recipe.task_row.writes_next_tokens:
        place = recipe.where("objective")
        yield f"{place}: {objective} is for task: causal_lm, not {recipe.task}", "leave it out"
    if not given.compares:
        if recipe.find_place("preference"):
            yield f"{recipe.where('preference')} has no effect", "add objective: dpo, or remove it"
        yield from _check_format_of_answers(recipe)
        return
    if recipe.trainer == "sft":
        yield f"{recipe.where('trainer')}: SFTTrainer does not compare answers", "trainer: auto"
    if recipe.data.streaming and given.needs_reference:
        place = recipe.where("data", "streaming")
        yield (
            f"{place}: how likely each answer is at the start is computed before the first step",
            "leave it out, or take objective: orpo" if given.has_pairs else "leave it out",
        )
    yield from _check_format_of_answers(recipe)
    yield from _check_pairs(recipe)
    yield from _check_loss_of_pairs(recipe)


def _check_format_of_answers(recipe: Recipe) -> Iterator[Problem]:
    """Rows with two answers are for some objectives, those with a label for another."""
    given, style = recipe.objective_row, recipe.data.format
    unpaired, pairs = style == "unpaired", style == "preference"
    if (unpaired and not given.unpaired) or (pairs and not given.has_pairs):
        place, owner = recipe.where("data", "format"), "kto" if unpaired else "dpo"
        yield f"{place}: {style} is for objective: {owner}", f"add objective: {owner}"


def _check_pairs(recipe: Recipe) -> Iterator[Problem]:
    """What is said of single answers is not for pairs."""
    objective = recipe.objective
    for (section, key), fine in AGAINST_PAIRS.items():
        if getattr(getattr(recipe, section), key) not in fine:
            place, value = recipe.where(section, key), getattr(getattr(recipe, section), key)
            said = " or ".join(str(each).lower() for each in fine)
            yield (
                f"{place}: {str(value).lower()} is not for objective: {objective}",
                f"{key}: {said}",
            )
    own = recipe.objective_row.list_own_fields() - TrainingFields.model_fields.keys()
    for key in sorted(recipe.training.model_fields_set & {*own, "label_smoothing_factor"}):
        yield f"{recipe.where('training', key)} is not for objective: {objective}", "leave it out"


def _check_loss_of_pairs(recipe: Recipe) -> Iterator[Problem]:
    """Each objective has its losses, and each loss its numbers."""
    preference, losses = recipe.preference, recipe.objective_row.losses
    if preference.loss not in losses:
        place = recipe.where("preference", "loss")
        owner = next(each.name for each in OBJECTIVES if preference.loss in each.losses)
        yield (
            f"{place}: {preference.loss} is not for objective: {recipe.objective}",
            f"objective: {owner}, or leave it out",
        )
        return  # numbers that are filled in are for the objective's own losses
    for key, fine in NUMBERS_OF_LOSSES.items():
        usual = type(preference).model_fields[key].default
        if getattr(preference, key) != usual and preference.loss not in fine:
            place, more = recipe.where("preference", key), {*fine} & {*losses}
            yield (
                f"{place} has no effect with loss: {preference.loss}",
                f"loss: {next(each for each in reversed(fine) if each in more)}"
                if more
                else "leave it out",
            )


def _check_steps(recipe: Recipe) -> Iterator[Problem]:
    """What `packing: step` and `on_oom: reduce` rule out."""
    training = recipe.training
    if training.packing == "step" and getattr(training, "padding_free", None):
        place = recipe.where("training", "padding_free")
        yield f"{place} has no effect with training.packing: step", "remove one of them"
    by_step = training.packing == "step" or (
        training.packing == "auto" and not recipe.list_against_packing()
    )
    if not by_step and isinstance(training.packed_length, int):
        place = recipe.where("training", "packed_length")
        yield f"{place} has an effect with training.packing: step only", "remove one of them"
    if training.on_oom == "reduce" and training.save_only_model:
        place = recipe.where("training", "on_oom")
        yield (
            f"{place}: reduce resumes from a checkpoint, and save_only_model leaves out half of it",
            "remove one of them",
        )


WITHOUT_WARM_UP = {"constant": "constant_with_warmup", **dict.fromkeys(BY_METRIC, "cosine")}
"""Schedules that transformers begins at the peak, whatever is said of a warm-up, and one beside
each that it does not."""


def _check_schedule(recipe: Recipe) -> Iterator[Problem]:
    """Some schedules have no warm-up."""
    training, kind = recipe.training, recipe.training.lr_scheduler_type
    usual = type(training).model_fields["warmup_steps"].default
    if kind in WITHOUT_WARM_UP and training.warmup_steps not in (0, usual):
        place = recipe.where("training", "warmup_steps")
        yield (
            f"{place} has no effect with lr_scheduler_type: {kind}",
            f"warmup_steps: 0, or lr_scheduler_type: {WITHOUT_WARM_UP[kind]}",
        )


def _check_checkpointing(recipe: Recipe) -> Iterator[Problem]:
    """transformers' old and new name of one setting exclude each other."""
    if {"gradient_checkpointing", "activation_checkpointing"} <= recipe.training.model_fields_set:
        place = recipe.where("training", "activation_checkpointing")
        yield f"{place} and training.gradient_checkpointing are one setting", "give one of them"


def _check_parent(recipe: Recipe) -> Iterator[Problem]:
    """An adapter that is trained on has its A and B, and stays as it is."""
    parent, name = recipe.model.adapter, recipe.model.name_or_path
    if parent is None:
        if name == "auto":
            place = recipe.where("model", "name_or_path")
            yield (
                f"{place}: auto is the base of model.adapter, which is not given",
                "name the model",
            )
        return
    start = recipe.lora.init_lora_weights
    if recipe.find_place("lora", "init_lora_weights") and start not in (True, "mica"):
        place = recipe.where("lora", "init_lora_weights")
        yield f"{place} has no effect: A and B are those of model.adapter", "leave it out"
    folder, out = Path(parent).resolve(), Path(recipe.output_dir).resolve()
    if (folder / "adapter_config.json").is_file() and folder in (out, *out.parents):
        yield (
            f"{recipe.where('output_dir')} is in the adapter {parent}, which is not written to",
            "output_dir: runs/NAME",
        )


def _check_output(recipe: Recipe) -> Iterator[Problem]:
    """The run's folder must not hold what is already there."""
    if Path(recipe.output_dir).resolve() in (Path.cwd(), *Path.cwd().parents):
        yield (
            f"{recipe.where('output_dir')} must not be the current folder or one above it",
            "output_dir: runs/NAME",
        )


def _check_evaluation(recipe: Recipe) -> Iterator[Problem]:
    """Evaluating needs data to evaluate on, and telling the best model needs evaluations."""
    training = recipe.training
    data = recipe.data.evaluates
    if recipe.data.holds_out and training.eval_strategy == "no":
        place = recipe.where("training", "eval_strategy")
        key = "eval_rows" if recipe.data.eval_fraction is None else "eval_fraction"
        yield f"{place}: nobody looks at the rows of data.{key}", "training.eval_strategy: epoch"
    for key, asks in (
        ("eval_strategy", training.eval_strategy in ("steps", "epoch")),
        ("eval_on_start", _read(recipe, "eval_on_start") is True),
        ("keep", training.keep == "best"),
        ("early_stopping_patience", training.early_stopping_patience is not None),
        ("save_strategy", _read(recipe, "save_strategy") == "best"),
        ("lr_scheduler_type", training.lr_scheduler_type in BY_METRIC),
        ("metric_for_best_model", _read(recipe, "metric_for_best_model") is not None),
        ("generate_at_evaluation", training.generate_at_evaluation),
    ):
        place = recipe.where("training", key)
        if asks and not data:
            yield (
                f"{place} needs evaluation data",
                "set data.eval_fraction, data.eval_path or data.eval_split",
            )
        elif asks and training.eval_strategy == "no" and key != "eval_on_start":
            yield f"{place} needs evaluations", "training.eval_strategy: epoch"


def _check_best_model(recipe: Recipe) -> Iterator[Problem]:
    """Which of two models is the better one is told by one metric."""
    metric, greater = (_read(recipe, key) for key in ("metric_for_best_model", "greater_is_better"))
    training = recipe.training
    best = _read(recipe, "save_strategy") == "best" or training.keep != "last"
    name = str(metric or "loss").removeprefix("eval_")
    place = recipe.where("training", "greater_is_better")
    if greater and name in ("loss", "perplexity"):
        yield f"{place}: a model of a lower {name} is better", "remove it"
    elif greater is not None and metric is None and not best:
        yield f"{place} has no effect", "add training.metric_for_best_model, or remove it"
    if training.early_stopping_threshold and training.early_stopping_patience is None:
        place = recipe.where("training", "early_stopping_threshold")
        yield f"{place} has no effect", "add training.early_stopping_patience, or remove it"
    if _read(recipe, "save_strategy") == "best" and metric is None:
        place = recipe.where("training", "save_strategy")
        yield f"{place} needs a metric", "add training.metric_for_best_model: loss"


def _check_upload(recipe: Recipe) -> Iterator[Problem]:
    """What is said of uploads needs uploads."""
    if _read(recipe, "push_to_hub"):
        return
    for key in sorted(recipe.training.model_fields_set):
        if key.startswith("hub_"):
            place = recipe.where("training", key)
            yield f"{place} has no effect", "add training.push_to_hub: true, or remove it"


def _read(recipe: Recipe, key: str) -> Any:
    """Return a field of TRL's or transformers' that the recipe sets, else None: which there are,
    the installed versions say."""
    return getattr(recipe.training, key) if key in recipe.training.model_fields_set else None


EVALUATED = ("eval_path", "eval_split", "eval_fraction", "eval_rows")
"""Keys of `data` that say what to evaluate on."""


def _check_data(recipe: Recipe) -> Iterator[Problem]:
    """What is read is named once, and each column has one name."""
    data = recipe.data
    if data.path is None and data.mix is None:
        yield f"{recipe.where('data')} does not say what to train on", "add data.path, or data.mix"
    if data.mix is not None:
        yield from _check_mix(recipe)
    if data.streaming:
        yield from _check_streaming(recipe)
    told = [key for key in EVALUATED if getattr(data, key) is not None]
    if len(told) > 1 and told != ["eval_path", "eval_split"]:
        place = recipe.where("data", told[-1])
        yield f"{place} and data.{told[0]} exclude each other", "remove one of them"
    for columns in [data.columns, *(rows.columns for rows in data.mix or [])]:
        names = list(columns.values())
        if twice := sorted({name for name in names if names.count(name) > 1}):
            place = recipe.where("data", "columns" if columns is data.columns else "mix")
            yield f"{place} gives {', '.join(twice)} two names", "give each column one name"


def _check_targets(recipe: Recipe) -> Iterator[Problem]:
    """What speaks of sources and targets needs a task that has them; and what such a task rules
    out."""
    if not recipe.task_row.has_targets:
        if recipe.training.generate_at_evaluation:
            place = recipe.where("training", "generate_at_evaluation")
            yield f"{place} has no effect with task: {recipe.task}", "leave it out"
        return
    for key in ("source_language", "target_language"):
        other = "target_language" if key == "source_language" else "source_language"
        if getattr(recipe.data, key) and not getattr(recipe.data, other):
            yield f"{recipe.where('data', key)} needs data.{other}", f"add data.{other}"
    if recipe.lora.init_lora_weights == "eva":
        place = recipe.where("lora", "init_lora_weights")
        yield f"{place}: PEFT's eva looks at rows of one text", "init_lora_weights: true"
    best = str(_read(recipe, "metric_for_best_model") or "loss").removeprefix("eval_")
    if best in WRITTEN_METRICS and not recipe.training.generate_at_evaluation:
        place = recipe.where("training", "metric_for_best_model")
        yield (
            f"{place}: {best} is of texts that are written",
            "add training.generate_at_evaluation: true",
        )
    if recipe.training.generate_at_evaluation and recipe.distributed.shards:
        place = recipe.where("training", "generate_at_evaluation")
        yield f"{place}: a sharded model does not write", "distributed: {strategy: ddp}"


def _check_mix(recipe: Recipe) -> Iterator[Problem]:
    """`data.mix` names its data sets itself, and not what to evaluate on."""
    data = recipe.data
    for key in ("path", "name", "revision", "split", "format", "columns", "max_rows"):
        default = type(data).model_fields[key].get_default(call_default_factory=True)
        if getattr(data, key) != default:
            yield (
                f"{recipe.where('data', key)} and data.mix exclude each other",
                f"give {key} within data.mix",
            )
    if data.eval_split and not data.eval_path:
        yield (
            f"{recipe.where('data', 'eval_split')} needs data.eval_path beside data.mix",
            "add data.eval_path",
        )


def _check_streaming(recipe: Recipe) -> Iterator[Problem]:
    """A stream has no length and no order that could be sampled from."""
    if recipe.training.max_steps < 0:
        place = recipe.where("data", "streaming")
        yield (
            f"{place}: a stream never ends, so the run would not either",
            "add training.max_steps",
        )
    if "train_sampling_strategy" in recipe.training.model_fields_set:
        place = recipe.where("training", "train_sampling_strategy")
        yield f"{place} has no effect with data.streaming", "use data.shuffle_buffer"


def _check_initialisation(recipe: Recipe) -> Iterator[Problem]:
    """The method must allow the initialisation, and its settings need it."""
    found = initialisations.find_initialisation(recipe.lora.init_lora_weights)
    initial = found.name if found else None
    place = recipe.where("lora", "init_lora_weights")
    if recipe.quantized and found and found.needs_linear:
        yield (
            f"{place} needs the base's weights, which {recipe.method} stores in 4 bits",
            "use method: lora or dora",
        )
    if not recipe.quantized and initial == "loftq":
        yield (
            f"{place} makes up for 4-bit storage, which {recipe.method} does not have",
            "use method: qlora or qdora",
        )
    if recipe.method == "dora" and initial == "mica":
        yield f"{place} is not defined for DoRA", "use method: lora"
    if recipe.lora.lora_bias and isinstance(recipe.lora.init_lora_weights, str):
        place = recipe.where("lora", "lora_bias")
        yield f"{place} works only with init_lora_weights: true or false", "remove one of them"
    for name, config in initialisations.CONFIGS.items():
        if recipe.find_place("lora", config) and initial != name:
            place = recipe.where("lora", config)
            yield f"{place} has no effect", f"add lora.init_lora_weights: {name}, or remove it"
    training = recipe.training
    if training.loraplus_lr_embedding is not None and training.loraplus_lr_ratio is None:
        place = recipe.where("training", "loraplus_lr_embedding")
        yield f"{place} has no effect", "add training.loraplus_lr_ratio, or remove it"


def _check_sharding(recipe: Recipe) -> Iterator[Problem]:
    """What is not tried, or does not come out, with a sharded base."""
    if recipe.distributed.shards:
        for key, why in recipe.list_against_sharding():
            whole = key == ("lora", "modules_to_save")
            others = "deepspeed-zero3}, or ddp" if whole else "ddp}"
            yield f"{recipe.where(*key)}: {why}", f"distributed: {{strategy: {others}"
    strategy = recipe.distributed.strategy
    if recipe.distributed.replicas > 1 and strategy not in ("auto", "fsdp"):
        place = recipe.where("distributed", "replicas")
        yield f"{place}: {strategy} has no copies to share", "distributed: {strategy: fsdp}"
