"""The private copy that a background save writes from: exact, untouched by what training does, in the same memory."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ray_ckpt.errors import CommitError, UsageError
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.protocol.holdings import Holdings, hold
from ray_ckpt.protocol.host_copy import HostCopy
from ray_ckpt.storage.objects import saved_object
from ray_ckpt.storage.staging import Converted
from tests.test_kinds import DTYPES


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def state() -> dict[str, Any]:
    return {
        "matrix": torch.arange(12.0).reshape(3, 4),
        "transposed": torch.arange(12.0).reshape(3, 4).t(),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 5, dtype=torch.bfloat16),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "parameter": torch.nn.Parameter(torch.ones(3)),
    }


def by_name(holdings: Holdings) -> dict[str, Any]:
    return {item.name: value for item, value in zip(holdings.items, holdings.values, strict=True)}


def test_every_kind_of_tensor_is_copied_exactly_and_keeps_its_values() -> None:
    original = state()
    expected = {name: tensor.detach().clone() for name, tensor in original.items()}
    copied = by_name(HostCopy().take(hold(original)))
    with torch.no_grad():
        for tensor in original.values():
            tensor.fill_(99)
    for name, tensor in expected.items():
        assert torch.equal(copied[name], tensor)
        assert (copied[name].dtype, copied[name].shape) == (tensor.dtype, tensor.shape)
        assert tensor.numel() == 0 or not torch.equal(copied[name], original[name])


@pytest.mark.parametrize("name", [*DTYPES, "uint4"])
def test_every_dtype_is_copied_bit_for_bit(name: str) -> None:
    dtype = parse_dtype(name)
    raw = torch.arange(6 * dtype.itemsize, dtype=torch.uint8) % (2 if dtype == torch.bool else 251)
    tensor = raw.view(dtype)
    [copied] = HostCopy().take(hold({"w": tensor})).values
    assert copied.data_ptr() != tensor.data_ptr()
    assert bits(copied) == raw.tolist()


def test_objects_keep_the_value_they_had() -> None:
    options, extra = {"betas": [0.9, 0.999]}, {"seen": {1, 2}}
    original = {"options": (options,), "lr": 1e-3, "name": "adam", "extra": (extra,)}
    expected = {
        "options": saved_object(({"betas": [0.9, 0.999]},)),
        "extra": saved_object(({"seen": {1, 2}},)),
    }
    copied = by_name(HostCopy().take(hold(original)))
    options["betas"][0] = 0.5
    extra["seen"].add(3)
    assert (copied["lr"], copied["name"]) == (1e-3, "adam")
    assert copied["options"] == expected["options"] != saved_object((options,))
    assert copied["extra"] == expected["extra"] != saved_object((extra,))


def test_what_is_skipped_is_not_copied() -> None:
    holdings = hold({"a": torch.ones(1000), "b": torch.ones(500), "c": [1]})
    host_copy = HostCopy()
    copied = host_copy.take(holdings, (0,))
    assert copied.items == holdings.items
    assert copied.values[0] is None
    assert torch.equal(copied.values[1], torch.ones(500))
    assert 2000 <= host_copy.num_bytes <= 2000 + 2 * 64


def test_copies_of_an_unchanged_state_use_the_same_tensors_in_the_same_memory() -> None:
    host_copy = HostCopy()
    tensors = {str(number): torch.full((100,), float(number)) for number in range(10)}
    first = host_copy.take(hold(tensors)).values
    places = [value.data_ptr() for value in first]
    for tensor in tensors.values():
        tensor += 1
    second = host_copy.take(hold(tensors)).values
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert [value.data_ptr() for value in second] == places
    assert all(torch.equal(a, b) for a, b in zip(second, tensors.values(), strict=True))


def test_a_changed_state_is_laid_out_anew_in_what_it_needs() -> None:
    host_copy = HostCopy()
    host_copy.take(hold({"a": torch.ones(1000)}))
    held = host_copy.num_bytes
    for changed in (
        {"a": torch.full((1000,), 2.0, dtype=torch.bfloat16)},
        {"a": torch.full((10, 100), 3.0)},
        {"a": torch.full((400,), 4.0), "b": torch.full((500,), 5.0)},
        {"b": torch.full((1000,), 6.0)},
    ):
        copied = by_name(host_copy.take(hold(changed)))
        assert all(torch.equal(copied[name], tensor) for name, tensor in changed.items())
        assert host_copy.num_bytes == held
    copied = by_name(host_copy.take(hold({"a": torch.arange(5000.0)})))
    assert torch.equal(copied["a"], torch.arange(5000.0))
    assert 20_000 <= host_copy.num_bytes <= 20_064


def test_a_tensor_that_is_not_what_was_planned_is_refused_by_name() -> None:
    holdings = hold({"a": torch.ones(3)})
    changed = Holdings(holdings.items, (torch.ones(4),))
    with pytest.raises(UsageError, match=r"'a' was planned as float32\[3\] but is now torch\.float32\[4\]"):
        HostCopy().take(changed)
    with pytest.raises(UsageError, match=r"'a' is a tensor of layout torch\.sparse_coo"):
        HostCopy().take(hold({"a": torch.eye(3).to_sparse()}))


def test_a_copy_that_was_refused_leaves_the_next_one_right() -> None:
    host_copy = HostCopy()
    with pytest.raises(UsageError):
        host_copy.take(hold({"a": torch.ones(3), "b": torch.eye(3).to_sparse()}))
    [copied] = host_copy.take(hold({"a": torch.ones(3)})).values
    assert torch.equal(copied, torch.ones(3))


def test_the_memory_is_given_back_with_the_copy() -> None:
    host_copy = HostCopy()
    [copied] = host_copy.take(hold({"a": torch.ones(3)})).values
    del host_copy
    gc.collect()
    # A view keeps its memory alive, and stays what it was.
    assert torch.equal(copied, torch.ones(3))


def flip_a_bit_of(tensor: torch.Tensor, element: int) -> None:
    tensor.view(-1).view(torch.uint8)[element * tensor.element_size()] ^= 4


LARGE = {
    "contiguous": lambda: torch.arange(9 << 20),
    "strided": lambda: torch.arange(9 << 20).view(3 << 10, 3 << 10).t(),
    "converted": lambda: torch.arange(9 << 20, dtype=torch.float64),
    "imaginary": lambda: torch.arange(9 << 20, dtype=torch.float64).view(torch.complex128).conj().imag,
}
"""Name -> a tensor of many pieces, each kind copied in a way of its own."""


def hold_large() -> Holdings:
    """With small ones between them, alone and many together."""
    state: dict[str, Any] = {}
    for name, make in LARGE.items():
        state |= {f"before.{name}": torch.ones(3), name: make()}
    state |= {f"small.{n}": torch.full((999,), n, dtype=torch.float16) for n in range(1500)}
    holdings = hold(state)
    at = list(state).index("converted")
    items, values = list(holdings.items), list(holdings.values)
    spec = items[at].spec
    assert spec is not None
    items[at] = items[at]._replace(spec=spec._replace(dtype="float32"))
    values[at] = Converted("converted", values[at], torch.float32)
    return Holdings(tuple(items), tuple(values), holdings.elsewhere)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_large_and_small_ones_are_copied_exactly() -> None:
    original = hold_large()
    copied = by_name(HostCopy().take(original))
    for name, tensor in by_name(original).items():
        expected = tensor.tensor.to(tensor.dtype) if isinstance(tensor, Converted) else tensor
        assert torch.equal(copied[name], expected), name


def test_a_bit_that_flips_after_the_copy_is_found() -> None:
    """Nothing has looked at the copy between `take` and the first flip."""
    host_copy = HostCopy()
    copied = by_name(host_copy.take(hold_large()))
    for name in (*LARGE, "before.strided", "small.0", "small.777", "small.1499"):
        named = f"'{name}'" if name in LARGE else f"'{name[:6]}"  # of many small ones that lie together, the first few
        for element in (0, -1, 5 << 20):
            flip_a_bit_of(copied[name], element % copied[name].numel())
            with pytest.raises(CommitError, match=rf"the copy in host memory of {named}.* has changed since it was"):
                host_copy.check()
            flip_a_bit_of(copied[name], element % copied[name].numel())
    host_copy.check()
    # The next copy in the same memory, smaller than the one before, is compared with itself.
    smaller = by_name(host_copy.take(hold({"small": torch.zeros(5)})))
    host_copy.check()
    flip_a_bit_of(smaller["small"], 4)
    with pytest.raises(CommitError, match="'small' has changed"):
        host_copy.check()


@pytest.mark.parametrize("name", ["betas", "size"])
def test_a_bit_that_flips_in_a_copied_value_is_found(name: str) -> None:
    host_copy = HostCopy()
    copied = by_name(host_copy.take(hold({"lr": 0.1, "betas": [0.9, [0.999]], "size": torch.Size([2, 3])})))
    host_copy.check()
    saved: Any = copied[name]
    if name == "betas":
        saved.inline.value[1][0] = 0.998
    else:
        assert saved.inline is None
        header = sys.getsizeof(b"") - 1
        ctypes.memset(id(saved.container) + header + 500, saved.container[500] ^ 1, 1)
    with pytest.raises(CommitError, match=f"the copy in host memory of '{name}' has changed since it was made"):
        host_copy.check()
