"""One behavioral suite for storage: a directory, a memory file system of fsspec, S3, Google's store, and `ram://`."""

from __future__ import annotations

import errno
import os
import pickle
import uuid

import pytest

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import FormatError, StorageError, UnsafeCheckpointError, UsageError
from ray_ckpt.storage.files import RetryPolicy, Storage
from tests.support.gcs import run_gcs
from tests.support.s3 import run_s3

AT_ONCE = RetryPolicy(attempts=4, first_wait_s=0.001, max_wait_s=0.002)


@pytest.fixture(scope="module")
def s3():
    with run_s3() as server:
        yield server


@pytest.fixture(scope="module")
def gcs():
    with run_gcs() as place:
        yield place


@pytest.fixture(params=["path", "file", "memory", "s3", "gs", pytest.param("ram", marks=pytest.mark.slow)])
def storage(request, tmp_path):
    if request.param == "path":
        return Storage(tmp_path / "new" / "place")
    if request.param == "file":
        return Storage(f"file://{tmp_path}/new/place")
    if request.param == "memory":
        return Storage(f"memory://{uuid.uuid4().hex}/place")
    if request.param == "ram":
        request.getfixturevalue("local_ray")
        return Storage(f"ram://suite/{uuid.uuid4().hex}/place?replicas=0")
    if request.param == "gs":
        return Storage(request.getfixturevalue("gcs").format(path=f"{uuid.uuid4().hex}/place"))
    return Storage(request.getfixturevalue("s3").uri(f"{uuid.uuid4().hex}/place"))


def _write(storage, name, data):
    with storage.create(name) as file:
        file.write(data[:3])
        file.write(memoryview(data)[3:])


def test_a_missing_directory_is_empty(storage):
    assert storage.list() == {}
    assert list(storage.list_directories()) == []
    assert not storage.exists("a")
    assert storage.size("a") is None
    with pytest.raises(StorageError, match=r"cannot read .*a.*FileNotFoundError"):
        storage.read_bytes("a")
    assert list(storage.directories_with("a")) == []
    storage.delete("a")
    storage.delete_empty_directory("a")


def test_write_list_read_delete(storage):
    _write(storage, "a", b"0123456789")
    _write(storage, "sub/b", b"x" * 100_000)
    storage.write_atomic("c.json", b"{}")
    assert storage.list() == {"a": 10, "sub/b": 100_000, "c.json": 2}
    assert list(storage.list_directories()) == ["sub"]
    assert list(storage.directories_with("b")) == ["sub"]
    assert list(storage.directories_with("a")) == []
    assert {name: scanned.num_bytes for name, scanned in storage.scan().items()} == storage.list()
    assert storage.size("sub/b") == 100_000
    assert storage.read_bytes("a") == b"0123456789"
    assert storage.child("sub").read_bytes("b") == b"x" * 100_000
    storage.delete("a")
    assert not storage.exists("a")
    storage.delete_empty_directory("sub")
    storage.delete("sub/b", durable=True)
    assert storage.list() == {"c.json": 2}
    storage.delete_empty_directory("sub")
    _write(storage, "sub/b", b"again")
    assert storage.read_bytes("sub/b") == b"again"


def test_ranged_reads(storage):
    _write(storage, "a", bytes(range(200)))
    with storage.open_input("a") as file:
        memory = bytearray(20)
        for start in (0, 180, 7):
            file.read_into(start, memoryview(memory))
            assert memory == bytes(range(start, start + 20))
        with pytest.raises(FormatError, match=r"\[190, 210\).*ends at 200"):
            file.read_into(190, memoryview(memory))


def test_atomic_write_replaces(storage):
    storage.write_atomic("m", b"old")
    storage.write_atomic("m", b"newer")
    assert storage.read_bytes("m") == b"newer"
    assert storage.list() == {"m": 5}


def test_storage_pickles_as_its_address(storage):
    storage.write_atomic("m", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert again.uri == storage.uri
    if "memory" not in storage.uri:
        assert again.read_bytes("m") == b"1"


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "s3://b/c", ""])
def test_names_stay_inside(storage, name):
    for action in (storage.read_bytes, storage.create, storage.exists, storage.delete):
        with pytest.raises(UnsafeCheckpointError):
            action(name)


class Flaky(Storage):
    """Fails with given errors, one operation after the other, then works."""

    errors: list[Exception]
    asked = 0

    def perform(self, operation, name, action):
        self.asked += 1

        def fail_first():
            if self.errors and operation != "open":
                raise self.errors.pop(0)
            return action()

        return super().perform(operation, name, fail_first)


def _flaky(path, *errors):
    storage = Flaky(path, retry=AT_ONCE)
    storage.errors = list(errors)
    return storage


TRANSIENT = [
    OSError(errno.ECONNRESET, "reset"),
    OSError(errno.ETIMEDOUT, "timed out"),
    TimeoutError("later"),
    OSError("When reading: AWS Error SLOW_DOWN during GetObject operation"),
    OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7"),
    OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation"),
]
PERMANENT = [
    PermissionError(errno.EACCES, "no"),
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("AWS Error ACCESS_DENIED during GetObject operation"),
    OSError("AWS Error NO_SUCH_BUCKET during GetObject operation"),
    FileNotFoundError(errno.ENOENT, "gone"),
]


@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_transient_errors_are_retried(tmp_path, error):
    storage = _flaky(tmp_path, error, error, error)
    storage.write_atomic("a", b"1")
    assert storage.read_bytes("a") == b"1"


@pytest.mark.parametrize("error", TRANSIENT, ids=str)
def test_retries_end(tmp_path, error):
    (tmp_path / "a").write_bytes(b"1")
    storage = _flaky(tmp_path, *[error] * AT_ONCE.attempts)
    with pytest.raises(StorageError) as raised:
        storage.read_bytes("a")
    assert raised.value.transient
    assert "attempt 4" in str(raised.value)
    assert storage.read_bytes("a") == b"1"


@pytest.mark.parametrize("error", PERMANENT, ids=str)
def test_permanent_errors_fail_at_once(tmp_path, error):
    (tmp_path / "a").write_bytes(b"1")
    storage = _flaky(tmp_path, error)
    with pytest.raises(StorageError) as raised:
        storage.read_bytes("a")
    found = raised.value
    assert (found.operation, found.path, found.transient) == ("read", f"{tmp_path}/a", False)
    assert type(error).__name__ in found.cause
    assert found.__cause__ is error
    again = pickle.loads(pickle.dumps(found))
    assert (again.operation, again.path, str(again)) == (found.operation, found.path, str(found))


def test_real_permanent_errors_of_s3(s3):
    with pytest.raises(StorageError) as raised:
        Storage(s3.uri("x", bucket="missing"), retry=AT_ONCE).write_atomic("a", b"1")
    assert not raised.value.transient
    assert "secret" not in str(raised.value)


def test_real_throttling_of_s3(s3):
    storage = Storage(s3.uri(uuid.uuid4().hex), retry=AT_ONCE)
    left = 20

    def throttle(environment):
        nonlocal left
        left -= 1
        return left > 0 and environment["REQUEST_METHOD"] in ("PUT", "POST")

    with s3.throttled(throttle):
        storage.write_atomic("a", b"1")
    assert storage.read_bytes("a") == b"1"


def test_unknown_scheme():
    with pytest.raises(StorageError, match="nonsense"):
        Storage("nonsense://a/b").exists("x")


def test_full_disk():
    file = Storage("/dev").create("full")
    with pytest.raises(StorageError, match="No space left") as raised:
        file.write(b"x" * 100_000)
    assert not raised.value.transient


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_forbidden_directory():
    with pytest.raises(StorageError, match="PermissionError"):
        Storage("/").write_atomic("a", b"")


@pytest.mark.parametrize("bad", [{"attempts": 0}, {"first_wait_s": -1}, {"max_wait_s": 0.0}])
def test_policies_are_checked(bad):
    with pytest.raises(UsageError):
        RetryPolicy(**bad)


def test_plugins_check_their_options(tmp_path):
    with pytest.raises(UsageError, match="threads"):
        ArrowStorageWriter(tmp_path, threads=0)
    with pytest.raises(UsageError, match="threads"):
        ArrowStorageReader(tmp_path, threads=0)
