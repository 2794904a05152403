"""Choose the type of each tensor of a GGUF by llama.cpp's mixtures, which keep the tensors that
matter most in more bits.

The rule of llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type_impl`, `tensor_type_fallback`,
`tensor_allows_quantization`, `tensor_requires_imatrix`) as of llama-cpp-python 0.3.36, for the
options that `llama-quantize` has by default. tests/gguf/test_quantize_bytes.py compares whole files
with it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lora_cli.common import LoraError, UsageError
from lora_cli.gguf import tools
from lora_cli.gguf.header import Header, Tensor, trimmed


class Kind(NamedTuple):
    """A kind of file: its number in `general.file_type` (`llama_ftype` of include/llama.h), and the
    type of most of its tensors (`llama_ftype_get_default_type`)."""

    number: int
    base: str


# Names and order of tools/quantize/quantize.cpp, without the plain copies (F32, F16, BF16, COPY:
# the converter's work) and without MXFP4_MOE, which turns a model that is no mixture of experts
# into Q8_0 and does not say so. fmt: off
KINDS = {
    "Q1_0": Kind(40, "Q1_0"),
    "Q2_0": Kind(41, "Q2_0"),
    "Q4_0": Kind(2, "Q4_0"),
    "Q4_1": Kind(3, "Q4_1"),
    "Q5_0": Kind(8, "Q5_0"),
    "Q5_1": Kind(9, "Q5_1"),
    "IQ2_XXS": Kind(19, "IQ2_XXS"),
    "IQ2_XS": Kind(20, "IQ2_XS"),
    "IQ2_S": Kind(28, "IQ2_XS"),
    "IQ2_M": Kind(29, "IQ2_S"),
    "IQ1_S": Kind(24, "IQ1_S"),
    "IQ1_M": Kind(31, "IQ1_M"),
    "TQ1_0": Kind(36, "TQ1_0"),
    "TQ2_0": Kind(37, "TQ2_0"),
    "Q2_K": Kind(10, "Q2_K"),
    "Q2_K_S": Kind(21, "Q2_K"),
    "IQ3_XXS": Kind(23, "IQ3_XXS"),
    "IQ3_S": Kind(26, "IQ3_S"),
    "IQ3_M": Kind(27, "IQ3_S"),
    "Q3_K": Kind(12, "Q3_K"),
    "IQ3_XS": Kind(22, "IQ3_S"),
    "Q3_K_S": Kind(11, "Q3_K"),
    "Q3_K_M": Kind(12, "Q3_K"),
    "Q3_K_L": Kind(13, "Q3_K"),
    "IQ4_NL": Kind(25, "IQ4_NL"),
    "IQ4_XS": Kind(30, "IQ4_XS"),
    "Q4_K": Kind(15, "Q4_K"),
    "Q4_K_S": Kind(14, "Q4_K"),
    "Q4_K_M": Kind(15, "Q4_K"),
    "Q5_K": Kind(17, "Q5_K"),
    "Q5_K_S": Kind(16, "Q5_K"),
    "Q5_K_M": Kind(17, "Q5_K"),
    "Q6_K": Kind(18, "Q6_K"),
    "Q8_0": Kind(7, "Q8_0"),
}
# fmt: on
SAME = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
"""Shorter names."""
NEEDS_IMATRIX = (
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ2_M",
    "IQ3_XXS",
    "IQ3_XS",
    "Q2_K_S",
)
"""Kinds with tensors of a type that is not to be made without an importance matrix."""

LOWEST = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")
"""Kinds of about two bits and less, which have a rule of their own."""
WEIGHTED_TYPES = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")
"""Types that are garbage without an importance matrix."""

# What is never quantised although it has two dimensions: small, or sensitive. Any of these within a
# name.
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight"
    r"|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd|\.patch_merger"
    r"|a\.rvq\.codebook|mm\.a\.code_embd"
)
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# What a tensor is, by the first of these that its name holds.
PARTS = {
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_q.weight": "query",
    "attn_output.weight": "attention output",
    "ffn_up": "up",
    "ffn_gate": "gate",
    "ffn_down": "down",
}
# Rows that do not divide into blocks of 256 (Q2_0: 64) take a type with blocks of 32 instead.
NARROWER = {
    **dict.fromkeys((*WEIGHTED_TYPES, "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}
"""Layers by which llama.cpp knows a model of 70 billion parameters (`LLM_TYPE_70B` in
src/models)."""
OTHER_RULES = ("glm5-next", "granite-switch", "nanbeige")
"""Architectures whose tensors llama.cpp keeps, or whose layers it counts, in ways of their own, not
followed here."""


@dataclass(frozen=True)
class Place:
    """A tensor as far as the rule looks at it: number `index` of the `num` of its part, in what
    model.

    `shared`: four query heads or more read one key head. `weighted`: there is an importance matrix.
    """

    index: int
    num: int
    shared: bool
    num_experts: int
    weighted: bool
    falcon: bool

    @property
    def first_eighth(self) -> bool:
        return self.index < self.num // 8

    @property
    def first_sixteenth(self) -> bool:
        return self.index < self.num // 16

    @property
    def inner(self) -> bool:
        return self.num // 8 <= self.index < 7 * self.num // 8

    @property
    def favoured(self) -> bool:
        """llama.cpp's `use_more_bits`: whether a layer is in the first or last eighth, or every
        third between."""
        return not self.inner or (self.index - self.num // 8) % 3 == 2


Rule = Callable[[Place], "str | None"]
"""The type for a place; None is the type of most tensors of the file."""


def _always(name: str) -> Rule:
    return lambda _: name


def _favoured(name: str) -> Rule:
    return lambda at: name if at.favoured else None


def _first(name: str) -> Rule:
    return lambda at: name if at.first_eighth else None


def _shared(name: str) -> Rule:
    return lambda at: name if at.shared else None


def _unless_falcon(name: str) -> Rule:
    return lambda at: None if at.falcon else name


def _lowest_value(otherwise: str) -> Rule:
    return lambda at: "Q4_K" if at.shared or at.num_experts >= 4 else otherwise


def _down_q3_k_m(at: Place) -> str | None:
    if at.first_sixteenth:
        return "Q5_K"
    return "Q4_K" if not at.falcon or at.favoured else None


def _down_q4_k_m(at: Place) -> str | None:
    if not at.falcon:
        return "Q6_K" if at.favoured else None
    return "Q6_K" if at.first_sixteenth else "Q5_K" if at.favoured else None


VALUE: Mapping[str, Rule] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), _lowest_value("Q2_K")),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _lowest_value("IQ3_S")),
    **dict.fromkeys(("Q2_K_S", "IQ3_XS", "IQ3_S"), _shared("Q4_K")),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), _shared("Q5_K")),
    **dict.fromkeys(("Q4_K_M", "Q5_K_M"), _favoured("Q6_K")),
    "Q2_K": lambda at: "Q4_K" if at.shared else "Q3_K",
    "IQ3_XXS": lambda at: "Q4_K" if at.shared else None if at.weighted else "IQ3_S",
    "IQ3_M": _always("Q4_K"),
    "Q3_K_M": lambda at: "Q5_K" if at.index < 2 else "Q4_K",
    "Q3_K_L": _always("Q5_K"),
    "Q4_K_S": lambda at: "Q5_K" if at.index < 4 else None,
}
DOWN: Mapping[str, Rule] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), _first("Q2_K")),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), _first("IQ3_S")),
    **dict.fromkeys(
        ("IQ4_NL", "IQ4_XS"), lambda at: "Q5_K" if at.first_eighth and not at.weighted else None
    ),
    "Q2_K": _always("Q3_K"),
    "Q2_K_S": _first("Q4_K"),
    "IQ3_XXS": lambda at: None if at.weighted else "Q4_K" if at.first_eighth else "Q3_K",
    "IQ3_M": lambda at: "Q4_K" if at.first_eighth or at.num_experts == 8 and at.favoured else None,
    "Q3_K_M": _down_q3_k_m,
    "Q3_K_L": lambda at: "Q4_K" if at.falcon else "Q5_K",
    "Q4_K_S": lambda at: "Q5_K" if at.first_eighth and not at.falcon else None,
    "Q4_K_M": _down_q4_k_m,
    "Q5_K_M": _favoured("Q6_K"),
    "Q4_0": lambda at: "Q4_1" if at.first_eighth and at.weighted else None,
    "Q5_0": lambda at: "Q5_1" if at.first_eighth and at.weighted else None,
}
SMALLER_INSIDE: Mapping[str, Rule] = {"IQ3_XS": lambda at: "IQ3_XXS" if at.inner else None}
RULES: Mapping[str, Mapping[str, Rule]] = {
    "value": VALUE,
    "key": {"IQ3_XS": _always("IQ3_XXS"), "IQ3_XXS": _always("IQ2_S")},
    "query": {"IQ3_XS": _always("IQ3_XXS"), "IQ3_XXS": _always("IQ2_S")},
    "attention output": {
        **dict.fromkeys(("IQ1_S", "IQ1_M"), _always("IQ2_XXS")),
        **dict.fromkeys(("IQ2_S", "IQ2_M"), _always("IQ3_S")),
        **dict.fromkeys(("Q3_K_M", "IQ3_M"), _unless_falcon("Q4_K")),
        "IQ3_XXS": _unless_falcon("IQ3_S"),
        "Q2_K": _unless_falcon("Q3_K"),
        "Q3_K_L": lambda at: "Q4_K" if at.falcon else "Q5_K",
    },
    "up": SMALLER_INSIDE,
    "gate": SMALLER_INSIDE,
    "down": DOWN,
}
FEW_BITS_OF_EIGHT = (
    "Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M",
    "IQ3_S", "IQ3_M", "IQ4_XS", *LOWEST
)  # fmt: skip
"""Kinds in which a mixture of eight experts has its attention's output in Q5_K."""
EMBEDDING = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), "IQ3_S"),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"),
}
"""Types of embeddings that are not the output as well."""


class Choice(NamedTuple):
    """A tensor and the name of its new type, None where it stays as it is. `narrower`: its rows do
    not fit the type that the rule names, so it has one of smaller blocks, which takes more room."""

    tensor: Tensor
    type: str | None
    narrower: bool = False


OTHER_NAMES = {
    "fp32": "f32",
    "float32": "f32",
    "fp16": "f16",
    "float16": "f16",
    "half": "f16",
    "bfloat16": "bf16",
    "int8": "q8_0",
    "8bit": "q8_0",
    "q8": "q8_0",
    "int4": "Q4_K_M",
    "4bit": "Q4_K_M",
    "q4": "Q4_K_M",
    "nf4": "Q4_K_M",
}
"""What other tools call types."""


def pick(name: str, weighted: bool) -> str:
    """Return the kind of KINDS that `name` means, in any case. Raises UsageError, also for one that
    needs an importance matrix where there is none."""
    if meant := OTHER_NAMES.get(name.lower().replace("_", "")):
        raise UsageError(f"unknown GGUF type {name!r}; did you mean {meant}?", f"-q {meant}")
    picked = tools.pick(name, [*tools.CONVERTER_TYPES, *KINDS])
    if picked in NEEDS_IMATRIX and not weighted:
        raise UsageError(
            f"{picked} needs an importance matrix, measured on text like that the model is for",
            "--imatrix DATA.jsonl, or a type that needs none: "
            "Q2_K, Q3_K_M, IQ3_S, IQ4_XS or Q4_K_M",
        )
    return picked


def choose(model: Header, kind: str, weighted: bool, block: Mapping[str, int]) -> list[Choice]:
    """Return what becomes of each tensor of `model` in a file of `kind`, in the order in which
    llama-quantize writes them.

    `weighted`: there is an importance matrix. `block`: elements in a block of each type. Raises
    LoraError for an architecture with a rule of its own, and for rows that fit no type.
    """
    arch = model.get("general.architecture")
    if arch in OTHER_RULES:
        raise LoraError(
            f"llama.cpp treats {arch} specially in {kind}, and lora does not know how",
            "lora export-gguf -q q8_0, or llama.cpp's llama-quantize on -q bf16",
        )
    ordered = sorted(model.tensors, key=lambda tensor: (_layer(tensor.name), tensor.name))
    mixture = _Mixture(model, SAME.get(kind, kind), weighted, block, ordered)
    return [mixture.choose(tensor) for tensor in ordered]


def needs_weights(name: str, type_name: str | None, kind: str) -> bool:
    """Return whether a tensor of this name must not be made into `type_name` without an importance
    matrix."""
    if name in EMBEDDINGS or name == "output.weight":
        return False
    return type_name in WEIGHTED_TYPES or (type_name, kind) == ("Q2_K", "Q2_K_S")


class _Mixture:
    """The rule for one model and kind; counts the tensors it has seen."""

    def __init__(
        self,
        model: Header,
        kind: str,
        weighted: bool,
        block: Mapping[str, int],
        tensors: Sequence[Tensor],
    ) -> None:
        self.kind, self.base, self.block, self.weighted = kind, KINDS[kind].base, block, weighted
        self.arch = model.get("general.architecture")
        self.num_layers: int = model.get(f"{self.arch}.block_count")
        self.num_experts: int = model.get(f"{self.arch}.expert_count", 0)
        heads = _first_of(model.get(f"{self.arch}.attention.head_count", 0))
        key_heads = _first_of(model.get(f"{self.arch}.attention.head_count_kv", heads))
        self.shared = key_heads > 0 and heads // key_heads >= 4
        # the older llama of this size, 65B, shares no heads
        self.is_70b = LAYERS_OF_70B.get(self.arch) == self.num_layers and (self.arch, heads) != (
            "llama",
            key_heads,
        )
        self.tied = all(tensor.name != "output.weight" for tensor in tensors)
        self.num_values = sum(_part(tensor.name) == "value" for tensor in tensors)
        self.seen: Counter[str] = Counter()

    def choose(self, tensor: Tensor) -> Choice:
        """Return the type of the next tensor, of which the file's order is that of the calls."""
        if (
            len(trimmed(tensor.shape)) < 2
            or not tensor.name.endswith("weight")
            or KEPT.search(tensor.name)
        ):
            return Choice(tensor, None)
        wanted, width = self._wanted(tensor), tensor.shape[0]
        if width % self.block[wanted] == 0:
            return Choice(tensor, wanted)
        if self.block[wanted] > 32 and wanted not in NARROWER:
            raise LoraError(
                f"{self.kind} is not for this model: rows of {tensor.name} have {width} elements, "
                f"not a multiple of {self.block[wanted]}",
                "another type, such as Q4_K_M",
            )
        narrower = NARROWER.get(wanted, wanted)
        return Choice(
            tensor, narrower if width % self.block[narrower] == 0 else "F16", narrower=True
        )

    def _wanted(self, tensor: Tensor) -> str:
        """Return the type by the rule, whether or not the rows fit."""
        if tensor.name == "output.weight" or self.tied and tensor.name in EMBEDDINGS:
            return self._head(tensor.shape[0])
        if tensor.name in EMBEDDINGS:
            return EMBEDDING.get(self.kind, self.base)
        part = _part(tensor.name)
        return self.base if part is None else self._by_part(part, tensor.name) or self.base

    def _head(self, width: int) -> str:
        if self.arch == "falcon" or width % self.block[self.base]:
            return "Q8_0"
        if self.kind in (*LOWEST, "IQ3_XXS"):
            return "Q5_K"
        return "Q8_0" if self.base == "Q8_0" else "Q6_K"

    def _by_part(self, part: str, name: str) -> str | None:
        index = self.seen[part]
        self.seen[part] += 1
        if self.num_experts == 8 and part in ("value", "key"):
            return "Q4_K" if self.kind in LOWEST else "Q8_0"
        if self.num_experts == 8 and part == "attention output":
            return "Q5_K" if self.kind in FEW_BITS_OF_EIGHT else None
        if part in ("up", "gate", "down") and self.num_experts > 1 and self.kind not in LOWEST:
            index = _layer(name)  # a layer has several of them
        num = self.num_values if part == "value" else self.num_layers
        place = Place(
            index, num, self.shared, self.num_experts, self.weighted, self.arch == "falcon"
        )
        rule = RULES[part].get(self.kind)
        chosen = rule(place) if rule else None
        if (
            self.is_70b
            and part == "value"
            and self.kind not in LOWEST
            and (chosen or self.base) in ("Q3_K", "Q4_K")
        ):
            return "Q5_K"
        return chosen


def _layer(name: str) -> int:
    """Return the number of a tensor's block; -1 for those outside blocks, which come first."""
    found = re.match(r"blk\.(\d+)", name)
    return int(found[1]) if found else -1


def _part(name: str) -> str | None:
    if name in EMBEDDINGS or name == "output.weight":
        return None
    return next((part for piece, part in PARTS.items() if piece in name), None)


def _first_of(value: int | list[int]) -> int:
    """Return the first layer's, where each has its own."""
    return value[0] if isinstance(value, list) else value
