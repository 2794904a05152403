"""Kind 11: GGUF files of a stranger's as a base, byte by byte what gguf's own writer would not write."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.torture.attacks import Attack, Place

UINT32, INT32, FLOAT32, BOOL, TEXT, ARRAY, UINT64 = 4, 5, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8
WIDTH, LAYERS = 32, 1
LETTERS = [
    chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))
]
"""The letters that byte-level BPE has for the 256 bytes."""
TOKENS = ["<s>", "</s>", "<unk>", *LETTERS, "he", "hel"]
HUGE = (2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def text(value: bytes | str) -> bytes:
    """A text with its length before it."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, given: Any) -> bytes:
    """A value with its type before it."""
    if kind == TEXT:
        return struct.pack("<I", TEXT) + text(given)
    form = {UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", UINT64: "Q"}[kind]
    return struct.pack(f"<I{form}", kind, given)


def texts(items: list[bytes] | list[str], num: int | None = None) -> bytes:
    """An array of texts, which may claim another number of items."""
    head = struct.pack("<IIQ", ARRAY, TEXT, len(items) if num is None else num)
    return head + b"".join(map(text, items))


def numbers(kind: int, form: str, items: list[Any], num: int | None = None) -> bytes:
    """An array of numbers, likewise."""
    head = struct.pack("<IIQ", ARRAY, kind, len(items) if num is None else num)
    return head + struct.pack(f"<{len(items)}{form}", *items)


@dataclass
class Tensor:
    """An entry, and the bytes that lie where it should say; `offset` None: there."""

    name: bytes
    shape: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None
    dimensions: int | None = None


@dataclass
class Raw:
    """A file's parts. `values` are keys and their bytes, which may come twice."""

    values: list[tuple[bytes, bytes]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_values: int | None = None

    def put(self, key: str, given: bytes) -> None:
        """Replace a value, or add one."""
        self.values = [each for each in self.values if each[0] != key.encode()]
        self.values.append((key.encode(), given))

    def write(self, path: Path) -> Path:
        """Write the file."""
        count = len(self.tensors) if self.num_tensors is None else self.num_tensors
        named = len(self.values) if self.num_values is None else self.num_values
        made = [struct.pack("<4sIQQ", self.magic, self.version, count, named)]
        made += [text(key) + given for key, given in self.values]
        at = 0
        for each in self.tensors:
            num = len(each.shape) if each.dimensions is None else each.dimensions
            shape = struct.pack(f"<I{len(each.shape)}Q", num, *each.shape)
            where = at if each.offset is None else each.offset
            made.append(text(each.name) + shape + struct.pack("<IQ", each.kind, where))
            at += len(each.data) + -len(each.data) % 32
        made.append(bytes(-sum(map(len, made)) % 32))
        made += [each.data + bytes(-len(each.data) % 32) for each in self.tensors]
        path.write_bytes(b"".join(made))
        return path


def quantise(rows: int, scale: float = 0.01) -> bytes:
    """Rows of WIDTH weights as Q8_0: a scale in float16, 32 bytes."""
    made = np.random.default_rng(rows).integers(-90, 90, (rows, WIDTH), np.int8)
    half = np.float16(scale).tobytes()
    return b"".join(half + each.tobytes() for each in made)


def sound() -> Raw:
    """A Llama of one layer and 261 tokens that is a base."""
    raw = Raw()
    raw.put("general.architecture", value(TEXT, "llama"))
    settings = {"block_count": LAYERS, "context_length": 128, "embedding_length": WIDTH, "feed_forward_length": WIDTH,
                "attention.head_count": 2, "attention.head_count_kv": 2, "vocab_size": len(TOKENS), "rope.dimension_count": 16}  # fmt: skip
    for key, number in settings.items():
        raw.put(f"llama.{key}", value(UINT32, number))
    raw.put("llama.attention.layer_norm_rms_epsilon", value(FLOAT32, 1e-5))
    raw.put("tokenizer.ggml.model", value(TEXT, "gpt2"))
    raw.put("tokenizer.ggml.pre", value(TEXT, "gpt-2"))
    raw.put("tokenizer.ggml.tokens", texts(TOKENS))
    kinds = [3 if number < 3 else 1 for number in range(len(TOKENS))]
    raw.put("tokenizer.ggml.token_type", numbers(INT32, "i", kinds))
    raw.put("tokenizer.ggml.merges", texts(["h e", "he l"]))
    for number, role in enumerate(("bos", "eos", "unknown")):
        raw.put(f"tokenizer.ggml.{role}_token_id", value(UINT32, number))
    norm = np.ones(WIDTH, np.float32).tobytes()
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    raw.tensors = [Tensor(b"token_embd.weight", (WIDTH, len(TOKENS)), Q8_0, quantise(len(TOKENS)))]
    raw.tensors += [Tensor(f"blk.0.{each}.weight".encode(), (WIDTH, WIDTH), Q8_0, quantise(WIDTH)) for each in matrices]  # fmt: skip
    names = ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")
    raw.tensors += [Tensor(f"{each}.weight".encode(), (WIDTH,), F32, norm) for each in names]
    return raw


def use(place: Place, chance: random.Random, raw: Raw | bytes, **more: Any) -> Attack:
    """A command that is given the file as a base, under one of the names that such files have."""
    path = place.work / chance.choice(["base.gguf", "base.GGUF", "base.Gguf"])
    path.write_bytes(raw) if isinstance(raw, bytes) else raw.write(path)
    place.recipe(base=path)
    words = chance.choice([["check", "recipe.yaml"], ["plan", "recipe.yaml"], ["train", "recipe.yaml"]])  # fmt: skip
    return Attack(words, output="out", dequantises=True, **{"codes": (1, 2), **more})


def spell(raw: Raw, place: Place) -> bytes:
    """The file's bytes."""
    return raw.write(place.work / "sound").read_bytes()


def cut(place: Place, chance: random.Random) -> Attack:
    """A file that ends somewhere."""
    made = spell(sound(), place)
    return use(place, chance, made[: chance.choice([0, 3, 4, 23, 24, len(made) - 33, chance.randrange(len(made) - 32)])])  # fmt: skip


def counts(place: Place, chance: random.Random) -> Attack:
    """Counts, versions and magics that nothing bears out."""
    raw, huge = sound(), chance.choice(HUGE)
    what = chance.choice(["num_tensors", "num_values", "version", "magic", "fewer"])
    if what == "magic":
        raw.magic = chance.choice([b"GGML", b"ggjt", b"PK\x03\x04", b"\x00\x00\x00\x00"])
    elif what == "version":
        raw.version = chance.choice([0, 1, 4, 2**24 * 3, 2**32 - 1])
    elif what == "fewer":
        raw.num_tensors, raw.num_values = chance.choice([(0, None), (1, None), (None, 2), (0, 0)])
    else:
        setattr(raw, what, min(huge, 2**64 - 1))
    return use(place, chance, raw)


def shape(place: Place, chance: random.Random) -> Attack:
    """Tensors that claim to be huge, empty, or of very many dimensions."""
    raw, huge = sound(), chance.choice(HUGE)
    each = chance.choice(raw.tensors)
    how = chance.choice(["rows", "width", "both", "none", "dimensions", "kind"])
    if how == "dimensions":
        each.dimensions = chance.choice([0, 5, 2**20, 2**32 - 1])
    elif how == "kind":
        each.kind = chance.choice([4, 5, 31, 99, 2**31, 2**32 - 1])
    else:
        width, rows = each.shape[0], each.shape[-1]
        each.shape = {"rows": (width, huge), "width": (huge, rows), "both": (2**32, 2**32), "none": (width, 0)}[how]  # fmt: skip
    return use(place, chance, raw)


def offset(place: Place, chance: random.Random) -> Attack:
    """Tensors that lie outside the file, within each other, or askew; odd alignments."""
    raw = sound()
    each = chance.choice(raw.tensors[1:])
    how = chance.choice(["far", "same", "askew", "alignment"])
    if how == "alignment":
        raw.put("general.alignment", value(UINT32, chance.choice([0, 1, 3, 2**31])))
    else:
        each.offset = {"far": chance.choice(HUGE) & ~31, "same": 0, "askew": 7}[how]
    return use(place, chance, raw)


def array(place: Place, chance: random.Random) -> Attack:
    """Arrays and texts that claim to be huge, and arrays of arrays."""
    raw, huge = sound(), chance.choice(HUGE)
    key = chance.choice(["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type", "x.y"])  # fmt: skip
    nested = b"".join(
        struct.pack("<IQ", ARRAY, 1) for _ in range(chance.choice([2, 5000, 300_000]))
    )
    raw.put(key, chance.choice([
        texts(["a"], huge), numbers(INT32, "i", [1], huge), numbers(BOOL, "?", [True], 2**40), struct.pack("<I", ARRAY) + nested,
        struct.pack("<IQ", TEXT, huge) + b"x", struct.pack("<IIQQ", ARRAY, TEXT, 1, huge), struct.pack("<I", chance.choice([13, 99, 2**32 - 1])),
        numbers(0, "B", [0] * 5_000_000),
    ]))  # fmt: skip
    return use(place, chance, raw)


def encoding(place: Place, chance: random.Random) -> Attack:
    """Texts that are no UTF-8, or not what is asked of a terminal."""
    raw, odd = sound(), chance.choice([b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\x80" * 9])
    how = chance.choice(["key", "value", "token", "tensor", "merge", "architecture"])
    if how == "key":
        raw.values.append((odd, value(UINT32, 1)))
    elif how == "tensor":
        chance.choice(raw.tensors).name = odd
    elif how == "token":
        raw.put("tokenizer.ggml.tokens", texts([*(each.encode() for each in TOKENS[:-1]), odd]))
    elif how == "merge":
        raw.put("tokenizer.ggml.merges", texts([odd]))
    else:
        key = "general.architecture" if how == "architecture" else "general.name"
        raw.put(key, value(TEXT, odd))
    return use(place, chance, raw)


def twice(place: Place, chance: random.Random) -> Attack:
    """Values, tensors and tokens that come twice."""
    raw = sound()
    if chance.random() < 0.5:
        raw.values.append(chance.choice(raw.values))
    else:
        raw.tensors.append(chance.choice(raw.tensors))
    return use(place, chance, raw)


def template(place: Place, chance: random.Random) -> Attack:
    """Chat templates that do not end, are too long, fail, or are none."""
    raw = sound()
    raw.put("tokenizer.chat_template", chance.choice([
        value(TEXT, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
        value(TEXT, "x" * 10_000_000), value(TEXT, "{{ 'x' * 999999999 }}"), value(TEXT, "{{ x"),
        value(TEXT, "{{ raise_exception('no') }}"), value(UINT32, 7), texts(["a", "b"]),
        value(TEXT, "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        value(TEXT, "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    ]))  # fmt: skip
    return use(place, chance, raw, codes=(0, 1, 2))


def tokens(place: Place, chance: random.Random) -> Attack:
    """Lists of tokens that are long, do not fit each other, or name what is not there."""
    raw, n = sound(), chance.choice([300_000, 1_000_000])
    how = chance.choice(["many", "empty", "long", "cyclic", "lists", "ids", "same", "kinds", "unmade", "types", "none"])  # fmt: skip
    if how in ("many", "empty"):
        raw.put("tokenizer.ggml.tokens", texts([f"t{i}" if how == "many" else "" for i in range(n)]))  # fmt: skip
        raw.put("tokenizer.ggml.token_type", numbers(INT32, "i", [chance.choice([1, 3, 4])] * n))
    elif how == "long":
        raw.put("tokenizer.ggml.tokens", texts([*TOKENS[:-1], "x" * 1_000_000]))
    elif how == "cyclic":
        raw.put("tokenizer.ggml.merges", texts(["h e", "he l", "hel h", "he he", "e h"] * 50_000))
    elif how == "lists":
        raw.put("tokenizer.ggml.scores", numbers(FLOAT32, "f", [0.0] * 3))
    elif how == "ids":
        role = chance.choice(["bos", "eos", "unknown", "padding"])
        raw.put(f"tokenizer.ggml.{role}_token_id", value(UINT32, chance.choice([999, 2**31, 2**32 - 1])))  # fmt: skip
    elif how == "same":
        raw.put("tokenizer.ggml.tokens", texts(["a"] * len(TOKENS)))
    elif how == "kinds":
        raw.put("tokenizer.ggml.model", value(TEXT, chance.choice(["llama", "bert", "t5", "none", "x" * 9000])))  # fmt: skip
    elif how == "unmade":
        raw.put("tokenizer.ggml.merges", texts(["q", " ", "a b c", "he he"]))
    elif how == "types":
        raw.put("tokenizer.ggml.tokens", chance.choice([value(UINT32, 1), numbers(INT32, "i", [1] * len(TOKENS)), value(TEXT, "a")]))  # fmt: skip
    else:
        raw.values = [each for each in raw.values if not each[0].startswith(b"tokenizer")]
    return use(place, chance, raw, codes=(0, 1, 2))


def scales(place: Place, chance: random.Random) -> Attack:
    """Scales and weights that are not finite."""
    raw, bad = sound(), chance.choice([float("nan"), float("inf"), float("-inf")])
    each = chance.choice(raw.tensors)
    if each.kind == Q8_0:
        each.data = np.float16(bad).tobytes() + each.data[2:]
    else:
        each.data = np.float32(bad).tobytes() + each.data[4:]
    return use(place, chance, raw, codes=(1,), said="is not finite")


def settings(place: Place, chance: random.Random) -> Attack:
    """Settings that ask for a larger model than the file holds, or for none."""
    raw = sound()
    key = chance.choice(["block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
                         "vocab_size", "context_length", "rope.dimension_count", "attention.key_length", "expert_count"])  # fmt: skip
    odd = [value(UINT64, chance.choice(HUGE)), value(UINT32, 0), value(UINT32, 10**6), value(FLOAT32, float("nan")), value(TEXT, "x"),
           value(INT32, -1), texts(["a"]), value(UINT32, 2**31 - 1), value(UINT32, 64)]  # fmt: skip
    raw.put(f"llama.{key}", chance.choice(odd))
    return use(place, chance, raw, codes=(0, 1, 2))


def flipped(place: Place, chance: random.Random) -> Attack:
    """Some bytes before the weights are others."""
    made = bytearray(spell(sound(), place))
    for _ in range(chance.choice([1, 3, 30])):
        made[chance.randrange(min(len(made), 9000))] = chance.randrange(256)
    return use(place, chance, bytes(made), codes=(0, 1, 2))


ATTACKS = [
    cut, counts, shape, offset, array, encoding, twice, tokens, scales, settings, template, flipped,
]  # fmt: skip
