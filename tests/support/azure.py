"""Azure's blob storage on loopback: Azurite, a server of Microsoft's in Node.js, in a process of its own.

It is found on the PATH, or where `.ci/run` puts it: `npm install --prefix build/azurite azurite`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs
import pytest

from tests.conftest import REPOSITORY
from tests.support.clusters import wait_until

ACCOUNT, CONTAINER = "devstoreaccount1", "bucket"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Of every Azurite, by its documentation."""


@contextmanager
def run_azure() -> Iterator[str]:
    """Serve until the block ends. Gives a URI of a place in a container, to be formatted with `path`."""
    installed = os.path.join(REPOSITORY, "build", "azurite", "node_modules", ".bin")
    program = shutil.which("azurite-blob", path=f"{os.environ['PATH']}{os.pathsep}{installed}")
    if program is None:
        pytest.skip("no azurite-blob here: npm install --prefix build/azurite azurite")
    options = ["--inMemoryPersistence", "--disableTelemetry", "--silent", "--skipApiVersionCheck"]
    command = [program, *options, "--blobHost", "127.0.0.1", "--blobPort", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            address = next(line for line in server.stdout if " listens on " in line).strip().rpartition("/")[2]
            by_key = pafs.AzureFileSystem(
                ACCOUNT,
                account_key=KEY,
                blob_storage_authority=address,
                dfs_storage_authority=address,
                blob_storage_scheme="http",
                dfs_storage_scheme="http",
            )
            wait_until(lambda: _makes(by_key), 30, lambda: "Azurite takes no requests")
            where = f"blob_storage_authority={address}&dfs_storage_authority={address}&enable_tls=false"
            yield f"abfs://{CONTAINER}@{ACCOUNT}.dfs.core.windows.net/{{path}}?{where}&{signature()}"
        finally:
            server.terminate()
            server.wait(10)


def signature() -> str:
    """A shared access signature for the whole account.

    https://learn.microsoft.com/rest/api/storageservices/create-account-sas
    """
    fields = {
        "sp": "rwdlacup",
        "ss": "b",
        "srt": "sco",
        "se": "2099-01-01T00:00:00Z",
        "spr": "https,http",
        "sv": "2021-08-06",
    }
    signed = [
        ACCOUNT,
        fields["sp"],
        fields["ss"],
        fields["srt"],
        "",
        fields["se"],
        "",
        fields["spr"],
        fields["sv"],
        "",
        "",
    ]
    digest = hmac.new(base64.b64decode(KEY), "\n".join(signed).encode(), hashlib.sha256).digest()
    return urllib.parse.urlencode({**fields, "sig": base64.b64encode(digest).decode()})


def _makes(filesystem: pafs.FileSystem) -> bool:
    try:
        filesystem.create_dir(CONTAINER)
    except OSError:
        return False
    return True
