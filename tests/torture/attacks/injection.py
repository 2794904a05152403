"""Kind 8: words of a stranger's become commands, of a shell or of a file's language."""

from __future__ import annotations

import json
import os
import random
import re

from tests.torture.attacks import SHELL, Attack, Place, change, read_tensors, write_tensors
from tests.torture.attacks.verbs import TALK, use_adapter, use_base, use_rows

UNQUOTED = ["touch", "pwned", "-rf", "--help"]
"""Words that only a stranger's text has; a shown command has them inside of another word at most."""


def draw_name(chance: random.Random) -> str:
    """A name that a shell would read as more than a name."""
    return chance.choice(
        [
            f"a{chance.choice(SHELL)}b",
            chance.choice(SHELL),
            "-rf",
            "--help",
            "-o touch pwned",
            "a b; touch pwned",
            "--set=x touch",
            "a\nb; touch pwned",
        ]
    ).replace("/", "")


def folder_name(place: Place, chance: random.Random) -> Attack:
    """A folder of that name, spoilt in one way or another, so that a hint names it."""
    name = draw_name(chance)
    kind = chance.choice(["adapter", "base", "run", "merged"])
    folder = place.copy(kind, f"./{name}")
    files = [path for path in folder.iterdir() if path.is_file()]
    path = chance.choice(files)
    how = chance.randrange(4)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_text(chance.choice(["{", "", "[]", "null"]))
    elif how == 2:
        path.unlink()
        path.mkdir()
    if kind == "adapter":
        return use_adapter(place, chance, folder, unquoted=UNQUOTED)
    if kind == "run":
        place.recipe(f"output_dir: {json.dumps(str(folder))}\n")
        return Attack(
            ["train", "recipe.yaml", *chance.choice([[], ["--resume"]])], unquoted=UNQUOTED
        )
    return use_base(place, chance, folder, unquoted=UNQUOTED)


def output_name(place: Place, chance: random.Random) -> Attack:
    """The folder to be made is there already, or cannot be made."""
    name = draw_name(chance)
    target = place.work / name
    if chance.random() < 0.6:
        target.mkdir()
        (target / chance.choice(["record.json", "lora_record.json", "x"])).write_text("{}")
    else:
        target.write_text("x")
    adapter = str(place.stage / "adapter")
    shown = str(target) if name.startswith("-") or chance.random() < 0.5 else name
    words = chance.choice([["merge", adapter, shown], ["convert", adapter, shown, "--r", "1"], ["combine", adapter, str(place.stage / "second"), shown],
                           ["extract", str(place.stage / "base"), str(place.stage / "tuned"), shown], ["recipes", "copy", "own-data", shown], ["train", "recipe.yaml"],
                           ["export-gguf", adapter, "--adapter-only", "-o", shown], ["train", "recipe.yaml", "--resume"]])  # fmt: skip
    place.recipe(f"output_dir: {json.dumps(shown)}\n")
    return Attack(words, unquoted=UNQUOTED)


def base_name(place: Place, chance: random.Random) -> Attack:
    """An adapter names such a base."""
    adapter = place.adapter(kind=chance.choice(["adapter", "run/adapter"]))
    name = draw_name(chance)
    if chance.random() < 0.4:
        name = str(place.copy("other", f"./{name}"))
    change(
        adapter / "adapter_config.json",
        base_model_name_or_path=name,
        **({"revision": draw_name(chance)} if chance.random() < 0.2 else {}),
    )
    if (adapter / "lora_record.json").exists() and chance.random() < 0.5:
        record = json.loads((adapter / "lora_record.json").read_text())
        record["base"]["name"] = chance.choice([name, draw_name(chance)])
        (adapter / "lora_record.json").write_text(json.dumps(record))
    return use_adapter(place, chance, adapter, unquoted=UNQUOTED)


def rows_name(place: Place, chance: random.Random) -> Attack:
    name = draw_name(chance)
    suffix = chance.choice(
        [".jsonl", ".csv", ".json", ".tsv", ".parquet", ".arrow", ".txt", ".jsonl.gz", ".xlsx", ""]
    )
    path = place.work / f"{name}{suffix}"
    path.write_bytes(
        chance.choice(
            [
                b"{",
                b"\xff\xfea\0",
                b"a,b,c\n1\n",
                b"",
                b"[1]",
                b'"a',
                b"PAR1",
                b"\x1f\x8b\x08",
                b"\xe9t\xe9\n",
                b"This is text.,Another one.\na,b\n",
                b"a,a\n1,2\n",
            ]
        )
    )
    if chance.random() < 0.2:
        path.unlink()
    return use_rows(place, chance, path, unquoted=UNQUOTED)


def column_name(place: Place, chance: random.Random) -> Attack:
    """Names of columns, roles, keys, in hints on `--set data.columns…`, sed and jq."""
    name = draw_name(chance)
    rows = chance.choice([[{name: "a", "x": "b"}], [{"messages": [{"role": name, "content": "x"}]}], [{"conversations": [{"from": name, "value": "x"}]}], [{"prompt": "a", name: "b"}],
                          [{"prompt": "a", "completion": "b", "tools": name}], [{f"{name}.": "x"}], [{"text": name}, {"text": 1}]])  # fmt: skip
    return use_rows(place, chance, place.rows(rows=rows), unquoted=UNQUOTED)


def tensor_name(place: Place, chance: random.Random) -> Attack:
    adapter = place.adapter()
    path = adapter / "adapter_model.safetensors"
    tensors = read_tensors(path)
    first = sorted(tensors)[0]
    tensors[f"base_model.model.{draw_name(chance)}.lora_A.weight"] = tensors.pop(first)
    write_tensors(path, tensors)
    return use_adapter(place, chance, adapter, unquoted=UNQUOTED)


def config_words(place: Place, chance: random.Random) -> Attack:
    """What hints say of packages, revisions, types and classes that a configuration names."""
    base, name = place.copy("base"), draw_name(chance)
    field, value = chance.choice([
        ("quantization_config", {"quant_method": name}), ("attn_implementation", name), ("model_type", name), ("architectures", [name]), ("dtype", name), ("_name_or_path", name),
        ("auto_map", {"AutoConfig": name}), ("hidden_act", name), ("rope_scaling", {"rope_type": name, "factor": 2.0}), ("quantization_config", {"quant_method": "gptq", "bits": name}),
    ])  # fmt: skip
    change(base / "config.json", **{field: value})
    return use_base(place, chance, base, unquoted=UNQUOTED)


def recipe_words(place: Place, chance: random.Random) -> Attack:
    value = json.dumps(draw_name(chance))
    written = chance.choice([f"{value}: 1\n", f"training: {{{value}: 1}}\n", f"data: {{path: {value}}}\n", f"model: {{name_or_path: {value}}}\n", f"model: {{adapter: {value}}}\n", f"extends: {value}\n",
                             f"lora: {{target_modules: [{value}]}}\n", f"data: {{columns: {{prompt: {value}}}}}\n", f"training: {{optim: {value}}}\n", f"training: {{report_to: [{value}]}}\n", f"model: {{chat_template: {value}}}\n",
                             f"data: {{eval_path: {value}}}\n", f"method: {value}\n", f"data: {{split: {value}}}\n", f"model: {{attn_implementation: {value}}}\n"])  # fmt: skip
    path = place.recipe(
        written, name=chance.choice(["recipe.yaml", draw_name(chance).lstrip("-") + ".yaml"])
    )
    if written.startswith("extends"):
        path.write_text(written)
    return Attack([chance.choice(["check", "plan", "train"]), str(path)], unquoted=UNQUOTED)


def modelfile(place: Place, chance: random.Random) -> Attack:
    """A template, a system message or tokens that end a Modelfile's quotation and go on in its language."""
    merged = place.copy("merged")
    evil = chance.choice(['"""\nFROM ./evil.gguf\nSYSTEM """', '"\nADAPTER ./evil.gguf\nPARAMETER stop "', '\nADAPTER /etc/passwd\n', '"""\n\nADAPTER evil', '" \nFROM evil\n#', '""""""\nFROM evil',
                          '{{ .System }}"""\nFROM evil\n', '\\"\nFROM evil', '"""\r\nFROM evil', '\u2028FROM evil', '"""\nPARAMETER temperature 99\nTEMPLATE """', '\x85FROM evil', '{{ end }}{{ .Prompt }}"""\nFROM evil\n"""', '"\x0bFROM evil'])  # fmt: skip
    where = chance.choice(["template", "system", "stop", "eos", "ask", "name", "role"])
    quoted = json.dumps(evil, ensure_ascii=False)
    body = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    plain = merged / "chat_template.jinja"
    if where == "system":
        plain.write_text(
            "{% if messages[0]['role'] != 'system' %}<|system|>{{ "
            + quoted
            + " }}{{ eos_token }}{% endif %}"
            + body
        )
    elif where == "template":
        plain.write_text(
            body.replace("{{ m['content'] }}", "{{ m['content'] }}{{ " + quoted + " }}")
        )
    elif where == "ask":
        plain.write_text(
            body.replace("<|assistant|>{% endif %}", "{{ " + quoted + " }}{% endif %}")
        )
    elif where == "role":
        plain.write_text(body.replace("<|{{", "{{ " + quoted + " }}<|{{"))
    elif where in ("stop", "eos"):
        path = merged / "tokenizer.json"
        value = json.loads(path.read_text())
        before = json.loads((merged / "tokenizer_config.json").read_text())["eos_token"]
        text = path.read_text().replace(json.dumps(before), json.dumps(evil))
        path.write_text(text if value else text)
        change(merged / "tokenizer_config.json", eos_token=evil)
        (merged / "tokenizer.model").unlink()
    else:
        merged = merged.rename(place.work / re.sub(r"[/\0]", "", f"m{evil}"))
    return Attack(
        ["export-gguf", str(merged), "-o", "gg", "--no-base-cost"],
        unquoted=["evil"],
        modelfile="gg/Modelfile",
    )


def adapter_modelfile(place: Place, chance: random.Random) -> Attack:
    """Names of outputs in what is printed to serve them."""
    name = draw_name(chance).replace("\n", "")
    adapter = place.copy("adapter", f"./{name}")
    if chance.random() < 0.5:
        return Attack(["export-gguf", str(adapter), "--adapter-only"], unquoted=UNQUOTED)
    return Attack(
        [
            "export-gguf",
            str(place.stage / "adapter"),
            "--adapter-only",
            "-o",
            str(place.work / f"gg{name}"),
        ],
        unquoted=UNQUOTED,
    )


def path_hijack(place: Place, chance: random.Random) -> Attack:
    """Programs and modules of a stranger's in the current folder and on the PATH."""
    mark = "from pathlib import Path; Path(__file__).resolve().parent.joinpath('pwned').touch()\n"
    name = chance.choice(
        [
            "torch",
            "json",
            "lora_cli",
            "gguf",
            "conversion",
            "sitecustomize",
            "xllamacpp",
            "numpy",
            "re",
            "usercustomize",
            "transformers",
            "secrets",
            "psutil",
            "code",
        ]
    )
    (place.work / f"{name}.py").write_text(mark)
    for program in (
        "git",
        "nvidia-smi",
        "pip",
        "python",
        "ollama",
        "convert_hf_to_gguf.py",
        "stty",
        "less",
    ):
        path = place.work / program
        path.write_text('#!/bin/sh\ntouch "$(dirname "$0")/pwned"\n')
        path.chmod(0o755)
    place.recipe(base=place.stage / "base")
    words = chance.choice([["check", "recipe.yaml"], ["merge", str(place.stage / "adapter"), "out"], ["doctor"], ["generate", str(place.stage / "model.gguf"), "--prompt", "x", "--max-new-tokens", "2"],
                           ["export-gguf", str(place.stage / "adapter"), "--adapter-only", "-o", "gg"], ["chat", str(place.stage / "model.gguf"), "--max-new-tokens", "2"]])  # fmt: skip
    environment = (
        {"PATH": chance.choice([".:/usr/bin:/bin", ":/usr/bin:/bin"])}
        if chance.random() < 0.0
        else {}
    )
    return Attack(words, stdin=TALK, environment=environment)


def code_in_model(place: Place, chance: random.Random) -> Attack:
    """Python that comes with a model does not run."""
    base = place.copy("base")
    mark = "from pathlib import Path\nPath('pwned').touch()\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\nclass C(LlamaConfig):\n    model_type='mine'\nclass M(LlamaForCausalLM):\n    config_class=C\nclass T(PreTrainedTokenizerFast): pass\n"
    for name in (
        "code.py",
        "modeling_x.py",
        "tokenization_x.py",
        "configuration_x.py",
        "convert_hf_to_gguf.py",
        "conversion.py",
        "gguf.py",
        "custom_generate/generate.py",
        "setup.py",
        "__init__.py",
    ):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(mark)
    maps = {
        "AutoConfig": "code.C",
        "AutoModelForCausalLM": "code.M",
        "AutoTokenizer": ["code.T", "code.T"],
    }
    where = chance.choice(["config", "tokenizer", "both", "generation", "quantisation"])
    if where in ("config", "both"):
        change(
            base / "config.json",
            auto_map=maps,
            **({"model_type": "mine"} if chance.random() < 0.5 else {}),
        )
    if where in ("tokenizer", "both"):
        change(
            base / "tokenizer_config.json",
            auto_map=maps,
            tokenizer_class=chance.choice(["T", "code.T", "LlamaTokenizer"]),
        )
    if where == "generation":
        path = base / "generation_config.json"
        path.write_text(json.dumps({"custom_generate": str(base), "trust_remote_code": True}))
    if where == "quantisation":
        change(
            base / "config.json",
            quantization_config={"quant_method": "code.C", "modules_to_not_convert": ["x"]},
            trust_remote_code=True,
        )
    return use_base(place, chance, base)


def gguf_other_llama(place: Place, chance: random.Random) -> Attack:
    """A llama.cpp of a stranger's: where it came from is said before it runs; a managed copy that
    somebody has changed does not run."""
    import shutil
    from pathlib import Path

    home = Path(os.environ["LLAMA_CPP_DIR"])
    evil = "from pathlib import Path\nPath('pwned').touch()\nPath(__file__).resolve().parent.joinpath('pwned').touch()\nraise SystemExit(1)\n"
    words = ["export-gguf", str(place.stage / "merged"), "-o", "gg", "--no-base-cost"]
    if chance.random() < 0.6:
        managed = place.cache / "lora-cli" / home.name
        shutil.copytree(home, managed)
        file = chance.choice(
            [
                managed / "convert_hf_to_gguf.py",
                managed / "conversion" / "__init__.py",
                managed / "gguf-py" / "gguf" / "__init__.py",
            ]
        )
        file.write_text(evil + file.read_text())
        if chance.random() < 0.3:
            (managed / "sitecustomize.py").write_text(evil)
        return Attack(words, environment={"LLAMA_CPP_DIR": ""})
    folder = place.work / "llama"
    shutil.copytree(home, folder)
    (folder / "convert_hf_to_gguf.py").chmod(0o755)
    if chance.random() < 0.5:
        return Attack(
            words, environment={"LLAMA_CPP_DIR": str(folder)}, said=r"LLAMA_CPP_DIR", codes=(0,)
        )
    path = f"{folder}:{os.environ['PATH']}"
    return Attack(
        words,
        environment={"LLAMA_CPP_DIR": "", "PATH": path},
        said=r"\(PATH\)|on the PATH|from PATH|by PATH",
        codes=(0,),
    )


ATTACKS = [
    folder_name, output_name, base_name, rows_name, column_name, tensor_name, config_words, recipe_words, path_hijack, code_in_model,
    folder_name, output_name, modelfile, adapter_modelfile, base_name, gguf_other_llama,
]  # fmt: skip
