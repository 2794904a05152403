"""Ask `lora serve` by many clients at a time, well-behaved ones and others: how many were answered,
how many refused, how fast, and what it took.

    python scripts/bench_serve.py PATH [--requests 200] [--max-tokens 32] [-- OPTIONS]

OPTIONS are those of `lora serve`. Each phase asks the same server, which has to be there
afterwards. An answer counts as right where it is, to the letter, the one that the same question got
alone. `--checked` exits with 1 where one is
wrong, or where a request got no status.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import re
import secrets
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import psutil

WORDS = "red dog sun map bus gas ice zoo mud ant bee cat".split()
KEY = secrets.token_hex(16)


class Outcome(NamedTuple):
    """What became of a request: its status (or what went wrong), seconds, tokens, and whether the
    answer is the right one."""

    status: str
    seconds: float
    tokens: int = 0
    is_right: bool = True


class Server:
    """`lora serve`, its most memory looked at ten times a second."""

    def __init__(self, path: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "lora_cli", "serve", path, "--port", "0", *options]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "LORA_API_KEY": KEY}
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"serving ([^,\s]+).* at http://127.0.0.1:(\d+)/", line):
                self.model, self.port = found[1], int(found[2])
                break
        else:
            raise SystemExit("it did not start: ask it by hand")
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.peak = 0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        own = psutil.Process(self.process.pid)
        while self.process.poll() is None:
            try:
                found = [own, *own.children(recursive=True)]
                self.peak = max(self.peak, sum(each.memory_info().rss for each in found))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.1)

    def ask(self, body: bytes, timeout: float = 600.0) -> tuple[int, dict[str, Any]]:
        """Return the status and the JSON of a reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", "/v1/chat/completions", body, make_headers())
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()


def make_headers() -> dict[str, str]:
    """Return the headers of a request that is let in."""
    return {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


def make_body(model: str, number: int, tokens: int, **more: Any) -> bytes:
    """Return one of a few questions."""
    text = " ".join(WORDS[(number + each) % len(WORDS)] for each in range(number % 4 + 2))
    message = {"role": "user", "content": f"Reverse: {text}"}
    given = {"model": model, "messages": [message], "max_tokens": tokens, "temperature": 0}
    return json.dumps(given | more).encode()


def measure(ask: Callable[[], tuple[str, int, bool]]) -> Outcome:
    """Return the outcome of a request."""
    begun = time.monotonic()
    try:
        status, tokens, is_right = ask()
    except (OSError, http.client.HTTPException) as error:
        return Outcome(type(error).__name__, time.monotonic() - begun)
    return Outcome(status, time.monotonic() - begun, tokens, is_right)


def at_once(asks: list[Callable[[], tuple[str, int, bool]]]) -> tuple[list[Outcome], float]:
    """Ask all at a time; return the outcomes, and the seconds of all."""
    found: list[Outcome] = []
    begun = time.monotonic()
    threads = [threading.Thread(target=lambda a=ask: found.append(measure(a))) for ask in asks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, time.monotonic() - begun


def ask_whole(server: Server, number: int, tokens: int, right: dict[int, str]) -> Any:
    """Return what asks one question and compares the answer."""

    def ask() -> tuple[str, int, bool]:
        status, reply = server.ask(make_body(server.model, number, tokens))
        if status != 200:
            return str(status), 0, True
        said = reply["choices"][0]["message"]["content"]
        return "200", reply["usage"]["completion_tokens"], said == right[number % 12]

    return ask


def ask_long(server: Server) -> Any:
    """Return what asks with 10 MB, more than is let in."""
    body = make_body(server.model, 0, 4, user="x" * 10_000_000)
    return lambda: (str(server.ask(body)[0]), 0, True)


def ask_wordy(server: Server) -> Any:
    """Return what asks a question of 7 MB, which is let in and too long for any model."""
    message = {"role": "user", "content": "dog " * 1_750_000}
    body = json.dumps({"model": server.model, "messages": [message]}).encode()
    return lambda: (str(server.ask(body)[0]), 0, True)


def ask_half(server: Server) -> Any:
    """Return what sends half of a body and waits."""

    def ask() -> tuple[str, int, bool]:
        with socket.create_connection(("127.0.0.1", server.port), timeout=120) as client:
            head = "".join(f"{name}: {value}\r\n" for name, value in make_headers().items())
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}"
                'Content-Length: 500\r\n\r\n{"model":'.encode()
            )
            return client.recv(64).split()[1].decode(), 0, True

    return ask


def ask_slowly(server: Server, tokens: int) -> Any:
    """Return what asks for a stream and reads none of it for a while."""

    def ask() -> tuple[str, int, bool]:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(300)
        with client:
            client.connect(("127.0.0.1", server.port))
            more = {"stream": True, "logprobs": True, "top_logprobs": 20}
            body = make_body(server.model, 0, tokens, **more)
            head = "".join(f"{name}: {value}\r\n" for name, value in make_headers().items())
            client.sendall(
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n{head}"
                f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            time.sleep(5)
            return client.recv(64).split()[1].decode(), 0, True

    return ask


def tell(name: str, server: Server, outcomes: list[Outcome], seconds: float) -> bool:
    """Print a line; return whether nothing went wrong."""
    good = [each for each in outcomes if each.status == "200"]
    counts = collections.Counter(each.status for each in outcomes if each.status != "200")
    times = sorted(each.seconds for each in good or outcomes)
    middle, late = statistics.median(times), times[int(len(times) * 0.95)]
    wrong = sum(not each.is_right for each in outcomes)
    others = ", ".join(f"{count}x {status}" for status, count in sorted(counts.items())) or "-"
    rate = sum(each.tokens for each in good) / seconds
    print(
        f"| {name} | {len(outcomes)} | {len(good)} | {others} | {wrong} "
        f"| {middle:.2f} | {late:.2f} | {rate:.0f} | {server.peak / 2**20:,.0f} |",
        flush=True,
    )
    return not wrong and all(each.status.isdigit() for each in outcomes)


def main() -> None:
    """Start the server, run the phases, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--checked", action="store_true")
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[: own.index("--")], own[own.index("--") + 1 :]
    given = parser.parse_args(own)
    server = Server(given.path, options)
    tokens, count = given.max_tokens, given.requests
    right = {}
    for number in range(len(WORDS)):
        status, reply = server.ask(make_body(server.model, number, tokens))
        assert status == 200, reply
        right[number] = reply["choices"][0]["message"]["content"]
    print("| phase | requests | ok | others | wrong | p50 s | p95 s | tokens/s | peak RSS MiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    usual = [ask_whole(server, number, tokens, right) for number in range(count)]
    one, begun = [measure(each) for each in usual[:12]], 0.0
    begun = sum(each.seconds for each in one)
    fine = tell("one after the other", server, one, begun)
    few = count // 10
    for name, asks in (
        (f"{count} at a time", usual),
        ("10 MB each", [ask_long(server) for _ in range(few)]),
        ("7 MB of words each", [ask_wordy(server) for _ in range(few)]),
        ("half-sent bodies", [ask_half(server) for _ in range(few)]),
        ("slow readers", [ask_slowly(server, tokens) for _ in range(few)]),
        (
            "all of these",
            usual[: count // 2]
            + [ask_long(server) for _ in range(few)]
            + [ask_half(server) for _ in range(few)]
            + [ask_slowly(server, tokens) for _ in range(few)],
        ),
        ("one after the other, again", usual[:12]),
    ):
        if name.startswith("one after"):
            outcomes = [measure(each) for each in asks]
            seconds = sum(each.seconds for each in outcomes)
        else:
            outcomes, seconds = at_once(asks)
        fine = tell(name, server, outcomes, seconds) and fine
    server.process.terminate()
    status = server.process.wait(60)
    print(f"ended by SIGTERM with {status}", file=sys.stderr)
    sys.exit(given.checked and not (fine and status == 143))


if __name__ == "__main__":
    main()
