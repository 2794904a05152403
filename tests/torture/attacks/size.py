"""Kind 9: small files that become large, and counts that are believed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import struct
from typing import Any

from tests.torture.attacks import Attack, Place, change, raw_safetensors
from tests.torture.attacks.verbs import (
    use_adapter,
    use_base,
    use_gguf,
    use_imatrix,
    use_rows,
    use_weights,
)


def compressed(place: Place, chance: random.Random) -> Attack:
    """A gigabyte or two in a megabyte."""
    name = chance.choice(
        [
            "rows.jsonl.gz",
            "rows.csv.gz",
            "rows.json.gz",
            "rows.txt.gz",
            "rows.tsv.gz",
            "rows.jsonl.xz",
            "rows.jsonl.bz2",
            "rows.jsonl.zst",
        ]
    )
    line = chance.choice(
        [
            b"\0",
            b"x",
            b"\n",
            b'{"prompt": "a", "completion": "b"}\n',
            b"a,",
            b"[",
            b'"',
            b" ",
            b'{"a":',
        ]
    )
    path = place.work / name
    total = chance.choice([2**30, 2**31])
    block = (line * (2**20 // len(line) + 1))[: 2**20 // len(line) * len(line)]
    if name.endswith("gz"):
        once = gzip.compress(block * 64, 9)
        path.write_bytes(
            once * (total // (len(block) * 64))
        )  # members of one file follow each other
    elif name.endswith("zst"):
        path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    else:
        made = (lzma.compress if name.endswith("xz") else bz2.compress)(block * 16)
        path.write_bytes(made * 16)
    return use_rows(place, chance, path)


def long_row(place: Place, chance: random.Random) -> Attack:
    """One row of very many characters, or very many rows of none."""
    n = chance.choice([3_000_000, 30_000_000])
    made = chance.choice([
        lambda: json.dumps({"prompt": "x" * n, "completion": "b"}) + "\n", lambda: json.dumps({"text": "ab " * (n // 3)}) + "\n", lambda: json.dumps({"input_ids": [1] * (n // 10), "labels": [1] * (n // 10)}) + "\n",
        lambda: json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * (n // 300)}) + "\n", lambda: "\n" * n, lambda: "[" + "{}," * (n // 10) + "{}]", lambda: "{}\n" * (n // 10),
        lambda: json.dumps({f"c{i}": 1 for i in range(n // 100)}) + "\n", lambda: "".join(json.dumps({f"c{i}": 1}) + "\n" for i in range(n // 200)), lambda: '{"text": "' + "a" * n, lambda: json.dumps({"text": "\U0001f999" * (n // 12)}) + "\n",
        lambda: json.dumps({"text": "é́" * (n // 20)}) + "\n", lambda: json.dumps({"text": " " * n}) + "\n", lambda: json.dumps({"prompt": "a", "completion": "b", "tools": [{"x": "y" * n}]}) + "\n", lambda: '"' * n,
    ])()  # fmt: skip
    path = place.work / chance.choice(["rows.jsonl", "rows.json", "rows.jsonl"])
    path.write_text(made)
    return use_rows(place, chance, path)


def wide_table(place: Place, chance: random.Random) -> Attack:
    """A header of very many columns."""
    n = chance.choice([20_000, 300_000, 1_000_000])
    kind = chance.choice(["csv", "tsv", "csv", "parquet", "arrow"])
    path = place.work / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        mark = chance.choice([",", "\t", ";", "|"])
        names = chance.choice(
            [
                (f"c{i}" for i in range(n)),
                ("" for _ in range(n)),
                ("same" for _ in range(n)),
                (f"{i}.5" for i in range(n)),
            ]
        )
        first = mark.join(names)
        path.write_text(
            f"{first}\n" + mark.join("x" for _ in range(n)) + "\n"
            if chance.random() < 0.5
            else f'{first}\n"' + "x" * n
        )
    else:
        import pyarrow
        from pyarrow import parquet

        n = min(n, 20_000)
        table = pyarrow.table({f"c{i}": [1] for i in range(n)})
        if kind == "parquet":
            parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as out:
                out.write_table(table)
    return use_rows(place, chance, path)


def dictionary(place: Place, chance: random.Random) -> Attack:
    """One long value, named by very many rows (Parquet's and Arrow's dictionaries, run lengths)."""
    import pyarrow
    from pyarrow import parquet

    n, long = chance.choice(
        [(200_000, 10_000), (1_000_000, 2_000), (2_000_000, 100), (3000, 1_000_000)]
    )
    words = pyarrow.array(["x" * long, "y"])
    indices = pyarrow.array([0] * n, pyarrow.int32())
    column: Any = pyarrow.DictionaryArray.from_arrays(indices, words)
    how = chance.choice(["parquet", "parquet", "arrow", "null", "list", "deep"])
    if how == "null":
        column = pyarrow.nulls(n * 5, pyarrow.string())
    elif how == "list":
        column = pyarrow.ListArray.from_arrays(pyarrow.array([0, n], pyarrow.int32()), indices)
    elif how == "deep":
        column = pyarrow.array([1])
        for _ in range(chance.choice([50, 300])):
            column = pyarrow.ListArray.from_arrays(
                pyarrow.array([0, len(column)], pyarrow.int32()), column
            )
    table = pyarrow.table({"text": column})
    path = place.work / ("rows.arrow" if how == "arrow" else "rows.parquet")
    if how == "arrow":
        with pyarrow.ipc.new_file(path, table.schema) as out:
            out.write_table(table)
    else:
        parquet.write_table(
            table,
            path,
            use_dictionary=True,
            compression=chance.choice(["zstd", "gzip", "snappy"]),
            row_group_size=len(table),
        )
    return use_rows(place, chance, path)


def arrow_buffers(place: Place, chance: random.Random) -> Attack:
    """Compressed buffers of an Arrow file that say that they are large."""
    import pyarrow

    table = pyarrow.table({"text": pyarrow.array(["\0" * chance.choice([2**28, 2**29])])})
    path = place.work / "rows.arrow"
    with pyarrow.ipc.new_file(
        path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression="zstd")
    ) as out:
        out.write_table(table)
    return use_rows(place, chance, path)


def config_number(place: Place, chance: random.Random) -> Attack:
    """Numbers of a configuration that the files' own tensors do not bear out."""
    base = place.copy("base")
    fields = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim", "num_labels",
              "num_experts", "num_local_experts", "sliding_window", "id2label", "layer_types", "pretraining_tp", "num_labels", "num_nextn_predict_layers", "rope_theta", "bos_token_id")  # fmt: skip
    field = chance.choice(fields)
    value: Any = chance.choice([10**4, 10**6, 10**9, 2**31, 2**40, 10**18])
    if field == "id2label":
        value = {str(i): f"L{i}" for i in range(300_000)}
    elif field == "layer_types":
        value = ["full_attention"] * 1_000_000
    change(base / "config.json", **{field: value})
    if chance.random() < 0.3:
        change(
            base / "config.json",
            num_hidden_layers=10**6,
            hidden_size=8,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=8,
        )
    return use_base(place, chance, base)


def other_architecture(place: Place, chance: random.Random) -> Attack:
    """Sizes of other architectures."""
    base = place.copy("base")
    kind, more = chance.choice([
        ("mixtral", {"num_local_experts": 10**6}), ("gpt2", {"n_layer": 10**6, "n_positions": 10**9}), ("qwen2_moe", {"num_experts": 10**6}), ("bloom", {"n_layer": 10**5}), ("mamba", {"num_hidden_layers": 10**6, "state_size": 10**6}),
        ("gemma", {"num_hidden_layers": 10**6}), ("opt", {"max_position_embeddings": 10**10}), ("deepseek_v3", {"n_routed_experts": 10**6}), ("t5", {"num_layers": 10**6}), ("llama4", {"text_config": {"num_hidden_layers": 10**6}}),
        ("whisper", {"num_mel_bins": 10**9}), ("phi3", {"num_hidden_layers": 10**6}), ("bert", {"num_hidden_layers": 10**6}), ("gpt_neo", {"attention_types": [[["global"], 10**7]], "num_layers": 10**7}), ("falcon", {"num_hidden_layers": 10**6}),
    ])  # fmt: skip
    (base / "config.json").write_text(
        json.dumps(
            {
                "model_type": kind,
                "architectures": ["X"],
                "vocab_size": 512,
                "hidden_size": 32,
                **more,
            }
        )
    )
    return use_base(place, chance, base)


def added_tokens(place: Place, chance: random.Random) -> Attack:
    """Very many added tokens, in one file or another; numbers of tokens far out."""
    base, n = place.copy("base"), chance.choice([20_000, 100_000])
    how = chance.choice(["json", "config", "added", "extra", "far", "merges", "long", "vocab"])
    path = base / "tokenizer.json"
    value = json.loads(path.read_text())
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    if how == "json":
        value["added_tokens"] += [
            {"id": 512 + i, "content": f"<t{i}>", **flags, "normalized": chance.random() < 0.5}
            for i in range(n)
        ]
    elif how == "far":
        value["added_tokens"].append(
            {"id": chance.choice([2**31, 2**32 - 1, 10**9]), "content": "<far>", **flags}
        )
    elif how == "config":
        change(
            base / "tokenizer_config.json",
            added_tokens_decoder={str(512 + i): {"content": f"<t{i}>", **flags} for i in range(n)},
        )
    elif how == "added":
        (base / "added_tokens.json").write_text(json.dumps({f"<t{i}>": 512 + i for i in range(n)}))
    elif how == "extra":
        change(base / "tokenizer_config.json", extra_special_tokens=[f"<t{i}>" for i in range(n)])
    elif how == "merges":
        value["model"]["merges"] = value["model"]["merges"] * (n // 50)
    elif how == "long":
        value["added_tokens"].append({"id": 512, "content": "x" * 5_000_000, **flags})
    else:
        value["model"]["vocab"] |= {f"t{i}": 512 + i for i in range(n * 5)}
    path.write_text(json.dumps(value))
    return use_base(place, chance, base)


def header(place: Place, chance: random.Random) -> Attack:
    """safetensors headers that are large, or tell of what is not there."""
    n = chance.choice([10_000, 300_000])
    big = 2 ** chance.choice([31, 40, 62, 63])
    content = chance.choice([
        lambda: raw_safetensors({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(n)}), lambda: raw_safetensors({"a": {"dtype": "F32", "shape": [big], "data_offsets": [0, big]}}),
        lambda: raw_safetensors(b"[" * 90_000_00), lambda: (99_000_000).to_bytes(8, "little") + b"{" + b" " * 99_000_000, lambda: (2**63).to_bytes(8, "little"), lambda: raw_safetensors({"__metadata__": {f"k{i}": "v" * 100 for i in range(n)}}),
        lambda: raw_safetensors({"a": {"dtype": "F32", "shape": [1] * 10_000, "data_offsets": [0, 4]}}, 4), lambda: raw_safetensors({"x" * 50_000_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4),
        lambda: raw_safetensors({"a": {"dtype": "F32", "shape": [0, big], "data_offsets": [0, 0]}}), lambda: raw_safetensors({"a": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}), lambda: raw_safetensors(b'{"a":' * 100_000),
    ])()  # fmt: skip
    return use_weights(place, chance, content)


def rank(place: Place, chance: random.Random) -> Attack:
    """Ranks, patterns and lists of an adapter."""
    adapter = place.adapter()
    big = 10 ** chance.choice([6, 9, 12, 18, 30])
    field, value = chance.choice([("r", big), ("lora_alpha", big), ("rank_pattern", {"q_proj": big}), ("layers_to_transform", [big]), ("trainable_token_indices", [big]), ("layer_replication", [[0, big]]), ("layer_replication", [[0, 2]] * 100_000),
                                  ("megatron_config", {"a": big}), ("alpha_pattern", {"q_proj": 1e308}), ("loftq_config", {"loftq_iter": big}), ("corda_config", {}), ("eva_config", {"rho": big}), ("lora_dropout", big)])  # fmt: skip
    change(adapter / "adapter_config.json", **{field: value})
    return use_adapter(place, chance, adapter)


def shards(place: Place, chance: random.Random) -> Attack:
    """Very many shards, or an index of very many names."""
    base, n = place.copy("base"), chance.choice([2_000, 100_000])
    (base / "model.safetensors").rename(base / "s0.safetensors")
    weights = (
        {f"model.layers.{i}.x": f"s{i}.safetensors" for i in range(n)}
        if chance.random() < 0.5
        else {f"t{i}": "s0.safetensors" for i in range(n)}
    )
    if n == 2_000:
        content = raw_safetensors({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4)
        for i in range(1, n):
            (base / f"s{i}.safetensors").write_bytes(content)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weights})
    )
    return use_base(place, chance, base)


def many_files(place: Place, chance: random.Random) -> Attack:
    """A folder of very many files of rows."""
    folder, n = place.work / "data", chance.choice([2_000, 20_000])
    folder.mkdir()
    for i in range(n):
        (folder / f"{i}.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' if i % 2 else "")
    return use_rows(place, chance, chance.choice([folder, folder / "*.jsonl", folder / "**"]))


def gguf(place: Place, chance: random.Random) -> Attack:
    """Counts of a GGUF that its size does not bear out."""
    path = place.copy("model.gguf")
    data = bytearray(path.read_bytes())
    big = 2 ** chance.choice([20, 31, 40, 60, 63])
    offset, kind = chance.choice([(8, "<Q"), (16, "<Q"), (24, "<Q"), (4, "<I")])
    struct.pack_into(kind, data, offset, big % 2 ** (8 * struct.calcsize(kind)))
    path.write_bytes(data)
    return use_gguf(place, chance, path)


def imatrix(place: Place, chance: random.Random) -> Attack:
    """Importance matrices with counts and lengths that are not so."""
    big = chance.choice([2**31 - 1, -1, -(2**31), 10**6, 0])
    content = chance.choice(
        [
            struct.pack("<i", big),
            struct.pack("<ii", 1, big),
            struct.pack("<ii1sii", 1, 1, b"a", 1, big),
            struct.pack("<ii", big, 0) + bytes(10**6),
            b"GGUF" + bytes(20),
            struct.pack("<4sIQQ", b"GGUF", 3, 2**40, 2**40),
            b"",
            bytes(10**7),
        ]
    )
    (place.work / "m.imatrix").write_bytes(content)
    return use_imatrix(place, "--no-base-cost")


def asked(place: Place, chance: random.Random) -> Attack:
    """Numbers on the command line and in recipes."""
    big = str(10 ** chance.choice([6, 9, 15, 30]))
    base, adapter = str(place.stage / "base"), str(place.stage / "adapter")
    words = chance.choice([
        ["convert", adapter, "out", "--r", big], ["extract", base, str(place.stage / "tuned"), "out", "--r", big], ["check", "recipe.yaml", "--samples", big],
        ["plan", "recipe.yaml", "--gpu", big + "GB"], ["plan", "recipe.yaml", "--set", f"lora.r={big}"], ["plan", "recipe.yaml", "--set", f"training.max_length={big}"], ["check", "recipe.yaml", "--set", f"training.per_device_train_batch_size={big}"],
        ["combine", adapter, str(place.stage / "second"), "out", "--r", big, "--combination", "svd"], ["train", "recipe.yaml", "--set", f"lora.r={big}"], ["check", "recipe.yaml", "--set", f"data.max_rows={big}"], ["check", "recipe.yaml", "--set", f"data.shuffle_buffer={big}", "--set", "data.streaming=true"],
        ["train", "recipe.yaml", "--set", f"training.dataset_num_proc={big}"], ["train", "recipe.yaml", "--set", f"training.gradient_accumulation_steps={big}"], ["plan", "recipe.yaml", "--tokens-per-second", "1e-300"],
    ])  # fmt: skip
    place.recipe()
    return Attack(words, output="out")


ATTACKS = [
    compressed, wide_table, dictionary, config_number, added_tokens, header, rank, long_row, other_architecture, shards, asked, config_number,
    many_files, arrow_buffers, gguf, imatrix,
]  # fmt: skip
