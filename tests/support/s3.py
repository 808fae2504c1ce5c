"""A real S3 server on loopback: moto behind HTTP, with its requests counted and, where a test asks, failed."""

from __future__ import annotations

import collections
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow.fs as pafs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Environment = dict[str, Any]
_BUCKET = "bucket"


class Answer(NamedTuple):
    """What is sent in the server's place."""

    status: str
    headers: dict[str, str]
    body: bytes

    @classmethod
    def error(cls, status: str, code: str) -> Answer:
        """An error as S3 words it."""
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, says the test.</Message></Error>"
        return cls(status, {"Content-Type": "application/xml"}, body.encode())


SLOW_DOWN = Answer.error("503 Slow Down", "SlowDown")


@dataclass
class S3:
    """The server, as tests see it."""

    port: int
    requests: collections.Counter[str] = field(default_factory=collections.Counter)
    """Number of requests by method."""
    sent: collections.Counter[str] = field(default_factory=collections.Counter)
    """Bytes of GET responses by path, `/bucket/name`."""
    requests_by_path: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    """Number of requests by method and path."""
    answer: Callable[[Environment], Answer | None] | None = None
    """Sees every request, and may answer in the server's place."""

    def uri(self, path: str, *, key: str = "key", bucket: str = _BUCKET) -> str:
        options = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"
        return f"s3://{key}:secret@{bucket}/{path}?{options}"

    @contextmanager
    def throttled(self, throttle: Callable[[Environment], bool]) -> Iterator[None]:
        """Within the block, `throttle` sees every request, and says whether to answer it with 503 SlowDown."""
        with self.answered(lambda environment: SLOW_DOWN if throttle(environment) else None):
            yield

    @contextmanager
    def answered(self, answer: Callable[[Environment], Answer | None]) -> Iterator[None]:
        """Within the block."""
        self.answer = answer
        try:
            yield
        finally:
            self.answer = None

    @property
    def sent_bytes(self) -> int:
        """Bytes of all GET responses."""
        return self.sent.total()

    def sent_below(self, path: str) -> int:
        return sum(count for name, count in self.sent.items() if name.startswith(f"/{_BUCKET}/{path}/"))

    def requests_below(self, path: str, method: str) -> int:
        return sum(
            count
            for (how, name), count in self.requests_by_path.items()
            if how == method and name.startswith(f"/{_BUCKET}/{path}/")
        )

    def reset(self) -> None:
        self.requests.clear()
        self.requests_by_path.clear()
        self.sent.clear()


@contextmanager
def run_s3() -> Iterator[S3]:
    """Serve until the block ends. Starts empty: all servers of one process share what they hold."""
    moto = DomainDispatcherApplication(create_backend_app)
    state: S3

    def application(environment: Environment, start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environment["REQUEST_METHOD"], environment["PATH_INFO"]
        state.requests[method] += 1
        state.requests_by_path[method, path] += 1
        if state.answer is not None and (answer := state.answer(environment)):
            start_response(answer.status, list(answer.headers.items()))
            return [answer.body]
        body = list(moto(environment, start_response))
        if method == "GET":
            state.sent[path] += sum(map(len, body))
        return body

    server = make_server("127.0.0.1", 0, application, threaded=True)
    state = S3(server.port)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/moto-api/reset", data=b"", timeout=10).close()
        filesystem, _ = pafs.FileSystem.from_uri(
            state.uri("", bucket="any").replace("?", "?allow_bucket_creation=true&")
        )
        filesystem.create_dir(_BUCKET)
        state.reset()
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
