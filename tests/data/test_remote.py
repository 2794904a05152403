"""Rows by address: fetched once, whole or not at all, and from there on as a local file's.

Hermetic: an https server and moto's S3 on the loopback interface, the tiny model's tokenizer.
Alone: pytest tests/data/test_remote.py
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerBase

from lora_cli.common.errors import LoraError
from lora_cli.data import prepare, remote, sources, stores
from lora_cli.data.load import load_rows
from lora_cli.gguf import imatrix
from lora_cli.models.tokenizer import load_tokenizer
from lora_cli.recipe import Data
from lora_cli.recipe.load import load_recipe
from tests.stores import S3, Answer, HTTPSServer, serve_s3
from tests.warm import WarmCLI

ROOT = Path(__file__).parents[2]


def rows(word: str, number: int = 30) -> bytes:
    made = [{"prompt": f"ask {each}", "completion": f"{word} {each}"} for each in range(number)]
    return "".join(json.dumps(row) + "\n" for row in made).encode()


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(tiny / "model"))


@pytest.fixture(scope="module")
def https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HTTPSServer]:
    server = HTTPSServer(tmp_path_factory.mktemp("https"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serve_s3() as served:
        yield served


@pytest.fixture(autouse=True)
def surroundings(https: HTTPSServer, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of its own, stores that are found, and no instance of a store left from before."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL_CERT_FILE", str(https.certificate))
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    S3FileSystem.clear_instance_cache()
    stores._silent.clear()
    https.answers.clear()
    https.asked.clear()


@pytest.fixture
def load(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    """`load(path, *overrides)` prepares the rows of an address, or of several."""

    def run(path: object, *overrides: str) -> prepare.Prepared:
        (tmp_path / "r.yaml").write_text(
            f"model: {{name_or_path: x}}\ndata:\n  path: {json.dumps(path)}\n"
        )
        recipe = load_recipe(tmp_path / "r.yaml", list(overrides))
        try:
            return load_rows(recipe, tokenizer)[0]
        except LoraError as error:
            raise error.with_message(recipe.add_place(error.message)) from error

    return run


@pytest.fixture
def load_local(load, tmp_path: Path):
    """`load_local(*bodies)` prepares the same rows from local files."""

    def run(*bodies: bytes) -> prepare.Prepared:
        names = [str(tmp_path / f"local{number}.jsonl") for number in range(len(bodies))]
        for name, body in zip(names, bodies):
            Path(name).write_bytes(body)
        return load(names)

    return run


def fetched() -> list[Path]:
    """The fetched files in the cache, and whatever is half made."""
    found = [path for path in remote.find_folder().rglob("*") if path.is_file()]
    return [path for path in found if path.suffix not in (".json", ".lock", "")]


def test_an_https_file_is_fetched_once_and_read_as_a_local_one(
    load, load_local, https: HTTPSServer, capfd
) -> None:
    https.answers["/rows.jsonl"] = Answer(rows("blue"))
    url = f"{https.address}/rows.jsonl?download=1"
    once, again = load(url), load(url)
    assert [status for _, status in https.asked] == [200, 304]
    said = capfd.readouterr().err
    assert f"{url}: {len(rows('blue')):,} bytes fetched in" in said
    assert f"{url}: fetched before, {fetched()[0]}" in said
    assert fetched()[0].name == "rows.jsonl"
    assert fetched()[0].read_bytes() == rows("blue")
    assert once.fingerprint == again.fingerprint == load_local(rows("blue")).fingerprint


def test_a_new_version_is_fetched_and_an_old_one_found_again(load, https: HTTPSServer) -> None:
    url, prints = f"{https.address}/rows.jsonl", []
    for word in ("blue", "pink", "blue"):
        https.answers["/rows.jsonl"] = Answer(rows(word))
        prints.append(load(url).fingerprint)
    assert prints[0] == prints[2] != prints[1]
    assert len(fetched()) == 2


def test_a_server_without_versions_is_asked_each_time(load, https: HTTPSServer) -> None:
    for word in ("blue", "blue", "pink"):  # of the same length
        https.answers["/rows.jsonl"] = Answer(rows(word), etag=False)
        load(f"{https.address}/rows.jsonl")
    assert [status for _, status in https.asked] == [200, 200, 200]
    assert sorted(file.read_bytes() for file in fetched()) == [rows("blue"), rows("pink")]


def test_a_server_that_says_only_the_time_is_asked_but_not_fetched_from(
    load, https: HTTPSServer, capfd
) -> None:
    for day in (1, 1, 2):
        time_said = ("Last-Modified", f"Thu, 0{day} Jan 2026 00:00:00 GMT")
        https.answers["/rows.jsonl"] = Answer(rows("blue"), headers=(time_said,), etag=False)
        load(f"{https.address}/rows.jsonl")
    assert capfd.readouterr().err.count("bytes fetched in") == 2


def test_a_cache_that_was_copied_is_taken_without_a_connection(
    load, https: HTTPSServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    https.answers["/rows.jsonl"] = Answer(rows("blue"))
    once = load(f"{https.address}/rows.jsonl")
    shutil.copytree(tmp_path / "cache", tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setenv("LORA_CACHE_DIR", str(tmp_path / "copy"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert load(f"{https.address}/rows.jsonl").fingerprint == once.fingerprint


def test_that_nothing_has_changed_is_not_believed_of_what_was_never_fetched(
    load, https: HTTPSServer
) -> None:
    https.answers["/rows.jsonl"] = Answer(status=304)
    with pytest.raises(LoraError, match="the server answered 304"):
        load(f"{https.address}/rows.jsonl")


@pytest.mark.parametrize("name", ["about.json", "names.json", "lock.json"])
def test_no_name_is_taken_for_one_of_the_cache_s_own(name: str, load, s3: S3) -> None:
    s3.put("bucket", name, b'[{"prompt": "ask", "completion": "answer"}]')
    for _ in range(2):
        assert len(load(f"s3://bucket/{name}").rows) == 1
    assert s3.asked.count(f"GET /bucket/{name}") == 1


def test_an_etag_that_no_header_can_say_is_not_said(load, https: HTTPSServer) -> None:
    odd = ("ETag", '"\xff"')
    https.answers["/rows.jsonl"] = Answer(rows("blue"), headers=(odd,), etag=False)
    for _ in range(2):
        load(f"{https.address}/rows.jsonl")
    assert len(fetched()) == 1


def test_an_address_of_numbers_is_no_chain() -> None:
    stores.refuse_address("path", "https://[::1]:8443/rows.jsonl")


def test_a_certificate_that_is_not_trusted_is_named(
    load, https: HTTPSServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    https.answers["/rows.jsonl"] = Answer(rows("blue"))
    with pytest.raises(LoraError, match="CERTIFICATE_VERIFY_FAILED") as raised:
        load(f"{https.address}/rows.jsonl")
    assert "SSL_CERT_FILE" in raised.value.hint


def test_a_file_that_was_changed_in_the_cache_is_fetched_anew(
    load, https: HTTPSServer, capfd
) -> None:
    https.answers["/rows.jsonl"] = Answer(rows("blue"))
    url = f"{https.address}/rows.jsonl"
    once = load(url)
    fetched()[0].write_bytes(rows("pink"))  # of the same length
    assert load(url).fingerprint == once.fingerprint
    assert "is not as it was fetched: it is fetched anew" in capfd.readouterr().err


BAD = {
    "absent": (Answer(status=404), "does not exist"),
    "forbidden": (Answer(status=403), "may not be read: PermissionError"),
    "broken": (Answer(status=503), "cannot be reached: ConnectionError: the server answered 503"),
    "cut short": (Answer(rows("blue"), sent=700), "broke off after 700 bytes"),
    "a web page": (
        Answer(b"<html>", headers=(("Content-Type", "text/html"),)),
        "is a web page, not a file of rows",
    ),
    "packed unasked": (
        Answer(rows("blue"), headers=(("Content-Encoding", "br"),)),
        "the server packs it (br), which was not asked for",
    ),
    "leads to plain http": (
        Answer(status=302, headers=(("Location", "http://169.254.169.254/latest/rows.jsonl"),)),
        "leads to http://169.254.169.254/latest/rows.jsonl, which is not https",
    ),
    "leads in a circle": (
        Answer(status=302, headers=(("Location", "/rows.jsonl"),)),
        "cannot be fetched: TooManyRedirects",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_goes_wrong_names_line_and_address_and_leaves_nothing(
    case: str, load, https: HTTPSServer
) -> None:
    https.answers["/rows.jsonl"], said = BAD[case]
    url = f"{https.address}/rows.jsonl"
    with pytest.raises(LoraError) as raised:
        load(url)
    assert f"r.yaml:3: data.path: {url} " in raised.value.message.replace(": the", " the")
    assert said in raised.value.message
    assert raised.value.hint
    assert list(remote.find_folder().iterdir()) == []


def test_a_redirect_is_followed(load, load_local, https: HTTPSServer) -> None:
    https.answers["/rows.jsonl"] = Answer(status=302, headers=(("Location", "/else?sig=1"),))
    https.answers["/else"] = Answer(rows("blue"))
    found = load(f"{https.address}/rows.jsonl")
    assert found.fingerprint == load_local(rows("blue")).fingerprint


def test_where_no_server_answers_the_last_version_is_taken_and_said(
    load, https: HTTPSServer, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{https.address}/rows.jsonl"
    prints = {}
    for word in ("blue", "pink", "blue"):
        https.answers["/rows.jsonl"] = Answer(rows(word))
        prints[word] = load(url).fingerprint
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    assert load(url).fingerprint == prints["blue"]
    assert "cannot be reached: ConnectError" in (said := capfd.readouterr().err)
    assert "what was fetched of it on" in said
    with pytest.raises(LoraError, match=r"r.yaml:3: data.path: .*/other.jsonl cannot be reached"):
        load(f"{https.address}/other.jsonl")


def test_a_version_that_breaks_off_is_not_replaced_by_an_older_one(
    load, https: HTTPSServer
) -> None:
    url = f"{https.address}/rows.jsonl"
    https.answers["/rows.jsonl"] = Answer(rows("blue"))
    load(url)
    https.answers["/rows.jsonl"] = Answer(rows("pink"), sent=700)
    with pytest.raises(LoraError, match="broke off after 700 bytes"):
        load(url)


def start(url: str) -> subprocess.Popen[str]:
    """Fetch an address in a process of its own."""
    code = f"from lora_cli.data import remote; print(remote.fetch_all('path', {url!r})[0])"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_of_two_processes_one_fetches_and_the_other_waits(https: HTTPSServer) -> None:
    https.answers["/rows.jsonl"] = Answer(rows("blue", 1000), pause=0.3)
    both = [start(f"{https.address}/rows.jsonl") for _ in range(2)]
    (first, said), (second, also) = (each.communicate(timeout=60) for each in both)
    assert first == second != ""
    assert sorted(status for _, status in https.asked) == [200, 304]
    assert (said + also).count("waiting for process") == 1
    assert (said + also).count("bytes fetched in") == 1


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_after_a_kill_nothing_half_is_taken_for_whole(https: HTTPSServer) -> None:
    https.answers["/rows.jsonl"] = Answer(rows("blue", 1000), pause=1.0)
    url = f"{https.address}/rows.jsonl"
    killed = start(url)
    until = time.monotonic() + 60
    while not any(file.stat().st_size for file in fetched()) and time.monotonic() < until:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [file.stat().st_size < len(rows("blue", 1000)) for file in fetched()] == [True]
    https.answers["/rows.jsonl"] = Answer(rows("blue", 1000))
    again = start(url)
    out, said = again.communicate(timeout=60)
    assert "which a process that was killed had left" in said
    assert [str(file) for file in fetched()] == [out.strip()]
    assert fetched()[0].read_bytes() == rows("blue", 1000)


def test_a_disk_without_room_is_told_before_anything_comes(
    load, https: HTTPSServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    https.answers["/rows.jsonl"] = Answer(rows("blue"))
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(LoraError, match="bytes, and .* has room for 100") as raised:
        load(f"{https.address}/rows.jsonl")
    assert "LORA_CACHE_DIR" in str(raised.value.hint)


REFUSED = {
    "http://x.org/rows.jsonl": "is an address of a kind that is not read",
    "ftp://x.org/rows.jsonl": "is an address of a kind that is not read",
    "file:///etc/passwd": "is an address of a kind that is not read",
    "memory://rows.jsonl": "is an address of a kind that is not read",
    "hf://datasets/a/b/rows.jsonl": "is an address of a kind that is not read",
    "s3a://bucket/rows.jsonl": "is an address of a kind that is not read",
    "simplecache::s3://bucket/rows.jsonl": "is an address of a kind that is not read",
    "s3://bucket/rows.jsonl::file:///etc/passwd": "is an address of a kind that is not read",
    "https://ada@x.org/rows.jsonl": "holds credentials",
    "s3://key:secret@bucket/rows.jsonl": "holds credentials",
    "https://x.org/rows.jsonl?X-Amz-Signature=12345678": "holds credentials",
    "https://x.org/rows-*.jsonl": "https cannot list them",
    "https:///rows.jsonl": "names no object",
    "abfs://rows@elsewhere.org/rows.jsonl": "after @ stands no account of Azure's",
    "abfs://rows@elsewhere.org/x.dfs.core.windows.net": "after @ stands no account of Azure's",
    "https://x.org/rows.xlsx": "is not one of .json, .jsonl",
    "s3://bucket/rows/": "is a folder",
    "s3://bucket/rows": "is not one of .json, .jsonl",
}


@pytest.mark.parametrize("url", REFUSED)
def test_an_address_that_is_not_taken_is_refused_before_it_is_asked(
    url: str, https: HTTPSServer, s3: S3
) -> None:
    with pytest.raises(LoraError) as raised:
        sources.find_source(Data(), "path", url, "train")
    assert raised.value.message.startswith(f"data.path: {url} ") or url.startswith("abfs")
    assert REFUSED[url] in raised.value.message
    assert raised.value.hint
    assert not remote.find_folder().exists()


def test_an_object_of_s3_is_fetched_once_and_read_as_a_local_file(load, load_local, s3: S3) -> None:
    s3.put("bucket", "dir/rows.jsonl", rows("blue"))
    once, again = load("s3://bucket/dir/rows.jsonl"), load("s3://bucket/dir/rows.jsonl")
    assert s3.asked.count("GET /bucket/dir/rows.jsonl") == 1
    assert once.fingerprint == again.fingerprint == load_local(rows("blue")).fingerprint


def test_a_pattern_and_a_list_are_read_in_order(load, load_local, s3: S3) -> None:
    bodies = [rows(word) for word in ("blue", "pink", "cyan")]
    s3.put("bucket", "many/rows-2.jsonl", bodies[1])
    s3.put("bucket", "many/rows-1.jsonl", bodies[0])
    s3.put("bucket", "many/notes.txt", b"not rows")
    s3.put("other", "more.jsonl.gz", gzip.compress(bodies[2]))
    pattern = load("s3://bucket/many/rows-*.jsonl")
    assert pattern.fingerprint == load_local(*bodies[:2]).fingerprint
    both = load(["s3://bucket/many/rows-*.jsonl", "s3://other/more.jsonl.gz"])
    assert both.fingerprint == load_local(*bodies).fingerprint
    gets = [asked for asked in s3.asked if asked.startswith("GET /") and "?" not in asked]
    assert len(gets) == 3
    with pytest.raises(LoraError, match=r"data.path: no object matches s3://bucket/none-\*.jsonl"):
        load("s3://bucket/none-*.jsonl")


def test_evaluation_rows_come_from_an_address_too(tmp_path, tokenizer, s3: S3) -> None:
    s3.put("bucket", "train.jsonl", rows("blue"))
    s3.put("bucket", "eval.jsonl", rows("pink", 7))
    (tmp_path / "r.yaml").write_text(
        "model: {name_or_path: x}\n"
        "data: {path: s3://bucket/train.jsonl, eval_path: s3://bucket/eval.jsonl}\n"
    )
    train, evaluation = load_rows(load_recipe(tmp_path / "r.yaml"), tokenizer)
    assert (len(train.rows), len(evaluation.rows)) == (30, 7)


def test_a_stream_is_read_from_the_fetched_file(load, s3: S3) -> None:
    s3.put("bucket", "rows.jsonl", rows("blue"))
    found = load("s3://bucket/rows.jsonl", "data.streaming=true", "training.max_steps=2")
    assert len(list(found.stream.take(40))) == 40  # the data begin anew after 30
    assert s3.asked.count("GET /bucket/rows.jsonl") == 1


S3_BAD = {
    "s3://bucket/none.jsonl": ({}, "does not exist", "aws s3 ls s3://bucket/"),
    "s3://nobucket/rows.jsonl": ({}, "does not exist", "aws s3 ls s3://nobucket/"),
    "s3://bucket/rows.jsonl": (
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
        "may not be read: NoCredentialsError",
        "FSSPEC_S3_ANON=true",
    ),
    "s3://bucket/elsewhere.jsonl": (
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"},
        "cannot be reached: EndpointConnectionError",
        "does http://127.0.0.1:1 answer?",
    ),
}


@pytest.mark.parametrize("url", S3_BAD)
def test_what_s3_refuses_names_line_address_and_remedy(
    url: str, load, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.put("bucket", "rows.jsonl", rows("blue"))
    environment, said, hint = S3_BAD[url]
    for name, value in environment.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(LoraError) as raised:
        load(url)
    assert f"r.yaml:3: data.path: {url} {said}" in raised.value.message
    assert hint in raised.value.hint
    assert list(remote.find_folder().iterdir()) == []


def test_an_object_that_changes_while_it_is_fetched_is_refused(
    load, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    s3.put("bucket", "rows.jsonl", rows("blue"))
    fetch = S3FileSystem._get_file

    async def change(*arguments, **options):
        await fetch(*arguments, **options)
        s3.put("bucket", "rows.jsonl", rows("pink"))

    monkeypatch.setattr(S3FileSystem, "_get_file", change)
    with pytest.raises(LoraError, match="s3://bucket/rows.jsonl was changed while it was fetched"):
        load("s3://bucket/rows.jsonl")
    assert fetched() == []


def test_without_a_connection_a_pattern_stands_for_what_it_stood_for(
    load, s3: S3, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    from s3fs import S3FileSystem

    s3.put("bucket", "last/rows-1.jsonl", rows("blue"))
    once = load("s3://bucket/last/rows-*.jsonl")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    S3FileSystem.clear_instance_cache()
    assert load("s3://bucket/last/rows-*.jsonl").fingerprint == once.fingerprint
    said = capfd.readouterr().err
    assert "s3://bucket/last/rows-*.jsonl cannot be reached" in said
    assert "rows-1.jsonl cannot be reached: its store did not answer before: what was" in said


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_cli.data.stores.find_spec", lambda _: None)
    for url, package in (("gs://bucket/rows.jsonl", "gcsfs"), ("az://box/rows.jsonl", "adlfs")):
        with pytest.raises(LoraError, match=f"data.path: {url} needs the package") as raised:
            remote.fetch_all("path", url)
        assert raised.value.hint == f"pip install {package} fsspec=={metadata.version('fsspec')}"


class Refusal(Exception):
    def __init__(self, message: str, **told: object) -> None:
        super().__init__(message)
        self.__dict__ |= told


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Refusal("no", code="401"), "may not be read"),  # gcsfs
        (OSError("Forbidden: b/bucket/o"), "may not be read"),
        (Refusal("no", status_code=403), "may not be read"),  # azure.core
        (Refusal("no", status=404), "cannot be fetched"),
        (TimeoutError("30 s"), "cannot be reached"),
        (OSError(28, "No space left on device"), "cannot be kept: the disk is full"),
    ],
)
def test_errors_of_stores_are_told_apart(error: Exception, said: str) -> None:
    code = compile("raise error", "<a library>", "exec")
    with (
        pytest.raises(LoraError, match=f"gs://bucket/rows.jsonl {said}"),
        stores.translate("gs://bucket/rows.jsonl"),
    ):
        exec(code, {"error": error})


def test_a_bug_of_ours_is_no_error_of_the_store() -> None:
    with pytest.raises(AttributeError), stores.translate("gs://bucket/rows.jsonl"):
        stores.list_objects(None)  # type: ignore[arg-type]


def test_a_fetched_table_without_names_is_not_to_be_mended_in_the_cache(
    load, https: HTTPSServer
) -> None:
    https.answers["/rows.csv"] = Answer(b"what is this thing?,a long answer.\nask,answer\n")
    with pytest.raises(LoraError, match="the first line must name the columns") as raised:
        load(f"{https.address}/rows.csv")
    assert raised.value.hint == "write a line of names above the rows"


def test_an_empty_object_and_one_that_cannot_be_read_are_a_local_files_errors(
    load, https: HTTPSServer
) -> None:
    https.answers["/empty.jsonl"] = Answer(b"")
    https.answers["/bad.jsonl"] = Answer(rows("blue") + b"{\n")
    with pytest.raises(LoraError, match=r"r.yaml:3: data.path: .*empty.jsonl is empty"):
        load(f"{https.address}/empty.jsonl")
    with pytest.raises(LoraError, match=r"bad.jsonl:31: column 2: invalid JSON"):
        load(f"{https.address}/bad.jsonl")


def test_what_is_not_used_for_a_month_goes(load, https: HTTPSServer) -> None:
    for name in ("old", "new"):
        https.answers[f"/{name}.jsonl"] = Answer(rows("blue"))
    load(f"{https.address}/old.jsonl")
    [about] = remote.find_folder().rglob(remote.ABOUT)
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(about, (long_ago, long_ago))
    load(f"{https.address}/new.jsonl")
    assert [file.name for file in fetched()] == ["new.jsonl"]


def test_an_importance_matrix_may_be_measured_on_rows_by_address(
    tokenizer, tiny: Path, s3: S3
) -> None:
    s3.put("bucket", "eval.jsonl", (tiny / "eval.jsonl").read_bytes())
    imatrix.refuse_missing_file("s3://bucket/eval.jsonl")
    assert [*imatrix.read_rows("s3://bucket/eval.jsonl", tokenizer)] == [
        *imatrix.read_rows(str(tiny / "eval.jsonl"), tokenizer)
    ]
    with pytest.raises(LoraError, match="--imatrix s3://bucket/x.imatrix does not exist"):
        imatrix.refuse_missing_file("s3://bucket/x.imatrix")


@pytest.mark.slow
def test_a_run_from_s3_is_refused_once_its_object_has_changed(
    tiny: Path, s3: S3, tmp_path: Path
) -> None:
    train = (tiny / "train.jsonl").read_bytes()
    s3.put("bucket", "train.jsonl", train)
    (tmp_path / "r.yaml").write_text(
        f"model: {{name_or_path: {tiny / 'model'}}}\n"
        "data: {path: s3://bucket/train.jsonl}\n"
        "training: {max_steps: 1, save_steps: 1}\noutput_dir: run\n"
    )
    cli = WarmCLI()
    try:
        done = cli.run(["train", "r.yaml"], tmp_path)
        assert done.returncode == 0, done.stderr
        more = [
            "--resume",
            "--allow-changes",
            "training.max_steps",
            "--set",
            "training.max_steps=2",
        ]
        s3.put("bucket", "train.jsonl", train[: len(train) // 2].rpartition(b"\n")[0])
        done = cli.run(["train", "r.yaml", *more], tmp_path)
        assert done.returncode == 1
        assert "error: the run in run began with other rows: the data," in done.stderr
        s3.put("bucket", "train.jsonl", train)
        done = cli.run(["train", "r.yaml", *more], tmp_path)
        assert done.returncode == 0, done.stderr
    finally:
        cli.close()
    record = (tmp_path / "run" / "record.json").read_text()
    assert "s3://bucket/train.jsonl" in record
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in record


def test_fewer_bytes_than_the_store_said_are_not_taken_for_whole(
    load, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    s3.put("bucket", "rows.jsonl", rows("blue"))
    fetch = S3FileSystem._get_file

    async def stop_early(store, path, file, **options):
        await fetch(store, path, file, **options)
        os.truncate(file, 700)

    monkeypatch.setattr(S3FileSystem, "_get_file", stop_early)
    with pytest.raises(LoraError, match=r"rows.jsonl was cut off: 700 of 1,360 bytes came"):
        load("s3://bucket/rows.jsonl")
    assert fetched() == []
