"""Base models and adapters: read, checked, loaded and put together; with their tokenizers and
templates.

Its doors, in the order a reader needs them:

    Base                           a base model at one commit: its configuration, files, weights
    read_adapter, Adapter          an adapter's folder, read and checked once, with its base
    ADAPTER_FILES, TOKENIZER_FILES what such folders hold
    TrainingRecord, MadeRecord, read_merged_recipe
                                   what the record of a run or an adapter holds; a merged model's
    get_checkpoint_dtype, num_experts, num_active_experts, num_layers, read_field
                                   what a configuration says
    take_over, Parent, PARENT_COPY the adapter that a recipe trains on, and what it decides; where
                                   a run keeps it
    find_task_of, save_head_config what a model does; what its head knows
    find_statistics, shorten_names, find_alike
                                   what keeps means and variances; modules named together
    find_convolutions, has_linear  what a model of convolutions has to adapt
    find_positions                 how long a text a base reads
    gguf_kept                      the bases made of GGUF files that are kept in the cache
    names, hub                     what a name on the command line stands for; its commit
    attach                         a new or a trained adapter on a base; its LoRA layers
    load_tokenizer, save_tokenizer, adds_bos, IGNORED
                                   the tokenizer with its chat template; -100, labels without loss
    Reader, PictureProcessor, load_recipe_reader, save_reader, find_picture_shape
                                   what reads a model's input: its tokenizer or image processor
    chat_template                  chat templates rendered within limits
    targets, init_weights          which modules a recipe means; what an adapter starts from
    find_shared                    the modules that have one weight: embeddings and head
    decoder                        what a decoder beside an encoder is fed
    token_rows, adapter_contents   added tokens; what an adapter holds beside linear updates
    answering                      what a model that writes is fed to answer, and where that ends
    causality                      whether tokens see later ones, as an encoder's do
    quantised                      what a configuration says of quantised weights, and what follows
    empty, four_bit                models without weights; guards around 4-bit weights
    tensors, Tensors, is_finite, split_rows
                                   safetensors files read and written some rows at a time
    host_blocks                    the blocks of a base, on the host until they are sharded
    convert_to_float32, to_accelerator, refuse_not_finite, leave_out_cache, count_text_parameters
                                   a loaded model made ready
    make_probes, PROBES, Probe, make_inputs, compute_logits, read_rows, compare_logits, Difference,
    choose_limit, Limit
                                   whether two forms of a model are the same function
    passages                       … and how much a form that is rounded more has lost
    save_trained, check_trained, measure_trained, TRAINED, TRAINED_KL
                                   what training left behind, for later comparison
"""

from lora_cli.models.adapter_folder import (
    ADAPTER_FILES,
    TOKENIZER_FILES,
    Adapter,
    read_adapter,
)
from lora_cli.models.base import Base
from lora_cli.models.config import (
    get_checkpoint_dtype,
    num_active_experts,
    num_experts,
    num_layers,
    read_field,
)
from lora_cli.models.convolutions import find_convolutions, has_linear
from lora_cli.models.head import (
    find_alike,
    find_statistics,
    find_task_of,
    save_head_config,
    shorten_names,
)
from lora_cli.models.loaded import (
    convert_to_float32,
    leave_out_cache,
    refuse_not_finite,
    to_accelerator,
)
from lora_cli.models.parent import PARENT_COPY, Parent, take_over
from lora_cli.models.positions import find_positions
from lora_cli.models.probes import (
    PROBES,
    TRAINED,
    TRAINED_KL,
    Difference,
    Limit,
    Probe,
    check_trained,
    choose_limit,
    compare_logits,
    compute_logits,
    make_inputs,
    make_probes,
    measure_trained,
    read_logits,
    read_rows,
    save_trained,
)
from lora_cli.models.processor import (
    PictureProcessor,
    Reader,
    find_picture_shape,
    load_recipe_reader,
    save_reader,
)
from lora_cli.models.record import (
    MadeRecord,
    RecordedKept,
    RecordedRecipe,
    TrainingRecord,
    read_merged_recipe,
)
from lora_cli.models.tensors import Tensors, is_finite, split_rows
from lora_cli.models.text_part import count_text_parameters
from lora_cli.models.ties import find_shared
from lora_cli.models.tokenizer import (
    IGNORED,
    adds_bos,
    load_tokenizer,
    save_tokenizer,
)

__all__ = [
    "ADAPTER_FILES",
    "Adapter",
    "Base",
    "Difference",
    "IGNORED",
    "MadeRecord",
    "Limit",
    "PARENT_COPY",
    "PROBES",
    "Parent",
    "Probe",
    "TOKENIZER_FILES",
    "TRAINED",
    "TRAINED_KL",
    "Tensors",
    "RecordedKept",
    "RecordedRecipe",
    "TrainingRecord",
    "adapter_contents",
    "adds_bos",
    "answering",
    "attach",
    "causality",
    "chat_template",
    "check_trained",
    "choose_limit",
    "compare_logits",
    "compute_logits",
    "count_text_parameters",
    "convert_to_float32",
    "empty",
    "find_alike",
    "find_convolutions",
    "find_picture_shape",
    "find_positions",
    "find_statistics",
    "find_task_of",
    "read_logits",
    "read_rows",
    "four_bit",
    "get_checkpoint_dtype",
    "has_linear",
    "gguf_kept",
    "host_blocks",
    "hub",
    "init_weights",
    "is_finite",
    "leave_out_cache",
    "PictureProcessor",
    "Reader",
    "load_recipe_reader",
    "load_tokenizer",
    "decoder",
    "find_shared",
    "make_inputs",
    "make_probes",
    "measure_trained",
    "names",
    "num_active_experts",
    "num_experts",
    "num_layers",
    "passages",
    "quantised",
    "read_adapter",
    "read_field",
    "read_merged_recipe",
    "refuse_not_finite",
    "save_head_config",
    "save_reader",
    "save_tokenizer",
    "save_trained",
    "shorten_names",
    "split_rows",
    "take_over",
    "targets",
    "tensors",
    "to_accelerator",
    "token_rows",
]
