"""Kind 10: libraries that end the process, or raise what nobody catches."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
from typing import Any

from tests.torture.attacks import Attack, Place, change, places, put, read_tensors, write_tensors
from tests.torture.attacks.verbs import use_adapter, use_base, use_gguf, use_rows


def damage(data: bytes, chance: random.Random, first: int = 0, most: int | None = None) -> bytes:
    """Bytes with some of them changed, cut out, doubled or replaced."""
    made = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 20])):
        end = min(most or len(made), len(made))
        at = chance.randrange(min(first, end - 1), end)
        how = chance.randrange(5)
        if how == 0:
            made[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            made[at : at + chance.choice([1, 4, 8])] = chance.choice(
                [b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7]
            )[: chance.choice([1, 4, 8])]
        elif how == 2:
            del made[at : at + chance.choice([1, 8, 100, len(made)])]
        elif how == 3:
            made[at:at] = made[at : at + 64]
        else:
            made[at] = chance.randrange(256)
        if len(made) < 16:
            break
    return bytes(made)


def gguf_number(place: Place, chance: random.Random) -> Attack:
    """A GGUF's hyperparameters: none, one, very many, negative."""
    import gguf

    from tests.torture.attacks.gguf_files import read, write

    path = place.copy("model.gguf")
    arch, fields, tensors = read(path)
    numbers = [
        name
        for name, (value, *_) in fields.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    for name in chance.sample(numbers, chance.choice([1, 1, 2])):
        how = chance.choice(["number", "type", "gone", "string"])
        value, kind, items = fields[name]
        if how == "number":
            fields[name] = (
                chance.choice([0, 1, 2, 3, 2**31 - 1, 10**6, 255]),
                gguf.GGUFValueType.UINT32,
                None,
            )
        elif how == "type":
            fields[name] = (
                chance.choice([-1.5, float("nan"), 0.0, 1e30]),
                gguf.GGUFValueType.FLOAT32,
                None,
            )
        elif how == "gone":
            del fields[name]
        else:
            fields[name] = ("x", gguf.GGUFValueType.STRING, None)
    write(path, arch, fields, tensors)
    return use_gguf(place, chance, path)


def gguf_vocabulary(place: Place, chance: random.Random) -> Attack:
    """Its vocabulary: another length, empty tokens, types and scores that do not fit."""
    import gguf

    from tests.torture.attacks.gguf_files import read, write

    path = place.copy("model.gguf")
    arch, fields, tensors = read(path)
    name = chance.choice(
        [
            each
            for each in fields
            if each.startswith("tokenizer.") and isinstance(fields[each][0], list)
        ]
    )
    value, kind, items = fields[name]
    fields[name] = (
        chance.choice([value[:1], value[: len(value) // 2], value * 2, value[::-1], value[:3]]),
        kind,
        items,
    )
    if chance.random() < 0.4:
        fields["tokenizer.ggml.model"] = (
            chance.choice(
                ["gpt2", "bert", "llama", "rwkv", "t5", "nonsense", "no_vocab", "plamo2"]
            ),
            gguf.GGUFValueType.STRING,
            None,
        )
    for each in ("bos", "eos", "padding", "unknown", "eot"):
        if chance.random() < 0.3:
            fields[f"tokenizer.ggml.{each}_token_id"] = (
                chance.choice([2**31, 10**6, 2**32 - 1, 0]),
                gguf.GGUFValueType.UINT32,
                None,
            )
    write(path, arch, fields, tensors)
    return use_gguf(place, chance, path)


def gguf_tensors(place: Place, chance: random.Random) -> Attack:
    """Its tensors: missing, of another shape, named twice, of another architecture."""
    import numpy as np

    from tests.torture.attacks.gguf_files import read, write

    path = place.copy("model.gguf")
    arch, fields, tensors = read(path)
    at = chance.randrange(len(tensors))
    name, data, kind = tensors[at]
    how = chance.choice(["gone", "flat", "small", "nan", "architecture", "name"])
    if how == "gone":
        del tensors[at]
    elif how == "flat":
        tensors[at] = (name, data.reshape(-1), kind)
    elif how == "small":
        tensors[at] = (
            (name, np.ascontiguousarray(data[..., :1]) if data.dim() > 1 else data[:1], kind)
            if hasattr(data, "dim")
            else (name, np.ascontiguousarray(data[:1]), kind)
        )
    elif how == "nan":
        tensors[at] = (name, np.full_like(data, np.nan) if data.dtype.kind == "f" else data, kind)
    elif how == "architecture":
        fields = {each.replace(f"{arch}.", "gpt2."): value for each, value in fields.items()}
        arch = chance.choice(["gpt2", "qwen2", "gemma3", "mamba", "bert", "clip", "nonsense", "t5"])
    else:
        tensors[at] = (name + "x", data, kind)
    write(path, arch, fields, tensors)
    return use_gguf(place, chance, path)


def gguf_bytes(place: Place, chance: random.Random) -> Attack:
    path = place.copy("model.gguf")
    path.write_bytes(damage(path.read_bytes(), chance, 4, chance.choice([40, 3000, 20_000, None])))
    return use_gguf(place, chance, path)


def cached_arrow(place: Place, chance: random.Random) -> Attack:
    """Prepared rows whose offsets lead outside, with the digest that would be right."""
    import numpy as np
    import pyarrow

    shutil.copytree(place.stage / "cache", place.cache, dirs_exist_ok=True)
    [entry] = (place.cache / "lora-cli" / "rows").iterdir()
    counts = json.loads((entry / "counts.json").read_text())
    with pyarrow.memory_map(str(entry / "rows.arrow")) as source:
        table = pyarrow.ipc.open_stream(source).read_all()
    batch = table.to_batches()[0]
    ids, labels = batch.column("input_ids"), batch.column("labels")
    offsets, values, others = (np.array(each) for each in (ids.offsets, ids.values, labels.values))
    how = chance.choice(["far", "negative", "down", "ids", "labels", "whole"])
    if how == "far":
        offsets[-1] = chance.choice([10**6, 2**31 - 1])
    elif how == "negative":
        offsets[1] = -chance.choice([1, 10**6, 2**31])
    elif how == "down":
        offsets[1:-1] = offsets[1:-1][::-1]
    elif how == "ids":
        values[0] = chance.choice([-1, 512, 10**6, 2**31 - 1, -(2**31)])
    elif how == "labels":
        others[0] = chance.choice([-1, 512, 10**6, -(2**31), -99])
    path = entry / "rows.arrow"
    content = path.read_bytes()
    for before, after in ((ids.offsets, offsets), (ids.values, values), (labels.values, others)):
        content = content.replace(np.array(before).tobytes(), after.astype(np.int32).tobytes())
    path.write_bytes(content)
    digest = hashlib.sha256()
    for numbers in (offsets, values, others):
        digest.update(numbers.astype(np.int32).tobytes())
    counts["digest"] = digest.hexdigest()[:32]
    (entry / "counts.json").write_text(json.dumps(counts))
    if how == "whole":
        path.write_bytes(damage(path.read_bytes(), chance))
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    return Attack([chance.choice(["check", "train", "train"]), "recipe.yaml"])


def columnar_bytes(place: Place, chance: random.Random) -> Attack:
    """Damaged Parquet and Arrow files, of many types."""
    import pyarrow
    from pyarrow import parquet

    kind = chance.choice(["parquet", "arrow", "stream"])
    odd = chance.choice([
        pyarrow.array([{"a": [1, 2]}] * 8), pyarrow.array([b"\xff\xfe"] * 8), pyarrow.array([["x"]] * 8), pyarrow.array([None] * 8), pyarrow.array([1.5] * 8), pyarrow.array([[{"role": "user", "content": "x"}]] * 8),
        pyarrow.array(["x"] * 8, pyarrow.large_string()), pyarrow.array(["x"] * 8, pyarrow.string_view()), pyarrow.array([[("a", 1)]] * 8, pyarrow.map_(pyarrow.string(), pyarrow.int32())), pyarrow.array([0] * 8, pyarrow.timestamp("ns")),
        pyarrow.array([2**62] * 8, pyarrow.timestamp("s")), pyarrow.array([2**62] * 8, pyarrow.duration("s")), pyarrow.array(["x"] * 8).dictionary_encode(), pyarrow.array([10**6] * 8, pyarrow.date32()), pyarrow.array([2**40] * 8, pyarrow.time64("us")),
    ])  # fmt: skip
    table = pyarrow.table({"prompt": ["a"] * 8, "completion": odd})
    path = place.work / ("rows.parquet" if kind == "parquet" else "rows.arrow")
    if kind == "parquet":
        try:
            parquet.write_table(table, path)
        except pyarrow.ArrowException:
            parquet.write_table(table.select(["prompt"]), path)
    else:
        with (pyarrow.ipc.new_file if kind == "arrow" else pyarrow.ipc.new_stream)(
            path, table.schema
        ) as out:
            out.write_table(table)
    if chance.random() < 0.75:
        path.write_bytes(damage(path.read_bytes(), chance, 4))
    return use_rows(place, chance, path)


def panics(place: Place, chance: random.Random) -> Attack:
    """Tokenizers at which the Rust library panics, which Python's `except Exception` does not catch."""
    base = place.copy("base")
    path = base / "tokenizer.json"
    value = json.loads(path.read_text())
    steps: list[dict[str, Any]] = [
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9}}, {"truncation": {"direction": "Left", "max_length": 0, "strategy": "OnlySecond", "stride": 0}},
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}}, {"padding": {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 10**9, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True}}, {"pre_tokenizer": {"type": "FixedLength", "length": 0}}, {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": ""}},
        {"decoder": {"type": "Strip", "content": "", "start": 9, "stop": 9}}, {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}}, {"decoder": {"type": "ByteLevel"}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}], "pair": [], "special_tokens": {}}}, {"post_processor": {"type": "BertProcessing", "sep": ["x", 10**9], "cls": ["y", 10**9]}},
        {"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {}}},
        {"model": {**value["model"], "merges": [["zz", "yy"]]}}, {"model": {**value["model"], "vocab": {}}}, {"model": {**value["model"], "vocab": {"a": 2**32}}}, {"model": {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "gone", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0}},
        {"model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]], "byte_fallback": True}}, {"model": {"type": "Unigram", "unk_id": 0, "vocab": [], "byte_fallback": False}}, {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["", float("0")], ["a", -1e300]], "byte_fallback": True}}, {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "gone"}},
        {"model": {**value["model"], "dropout": 1.0}}, {"model": {**value["model"], "continuing_subword_prefix": "zzzzzzzz"}}, {"model": {**value["model"], "unk_token": "gone", "fuse_unk": True, "byte_fallback": True}}, {"added_tokens": [{**value["added_tokens"][0], "content": ""}]},
        {"model": {**value["model"], "vocab": dict.fromkeys(value["model"]["vocab"], 0)}}, {"added_tokens": [{**value["added_tokens"][0], "id": 2**32 - 1}]}, {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}, {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
    ]  # fmt: skip
    for step in chance.sample(steps, chance.choice([1, 1, 2])):
        value |= step
    path.write_text(json.dumps(value))
    if chance.random() < 0.5:
        (base / "tokenizer.model").unlink()
    return use_base(place, chance, base)


def tokenizer_bytes(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    path = base / chance.choice(["tokenizer.json", "tokenizer.model", "tokenizer.model"])
    path.write_bytes(damage(path.read_bytes(), chance))
    if path.name == "tokenizer.model":
        (base / "tokenizer.json").unlink()
    return use_base(place, chance, base)


def safetensors_bytes(place: Place, chance: random.Random) -> Attack:
    """Damaged headers: of the base, or of the adapter."""
    folder, name = (
        (place.adapter(), "adapter_model.safetensors")
        if chance.random() < 0.5
        else (place.copy("base"), "model.safetensors")
    )
    data = (folder / name).read_bytes()
    size = 8 + struct.unpack("<Q", data[:8])[0]
    (folder / name).write_bytes(damage(data, chance, 0, chance.choice([8, size, size, None])))
    return (
        use_adapter(place, chance, folder)
        if folder.name == "adapter"
        else use_base(place, chance, folder)
    )


def base_tensors(place: Place, chance: random.Random) -> Attack:
    """A base's tensors of other shapes and types, with numbers that are none."""
    import torch

    base = place.copy("base")
    path = base / "model.safetensors"
    tensors = read_tensors(path)
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    tensors[name] = chance.choice([torch.full_like(value, float("nan")), torch.full_like(value, float("inf")), value[:1], value[None], value.to(torch.int64), value.to(torch.complex64), torch.zeros(0), torch.tensor(0.0),
                                   value.to(torch.float8_e4m3fn), value.to(torch.bool), value.to(torch.float64), torch.zeros(3, 0, 5)]).contiguous()  # fmt: skip
    if chance.random() < 0.2:
        del tensors[name]
    write_tensors(path, tensors)
    return use_base(place, chance, base)


def ids(place: Place, chance: random.Random) -> Attack:
    """Token ids beyond the vocabulary, negative ones, ones that are none."""
    far = chance.choice(
        [512, 513, 10**6, 2**31 - 1, 2**31, 2**63, -1, -100, -(2**31), True, 1.0, 1e30]
    )
    if chance.random() < 0.6:
        rows = [
            {"input_ids": [1, far, 2], "labels": [1, far, 2]},
            {"input_ids": [1, 2], "labels": [far, 2]},
        ]
        return use_rows(place, chance, place.rows(rows=rows))
    base = place.copy("base")
    field = chance.choice(
        [
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "decoder_start_token_id",
            "forced_bos_token_id",
            "suppress_tokens",
            "begin_suppress_tokens",
            "bad_words_ids",
            "forced_eos_token_id",
        ]
    )
    value: Any = [far] if field.endswith("tokens") else [[far]] if field == "bad_words_ids" else far
    file = base / chance.choice(["config.json", "generation_config.json"])
    change(file, **{field: value})
    return use_base(place, chance, base)


def generation(place: Place, chance: random.Random) -> Attack:
    """Settings of generation that libraries fall over."""
    base = place.copy("base")
    path = base / "generation_config.json"
    value = json.loads(path.read_text())
    odd = chance.choice([{"num_beams": 10**6}, {"num_return_sequences": 9}, {"cache_implementation": "static"}, {"cache_implementation": "nonsense"}, {"assistant_early_exit": 3}, {"prompt_lookup_num_tokens": 9}, {"guidance_scale": 9.0}, {"constraints": [1]},
                         {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}, {"repetition_penalty": 0.0}, {"no_repeat_ngram_size": 10**9}, {"sequence_bias": [[[1], 1.0]]}, {"watermarking_config": {"a": 1}}, {"stop_strings": ["x"]}, {"max_time": 0.0},
                         {"min_new_tokens": 10**9}, {"max_length": 0}, {"max_new_tokens": 10**9}, {"encoder_repetition_penalty": 2.0}, {"exponential_decay_length_penalty": [1, 1.5]}, {"output_scores": True, "return_dict_in_generate": True}, {"temperature": 1e-300, "do_sample": True}, {"typical_p": 0.0, "do_sample": True},
                         {"diversity_penalty": 1.0, "num_beam_groups": 2, "num_beams": 4}, {"compile_config": {"mode": "x"}}, {"top_k": -1, "do_sample": True}, {"min_p": 2.0, "do_sample": True}, {"epsilon_cutoff": 2.0, "do_sample": True}, {"use_cache": False}, {"is_assistant": True}])  # fmt: skip
    path.write_text(json.dumps({**value, **odd}))
    return use_base(place, chance, base)


def config_nests(place: Place, chance: random.Random) -> Attack:
    """Settings that choose another class, another quantiser, another attention."""
    base = place.copy("base")
    odd: dict[str, Any] = chance.choice([
        {"quantization_config": {"quant_method": chance.choice(["bitsandbytes", "gptq", "awq", "fp8", "mxfp4", "hqq", "compressed-tensors", "aqlm", "eetq", "quanto", "torchao", "finegrained_fp8", "vptq", "bitnet", "spqr", "higgs"]), "load_in_4bit": chance.choice([True, "x"]), "bits": chance.choice([0, 4, -1])}},
        {"attn_implementation": chance.choice(["flash_attention_2", "flex_attention", "eager", "paged|eager", "nonsense", "kernels-community/x"])}, {"rope_parameters": {"rope_type": chance.choice(["yarn", "longrope", "dynamic", "linear", "llama3", "x"]), "factor": chance.choice([0, -1, 1e30, "x"]), "rope_theta": 0}},
        {"architectures": chance.choice([["LlamaForSequenceClassification"], [], ["WhisperModel"], ["BertModel"], [None]])}, {"is_decoder": False, "is_encoder_decoder": True}, {"torch_dtype": chance.choice(["float8_e4m3fn", "int8", "qint8", "complex64", "float128", "auto"])}, {"tie_word_embeddings": True}, {"hidden_act": chance.choice(["gelu", "xielu", "laplace", "x"])},
        {"model_type": chance.choice(["gpt2", "t5", "bert", "clip", "whisper", "mamba", "rwkv", "vit", "encoder-decoder", "timm_wrapper", "dac", "musicgen", "llava", "qwen2_vl", "idefics", "xlnet", "reformer", "cpmant", "jamba"])}, {"rms_norm_eps": chance.choice([0, -1, float("nan"), "x"])}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"num_attention_heads": 0}, {"hidden_size": 0}, {"vocab_size": 0}, {"num_hidden_layers": -1},
        {"use_cache": "x", "output_attentions": True}, {"return_dict": False}, {"pruned_heads": {"0": [0]}}, {"torchscript": True}, {"tp_plan": {"x": "colwise"}}, {"base_model_tp_plan": {"a": 1}}, {"num_labels": -1}, {"problem_type": "x"}, {"chunk_size_feed_forward": -1}, {"gradient_checkpointing": True}, {"loss_type": "x"}, {"mlp_bias": True}, {"attention_bias": True},
    ])  # fmt: skip
    change(base / "config.json", **odd)
    return use_base(place, chance, base)


def gguf_of_config(place: Place, chance: random.Random) -> Attack:
    """A model for the converter and for llama.cpp, with one number of its configuration replaced."""
    merged = place.copy("merged")
    path = merged / chance.choice(
        ["config.json", "tokenizer_config.json", "generation_config.json"]
    )
    value = json.loads(path.read_text())
    path.write_text(
        json.dumps(
            put(
                value,
                chance.choice(places(value)),
                chance.choice([0, -1, "x", None, [], 10**9, 1.5]),
            )
        )
    )
    return Attack(["export-gguf", str(merged), "-o", "gg", "--no-base-cost"])


ATTACKS = [
    panics, cached_arrow, columnar_bytes, safetensors_bytes, tokenizer_bytes, ids, generation, config_nests, base_tensors, gguf_number,
    gguf_tensors, gguf_vocabulary, panics, cached_arrow, gguf_bytes, columnar_bytes, config_nests, gguf_of_config,
]  # fmt: skip
