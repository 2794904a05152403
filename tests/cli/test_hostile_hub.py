"""A hub that lies: what it says is told in words, and nothing is written outside its cache.

Hermetic: a hub on 127.0.0.1. Alone: pytest tests/cli/test_hostile_hub.py
"""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub import LoopbackHub, Reply
from tests.warm import WarmCLI

HTML = b"<!doctype html><title>Sign in</title>"
OUTSIDE = "../../../../planted"
Lie = Callable[[str, str, Reply], Reply]


def in_api(change: Callable[[Reply], Reply]) -> Lie:
    """Change what the hub's API answers."""
    return lambda method, target, reply: change(reply) if "/api/" in target else reply


def in_files(change: Callable[[Reply], Reply]) -> Lie:
    """Change the replies with files."""
    return lambda method, target, reply: change(reply) if "/resolve/" in target else reply


def body(text: bytes, kind: str = "application/json") -> Callable[[Reply], Reply]:
    return lambda reply: Reply(200, {"Content-Type": kind}, text)


def header(name: str, value: str) -> Callable[[Reply], Reply]:
    return lambda reply: reply._replace(headers={**reply.headers, name: value})


def circle(method: str, target: str, reply: Reply) -> Reply:
    return Reply(302, {"Location": target}, b"")


LIES: dict[str, tuple[Lie, str]] = {
    "HTML from the API": (in_api(body(HTML, "text/html")), "not valid JSON"),
    "nothing from the API": (in_api(body(b"")), "not valid JSON"),
    "a list from the API": (in_api(body(b"[1]")), "the hub's answer about lies/model is none"),
    "no commit from the API": (in_api(body(b'{"id": "lies/model"}')), "the hub's answer about"),
    "a commit that is a path": (
        in_api(body(b'{"id": "lies/model", "sha": "%s"}' % OUTSIDE.encode())), "which is no commit"),
    "deep JSON from the API": (in_api(body(b"[" * 100_000 + b"]" * 100_000)), "recursion limit"),
    "a number of 5,000 digits": (in_api(body(b'{"id": %s}' % (b"9" * 5000))), "not valid JSON"),
    "an endless answer": (in_api(header("Transfer-Encoding", "chunked")), "more than"),
    "a gzip bomb": (
        in_api(lambda reply: Reply(200, {"Content-Encoding": "gzip"}, gzip.compress(bytes(2**28)))),
        "a compressed answer"),
    "a redirect in a circle": (circle, "the hub leads in a circle"),
    "a file's commit that is a path": (in_files(header("X-Repo-Commit", OUTSIDE)), "x-repo-commit"),
    "an absent file's commit that is a path": (
        lambda method, target, reply: header("X-Repo-Commit", OUTSIDE)(reply) if reply.status == 404
        else reply, "x-repo-commit"),
    "an ETag that is a path": (in_files(header("ETag", f'"{OUTSIDE}"')), "the etag"),
    "a linked ETag that is a path": (
        in_files(header("X-Linked-Etag", f'"{OUTSIDE}"')), "the x-linked-etag"),
    "a file shorter than its size": (
        in_files(lambda reply: reply._replace(body=reply.body[:50])), "error: "),
    "HTML for each file": (in_files(body(HTML, "text/html")), "error: "),
}  # fmt: skip
COMMANDS = {
    "train": ["train", "recipe.yaml"],
    "generate": ["generate", "lies/model", "--prompt", "hello", "--max-new-tokens", "1"],
    "merge": ["merge", "lies/adapter", "out"],
}


SHORT = (
    "HTML from the API",
    "a commit that is a path",
    "an endless answer",
    "an absent file's commit that is a path",
    "an ETag that is a path",
    "a redirect in a circle",
)
"""What the default tests take; the rest is slow."""
CASES = [pytest.param(lie, marks=() if lie in SHORT else pytest.mark.slow) for lie in LIES]


@pytest.fixture(scope="module")
def hub(tiny: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add_model("lies/model", {"main": tiny / "model"})
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache, in folders that hold nothing else."""
    return tmp_path_factory.mktemp("hub") / "a" / "b" / "cache"


@pytest.fixture(scope="module")
def cli(hub: LoopbackHub, cache: Path) -> Iterator[WarmCLI]:
    warm = WarmCLI(hub.environ(cache))
    warm.run(["--help"])  # once it has its imports
    yield warm
    warm.close()


@pytest.mark.parametrize("lie", CASES)
def test_a_lie_of_the_hub_is_told_and_nothing_is_written_elsewhere(
    lie: str, hub: LoopbackHub, cache: Path, cli: WarmCLI, tiny: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny / "train.jsonl", tmp_path / "rows.jsonl")
    (tmp_path / "recipe.yaml").write_text(
        "method: lora\nmodel: {name_or_path: lies/model}\ndata: {path: rows.jsonl}\noutput_dir: run\n"
    )
    shutil.rmtree(cache, ignore_errors=True)
    hub.hostile, said = LIES[lie]
    try:
        for name, command in COMMANDS.items():
            before = {path.name for path in tmp_path.iterdir()}
            started = time.monotonic()
            done = cli.run(command, tmp_path)
            assert done.returncode == 1, (name, done.stderr)
            assert "Traceback" not in done.stderr
            assert done.stderr.count("error: ") == 1, (name, done.stderr)
            if name == "train":
                assert said in done.stderr
            assert time.monotonic() - started < 30, name
            assert {path.name for path in tmp_path.iterdir()} == before
            assert not list(cache.parents[2].rglob("*planted*"))
            assert [path.name for path in cache.parent.iterdir()] in ([], ["cache"])
    finally:
        hub.hostile = None
