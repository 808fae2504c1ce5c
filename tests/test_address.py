"""What the text of a target means, what is refused, and that no secret of a URI gets out."""

from __future__ import annotations

import logging
import os
import traceback
import urllib.parse
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ray_ckpt
from ray_ckpt.errors import RayCkptError, UsageError
from ray_ckpt.storage.address import parse
from ray_ckpt.storage.files import RetryPolicy, Storage

ONCE = RetryPolicy(attempts=1)

LOCAL = {
    "/data/run": "/data/run",
    "file:///data/run": "/data/run",
    "FILE:///data/run": "/data/run",
    "file:/data/run": "/data/run",
    "File:/data/run": "/data/run",
    "file://localhost/data/run": "/data/run",
    "file://LOCALHOST/data/run": "/data/run",
    "local:///data/run": "/data/run",
    "file:////data//run/": "/data/run",
    'file:///a b/{c}|d^e`f"g<h>': '/a b/{c}|d^e`f"g<h>',
    "file:///a%20b/%7Bc%7D": "/a b/{c}",
    "file:///100%/a%zz": "/100%/a%zz",
    "file:///w%3Fx%23y": "/w?x#y",
    "file:///\u00fc/%C3%BC": "/\u00fc/\u00fc",
    "/a?b#c%20|{d} e": "/a?b#c%20|{d} e",
    "/tmp/a://b": "/tmp/a:/b",
    "./s3:/x": "{cwd}/s3:/x",
    "./ run": "{cwd}/ run",
    "./file:x": "{cwd}/file:x",
    "run:1/x": "{cwd}/run:1/x",
    "2024-01-01T10:00/x": "{cwd}/2024-01-01T10:00/x",
    "s3/x": "{cwd}/s3/x",
    ".": "{cwd}",
    "~/run": "{home}/run",
    "./~/run": "{cwd}/~/run",
}

REMOTE = {
    "s3://bucket/run": "s3://bucket/run",
    "S3://bucket/Run/": "s3://bucket/Run",
    "s3://bucket": "s3://bucket",
    "s3://bucket/a b/{c}|%20%": "s3://bucket/a%20b/%7Bc%7D%7C%20%25",
    "s3://bucket/run@home": "s3://bucket/run@home",
    "gs://bucket/run?endpoint_override=http%3A//u%40h&scheme=http": "gs://bucket/run",
    "s3://KEY:SE@CRET@bucket/run": "s3://bucket/run",
    "s3://KEY:SE%CRET@bucket/run": "s3://bucket/run",
    "hdfs://name:8020/run": "hdfs://name:8020/run",
    "abfss://c@account.dfs.core.windows.net/run?sig=abc": "abfss://c@account.dfs.core.windows.net/run",
    "abfs://c:KEY@account.dfs.core.windows.net/run": "abfs://account.dfs.core.windows.net/run",
    "abfs://c%3AKEY@account.dfs.core.windows.net/run": "abfs://account.dfs.core.windows.net/run",
    "memory://place/a b?c": "memory://place/a b",
}

REFUSED = [
    *("", " ", "\n", "a\0b", "file:///a%00b"),
    *(
        "s3:/bucket",
        "s3:bucket",
        "S3:/bucket",
        "s3:\\\\bucket",
        "s3//bucket",
        "s3 ://bucket",
        " s3://bucket",
        "s3;//bucket",
    ),
    *(" /data/run", "\t~/run", " run"),
    *("memory//x", "file//x", "SFTP//x"),
    *("s3://", "s3:///run", "S3://", "gs:", "gs:/", "memory:x", "://x", "1s3://x", "simplecache::s3://x"),
    *("file:x", "file://x/y", "file://~/x", "file://", "file:", "file:///a?b=c", "file:///a#b", "local://x"),
    *("http://host/x", "https://host/x", "HTTP://host/x", "http:/host", "C:/x", "C:\\x", "foo:/bar"),
    *("s3://KEY:SECRET@", "s3://bucket/a#b", "s3://bucket/a?b", "s3://bucket:90/x", "hdfs://host:port/x", "sftp://"),
    *("s3:/KEY:SECRET@bucket", "s3://KEY:SEC/RET@bucket/x", "s3://KEY:SEC?RET@bucket", "s3://KEY:SEC#RET@bucket"),
    *("s3://KEY:SE@C/RET@bucket", "s3://KEY:SECRET/bucket", "sftp://user:12/34@host/x", "KEY:SECRET@s3://bucket"),
    *(
        "ram://",
        "ram:///run",
        "ram://run/../x",
        "ram://../x",
        "ram://run//x",
        "ram://./x",
        "ram://run/#x",
        "ram://run#x",
    ),
    *("ram://KEY:SECRET@run", "ram://run:90/x", "ram:run", "RAM://run/./x"),
    "~nobody-of-that-name/x",
    Path("s3://bucket/x"),
]


@pytest.mark.parametrize(("text", "expected"), LOCAL.items())
def test_local_paths(text, expected):
    path = expected.format(cwd=os.getcwd(), home=os.path.expanduser("~")) if expected[0] == "{" else expected
    storage = Storage(text)
    assert (storage.uri, storage.address, storage.is_local) == (path, path, True)
    assert Storage(storage.uri).uri == path


@pytest.mark.parametrize(("text", "expected"), REMOTE.items())
def test_uris(text, expected):
    storage = Storage(text)
    assert (storage.address, storage.is_local) == (expected, False)
    assert Storage(storage.uri).uri == storage.uri
    child = storage.child("step-1")
    assert child.address == f"{expected}/step-1"
    parent, name = child.parent()
    assert (parent.uri, name) == (storage.uri, "step-1")


@pytest.mark.parametrize("text", REFUSED, ids=str)
def test_what_can_be_a_mistyped_target_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    for take in (Storage, ray_ckpt.CheckpointStore, lambda target: ray_ckpt.save({"a": 1}, target)):
        with pytest.raises(UsageError) as raised:
            take(text)
        told = "".join(traceback.format_exception(raised.value))
        assert "\n" not in str(raised.value)
        assert not any(secret in told for secret in ("SEC", "RET", "KEY", "12/34"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "s3:/bucket", "S3://", "http://host/x", "ram:///run", "file://x/y", "C:\\x"])
def test_every_verb_refuses_it(tmp_path, monkeypatch, text):
    ray_ckpt.save({"w": torch.ones(3)}, tmp_path / "saved")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    saved = tmp_path / "saved"
    for take in (
        lambda target: ray_ckpt.export(saved, target, to="safetensors"),
        lambda target: ray_ckpt.export(saved, target, to="torch"),
        lambda target: ray_ckpt.export(target, tmp_path / "other", to="dcp"),
        lambda target: ray_ckpt.export(saved, tmp_path / "other", to="safetensors", config=target),
        lambda target: ray_ckpt.convert(saved, target),
        lambda target: ray_ckpt.convert(target, tmp_path / "other"),
        lambda target: ray_ckpt.CheckpointStore(saved, front=target),
        lambda target: ray_ckpt.CheckpointStore(target, front="ram://run"),
        lambda target: ray_ckpt.load({"w": torch.zeros(3)}, target),
        lambda target: ray_ckpt.compare({"w": torch.zeros(3)}, target),
        lambda target: ray_ckpt.diff(saved, target),
        lambda target: ray_ckpt.sign(target, "key.pem"),
        lambda target: ray_ckpt.verify_signature(target, "key.pub"),
        lambda target: ray_ckpt.write_report(target, "page.html"),
        lambda target: ray_ckpt.doctor(target),
        ray_ckpt.inspect,
        ray_ckpt.list_steps,
        ray_ckpt.verify,
        ray_ckpt.ArrowStorageWriter,
        ray_ckpt.ArrowStorageReader,
    ):
        with pytest.raises(UsageError):
            take(text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "saved"]
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("target", [None, 3, ["s3://a"]], ids=str)
def test_a_target_that_is_not_text_is_refused(target):
    with pytest.raises(UsageError, match="path or a URI"):
        Storage(target)


def test_files_go_where_the_uri_says(tmp_path):
    name = "a b{c}|d%20?#"
    Storage(f"file://{tmp_path}/{urllib.parse.quote(name)}").write_atomic("x", b"1")
    Storage(f"file://localhost{tmp_path}/a {{b}}|c").write_atomic("x", b"2")
    assert (tmp_path / name / "x").read_bytes() == b"1"
    assert (tmp_path / "a {b}|c" / "x").read_bytes() == b"2"


@settings(deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_every_path_is_reached_by_a_file_uri(name):
    path = os.path.abspath(f"/.{name}")
    assert parse(f"file://{urllib.parse.quote(path)}").path == path
    assert parse(path).path == path


@settings(deadline=None)
@given(st.text(max_size=12))
def test_a_target_is_understood_or_refused(text):
    for form in (text, f"s3:{text}", f"s3://{text}", f"file:{text}", f"memory://{text}", f"{text}://x"):
        try:
            address = parse(form)
        except UsageError:
            continue
        assert parse(address.text) == address
        assert parse(address.child("n").text) == address.child("n")


# ----------------------------------------------------------------------------------------------------------- secrets

SECRETS = st.text(st.sampled_from("SECRET0/?#%@:+=&|{ "), min_size=5, max_size=12).map(lambda text: f"xq{text}zv")
SCHEMES = st.sampled_from(
    ["s3", "S3", "gs", "abfs", "abfss", "hdfs", "sftp", "memory", "nonsense", "file", "http", "ftp"]
)
SEPARATORS = st.sampled_from(["://", ":/", ":", "//", " ://", ":///", "::"])
OPTIONS = st.sampled_from(["sig", "region", "endpoint_override", "bogus", "scheme", "tls_verify"])


def _tells(error, secret):
    """Everything that is reachable from an error as text."""
    told, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        told += [str(error), repr(error), repr(error.args), repr(vars(error))]
        told += traceback.format_exception(error)
        error = error.__cause__ or error.__context__
    return secret in "".join(told)


@settings(deadline=None)
@given(SCHEMES, SEPARATORS, SECRETS, OPTIONS)
def test_no_error_tells_a_secret(scheme, separator, secret, option):
    # 127.0.0.1:9 refuses connections, so that nothing waits for a network.
    nowhere = "endpoint_override=127.0.0.1:9&region=us-east-1&scheme=http"
    separator = "://" if scheme == "nonsense" else separator
    for form in (
        f"{scheme}{separator}KEYKEY:{secret}@bucket/run?{nowhere}",
        f"{scheme}{separator}{secret}:PASSWORD@bucket/run?{nowhere}",
        f"{scheme}{separator}KEYKEY:{urllib.parse.quote(secret, safe='')}@bucket/run?{option}={secret}",
        f"{scheme}{separator}bucket/run?{option}={urllib.parse.quote(secret, safe='')}",
    ):
        told = False
        try:
            storage = Storage(form, retry=ONCE)
            assert secret not in f"{storage!r} {storage.address} {storage.child('x')!r} {storage._address!r}"
            if storage._address.scheme in ("s3", "abfs", "abfss", "nonsense", "hdfs"):
                _ = storage.filesystem
        except RayCkptError as error:
            told = _tells(error, secret) or _tells(error, "PASSWORD")
        assert not told, form


def test_an_error_of_a_library_is_told_without_the_secret():
    storage = Storage("s3://KEYKEY:SEC%2FRET@bucket/run?region=us-east-1&bogus=SAS%2BSIG", retry=ONCE)

    def fail():
        try:
            raise ValueError("first: SEC/RET")
        except ValueError as error:
            raise PermissionError(13, "denied to KEYKEY:SEC%2FRET with SAS+SIG") from error

    with pytest.raises(ray_ckpt.StorageError, match=r"denied to \*\*\*") as raised:
        storage.perform("read", "x", fail)
    assert not any(_tells(raised.value, secret) for secret in ("SEC/RET", "SEC%2FRET", "SAS+SIG", "KEYKEY"))
    assert isinstance(raised.value.__cause__, PermissionError)


def test_every_retry_is_logged_without_secrets(caplog):
    errors = [OSError("AWS Error SLOW_DOWN: SECRET")] * 3
    storage = Storage("s3://KEYKEY:SECRET@bucket/run", retry=RetryPolicy(5, 0.001, 0.002))
    with caplog.at_level(logging.INFO, "ray_ckpt"):
        storage.retried(lambda: storage.perform("read", "x", lambda: errors and _raise(errors.pop())))
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    for number, record in enumerate(caplog.records, 1):
        assert f"cannot read s3://bucket/run/x at attempt {number} of 5" in record.getMessage()
        assert "SLOW_DOWN" in record.getMessage()
        assert "SECRET" not in record.getMessage()


def _raise(error):
    raise error


def test_logging_is_silent_by_default(capfd):
    logging.getLogger("ray_ckpt").warning("this goes nowhere")
    assert capfd.readouterr().err == ""
