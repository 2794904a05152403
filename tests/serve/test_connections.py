"""Clients that send half of a request, do not read, go away or are too many; requests that take
too long; the end of the server. uvicorn listens, the model is made up.

Hermetic: sockets of this machine. Alone: pytest tests/serve/test_connections.py
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lora_cli.serve import app, connections, limits
from lora_cli.serve.desk import Desk, Job
from lora_cli.serve.errors import ApiError
from lora_cli.serve.pieces import Drawing, End, Piece

BIG = "x" * 4096


class MadeUp:
    """Writes pieces of 4 KB, so many tokens as are asked for, every millisecond."""

    def __init__(self) -> None:
        self.writing = 0
        self.peak = 0
        self.error: Exception | None = None

    def get_template(self, name):
        return "a template"

    def find_positions(self, name):
        return 10**6

    def measure_longest_token(self, name):
        return 1

    def count_tokens(self, name):
        return 100

    def render(self, name, asked):
        return [1] * len(asked.messages[0]["content"])

    def tokenize(self, name, text):
        return [1] * len(text)

    def write(self, name, prompt, drawing, emit, is_wanted):
        self.writing += 1
        self.peak = max(self.peak, self.writing)
        made = 0
        try:
            if self.error is not None:
                raise self.error
            while made < drawing.max_tokens and is_wanted():
                emit(Piece(BIG, []))
                made += 1
                time.sleep(0.001)
        finally:
            self.writing -= 1
        return End("length", made, BIG * made)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, **more) -> Iterator[tuple[MadeUp, app.Service, int]]:
    for module, name in (
        (limits, "BODY_SECONDS"), (connections, "HEADER_SECONDS"), (connections, "READ_SECONDS")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 0.4)
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1)
    monkeypatch.setattr(connections, "SPARE", 6)
    given = {"max_body": 10**6, "max_tokens": 10**6, "seconds": 60.0, "places": 4, "grace": 0.3}
    engine = MadeUp()
    service = app.Service({"m": engine}, limits.Limits(**given | more), None, {"127.0.0.1"})
    listener = socket.create_server(("127.0.0.1", 0))
    server = connections.Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield engine, service, listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def connect(port: int, room: int | None = None) -> socket.socket:
    """`room`: bytes that the client's side of the connection holds."""
    made = socket.socket()
    if room:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    made.settimeout(10)
    made.connect(("127.0.0.1", port))
    return made


def request(body: bytes, length: int | None = None) -> bytes:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def ask(tokens: int, stream: bool = False) -> bytes:
    message = {"role": "user", "content": "a"}
    return json.dumps(
        {"model": "m", "messages": [message], "max_tokens": tokens, "stream": stream}
    ).encode()


def read_all(client: socket.socket) -> bytes:
    found = b""
    try:
        while part := client.recv(2**16):
            found += part
    except ConnectionResetError:
        pass
    return found


def read_reply(client: socket.socket) -> tuple[int, dict, bytes]:
    """Status, JSON and headers of a reply whose length is told."""
    found = b""
    while b"\r\n\r\n" not in found:
        part = client.recv(2**16)
        assert part, found
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(body) < length:
        body += client.recv(2**16)
    return int(head.split()[1]), json.loads(body), head.lower()


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_free(service: app.Service) -> bool:
    return service.desk.doing is None and not service.desk.waiting


def test_half_a_body_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as (_, service, port), connect(port) as client:
        client.sendall(request(b'{"model":', length=500))
        status, reply, head = read_reply(client)
        assert (status, reply["error"]["code"]) == (408, "request_timeout")
        assert b"connection: close" in head
        assert client.recv(1) == b""
        assert service.bodies.held == 0


def test_half_of_the_headers_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as (_, _, port):
        silent, half, second = (connect(port) for _ in range(3))
        half.sendall(b"GET /health HTTP/1.1\r\nHos")
        second.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert read_reply(second)[0] == 200
        second.sendall(b"GET /hea")  # the next request of a connection, too
        for client in (silent, half, second):
            assert client.recv(1) == b""
            client.close()


def test_a_long_body_is_refused_before_and_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as (_, service, port):
        with connect(port) as told, connect(port) as counted:
            told.sendall(request(b"x" * 2 * 10**6))
            assert read_reply(told)[0] == 413
            head = request(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            counted.sendall(head)
            for _ in range(20):
                counted.sendall(b"186a0\r\n" + b"x" * 100_000 + b"\r\n")
            counted.sendall(b"0\r\n\r\n")
            assert read_reply(counted)[0] == 413
        assert service.bodies.held == 0


def test_bodies_are_bounded_all_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODIES", 2)
    with serving(monkeypatch) as (_, service, port):
        monkeypatch.setattr(limits, "BODY_SECONDS", 5)
        clients = [connect(port) for _ in range(3)]
        for client in clients:
            client.sendall(request(b"x" * 900_000, length=900_001))
        found = []
        for client in clients:
            client.settimeout(0.5)
            try:
                found.append(read_reply(client)[0])
            except TimeoutError:
                found.append(None)
        assert sorted(found, key=str) == [503, None, None]
        for client in clients:
            client.close()
        wait_for(lambda: service.bodies.held == 0)


def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch) as (_, service, port), connect(port, room=4096) as slow:
        slow.sendall(request(ask(10**6, stream=True)))
        wait_for(lambda: not is_free(service))
        wait_for(lambda: is_free(service))
        with connect(port) as other:  # the place is free
            other.sendall(request(ask(1)))
            assert read_reply(other)[0] == 200
        assert b"[DONE]" not in read_all(slow)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place(
    monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    with serving(monkeypatch, places=2) as (engine, service, port):
        doing, waiting = connect(port), connect(port)
        doing.sendall(request(ask(10**6, stream)))
        wait_for(lambda: engine.writing == 1)
        waiting.sendall(request(ask(10**6, stream)))
        wait_for(lambda: len(service.desk.waiting) == 1)
        waiting.close()
        wait_for(lambda: not service.desk.waiting)
        doing.close()
        wait_for(lambda: is_free(service) and engine.writing == 0)


def test_who_is_one_too_many_is_told_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, places=2) as (engine, service, port):
        clients = [connect(port) for _ in range(3)]
        clients[0].sendall(request(ask(10**6)))
        wait_for(lambda: engine.writing == 1)
        clients[1].sendall(request(ask(10**6)))
        wait_for(lambda: len(service.desk.waiting) == 1)
        clients[2].sendall(request(ask(1)))
        status, reply, head = read_reply(clients[2])
        assert (status, reply["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(head.partition(b"retry-after: ")[2].split()[0]) <= 60
        assert engine.peak == 1
        for client in clients:
            client.close()


def test_connections_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(monkeypatch, places=2) as (_, _, port):
        monkeypatch.setattr(connections, "HEADER_SECONDS", 20)
        clients = [connect(port) for _ in range(8)]
        with connect(port) as more:
            status, reply, _ = read_reply(more)
            assert (status, reply["error"]["code"]) == (503, "overloaded")
        for client in clients:
            client.close()


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_has_its_time(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    with serving(monkeypatch, seconds=0.5) as (engine, service, port):
        with connect(port) as first, connect(port) as second:
            first.sendall(request(ask(10**6, stream)))
            wait_for(lambda: engine.writing == 1)
            second.sendall(request(ask(1)))
            if stream:
                found = b""
                while b'"code": "timeout"' not in found:
                    found += first.recv(2**20)
                assert b"[DONE]" not in found
            else:
                status, reply, _ = read_reply(first)
                assert (status, reply["error"]["code"]) == (504, "timeout")
            assert read_reply(second)[0] in (200, 503)
        wait_for(lambda: is_free(service))


def test_what_nobody_thought_of_is_said_once_and_the_server_goes_on(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(monkeypatch) as (engine, _, port), connect(port) as client:
        engine.error = ZeroDivisionError("by zero")
        client.sendall(request(ask(1)))
        status, reply, _ = read_reply(client)
        assert (status, reply["error"]["code"]) == (500, "internal_error")
        assert "zero" not in reply["error"]["message"]
        engine.error = None
        client.sendall(request(ask(1)))
        assert read_reply(client)[0] == 200
    assert capfd.readouterr().err.count("ZeroDivisionError: by zero") == 1


def test_the_end_sends_away_who_waits_and_stops_who_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(monkeypatch) as (engine, service, port):
        doing, waiting = connect(port), connect(port)
        doing.sendall(request(ask(10**6)))
        wait_for(lambda: engine.writing == 1)
        waiting.sendall(request(ask(10**6)))
        wait_for(lambda: len(service.desk.waiting) == 1)
    for client, said in ((waiting, "the server is about to end"), (doing, "the server has ended")):
        status, reply, _ = read_reply(client)
        assert (status, reply["error"]["message"]) == (503, said)
        client.close()
    wait_for(lambda: engine.writing == 0)


def test_a_place_is_free_at_once_when_its_job_is_left() -> None:
    """Also while the model is at its last token: who has read an answer may ask again."""
    go_on = threading.Event()

    class Slow:
        def write(self, *given: object) -> End:
            go_on.wait(20)
            return End("stop", 1, "")

    async def ask_twice() -> None:
        desk = Desk(Slow(), 1)
        jobs = [Job("m", [1], Drawing(1), 30.0) for _ in range(2)]
        desk.take(jobs[0])
        while desk.doing is not jobs[0]:
            await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="1 requests wait already"):
            desk.take(jobs[1])
        desk.leave(jobs[0])
        desk.take(jobs[1])
        go_on.set()
        assert [event.reason async for event in jobs[1].read()] == ["stop"]

    asyncio.run(ask_twice())
