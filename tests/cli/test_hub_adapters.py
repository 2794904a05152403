"""An adapter on the hub is used by its name wherever a folder is: merged, compared, asked, exported.

Hermetic: a loopback hub serves a small random model and an adapter that PEFT saved; offline, the
cache does. Alone: pytest tests/cli/test_hub_adapters.py
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_bad_artefacts import TOKENIZER, adapter, base, named
from tests.hub import LoopbackHub
from tests.warm import WarmCLI

MODEL, ADAPTER = "org/base", "org/tuned"


@pytest.fixture(scope="module")
def hub(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    folder = tmp_path_factory.mktemp("served")
    made = named(adapter(base(folder)), MODEL)
    for file in TOKENIZER:
        shutil.copy(folder / "base" / file, made)
    (made / "optimizer.pt").write_bytes(b"a pickle")
    (made / "checkpoint-1").mkdir()
    shutil.copy(made / "adapter_model.safetensors", made / "checkpoint-1")
    pickled = folder / "pickled"
    pickled.mkdir()
    shutil.copy(made / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"a pickle")
    with LoopbackHub() as served:
        served.add_model(MODEL, {"main": folder / "base"})
        served.add_model(ADAPTER, {"main": made})
        served.add_model("org/closed", {"main": made}, gated=True)
        served.add_model("org/pickled", {"main": pickled})
        yield served


@pytest.fixture(scope="module")
def hub_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="module")
def online(hub: LoopbackHub, hub_cache: Path) -> Iterator[WarmCLI]:
    """The command line of processes that ask the loopback hub."""
    warm = WarmCLI(hub.environ(hub_cache))
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def offline(hub: LoopbackHub, hub_cache: Path) -> Iterator[WarmCLI]:
    """The command line of processes that have its cache alone."""
    warm = WarmCLI(hub.environ(hub_cache, offline=True))
    yield warm
    warm.close()


@pytest.fixture(scope="module")
def merged(online: WarmCLI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    done = online.run(["merge", ADAPTER, str(out)], out.parent)
    assert done.returncode == 0, done.stderr
    assert f"{ADAPTER} was made elsewhere; it names as its base {MODEL}" in done.stderr
    assert f"merging {ADAPTER} into {MODEL}" in done.stderr
    assert "4 of 4 modules merged" in done.stderr
    return out


def test_only_the_adapter_is_fetched_all_of_one_commit(merged: Path, hub: LoopbackHub) -> None:
    fetched = [path for method, path in hub.requests if path.startswith(f"/{ADAPTER}/resolve/")]
    assert any(path.endswith("/adapter_model.safetensors") for path in fetched)
    assert not [path for path in fetched if "optimizer" in path or "checkpoint" in path]
    first, *rest = fetched
    assert first.endswith("/resolve/main/adapter_config.json")
    commits = {path.split("/")[4] for path in rest} - {"main"}
    assert len(commits) == 1
    assert not hub.strays


def test_what_is_merged_is_the_adapter_on_the_hub_and_in_its_cache(
    merged: Path, online: WarmCLI, offline: WarmCLI
) -> None:
    same = offline.run(["verify", ADAPTER, str(merged)], merged.parent)
    assert same.returncode == 0, same.stderr
    asked = online.run(["generate", ADAPTER, str(merged), MODEL, "-p", "red dog", "--json"])
    assert asked.returncode == 0, asked.stderr
    answers = {row["model"]: row["answer"] for row in map(json.loads, asked.stdout.splitlines())}
    assert answers[ADAPTER] == answers[str(merged)] != answers[MODEL]


def test_a_gguf_of_it_is_written_here(merged: Path, online: WarmCLI, tmp_path: Path) -> None:
    done = online.run(["export-gguf", ADAPTER, "--adapter-only"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tuned-lora-f16.gguf\n"
    assert (tmp_path / "tuned-lora-f16.gguf").is_file()


@pytest.mark.parametrize(
    ("name", "where", "said"),
    [
        ("org/nothing", "online", "org/nothing does not exist, neither here nor on the hub"),
        (
            "org/nothing",
            "offline",
            "org/nothing does not exist here, and the hub cannot be reached",
        ),
        (MODEL, "online", f"{MODEL} is not an adapter: it has no adapter_config.json"),
        ("org/pickled", "online", "org/pickled has no adapter_model.safetensors"),
        ("org/pickled", "online", "hint: if the hub has it as a pickle (.bin), which may run code"),
        ("org/closed", "online", "Cannot access gated repo for url"),
    ],
)
def test_what_is_not_an_adapter_there_is_said(
    request: pytest.FixtureRequest, merged: Path, tmp_path: Path, name: str, where: str, said: str
) -> None:
    done = request.getfixturevalue(where).run(["merge", name, "out"], tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert "\nhint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
