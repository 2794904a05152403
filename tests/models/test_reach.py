"""Whether the hub can be reached is told at once, and told of what stands in between: the hub itself,
a proxy, or nothing because nothing was to be asked.

Hermetic: sockets of the loopback interface. Alone: pytest tests/models/test_reach.py
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import constants

from lora_cli.common import LoraError
from lora_cli.models import reach

VARIABLES = [f"{kind}_proxy" for kind in ("http", "https", "all", "no")]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def listening() -> Iterator[int]:
    """A port at which somebody answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed() -> Iterator[int]:
    """A port at which nobody does, kept from others meanwhile: bound, and not listened at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def put_hub_at(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)


def test_a_hub_that_answers_is_not_refused(monkeypatch, listening: int) -> None:
    put_hub_at(monkeypatch, f"http://127.0.0.1:{listening}")
    reach.refuse_unreachable("org/model")


def test_a_hub_that_does_not_is_named_at_once(monkeypatch, closed: int) -> None:
    put_hub_at(monkeypatch, f"http://127.0.0.1:{closed}")
    begun = time.monotonic()
    with pytest.raises(LoraError) as raised:
        reach.refuse_unreachable("org/model")
    assert time.monotonic() - begun < 5
    assert raised.value.message == (
        "org/model is not on this machine, and the hub cannot be reached: "
        f"127.0.0.1 port {closed}: Connection refused"
    )
    assert raised.value.hint.startswith(f"curl -I http://127.0.0.1:{closed} tells when it can; ")


def test_a_name_that_no_server_knows_is_told_as_the_system_does(monkeypatch) -> None:
    put_hub_at(monkeypatch, "https://hub.invalid")
    with pytest.raises(LoraError, match=r"hub\.invalid port 443: .*\w") as raised:
        reach.refuse_unreachable("org/model")
    assert isinstance(raised.value.__cause__, OSError)


def test_it_is_the_proxy_that_is_asked_and_named_without_its_password(
    monkeypatch, closed: int, listening: int
) -> None:
    put_hub_at(monkeypatch, f"http://127.0.0.1:{listening}")
    monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{closed}")
    with pytest.raises(LoraError) as raised:
        reach.refuse_unreachable("org/model")
    assert f"the proxy to the hub does not answer: 127.0.0.1 port {closed}" in raised.value.message
    assert "secret" not in str(raised.value)
    assert raised.value.hint.startswith("unset HTTP_PROXY, ")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reach.refuse_unreachable("org/model")


def test_a_proxy_that_answers_is_enough(monkeypatch, closed: int, listening: int) -> None:
    put_hub_at(monkeypatch, f"http://127.0.0.1:{closed}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{listening}")
    reach.refuse_unreachable("org/model")


def test_nothing_is_tried_offline(monkeypatch, closed: int) -> None:
    put_hub_at(monkeypatch, f"http://127.0.0.1:{closed}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reach.refuse_unreachable("org/model")
