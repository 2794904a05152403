"""Stores on the loopback interface: an https server that may misbehave, and moto's S3."""

from __future__ import annotations

import hashlib
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.server import ThreadedMotoServer

KEYS = {
    "AWS_ACCESS_KEY_ID": "testing-name",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
}


class Answer(NamedTuple):
    """What the https server says to a path: a body, of which `sent` bytes come, each tenth of it
    after a pause (s)."""

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    sent: int | None = None
    pause: float = 0.0
    etag: bool = True


class HTTPSServer:
    """An https server of `answers` by path, with a list of what was asked and answered."""

    def __init__(self, folder: Path) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, int]] = []
        self.certificate = _make_certificate(folder)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # noqa: N802
                outer._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # who asked has gone
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, folder / "key.pem")
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.address = f"https://localhost:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        answer = self.answers.get(request.path.partition("?")[0], Answer(status=404))
        tag = f'"{hashlib.md5(answer.body).hexdigest()}"'
        known = answer.etag and request.headers.get("if-none-match") == tag
        status = 304 if known else answer.status
        self.asked.append((request.path, status))
        request.send_response(status)
        for header in answer.headers:
            request.send_header(*header)
        if answer.etag:
            request.send_header("ETag", tag)
        if not known:
            request.send_header("Content-Length", str(len(answer.body)))
        request.end_headers()
        if known:
            return
        body = answer.body[: answer.sent]
        step = max(1, len(body) // 10)
        for at in range(0, len(body), step):
            request.wfile.write(body[at : at + step])
            request.wfile.flush()
            time.sleep(answer.pause)
        request.close_connection = True

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def _make_certificate(folder: Path) -> Path:
    """Write a certificate for this machine, and its key, for an hour."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder / "cert.pem"


class S3(NamedTuple):
    """moto's S3: what a process needs to find it, and a list of what was asked (`GET /b/k`)."""

    environment: dict[str, str]
    asked: list[str]

    def put(self, bucket: str, key: str, body: bytes) -> None:
        """Write an object, by boto3, into a bucket that is made."""
        client = self._connect()
        client.create_bucket(Bucket=bucket)
        client.put_object(Bucket=bucket, Key=key, Body=body)
        self.asked.clear()

    def delete(self, bucket: str, key: str) -> None:
        self._connect().delete_object(Bucket=bucket, Key=key)

    def _connect(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            region_name="us-east-1",
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        )


class _Listening(logging.Handler):
    """Keeps the requests that werkzeug logs."""

    def __init__(self, asked: list[str]) -> None:
        super().__init__()
        self.asked = asked

    def emit(self, record: logging.LogRecord) -> None:
        words = record.getMessage().split('"')
        if len(words) > 2:
            self.asked.append(words[1].removesuffix(" HTTP/1.1"))


@contextmanager
def serve_s3() -> Iterator[S3]:
    """Run moto's S3 on a free port."""
    asked: list[str] = []
    log, handler = logging.getLogger("werkzeug"), _Listening(asked)
    before, log.propagate, level = log.propagate, False, log.level
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3(KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}, asked)
    finally:
        server.stop()
        log.removeHandler(handler)
        log.propagate = before
        log.setLevel(level)
