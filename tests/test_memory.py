"""The guard before an address is used: what lies where its address says is saved right, all else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException

import ray_ckpt
from ray_ckpt import ArrowStorageReader
from ray_ckpt.errors import UsageError
from ray_ckpt.format.fingerprinting import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore")  # what is odd is often deprecated, or in beta, and says so

MATRIX = torch.arange(12.0).reshape(3, 4)


def resized(num_bytes: int) -> torch.Tensor:
    tensor = torch.ones(100_000)
    tensor.untyped_storage().resize_(num_bytes)
    return tensor


WITHOUT: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: MATRIX.to("meta"),
    "fake": lambda: FakeTensorMode().from_tensor(MATRIX),
    "coo": lambda: MATRIX.to_sparse(),
    "csr": lambda: MATRIX.to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([MATRIX[:1], MATRIX[1:]]),
    "jagged": lambda: torch.nested.nested_tensor([MATRIX[:1], MATRIX[1:]], layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(MATRIX, 0.1, 0, torch.qint8),
    "mkldnn": lambda: MATRIX.to_mkldnn(),
    "masked": lambda: torch.masked.masked_tensor(MATRIX, MATRIX > 3),
    "freed": lambda: resized(0),
    "shortened": lambda: resized(16),
}
"""What has no elements at an address, or fewer than its shape says."""

WITH: dict[str, Callable[[], torch.Tensor]] = {
    "conjugate": lambda: torch.complex(MATRIX, MATRIX).conj(),
    "negative": lambda: torch.complex(MATRIX, MATRIX).conj().imag,
    "empty": lambda: torch.empty(0, 3),
    "scalar": lambda: torch.tensor(2.5),
    "strided": lambda: torch.arange(96.0).reshape(8, 12)[::2, 1::3],
    "transposed": lambda: MATRIX.clone().t(),
    "tracked": lambda: MATRIX.clone().requires_grad_() * 2,
    "subclass with memory": lambda: MATRIX.clone().as_subclass(type("Named", (torch.Tensor,), {})),
}


def plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().clone()


def save(tensor: torch.Tensor, place: Path, *, blocking: bool) -> None:
    if blocking:
        ray_ckpt.save({"odd one": tensor}, place)
    else:
        ray_ckpt.save({"odd one": tensor}, place, blocking=False).result()


@pytest.mark.parametrize("kind", list(WITHOUT))
def test_what_has_no_memory_of_its_own_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    for blocking in (True, False):
        with pytest.raises(UsageError, match="'odd one' is"):
            save(WITHOUT[kind](), tmp_path / "run", blocking=blocking)
    with pytest.raises(ValueError, match="no bits to fingerprint"):
        fingerprint(WITHOUT[kind]())
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("kind", [kind for kind in WITHOUT if kind not in ("jagged", "quantized", "nested")])
def test_what_has_no_memory_of_its_own_is_not_loaded_into(tmp_path: Path, kind: str) -> None:
    target = WITHOUT[kind]()
    ray_ckpt.save({"odd one": torch.zeros(tuple(target.shape))}, tmp_path)
    with pytest.raises((UsageError, ray_ckpt.StateMismatchError), match="odd one"):
        ray_ckpt.load({"odd one": target}, tmp_path)


@pytest.mark.parametrize("kind", list(WITH))
@pytest.mark.parametrize("blocking", [True, False])
def test_what_has_its_memory_is_saved_and_loaded_right(tmp_path: Path, kind: str, blocking: bool) -> None:
    expected = plain(WITH[kind]())
    save(WITH[kind](), tmp_path, blocking=blocking)
    found, target = torch.full_like(expected, 7), WITH[kind]().detach()
    for into in (found, target):
        with torch.no_grad():
            into.fill_(7)
        ray_ckpt.load({"odd one": into}, tmp_path)
        assert torch.equal(plain(into), expected)


@pytest.mark.parametrize("strides", [(1, 0), (1, 1)])
def test_elements_in_one_place_are_saved_but_not_loaded_into(tmp_path: Path, strides: tuple[int, int]) -> None:
    tangled = torch.arange(7.0).as_strided((4, 3), strides)
    ray_ckpt.save({"w": tangled}, tmp_path)
    found = torch.zeros(4, 3)
    ray_ckpt.load({"w": found}, tmp_path)
    assert torch.equal(found, tangled)
    with pytest.raises(UsageError, match="'w' has several elements in one place"):
        ray_ckpt.load({"w": tangled}, tmp_path)
    with pytest.raises(CheckpointException, match="'w' has several elements in one place"):
        dcp.load({"w": tangled}, storage_reader=ArrowStorageReader(tmp_path), no_dist=True)
