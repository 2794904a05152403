"""`lora serve`: the models of one base answer over OpenAI's API."""

from __future__ import annotations

import errno
import importlib
import ipaddress
import json
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lora_cli.common import LoraError, UsageError, quote, ui
from lora_cli.evaluate import answerers, hf_answerers, loaded_bases, open_answerers
from lora_cli.gguf import engine
from lora_cli.models import Base, names, read_adapter
from lora_cli.serve.adapters import name_model, name_served, refuse_other_bases
from lora_cli.serve.desk import Engine
from lora_cli.serve.gguf_engine import GGUFEngine
from lora_cli.serve.torch_engine import TorchEngine

LOCAL = ("localhost", "127.0.0.1", "[::1]")
"""What browsers and programs call this machine itself."""


class Address(NamedTuple):
    """Where the server listens, and who may ask: `key` is None for anybody, and `was_made` says
    that nobody has seen it yet."""

    host: str
    port: int
    key: str | None
    was_made: bool

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return is_loopback(self.host)


class Sizes(NamedTuple):
    """What the command line allows: megabytes of a body, tokens of an answer, of prompt and answer
    together (None: as the model has positions), seconds of a request, requests at a time, and
    seconds of grace."""

    max_body: float
    max_new_tokens: int
    context: int | None
    timeout: float
    places: int
    grace: float


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine to itself alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def settle_address(host: str, port: int, key: str | None, without_key: bool) -> Address:
    """Return where to listen, with a random key where none is given. Raises UsageError for what
    would let others in unasked."""
    if key is not None and without_key:
        raise UsageError("--api-key and --no-api-key are both given", "leave one out")
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise UsageError(
            "--api-key has to be characters of ASCII without spaces, and some",
            "leave it out: a random one is made",
        )
    if re.fullmatch(r"\[[0-9A-Fa-f:.]+\]", host):  # as an address spells it
        host = host[1:-1]
    given = key is not None or without_key
    if not given and not is_loopback(host):
        raise UsageError(
            f"--host {host} lets other machines ask, and no --api-key says which may",
            f"LORA_API_KEY=… lora serve PATH --host {quote(host)}, or --no-api-key for anybody",
        )
    made = None if without_key else key or secrets.token_hex(16)
    return Address(host, port, made, not given)


def serve(
    path: str, adapters: Sequence[str], base: str | None, address: Address, sizes: Sizes
) -> None:
    """Load the models, listen, and answer until a signal ends it. Raises LoraError."""
    refuse_missing_packages()
    from lora_cli.serve.app import Service
    from lora_cli.serve.connections import Server
    from lora_cli.serve.limits import Limits

    with _listen(address) as listener:
        engines = open_engines(path, adapters, base, sizes.context)
        limits = Limits(
            int(sizes.max_body * 10**6),
            sizes.max_new_tokens,
            sizes.timeout,
            sizes.places,
            sizes.grace,
        )
        hosts = {*LOCAL, address.host.lower()} if address.is_local else set()
        service = Service(engines, limits, address.key, hosts)
        port = listener.getsockname()[1]
        _say_where(address, port, list(engines))
        Server(service).run(sockets=[listener])


def refuse_missing_packages() -> None:
    """Raise LoraError where the packages of the extra are not installed."""
    for name in ("uvicorn", "starlette"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise LoraError(
                f"serving needs {name}, which is not installed", "pip install 'lora-cli[serve]'"
            ) from error


def _listen(address: Address) -> socket.socket:
    """Return a socket that has the port. Raises LoraError where it cannot."""
    where = f"{address.host}:{address.port}"
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, place = found[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        # a second server that was started meanwhile is refused here, not after loading
        listener.listen(2048)
    except UnicodeError:  # of a name with an empty part, or one of over 63 letters
        raise LoraError(f"--host {address.host} is no machine", "--host 127.0.0.1") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise LoraError(f"{where} is in use", "--port 0 takes one that is free") from None
        said = error.strerror or str(error)
        raise LoraError(f"{where} cannot be listened at: {said}", "--host 127.0.0.1") from None
    return listener


def open_engines(
    path: str, adapters: Sequence[str], base: str | None, context: int | None
) -> Mapping[str, Engine]:
    """Load what is served; return who writes for each name. Raises LoraError."""
    kind, given = names.classify(path), name_served(path, adapters, base)
    if kind == "gguf":
        name, size = Path(path).stem, context or engine.CONTEXT
        return {name: GGUFEngine(name, engine.GGUFModel(Path(path), n_ctx=size), size)}
    if kind == "adapter":
        found = _open_torch(given, base)
        if len(found) == len(given):
            ui.say(
                "the base itself is not served: its adapters have it in another form, or its name"
            )
    else:
        found = _open_torch(given, path) if given else {}
        if name_model(path) not in found:
            opened = open_answerers.open_models([path])[path]
            found = {name_model(path): _require_conversing(path, opened), **found}
    writer = TorchEngine(found, context)
    return dict.fromkeys(found, writer)


def _open_torch(given: Mapping[str, str], base: str | None) -> dict[str, hf_answerers.HFAnswerer]:
    """Open adapters on one base, and the base itself where it costs no memory. Raises LoraError for
    those of several bases."""
    bases = {}
    for name, path in given.items():
        adapter = read_adapter(Path(path), base)
        open_answerers.refuse_other_task(path, adapter.base.task)
        adapter.refuse_other_base()
        bases[name] = adapter.base
    refuse_other_bases(bases)
    opened = open_answerers.open_models(list(dict.fromkeys(given.values())), base)
    found = {name: _require_conversing(path, opened[path]) for name, path in given.items()}
    return found | _share_base(next(iter(bases.values())), found)


def _share_base(
    base: Base, adapters: Mapping[str, hf_answerers.HFAnswerer]
) -> dict[str, hf_answerers.HFAnswerer]:
    """Return the base under its name, where an adapter's is loaded as it would be alone."""
    wanted = loaded_bases.Stored(base, base.dtype)
    name = name_model(base.name)
    for other in adapters.values():
        if other.key == wanted and name not in adapters:
            made = open_answerers.open_base(base.name, other.bases, adapters.values())
            return {name: made}
    return {}


def _require_conversing(path: str, opened: answerers.Answerer) -> hf_answerers.HFAnswerer:
    """Return what answers; raise UsageError for a model that makes one text of another."""
    is_pair = isinstance(opened, hf_answerers.PairAnswerer)
    if is_pair or not isinstance(opened, hf_answerers.HFAnswerer):
        raise UsageError(
            f"{path} reads a text and writes another: it holds no conversation",
            f"lora predict {quote(path)} --data FILE",
        )
    return opened


def _say_where(address: Address, port: int, models: Sequence[str]) -> None:
    """Say where the server is, and how to ask it."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    url = f"http://{host}:{port}/v1"
    ui.say(f"serving {', '.join(models)} at {url}; Ctrl-C ends it")
    if address.key is None:
        ui.warn("no key is asked for: whoever reaches this port may ask")
    elif address.was_made:
        ui.say(f"its key, made for this time: {address.key}")
    key = address.key if address.was_made else "THE_KEY"
    question = {"role": "user", "content": "Hello!"}
    asked = json.dumps({"model": models[0], "messages": [question]})
    if address.key is not None:
        ui.say(f"  export OPENAI_API_KEY={key} OPENAI_BASE_URL={url}")
    known = ' -H "Authorization: Bearer $OPENAI_API_KEY"' if address.key is not None else ""
    ui.say(
        f"  curl {url}/chat/completions{known} -H 'Content-Type: application/json' "
        f"-d {quote(asked)}"
    )
