"""A Hugging Face hub on 127.0.0.1 that serves local folders under any repository name.

    with LoopbackHub() as hub:
        hub.add_model("HuggingFaceTB/SmolLM2-135M", {"main": folder, "v2": other})
        hub.add_dataset("tatsu-lab/alpaca", {"main": folder})
        subprocess.run(command, env={**os.environ, **hub.environ(tmp_path / "hf")})
        assert ("GET", "/api/models/HuggingFaceTB/SmolLM2-135M/revision/v2") in hub.requests

It speaks what transformers, peft, datasets and huggingface_hub ask when they read: repository info,
trees, file metadata, ranges, and the refusals of the real one (`models/test_hub.py` holds it to
that). A folder is copied into memory when added, so a commit never changes, and its sha follows
from its content.

It takes uploads to models as well, as huggingface_hub sends them without Xet: repositories and
branches are made, large files arrive by LFS, small ones in the commit. `sent` has the body of every
request, byte for byte.
"""

from __future__ import annotations

import base64
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

import yaml

LFS_SUFFIXES = {
    ".arrow",
    ".bin",
    ".gguf",
    ".model",
    ".parquet",
    ".pt",
    ".safetensors",
}  # as in a new repository
LARGE = 10 * 2**20
"""Bytes from which any file goes by LFS."""
WRITES = "preupload|commit|branch"
API = re.compile(
    rf"/api/(model|dataset)s/(.+?)(?:/(revision|tree|paths-info|{WRITES})(?:/([^/]+)(?:/(.+))?)?)?"
)
LFS = re.compile(r"/(.+)\.git/info/lfs/objects/(batch|verify)")
STORE = re.compile(r"/lfs-store/([0-9a-f]{64})")
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


def goes_by_lfs(name: str, size: int) -> bool:
    return bool(size) and (PurePosixPath(name).suffix in LFS_SUFFIXES or size >= LARGE)


@dataclass(frozen=True)
class File:
    """Content with its names: `oid` is git's, `etag` is the LFS sha256 where the real hub would use
    LFS, else `oid`."""

    data: bytes
    oid: str
    etag: str

    @classmethod
    def read(cls, path: Path) -> File:
        return cls.of(path.name, path.read_bytes())

    @classmethod
    def of(cls, name: str, data: bytes) -> File:
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        is_lfs = goes_by_lfs(name, len(data))
        return cls(data, oid, hashlib.sha256(data).hexdigest() if is_lfs else oid)

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

    @classmethod
    def read(cls, repository: str, folder: Path) -> Commit:
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        assert paths, f"{folder} holds no files"
        files = {path.relative_to(folder).as_posix(): File.read(path) for path in paths}
        return cls(repository, files)

    def __init__(self, repository: str, files: Mapping[str, File]) -> None:
        self.files = dict(files)
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
        self.kind, self.name, self.gated, self.private = kind, name, False, False
        self.refs: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a full sha names."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def add(self, revision: str, commit: Commit) -> None:
        self.commits[commit.sha] = commit
        self.refs[revision] = commit.sha

    def info(self, commit: Commit) -> Entry:
        siblings = [{"rfilename": path} for path in commit.files]
        gated = "manual" if self.gated else False
        return {
            "id": self.name,
            "sha": commit.sha,
            "private": self.private,
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
        self.refusing: Callable[[str, str], Refusal | None] | None = None
        """What a (method, target) is refused by, before anything is done."""
        self.requests: list[tuple[str, str]] = []
        self.sent: list[tuple[str, str, bytes]] = []
        """The (method, target, body) of every request that had one."""
        self.account, self.organizations, self.role = "loopback", ["org"], "write"
        """Whose every token is, and what it may do."""
        self.stored: dict[str, bytes] = {}
        """Large files by their sha256, as the store behind LFS keeps them."""
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
            repository.add(revision, Commit.read(f"{kind} {name}", folder))
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

    def answer(self, method: str, target: str, body: bytes, token: str | None) -> Reply:
        """One request without the wire. Raises Refusal."""
        self.requests.append((method, target))
        if body:
            self.sent.append((method, target, body))
        if self.refusing and (refusal := self.refusing(method, target)):
            raise refusal
        path, _, query = target.partition("?")
        if path == "/api/whoami-v2" and token:
            return _json(
                {
                    "type": "user",
                    "name": self.account,
                    "fullname": self.account,
                    "orgs": [{"type": "org", "name": name} for name in self.organizations],
                    "auth": {"type": "access_token", "accessToken": {"role": self.role}},
                }
            )
        if reply := self._take(method, path, body, token):
            return reply
        if match := RESOLVE.fullmatch(path):
            dataset, name, revision, file = match.groups()
            repository = self._repository("dataset" if dataset else "model", name, token)
            return repository.file(repository.at(unquote(revision)), unquote(file), token)
        if match := API.fullmatch(path):
            kind, name, verb, revision, folder = match.groups()
            repository = self._repository(kind, name, token)
            if verb and verb in WRITES:
                return self._write(repository, verb, unquote(revision), body, token)
            commit = repository.at(unquote(revision or "main"))
            if verb == "tree":
                return _json(
                    commit.tree(unquote(folder or ""), parse_qs(query).get("recursive") == ["true"])
                )
            if verb == "paths-info":
                return _json(
                    [
                        commit.entries[path]
                        for path in parse_qs(body.decode())["paths"]
                        if path in commit.entries
                    ]
                )
            return _json(repository.info(commit))
        self.strays.append((method, target))
        raise Refusal(403, "", f"the loopback hub does not serve {target}")

    def _take(self, method: str, path: str, body: bytes, token: str | None) -> Reply | None:
        """The reply to what an upload asks outside of a repository's API; None for the rest."""
        if method == "PUT" and (match := STORE.fullmatch(path)):
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise Refusal(400, "", "the content is not what its name says")
            self.stored[match[1]] = body
            return Reply(200, {}, b"")
        if method != "POST":
            return None
        if path == "/api/repos/create":
            return self._create(json.loads(body), token)
        if path == "/api/validate-yaml":
            return _validate(json.loads(body)["content"])
        if match := LFS.fullmatch(path):
            self._refuse_reader(match[1], token)
            return self._batch(match[1], json.loads(body), match[2])
        return None

    def _create(self, asked: dict, token: str | None) -> Reply:
        owner = asked["organization"] or self.account
        name = f"{owner}/{asked['name']}"
        if not token:
            raise Refusal(401, "", "Invalid username or password.")
        if self.role == "read" or owner not in (self.account, *self.organizations):
            said = f'You don\'t have the rights to create a model under the namespace "{owner}"'
            raise Refusal(403, "", said)
        if ("model", name) in self._repositories:
            raise Refusal(409, "", "You already created this model repo")
        made = self._repositories["model", name] = Repository("model", name)
        made.private = asked.get("visibility") == "private"
        rules = "".join(f"*{each} filter=lfs diff=lfs merge=lfs -text\n" for each in LFS_SUFFIXES)
        first = {".gitattributes": File.of(".gitattributes", rules.encode())}
        made.add("main", Commit(f"model {name}", first))
        return _json({"url": f"{self.url}/{name}", "name": name})

    def _refuse_reader(self, name: str, token: str | None) -> None:
        owner = name.partition("/")[0]
        if not token:
            raise Refusal(401, "", "Invalid username or password.")
        if self.role == "read" or owner not in (self.account, *self.organizations):
            raise Refusal(403, "", "you do not have write access to this repository")

    def _batch(self, name: str, asked: dict, verb: str) -> Reply:
        """LFS's batch and verify: what is stored already is not to be uploaded again."""
        if verb == "verify":
            stored = self.stored.get(asked["oid"])
            if stored is None or len(stored) != asked["size"]:
                raise Refusal(404, "", "the object does not exist")
            return _json({})
        objects = []
        for each in asked["objects"]:
            upload = {"href": f"{self.url}/lfs-store/{each['oid']}"}
            verify = {"href": f"{self.url}/{name}.git/info/lfs/objects/verify"}
            missing = each["oid"] not in self.stored
            actions = {"actions": {"upload": upload, "verify": verify}} if missing else {}
            objects.append({"oid": each["oid"], "size": each["size"], **actions})
        return _json({"transfer": "basic", "objects": objects})

    def _write(
        self, repository: Repository, verb: str, revision: str, body: bytes, token: str | None
    ) -> Reply:
        self._refuse_reader(repository.name, token)
        if verb == "branch":
            if revision in repository.refs:
                raise Refusal(409, "", "Reference already exists")
            repository.refs[revision] = repository.at("main").sha
            return _json({})
        head = repository.at(revision)
        if verb == "preupload":
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if goes_by_lfs(each["path"], each["size"]) else "regular",
                    "shouldIgnore": False,
                    "oid": head.files[each["path"]].etag if each["path"] in head.files else None,
                }
                for each in json.loads(body)["files"]
            ]
            return _json({"files": files})
        return self._commit(repository, revision, [json.loads(line) for line in body.splitlines()])

    def _commit(self, repository: Repository, revision: str, lines: list[dict]) -> Reply:
        head, (header, *operations) = repository.at(revision), lines
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != head.sha:
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for each in operations:
            value = each["value"]
            if each["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    raise Refusal(422, "", f"the object of {value['path']} does not exist")
                data = self.stored[value["oid"]]
            else:
                assert each["key"] == "file", each["key"]
                data = base64.b64decode(value["content"])
            files[value["path"]] = File.of(value["path"], data)
        made = Commit(f"model {repository.name} {head.sha}", files)
        repository.add(revision, made)
        address = f"{self.url}/{repository.name}/commit/{made.sha}"
        return _json({"commitUrl": address, "commitOid": made.sha, "pullRequestUrl": None})

    def files_of(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a branch of a model holds."""
        commit = self._repositories["model", name].at(revision)
        return {path: file.data for path, file in commit.files.items()}

    def is_private(self, name: str) -> bool:
        return self._repositories["model", name].private

    def _repository(self, kind: str, name: str, token: str | None) -> Repository:
        found = self._repositories.get((kind, name))
        if found and (token or not found.private):
            return found
        if token:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        raise Refusal(
            401, "RepoNotFound", "Invalid username or password."
        )  # strangers are not told what exists


def _json(value: object) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def _validate(card: str) -> Reply:
    """The hub's opinion of a card's metadata: YAML, and of the right kinds."""
    front = re.match(r"---\n(.*?)^---", card, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(front[1]) if front else {}
        said = "" if isinstance(data, dict) else "metadata must be a mapping"
    except yaml.YAMLError as error:
        said, data = str(error), {}
    if isinstance(data, dict) and "/" not in str(data.get("base_model", "a/b")):
        said = '"base_model" with value is not valid. Use a model id from https://hf.co/models.'
    body = {"errors": [{"message": said}] if said else [], "warnings": []}
    return Reply(
        400 if said else 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
    )


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
        body = self._read_body()
        try:
            reply = self.server.hub.answer(
                self.command, self.path, body, self.headers.get("Authorization")
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

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = _reply

    def log_message(self, *line: object) -> None:
        """Silent: `requests` is the log."""
