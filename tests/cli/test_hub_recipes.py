"""The shipped hub recipes as they stand, against a hub on 127.0.0.1 that serves the tiny model and
a small data set under the very names the recipes use, at several revisions.

Hermetic: loopback only; any other host is refused and listed. Alone: pytest
tests/cli/test_hub_recipes.py
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file, save_file

from tests.hub import LoopbackHub
from tests.warm import WarmCLI

ROOT = Path(__file__).parent.parent.parent
MODEL, ALPACA, GSM8K = "HuggingFaceTB/SmolLM2-135M", "tatsu-lab/alpaca", "openai/gsm8k"
SHORT = ["--set", "training.max_steps=2", "--set", "training.gradient_accumulation_steps=1"]


@pytest.fixture(scope="module")
def hub(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """The model without a chat template (a base has none), its `v2` with other weights; both data
    sets."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(tiny / "model", folder / "model")
    (folder / "model" / "chat_template.jinja").unlink()
    shutil.copytree(folder / "model", folder / "v2")
    weights = load_file(folder / "v2" / "model.safetensors")
    weights["lm_head.weight"] *= 0.5
    save_file(weights, folder / "v2" / "model.safetensors", metadata={"format": "pt"})
    for revision, count in (("alpaca", 200), ("alpaca-v2", 120)):
        rows = [
            {
                "instruction": f"Say {i}.",
                "input": "twice" if i % 3 else "",
                "output": f"{i} {i}",
                "text": "unused",
            }
            for i in range(count)
        ]
        (folder / revision / "data").mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(
            table, folder / revision / "data" / "train-00000-of-00001-a09b74b3ef9c3b56.parquet"
        )
    (folder / "gsm8k" / "main").mkdir(parents=True)
    table = pyarrow.Table.from_pylist(
        [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(50)]
    )
    pyarrow.parquet.write_table(table, folder / "gsm8k" / "main" / "train-00000-of-00001.parquet")
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n---\n"
    (folder / "gsm8k" / "README.md").write_text(card)
    with LoopbackHub() as served:
        served.add_model(MODEL, {"main": folder / "model", "v2": folder / "v2"})
        served.add_dataset(ALPACA, {"main": folder / "alpaca", "v2": folder / "alpaca-v2"})
        served.add_dataset(GSM8K, {"main": folder / "gsm8k"})
        served.add_model("org/closed", {"main": folder / "model"}, gated=True)
        yield served


@pytest.fixture(scope="module")
def environ(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hub.environ(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def lora(environ: dict[str, str]) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """The command line in the hub's environment."""
    cli = WarmCLI({"PYTHONPATH": str(ROOT), **environ})

    def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return cli.run([str(argument) for argument in arguments], cwd)

    yield run
    cli.close()


def finished(run: Path) -> dict:
    record = json.loads((run / "record.json").read_text())
    assert record["status"] == "finished"
    return record


def test_alpaca_works_as_it_stands(hub, lora, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "alpaca"  # where the recipe itself puts it
    done = lora("train", ROOT / "configs" / "alpaca.yaml", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/alpaca/adapter\n"
    assert "data: 198 of 198 rows" in done.stderr
    assert "evaluation: 2 of 2 rows" in done.stderr
    record = finished(run)
    main = record["base"]["commit"]
    assert len(main) == 40
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["revision"] == main
    assert "### Instruction:" in (run / "adapter" / "chat_template.jinja").read_text()
    assert not hub.strays
    merged = lora("merge", run / "adapter", tmp_path / "out")
    assert merged.returncode == 0, merged.stderr
    assert "14 of 14 modules merged" in merged.stderr
    # the same adapter as if made elsewhere, naming its base only: what is made of it names the
    # commit as well
    foreign = tmp_path / "foreign"
    shutil.copytree(run / "adapter", foreign)
    (foreign / "lora_record.json").unlink()
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "revision": None}))
    converted = lora("convert", foreign, tmp_path / "small", "--r", "4")
    assert converted.returncode == 0, converted.stderr
    assert (
        json.loads((tmp_path / "small" / "lora_record.json").read_text())["base"]["commit"] == main
    )
    alone = lora("export-gguf", tmp_path / "small", "--adapter-only")
    assert alone.returncode == 0, alone.stderr
    assert "base with adapter in llama.cpp: mean KL" in alone.stderr


def test_revisions_are_honoured_and_recorded(hub, lora, tmp_path: Path) -> None:
    v2 = [
        "--set",
        "model.revision=v2",
        "--set",
        "data.revision=v2",
        "--set",
        "data.eval_split=null",
    ]
    records, losses = {}, {}
    for name, options in (("main", ["--set", "data.eval_split=null"]), ("v2", v2)):
        done = lora(
            *(
                "train",
                ROOT / "configs" / "alpaca.yaml",
                *SHORT,
                *options,
                "--set",
                "data.split=train",
            ),
            *("--set", f"output_dir={tmp_path / name}"),
        )
        assert done.returncode == 0, done.stderr
        records[name] = finished(tmp_path / name)
        losses[name] = records[name]["results"]["train_loss"]
    assert records["main"]["data"]["read"] == 200
    assert records["v2"]["data"]["read"] == 120
    assert records["main"]["base"]["commit"] != records["v2"]["base"]["commit"]
    assert losses["main"] != losses["v2"]
    # the base that `v2` was trained on is what it is merged into, though main is another
    merged = lora("merge", tmp_path / "v2" / "adapter", tmp_path / "out")
    assert merged.returncode == 0, merged.stderr
    halved = load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"]
    original = load_file(ROOT / "build" / "tiny" / "model" / "model.safetensors")["lm_head.weight"]
    assert (halved == original * 0.5).all()


@pytest.mark.parametrize(
    "config",
    [
        "gsm8k",
        *(
            pytest.param(f"alpaca-{method}", marks=pytest.mark.slow)
            for method in ("qlora", "dora", "qdora")
        ),
    ],
)
def test_the_other_hub_recipes_work_too(lora, tmp_path: Path, config: str) -> None:
    done = lora("train", ROOT / "configs" / f"{config}.yaml", *SHORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert finished(tmp_path / "runs" / config)["recipe"]["model"]["name_or_path"] == MODEL


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.name_or_path=org/nothing", "Repository Not Found"),
        ("model.revision=v9", "Revision Not Found"),
        ("model.name_or_path=org/closed", "Cannot access gated repo for url"),
        ("data.path=org/nothing", "Repository Not Found"),
        ("data.revision=v9", "Revision Not Found"),
        ("data.split=foo", 'Unknown split "foo"'),
        (
            "model.name_or_path=build/nothing/here",
            "build/nothing/here does not exist or is not a model",
        ),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(
    lora, tmp_path: Path, override: str, said: str
) -> None:
    done = lora(
        "train",
        ROOT / "configs" / "alpaca.yaml",
        *SHORT,
        "--set",
        override,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    message, _, hint = done.stderr[done.stderr.index("error: ") :].partition("\n\nhint: ")
    assert said in message
    assert hint.strip()
