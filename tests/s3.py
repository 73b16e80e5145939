"""An S3 store for tests, and a proxy before it that makes requests fail as real stores do.

    def test_x(bucket):                      # an empty bucket of moto's server, on loopback
        folder = RunFolder(bucket.uri("run"))

    def test_y(bucket, faulty):              # 5 % of all requests fail, some ways of failing
        with faulty(share=0.05, seed=1) as proxy:
            folder = RunFolder(bucket.uri("run", proxy))
        proxy.asked, proxy.failed            # what was asked, by operation; what was done to it

Which request fails depends on the seed, the request and how often it came, not on the order in
which threads send them.
"""

import contextlib
import http.client
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pyarrow.fs as pafs
import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
"""Environment of whoever uses the store; Ray's workers inherit what they find at their start."""

FAULTS = ("slow_down", "internal", "refused", "unheard", "cut", "half", "slow")
"""What a proxy can do to a request:

slow_down   503 SlowDown, nothing done
internal    500 InternalError, nothing done
refused     the connection is dropped before anything is done
unheard     it is done, and the connection dropped before the answer
cut         it is done, and the connection dropped in the middle of the answer's body
half        the connection is dropped in the middle of the request's body, nothing done
slow        it is done, the answer comes `delay_s` later
"""


class Server:
    """moto's server on a free port of loopback."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer  # takes its time

        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"

    def stop(self) -> None:
        self._server.stop()


@dataclass(frozen=True)
class Bucket:
    """A bucket of the server."""

    name: str
    endpoint: str

    def options(self, proxy: "FaultyProxy | None" = None, **more: str) -> str:
        """What comes after the '?' of an address, by way of a proxy or straight."""
        endpoint = proxy.endpoint if proxy else self.endpoint
        values = {"endpoint_override": endpoint, "scheme": "http", "region": "us-east-1", **more}
        return urlencode(values)

    def uri(
        self, path: str = "", proxy: "FaultyProxy | None" = None, keys: str = "", **more: str
    ) -> str:
        """The address of something in it, with the endpoint in it.

        `keys`: `KEY:SECRET@` for processes that have none in their environment.
        """
        return f"s3://{keys}{self.name}/{quote(path)}?{self.options(proxy, **more)}"

    def plain(self, path: str = "") -> str:
        """The address for those who find the endpoint in AWS_ENDPOINT_URL."""
        return f"s3://{self.name}/{quote(path)}"

    @property
    def fs(self) -> Any:
        """The store itself, never by way of a proxy; paths begin with the bucket."""
        return pafs.FileSystem.from_uri(f"s3://{self.name}/?{self.options()}")[0]

    def files(self, folder: str = "") -> dict[str, bytes]:
        """Path below the bucket -> bytes, of every object as any reader sees it."""
        selector = pafs.FileSelector(f"{self.name}/{folder}".rstrip("/"), recursive=True)
        found = {}
        for info in self.fs.get_file_info(selector):
            if info.is_file:
                with self.fs.open_input_file(info.path) as stream:
                    found[info.path.removeprefix(f"{self.name}/")] = stream.read()
        return found

    def put(self, local: Any, path: str) -> None:
        """Copy a folder of this machine into it."""
        pafs.copy_files(str(local), f"{self.name}/{path}", destination_filesystem=self.fs)


class FaultyProxy:
    """Hands requests on to a store, all but a share of them.

    Args:
        target: The store's address, http://HOST:PORT.
        share: Of the requests that fail; may be changed at any time.
        seed: Of the choice.
        faults: Those of FAULTS that there are.
        only: Whether a request may fail, by operation (see `operation`) and path; None: each may.
    """

    delay_s = 0.2

    def __init__(
        self,
        target: str,
        share: float = 0.0,
        seed: int = 0,
        faults: tuple[str, ...] = FAULTS,
        only: Callable[[str, str], bool] | None = None,
    ) -> None:
        self.target, self.share, self.seed, self.faults = target, share, seed, faults
        self.only = only
        self.down = False
        """While true every connection is dropped."""
        self.answer: tuple[int, str] | None = None
        """While set, every request gets this status and S3 error code."""
        self.asked: Counter[str] = Counter()
        """Requests by operation."""
        self.failed: Counter[str] = Counter()
        """Requests by what was done to them."""
        self._times: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = _HTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Take no more requests."""
        self._server.shutdown()
        self._server.server_close()

    def choose(self, method: str, path: str) -> str | None:
        """Count a request and say what is to be done to it."""
        name = operation(method, path)
        with self._lock:
            self.asked[name] += 1
            fault = self._choice(name, path)
            if fault is not None:
                self.failed[fault] += 1
        return fault

    def _choice(self, name: str, path: str) -> str | None:
        if self.down:
            return "refused"
        if self.answer is not None:
            return "answer"
        if self.only is not None and not self.only(name, path):
            return None
        key = (name, _stable(path))
        self._times[key] += 1
        rng = random.Random(f"{self.seed} {key} {self._times[key]}")
        return rng.choice(self.faults) if rng.random() < self.share else None


def operation(method: str, path: str) -> str:
    """S3's name of a request."""
    query = parse_qs(urlsplit(path).query, keep_blank_values=True)
    if method == "GET":
        return "ListObjects" if "list-type" in query or "delimiter" in query else "GetObject"
    if method == "PUT":
        return "UploadPart" if "partNumber" in query else "PutObject"
    if method == "POST":
        for key in ("uploads", "uploadId", "delete"):
            if key in query:
                names = {"uploads": "Create", "uploadId": "Complete", "delete": "DeleteObjects"}
                return names[key] + ("MultipartUpload" if key != "delete" else "")
    return {"HEAD": "HeadObject", "DELETE": "DeleteObject"}.get(method, method)


def _stable(path: str) -> str:
    """A path without what the store makes up anew each time."""
    parts = urlsplit(path)
    made_up = ("uploadId", "continuation-token")
    kept = {k: v for k, v in parse_qs(parts.query).items() if k not in made_up}
    return f"{parts.path}?{sorted(kept.items())}"


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections that break are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    proxy: FaultyProxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        fault = self.proxy.choose(self.command, self.path)
        told = self.headers.get("Transfer-Encoding") or ""
        if fault == "refused":
            return self._drop()
        if fault == "half":
            if "chunked" in told or int(self.headers.get("Content-Length") or 0):
                self.rfile.read1(500)
            return self._drop()
        body = self._body()
        if fault in ("slow_down", "internal", "answer"):
            errors = {"slow_down": (503, "SlowDown"), "internal": (500, "InternalError")}
            return self._error(*errors.get(fault, self.proxy.answer or (500, "InternalError")))
        status, headers, content = self._ask(body)
        if fault == "unheard":
            return self._drop()
        if fault == "slow":
            time.sleep(self.proxy.delay_s)
        self._give(status, headers, content, cut=fault == "cut")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _body(self) -> bytes:
        """The request's body, in one piece or in chunks."""
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            """Trailers."""
        return b"".join(parts)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the store says."""
        where = urlsplit(self.proxy.target)
        store = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
        skipped = ("connection", "expect", "transfer-encoding")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in skipped}
        try:
            store.request(self.command, self.path, body, headers)
            got = store.getresponse()
            return got.status, got.getheaders(), got.read()
        finally:
            store.close()

    def _give(
        self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, value)
        told = {k.lower(): v for k, v in headers}.get("content-length")
        length = told if self.command == "HEAD" and told else str(len(content))
        if status != 204:
            self.send_header("Content-Length", length)
        if cut and not content:
            return self._drop()
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self._drop()

    def _error(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
        content = b"" if self.command == "HEAD" else text.encode()
        self._give(status, [("Content-Type", "application/xml")], content)

    def _drop(self) -> None:
        """End the connection without another word."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)


# Fixtures ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """One store for all tests of a process, with the keys to it in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        server = Server()
        yield server
        server.stop()


_numbers = iter(range(1_000_000))


def new_bucket(server: Server) -> Bucket:
    """An empty bucket."""
    bucket = Bucket(f"bucket-{os.getpid()}-{next(_numbers)}", server.endpoint)
    where = bucket.uri(allow_bucket_creation="true")
    pafs.FileSystem.from_uri(where)[0].create_dir(bucket.name)
    return bucket


@pytest.fixture
def bucket(s3_server: Server) -> Bucket:
    """An empty bucket for one test."""
    return new_bucket(s3_server)


@pytest.fixture(scope="module")
def module_bucket(s3_server: Server) -> Bucket:
    """An empty bucket for the tests of a module."""
    return new_bucket(s3_server)


@pytest.fixture
def faulty(s3_server: Server) -> Iterator[Callable[..., Any]]:
    """Makes proxies: `with faulty(share=0.05, seed=1) as proxy`."""
    with contextlib.ExitStack() as running:

        def start(**settings: Any) -> Any:
            proxy = FaultyProxy(s3_server.endpoint, **settings)
            running.callback(proxy.stop)
            return contextlib.nullcontext(proxy)

        yield start
