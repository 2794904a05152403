"""A Hugging Face hub on 127.0.0.1 that serves local folders under any repository name. Standard
library only.

    with LoopbackHub() as hub:
        hub.add_model("HuggingFaceTB/SmolLM2-135M", {"main": folder, "v2": other})
        hub.add_dataset("tatsu-lab/alpaca", {"main": folder})
        subprocess.run(command, env={**os.environ, **hub.environ(tmp_path / "hf")})
        assert ("GET", "/api/models/HuggingFaceTB/SmolLM2-135M/revision/v2") in hub.requests

It speaks what transformers, peft, datasets and huggingface_hub ask when they read: repository info,
trees, file metadata, ranges, and the refusals of the real one (`models/test_hub.py` holds it to
that). A folder is copied into memory when added, so a commit never changes, and its sha follows
from its content. Uploads are not served.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = {
    ".arrow",
    ".bin",
    ".gguf",
    ".model",
    ".parquet",
    ".pt",
    ".safetensors",
}  # as in a new repository
API = re.compile(
    r"/api/(model|dataset)s/(.+?)(?:/(revision|tree|paths-info)(?:/([^/]+)(?:/(.+))?)?)?"
)
RESOLVE = re.compile(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)")
Entry = dict[str, object]


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


class Refusal(Exception):
    """An error reply: client libraries choose their exception by its `X-Error-Code`."""

    def __init__(self, status: int, code: str, message: str, sha: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} | (
            {"X-Repo-Commit": sha} if sha else {}
        )
        self.reply = Reply(status, headers, json.dumps({"error": message}).encode())


@dataclass(frozen=True)
class File:
    """Content with its names: `oid` is git's, `etag` is the LFS sha256 where the real hub would use
    LFS, else `oid`."""

    data: bytes
    oid: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> File:
        data = path.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return cls(
            data, oid, hashlib.sha256(data).hexdigest() if path.suffix in LFS_SUFFIXES else oid
        )

    def entry(self, path: str) -> Entry:
        size = len(self.data)
        lfs = (
            {}
            if self.etag == self.oid
            else {"lfs": {"oid": self.etag, "size": size, "pointerSize": 130}}
        )
        return {"type": "file", "path": path, "oid": self.oid, "size": size, **lfs}


class Commit:
    """A folder as it was when added: `files` by path, and `entries`, the tree with its directories,
    by path."""

    def __init__(self, repository: str, folder: Path) -> None:
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        assert paths, f"{folder} holds no files"
        self.files = {path.relative_to(folder).as_posix(): File.read(path) for path in paths}
        listing = "".join(f"\n{path} {file.oid}" for path, file in self.files.items())
        self.sha = hashlib.sha1(f"{repository}{listing}".encode()).hexdigest()
        directories = sorted(
            {str(parent) for path in self.files for parent in PurePosixPath(path).parents} - {"."}
        )
        self.entries: dict[str, Entry] = {
            **{
                path: {"type": "directory", "path": path, "oid": self.sha, "size": 0}
                for path in directories
            },
            **{path: file.entry(path) for path, file in self.files.items()},
        }

    def tree(self, folder: str, recursive: bool) -> list[Entry]:
        prefix = f"{folder}/" if folder else ""
        below = {
            path.removeprefix(prefix): entry
            for path, entry in self.entries.items()
            if path.startswith(prefix)
        }
        if not below:
            raise Refusal(
                404, "EntryNotFound", f"{folder} does not exist on this revision", self.sha
            )
        return [entry for path, entry in below.items() if recursive or "/" not in path]


class Repository:
    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name, self.gated = kind, name, False
        self.refs: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full sha names."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def info(self, commit: Commit) -> Entry:
        siblings = [{"rfilename": path} for path in commit.files]
        gated = "manual" if self.gated else False
        return {
            "id": self.name,
            "sha": commit.sha,
            "private": False,
            "gated": gated,
            "tags": [],
            "siblings": siblings,
        }

    def file(self, commit: Commit, path: str, token: str | None) -> Reply:
        """Only the bytes of a gated repository are closed; its info and its tree are public, as on
        the real hub."""
        if self.gated:
            status, why = (
                (403, " and you are not in the authorized list.")
                if token
                else (401, ". Please log in.")
            )
            raise Refusal(
                status, "GatedRepo", f"Access to {self.kind} {self.name} is restricted{why}"
            )
        if path not in commit.files:
            # The sha lets clients note that an optional file is absent, and not ask again.
            raise Refusal(404, "EntryNotFound", "Entry not found", commit.sha)
        file = commit.files[path]
        linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return Reply(
            200, {"ETag": f'"{file.etag}"', "X-Repo-Commit": commit.sha, **linked}, file.data
        )


class LoopbackHub:
    """The server, a context manager. `requests` has every (method, target) seen, `strays` those it
    does not serve.

    The environment makes it the proxy for every other host: what would have left the machine is
    refused here, and shows in `strays`, instead of waiting for a name server.
    """

    def __init__(self) -> None:
        self.hostile: Callable[[str, str, Reply], Reply] | None = None
        """What becomes of the reply to a (method, target)."""
        self.requests: list[tuple[str, str]] = []
        self.strays: list[tuple[str, str]] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for (
            connection
        ) in self._server.connections:  # kept alive by clients, for whom the hub must be gone too
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add_model(
        self, name: str, revisions: Mapping[str, Path], *, gated: bool = False
    ) -> dict[str, str]:
        """Serve each folder as that branch or tag; returns the sha of each. Adding again moves a
        branch."""
        return self._add("model", name, revisions, gated)

    def add_dataset(
        self, name: str, revisions: Mapping[str, Path], *, gated: bool = False
    ) -> dict[str, str]:
        """The same for a data set."""
        return self._add("dataset", name, revisions, gated)

    def _add(
        self, kind: str, name: str, revisions: Mapping[str, Path], gated: bool
    ) -> dict[str, str]:
        repository = self._repositories.setdefault((kind, name), Repository(kind, name))
        repository.gated = gated
        for revision, folder in revisions.items():
            commit = Commit(f"{kind} {name}", folder)
            repository.commits[commit.sha] = commit
            repository.refs[revision] = commit.sha
        return {revision: repository.refs[revision] for revision in revisions}

    def environ(self, cache: Path, *, offline: bool = False) -> dict[str, str]:
        """What to put over a subprocess's environment: this hub and no other host, a cache and no
        token of the user's.

        Each cache has a variable of its own that would win over HF_HOME. All three offline switches
        are set, since datasets, when its own says 0, does not look at HF_HUB_OFFLINE: pass
        `offline` rather than setting one later.
        """
        caches = {
            "HF_HUB_CACHE": "hub",
            "HF_DATASETS_CACHE": "datasets",
            "HF_ASSETS_CACHE": "assets",
        }
        caches |= {"HF_MODULES_CACHE": "modules", "HF_XET_CACHE": "xet", "HF_TOKEN_PATH": "token"}
        on = ["HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_UPDATE_CHECK"]
        on += ["HF_HUB_DISABLE_PROGRESS_BARS", "DISABLE_SAFETENSORS_CONVERSION"]
        proxies = [f"{scheme}_proxy" for scheme in ["http", "https", "all"]]
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            **{name: str(Path(cache) / folder) for name, folder in caches.items()},
            **dict.fromkeys(["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"], ""),
            **dict.fromkeys(
                ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"], str(int(offline))
            ),
            **dict.fromkeys(on, "1"),
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # else datasets calls s3.amazonaws.com at every load
            **dict.fromkeys(
                ["HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"], "300"
            ),  # seconds, for a busy machine
            **dict.fromkeys(proxies + [name.upper() for name in proxies], self.url),
            **dict.fromkeys(["no_proxy", "NO_PROXY"], "127.0.0.1,localhost"),
        }

    def answer(self, method: str, target: str, form: str, token: str | None) -> Reply:
        """One request without the wire. Raises Refusal."""
        self.requests.append((method, target))
        path, _, query = target.partition("?")
        if path == "/api/whoami-v2" and token:
            return _json({"type": "user", "name": "loopback", "fullname": "loopback", "orgs": []})
        if match := RESOLVE.fullmatch(path):
            dataset, name, revision, file = match.groups()
            repository = self._repository("dataset" if dataset else "model", name, token)
            return repository.file(repository.at(unquote(revision)), unquote(file), token)
        if match := API.fullmatch(path):
            kind, name, verb, revision, folder = match.groups()
            repository = self._repository(kind, name, token)
            commit = repository.at(unquote(revision or "main"))
            if verb == "tree":
                return _json(
                    commit.tree(unquote(folder or ""), parse_qs(query).get("recursive") == ["true"])
                )
            if verb == "paths-info":
                return _json(
                    [
                        commit.entries[path]
                        for path in parse_qs(form)["paths"]
                        if path in commit.entries
                    ]
                )
            return _json(repository.info(commit))
        self.strays.append((method, target))
        raise Refusal(403, "", f"the loopback hub does not serve {target}")

    def _repository(self, kind: str, name: str, token: str | None) -> Repository:
        if (kind, name) in self._repositories:
            return self._repositories[kind, name]
        if token:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        raise Refusal(
            401, "RepoNotFound", "Invalid username or password."
        )  # strangers are not told what exists


def _json(value: object) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _ranged(reply: Reply, wanted: str) -> Reply:
    """The part that `Range: bytes=first-last`, `first-` or `-count` asks for."""
    first, _, last = wanted.removeprefix("bytes=").partition("-")
    size = len(reply.body)
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        return Reply(416, {"Content-Range": f"bytes */{size}"}, b"")
    return Reply(
        206,
        reply.headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"},
        reply.body[start:stop],
    )


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: LoopbackHub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = (
        True  # headers and body are two writes; with Nagle each reply may wait 40 ms for an ACK
    )
    server: _Server

    def _reply(self) -> None:
        form = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        try:
            reply = self.server.hub.answer(
                self.command, self.path, form, self.headers.get("Authorization")
            )
            reply = _ranged(reply, self.headers["Range"]) if self.headers["Range"] else reply
        except Refusal as refusal:
            reply = refusal.reply
        if self.server.hub.hostile:
            reply = self.server.hub.hostile(self.command, self.path, reply)
        self.send_response(reply.status)
        endless = "Transfer-Encoding" in reply.headers
        length = {} if endless else {"Content-Length": str(len(reply.body))}
        for name, value in {**length, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD" and not endless:
            self.wfile.write(reply.body)
        with suppress(OSError):  # until the client has enough
            while self.command != "HEAD" and endless:
                self.wfile.write(b"10000\r\n" + b" " * 2**16 + b"\r\n")

    do_GET = do_HEAD = do_POST = do_CONNECT = _reply

    def log_message(self, *line: object) -> None:
        """Silent: `requests` is the log."""
