"""Tell in a moment that the hub cannot be reached at all, where huggingface_hub asks six times in
half a minute."""

from __future__ import annotations

import socket
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, is_offline_mode

from lora_cli.common import LoraError, quote

LONGEST = 10.0
"""Seconds that an address is given to answer: as many as huggingface_hub gives it."""
PORTS = {"http": 80, "https": 443, "socks5": 1080, "socks5h": 1080}


class Door(NamedTuple):
    """What a request for the hub goes to first: a host, its port, and the variable that says so
    where it is a proxy."""

    host: str
    port: int
    variable: str | None


def refuse_unreachable(name: str) -> None:
    """Raise LoraError, with what the system says, where no connection to the hub is possible.

    `name` is what was to be read there. One connection is opened, to the hub or to the proxy in
    front of it, and closed unused. Nothing is tried offline.
    """
    if is_offline_mode():
        return
    door = _find_door(urlsplit(constants.ENDPOINT))
    try:
        socket.create_connection((door.host, door.port), LONGEST).close()
    except OSError as error:
        why = f"{door.host} port {door.port}: {error.strerror or error}"
        raise _explain(name, door, why) from error


def _find_door(hub: SplitResult) -> Door:
    """Return the hub's own address, or that of the proxy that the environment names for it."""
    host = hub.hostname or ""
    proxies = {} if proxy_bypass(host) else getproxies()
    for kind in (hub.scheme, "all"):
        if kind in proxies:
            proxy = urlsplit(proxies[kind])
            port = proxy.port or PORTS.get(proxy.scheme, 80)
            return Door(proxy.hostname or "", port, f"{kind.upper()}_PROXY")
    return Door(host, hub.port or PORTS[hub.scheme], None)


def _explain(name: str, door: Door, why: str) -> LoraError:
    if door.variable:
        return LoraError(
            f"{name} is not on this machine, and the proxy to the hub does not answer: {why}",
            f"unset {door.variable}, or set it to a proxy that runs",
        )
    return LoraError(
        f"{name} is not on this machine, and the hub cannot be reached: {why}",
        f"curl -I {quote(constants.ENDPOINT)} tells when it can; a model's folder needs no hub",
    )
