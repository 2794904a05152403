"""Kind 1: a stranger's text reaches the terminal."""

from __future__ import annotations

import csv
import io
import json
import random
from pathlib import Path
from typing import Any

from tests.torture.attacks import (
    ESCAPES,
    Attack,
    Place,
    change,
    draw_text,
    places,
    put,
    raw_safetensors,
    read_tensors,
    write_tensors,
)  # fmt: skip
from tests.torture.attacks.verbs import (
    TALK,
    use_adapter,
    use_base,
    use_gguf,
    use_recipe,
    use_rows,
    use_weights,
)


def spoil_text(
    path: Path, chance: random.Random, keys: list[tuple[Any, ...]] | None = None
) -> None:
    """Put an escape where a JSON file has a text (or anything else), or into the name of a key."""
    value = json.loads(path.read_text())
    text = draw_text(chance)
    if chance.random() < 0.15 and isinstance(value, dict):
        value[text] = chance.choice([1, "x", None, {"a": "b"}])
    else:
        found = keys or places(value)
        strings = [each for each in found if isinstance(find(value, each), str)]
        where = chance.choice(strings if strings and chance.random() < 0.7 else found)
        value = put(value, where, text)
    path.write_text(json.dumps(value))


def find(value: Any, path: tuple[Any, ...]) -> Any:
    """What a JSON value has at a path."""
    for key in path:
        value = value[key]
    return value


def adapter_field(place: Place, chance: random.Random) -> Attack:
    adapter = place.adapter()
    fields = (
        "peft_type", "task_type", "base_model_name_or_path", "revision", "bias", "init_lora_weights",
        "target_modules", "layers_pattern", "exclude_modules", "auto_mapping", "modules_to_save", "layers_to_transform",
        "rank_pattern", "alpha_pattern", "target_parameters", "lora_alpha", "r", "trainable_token_indices", "peft_version",
    )  # fmt: skip
    name, text = chance.choice(fields), draw_text(chance)
    value: Any = text
    if "pattern" in name and name != "layers_pattern":
        value = {text: 1}
    elif name in (
        "target_modules",
        "modules_to_save",
        "exclude_modules",
        "target_parameters",
        "layers_pattern",
    ):
        value = chance.choice([text, [text], ["q_proj", text]])
    change(adapter / "adapter_config.json", **{name: value})
    if chance.random() < 0.2:
        change(adapter / "adapter_config.json", **{draw_text(chance): text})
    return use_adapter(place, chance, adapter)


def adapter_tensor(place: Place, chance: random.Random) -> Attack:
    adapter = place.adapter()
    path = adapter / "adapter_model.safetensors"
    tensors = read_tensors(path)
    names = sorted(tensors)
    for name in chance.sample(names, chance.choice([1, 1, len(names)])):
        text = draw_text(chance)
        made = chance.choice(
            [
                text,
                name.replace("q_proj", text),
                name + text,
                f"base_model.model.{text}.lora_A.weight",
            ]
        )
        tensors[made] = tensors.pop(name) if chance.random() < 0.6 else tensors[name].clone()
    write_tensors(path, tensors, {"format": "pt", "note": draw_text(chance)})
    return use_adapter(place, chance, adapter)


def adapter_record(place: Place, chance: random.Random) -> Attack:
    adapter = place.adapter(kind="run/adapter")
    for _ in range(chance.choice([1, 1, 3])):
        spoil_text(adapter / "lora_record.json", chance)
    return use_adapter(place, chance, adapter)


def base_config(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    extra = ("quantization_config", "torch_dtype", "dtype", "auto_map", "attn_implementation", "_name_or_path",
             "rope_scaling", "layer_types", "_commit_hash", "architectures", "transformers_version")  # fmt: skip
    if chance.random() < 0.5:
        name, text = chance.choice(extra), draw_text(chance)
        nests = {"quantization_config": {"quant_method": text}, "auto_map": {"AutoModelForCausalLM": text},
                 "rope_scaling": {"rope_type": text}, "layer_types": [text] * 2, "architectures": [text]}  # fmt: skip
        change(base / "config.json", **{name: nests.get(name, text)})
    else:
        spoil_text(base / "config.json", chance)
    return use_base(place, chance, base)


def tokenizer_settings(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    path = base / "tokenizer_config.json"
    text = draw_text(chance)
    fields: dict[str, Any] = {
        "tokenizer_class": text, "chat_template": text, "model_max_length": text, "padding_side": text,
        "eos_token": text, "pad_token": {"content": text}, "extra_special_tokens": [text], "backend": text,
        "auto_map": {"AutoTokenizer": [text, text]}, "unk_token": text, "additional_special_tokens": [text, text],
        "added_tokens_decoder": {"7": {"content": text}}, "bos_token": text,
    }  # fmt: skip
    name = chance.choice(sorted(fields))
    change(path, **{name: fields[name]})
    if name == "chat_template":
        (base / "chat_template.jinja").unlink()
    if chance.random() < 0.3:
        (base / chance.choice(["special_tokens_map.json", "added_tokens.json"])).write_text(
            json.dumps({chance.choice(["eos_token", "cls_token", text]): text})
        )
    return use_base(place, chance, base)


def tokenizer_json(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    path = base / "tokenizer.json"
    value = json.loads(path.read_text())
    short = {key: inner for key, inner in value.items() if key != "model"}
    where = (
        chance.choice(places(short))
        if chance.random() < 0.6
        else ("model", chance.choice(list(value["model"])))
    )
    path.write_text(json.dumps(put(value, where, draw_text(chance))))
    return use_base(place, chance, base)


def answers(place: Place, chance: random.Random) -> Attack:
    """Each token reads as an escape."""
    base = place.copy("base")
    path = base / "tokenizer.json"
    value = json.loads(path.read_text())
    text = chance.choice([each for each in ESCAPES if "forged" not in each])
    value["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"Regex": "[a-zA-Z]"}, "content": text}, {"type": "Fuse"},
    ]}  # fmt: skip
    path.write_text(json.dumps(value))
    many = ["--max-new-tokens", "12"]
    words = chance.choice([
        ["generate", str(base), "--prompt", "ask", *many], ["chat", str(base), *many],
        ["generate", str(base), "--prompt", "ask", "--json", *many], ["check", "recipe.yaml"],
        ["generate", str(base), "--file", str(place.stage / "rows.jsonl"), *many],
    ])  # fmt: skip
    place.recipe(base=base)
    return Attack(words, stdin=TALK)


def generation(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    path, text = base / "generation_config.json", draw_text(chance)
    names = ("eos_token_id", "temperature", "cache_implementation", "stop_strings", "transformers_version",
             "pad_token_id", "do_sample", "top_k", text, "watermarking_config", "max_length", "num_beams")  # fmt: skip
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(
        json.dumps({**value, chance.choice(names): chance.choice([text, [text], {text: text}])})
    )
    return use_base(place, chance, base)


def template(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    text = json.dumps(draw_text(chance))
    written = chance.choice([
        f"{{{{ raise_exception({text}) }}}}", f"{{{{ {text} }}}}{{{{ messages[0]['content'] }}}}",
        f"{{{{ messages[{text}].x }}}}", f"{{{{ messages | {text} }}}}", f"{{% {json.loads(text)} %}}",
        f"{{% include {text} %}}", f"{{{{ {text} + 1 }}}}", f"{{{{ ({text}|int)[{text}] }}}}",
        f"{{{{ messages[0]['content'] }}}}{json.loads(text)}", f"{{{{ strftime_now({text}) }}}}", f"{{{{ {text}.format(1, {{}}) }}}}",
        f"{{% import {text} as x %}}", f"{{{{ undefined_{{name}}[{text}] }}}}", f"{{% macro x() %}}{json.loads(text)}",
    ])  # fmt: skip
    (base / "chat_template.jinja").write_text(written)
    return use_base(place, chance, base)


def base_tensor(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    path, text = base / "model.safetensors", draw_text(chance)
    tensors = read_tensors(path)
    name = chance.choice(sorted(tensors))
    how = chance.randrange(4)
    if how == 0:
        tensors[text] = tensors.pop(name)
    elif how == 1:
        tensors[f"model.{text}.weight"] = tensors[name].clone()
    write_tensors(path, tensors, {"format": text if how == 2 else "pt", text: text})
    if how == 3:
        path.rename(base / "model-00001-of-00001.safetensors")
        file = chance.choice(
            [
                text,
                f"../{text}.safetensors",
                "model-00001-of-00001.safetensors",
                f"{text}/x.safetensors",
            ]
        )
        index = {
            "metadata": {"total_size": text},
            "weight_map": {text if chance.random() < 0.3 else each: file for each in tensors},
        }
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return use_base(place, chance, base)


def header(place: Place, chance: random.Random) -> Attack:
    """A safetensors header whose texts are escapes, in an adapter or in a base."""
    text = draw_text(chance)
    about = {"dtype": chance.choice(["F32", text]), "shape": [2, 2], "data_offsets": [0, 16]}
    content = raw_safetensors({text: about, "__metadata__": {text: text}}, 16)
    return use_weights(place, chance, content)


def rows(place: Place, chance: random.Random) -> Attack:
    """Names of columns, values, and what is no row at all."""
    text = draw_text(chance)
    odd = chance.choice([
        {text: "a", "completion": "b"}, {"prompt": text, "completion": "b"}, {"prompt": "a", "completion": text},
        {"messages": [{"role": text, "content": "a"}]}, {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]},
        {"conversations": [{"from": text, "value": "x"}]}, {"text": text}, {"input_ids": [text], "labels": [1]},
        {"messages": text}, {"messages": [{text: text}]}, {"prompt": {text: 1}, "completion": "b"}, {"text": [text]},
        {"prompt": "a", "completion": "b", "tools": text}, {"instruction": text, "output": "x", text: text},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", text: text, "train": text}]},
    ])  # fmt: skip
    mixed = [odd] * 2 + chance.choice([[], [{"prompt": "a", "completion": "b"}], [text]])
    return use_rows(
        place,
        chance,
        place.rows(rows=mixed),
        f"data: {{on_bad_row: {chance.choice(['error', 'skip'])}}}\n",
    )


def tables(place: Place, chance: random.Random) -> Attack:
    """The same in tables."""
    import pyarrow
    from pyarrow import parquet

    text, kind = draw_text(chance), chance.choice(["csv", "tsv", "parquet", "arrow"])
    path = place.work / f"rows.{kind}"
    names = chance.choice(
        [
            [text, "completion"],
            ["prompt", text],
            [text, text],
            ["prompt", "completion"],
            [text + "?", "b c d e f."],
        ]
    )
    values = [["a", "b"], [text, text]]
    if kind in ("csv", "tsv"):
        stream = io.StringIO()
        writer = csv.writer(stream, delimiter="," if kind == "csv" else "\t")
        writer.writerows([names, *values, *([[text]] if chance.random() < 0.4 else [])])
        path.write_text(stream.getvalue(), newline="")
    else:
        columns = [pyarrow.array([row[i] for row in values]) for i in range(2)]
        table = pyarrow.Table.from_arrays(columns, schema=pyarrow.schema(
            [pyarrow.field(name, pyarrow.string()) for name in names], metadata={text: text}))  # fmt: skip
        if kind == "parquet":
            parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_file(path, table.schema) as out:
                out.write_table(table)
    return use_rows(place, chance, path)


def damaged_rows(place: Place, chance: random.Random) -> Attack:
    """Files that are not what their names say, with escapes in what errors quote."""
    text = draw_text(chance)
    name = chance.choice(
        [
            "rows.json",
            "rows.jsonl",
            "rows.csv",
            "rows.parquet",
            "rows.arrow",
            "rows.txt",
            "rows.jsonl.gz",
            "rows.tsv",
        ]
    )
    path = place.work / name
    path.write_text(
        chance.choice(
            [
                text * 3,
                f'["{text}',
                f'{{"{text}": ',
                f'"{text}"',
                f"sep={text}\na{text}b\n",
                f"[{json.dumps(text)}]",
                f'{{"a":1}}\n{json.dumps(text)}\n',
            ]
        ),
        newline="",
    )
    return use_rows(place, chance, path)


def names(place: Place, chance: random.Random) -> Attack:
    """Names of files: in a folder of rows, of the base's, of an adapter's."""
    text = draw_text(chance).replace("/", "")
    if chance.random() < 0.6:
        folder = place.work / "data"
        folder.mkdir()
        for number in range(2):
            bad = chance.random() < 0.6
            (folder / f"{text}{number}.jsonl").write_text(
                "nonsense\n" if bad else '{"prompt": "a", "completion": "b"}\n' * 3
            )
        return use_rows(place, chance, chance.choice([folder, folder / "*.jsonl", f"{folder}/*"]))
    base = place.copy("base", text)
    if chance.random() < 0.6:
        (base / chance.choice(["config.json", "tokenizer.json", "model.safetensors"])).write_text(
            "{"
        )
    made = Attack(["check", "recipe.yaml"])
    place.recipe(base=base)
    return made


def recipe(place: Place, chance: random.Random) -> Attack:
    """Keys and values of a recipe; YAML's own escapes carry them."""
    text = json.dumps(draw_text(chance))
    written = chance.choice([
        f"{text}: 1\n", f"lora: {{{text}: 1}}\n", f"method: {text}\n", f"lora: {{target_modules: [{text}]}}\n",
        f"model: {{name_or_path: {text}}}\n", f"data: {{path: {text}}}\n", f"training: {{optim: {text}}}\n",
        f"training: {{lr_scheduler_type: {text}}}\n", f"training: {{report_to: [{text}]}}\n", f"training: {{run_name: {text}}}\n",
        f"model: {{system_prompt: {text}}}\n", f"model: {{add_tokens: [{text}]}}\n", f"model: {{revision: {text}}}\n",
        f"data: {{format: {text}}}\n", f"data: {{columns: {{prompt: {text}}}}}\n", f"data: {{columns: {{{text}: x}}}}\n",
        f"lora: {{rank_pattern: {{{text}: 2}}}}\n", f"lora: {{init_lora_weights: {text}}}\n", f"extends: {text}\n",
        f"training: {{metric_for_best_model: {text}}}\n", f"output_dir: {text}\n", f"data: {{split: {text}}}\n", f"data: {{eval_split: {text}}}\n",
        f"model: {{adapter: {text}}}\n", f"lora: {{target_modules: {text}}}\n", f"lora: {{modules_to_save: [{text}]}}\n", f"model: {{chat_template: {text}}}\n",
        f"training: {{learning_rate: {text}}}\n", f"? [{text}]\n: 1\n", f"&a {text}: *b\n", f"x: !!python/{json.loads(text)} 1\n", f"trainer: {text}\n",
        f"training: {{lr_scheduler_kwargs: {{{text}: 1}}}}\n", f"training: {{optim_args: {text}}}\n", f"model: {{attn_implementation: {text}}}\n",
    ])  # fmt: skip
    path = place.recipe(written)
    if written.startswith(("extends", "output_dir")):
        path.write_text(written)
    return use_recipe(chance, path)


def gguf(place: Place, chance: random.Random) -> Attack:
    """Texts of a GGUF: keys, values, tokens, names of tensors."""
    from tests.torture.attacks.gguf_files import rewrite

    path, text = place.copy("model.gguf"), draw_text(chance).replace("\0", "")
    how = chance.choice(
        ["name", "architecture", "template", "tokens", "key", "tensor", "model", "pre"]
    )
    rewrite(path, how, text, chance)
    return use_gguf(place, chance, path)


def run_folder(place: Place, chance: random.Random) -> Attack:
    """A run's folder that comes from a stranger, resumed."""
    run = place.run()
    (run / ".lock").unlink(missing_ok=True)
    file = chance.choice(
        [
            *run.glob("*.json"),
            *run.glob("checkpoint-2/*.json"),
            *run.glob("checkpoint-1/adapter_config.json"),
            run / "recipe.yaml",
        ]
    )
    if file.suffix == ".json":
        spoil_text(file, chance)
    else:
        file.write_text(file.read_text() + f"{json.dumps(draw_text(chance))}: 1\n")
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    words = chance.choice([["train", "recipe.yaml", "--resume"], ["train", "recipe.yaml"], ["merge", str(run / "adapter"), "out"],
                           ["merge", str(run / "checkpoint-2"), "out"], ["export-gguf"]])  # fmt: skip
    return Attack(words)


def cards(place: Place, chance: random.Random) -> Attack:
    """Files that are read beside the main ones: README, Modelfile, importance matrices."""
    text = draw_text(chance)
    adapter = place.adapter()
    (adapter / "README.md").write_text(
        f"---\nbase_model: {json.dumps(text)}\ntags: [{json.dumps(text)}]\n---\n{text}\n"
    )
    if chance.random() < 0.7:
        return use_adapter(place, chance, adapter)
    merged = place.copy("merged")
    (place.work / "gg").mkdir()
    (place.work / "gg" / "Modelfile").write_text(text)
    matrix = place.work / "m.imatrix"
    matrix.write_bytes(
        (1).to_bytes(4, "little")
        + len(text.encode()).to_bytes(4, "little")
        + text.encode()
        + bytes(8)
    )
    return Attack(
        [
            "export-gguf",
            str(merged),
            "-o",
            "gg",
            *chance.choice([[], ["-q", "q2_k", "--imatrix", str(matrix)]]),
        ]
    )


def index_of_templates(place: Place, chance: random.Random) -> Attack:
    """Several templates, by names and files of a stranger's."""
    base, text = place.copy("base"), draw_text(chance)
    if chance.random() < 0.5:
        (base / "chat_template.jinja").unlink()
        change(
            base / "tokenizer_config.json",
            chat_template=[{"name": text, "template": text}, {"name": "x", "template": "{{ 1 }}"}],
        )
    else:
        folder = base / "additional_chat_templates"
        folder.mkdir()
        (folder / f"{text.replace('/', '')}.jinja").write_text(text)
        if chance.random() < 0.5:
            (base / "chat_template.jinja").unlink()
    return use_base(place, chance, base)


ATTACKS = [
    adapter_field, adapter_tensor, adapter_record, base_config, tokenizer_settings, tokenizer_json, answers,
    generation, template, base_tensor, header, rows, tables, damaged_rows, names, recipe, gguf, run_folder,
    cards, index_of_templates,
]  # fmt: skip
