"""What a person can get wrong on the command line, and the one message each gets. Compared with
bad_inputs.txt.

Recipes, models, chat templates, adapters, outputs, launchers, job files, and every command's own arguments;
bad data sets are in tests/data/test_bad_data.py, more of merging and exporting in
test_bad_artefacts.py. Each case is a whole call of `lora` in this process. Hermetic: small random
models with the tiny model's tokenizer, no network. Alone: pytest tests/cli/test_bad_inputs.py.
After a change of a message: python -m tests.cli.test_bad_inputs > tests/cli/bad_inputs.txt
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig

from lora_cli import cli
from lora_cli.gguf.tools import find_managed_home
from lora_cli.models import adapter_config
from tests import snapshots
from tests.cards import NO_GPU, OLD_DRIVER, Machine, pretend_machine
from tests.cli.test_bad_artefacts import (
    TINY,
    adapter,
    base,
    changed,
    cut,
    gguf,
    gpt2,
    named,
    tensors,
    without,
)

SNAPSHOT = Path(__file__).parent / "bad_inputs.txt"
ROWS = '{"prompt": "ask", "completion": "answer"}\n' * 4
# What no test machine may add of its own
UNSET = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LLAMA_CPP_DIR", "HF_TOKEN", "PYTEST_CURRENT_TEST")

Arguments = list[object]
Given = tuple[Arguments, Mapping[str, str]]
Elsewhere = tuple[Arguments, Mapping[str, str], Machine]
Case = Callable[[Path], Arguments | Given | Elsewhere]


def recipe(d: Path, text: str = "", **sections: str) -> Path:
    """A recipe on the model in `base` and four rows; `sections` add to each section, `text` to the
    end."""
    (d / "rows.jsonl").write_text(ROWS)
    given = {
        "model": "name_or_path: base",
        "data": "path: rows.jsonl",
        "training": "max_steps: 1, max_length: 64",
    }
    parts = []
    for name in [*given, *(name for name in sections if name not in given)]:
        parts.append(
            f"{name}: {{{', '.join(filter(None, [given.get(name), sections.get(name)]))}}}\n"
        )
    (d / "r.yaml").write_text("".join(parts) + "output_dir: run\n" + text)
    return d / "r.yaml"


def raw(content: str | bytes) -> Case:
    """A recipe of these bytes."""

    def make(d: Path) -> Arguments:
        (d / "r.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["train", "r.yaml"]

    return make


def with_(text: str = "", **sections: str) -> Case:
    """`lora train` with something added to a sound recipe on a sound model."""

    def make(d: Path) -> Arguments:
        base(d)
        recipe(d, text, **sections)
        return ["train", "r.yaml"]

    return make


def on(change: Callable[[Path], object], *options: str) -> Case:
    """`lora train` on a base that `change` has spoilt; it is given the base's folder."""

    def make(d: Path) -> Arguments:
        change(base(d))
        recipe(d)
        return ["train", "r.yaml", *options]

    return make


def launching(*options: str) -> Case:
    """`lora launch` of a sound recipe."""
    return lambda d: [with_()(d), ["launch", "r.yaml", *options]][1]


HF = ("--hf-jobs", "--image", "lora:1")


def already(folder: Path, method: str, **settings: object) -> Path:
    """The base, with a config.json that says that it is quantised already; its weights, which no
    command may reach, are gone."""
    stored = {"quant_method": method, **settings}
    without(folder, "model.safetensors")
    return changed(folder / "config.json", quantization_config=stored).parent


def in_4bit(folder: Path) -> Path:
    return already(
        folder, "bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
    )  # fmt: skip


def asked(*words: object) -> Case:
    """A command that meets a base that is quantised already, by GPTQ."""

    def make(d: Path) -> Arguments:
        adapter(base(d))
        base(d, "plain")
        already(d / "base", "gptq", bits=4, group_size=128)
        recipe(d)
        return list(words)

    return make


def merging(change: Callable[[Path], object], *options: str) -> Case:
    """`lora merge` of an adapter that `change` has spoilt; it is given the adapter's folder."""

    def make(d: Path) -> Arguments:
        adapter(base(d))
        change(d / "adapter")
        return ["merge", "adapter", "out", *options]

    return make


def claiming(**values: object) -> Case:
    """`lora merge` of an adapter whose configuration says this."""
    return merging(lambda folder: changed(folder / "adapter_config.json", **values))


def templated(template: str) -> Case:
    """`lora train` with this chat template."""
    return on(lambda folder: (folder / "chat_template.jinja").write_text(template))


def into(make_output: Callable[[Path], object], output: str = "run") -> Case:
    """`lora train` into an output folder that `make_output` has made something of."""

    def make(d: Path) -> Arguments:
        base(d)
        recipe(d)
        make_output(d / "run")
        return ["train", "r.yaml", "--set", f"output_dir={output}"]

    return make


def launched(*options: str, **environment: str) -> Case:
    """`lora train` with these options, as a launcher with these variables starts it."""
    return lambda d: (["train", str(recipe(d).name), *options], environment)


def beside(machine: Machine, text: str = "", **environment: str) -> Case:
    """`lora train` on a machine where torch finds this."""
    return lambda d: ([base(d), with_(text)(d)][1], environment, machine)


def typed(*arguments: object, make: Callable[[Path], object] | None = None) -> Case:
    """Only these arguments."""

    def run(d: Path) -> Arguments:
        if make:
            make(d)
        return list(arguments)

    return run


def fifo(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pickled(folder: Path) -> None:
    """The weights as torch's own pickle instead."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    without(folder, "model.safetensors")


def sharded(folder: Path, index: object) -> None:
    """Weights said to be in several files."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        index if isinstance(index, str) else json.dumps(index)
    )


def edited(folder: Path, change: Callable[[dict], dict]) -> None:
    tensors(folder, change, "model.safetensors")


RECORD = {
    "started": "2026-01-01T00:00:00+00:00",
    "recipe": {},
    "base": {"name": "base", "commit": None},
}


def run_of(folder: Path, **values: object) -> None:
    """A run's folder with a record."""
    written(folder / "record.json", json.dumps({**RECORD, "status": "running", **values}))


def recorded(folder: Path, **record: object) -> None:
    """A record of ours in an adapter's folder."""
    written(folder / "lora_record.json", json.dumps({**RECORD, "status": "finished", **record}))


def renamed(folder: Path, name: str = "adapter_model.bin") -> None:
    (folder / "adapter_model.safetensors").rename(folder / name)


def link(path: Path, to: str) -> None:
    path.symlink_to(to)


def trained_tokens(folder: Path) -> None:
    """A tokenizer with more tokens than the model has embeddings, of which the rows have one."""
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["added_tokens"].append(
        {"id": 600, "content": "ask", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": False}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(settings))


LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
DEEP = "a: " + "[" * 3000
MODELLESS = "data: {path: rows.jsonl}\n"
START = "model: {name_or_path: base}\ndata: {path: rows.jsonl}\n"

BAD: dict[str, Case] = {
    # The recipe's file
    "recipe: no such file": typed("train", "r.yaml"),
    "recipe: no such name": typed("train", "alpca"),
    "recipe: no such name, nor one like it": typed("check", "recipe"),
    "recipe: a shipped one's file": typed("plan", "configs/alpaca.yaml"),
    "recipe: a folder": typed("train", "configs", make=lambda d: (d / "configs").mkdir()),
    "recipe: a pipe": typed("train", "r.yaml", make=lambda d: fifo(d / "r.yaml")),
    "recipe: a device": typed("train", "/dev/null"),
    "recipe: empty": raw(""),
    "recipe: comments only": raw("# later\n"),
    "recipe: a text": raw("train my model, please\n"),
    "recipe: a list": raw("- model\n- data\n"),
    "recipe: binary": raw(bytes(range(256))),
    "recipe: UTF-16": raw(START.encode("utf-16")),
    "recipe: Latin-1": raw("model: {name_or_path: é}\n".encode("latin-1")),
    "recipe: huge": raw(START + "# more\n" * 50_000),
    "recipe: nested without end": raw(DEEP),
    "recipe: two documents": raw(START + "---\n" + START),
    "recipe: indented with tabs": raw("model:\n\tname_or_path: base\n"),
    "recipe: wrongly indented": raw("model:\n  name_or_path: base\n dtype: auto\n"),
    "recipe: an open bracket": raw("model: {name_or_path: base\ndata: {path: x}\n"),
    "recipe: an open quote": raw('model: {name_or_path: "base}\n'),
    "recipe: an alias": raw("model: &base {name_or_path: base}\ndata: *base\n"),
    "recipe: merged by alias": raw("x: &x {r: 4}\nlora: {<<: *x}\n"),
    "recipe: a tag": raw("model: !!python/object/apply:os.system [ls]\n"),
    "recipe: a key twice": raw(START + "model: {name_or_path: other}\n"),
    "recipe: a list as key": raw("? [model]\n: base\n"),
    "recipe: a control character": raw("model: {name_or_path: ba\x07se}\n"),
    "recipe: a null character": raw('model: {name_or_path: "ba\\0se"}\ndata: {path: rows.jsonl}\n'),
    "recipe: a list with --set": lambda d: [*raw("- model\n")(d), "--set", "method=lora"],
    "recipe: JSON with comments": raw('{"model": {"name_or_path": "base"}, // the base\n "data": '
                                      '{}}'),
    "recipe: extends nothing": raw("extends: gone.yaml\n"),
    "recipe: extends no name": raw("extends: alpca\n" + START),
    "recipe: extends itself": raw("extends: r.yaml\n"),
    "recipe: extends a folder": lambda d: [(d / "more").mkdir(), raw("extends: more\n")(d)][1],
    "recipe: extends a pipe": lambda d: [fifo(d / "more.yaml"), raw("extends: more.yaml\n")(d)][1],
    "recipe: extends several": raw("extends: [a.yaml, b.yaml]\n"),
    # What it says
    "recipe: no model": raw(MODELLESS),
    "recipe: a section misspelt": raw(START + "trainig: {max_steps: 3}\n"),
    "recipe: a key misspelt": raw(START + "training: {learning_rat: 1e-4}\n"),
    "recipe: a key of another section": raw(START + "training: {lora_alpha: 16}\n"),
    "recipe: another tool's key": raw(START + "base_model: base\n"),
    "recipe: a section is a number": raw(START + "lora: 8\n"),
    "recipe: text for a number": raw(START + "lora: {r: eight}\n"),
    "recipe: not a number": raw(START + "training: {learning_rate: .nan}\n"),
    "recipe: infinite": raw(START + "training: {num_train_epochs: .inf}\n"),
    "recipe: below zero": raw(START + "lora: {r: -1}\n"),
    "recipe: a number of thousands of digits": raw(START + f"lora: {{r: {'9' * 5000}}}\n"),
    "recipe: no such method": raw(START + "method: loro\n"),
    "recipe: six mistakes": raw(
        START + "method: x\nlora: {r: 0, lora_dropout: 7, biass: none}\ntraining: {seed: -1, fo: "
                "1}\n"),
    "recipe: an empty name": raw("model: {name_or_path: ''}\ndata: {path: rows.jsonl}\n"),
    "recipe: a secret key": raw(START + "training: {hub_token: hf_0123456789abcdefghij}\n"),
    "recipe: code allowed by itself": raw(START + "training: {trust_remote_code: true}\n"),
    "recipe: model_init_kwargs": raw(START + "training: {model_init_kwargs: {trust_remote_code: "
                                             "true}}\n"),
    "recipe: kernels of a repository": with_(model="attn_implementation: someone/fast-kernel"),
    "recipe: no such attention": with_(model="attn_implementation: flush_attention_2"),
    "recipe: no such optimizer": with_(training="optim: adamm"),
    "recipe: no such schedule": with_(training="lr_scheduler_type: cosin"),
    "recipe: no such reporter": with_(training="report_to: tensorbord"),
    "recipe: float16 without a GPU": with_(training="fp16: true"),
    "recipe: float16 of a 4-bit base without a GPU": with_("method: qlora\n", model="dtype: float16"),
    "recipe: two kinds of autocast": with_(training="bf16: true, fp16: true"),
    "recipe: one module that there is not": with_(lora="target_modules: q_prj"),
    "recipe: no such module": with_(lora="target_modules: [q_prj]"),
    "recipe: no expression": with_(lora="target_modules: 'q_proj('"),
    "recipe: an expression without end": with_(lora="target_modules: '(.*)*(.*)*(.*)*(.*)*x'"),
    "recipe: no such layer": with_(lora="target_modules: [q_proj], layers_to_transform: [7]"),
    "recipe: no such chat template": with_(model="chat_template: chatlm"),
    "recipe: a folder as chat template": with_(model="chat_template: base"),
    "recipe: no such pad token": with_(training="pad_token: <pat>"),
    "recipe: a token that is there": with_(model="add_tokens: ['<|end|>']"),
    "recipe: a system prompt without place": lambda d: [
        with_(model="system_prompt: be brief")(d),
        written(d / "base/chat_template.jinja", "{% for m in messages[-1:] %}{{ m['content'] "
                                                "}}</s>{% endfor %}"),
    ][0],
    "recipe: no such argument of the schedule": with_(training="lr_scheduler_kwargs: {cycles: 2}"),
    "recipe: arguments of the schedule that are none": with_(training="lr_scheduler_kwargs: cosine"),
    "recipe: no such log level": with_(training="log_level: loud"),
    "recipe: noise below zero": with_(training="neftune_noise_alpha: -1"),
    "recipe: an evaluation at the start without data": with_(training="eval_on_start: true"),
    "recipe: workers that stay without workers": with_(training="dataloader_persistent_workers: "
                                                                "true"),
    "recipe: workers' beginnings without workers": with_(training="dataloader_multiprocessing_context: spawn"),
    "recipe: options of checkpointing that are none": with_(training="gradient_checkpointing_kwargs: reentrant"),
    "recipe: activations to the host without a GPU": with_(training="activation_offloading: true"),
    "recipe: Liger's kernels that are not installed": with_(training="use_liger_kernel: true"),
    "recipe: no such compiler": with_(training="torch_compile: true, torch_compile_backend: inducto"),
    "recipe: no such way of compiling": with_(training="torch_compile_mode: max"),
    "recipe: evaluation without data": with_(training="eval_strategy: steps"),
    "recipe: the best model without evaluation": with_(training="keep: best"),
    "recipe: the best by a metric that there is not": with_(
        data="eval_path: rows.jsonl", training="metric_for_best_model: acuracy"),
    "recipe: the best is the worst": with_(
        data="eval_path: rows.jsonl", training="metric_for_best_model: loss, greater_is_better: true"),
    "recipe: a schedule without its arguments": with_(training="lr_scheduler_type: warmup_stable_decay"),
    "recipe: an optimizer that is not installed": with_(training="optim: schedule_free_adamw"),
    "recipe: arguments that the optimizer does not take": with_(training="optim: adamw_torch, optim_args: 'momentum=1'"),
    "recipe: an attention that is not installed": with_(model="attn_implementation: flash_attention_2"),
    "recipe: DeepSpeed": with_(training="deepspeed: zero2.json"),
    "recipe: compiled in parts by FSDP": with_("distributed: {strategy: fsdp}\n", training="torch_compile: true"),
    "recipe: compiled in parts by DeepSpeed": with_(
        "distributed: {strategy: deepspeed-zero3}\n", training="torch_compile: true"),
    "recipe: a whole module in parts": with_("distributed: {strategy: fsdp}\n", lora="modules_to_save: [lm_head]"),
    "recipe: a strategy of a stage that is none": with_("distributed: {strategy: deepspeed-zero1}\n"),
    "recipe: an upload's name without an upload": with_(training="hub_model_id: me/mine"),
    "recipe: --set without a value": typed("train", "r.yaml", "--set", "lora.r", make=recipe),
    "recipe: --set of nothing": typed("train", "r.yaml", "--set", "=1", make=recipe),
    "recipe: --set in a list": typed("train", "r.yaml", "--set", "data.path.0=x", make=recipe),
    "recipe: --set of text that YAML reads otherwise": typed(
        "train", "r.yaml", "--set", "data.source_prefix=summarize: ", make=recipe),
    "recipe: --set with an alias": typed("train", "r.yaml", "--set", "lora.r=*x", make=recipe),
    "recipe: --set with an open bracket": typed("train", "r.yaml", "--set", "data.path=[a", make=recipe),
    "recipe: --set misspelt": typed("train", "r.yaml", "--set", "training.learning_rat=1", make=recipe),
    "recipe: --set of a secret": typed("train", "r.yaml", "--set", "training.hub_token=canary-in-a-mine", make=recipe),
    "recipe: an environment's secret": lambda d: (
        [recipe(d, model="system_prompt: canary-in-a-mine"), ["train", "r.yaml"]][1],
        {"WANDB_API_KEY": "canary-in-a-mine"},
    ),
    # Data; more of it in tests/data/bad_data.txt
    "data: a pipe": lambda d: [with_()(d), fifo(d / "rows.jsonl"), ["train", "r.yaml"]][2],
    "data: a device": typed(
        "train", "r.yaml", "--set", "data.path=/dev/zero", make=lambda d: [base(d), recipe(d)]),
    "data: an empty folder": lambda d: [
        with_()(d), (d / "rows").mkdir(), ["train", "r.yaml", "--set", "data.path=rows"]][2],
    "data: a folder with a script": lambda d: [
        with_()(d), written(d / "rows/rows.py", "ran = 1"), ["train", "r.yaml", "--set", "data.path=rows"]][2],
    "data: a folder of pictures": lambda d: [
        with_()(d), written(d / "rows/a.png", b"\x89PNG"), ["train", "r.yaml", "--set", "data.path=rows"]][2],
    "data: a folder of damaged files": lambda d: [
        with_()(d), written(d / "rows/a.jsonl", "{"), ["train", "r.yaml", "--set", "data.path=rows"]][2],
    "data: a link in a circle": lambda d: [
        with_()(d), link(d / "loop.jsonl", "loop.jsonl"), ["train", "r.yaml", "--set", "data.path=loop.jsonl"]][2],
    "data: a saved set, damaged": lambda d: [
        with_()(d), written(d / "rows/dataset_info.json", "{"), ["train", "r.yaml", "--set", "data.path=rows"]][2],
    "data: the split is an expression without end": typed(
        "train", "r.yaml", "--set", "data.split=train[(((", make=lambda d: [base(d), recipe(d)]),
    "data: an address of another kind": typed(
        "train", "r.yaml", "--set", "data.path=http://x.org/rows.jsonl", make=lambda d: [base(d), recipe(d)]),
    "data: addresses in a chain": typed(
        "train", "r.yaml", "--set", "data.path=simplecache::s3://b/rows.jsonl", make=lambda d: [base(d), recipe(d)]),
    "data: an address that is signed": typed(
        "train", "r.yaml", "--set", f"data.path=https://x.org/rows.jsonl?X-Amz-Signature={'0f' * 8}",
        make=lambda d: [base(d), recipe(d)]),
    "data: a pattern that https cannot list": typed(
        "train", "r.yaml", "--set", "data.path=https://x.org/rows-*.jsonl", make=lambda d: [base(d), recipe(d)]),
    # The base
    "model: no such folder": typed("train", "r.yaml", "--set", "model.name_or_path=./base", make=recipe),
    "model: a longer path": typed("train", "r.yaml", "--set", "model.name_or_path=models/llama/base", make=recipe),
    "model: an address": typed("train", "r.yaml", "--set", "model.name_or_path=https://hf.co/a/b", make=recipe),
    "model: a file": typed("train", "r.yaml", "--set", "model.name_or_path=rows.jsonl", make=recipe),
    "model: a GGUF": typed(
        "train", "r.yaml", "--set", "model.name_or_path=model.gguf", make=lambda d: [recipe(d), gguf(d)]
    ),
    "model: an empty folder": lambda d: [recipe(d), (d / "base").mkdir(), ["train", "r.yaml"]][2],
    "model: an adapter": lambda d: [
        adapter(base(d)), recipe(d), ["train", "r.yaml", "--set", "model.name_or_path=adapter"]
    ][2],
    "model: base and adapter at once": on(lambda f: [adapter(f), shutil.copy(
        f.parent / "adapter/adapter_config.json", f)]),
    "model: no configuration": on(lambda f: without(f, "config.json")),
    "model: configuration cut off": on(lambda f: cut(f / "config.json", 40)),
    "model: configuration is a list": on(lambda f: (f / "config.json").write_text("[]")),
    "model: configuration is a pipe": on(lambda f: fifo(f / "config.json")),
    "model: configuration is binary": on(lambda f: (f / "config.json").write_bytes(bytes(range(256)))),
    "model: no type": on(lambda f: (f / "config.json").write_text("{}")),
    "model: unknown type": on(lambda f: changed(f / "config.json", model_type="lama")),
    "model: its type is a number": on(lambda f: changed(f / "config.json", model_type=7)),
    "model: a type that writes no text": on(lambda f: BertConfig(num_hidden_layers=1).save_pretrained(f)),
    "model: a size is text": on(lambda f: changed(f / "config.json", hidden_size="large")),
    "model: a size is below zero": on(lambda f: changed(f / "config.json", hidden_size=-32)),
    "model: heads do not divide": on(lambda f: changed(f / "config.json", num_attention_heads=5)),
    "model: unknown activation": on(lambda f: changed(f / "config.json", hidden_act="swishy")),
    "model: code of its own": on(lambda f: changed(
        f / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Mine"})),
    "model: code of its own, allowed, missing": on(lambda f: changed(
        f / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Mine"}), "--trust-remote-code"),
    "model: code of another repository": on(lambda f: changed(
        f / "config.json", model_type="mine", auto_map={"AutoConfig": "other/repo--code.Mine"}), "--trust-remote-code"),
    "model: kernels of a repository": on(lambda f: changed(f / "config.json", attn_implementation="someone/kernel")),
    "model: no weights": on(lambda f: without(f, "model.safetensors")),
    "model: pickled weights": on(pickled),
    "model: weights cut off": on(lambda f: cut(f / "model.safetensors", 5000)),
    "model: empty weights": on(lambda f: cut(f / "model.safetensors", 0)),
    "model: weights are text": on(lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com")),
    "model: weights with a huge header": on(lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64)),
    "model: weights with a header of numbers": on(lambda f: (f / "model.safetensors").write_bytes(
        (2).to_bytes(8, "little") + b"17")),
    "model: weights with a broken header": on(lambda f: (f / "model.safetensors").write_bytes(
        (9).to_bytes(8, "little") + b'{"a": {}}')),
    "model: a shard is missing": on(lambda f: sharded(f, {"metadata": {}, "weight_map": {
        "model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}})),
    "model: a shard elsewhere": on(lambda f: sharded(f, {
        "metadata": {}, "weight_map": {"model.norm.weight": "../../secret"}})),
    "model: the index is no JSON": on(lambda f: sharded(f, "{")),
    "model: the index is a list": on(lambda f: sharded(f, [])),
    "model: the index maps nothing": on(lambda f: sharded(f, {"metadata": {}})),
    "model: a tensor is missing": on(lambda f: edited(f, lambda t: {k: v for k, v in t.items() if "norm" not in k})),
    "model: a tensor too many": on(lambda f: edited(f, lambda t: t | {"model.more.weight": torch.zeros(4)})),
    "model: a tensor of another size": on(lambda f: edited(
        f, lambda t: t | {"model.norm.weight": torch.zeros(7)})),
    "model: another model's shard": on(lambda f: shutil.copy(gpt2(f.parent) / "model.safetensors", f)),
    "model: no tokenizer": on(lambda f: without(f, "tokenizer.json", "tokenizer_config.json", "tokenizer.model")),
    "model: the tokenizer is cut off": on(lambda f: cut(f / "tokenizer.json", 300)),
    "model: the tokenizer is a list": on(lambda f: (f / "tokenizer.json").write_text("[]")),
    "model: the tokenizer's configuration is cut off": on(lambda f: cut(f / "tokenizer_config.json", 30)),
    "model: the tokenizer is larger": on(trained_tokens),
    "model: fewer embeddings than tokens": lambda d: [base(d, vocab_size=60), recipe(d), ["train", "r.yaml"]][2],
    # A base that is quantised already
    "quantised: 4 bits, and lora": on(in_4bit),
    "quantised: 4 bits, and dora": on(in_4bit, "--set", "method=dora"),
    "quantised: 4 bits of another code": on(
        in_4bit, "--set", "method=qlora", "--set", "quantization.bnb_4bit_quant_type=fp4"),
    "quantised: 4 bits, and loftq": on(
        in_4bit, "--set", "method=qlora", "--set", "lora.init_lora_weights=loftq"),
    "quantised: 8 bits": on(lambda f: already(f, "bitsandbytes", load_in_8bit=True)),
    "quantised: FP8, and qlora": on(lambda f: already(f, "fp8", weight_block_size=[128, 128]), "--set", "method=qlora"),
    "quantised: by a method unknown": on(lambda f: already(f, "exl3", bits=3)),
    "quantised: by MLX": on(lambda f: changed(f / "config.json", quantization={"group_size": 64, "bits": 4})),
    "quantised: settings that are none": on(
        lambda f: already(f, "bitsandbytes", load_in_4bit=True, bnb_4bit_compute_dtype=7), "--set", "method=qlora"),
    "quantised: train": asked("train", "r.yaml"),
    "quantised: check": asked("check", "r.yaml"),
    "quantised: plan": asked("plan", "r.yaml"),
    "quantised: merge": asked("merge", "adapter", "out"),
    "quantised: merge of two": asked("merge", "adapter", "adapter", "out"),
    "quantised: convert": asked("convert", "adapter", "out"),
    "quantised: extract": asked("extract", "base", "plain", "out"),
    "quantised: verify": asked("verify", "base", "plain"),
    "quantised: verify an adapter": asked("verify", "adapter", "plain"),
    "quantised: generate": lambda d: [
        already(base(d), "exl3", bits=3), ["generate", "base", "-p", "x"]][1],
    "quantised: generate with an adapter": lambda d: [
        adapter(base(d)), already(d / "base", "exl3", bits=3), ["generate", "adapter", "-p", "x"]][2],
    "quantised: chat": lambda d: [already(base(d), "exl3", bits=3), ["chat", "base"]][1],
    "quantised: export-gguf": asked("export-gguf", "base"),
    "quantised: export-gguf of an adapter": asked("export-gguf", "adapter"),
    "quantised: export-gguf of the adapter alone": asked("export-gguf", "adapter", "--adapter-only"),
    "quantised: export-gguf of 4 bits": lambda d: [in_4bit(base(d)), ["export-gguf", "base"]][1],
    "quantised: no original weights": lambda d: [
        adapter(base(d)), in_4bit(d / "base"), ["merge", "adapter", "out", "--base-weights", "original"]][2],
    # The chat template
    "template: it does not parse": templated("{% for m in messages %}"),
    "template: an unknown tag": templated("{% while true %}{% endwhile %}"),
    "template: an unknown filter": templated("{{ messages | shout }}"),
    "template: something undefined": templated("{{ nothing.at.all }}"),
    "template: it refuses": templated("{{ raise_exception('not for you') }}"),
    "template: it reaches for Python": templated("{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template: it writes nothing": templated(""),
    "template: it divides by zero": templated("{{ 1 // 0 }}"),
    "template: it never ends": templated(LOOPS),
    "template: it writes without end": templated(
        "{% set a = 'x' * 99999 %}{% for i in range(99999) %}{{ a }}{% endfor %}"),
    "template: a product of a billion": templated("{{ 'x' * 10 ** 10 }}"),
    "template: a power of powers": templated("{{ 9 ** (9 ** (9 ** 9)) }}"),
    "template: it calls itself": templated("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
    "template: binary": on(lambda f: (f / "chat_template.jinja").write_bytes(bytes(range(128, 256)))),
    # Adapters
    "adapter: its configuration is a pipe": merging(lambda f: fifo(f / "adapter_config.json")),
    "adapter: its configuration is huge": merging(lambda f: (f / "adapter_config.json").write_bytes(b" " * 2**25)),
    "adapter: its configuration is nested without end": merging(
        lambda f: (f / "adapter_config.json").write_text("[" * 100_000)),
    "adapter: its configuration has a number of thousands of digits": merging(
        lambda f: (f / "adapter_config.json").write_text('{"r": ' + "9" * 5000 + "}")),
    "adapter: its configuration is binary": merging(lambda f: (f / "adapter_config.json").write_bytes(b"\xff\x00")),
    "adapter: rank is text": claiming(r="16"),
    "adapter: rank is zero": claiming(r=0),
    "adapter: rank is a billion": claiming(r=10**9),
    "adapter: a billion by pattern": claiming(rank_pattern={"q_proj": 10**9}),
    "adapter: alpha is null": claiming(lora_alpha=None),
    "adapter: alpha is infinite": merging(lambda f: (f / "adapter_config.json").write_text(
        (f / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 1e999'))),
    "adapter: targets are a number": claiming(target_modules=7),
    "adapter: targets are numbers": claiming(target_modules=[7]),
    "adapter: targets are nothing": claiming(target_modules=[]),
    "adapter: no expression": claiming(target_modules="q_proj("),
    "adapter: an expression without end": claiming(target_modules="(.*)*(.*)*(.*)*(.*)*x"),
    "adapter: no such bias": claiming(bias="nonsense"),
    "adapter: dropout of seven": claiming(lora_dropout=7),
    "adapter: rows below zero": claiming(trainable_token_indices=[-3]),
    "adapter: another kind of PEFT": claiming(peft_type="ADALORA"),
    "adapter: an unknown kind of PEFT": claiming(peft_type="MYLORA"),
    "adapter: a task of another kind": claiming(task_type="SEQ_CLS"),
    "adapter: code to import": claiming(megatron_config={"a": 1}, megatron_core="os.path"),
    "adapter: replicated layers": claiming(layer_replication=[[0, 2], [0, 2]]),
    "adapter: an aLoRA": claiming(alora_invocation_tokens=[5, 6]),
    "adapter: unknown start": claiming(init_lora_weights="magic"),
    "adapter: pickled as .bin": merging(lambda f: renamed(f)),
    "adapter: pickled as .pt": merging(lambda f: renamed(f, "adapter.pt")),
    "adapter: pickled as .pkl": merging(lambda f: renamed(f, "weights.pkl")),
    "adapter: a pickle in safetensors' name": merging(lambda f: torch.save(
        {"a": torch.zeros(1)}, f / "adapter_model.safetensors")),
    "adapter: weights are a folder": merging(lambda f: [
        without(f, "adapter_model.safetensors"), (f / "adapter_model.safetensors").mkdir()]),
    "adapter: weights are a dangling link": merging(lambda f: [
        without(f, "adapter_model.safetensors"), link(f / "adapter_model.safetensors", "gone")]),
    "adapter: weights are whole numbers": merging(lambda f: tensors(f, lambda t: {k: v.int() for k, v in t.items()})),
    "adapter: its record is cut off": merging(lambda f: written(f / "lora_record.json", '{"base": ')),
    "adapter: its record is a list": merging(lambda f: written(f / "lora_record.json", "[]")),
    "adapter: its record's base is a text": merging(lambda f: recorded(f, base="base")),
    "adapter: its record names another base": merging(lambda f: recorded(named(f, "base"), base={
        "name": "meta/other", "commit": None})),
    "adapter: its tokenizer is damaged": merging(lambda f: [
        shutil.copy(f.parent / "base" / name, f) for name in ("tokenizer.json", "tokenizer_config.json")]
        + [cut(f / "tokenizer.json", 99)]),
    "adapter: the base wants code": lambda d: [
        changed(base(d, "other") / "config.json", model_type="mine", auto_map={"AutoConfig": "code.Mine"}),
        adapter(base(d)), ["merge", "adapter", "out", "--base", "other"]][2],
    "adapter: the base is pickled": lambda d: [
        pickled(base(d, "other")), adapter(base(d)), ["merge", "adapter", "out", "--base", "other"]][2],
    "adapter: the base is nowhere": claiming(base_model_name_or_path="/home/somebody/model"),
    # Output
    "output: a file": into(lambda run: run.write_text("x")),
    "output: below a file": into(lambda run: run.write_text("x"), "run/deeper"),
    "output: another's folder": into(lambda run: written(run / "mine", "x")),
    "output: a link to another's folder": into(lambda run: [written(run.parent / "o/mine", "x"), link(run, "o")]),
    "output: a link to a run": into(lambda run: [run_of(run.parent / "o"), link(run, "o")]),
    "output: a dangling link": into(lambda run: link(run, "gone")),
    "output: where nothing can be made": into(lambda run: None, "/proc/lora"),
    "output: the current folder": into(lambda run: None, "."),
    "output: the base's folder": into(lambda run: None, "base"),
    "output: the data": into(lambda run: None, "rows.jsonl"),
    "output: too long a name": into(lambda run: None, "x" * 300),
    "output: a run that goes on": into(run_of),
    "output: a finished run": into(lambda run: run_of(run, status="finished")),
    "output: a damaged record": into(lambda run: written(run / "record.json", "{")),
    "output: a record that is a list": into(lambda run: written(run / "record.json", "[]")),
    "output: --resume of nothing": lambda d: [with_()(d), ["train", "r.yaml", "--resume"]][1],
    "output: --resume of a finished run": lambda d: [
        into(lambda run: run_of(run, status="finished"))(d), ["train", "r.yaml", "--resume"]][1],
    "output: merging into the adapter": lambda d: [adapter(base(d)), ["merge", "adapter", "adapter"]][1],
    "output: merging into the base": lambda d: [adapter(base(d)), ["merge", "adapter", "base"]][1],
    "output: merging through a link": lambda d: [
        adapter(base(d)), link(d / "out", "o"), ["merge", "adapter", "out"]][2],
    "output: merging where nothing can be made": lambda d: [adapter(base(d)), ["merge", "adapter", "/proc/lora"]][1],
    "output: merging below a file": lambda d: [
        adapter(base(d)), written(d / "file", "x"), ["merge", "adapter", "file/out"]][2],
    "output: exporting into a file": lambda d: [
        base(d), written(d / "file", "x"), ["export-gguf", "base", "-q", "f16", "-o", "file"]][2],
    "output: exporting where nothing can be made": lambda d: [
        base(d), ["export-gguf", "base", "-q", "f16", "-o", "/proc/lora"]][1],
    # Launchers
    "launcher: no processes": launched("--nproc", "0"),
    "launcher: many processes": launched("--nproc", "all"),
    "launcher: more processes than a step has rows": lambda d: [
        base(d), recipe(d, training="per_device_train_batch_size: 2, gradient_accumulation_steps: 1"),
        ["train", "r.yaml", "--nproc", "3"]][2],
    "launcher: machines that cannot meet": launched("--nnodes", "2"),
    "launcher: machines that meet at no port": launched("--nnodes", "2", "--rdzv-endpoint", "node1"),
    "launcher: another number of machines": launched(
        "--nnodes", "3", PET_NNODES="2", PET_MASTER_ADDR="node1", PET_MASTER_PORT="29500"),
    "launcher: mpirun with two": launched(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="0"),
    "launcher: srun with four": launched(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="1"),
    "launcher: no world size": launched(RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"),
    "launcher: nobody to meet": launched(RANK="0", WORLD_SIZE="1"),
    "launcher: a rank left over": launched(LOCAL_RANK="0"),
    "launcher: a rank beyond the world": launched(
        RANK="3", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"),
    "launcher: a rank that is none": launched(RANK="first", WORLD_SIZE="1"),
    "launcher: a world of none": launched(RANK="0", WORLD_SIZE="0"),
    "launcher: a port that is none": launched(RANK="0", WORLD_SIZE="1", MASTER_ADDR="h", MASTER_PORT="99999"),
    "launcher: FSDP": launched(ACCELERATE_USE_FSDP="true"),
    "launcher: DeepSpeed": launched(ACCELERATE_USE_DEEPSPEED="1"),
    "launcher: a precision of its own": launched(ACCELERATE_MIXED_PRECISION="fp16"),
    # GPUs
    "gpu: a driver that is too old": beside(Machine(fault=OLD_DRIVER.format(version=12040))),
    "gpu: a driver that is too old for every torch": beside(Machine(fault=OLD_DRIVER.format(version=11040))),
    "gpu: one that is not there": beside(Machine(fault=NO_GPU), CUDA_VISIBLE_DEVICES="7"),
    "gpu: one that cannot be started": beside(Machine(fault="CUDA unknown error - this may be due to an incorrectly "
                                                            "set up environment.")),
    "gpu: too old for this torch": beside(Machine("cuda", names=("Tesla V100-SXM2-16GB",), capability=(7, 0))),
    "gpu: newer than this torch": beside(Machine("cuda", names=("NVIDIA X100",), capability=(13, 0))),
    "gpu: too old for 4 bits": beside(
        Machine("cuda", names=("Tesla M40",), capability=(5, 2), built=("sm_50", "sm_60")), "method: qlora\n"),
    "gpu: too old for flash attention 2": lambda d: [
        with_(model="attn_implementation: flash_attention_2")(d), ["plan", "r.yaml", "--gpu", "T4"]][1],
    "gpu: of another kind than flash attention 3": lambda d: [
        with_(model="attn_implementation: flash_attention_3")(d), ["plan", "r.yaml", "--gpu", "RTX 4090"]][1],
    "gpu: one that nobody knows": lambda d: [with_()(d), ["plan", "r.yaml", "--gpu", "RTX 4900"]][1],
    "gpu: without memory": lambda d: [with_()(d), ["plan", "r.yaml", "--gpu", "0GB"]][1],
    # The command line
    "command: none of that name": typed("trian", "r.yaml"),
    "command: no such option": typed("train", "r.yaml", "--epochs", "3"),
    "train: no recipe": typed("train"),
    "train: two recipes": typed("train", "a.yaml", "b.yaml"),
    "train: --set without anything": typed("train", "r.yaml", "--set"),
    "launch: no recipe": typed("launch", "--slurm"),
    "launch: a recipe that does not load": lambda d: [
        with_(training="learning_rat: 1e-4")(d), ["launch", "r.yaml", "--slurm"]][1],
    "launch: for nothing": launching(),
    "launch: for two schedulers": launching("--slurm", "--skypilot"),
    "launch: no machine": launching("--slurm", "--nodes", "0"),
    "launch: fewer than no GPUs": launching("--slurm", "--gpus", "-1"),
    "launch: a name that is none": launching("--slurm", "--name", "My job"),
    "launch: too long a name": launching("--slurm", "--name", "x" * 41),
    "launch: a time that is none": launching("--slurm", "--time", "soon"),
    "launch: no time": launching("--slurm", "--time", "0h"),
    "launch: a kind of GPU that is none": launching("--slurm", "--gpu", "h100 --exclusive"),
    "launch: an image for SLURM": launching("--slurm", "--image", "lora:1"),
    "launch: no image": launching("--kubernetes"),
    "launch: an image that is none": launching("--kubernetes", "--image", "my image"),
    "launch: a kind of GPU for Kubernetes": launching("--kubernetes", "--image", "lora:1", "--gpu", "H100"),
    "launch: no kind of GPU": launching("--skypilot"),
    "launch: a time for SkyPilot": launching("--skypilot", "--gpu", "H100", "--time", "3h"),
    "launch: HF Jobs on two machines": launching(*HF, "--gpu", "a100", "--nodes", "2"),
    "launch: GPUs that HF Jobs has not so many of": launching(*HF, "--gpu", "a100", "--gpus", "3"),
    "launch: a GPU that HF Jobs has not": launching(*HF, "--gpu", "h100"),
    "launch: a file that is there": lambda d: [
        with_()(d), written(d / "job.sh", ""), ["launch", "r.yaml", "--slurm", "--out", "job.sh"]][2],
    "launch: a link that leads nowhere": lambda d: [
        with_()(d), link(d / "job.sh", "gone"), ["launch", "r.yaml", "--slurm", "--out", "job.sh"]][2],
    "launch: into no folder": launching("--slurm", "--out", "gone/job.sh"),
    "check: no recipe": typed("check"),
    "check: fewer than no samples": typed("check", "r.yaml", "--samples", "-1"),
    "check: no such file": typed("check", "r.yaml"),
    "merge: no output": typed("merge", "adapter"),
    "merge: nothing": typed("merge"),
    "merge: no such weights of the base": typed("merge", "a", "b", "--base-weights", "mine"),
    "merge: too much density": typed("merge", "a", "b", "out", "--density", "2"),
    "merge: an empty base": lambda d: [adapter(base(d)), ["merge", "adapter", "out", "--base", ""]][1],
    "merge: no path": typed("merge", "", "out"),
    "combine: one": typed("combine", "a", "out"),
    "combine: no such rank": typed("combine", "a", "b", "out", "--r", "0"),
    "extract: two only": typed("extract", "a", "b"),
    "extract: no models": typed("extract", "./a", "./b", "out"),
    "convert: one only": typed("convert", "a"),
    "convert: no adapter": typed("convert", "a", "out"),
    "verify: one only": typed("verify", "a"),
    "verify: neither is there": typed("verify", "./a", "./b"),
    "verify: GGUFs that are none": lambda d: [gguf(d), ["verify", "model.gguf", "model.gguf"]][1],
    "export-gguf: nothing here": typed("export-gguf"),
    "export-gguf: the adapter's folder is missing": typed("export-gguf", "--adapter-only"),
    "export-gguf: --imatrix for an adapter": typed("export-gguf", "a", "--adapter-only", "--imatrix", "x"),
    "export-gguf: no such llama.cpp": lambda d: [
        base(d), ["export-gguf", "base", "-q", "f16", "--llama-cpp", "gone"]][1],
    "export-onnx: one only": typed("export-onnx", "a"),
    "export-onnx: no such model": typed("export-onnx", "./gone", "out"),
    "export-onnx: a model that writes": lambda d: [base(d), ["export-onnx", "base", "out"]][1],
    "export-onnx: an adapter": lambda d: [adapter(base(d)), ["export-onnx", "adapter", "out"]][1],
    "export-onnx: a folder in use": lambda d: [base(d), ["export-onnx", "base", "base"]][1],
    "generate: no model": typed("generate"),
    "generate: no prompt": lambda d: [base(d), ["generate", "base"]][1],
    "generate: no such model": typed("generate", "./gone", "-p", "x"),
    "generate: no tokens": typed("generate", "base", "-p", "x", "--max-new-tokens", "0"),
    "generate: cold": typed("generate", "base", "-p", "x", "--temperature", "-1"),
    "generate: not a temperature": lambda d: [base(d), ["generate", "base", "-p", "x", "--temperature", "nan"]][1],
    "generate: no such file": typed("generate", "base", "-f", "gone.jsonl"),
    "generate: a folder of prompts": typed("generate", "base", "-f", "."),
    "generate: prompts that are no JSON": lambda d: [
        written(d / "p.jsonl", "{'prompt': 1}\n"), ["generate", "base", "-f", "p.jsonl"]][1],
    "generate: prompts of thousands of brackets": lambda d: [
        written(d / "p.jsonl", "[" * 100_000), ["generate", "base", "-f", "p.jsonl"]][1],
    "generate: prompts of no known kind": lambda d: [
        written(d / "p.jsonl", '{"ask": 1}\n'), ["generate", "base", "-f", "p.jsonl"]][1],
    "generate: binary prompts": lambda d: [
        written(d / "p.txt", bytes(range(256))), ["generate", "base", "-f", "p.txt"]][1],
    "generate: prompts of an unknown ending": lambda d: [written(d / "p", "x"), ["generate", "base", "-f", "p"]][1],
    "generate: an empty prompt in a table": lambda d: [
        written(d / "p.csv", "prompt,completion\nWhy?,because\n,nothing\n"), ["generate", "base", "-f", "p.csv"]][1],
    "generate: no prompts in the file": lambda d: [
        written(d / "p.txt", "\n\n"), ["generate", "base", "-f", "p.txt"]][1],
    "generate: a GGUF that is none": lambda d: [gguf(d), ["generate", "model.gguf", "-p", "x"]][1],
    "chat: no model": typed("chat"),
    "chat: no such model": typed("chat", "./gone"),
    "doctor: an argument": typed("doctor", "please"),
    "schema: an argument": typed("schema", "please"),
    "recipes: no such command": typed("recipes", "cpoy"),
    "recipes: no name": typed("recipes", "copy"),
    "recipes: no such recipe": typed("recipes", "copy", "alpaca-lora"),
    "recipes: a file that is there": typed("recipes", "copy", "gsm8k", make=lambda d: (d / "gsm8k.yaml").touch()),
    "recipes: into no folder": typed("recipes", "copy", "gsm8k", "gone/r.yaml"),
    "recipes: into a folder": typed("recipes", "copy", "gsm8k", "here", make=lambda d: (d / "here").mkdir()),
    "setup-llama-cpp: an argument": typed("setup-llama-cpp", "please"),
    "import: no file": typed("import"),
    "import: no such file": typed("import", "gone.yml"),
    "import: a file of no tool": lambda d: [written(d / "x.yml", "a: 1\n"), ["import", "x.yml"]][1],
    "import: no such tool": lambda d: [written(d / "x.yml", "a: 1\n"), ["import", "x.yml", "--from", "axolot"]][1],
    "import: a file without a model": lambda d: [
        written(d / "x.yml", "training: {batch_size: 2}\n"), ["import", "x.yml"]][1],
    "import: accelerate's": lambda d: [
        written(d / "x.yml", "distributed_type: FSDP\n"), ["import", "x.yml"]][1],
    "import: a recipe": lambda d: [
        written(d / "x.yml", "model: {name_or_path: a}\n"), ["import", "x.yml"]][1],
    "import: for preferences": lambda d: [
        written(d / "x.yml", "base_model: a\nrl: grpo\n"), ["import", "x.yml"]][1],
    "import: into a file that is there": lambda d: [
        written(d / "x.yaml", "base_model: a\nadapter: lora\nmicro_batch_size: 1\n"), written(d / "x-lora.yaml", "mine"),
        ["import", "x.yaml"]][2],
    "import: into no folder": lambda d: [
        written(d / "x.yml", "base_model: a\nmicro_batch_size: 1\n"), ["import", "x.yml", "--out", "gone/r.yaml"]][1],
}  # fmt: skip


def said(name: str, folder: Path, cases: Mapping[str, Case] = BAD) -> str:
    """The call, its exit status, and what its user gets to see of the failure."""
    given, here = cases[name](folder), Path.cwd()
    arguments, environment, *machine = given if isinstance(given, tuple) else (given, {})
    words = ["lora", *map(str, arguments)]
    screen, code = io.StringIO(), None
    home = {"HOME": str(folder), "HF_HUB_OFFLINE": "1", **environment}
    os.chdir(folder)
    try:
        with (
            mock.patch.dict(os.environ, home),
            mock.patch.object(sys, "argv", words),
            pytest.MonkeyPatch.context() as patch,
        ):
            for each in machine:
                pretend_machine(patch, each)
            for variable in UNSET:
                if variable not in environment:
                    os.environ.pop(variable, None)
            with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(screen):
                adapter_config.announce_base.cache_clear()
                cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        os.chdir(here)
    text = screen.getvalue()
    text = text[max(0, text.rfind("\nerror: ") + 1) :] if "Traceback" not in text else text
    shown = [word if len(word) < 80 else f"{word[:40]}…" for word in words]
    assigned = "".join(
        f"{name}={value} " for name, value in environment.items() if not Path(value).is_absolute()
    )
    text = f"$ {assigned}{shlex.join(shown)}\n{text.rstrip()}\n(exit {code})".replace("\n\n", "\n")
    return text.replace(f"{folder}/", "").replace(str(folder), ".").replace(str(TINY), "TINY")


def test_the_snapshot_covers_every_case() -> None:
    assert len(BAD) >= 288
    assert snapshots.list_names(SNAPSHOT) == list(BAD)


@pytest.mark.parametrize("name", BAD)
def test_what_is_said_of_bad_input_and_that_nothing_is_silent(
    name: str, tiny: Path, tmp_path: Path
) -> None:
    assert tiny / "model" == TINY
    found = said(name, tmp_path)
    assert found == snapshots.find(SNAPSHOT, name)
    lines = found.splitlines()
    assert lines[1].startswith("error: ")
    assert lines[-1] in ("(exit 1)", "(exit 2)")
    assert lines[-2].startswith("hint: ")
    assert len(lines) - 2 <= 6
    assert "Traceback" not in found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as fresh:
        (Path(fresh) / "lora-cli").mkdir()
        (Path(fresh) / "lora-cli" / find_managed_home().name).symlink_to(find_managed_home())
        os.environ["LORA_CACHE_DIR"] = fresh
        sys.stdout.write(snapshots.render(BAD, said))
