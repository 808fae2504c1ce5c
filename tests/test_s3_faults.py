"""An S3 server that fails as real ones do: nothing is lost, nothing is wrong, and what is said helps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
import torch

from ray_ckpt import CheckpointStore, RetryPolicy, Storage, StorageError, keep_last, load, save, verify
from tests.conftest import REPOSITORY
from tests.support.s3 import S3, Answer, Environment, run_s3

STATE = {"weight": torch.arange(3_000_000.0)}  # two parts of an upload
FILE = "step-1/__0_0-0123456789ab.distcp"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with run_s3() as server:
        yield server


@pytest.fixture
def storage(s3: S3) -> Storage:
    return Storage(s3.uri(uuid.uuid4().hex), retry=RetryPolicy(attempts=4, first_wait_s=0.001, max_wait_s=0.01))


def loaded(storage: Storage) -> torch.Tensor:
    box = {"weight": torch.zeros_like(STATE["weight"])}
    load(box, storage)
    return box["weight"]


def first(count: int, answer: Callable[[Environment], Answer | None]) -> Callable[[Environment], Answer | None]:
    """The first answers that are not None, and then none any more."""
    lock = threading.Lock()

    def limited(environment: Environment) -> Answer | None:
        nonlocal count
        with lock:
            found = answer(environment) if count else None
            count -= found is not None
        return found

    return limited


def cut(environment: Environment) -> Answer | None:
    """Half of what was asked for, of a body whose header says that it is all."""
    if environment["REQUEST_METHOD"] != "GET" or not environment["PATH_INFO"].endswith(".distcp"):
        return None
    start, end = map(int, environment["HTTP_RANGE"].removeprefix("bytes=").split("-"))
    headers = {
        "Content-Length": str(end - start + 1),
        "Content-Range": f"bytes {start}-{end}/{STATE['weight'].nbytes}",
        "ETag": '"x"',
    }
    return Answer("206 Partial Content", headers, bytes((end - start + 1) // 2))


@pytest.mark.parametrize("count", [1, 7])
def test_a_body_that_is_cut_off_is_asked_for_again(s3: S3, storage: Storage, count: int) -> None:
    save(STATE, storage)
    with s3.answered(first(count, cut)):
        assert torch.equal(loaded(storage), STATE["weight"])


@pytest.mark.slow
def test_a_body_that_is_always_cut_off_is_an_error(s3: S3, storage: Storage) -> None:
    save(STATE, storage)
    with s3.answered(cut), pytest.raises(StorageError):
        loaded(Storage(storage.uri, retry=RetryPolicy(attempts=1)))


def test_a_first_byte_that_comes_late_is_waited_for(s3: S3, storage: Storage) -> None:
    save(STATE, storage)
    waiting, asked = threading.Event(), threading.Event()

    def slow(environment: Environment) -> None:
        if environment["PATH_INFO"].endswith(".distcp"):
            asked.set()
            waiting.wait(30)

    release = threading.Timer(1.0, waiting.set)
    release.start()
    with s3.answered(slow):
        assert torch.equal(loaded(storage), STATE["weight"])
    assert asked.is_set()


FAILURES = {
    "ExpiredToken": ("400 Bad Request", "expired"),
    "AccessDenied": ("403 Forbidden", "whether these processes have credentials"),
    "InvalidAccessKeyId": ("403 Forbidden", "whether these processes have credentials"),
    "PermanentRedirect": ("301 Moved Permanently", "in another region: name it with ?region="),
    "AuthorizationHeaderMalformed": ("400 Bad Request", "in another region"),
    "NoSuchBucket": ("404 Not Found", "create the bucket first"),
}


@pytest.mark.parametrize(
    ("code", "method"),
    [(code, method) for code in FAILURES for method in ("GET", "POST") if (code, method) != ("NoSuchBucket", "GET")],
)
def test_what_no_retry_can_mend_is_said_at_once(s3: S3, storage: Storage, code: str, method: str) -> None:
    status, advice = FAILURES[code]
    save(STATE, storage)
    seen: list[str] = []

    def refuse(environment: Environment) -> Answer | None:
        if environment["REQUEST_METHOD"] != method or "list-type" in environment["QUERY_STRING"]:
            return None
        seen.append(environment["PATH_INFO"])
        return Answer.error(status, code)

    with s3.answered(refuse), pytest.raises(StorageError) as raised:
        loaded(storage) if method == "GET" else save(STATE, storage.child("b"))
    assert advice in str(raised.value)
    assert "secret" not in str(raised.value)
    assert not raised.value.transient
    assert len(seen) == 1
    assert torch.equal(loaded(storage), STATE["weight"])


def test_credentials_that_expire_amid_a_save_lose_nothing(s3: S3, storage: Storage) -> None:
    """The checkpoint before stays; what was begun goes with the next clean."""
    store = CheckpointStore(storage)
    save(STATE, store, 1)
    seen: list[str] = []

    def expire(environment: Environment) -> Answer | None:
        if environment["REQUEST_METHOD"] in ("PUT", "POST"):
            seen.append(environment["REQUEST_METHOD"])
        return Answer.error("400 Bad Request", "ExpiredToken") if len(seen) > 3 else None

    with s3.answered(expire), pytest.raises(StorageError, match="renew them"):
        save(STATE, store, 2)
    assert store.steps() == (1,)
    assert torch.equal(loaded(storage), STATE["weight"])
    store.clean(older_than_s=0)
    assert not [name for name in storage.list_files() if name.startswith("step-2/")]
    assert uploads(s3, storage) == []


def client(s3: S3) -> object:
    return boto3.client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{s3.port}",
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    )


def prefix(storage: Storage) -> str:
    return storage.address.removeprefix("s3://bucket/")


def uploads(s3: S3, storage: Storage) -> list[str]:
    found = client(s3).list_multipart_uploads(Bucket="bucket", Prefix=f"{prefix(storage)}/")  # type: ignore[attr-defined]
    return sorted(upload["Key"].removeprefix(f"{prefix(storage)}/") for upload in found.get("Uploads", ()))


class TestUploadsThatWereCutOff:
    @pytest.mark.slow
    def test_that_of_a_killed_save_is_swept(self, s3: S3, storage: Storage) -> None:
        store = CheckpointStore(storage)
        save(STATE, store, 1)
        uploading, over = threading.Event(), threading.Event()

        def hold(environment: Environment) -> None:
            if "partNumber=2" in environment["QUERY_STRING"]:
                uploading.set()
                over.wait(60)

        code = (
            "import sys, torch; from ray_ckpt import CheckpointStore, save; "
            "save({'weight': torch.arange(3_000_000.)}, CheckpointStore(sys.argv[1]), 2)"
        )
        with s3.answered(hold):
            saving = subprocess.Popen([sys.executable, "-c", code, storage.uri], cwd=REPOSITORY)
            assert uploading.wait(60)
            os.kill(saving.pid, signal.SIGKILL)
            saving.wait(10)
            over.set()
        [name] = uploads(s3, storage)
        assert name.startswith("step-2/__0_0-")
        assert store.clean(older_than_s=0, dry_run=True).uploads == (name,)
        assert uploads(s3, storage) == [name]
        assert store.clean(older_than_s=0).uploads == (name,)
        assert uploads(s3, storage) == []
        assert torch.equal(loaded(storage), STATE["weight"])

    def test_those_of_others_stay(self, s3: S3, storage: Storage) -> None:
        others = [
            "step-1/notes.txt",
            "other/__0_0-0123456789ab.distcp",
            "step-1/x/__0_0-0123456789ab.distcp",
            "step-1/__0_0.distcp",
        ]
        for name in (FILE, FILE, "__0_0-0123456789ab.distcp", *others):
            client(s3).create_multipart_upload(Bucket="bucket", Key=f"{prefix(storage)}/{name}")  # type: ignore[attr-defined]
        client(s3).create_multipart_upload(Bucket="bucket", Key=f"{prefix(storage)}2/{FILE}")  # type: ignore[attr-defined]
        report = CheckpointStore(storage).clean(older_than_s=0)
        assert sorted(report.uploads) == ["__0_0-0123456789ab.distcp", FILE]
        assert uploads(s3, storage) == sorted(others)
        assert uploads(s3, Storage(f"{storage.uri.partition('?')[0]}2?{storage.uri.partition('?')[2]}")) == [FILE]

    def test_a_young_one_may_be_of_a_save_that_runs(self, s3: S3, storage: Storage) -> None:
        """The server says of all that they began in 2010."""
        store = CheckpointStore(storage)
        save(STATE, store, 1)
        client(s3).create_multipart_upload(Bucket="bucket", Key=f"{prefix(storage)}/{FILE}")  # type: ignore[attr-defined]

        def young(environment: Environment) -> Answer | None:
            if environment["REQUEST_METHOD"] != "GET" or not environment["QUERY_STRING"].startswith("uploads"):
                return None
            begun = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            upload = f"<Key>{prefix(storage)}/{FILE}</Key><UploadId>1</UploadId><Initiated>{begun}</Initiated>"
            body = (
                '<ListMultipartUploadsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Bucket>bucket</Bucket>'
                f"<IsTruncated>false</IsTruncated><Upload>{upload}</Upload></ListMultipartUploadsResult>"
            )
            return Answer("200 OK", {"Content-Type": "application/xml"}, body.encode())

        with s3.answered(young):
            assert store.clean().uploads == ()
            assert store.clean(older_than_s=0, dry_run=True).uploads == (FILE,)
        assert store.clean().uploads == (FILE,)

    def test_an_account_that_may_not_list_them_cleans_all_the_same(
        self, s3: S3, storage: Storage, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = CheckpointStore(storage)
        save(STATE, store, 1)

        def refuse(environment: Environment) -> Answer | None:
            asked = environment["QUERY_STRING"].startswith("uploads") and environment["REQUEST_METHOD"] == "GET"
            return Answer.error("403 Forbidden", "AccessDenied") if asked else None

        with s3.answered(refuse):
            assert store.clean(older_than_s=0).uploads == ()
        assert "unfinished uploads are not looked for" in caplog.text
        assert "secret" not in caplog.text


BUDGET = {"save": 24, "latest": 4, "load": 10, "load a step": 7, "verify": 11, "prune": 27, "clean": 11}
"""Requests of one process with one data file, beside one per part of 10 MiB that is written; docs/howto/storage.md."""


def test_requests_are_as_many_as_documented(s3: S3, storage: Storage) -> None:
    store = CheckpointStore(storage)
    save(STATE, store, 1)
    num_parts = -(-STATE["weight"].nbytes // (10 << 20))
    acts: dict[str, Callable[[], object]] = {
        "save": lambda: save(STATE, store, 2),
        "latest": store.latest,
        "load": lambda: load({"weight": torch.zeros(3_000_000)}, store),
        "load a step": lambda: load({"weight": torch.zeros(3_000_000)}, store, 1),
        "verify": lambda: verify(store, 1),
        "prune": lambda: store.prune(keep_last(1)),
        "clean": store.clean,
    }
    counts = {}
    for name, act in acts.items():
        s3.reset()
        act()
        counts[name] = s3.requests.total() - num_parts * (name == "save")
    assert counts == BUDGET
    page = Path(REPOSITORY, "docs/howto/storage.md").read_text()
    assert all(f"| {name} | {number} |" in page for name, number in BUDGET.items())
