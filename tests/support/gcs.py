"""A Google Cloud Storage server on loopback: gcp-storage-emulator, in a process of its own.

pyarrow holds the interpreter's lock while it asks for the size of an open object, so a server in the same process could
not answer it.

    python -m tests.support.gcs            prints the port, and serves until its standard input is closed
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

_BUCKET = "bucket"


@contextmanager
def run_gcs() -> Iterator[str]:
    """Serve until the block ends. Gives a URI of a place in a bucket, to be formatted with `path`."""
    command = [sys.executable, "-m", "tests.support.gcs"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            options = f"scheme=http&endpoint_override=127.0.0.1:{port}&retry_limit_seconds=5"
            yield f"gs://anonymous@{_BUCKET}/{{path}}?{options}"
        finally:
            server.stdin.close()
            server.wait(10)


def _serve() -> None:
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(_BUCKET, storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RequestHandler, storage))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _serve()
