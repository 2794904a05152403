"""Open objects of stores by their addresses: what a store says of one, and how it is copied here.

https by the client that huggingface_hub brings; the others by fsspec's packages, which find their
credentials and settings in the environment and in files of their own.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from lora_cli.common import LoraError, library_errors, privacy, quote

PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "https": None,
}
"""The protocols that are taken, and the package that fsspec needs for each."""
AZURE = ("az", "abfs", "abfss")
ACCOUNT = re.compile(r"[\w-]+@[a-z0-9]{3,24}\.(dfs|blob)\.core\.windows\.net")
"""A container at an account's host; credentials are sent to no other."""
ETAG = re.compile(r'(W/)?"[!-~]*"')
CONNECT, READ = 10.0, 60.0
"""Seconds that an https server may take to be reached, and to send the next bytes."""
ABSENT = {"FileNotFoundError", "ResourceNotFoundError"}
FORBIDDEN = {
    "PermissionError", "ClientAuthenticationError", "GoogleAuthError", "CredentialUnavailableError",
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
    "SSOTokenLoadError", "UnauthorizedSSOTokenError", "TokenRetrievalError",
}  # fmt: skip
UNREACHABLE = {
    "ConnectionError", "TimeoutError", "gaierror", "TransportError", "HTTPClientError",
    "ConnectionClosedError", "ClientConnectionError", "ClientPayloadError", "ServiceRequestError",
    "ServiceResponseError",
}  # fmt: skip
"""Names of exceptions, or of their bases, of Python, httpx, botocore, aiohttp, google.auth and
azure.core."""

_silent = set[str]()
"""Stores that did not answer this process: who trains without a connection waits for each once."""


class Unreachable(LoraError):
    """A store that does not answer."""


class Found(NamedTuple):
    """What a store says of an object, and what copies it to a file and tells how many bytes have
    come."""

    version: str
    """Changes with the content; empty where the store says nothing of the kind."""
    size: int | None
    copy: Callable[[Path, Callable[[int], None]], None]


def is_address(name: str) -> bool:
    """Return whether a name of data is an address, and no path or name on the hub."""
    return "://" in name


def is_pattern(name: str) -> bool:
    """Return whether an address stands for the objects that a store lists by it."""
    return not name.lower().startswith("https:") and glob.has_magic(name)


def refuse_address(field: str, name: str) -> None:
    """Raise LoraError for an address that is not taken, whose package is missing, or that holds
    credentials."""
    scheme, _, rest = name.partition("://")
    scheme, host = scheme.lower(), re.split("[/?#]", rest)[0]
    if scheme not in PACKAGES or (PACKAGES[scheme] and "::" in name):  # which fsspec takes apart
        raise LoraError(
            f"data.{field}: {name} is an address of a kind that is not read; "
            f"{', '.join(f'{each}://' for each in PACKAGES)} are",
            _suggest_instead(scheme, name),
        )
    if privacy.find_held_secret(name) or ("@" in host and scheme not in AZURE):
        raise LoraError(
            f"data.{field}: {name} holds credentials, which would be copied into the run's folder",
            "curl -fLo rows.jsonl 'ADDRESS', and name that file",
        )
    if "@" in host and not ACCOUNT.fullmatch(host):
        raise LoraError(
            f"data.{field}: {name}: after @ stands no account of Azure's",
            f"{scheme}://CONTAINER@ACCOUNT.dfs.core.windows.net/rows.jsonl",
        )
    if not host or (scheme == "https" and "*" in name):
        raise LoraError(
            f"data.{field}: {name} names no object" + (": https cannot list them" if host else ""),
            "name each by its own address, in a list",
        )
    package = PACKAGES[scheme]
    if package and name.endswith("/"):
        raise LoraError(f"data.{field}: {name} is a folder", f"name what is in it: {name}*.jsonl")
    if package and find_spec(package) is None:
        raise LoraError(
            f"data.{field}: {name} needs the package {package}",
            f"pip install {package} fsspec=={version('fsspec')}",
        )


def _suggest_instead(scheme: str, name: str) -> str:
    """Return what to do about an address that is not taken."""
    others = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}
    if "::" in name:
        return "name the file alone: each is fetched once and kept"
    if scheme in others:
        return f"{others[scheme]}://{name.partition('://')[2]}"
    if scheme == "file":
        return f"ls {quote(name.partition('://')[2] or '.')}, and name the path alone"
    if scheme == "hf":
        return "a data set on the hub is OWNER/NAME"
    if scheme in ("http", "ftp"):
        return f"curl -fLO {quote(name)}, and name that file"
    return "fetch it, and name the file"


def name_file(url: str) -> str:
    """Return the name that an object's file has here: the last part of its path, which says what
    kind it is."""
    path = url.partition("://")[2]
    if url.lower().startswith("https:"):
        path = re.split("[?#]", path)[0]
    return re.sub(r"[^\w.-]", "_", PurePosixPath(path).name, flags=re.ASCII)[-100:]


@contextmanager
def translate(url: str) -> Iterator[None]:
    """Turn whatever a store's library raises into a LoraError that names the address: Unreachable
    where the store does not answer, and again at once where it did not before."""
    scheme, _, rest = url.partition("://")
    store = rest.partition("/")[0] if scheme.lower() == "https" else scheme
    if store in _silent:
        said = "cannot be reached: its store did not answer before"
        raise Unreachable(f"{url} {said}", _suggest_connection(scheme))
    try:
        yield
    except LoraError:
        raise
    except Exception as error:
        explained = _explain(url, error)
        if isinstance(explained, Unreachable):
            _silent.add(store)
        raise explained from error


def _first_words(error: Exception) -> str:
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}"[: library_errors.LONGEST]


def _explain(url: str, error: Exception) -> LoraError:
    known = library_errors.translate(error)
    if isinstance(error, OSError) and error.errno in library_errors.NO_ROOM and known:
        return LoraError(f"{url} cannot be kept: {known.message}", known.hint)
    said, scheme = _first_words(error), url.partition("://")[0].lower()
    link: BaseException | None = error
    while link is not None:
        kinds = {kind.__name__ for kind in type(link).__mro__}
        if kinds & ABSENT:
            return LoraError(f"{url} does not exist", suggest_listing(url))
        if kinds & FORBIDDEN or _is_refusal(link):
            return LoraError(f"{url} may not be read: {said}", _suggest_login(scheme, url))
        if kinds & UNREACHABLE:
            return Unreachable(
                f"{url} cannot be reached: {said}", _suggest_connection(scheme, said)
            )
        link = link.__cause__
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if library_errors.PACKAGE in Path(frame.f_code.co_filename).parents:
        raise error  # a bug of ours
    hint: str | None = "check the address, or fetch it, and name the file"
    if known and isinstance(error, ImportError):
        hint = known.hint
    return LoraError(f"{url} cannot be fetched: {said}", hint)


def _is_refusal(error: BaseException) -> bool:
    """Return whether it stands for HTTP's 401 or 403: gcsfs and azure.core say so in other ways."""
    codes = {str(getattr(error, name, "")) for name in ("code", "status", "status_code")}
    return bool(codes & {"401", "403"}) or str(error).startswith("Forbidden")


def suggest_listing(url: str) -> str:
    """Return the command that shows whether an object is there, or what is beside it."""
    scheme = url.partition("://")[0].lower()
    if scheme == "https":
        return f"curl -IL {quote(url)}"
    folder = f"{url.rpartition('/')[0]}/"
    commands = {"s3": f"aws s3 ls {quote(folder)}", "gs": f"gcloud storage ls {quote(folder)}"}
    return commands.get(scheme, "check the account, the container and the name")


def _suggest_login(scheme: str, url: str) -> str:
    return {
        "s3": "aws configure, or AWS_PROFILE=NAME; for a public bucket: export FSSPEC_S3_ANON=true",
        "gs": "gcloud auth application-default login; for a public bucket: "
        "export FSSPEC_GS_TOKEN=anon",
        "https": f"lora sends no credentials there: curl -fLO {quote(url)}, with yours",
    }.get(scheme, "az login, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY")


def _suggest_connection(scheme: str, said: str = "") -> str:
    if "CERTIFICATE" in said:
        return "check the machine's clock, and its certificates (SSL_CERT_FILE)"
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:
        return f"does {endpoint} answer? AWS_ENDPOINT_URL says that the store is there"
    return "is there a connection? Fetch it where there is one, and name the file"


def list_objects(url: str) -> list[str]:
    """Return the addresses of the objects that an address with a pattern (`rows-*.jsonl`) stands
    for, in order; of one without, itself."""
    if not is_pattern(url):
        return [url]
    store, path = _find_store(url)
    store.invalidate_cache()
    scheme, _, rest = url.partition("://")
    container = rest.partition("/")[0]
    found = store.glob(path, detail=True)
    names = sorted(name for name, about in found.items() if about["type"] == "file")
    return [f"{scheme}://{container}/{name.partition('/')[2]}" for name in names]


def _find_store(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for an address, and the object's path in it."""
    import fsspec

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints what it raises
    scheme, _, rest = url.partition("://")
    return fsspec.core.url_to_fs(f"{scheme.lower()}://{rest}")


@contextmanager
def open_object(url: str, known: str) -> Iterator[Found | None]:
    """Yield what the store says of an object; None where that is only that its version is still the
    one that is `known`."""
    if url.lower().startswith("https:"):
        with _open_https(url, known) as found:
            yield found
        return
    store, path = _find_store(url)
    about = store.info(path)
    if about["type"] != "file":
        raise LoraError(f"{url} is a folder", f"name what is in it: {url}/*.jsonl")

    def copy(file: Path, show: Callable[[int], None]) -> None:
        from fsspec.callbacks import Callback

        def tell(_size: int, value: int, **_: Any) -> None:
            show(value)

        store.get_file(path, str(file), callback=Callback(hooks={"tell": tell}))
        store.invalidate_cache(path)
        if _find_version(store, path, store.info(path)) != before:
            raise LoraError(f"{url} was changed while it was fetched", "run it again")

    before = _find_version(store, path, about)
    yield Found(before, about["size"], copy)


def _find_version(store: Any, path: str, about: dict[str, Any]) -> str:
    """Return what tells one content of an object from another: its ETag, or a hash of all that the
    store says of it."""
    return str(about.get("ETag") or about.get("etag") or store.ukey(path))


@contextmanager
def _open_https(url: str, known: str) -> Iterator[Found | None]:
    import httpx2

    headers = {"accept-encoding": "identity", "user-agent": "lora-cli"}
    if ETAG.fullmatch(known):
        headers["if-none-match"] = known
    with (
        httpx2.Client(
            follow_redirects=True,
            timeout=httpx2.Timeout(READ, connect=CONNECT),
            event_hooks={"request": [partial(_refuse_plain, url)]},
        ) as client,
        client.stream("GET", url, headers=headers) as response,
    ):
        if response.status_code == 304 and "if-none-match" in headers:
            yield None
            return
        _refuse_answer(url, response)

        def copy(file: Path, show: Callable[[int], None]) -> None:
            with file.open("wb") as stream:
                for block in response.iter_raw():
                    stream.write(block)
                    show(stream.tell())

        told = response.headers
        size = told.get("content-length")
        yield Found(
            told.get("etag") or told.get("last-modified") or "", int(size) if size else None, copy
        )


def _refuse_plain(url: str, request: Any) -> None:
    """Raise LoraError where an https server leads to an address without encryption, as services
    that give out a machine's credentials have."""
    if request.url.scheme != "https":
        raise LoraError(
            f"{url} leads to {request.url}, which is not https",
            f"curl -fLO {quote(url)}, if you trust it, and name that file",
        )


def _refuse_answer(url: str, response: Any) -> None:
    """Raise what an answer says that is not the object itself."""
    status, told = response.status_code, response.headers
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, "not found", url)
    if status in (401, 403, 407):
        raise PermissionError(errno.EACCES, f"the server answered {status}", url)
    if status != 200:
        raise ConnectionError(f"the server answered {status}")
    packed = told.get("content-encoding", "identity")
    if packed != "identity" and not (packed == "gzip" and name_file(url).lower().endswith(".gz")):
        raise LoraError(
            f"{url}: the server packs it ({packed}), which was not asked for",
            f"curl -fLO --compressed {quote(url)}, and name that file",
        )
    if told.get("content-type", "").startswith("text/html"):
        raise LoraError(
            f"{url} is a web page, not a file of rows",
            "give the address that its download has, not that of the page about it",
        )
