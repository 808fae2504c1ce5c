"""Bytes of a keeper's memory go to who shows its token, and to nobody else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest

from ray_ckpt.cluster.ram.sending import BATCH_BYTES, Door, Sender, receive

CONTENT = os.urandom(1 << 20) * (BATCH_BYTES // (1 << 20) + 3)


@pytest.fixture(scope="module")
def sender() -> Iterator[Sender]:
    descriptor = os.memfd_create("content")
    os.write(descriptor, CONTENT)
    empty = os.memfd_create("empty")

    @contextlib.contextmanager
    def opened(key: str) -> Iterator[int]:
        if key not in ("content", "empty"):
            raise FileNotFoundError(f"{key} is not held here")
        yield descriptor if key == "content" else empty

    yield Sender("127.0.0.1", opened)
    os.close(descriptor)
    os.close(empty)


def received(door: Door, key: str, offset: int, num_bytes: int, timeout_s: float = 20) -> bytes:
    got = bytearray()
    receive(door, key, offset, num_bytes, got.extend, timeout_s=timeout_s)
    return bytes(got)


@pytest.mark.parametrize(("offset", "num_bytes"), [(0, len(CONTENT)), (17, BATCH_BYTES), (len(CONTENT) - 1, 1), (5, 0)])
def test_a_range_arrives_as_it_is(sender: Sender, offset: int, num_bytes: int) -> None:
    assert received(sender.door, "content", offset, num_bytes) == CONTENT[offset : offset + num_bytes]


@pytest.mark.parametrize(("key", "offset"), [("content", len(CONTENT) - 2), ("content", len(CONTENT)), ("empty", 0)])
def test_a_file_that_ends_before_is_an_error(sender: Sender, key: str, offset: int) -> None:
    with pytest.raises(EOFError, match="too early"):
        received(sender.door, key, offset, 3)


def test_what_is_not_held_is_said(sender: Sender) -> None:
    with pytest.raises(OSError, match=r"does not send it: other is not held here$"):
        received(sender.door, "other", 0, 1)


@pytest.mark.parametrize("token", ["", "x", "y" * 43])
def test_who_does_not_show_the_token_gets_nothing(sender: Sender, token: str) -> None:
    with pytest.raises(OSError, match="token of this keeper was not shown"):
        received(Door(sender.door.location, token), "content", 0, 1)


def test_nobody_behind_the_door_is_an_error() -> None:
    with pytest.raises(OSError, match="does not send it"):
        received(Door("grpc://127.0.0.1:1", "token"), "content", 0, 1)


def test_a_proxy_for_the_web_is_not_asked(sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    other = Sender("127.0.0.1", sender._server._opened)  # no connection is there yet
    assert received(other.door, "content", 3, 4) == CONTENT[3:7]


def test_the_token_is_not_told(sender: Sender) -> None:
    assert sender.door.token not in f"{sender.door!r} {sender.door}"
