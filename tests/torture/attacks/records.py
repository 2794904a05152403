"""Kind 2: JSON (and YAML, and arrays) of a stranger's is believed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tests.torture.attacks import Attack, Place, nested, places, put, read_tensors, write_tensors
from tests.torture.attacks.verbs import SHORT, TALK, use_adapter, use_base, use_recipe, use_rows

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 1.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), float("-inf"), "", "x", "auto", "1", "-1", "nan", "\ud800", "\udcff", "\0", "a\0b", "../x", "/", ".", "x" * 100_000,
    [], [[]], {}, {"": {}}, [None], [1, "a"], {"a": 1}, {"__class__": "x"}, ["\ud800"], [0] * 1000, "2026-13-45T99", "9999999999-01-01",
    ..., ..., "é́" * 50, {"name": {"name": {}}}, [{}], [True], "\u0660", "0x10", "1_000",
)  # fmt: skip
"""Values of every kind in every place; `...` takes the key away."""

WHOLE = (
    nested(5_000), nested(100_000), nested(990), nested(3000, '{"a":', "1" + "}" * 0) + "}" * 3000, "9" * 5000, '{"a": ' + "9" * 5000 + "}",
    '"' + "x" * 3_000_000 + '"', "", "null", "[]", "{}", "0", '"x"', "NaN", "{", "\x00" * 100, '{"a": 1, "a": 2}', '{"r": 1e999999}',
    '{"a": "\\ud800"}', "\ufeff{}", "[" + "0," * 200_000 + "0]", '{"a":' * 400 + "1" + "}" * 400, "-" + "1" * 4301, "true", "\x1e{}",
)  # fmt: skip
"""Files that are JSON, or nearly, and nothing that was written by us."""


def spoil(path: Path, chance: random.Random) -> None:
    """Replace a file of JSON, or a value or three of it."""
    if chance.random() < 0.25:
        path.write_bytes(chance.choice(WHOLE).encode("utf-8", "surrogatepass"))
        return
    value = json.loads(path.read_text())
    for _ in range(chance.choice([1, 1, 1, 3])):
        found = places(value)
        if not found:
            break
        depth = chance.choice(sorted({len(each) for each in found})[:4])
        where = chance.choice([each for each in found if len(each) == depth])
        value = put(value, where, chance.choice(ODD))
    path.write_text(json.dumps(value))


def adapter_record(place: Place, chance: random.Random) -> Attack:
    adapter = place.adapter(kind="run/adapter")
    spoil(adapter / "lora_record.json", chance)
    return use_adapter(place, chance, adapter)


def adapter_config(place: Place, chance: random.Random) -> Attack:
    adapter = place.adapter(kind=chance.choice(["adapter", "dora", "run/adapter"]))
    spoil(adapter / "adapter_config.json", chance)
    return use_adapter(place, chance, adapter)


def merged_record(place: Place, chance: random.Random) -> Attack:
    merged = place.copy("merged")
    spoil(merged / "lora_record.json", chance)
    words = chance.choice([["export-gguf"], ["verify", "merged", str(place.stage / "merged")], ["generate", "merged", "--prompt", "x", *SHORT],
                           ["verify", "merged", str(place.stage / "run" / "adapter")], ["check", "recipe.yaml"]])  # fmt: skip
    place.recipe(base=merged)
    return Attack(words)


def base_config(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    spoil(base / "config.json", chance)
    return use_base(place, chance, base)


def base_settings(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    spoil(base / chance.choice(["tokenizer_config.json", "generation_config.json"]), chance)
    return use_base(place, chance, base)


def tokenizer(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    path = base / "tokenizer.json"
    value = json.loads(path.read_text())
    if chance.random() < 0.2:
        path.write_bytes(chance.choice(WHOLE).encode("utf-8", "surrogatepass"))
    else:
        small = {**value, "model": {**value["model"], "vocab": {}, "merges": []}}
        value = put(value, chance.choice(places(small)), chance.choice(ODD))
        path.write_text(json.dumps(value))
    return use_base(place, chance, base)


def extra_settings(place: Place, chance: random.Random) -> Attack:
    """Files that need not be there at all."""
    base = place.copy("base")
    name = chance.choice(["special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json", "vocab.json", "preprocessor_config.json",
                          "processor_config.json", "adapter_config.json", "lora_record.json", "quantize_config.json", "chat_template.json"])  # fmt: skip
    odd = chance.choice(ODD)
    value = chance.choice(
        [
            *(json.loads(each) for each in ("{}", "[]", "null")),
            {"eos_token": odd if odd is not ... else 1},
            {"weight_map": {"a": 1}, "metadata": []},
        ]
    )
    text = json.dumps(value) if chance.random() < 0.5 else chance.choice(WHOLE)
    (base / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    return use_base(place, chance, base)


def index(place: Place, chance: random.Random) -> Attack:
    base = place.copy("base")
    path = base / "model.safetensors"
    names = sorted(read_tensors(path))
    path.rename(base / "model-00001-of-00001.safetensors")
    value = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors"),
    }
    (base / "model.safetensors.index.json").write_text(json.dumps(value))
    spoil(base / "model.safetensors.index.json", chance)
    return use_base(place, chance, base)


def run_record(place: Place, chance: random.Random) -> Attack:
    run = place.run()
    for path in run.glob("checkpoint-2" if chance.random() < 0.5 else "nothing"):
        shutil.rmtree(path)
    spoil(run / "record.json", chance)
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    words = chance.choice(
        [
            ["--resume"],
            ["--resume", "--allow-changes", "training.max_steps", "--set", "training.max_steps=3"],
            [],
        ]
    )
    return Attack(["train", "recipe.yaml", *words])


def checkpoint(place: Place, chance: random.Random) -> Attack:
    """A checkpoint's files, with a manifest that says that they are right."""
    import hashlib

    run = place.run()
    shutil.rmtree(run / "checkpoint-2")
    folder = run / "checkpoint-1"
    path = chance.choice([each for each in folder.glob("*.json")])
    spoil(path, chance)
    if path.name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        content = path.read_bytes()
        manifest["files"][path.name] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    words = chance.choice(
        [
            ["train", "recipe.yaml", "--resume"],
            ["train", "recipe.yaml", "--resume"],
            ["merge", str(folder), "out"],
        ]
    )
    return Attack(words, output="out")


def run_recipe(place: Place, chance: random.Random) -> Attack:
    """The resolved recipe and the metrics of a run."""
    run = place.run()
    name = chance.choice(["recipe.yaml", "metrics.jsonl"])
    bad = chance.choice(
        [
            *WHOLE,
            "a: *b",
            "x: &x [*x]\n",
            "? {a: b}\n: c\n",
            "- " * 3000,
            "a: " + "[" * 5000,
            "\ud800",
            "!!python/object:os.system x",
        ]
    )
    path = run / name
    kept = path.read_text() if path.exists() and chance.random() < 0.5 else ""
    path.write_bytes((kept + bad).encode("utf-8", "surrogatepass"))
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    words = ["--resume", "--allow-changes", "training.max_steps", "--set", "training.max_steps=3"]
    return Attack(["train", "recipe.yaml", *words])


def probes(place: Place, chance: random.Random) -> Attack:
    """What training left to compare with: another number of rows, another type, another shape."""
    import torch

    adapter = place.adapter(kind="run/adapter")
    path = adapter / "lora_probes.safetensors"
    logits = read_tensors(path)["logits"]
    rows, width = logits.shape
    made = chance.choice([
        logits[:3], torch.cat([logits, logits[:1]]), logits.to(torch.int64), logits.to(torch.float16), logits[0], logits[:, :5], logits[None],
        torch.empty(0), torch.full_like(logits, float("nan")), torch.full_like(logits, float("inf")), logits.bool(), logits.reshape(-1),
        torch.zeros(rows, 0), torch.zeros(0, width), logits.to(torch.float64), logits.to(torch.complex64), torch.zeros(rows, width + 1),
        torch.tensor(1.0), logits.to(torch.uint8), logits.to(torch.float8_e4m3fn), torch.full_like(logits, -1e38), None,
    ])  # fmt: skip
    if made is None:
        path.write_bytes(
            chance.choice(
                [
                    b"",
                    b"x" * 100,
                    (2**63).to_bytes(8, "little"),
                    b"\x02\0\0\0\0\0\0\0{}",
                    b"\xff" * 8 + b"{",
                ]
            )
        )
    else:
        name = chance.choice(["logits", "logits", "logits", "other"])
        write_tensors(path, {name: made.contiguous()})
    words = chance.choice([["merge", str(adapter), "out"], ["merge", str(adapter), "out", "--no-stream"], ["verify", str(adapter), str(place.stage / "merged")],
                           ["convert", str(adapter), "out", "--r", "1"], ["train", "onward.yaml"], ["generate", str(adapter), "--prompt", "x", *SHORT]])  # fmt: skip
    place.recipe(adapter=adapter, name="onward.yaml")
    return Attack(words, output="out")


def adapter_weights(place: Place, chance: random.Random) -> Attack:
    """Tensors of other shapes, types and numbers than the configuration says."""
    import torch

    adapter = place.adapter(kind=chance.choice(["adapter", "dora"]))
    path = adapter / "adapter_model.safetensors"
    tensors = read_tensors(path)
    name = chance.choice(sorted(tensors))
    value = tensors[name]
    flat = value.reshape(-1)
    tensors[name] = chance.choice([
        value.to(torch.int64), value.to(torch.bool), flat, value[None], value[..., :1], torch.empty(0), torch.tensor(1.0),
        torch.full_like(value, float("nan")), torch.full_like(value, 1e38), value.t() if value.dim() == 2 else value, value.to(torch.complex64),
        value.to(torch.float8_e5m2), torch.zeros(0, 5), value.to(torch.uint8), value.to(torch.float64) * 1e300,
    ]).contiguous()  # fmt: skip
    if chance.random() < 0.2:
        tensors = {key: each for key, each in tensors.items() if key != name}
    write_tensors(path, tensors)
    return use_adapter(place, chance, adapter)


def cache_counts(place: Place, chance: random.Random) -> Attack:
    """Prepared rows that somebody else has put there."""
    shutil.copytree(place.stage / "cache", place.cache, dirs_exist_ok=True)
    [entry] = (place.cache / "lora-cli" / "rows").iterdir()
    spoil(entry / "counts.json", chance)
    place.recipe(
        "training: {save_strategy: steps, save_steps: 1}\n", data=place.stage / "rows.jsonl"
    )
    return Attack([chance.choice(["check", "train"]), "recipe.yaml"])


def rows_of_anything(place: Place, chance: random.Random) -> Attack:
    row = json.loads(json.dumps(chance.choice([
        {"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"type": "function"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {"input_ids": [1, 2], "labels": [1, 2]}, {"text": "x"},
    ])))  # fmt: skip
    path = place.work / "rows.jsonl"
    if chance.random() < 0.3:
        path.write_bytes((chance.choice(WHOLE) + "\n").encode("utf-8", "surrogatepass"))
    else:
        made = [put(row, chance.choice(places(row)), chance.choice(ODD)) for _ in range(4)]
        path.write_text("".join(json.dumps(each) + "\n" for each in [*made, row]))
    return use_rows(
        place, chance, path, f"data: {{on_bad_row: {chance.choice(['error', 'skip'])}}}\n"
    )


def recipe_values(place: Place, chance: random.Random) -> Attack:
    """A recipe is YAML of a stranger's, too."""
    value = json.loads(place.recipe().with_name("sound.yaml").read_text())
    value |= {
        "lora": {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"a": 1}},
        "method": "lora",
    }
    value["training"] |= {
        "lr_scheduler_kwargs": {"a": 1},
        "optim": "adamw_torch",
        "report_to": "none",
    }
    path = place.work / "recipe.yaml"
    for _ in range(chance.choice([1, 2])):
        value = put(value, chance.choice(places(value)), chance.choice(ODD))
        if not places(value):
            break
    text = json.dumps(value)
    if chance.random() < 0.25:
        text = chance.choice(
            [
                *WHOLE,
                "a: &a [x]\nb: *a",
                "a: " * 2000,
                "- " * 5000 + "x",
                "{" * 3000,
                "%YAML 9.9\n---\na: 1",
                "--- 1\n--- 2",
                "\t- a",
                "x: 0o7777777777777777777777777777777777",
                "x: 2026-99-99",
            ]
        )
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return use_recipe(chance, path)


def names_not_utf8(place: Place, chance: random.Random) -> Attack:
    """Names and words that are not UTF-8."""
    import os

    place.recipe()
    name = os.fsdecode(b"r\xff\xfe.yaml")
    (place.work / "recipe.yaml").rename(place.work / name)
    words = chance.choice([["check", name], ["train", name], ["plan", name], ["generate", name, "--prompt", "x"], ["merge", name, "out"],
                           ["generate", str(place.stage / "base"), "--prompt", os.fsdecode(b"a\xffb"), *SHORT],
                           ["check", "sound.yaml", "--set", os.fsdecode(b"training.run_name=\xff")], ["recipes", "copy", os.fsdecode(b"\xff")],
                           ["recipes", "copy", "own-data", os.fsdecode(b"\xff.yaml")], ["chat", str(place.stage / "base"), "--system", os.fsdecode(b"\xff"), *SHORT]])  # fmt: skip
    return Attack(words, stdin=TALK)


def typed(place: Place, chance: random.Random) -> Attack:
    """What is typed into chat, and odd numbers on the command line."""
    base = str(place.stage / "base")
    if chance.random() < 0.5:
        said = chance.choice(
            [
                b"a\xff\xfe\n",
                b"\xc3\n/quit\n",
                b"\0\n",
                b"\xed\xa0\x80\n",
                b"x" * 100_000 + b"\n",
                b"\x1b[A\n",
                b"/reset\n/reset\n",
                b"",
                b"\xf8\x88\n",
                b"\r\n\x85\n",
            ]
        )
        return Attack(["chat", base, *SHORT], stdin=said)
    number = chance.choice(
        ["1e-300", "1e308", "nan", "inf", "5e-324", "1e-45", "-0.0", "1e-39", "1e39"]
    )
    return Attack(["generate", base, "--prompt", "x", *SHORT, "--temperature", number] if chance.random() < 0.7 else
                  ["merge", str(place.stage / "adapter"), str(place.stage / "second"), "out", "--weights", f"{number},1"], output="out")  # fmt: skip


def hub_answers(place: Place, chance: random.Random) -> Attack:
    """A hub that answers with anything."""
    body = chance.choice(["<html>", nested(50_000), '{"sha": "../../../x", "siblings": [], "id": "a/b"}', '{"sha": 1}', "null", "", "[]",
                          '{"sha": "' + "a" * 40 + '", "id": "a/b", "siblings": [{"rfilename": "../../x"}]}', '{"sha": "\\u001b[2J", "id": "a/b"}', "9" * 5000])  # fmt: skip
    commit = chance.choice(["../../../x", "a" * 40, "", "\u00e9", "A" * 39, "0" * 64, "a/b"])
    etag = chance.choice(['"../../../x"', '"' + "b" * 40 + '"', "", '"/etc/x"', "W/..", '"a/b"'])
    status = chance.choice([200, 200, 302, 307, 404, 401, 403, 418, 308])
    program = HUB.format(body=body, commit=commit, etag=etag, status=status)
    words = chance.choice(
        [
            ["generate", "someone/model", "--prompt", "x", *SHORT],
            ["merge", "someone/adapter", "out"],
            ["check", "hub.yaml"],
            ["train", "hub.yaml"],
            ["verify", "someone/model", "other/model"],
        ]
    )
    place.recipe(
        "model: {name_or_path: someone/model}\n"
        if chance.random() < 0.5
        else "data: {path: someone/rows}\n",
        name="hub.yaml",
    )
    return Attack(words, program=program, output="out")


HUB = """
import http.server, threading

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = {body!r}.encode()
        self.send_response({status})
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", {commit!r})
        self.send_header("ETag", {etag!r})
        self.send_header("X-Linked-Etag", {etag!r})
        if 300 <= {status} < 400:
            self.send_header("Location", self.path)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
    do_HEAD = do_POST = do_GET
    def log_message(self, *a):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
import os, time
from pathlib import Path
import huggingface_hub.constants as constants
url = f"http://127.0.0.1:{{server.server_port}}"
constants.ENDPOINT = url
constants.HUGGINGFACE_CO_URL_TEMPLATE = url + "/{{repo_id}}/resolve/{{revision}}/{{filename}}"
constants.HF_HUB_OFFLINE = constants.HF_HUB_ETAG_TIMEOUT = 0
constants.HF_HUB_OFFLINE = False
import huggingface_hub.hf_api as hf_api
hf_api.api.endpoint = url
hub = Path(os.environ["HOME"]).parent / "cache" / "hub"
constants.HF_HUB_CACHE = constants.HUGGINGFACE_HUB_CACHE = str(hub)
for module in list(__import__("sys").modules.values()):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if getattr(module, "__name__", "").startswith(("transformers", "huggingface_hub", "peft", "datasets")) and name in vars(module):
            setattr(module, name, str(hub))
from lora_cli.cli import main
main()
"""

ATTACKS = [
    adapter_record, adapter_config, merged_record, base_config, base_settings, tokenizer, extra_settings, index, run_record,
    checkpoint, run_recipe, probes, adapter_weights, cache_counts, rows_of_anything, recipe_values, names_not_utf8, typed,
    hub_answers, adapter_record, run_record, adapter_config, probes, checkpoint,
]  # fmt: skip
