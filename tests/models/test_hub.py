"""The loopback hub is a hub: unmodified transformers, peft, datasets and huggingface_hub read from
it, and fail on it the way they fail on the real one.

Checked: a branch and a sha each give their own content, held against what was saved here; absent
optional files do not stop a load; unknown, gated and unreachable repositories raise what callers
have to translate; offline, what was read once is read again from the cache.

Hermetic: two readers (one online, one offline), processes of their own with a fresh cache and the
hub as their proxy, so that a request for any other host is refused and counted. Nothing is
downloaded.

Alone, from the repository's root: python -m pytest tests/models/test_hub.py (its time is two
imports of torch).
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils.sha import git_hash

from tests.hub import LoopbackHub

ROOT = Path(__file__).parents[2]
MODEL, ADAPTER, PARQUET, JSONL = (
    "HuggingFaceTB/SmolLM2-135M",
    "org/adapter",
    "tatsu-lab/alpaca",
    "org/rows",
)
SHARD = "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"
ROWS = {
    "main": [{"instruction": "old", "output": "1"}],
    "v2": [{"instruction": "new", "output": "2"}] * 3,
}
WORDS = {"main": ["alpha", "beta"], "v2": ["beta", "alpha"]}
V2 = dict.fromkeys([MODEL, ADAPTER, PARQUET, JSONL], "v2")
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
Answers = dict[str, Any]


# --- a reader: for each line of stdin, [name of a function below, arguments], it prints what that returns -------------


def save(into: str, revision: str) -> Answers:
    """The four repositories at one revision, no two revisions alike in any part; returns what
    `load` should see."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = Path(into)
    positions = 32 + list(WORDS).index(revision)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(positions)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=positions, **sizes))
    model.save_pretrained(folder / "model")
    (folder / "model/generation_config.json").unlink()
    weights = digest(model.state_dict())
    vocabulary = {word: index for index, word in enumerate(["<unk>", *WORDS[revision]])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(
        folder / "model"
    )
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder / "adapter")
    Dataset.from_list(ROWS[revision]).to_parquet(folder / "parquet" / SHARD)
    (folder / "parquet/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# alpaca\n")
    (folder / "jsonl").mkdir()
    (folder / "jsonl/train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in ROWS[revision])
    )
    return {
        "files": file_digests(folder / "model"),
        "config": positions,
        "tokens": [vocabulary["alpha"]],
        "weights": weights,
        "data files": file_digests(folder / "parquet"),
        "parquet": ROWS[revision],
        "jsonl": ROWS[revision],
        "adapter": digest(get_peft_model_state_dict(adapted)),
    }


def load(at: dict[str, str]) -> Answers:
    """What the four repositories hold at these revisions (the default one where none is given)."""
    from datasets import load_dataset
    from huggingface_hub import snapshot_download
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    revision = at.get(MODEL)
    snapshot = Path(snapshot_download(MODEL, revision=revision))
    model = AutoModelForCausalLM.from_pretrained(MODEL, revision=revision)
    answers = {
        "sha": snapshot.name,
        "files": file_digests(snapshot),
        "config": AutoConfig.from_pretrained(MODEL, revision=revision).max_position_embeddings,
        "tokens": AutoTokenizer.from_pretrained(MODEL, revision=revision)("alpha").input_ids,
        "weights": digest(model.state_dict()),
        "data files": file_digests(
            Path(snapshot_download(PARQUET, repo_type="dataset", revision=at.get(PARQUET)))
        ),
        "parquet": load_dataset(PARQUET, revision=at.get(PARQUET), split="train").to_list(),
        "jsonl": load_dataset(JSONL, revision=at.get(JSONL), split="train").to_list(),
    }
    adapted = PeftModel.from_pretrained(model, ADAPTER, revision=at.get(ADAPTER))
    return answers | {"adapter": digest(get_peft_model_state_dict(adapted))}


def look() -> Answers:
    """What else code that reads asks a hub."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, file_exists, get_safetensors_metadata

    return {
        "streamed": list(load_dataset(PARQUET, revision="v2", split="train", streaming=True)),
        "exists": [file_exists(MODEL, name) for name in ["config.json", "chat_template.jinja"]],
        "tensors": sorted(get_safetensors_metadata(MODEL).weight_map),
        "paths": [
            entry.path
            for entry in HfApi().get_paths_info(PARQUET, ["data", SHARD, "no"], repo_type="dataset")
        ],
        "user": HfApi().whoami(token="hf_x")["name"],
    }


def loaders() -> dict[str, Callable[..., object]]:
    from datasets import load_dataset
    from huggingface_hub import hf_hub_download, snapshot_download
    from peft import PeftConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    return {
        "config": AutoConfig.from_pretrained,
        "tokenizer": AutoTokenizer.from_pretrained,
        "model": AutoModelForCausalLM.from_pretrained,
        "adapter": PeftConfig.from_pretrained,
        "dataset": load_dataset,
        "snapshot": snapshot_download,
        "file": hf_hub_download,
    }


def fail(loader: str, name: str, options: dict[str, str]) -> Answers:
    """The exception and its causes by name, without the HTTP library's own, and the message."""
    try:
        loaders()[loader](name, **options)
    except Exception as error:
        chain, link = [], error
        while link is not None:
            chain.append(
                f"{type(link).__module__}.{type(link).__qualname__}".removeprefix("builtins.")
            )
            link = link.__cause__
        return {
            "raised": [name for name in chain if not name.startswith("http")],
            "message": str(error),
        }
    return {"raised": [], "message": "nothing was raised"}


def digest(tensors: dict[str, Any]) -> str:
    return hashlib.sha256(
        b"".join(k.encode() + v.numpy().tobytes() for k, v in sorted(tensors.items()))
    ).hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def impatient() -> None:
    """Retry a hub that is gone without the pauses: they are 23 s for each file."""
    time.sleep = lambda seconds: None


def read() -> None:
    loaders()  # the slow imports, in both readers at once
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(globals()[name](*arguments)), flush=True)


# --- the test -----------------------------------------------------------------------------------------------------


class Reader:
    def __init__(self, environ: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.models.test_hub"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environ}, **pipes)

    def ask(self, name: str, *arguments: object) -> Any:
        self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the reader died on {name}{arguments}; its traceback is on stderr"
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()  # a polite exit takes seconds
        self.process.communicate()


@dataclass
class World:
    """What was served, and what the readers saw of it; `gone` is the online reader after the hub
    was closed."""

    saved: dict[str, Answers]
    shas: dict[str, dict[str, str]]
    strays: list[tuple[str, str]]
    folder: Path
    online: Answers
    offline: Answers
    gone: Answers


CASES = {
    "unknown": ("org/unknown", {}),
    "revision": (MODEL, {"revision": "v9"}),
    "gated": ("org/closed", {}),
    "gated, with a token": ("org/closed", {"token": "hf_x"}),
}
ABSENT = {
    "file": (MODEL, {"filename": "absent.json"}),
    "config": (ADAPTER, {}),
    "tokenizer": ("org/bare", {}),
    "model": ("org/bare", {}),
    "adapter": (MODEL, {}),
    "dataset": ("org/bare", {}),
}
WRAPPER = {
    **dict.fromkeys(["config", "tokenizer", "model"], ["OSError"]),
    "adapter": ["ValueError"],
    "dataset": ["datasets.exceptions.DatasetNotFoundError"],
    "snapshot": [],
}
UNREACHABLE = ["config", "adapter", "dataset", "snapshot"]  # one for each library


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hub")
    with LoopbackHub() as hub:
        online, offline = (
            Reader(hub.environ(folder / "cache", offline=flag)) for flag in (False, True)
        )
        saved = {
            revision: offline.ask("save", str(folder / revision), revision) for revision in WORDS
        }
        shas = serve(hub, folder)
        seen = {
            # The sha first: nothing of v2 is in the cache yet, so the hub itself must know it.
            "sha": online.ask("load", {name: revisions["v2"] for name, revisions in shas.items()}),
            "main": online.ask("load", {}),
            "v2": online.ask("load", V2),
            "look": online.ask("look"),
            "failures": {
                (case, k): online.ask("fail", k, *CASES[case]) for case in CASES for k in WRAPPER
            },
            "absent": {loader: online.ask("fail", loader, *of) for loader, of in ABSENT.items()},
        }
    online.ask("impatient")
    gone = {loader: online.ask("fail", loader, "org/other", {}) for loader in UNREACHABLE}
    cached = {"main": offline.ask("load", {}), "v2": offline.ask("load", V2)}
    cached["failures"] = {
        loader: offline.ask("fail", loader, "org/other", {}) for loader in UNREACHABLE
    }
    yield World(saved, shas, hub.strays, folder, seen, cached, gone)
    online.close()
    offline.close()


def serve(hub: LoopbackHub, folder: Path) -> dict[str, dict[str, str]]:
    """The four repositories at both revisions, and those that fail; returns the shas."""
    names = ["model", "adapter", "parquet", "jsonl"]
    parts = {name: {revision: folder / revision / name for revision in WORDS} for name in names}
    (folder / "bare").mkdir()
    (folder / "bare/config.json").write_text((folder / "main/model/config.json").read_text())
    (folder / "readme").mkdir()
    (folder / "readme/README.md").write_text("no rows\n")
    hub.add_model("org/bare", {"main": folder / "bare"})
    hub.add_dataset("org/bare", {"main": folder / "readme"})
    hub.add_model("org/closed", parts["model"], gated=True)
    hub.add_dataset("org/closed", parts["jsonl"], gated=True)
    hub.add_dataset(MODEL, parts["jsonl"])  # models and data sets have name spaces of their own
    return {
        MODEL: hub.add_model(MODEL, parts["model"]),
        ADAPTER: hub.add_model(ADAPTER, parts["adapter"]),
        PARQUET: hub.add_dataset(PARQUET, parts["parquet"]),
        JSONL: hub.add_dataset(JSONL, parts["jsonl"]),
    }


def test_no_two_revisions_are_alike(world: World) -> None:
    """Otherwise the tests below could not see a revision being ignored."""
    assert all(world.saved["main"][part] != world.saved["v2"][part] for part in world.saved["main"])
    assert all(len(set(revisions.values())) == 2 for revisions in world.shas.values())


@pytest.mark.parametrize(("asked", "revision"), [("main", "main"), ("v2", "v2"), ("sha", "v2")])
def test_each_revision_gives_its_own_content(world: World, asked: str, revision: str) -> None:
    assert world.online[asked] == {**world.saved[revision], "sha": world.shas[MODEL][revision]}


def test_offline_the_cache_keeps_revisions_apart(world: World) -> None:
    rows = {"parquet", "jsonl"}
    for revision in WORDS:
        expected = {**world.saved[revision], "sha": world.shas[MODEL][revision]}
        seen = world.offline[revision]
        assert {part: seen[part] for part in expected.keys() - rows} == {
            k: expected[k] for k in expected.keys() - rows
        }


def test_offline_load_dataset_ignores_the_revision(world: World) -> None:
    """datasets 5.2 takes what was built last, with a warning only; a snapshot keeps to its revision
    (test above)."""
    for part in ["parquet", "jsonl"]:
        assert world.offline["v2"][part] == world.offline["main"][part]
        assert world.offline["v2"][part] in ROWS.values()


def test_the_rest_of_the_reading_api(world: World) -> None:
    saved = (world.folder / "main/model/model.safetensors").read_bytes()
    header = json.loads(saved[8 : 8 + int.from_bytes(saved[:8], "little")])
    assert world.online["look"] == {
        "streamed": ROWS["v2"],
        "exists": [True, False],
        "tensors": sorted(header.keys() - {"__metadata__"}),
        "paths": ["data", SHARD],
        "user": "loopback",
    }


def test_absent_optional_files_are_remembered_as_absent(world: World) -> None:
    folder = (
        world.folder
        / "cache/hub"
        / f"models--{MODEL.replace('/', '--')}"
        / ".no_exist"
        / world.shas[MODEL]["v2"]
    )
    absent = {"chat_template.jinja", "generation_config.json", "adapter_config.json"}
    assert absent <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("loader", WRAPPER)
@pytest.mark.parametrize("case", CASES)
def test_a_repository_that_cannot_be_read(world: World, case: str, loader: str) -> None:
    cause = {"unknown": "RepositoryNotFoundError", "revision": "RevisionNotFoundError"}.get(
        case, "GatedRepoError"
    )
    # datasets drops the cause with `from None`, save for a revision: the rest is told apart by the
    # message alone.
    hidden = loader == "dataset" and case != "revision"
    seen = world.online["failures"][case, loader]
    assert seen["raised"] == WRAPPER[loader] + (
        [] if hidden else [f"huggingface_hub.errors.{cause}"]
    )


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "unknown": "doesn't exist on the Hub or cannot be accessed",
        "gated": "is a gated dataset on the Hub. You must be authenticated",
        "gated, with a token": "is a gated dataset on the Hub. Visit",
    }.items(),
)
def test_datasets_tells_these_apart_by_words(world: World, case: str, words: str) -> None:
    assert words in world.online["failures"][case, "dataset"]["message"]


@pytest.mark.parametrize(
    ("loader", "raised"),
    {
        "file": ["huggingface_hub.errors.RemoteEntryNotFoundError"],
        "config": ["ValueError"],
        "tokenizer": ["ValueError"],
        "model": ["OSError"],
        "adapter": ["ValueError", "huggingface_hub.errors.RemoteEntryNotFoundError"],
        "dataset": ["datasets.data_files.EmptyDatasetError"],
    }.items(),
)
def test_a_repository_without_the_file(world: World, loader: str, raised: list[str]) -> None:
    assert world.online["absent"][loader]["raised"] == raised


@pytest.mark.parametrize("loader", UNREACHABLE)
def test_a_hub_that_cannot_be_reached(world: World, loader: str) -> None:
    local = ["huggingface_hub.errors.LocalEntryNotFoundError"]
    outer = ["ConnectionError"] if loader == "dataset" else WRAPPER[loader] + local
    assert world.gone[loader]["raised"] == outer
    offline = (
        ["huggingface_hub.errors.OfflineModeIsEnabled"] if loader in ("adapter", "snapshot") else []
    )
    assert world.offline["failures"][loader]["raised"] == outer + offline


def test_nothing_else_was_asked_for(world: World) -> None:
    """datasets asks a viewer on another host for a parquet export; that is all, and it was
    refused."""
    assert world.strays
    assert all(
        target.startswith("http://datasets-server.127.0.0.1") for _, target in world.strays
    ), world.strays


def test_content_goes_by_the_names_git_and_lfs_give_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.safetensors").write_bytes(b"weights")
    (tmp_path / "b.txt").write_bytes(b"text")
    sha256, oid = hashlib.sha256(b"weights").hexdigest(), git_hash(b"text")
    with LoopbackHub() as hub:
        hub.add_model("org/m", {"main": tmp_path})
        trees = [
            json.loads(get(f"{hub.url}/api/models/org/m/tree/main?recursive={r}")[1])
            for r in ("true", "false")
        ]
        for path, name in {"deep/a.safetensors": sha256, "b.txt": oid}.items():
            with OPENER.open(f"{hub.url}/org/m/resolve/main/{path}") as reply:
                assert reply.headers["ETag"] == reply.headers["X-Linked-Etag"] == f'"{name}"'
    assert [[entry["path"] for entry in tree] for tree in trees] == [
        ["deep", "b.txt", "deep/a.safetensors"],
        ["deep", "b.txt"],
    ]
    assert trees[0][1]["oid"] == oid and trees[0][2]["lfs"]["oid"] == sha256


def test_ranges_and_moving_branches(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    with LoopbackHub() as hub:
        before = hub.add_model("org/m", {"main": tmp_path})["main"]
        parts = {"bytes=2-4": b"234", "bytes=7-": b"789", "bytes=-2": b"89", "bytes=8-99": b"89"}
        for wanted, data in parts.items():
            assert get(f"{hub.url}/org/m/resolve/main/a.bin", wanted) == (206, data)
        assert get(f"{hub.url}/org/m/resolve/main/a.bin", "bytes=10-") == (416, b"")
        (tmp_path / "a.bin").write_bytes(b"new")
        assert get(f"{hub.url}/org/m/resolve/main/a.bin") == (200, b"0123456789")
        after = hub.add_model("org/m", {"main": tmp_path})["main"]
        assert get(f"{hub.url}/org/m/resolve/main/a.bin") == (200, b"new")
        assert get(f"{hub.url}/org/m/resolve/{before}/a.bin") == (200, b"0123456789")
        assert hub.requests[-1] == ("GET", f"/org/m/resolve/{before}/a.bin")
    assert before != after


def get(url: str, wanted: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Range": wanted} if wanted else {})
    try:
        with OPENER.open(request) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


if __name__ == "__main__":
    read()
