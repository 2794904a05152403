"""Declare a recipe: every key with its type, range, default and help.

Our own keys are declared below. Every other field of PEFT's `LoraConfig` and TRL's `SFTConfig`
(hence transformers' `TrainingArguments`) is taken over under its own name from the installed
versions. A recipe is frozen once loaded (`load.py`). Neither torch nor anything that imports it is
imported here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, create_model

from lora_cli.recipe import initialisations, upstream_fields
from lora_cli.recipe.strict_yaml import Keys, Place
from lora_cli.recipe.tasks import (
    DEFAULT_OBJECTIVE,
    Objective,
    Task,
    name_objective,
    name_task,
)

Auto = Literal["auto"]
TAKEN_OVER: dict[str, Any] = {"x-upstream": True}
"""Marks the fields that are declared upstream, not here."""
DType = Literal["float32", "bfloat16", "float16"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
TaskName = Literal[
    "causal_lm", "sequence_classification", "token_classification", "question_answering",
    "seq2seq_lm", "image_classification",
]  # fmt: skip
Index = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]
Names = Annotated[list[Name], Field(min_length=1)]
TokenIds = Annotated[list[Index], Field(min_length=1)]


class Section(BaseModel):
    """What all sections share: unknown keys and lossy conversions are errors, and nothing changes
    after loading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def collect_values(self) -> dict[str, Any]:
        """Return the values to hand upstream: all those declared here, and of the taken-over fields
        those that the recipe sets."""
        taken_over = {
            name
            for name, field in type(self).model_fields.items()
            if field.json_schema_extra == TAKEN_OVER
        }
        return {
            name: _to_data(value)
            for name, value in self
            if name not in taken_over or name in self.model_fields_set
        }


def _to_data(value: Any) -> Any:
    """Return a value with the sections in a list turned into data."""
    if not isinstance(value, list):
        return value
    return [item.collect_values() if isinstance(item, Section) else item for item in value]


class Model(Section):
    """The base model."""

    name_or_path: Name
    """A model on the hub (`HuggingFaceTB/SmolLM2-135M`) or a local folder, relative to the current
    folder; or a GGUF file, which is dequantised once. With adapter it may be left out, or `auto`:
    the base that the adapter names."""
    adapter: Name | None = None
    """An adapter to train on: a folder or a name on the hub, ours or any PEFT LoRA or DoRA. Its
    rank, targets and all else of `lora:` are taken over, as are its tokens and its chat template;
    only lora_dropout may be another. It is never written to."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; the commit it resolves to is recorded."""
    dtype: Auto | DType = "auto"
    """Type of the base weights and of the computation; `auto`: bfloat16 where the hardware computes
    it natively."""
    attn_implementation: Auto | str | None = "auto"
    """Attention kernel (`sdpa`, `eager`, `flash_attention_2`, …); null leaves the choice to
    transformers; `auto`: flash attention on a GPU where it is installed."""
    chat_template: str = "auto"
    """How a conversation becomes text: `alpaca`, `chatml`, a `.jinja` file, the name of
    one of the tokenizer's templates where it has several, or `auto`: the tokenizer's own template
    (`default` of several), else `alpaca`. It is saved with the adapter, the merged model and the
    GGUF."""
    system_prompt: Name | None = None
    """What a conversation without a system message begins with. It becomes part of the chat
    template, and so holds wherever the adapter, the merged model or the GGUF is used."""
    add_tokens: list[Name] = Field(default_factory=list)
    """Tokens the tokenizer lacks. The embeddings grow if they must; of embeddings and head, only
    the new rows are trained."""
    add_special_tokens: list[Name] = Field(default_factory=list)
    """The same for tokens that are marks rather than text (`<|im_start|>`): they are left out when
    an answer is printed."""
    labels: Auto | Names = "auto"
    """What a model that classifies or tags tells apart, in this order; `auto`: the labels that the
    data have, sorted. They are kept in config.json beside the adapter and in the merged model."""
    problem_type: Auto | ProblemType = "auto"
    """One label for each row, several, or numbers (regression); `auto`: as the data's labels
    are."""


class LoraFields(Section):
    """The adapter: every field of PEFT's `LoraConfig`."""

    r: Annotated[int, Field(ge=1)] = 16
    """Rank: the inner size of B·A."""
    lora_alpha: Annotated[int | float, Field(gt=0)] = 32
    """The update is scaled by lora_alpha/r (lora_alpha/√r with use_rslora)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training."""
    target_modules: Name | list[Name] = "all-linear"
    """Modules that get an adapter: name endings, one regular expression, or `all-linear` (all but
    the output head, what no text passes through, such as a tower for pictures, and what PEFT does
    not adapt)."""
    exclude_modules: Name | Names | None = None
    """Modules that do not get an adapter although target_modules names them: endings or one regular
    expression."""
    modules_to_save: Names | None = None
    """Modules that are trained whole, and saved with the adapter."""
    target_parameters: Names | None = None
    """Parameters that get an adapter where there is no module to name, such as fused experts: name
    endings."""
    use_dora: bool | None = None
    """Weight-decomposed LoRA; follows from `method` and need not be set."""
    init_lora_weights: bool | Annotated[str, Field(pattern=initialisations.PATTERN)] = True
    """Initial A and B. true: Kaiming-uniform A and zero B; false: both random, for tests. gaussian,
    orthogonal, mica (trains A only): drawn or from the base's weights. eva, corda, lora_ga: from
    the first rows of the data, see eva_config, corda_config, lora_ga_config. loftq (qlora, qdora):
    makes up for the error of the 4-bit storage. pissa, pissa_niter_N, olora, corda and lora_ga move
    part of the base's weights into the adapter; it is saved as a plain one of twice the rank on the
    base as it is."""
    layers_to_transform: Index | Annotated[list[Index], Field(min_length=1)] | None = None
    """Only the modules in these layers, counted from 0; needs target_modules to be a list."""
    layers_pattern: Name | Names | None = None
    """What stands before the layer's number in a module's name, if PEFT does not find it by
    itself."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Other ranks for some modules: name endings or regular expressions, each matching modules that
    the others do not."""
    alpha_pattern: dict[str, Annotated[int | float, Field(gt=0)]] = Field(default_factory=dict)
    """Other lora_alpha for some modules, named as in rank_pattern."""
    trainable_token_indices: TokenIds | dict[str, TokenIds] | None = None
    """Rows of the embeddings to train whole; or the rows by module (`embed_tokens: [5, 6]`)."""
    lora_bias: bool = False
    """Also train a bias in B; every adapted module must have a bias itself, or the merged model
    could not hold it."""
    autocast_adapter_dtype: bool = True
    """Keep the adapter's weights in float32 whatever the base's type (PEFT's argument of that
    name)."""


class Quantization(Section):
    """4-bit storage of the base, for `qlora` and `qdora`: fields of transformers'
    `BitsAndBytesConfig`. A base that is in 4 bits already keeps its own."""

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


class Distributed(Section):
    """How several processes that train together share the work: `lora train --nproc N`."""

    strategy: Literal["auto", "ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"] = "auto"
    """ddp: each process holds the whole base, which is fastest where it fits; fsdp: each holds a
    part of it (FSDP2), and decoder layers are gathered as they are computed. auto: fsdp on GPUs on
    which `lora plan` says that a step does not fit, else ddp; deepspeed-zero3: as fsdp, by
    DeepSpeed, for which pip install 'lora-cli[deepspeed]'; deepspeed-zero2: ddp, as only an adapter
    has gradients and optimiser state."""
    replicas: Annotated[int, Field(ge=1)] = 1
    """Copies of the base where fsdp shards it (HSDP), each over neighbouring processes: as many as
    there are machines, if one of them has room for a copy, lets weights travel inside of machines
    alone. Has to divide the number of processes."""

    @property
    def shards(self) -> bool:
        """Whether several processes have a part of the base each; settled."""
        return self.strategy in ("fsdp", "deepspeed-zero3")


Paths = Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)]
Format = Literal[
    "alpaca", "prompt_completion", "messages", "sharegpt", "text", "tokens", "labelled", "tagged",
    "squad", "pairs", "images", "preference", "unpaired",
]  # fmt: skip
Column = Literal[
    "instruction", "input", "output", "prompt", "completion", "messages", "conversations", "text",
    "input_ids", "labels", "system", "tools", "label", "text_pair", "tokens", "tags",
    "question", "context", "answers", "source", "target", "image", "chosen", "rejected",
]  # fmt: skip


class Rows(Section):
    """One of several data sets in `data.mix`."""

    path: Paths
    """As data.path."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often each row is seen in an epoch: 2 twice, 0.5 one half of the rows, drawn by
    training.seed."""
    name: str | None = None
    """As data.name."""
    revision: str | None = None
    """As data.revision."""
    split: str = "train"
    """As data.split."""
    format: Auto | Format = "auto"
    """As data.format."""
    columns: dict[Column, str] = Field(default_factory=dict)
    """As data.columns."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """As data.max_rows."""


class Data(Section):
    """What is trained on."""

    path: Paths | None = None
    """A data set on the hub (`tatsu-lab/alpaca`), a local folder, or local files (.json .jsonl .csv
    .tsv .txt, also under .gz, .parquet .arrow), also as a pattern (`data/*.jsonl`) or a list; or
    such files by address (https://, s3://, gs://, az://, abfs://), fetched once per machine. A
    folder of pictures has a folder for each label (`photos/cat/1.png`)."""
    mix: Annotated[list[Rows], Field(min_length=1)] | None = None
    """Several data sets in place of path, each with a weight, and its own format and columns."""
    name: str | None = None
    """Configuration of a hub data set that has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set."""
    split: str = "train"
    """The part to train on; slices such as `train[:1000]` work."""
    eval_path: Paths | None = None
    """Files or data set to evaluate on; unset: `path`, where eval_split is given."""
    eval_split: str | None = None
    """The part to evaluate on (default `train` when eval_path is given)."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold about this share of the rows of path, or mix, out of training, and evaluate on them.
    What a row says decides: equal rows are on one side, and each stays there when others are
    added. Of a stream, rows are held out of the first 10,000."""
    eval_rows: Annotated[int, Field(ge=1)] | None = None
    """The same for a number of different rows; when others are added, some may change sides."""
    format: Auto | Format = "auto"
    """Shape of a row; `auto` goes by the columns: instruction/input/output, prompt/completion,
    OpenAI's messages, ShareGPT's conversations, text, or input_ids with labels; also
    instruction/context/response (Dolly), question/answer, query/response, problem/solution,
    input/output and the like, which is said. Of pictures (images), image/label: a file beside the
    table, or, in Parquet, the picture itself. Of preference, prompt/chosen/rejected, as texts or
    as lists of turns, or chosen/rejected that are conversations with the same beginning. Of
    unpaired, label (true or false) beside an answer in any of the formats for answers."""
    columns: dict[Column, str] = Field(default_factory=dict)
    """Names of this data set's columns, as `ours: theirs` (`prompt: question`); a dot leads into a
    column of mappings (`source: translation.de`)."""
    source_prefix: Annotated[str, Field(min_length=1)] | None = None
    """What each source begins with, as T5's `summarize: `; with seq2seq_lm. It is kept with the
    adapter, for its answers."""
    source_language: Name | None = None
    """Code of the sources' language, for tokenizers that mark it, as those of mBART and NLLB
    (`de_DE`, `deu_Latn`)."""
    target_language: Name | None = None
    """The same of the targets."""
    max_target_length: Annotated[int, Field(ge=2)] | None = None
    """Longest target in tokens, with seq2seq_lm; unset: training.max_length, which is that of the
    sources."""
    train_on: Literal["completion", "assistant", "all"] = "assistant"
    """Tokens with loss: the last answer, every answer, or everything. A turn with `train: false` or
    `weight: 0` has none."""
    on_long_row: Literal["drop", "truncate", "split", "error"] = "drop"
    """A row over training.max_length tokens is left out, cut at the end, cut into several, or an
    error; counted. With task: question_answering it is split, unless drop or error is asked for:
    its text is read in windows. With seq2seq_lm a target over data.max_target_length is long,
    too."""
    stride: Annotated[int, Field(ge=0)] = 128
    """With task: question_answering: tokens that two windows of a long text share, so that an
    answer at the end of one is whole in the other; no more than half of a window."""
    longest_answer: Annotated[int, Field(ge=1)] = 30
    """With task: question_answering: tokens that an answer has at most where one is looked for."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used (invalid JSON, a missing column, an unknown role, …) is an error,
    or left out; bad rows are counted by kind, and the first is named with file and line."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use at most this many rows."""
    streaming: bool = False
    """Prepare rows while training instead of before it, for sets that do not fit on the disk; needs
    training.max_steps. The data are read again when they end. In a mix, weights then say how often
    a row of each is drawn."""
    shuffle_buffer: Annotated[int, Field(ge=1)] = 10_000
    """With streaming: each row is drawn at random from this many that were read; 1 keeps their
    order."""

    @property
    def holds_out(self) -> bool:
        """Whether rows are held out of those that are read, to evaluate on."""
        return self.eval_fraction is not None or self.eval_rows is not None

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on."""
        return bool(self.eval_path or self.eval_split) or self.holds_out


class Preference(Section):
    """What is made of the two answers of a row, with `objective: dpo`, `orpo`, `simpo` or `cpo`. h
    is how much more likely the chosen answer is than the rejected one, in nats; with dpo less what
    it was at the start, so that h begins at 0. Or of its one answer, with `objective: kto`."""

    loss: Literal[
        "sigmoid", "ipo", "hinge", "robust", "sigmoid_norm", "apo_zero", "apo_down", "odds_ratio",
        "simpo", "kto",
    ] = "sigmoid"  # fmt: skip
    """sigmoid: -log σ(βh), with label_smoothing conservative DPO; ipo: (h - 1/2β)², h by mean over
    tokens; hinge: max(0, 1 - βh); robust: DPO made right on average for pairs of which
    label_smoothing are the wrong way round; sigmoid_norm: sigmoid, h by mean over tokens; apo_zero:
    chosen answers more likely, rejected ones less; apo_down: both less, rejected ones more so.
    cpo has sigmoid, ipo and hinge. orpo has odds_ratio: -β log σ of the difference of both answers'
    log odds, by mean over tokens; simpo has simpo: -log σ(βh - γ), h by mean over tokens. kto has
    kto: 1 - σ(β(h - z)) of a desirable answer, 1 - σ(β(z - h)) of another, h being how much
    likelier it is than at the start, and z the same of answers to other prompts, the mean over the
    step's rows and at least 0."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """β: the higher, the closer the model stays to its start; with orpo how much the odds weigh
    (λ in its paper). With simpo it is 2 where the recipe does not say."""
    gamma: Annotated[float, Field(ge=0)] = 0.0
    """γ: how far apart βh has to be with simpo; 1 where the recipe does not say."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of pairs taken to be the wrong way round; with loss: sigmoid, simpo or robust."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Adds so many times the chosen answer's own loss, the mean over its tokens. With orpo and cpo
    it is 1 where the recipe does not say, as it is a part of theirs."""
    desirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """With kto: how much a desirable answer counts. Times their number it should be 1 to 4/3 of
    the same of the others, as its authors say."""
    undesirable_weight: Annotated[float, Field(gt=0)] = 1.0
    """With kto: how much an undesirable answer counts."""


class TrainingFields(Section):
    """The run: every field of TRL's `SFTConfig`, which extends transformers'
    `TrainingArguments`."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate; adapters want about ten times that of full fine-tuning."""
    lr_scheduler_type: str = "cosine"
    """Schedule after warm-up: linear, cosine, constant, …"""
    warmup_steps: Annotated[float, Field(ge=0)] = 0.03
    """Steps of linear warm-up; below 1 a share of all steps."""
    num_train_epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data."""
    max_steps: Literal[-1] | Annotated[int, Field(ge=1)] = -1
    """Stop after this many optimiser steps; -1: as num_train_epochs says."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows per forward pass and device."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimiser step."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest row in tokens; see data.on_long_row."""
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations instead of keeping them; `auto`: where the run does not fit without,
    see `lora plan`."""
    optim: str = "auto"
    """Optimiser; `auto`: fused AdamW, or on a GPU a paged one of 8 bits where the run does not fit
    otherwise."""
    torch_compile: Auto | bool = "auto"
    """Compile the decoder's layers, each by itself; `auto`: no."""
    use_liger_kernel: Auto | bool = "auto"
    """Liger's kernels (CUDA); `auto`: no, see loss_head."""
    dataloader_num_workers: Auto | Annotated[int, Field(ge=0)] = "auto"
    """Processes that put batches together; `auto`: 0, which uses the run's own process."""
    packing: Auto | Literal["step", "dataset"] | bool = "auto"
    """Rows share sequences, kept apart. step: those of one optimiser step, so that the run stays
    the same without its padding; dataset (or true): TRL's packing over the whole set, whose steps
    see other rows than the batch size says; false: padded batches; `auto`: step, for models in
    which it keeps rows apart."""
    packed_length: Auto | Annotated[int, Field(ge=1)] | None = "auto"
    """With packing: step, tokens up to which rows are joined to a sequence; a longer row has one to
    itself. `auto`: 1,024, and no more than max_length; on a GPU whose attention goes through each
    row by itself, the most up to 8,192 that its memory holds."""
    loss_head: Auto | Literal["trained_tokens", "stock"] = "auto"
    """Where logits are made: at tokens with a label only, some at a time, or as transformers and
    TRL do; `auto`: the first, unless label smoothing, loss_type or Liger's kernels ask for the
    other."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+: B learns this many times faster than A, which has learning_rate (the paper takes
    16)."""
    loraplus_lr_embedding: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: the learning rate of adapters on embeddings; unset: PEFT's 1e-6."""
    bf16: Auto | bool = "auto"
    """Autocast to bfloat16; `auto`: when model.dtype is bfloat16."""
    generate_at_evaluation: bool = False
    """Also write a target for each source that is evaluated, greedily, and score it: ROUGE, BLEU,
    chrF and exact matches; with seq2seq_lm."""
    sample_prompts: list[Name] = Field(default_factory=list)
    """Prompts that are answered before the first step, at each evaluation and, where there is none,
    at the end: greedily, as `lora generate` answers them, without changing what is trained. The
    answers are in samples.jsonl, and those to the first prompt on the screen; with causal_lm."""
    sample_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer to one of them in tokens. All together they take the time of so many tokens
    for each prompt, one after the other."""
    eval_strategy: Auto | Literal["no", "steps", "epoch"] = "auto"
    """When to evaluate; `auto`: after each epoch when there is evaluation data."""
    keep: Auto | Literal["best", "last"] = "auto"
    """The step that becomes adapter/: the one that evaluated best, of which a checkpoint is saved,
    or the last; `auto`: the best where there are evaluations. metric_for_best_model says by what,
    the loss where it is not set."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations in a row that were no better than the best before them."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """How much better an evaluation has to be to count as such."""
    logging_steps: Annotated[float, Field(gt=0)] = 10
    """Steps between two records in metrics.jsonl."""
    save_total_limit: Annotated[int, Field(ge=1)] | None = 2
    """Checkpoints kept; older ones are deleted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random in the run."""
    report_to: str | list[str] = "none"
    """Also log to wandb, tensorboard, trackio, mlflow, …: these get the settled recipe, the answers
    to sample prompts and the best step, too. One that fails is left out, and the run goes on."""
    eos_token: str | None = None
    """Token that ends an answer, where it is not the tokenizer's own; saved with the adapter's
    tokenizer."""
    pad_token: str | None = None
    """Token that fills short rows, where it is not the tokenizer's own."""
    dataset_num_proc: Annotated[int, Field(ge=1)] | None = None
    """Processes that prepare the rows."""
    stop_on_loss_above: Annotated[float, Field(gt=0)] | None = None
    """Stop the run at the first step whose loss is higher, since it diverges. A loss that is not a
    number stops it in any case."""
    on_oom: Literal["stop", "reduce"] = "stop"
    """When memory runs out: stop and say what would need less; or halve the batch and double the
    accumulation (with packing: step, halve the sequences), so that each step's rows stay the same,
    and continue from the last step."""
    save_only_model: bool = False
    """Save checkpoints without the optimiser's state: such a run cannot be resumed."""

    @property
    def tells_best(self) -> bool:
        """Whether evaluations are compared with each other; settled."""
        return self.keep == "best" or self.early_stopping_patience is not None


BY_METRIC = ("reduce_lr_on_plateau", "greedy")
"""Values of lr_scheduler_type that go by what evaluations measure."""
JUDGED_LATE = {"lr_scheduler_type", "optim", "use_liger_kernel"}
"""Of the keys that are declared here, those that a library only judges when it uses them."""

# Fields of upstream classes that a recipe says elsewhere, and where.
NOT_IN_LORA = {
    "peft_type": "the method is always LoRA",
    "task_type": "use task at the top level",
    "runtime_config": "it is not saved with an adapter",
    "inference_mode": "training sets it",
    "use_qalora": "it works on GPTQ bases only, which lora does not load",
    "qalora_group_size": "QALoRA works on GPTQ bases only, which lora does not load",
    "megatron_config": "Megatron's layers are not what lora loads",
    "megatron_core": "Megatron's layers are not what lora loads",
    "arrow_config": "Arrow routes between adapters that are trained already",
    "alora_invocation_tokens": "an aLoRA can be trained but not merged",
    "kasa_config": "KaSA's regularizers, which PEFT leaves to its callers, are in no loss here",
    "monteclora_config": "its sampler is not part of a checkpoint: a resumed run would differ",
    "layer_replication": "replicated layers share weights, so their adapters would merge into each "
    "other",
    "loftq_config": "use init_lora_weights: loftq; the bits are those of method: qlora",
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
    "model_init_kwargs": "use model.revision, model.dtype and model.attn_implementation: merging "
    "loads the same base",
    "ignore_data_skip": "a resumed run is the same run: it goes on with the next rows",
    "auto_find_batch_size": "use training.on_oom: reduce, which keeps the rows of each step",
    "dataloader_in_order": "rows in whatever order they are ready make an unrepeatable run",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "trust_remote_code": "only the command line allows code from a model's repository: "
    "--trust-remote-code",
    "hub_token": "keep secrets out of recipes: set HF_TOKEN in the environment",
    "disable_tqdm": "lora draws its own progress line",
    "load_best_model_at_end": "use training.keep: best",
    "do_train": "lora train always trains",
    "do_eval": "use training.eval_strategy",
    "do_predict": "use lora generate",
    "local_rank": "the launcher sets it",
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "parallelism_config"),
        "several processes: lora train RECIPE --nproc N; distributed.strategy says how they share "
        "the base",
    ),
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


def _take_over(
    base: type[Section], name: str, upstream: Sequence[tuple[str, str, str]], without: set[str]
) -> Any:
    """Return `base` with every other field of the `upstream` classes added under its own name,
    type, default and help."""
    added: dict[str, Any] = {
        field.name: (
            field.annotation,
            Field(field.default, description=field.help, json_schema_extra=TAKEN_OVER),
        )
        for field in upstream_fields.read_fields(tuple(upstream)).values()
        if field.name not in base.model_fields and field.name not in without
    }
    # There is no source to look for docstrings in, and looking takes pydantic up to 0.1 s.
    read = {"use_attribute_docstrings": False}
    return create_model(name, __base__=base, __doc__=base.__doc__, __cls_kwargs__=read, **added)


if TYPE_CHECKING:

    class Lora(LoraFields): ...

    class Training(TrainingFields): ...

else:
    Lora = _take_over(LoraFields, "Lora", upstream_fields.LORA_CONFIG, set(NOT_IN_LORA))
    Training = _take_over(
        TrainingFields, "Training", DEFAULT_OBJECTIVE.fields, set(NOT_IN_TRAINING)
    )


class Recipe(Section):
    """One fine-tuning run."""

    extends: str | None = None
    """Another recipe, relative to this file, or a shipped one by its name, whose values hold where
    this one gives none."""
    method: Literal["lora", "qlora", "dora", "qdora"] = "lora"
    """What is trained: LoRA, DoRA, or either on a base stored in 4 bits (NF4, doubly quantised)."""
    trainer: Auto | Literal["sft", "trainer"] = "auto"
    """TRL's `SFTTrainer` or transformers' `Trainer`; rows and labels are the same for both. `auto`:
    sft, unless the output head is adapted: SFTTrainer's loss bypasses what is put on it."""
    task: TaskName = "causal_lm"
    """What the model is trained to do: write text, tell which labels a text has, or which each of
    its words has, find answers in a text, or tell which labels a picture has; or, with an encoder
    and a decoder, read a text and write another."""
    objective: Auto | Literal["sft", "dpo", "orpo", "simpo", "cpo", "kto"] = "auto"
    """What training minimises, with task: causal_lm: the loss of the answers (sft), or what makes
    one of two answers likelier than the other (rows have prompt, chosen, rejected): dpo, held
    against the model as it was at the start; orpo, simpo, cpo, without that. kto makes answers
    likelier that are wanted, and others less so (rows have prompt, completion, label), held against
    the start as well. `auto`: the task's own loss."""
    model: Model
    lora: Lora = Field(default_factory=Lora)
    quantization: Quantization = Field(default_factory=Quantization)
    data: Data
    training: Training = Field(default_factory=Training)
    preference: Preference = Field(default_factory=Preference)
    distributed: Distributed = Field(default_factory=Distributed)
    output_dir: str = Field(default="", min_length=1)
    """The run's folder; default `runs/NAME` for a recipe NAME.yaml."""

    _places: dict[Keys, Place] = PrivateAttr(default_factory=dict)

    @property
    def task_row(self) -> Task:
        """What the model is trained to do, as the table of tasks has it."""
        return name_task(self.task)

    @property
    def objective_row(self) -> Objective:
        """What training minimises, as the table of objectives has it."""
        return name_objective(self.objective)

    @property
    def uses_trl(self) -> bool:
        """Whether TRL's trainer of the objective trains it, and not transformers' own; settled."""
        return self.trainer == self.objective_row.name

    @property
    def trains_on_cpu(self) -> bool:
        """Whether the recipe says to leave GPUs alone."""
        return bool(self.training.collect_values().get("use_cpu"))

    @property
    def max_target_length(self) -> int:
        """The longest target in tokens, of a task that has targets."""
        return self.data.max_target_length or self.training.max_length

    def count_step_rows(self) -> int:
        """Return how many rows a step has, of all processes that train together."""
        training = self.training
        return training.per_device_train_batch_size * training.gradient_accumulation_steps

    @property
    def quantized(self) -> bool:
        """Whether the base is stored in 4 bits."""
        return self.method in ("qlora", "qdora")

    @property
    def adapts_head(self) -> bool:
        """Whether anything but a plain copy is put on the output head, as far as the recipe's names
        tell."""
        tokens = (
            self.model.add_tokens
            or self.model.add_special_tokens
            or self.lora.trainable_token_indices
        )
        named = [self.lora.target_modules, *(self.lora.target_parameters or [])]
        return bool(tokens) or any("lm_head" in str(name) for name in named)

    def where(self, *keys: str) -> str:
        """Return `file:line: section.key` for a value that was written, else `section.key`."""
        place = self._places.get(keys)
        return f"{place}: {'.'.join(keys)}" if place else ".".join(keys)

    def find_place(self, *keys: str) -> Place | None:
        """Return where a value was written, or None when it is a default."""
        return self._places.get(keys)

    def add_place(self, message: str) -> str:
        """Return a message that begins with a key of this recipe, with the key's file and line put
        before it."""
        key = message.partition(":")[0].partition(" ")[0]
        parts = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        place = self._places.get(parts)
        return f"{place}: {message}" if place and "." in key else message

    def list_passed_on(self) -> list[str]:
        """Return where the recipe sets fields of the libraries that lora itself does not use, as
        `file:line: section.key`."""
        return [self.where(*keys) for keys in self._walk_passed_on()]

    def _walk_passed_on(self) -> Iterator[tuple[str, str]]:
        sections = (("lora", self.lora, LoraFields), ("training", self.training, TrainingFields))
        for name, section, own in sections:
            for key in sorted(section.model_fields_set - (own.model_fields.keys() - JUDGED_LATE)):
                if self.find_place(name, key):
                    yield name, key

    def list_overridden(self) -> list[str]:
        """Return the keys that were given by --set, as `section.key`."""
        given = [keys for keys, place in self._places.items() if not place.line]
        return [".".join(map(str, keys)) for keys in given]

    def list_untried(self) -> list[tuple[str, str]]:
        """Return the keys that the recipe sets and whose values only a training can judge."""
        keys = [keys for keys in self._walk_passed_on() if keys[0] == "training"]
        attention = ("model", "attn_implementation")
        return [*keys, attention] if self.find_place(*attention) else keys

    def leave_out(self, section: str, key: str) -> Recipe:
        """Return a copy as if it did not set a key that has a default."""
        kept: Section = getattr(self, section)
        given = {name: getattr(kept, name) for name in kept.model_fields_set - {key}}
        return self.model_copy(update={section: type(kept).model_construct(**given)})

    def list_against_packing(self) -> list[str]:
        """Return the options of `training` that are given and contradict `packing: step`."""
        given = self.training.collect_values()
        names = ("padding_free", "dataloader_drop_last", "pad_to_multiple_of", "eval_packing")
        return [name for name in names if given.get(name) not in (None, "auto", False)]

    def list_against_sharding(self) -> list[tuple[tuple[str, ...], str]]:
        """Return the keys that are given and are not tried, or do not come out, with a sharded
        base, each with what is the matter."""
        against: list[tuple[tuple[str, ...], str]] = []
        if self.lora.modules_to_save and self.distributed.strategy != "deepspeed-zero3":
            against.append((("lora", "modules_to_save"), "whole modules are not trained by FSDP"))
        given = self.training.collect_values()
        for name in ("torch_compile", "torch_compile_backend", "torch_compile_mode"):
            if given.get(name) not in (None, False, "auto"):
                against.append((("training", name), "layers are not compiled sharded"))
        return against

    def replace(self, trainer: str, changes: dict[str, dict[str, Any]]) -> Recipe:
        """Return a copy with the trainer and values of sections replaced: what `auto` resolved
        to."""
        sections = {
            name: getattr(self, name).model_copy(update=values) for name, values in changes.items()
        }
        return self.model_copy(update={"trainer": trainer, **sections})

    def to_data(self) -> dict[str, Any]:
        """Return the recipe as data that loads to the same recipe: everything declared here, and
        all that was set."""
        sections = ("model", "lora", "quantization", "data", "training", "preference")
        result: dict[str, Any] = {"task": self.task, "objective": self.objective}
        result |= {"method": self.method, "trainer": self.trainer}
        without = {
            *([] if self.quantized else ["quantization"]),
            *([] if self.objective_row.compares else ["preference"]),
        }
        for name in (*sections, "distributed"):
            if name not in without:
                result[name] = getattr(self, name).collect_values()
        result["output_dir"] = self.output_dir
        return result
