"""Recipes: a YAML file (and what it extends, and `--set`) becomes one frozen, fully checked `Recipe`.

Every key is known: ours are declared below with range and help, and each other field of PEFT's `LoraConfig` and TRL's
`SFTConfig` (hence transformers' `TrainingArguments`) is taken over under its own name from the installed versions. All
problems are reported at once, each with file and line. Neither torch nor anything that imports it is imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, create_model

from lora_cli import fields, yamlfile
from lora_cli.errors import UsageError, nearest
from lora_cli.yamlfile import Document, Keys, Place

Auto = Literal["auto"]
TAKEN_OVER: dict[str, Any] = {"x-upstream": True}  # marks the fields that are declared upstream, not here
DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """What all sections share: unknown keys and lossy conversions are errors, nothing changes after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    def given(self) -> dict[str, Any]:
        """The values to hand upstream: all declared here, and of the taken-over fields those the recipe sets."""
        taken_over = {name for name, field in type(self).model_fields.items() if field.json_schema_extra == TAKEN_OVER}
        return {name: value for name, value in self if name not in taken_over or name in self.model_fields_set}


class Model(Section):
    """The base model."""

    name_or_path: str
    """A model on the hub (`HuggingFaceTB/SmolLM2-135M`) or a local folder, relative to the current folder."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the commit it resolves to is recorded."""
    dtype: Auto | DType = "auto"
    """Type of the base weights and of the computation; `auto`: bfloat16 where the hardware computes it natively."""
    attn_implementation: str | None = None
    """Attention kernel (`sdpa`, `eager`, `flash_attention_2`, …); unset leaves the choice to transformers."""
    chat_template: str = "auto"
    """How a conversation becomes text: `alpaca`, `chatml`, a `.jinja` file, or `auto`: the tokenizer's own template,
    else `alpaca`. It is saved with the adapter, the merged model and the GGUF."""


class LoraFields(Section):
    """The adapter: every field of PEFT's `LoraConfig`."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank: the inner size of B·A."""
    lora_alpha: Annotated[int | float, Field(gt=0)] = 32
    """The update is scaled by lora_alpha/r (lora_alpha/√r with use_rslora)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: name endings, one regular expression, or `all-linear` (all but the output head)."""
    use_dora: bool | None = None
    """Weight-decomposed LoRA; follows from `method` and need not be set."""
    init_lora_weights: (
        bool
        | Annotated[
            str, Field(pattern=r"^(gaussian|eva|olora|pissa|pissa_niter_\d+|corda|loftq|orthogonal|mica|lora_ga)$")
        ]
    ) = True
    """Initial A and B; true is Kaiming-uniform A and zero B."""
    autocast_adapter_dtype: bool = True
    """Keep the adapter's weights in float32 whatever the base's type (PEFT's argument of that name)."""


class Quantization(Section):
    """4-bit storage of the base, for `qlora` and `qdora`: fields of transformers' `BitsAndBytesConfig`."""

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit code: NF4 is optimal for normally distributed weights."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the block scales as well: 0.37 bit less per weight."""
    bnb_4bit_compute_dtype: Auto | DType = "auto"
    """Type that weights are dequantised to for the matrix product; `auto`: the model's dtype."""
    bnb_4bit_quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8"
    """Type of the packed storage; FSDP wants the compute type."""
    llm_int8_skip_modules: list[str] | None = None
    """Modules that stay unquantised; unset: the output head."""


class Data(Section):
    """What is trained on."""

    path: str | list[str]
    """A data set on the hub (`tatsu-lab/alpaca`), a local folder, or local files (.json .jsonl .csv .parquet .txt)."""
    name: str | None = None
    """Configuration of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    split: str = "train"
    """The part to train on; slices such as `train[:1000]` work."""
    eval_path: str | list[str] | None = None
    """Files or data set to evaluate on; unset: `path`, where eval_split is given."""
    eval_split: str | None = None
    """The part to evaluate on (default `train` when eval_path is given)."""
    format: Auto | Literal["alpaca", "prompt_completion", "messages", "text"] = "auto"
    """Shape of a row; `auto` tells by the columns."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of this data set's columns, as `ours: theirs` (`prompt: question`)."""
    train_on: Literal["completion", "assistant", "all"] = "assistant"
    """Tokens with loss: the last answer, every answer, or everything."""
    on_long_row: Literal["drop", "truncate", "error"] = "drop"
    """A row over training.max_length tokens is left out (counted), cut at the end (counted), or an error."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use at most this many rows."""


class TrainingFields(Section):
    """The run: every field of TRL's `SFTConfig`, which extends transformers' `TrainingArguments`."""

    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Peak learning rate; adapters want about ten times that of full fine-tuning."""
    lr_scheduler_type: str = "cosine"
    """Schedule after warm-up: linear, cosine, constant, …"""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Steps of linear warm-up; below 1 a share of all steps."""
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Passes over the data."""
    max_steps: Annotated[int, Field(ge=-1)] = -1
    """Stop after this many optimiser steps; -1: as num_train_epochs says."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows per forward pass and device."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimiser step."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest row in tokens; see data.on_long_row."""
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations instead of keeping them; `auto`: on a GPU only."""
    optim: str = "auto"
    """Optimiser; `auto`: fused AdamW."""
    bf16: Auto | bool = "auto"
    """Autocast to bfloat16; `auto`: when model.dtype is bfloat16."""
    eval_strategy: Auto | Literal["no", "steps", "epoch"] = "auto"
    """When to evaluate; `auto`: after each epoch when there is evaluation data."""
    logging_steps: Annotated[float, Field(gt=0)] = 10
    """Steps between two records in metrics.jsonl."""
    save_total_limit: Annotated[int, Field(ge=1)] | None = 2
    """Checkpoints kept; older ones are deleted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random in the run."""
    report_to: str | list[str] = "none"
    """Also log to wandb, tensorboard, trackio, …"""
    dataset_num_proc: Annotated[int, Field(ge=1)] | None = None
    """Processes that prepare the rows."""
    model_init_kwargs: dict[str, Any] | None = None
    """Further arguments of `AutoModelForCausalLM.from_pretrained`."""


# Fields of upstream classes that a recipe says elsewhere, and where.
NOT_IN_LORA = {
    "peft_type": "the method is always LoRA",
    "task_type": "it is always CAUSAL_LM",
    "runtime_config": "it is not saved with an adapter",
    "inference_mode": "training sets it",
}
NOT_IN_TRAINING = {
    "output_dir": "use output_dir at the top level",
    "chat_template_path": "use model.chat_template",
    "completion_only_loss": "use data.train_on: completion",
    "assistant_only_loss": "use data.train_on: assistant",
    "dataset_text_field": "use data.columns: {text: NAME}",
    "dataset_kwargs": "lora prepares the rows itself; see the data section",
    "truncation_mode": "use data.on_long_row",
    "shuffle_dataset": "rows are drawn in random order already; see train_sampling_strategy",
    "resume_from_checkpoint": "use lora train --resume",
    "trust_remote_code": "code from a model's repository is never run",
    "hub_token": "a recipe is no place for a secret: set HF_TOKEN in the environment",
    "disable_tqdm": "lora draws its own progress line",
    "do_train": "lora train always trains",
    "do_eval": "use training.eval_strategy",
    "do_predict": "use lora generate",
    "local_rank": "the launcher sets it",
}
# What people type from older versions or other tools, and what it is called here.
RENAMED = {
    "torch_dtype": "model.dtype",
    "max_seq_length": "training.max_length",
    "warmup_ratio": "training.warmup_steps (below 1 it is a share of the steps)",
    "group_by_length": "training.train_sampling_strategy: group_by_length",
    "evaluation_strategy": "training.eval_strategy",
    "no_cuda": "training.use_cpu",
    "load_in_4bit": "method: qlora",
    "lora_r": "lora.r",
    "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path",
    "dataset": "data.path",
}


def _taken_over(base: type[Section], name: str, upstream: Sequence[tuple[str, str, str]], without: set[str]) -> Any:
    """`base` with every other field of the `upstream` classes added under its own name, type, default and help."""
    added: dict[str, Any] = {
        field.name: (field.annotation, Field(field.default, description=field.help, json_schema_extra=TAKEN_OVER))
        for field in fields.read(tuple(upstream)).values()
        if field.name not in base.model_fields and field.name not in without
    }
    return create_model(name, __base__=base, __doc__=base.__doc__, **added)


if TYPE_CHECKING:

    class Lora(LoraFields): ...

    class Training(TrainingFields): ...

else:
    Lora = _taken_over(LoraFields, "Lora", fields.LORA_CONFIG, set(NOT_IN_LORA))
    Training = _taken_over(TrainingFields, "Training", fields.SFT_CONFIG, set(NOT_IN_TRAINING))


class Recipe(Section):
    """One fine-tuning run."""

    extends: str | None = None
    """Another recipe, relative to this file, whose values hold where this one gives none."""
    method: Literal["lora", "qlora", "dora", "qdora"] = "lora"
    """What is trained: LoRA, DoRA, or either on a base stored in 4 bits (NF4, doubly quantised)."""
    trainer: Literal["sft", "trainer"] = "sft"
    """TRL's `SFTTrainer` or transformers' `Trainer`; rows and labels are the same for both."""
    model: Model
    lora: Lora = Field(default_factory=Lora)
    quantization: Quantization = Field(default_factory=Quantization)
    data: Data
    training: Training = Field(default_factory=Training)
    output_dir: str = ""
    """The run's folder; default `runs/NAME` for a recipe NAME.yaml."""

    _places: dict[Keys, Place] = PrivateAttr(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether the base is stored in 4 bits."""
        return self.method in ("qlora", "qdora")

    def where(self, *keys: str) -> str:
        """`file:line: section.key` of a value that was written, else just `section.key`."""
        place = self._places.get(keys)
        return f"{place}: {'.'.join(keys)}" if place else ".".join(keys)

    def source(self, *keys: str) -> Place | None:
        """Where a value was written; None when it is a default."""
        return self._places.get(keys)

    def settled(self, changes: dict[str, dict[str, Any]]) -> Recipe:
        """A copy with values of sections replaced: what `auto` resolved to."""
        sections = {name: getattr(self, name).model_copy(update=values) for name, values in changes.items()}
        return self.model_copy(update=sections)

    def plain(self) -> dict[str, Any]:
        """The recipe as data that loads to the same recipe: everything declared, and all that was set."""
        sections = ("model", "lora", "quantization", "data", "training")
        result: dict[str, Any] = {"method": self.method, "trainer": self.trainer}
        result |= {name: getattr(self, name).given() for name in sections if name != "quantization" or self.quantized}
        return result | {"output_dir": self.output_dir}


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, what it extends, and `section.key=value` overrides. UsageError lists every problem at once."""
    document = _read_chain(path, ())
    for text in overrides:
        document = _merge(document, _override(text))
    if not isinstance(document.data, dict) or not document.data:
        raise UsageError(f"{path}: a recipe has sections such as model: and data:", "lora schema")
    document.data.pop("extends", None)
    document.data.setdefault("output_dir", f"runs/{path.stem}")
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        raise _as_usage_error(path, list(_problems(error, document))) from None
    recipe._places = document.places
    if contradictions := list(_contradictions(recipe)):
        raise _as_usage_error(path, contradictions)
    return recipe


def _read_chain(path: Path, above: tuple[Path, ...]) -> Document:
    """The file merged over the recipe it extends, that one over its own, and so on."""
    document = yamlfile.read(path)
    parent = document.data.get("extends") if isinstance(document.data, dict) else None
    if parent is None:
        return document
    place = document.places[("extends",)]
    if not isinstance(parent, str):
        raise UsageError(f"{place}: extends must be the path of one recipe", "extends: base.yaml")
    base = path.parent / parent
    if base.resolve() in [file.resolve() for file in (*above, path)]:
        circle = " -> ".join(map(str, (*above, path, base)))
        raise UsageError(f"{place}: extends goes in a circle: {circle}", "remove one")
    if not base.is_file():
        raise UsageError(f"{place}: {base}, which it extends, does not exist", "the path is relative to this file")
    return _merge(_read_chain(base, (*above, path)), document)


def _merge(below: Document, above: Document) -> Document:
    """`above` laid over `below`: sections join, other values (lists too) are replaced."""
    if not (isinstance(below.data, dict) and isinstance(above.data, dict)):
        return above
    data, places = dict(below.data), {**below.places, **above.places}
    for key, value in above.data.items():
        data[key] = (
            _merge(Document(data[key], {}), Document(value, {})).data
            if isinstance(value, dict) and isinstance(data.get(key), dict)
            else value
        )
    return Document(data, places)


def _override(text: str) -> Document:
    """`section.key=value` as a document whose places are the option itself."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {text}: expected section.key=value", "--set training.learning_rate=1e-4")
    document = yamlfile.parse(value, f"--set {text}", first_line=0)
    data, keys = document.data if document.places else value, tuple(key.split("."))
    places: dict[Keys, Place] = {(*keys, *inner): place for inner, place in document.places.items()}
    for depth in range(1, len(keys) + 1):
        places[keys[:depth]] = Place(f"--set {text}", 0)
    for part in reversed(keys):
        data = {part: data}
    return Document(data, places)


def _problems(error: ValidationError, document: Document) -> Iterator[tuple[str, str | None]]:
    """One (message, hint) for each wrong key, however many alternatives of its type refused it."""
    by_key: dict[Keys, list[Any]] = {}
    for detail in error.errors():
        keys: Keys = ()
        for part in detail["loc"]:  # beyond the data, loc goes on with names of union members
            if detail["type"] != "missing" and (*keys, part) not in document.places:
                break
            keys = (*keys, part)
        by_key.setdefault(keys, []).append(detail)
    for keys, details in sorted(by_key.items(), key=lambda item: _nearest_place(item[0], document).line):
        name, place = ".".join(map(str, keys)), _nearest_place(keys, document)
        if details[0]["type"] == "extra_forbidden":
            message, hint = _unknown_key(keys)
            yield f"{place}: {message}", hint
        elif details[0]["type"] == "missing":
            yield f"{place}: {name} is missing", f"add {name}"
        else:
            allowed = " or ".join(dict.fromkeys(_allowed(detail) for detail in details))
            yield f"{place}: {name} is {_shown(details[0]['input'])}, but must be {allowed}", None


def _nearest_place(keys: Keys, document: Document) -> Place:
    while keys not in document.places:
        keys = keys[:-1]
    return document.places[keys]


def _unknown_key(keys: Keys) -> tuple[str, str]:
    """What to say of a key that no section has."""
    *section, key = map(str, keys)
    name = ".".join([*section, key])
    elsewhere = {"lora": NOT_IN_LORA, "training": NOT_IN_TRAINING}.get(section[0] if section else "", {})
    if key in elsewhere:
        return f"{name} cannot be set", elsewhere[key]
    if key in RENAMED:
        return f"{name} is not a known key", f"it is called {RENAMED[key]}"
    kinds = {name: field.annotation for name, field in Recipe.model_fields.items()}
    sections = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Section)}
    homes = [parent for parent, model in sections.items() if key in model.model_fields]
    if homes:
        return f"{name} is not a known key", f"{key} belongs in the section {homes[0]}"
    known = sections[section[0]].model_fields if section and section[0] in sections else Recipe.model_fields
    guess = nearest(key, known)
    return f"{name} is not a known key", (
        f"did you mean {'.'.join([*section, guess])}?" if guess else "lora schema --markdown lists every key"
    )


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of keys",
    "none_required": "null",
}


def _allowed(detail: Any) -> str:
    context = detail.get("ctx", {})
    if detail["type"] == "literal_error":
        return str(context["expected"])
    if detail["type"] == "string_pattern_mismatch":
        return f"text matching {context['pattern']}"
    if detail["type"] in _KINDS:
        return _KINDS[detail["type"]]
    return detail["msg"].removeprefix("Input should be ").replace("Input should", "it should")


def _shown(value: Any) -> str:
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 40 else text[:37] + "…"


def _contradictions(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Values that are right alone and wrong together."""
    dora = recipe.method in ("dora", "qdora")
    if recipe.lora.use_dora is not None and recipe.lora.use_dora != dora:
        says = str(recipe.lora.use_dora).lower()
        yield f"{recipe.where('lora', 'use_dora')} is {says}, but method is {recipe.method}", "change one of them"
    if recipe.source("quantization") and not recipe.quantized:
        place = recipe.where("quantization")
        yield f"{place} has no effect with method: {recipe.method}", "use method: qlora, or remove the section"
    if recipe.trainer == "trainer":
        sft_only = fields.read(fields.SFT_CONFIG).keys() - fields.read(fields.TRAINING_ARGUMENTS).keys()
        for key in sorted((recipe.training.model_fields_set & sft_only) - TrainingFields.model_fields.keys()):
            yield f"{recipe.where('training', key)} works only with trainer: sft", "trainer: sft"
    if recipe.training.eval_strategy in ("steps", "epoch") and not (recipe.data.eval_path or recipe.data.eval_split):
        place = recipe.where("training", "eval_strategy")
        yield f"{place} needs evaluation data", "set data.eval_path or data.eval_split"


def _as_usage_error(path: Path, problems: list[tuple[str, str | None]]) -> UsageError:
    """One problem as it stands; several as a list."""
    if len(problems) == 1:
        return UsageError(*problems[0])
    lines = [f"  {message}" + (f"\n    {hint}" if hint else "") for message, hint in problems]
    heading = f"{len(problems)} problems in {path}"
    return UsageError("\n".join([heading, *lines]), "lora schema --markdown lists every key")
