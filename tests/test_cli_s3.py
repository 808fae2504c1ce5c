"""ls, inspect, verify and diff of checkpoints on S3: whole, and damaged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ray_ckpt import Storage, save
from tests.support.command_calls import call
from tests.support.s3 import S3, run_s3

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with run_s3() as server:
        yield server


def rewritten(storage: Storage, how: str) -> str:
    [name] = [name for name in storage.list() if name.endswith(".distcp")]
    path = storage.path(name)
    with storage.filesystem.open_input_file(path) as file:
        data = bytearray(file.read())
    data[len(data) // 2] ^= 0x10
    if how == "remove":
        storage.delete(name)
    else:
        with storage.filesystem.open_output_stream(path) as file:
            file.write(bytes(data if how == "flip" else data[:-500]))
    return name


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_on_s3(s3: S3, how: str) -> None:
    state: dict[str, Any] = {"model": {"weight": torch.arange(20_000.0)}, "step": 1}
    uri = s3.uri(f"run-{how}")
    for step in (1, 2):
        save(state | {"step": step}, uri, step=step, layout="single")
    code, text = call("ls", uri)
    assert code == 0
    assert text.splitlines()[2].endswith("latest")
    assert "secret" not in text
    assert call("inspect", uri, "--tree")[0] == 0
    assert call("verify", uri, "--scan-nan")[0] == 0
    code, text = call("diff", uri, uri, "--left-step", 1)
    assert (code, "value differs: step: 1 / 2" in text) == (1, True)
    name = rewritten(Storage(uri).child("step-2"), how)
    code, text = call("verify", uri)
    assert code == 1
    assert name in text
    assert "secret" not in text
    assert call("verify", uri, "--step", 1)[0] == 0
    assert call("ls", uri)[0] == (0 if how == "flip" else 1)
