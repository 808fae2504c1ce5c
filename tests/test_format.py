"""Containers, byte ranges, values and the manifest's JSON: pure functions, by tables and by hypothesis."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt.errors import FormatError
from ray_ckpt.format import ranges, values
from ray_ckpt.format.block_sums import BlockSums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, Inline, Manifest, ObjectEntry, TensorEntry, itemsize
from ray_ckpt.format.ranges import contiguous_strides
from ray_ckpt.format.torch_container import HEAD_BYTES, container, find_data

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.uint16, torch.complex64, torch.int64]
SHAPES = [(), (0,), (1,), (3, 4), (2, 0, 5), (7, 300)]


def _saved(tensor):
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def _elements(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_containers_are_those_of_torch(dtype, shape):
    """Byte for byte, but for the elements' CRC-32 (in two places), the id of the serialization and its CRC-32s."""
    tensor = torch.ones(shape).to(dtype)
    ours = container(dtype, shape)
    written = ours.head + _elements(tensor) + ours.tail
    expected = _saved(tensor)
    assert len(written) == len(expected) == ours.length
    assert ours.head == expected[: len(ours.head)]
    differing = [n for n, (a, b) in enumerate(zip(written, expected, strict=True)) if a != b]
    assert len(differing) <= 2 * 4 + 40 + 2 * 4
    found = torch.load(io.BytesIO(written))
    assert (found.dtype, tuple(found.shape)) == (dtype, shape)
    assert _elements(found) == _elements(tensor)


@pytest.mark.parametrize("num_bytes", [2**32 - 2, 2**32 - 1, 2**32, 5 * 2**30])
def test_containers_past_32_bits(tmp_path, num_bytes):
    """In a sparse file, so that four gigabytes cost nothing."""
    ours = container(torch.uint8, (num_bytes,))
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(ours.head)
        file.seek(num_bytes - 1, io.SEEK_CUR)
        file.write(b"\x07" + ours.tail)
    assert path.stat().st_size == ours.length
    found = torch.load(path, mmap=True)
    assert found.shape == (num_bytes,)
    assert (int(found[0]), int(found[-1])) == (0, 7)
    stored = find_data(ours.head, ours.length)
    assert (stored.data_start, stored.shape) == (len(ours.head), (num_bytes,))


FOREIGN = {
    "plain": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "strided": torch.arange(24.0).reshape(4, 6)[::2, 1::2],
    "parameter": torch.nn.Parameter(torch.ones(3)),
    "scalar": torch.tensor(3, dtype=torch.int16),
    "offset": torch.arange(9)[5:],
}


@pytest.mark.parametrize("tensor", FOREIGN.values(), ids=FOREIGN)
def test_data_is_found_in_torchs_containers(tensor):
    blob = _saved(tensor)
    stored = find_data(blob[:HEAD_BYTES], len(blob))
    assert (stored.dtype, stored.shape, stored.strides) == (tensor.dtype, tuple(tensor.shape), tensor.stride())
    length = ranges.span(stored.shape, stored.strides) * stored.dtype.itemsize
    raw = torch.frombuffer(bytearray(blob[stored.data_start :][:length]), dtype=stored.dtype)
    assert torch.equal(raw.as_strided(stored.shape, stored.strides), tensor)


NOT_PLAIN = {
    "object": {"a": 1},
    "sparse": torch.eye(3).to_sparse(),
    "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    "two tensors": [torch.ones(2), torch.ones(2)],
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("value", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_other_containers_are_left_to_torch(value):
    blob = _saved(value)
    assert find_data(blob, len(blob)) is None


@given(cut=st.integers(0, 700))
def test_truncated_heads_say_nothing_or_the_truth(cut):
    blob = _saved(torch.arange(12.0))
    found = find_data(blob[:cut], len(blob))
    assert found is None or found == find_data(blob, len(blob))


def test_a_head_that_lies_about_its_length():
    blob = _saved(torch.arange(1000.0))
    assert find_data(blob, len(blob)) is not None
    assert find_data(blob, 1000) is None


_sizes = st.lists(st.integers(1, 7), min_size=0, max_size=4)


@st.composite
def _boxes(draw):
    """A chunk's shape, its strides in some dim order, and a box of it."""
    shape = draw(_sizes)
    order = draw(st.permutations(range(len(shape))))
    permuted = contiguous_strides(tuple(shape[d] for d in order))
    strides = [0] * len(shape)
    for dim, stride in zip(order, permuted, strict=True):
        strides[dim] = stride
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    sizes = [draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    return tuple(shape), tuple(strides), Box(tuple(offsets), tuple(sizes))


@given(case=_boxes(), max_bytes=st.integers(1, 400), max_gap=st.integers(0, 200), itemsize=st.sampled_from([1, 2, 4]))
def test_parts_bring_every_wanted_element_once(case, max_bytes, max_gap, itemsize):
    shape, strides, box = case
    storage = torch.arange(math.prod(shape))
    wanted = torch.full(box.sizes, -1)
    for part in ranges.split(box, strides, itemsize, max_bytes=max_bytes, max_gap=max_gap):
        assert 0 <= part.start < part.end <= len(storage) * itemsize
        assert part.end - part.start <= max(max_bytes, itemsize)
        enclosing = storage[part.start // itemsize : part.end // itemsize]
        place = tuple(
            slice(o - first, o - first + size)
            for o, first, size in zip(part.box.offsets, box.offsets, part.box.sizes, strict=True)
        )
        assert bool((wanted[place] == -1).all())
        wanted[place] = enclosing.as_strided(part.box.sizes, strides)
    whole = storage.as_strided(shape, strides)
    assert torch.equal(wanted, whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))])


@given(
    starts=st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 50)), max_size=30),
    max_gap=st.integers(0, 50),
    max_bytes=st.integers(1, 300),
)
def test_groups_hold_every_range_once(starts, max_gap, max_bytes):
    extents = sorted((start, start + length) for start, length in starts)
    groups = list(ranges.group(extents, max_gap=max_gap, max_bytes=max_bytes))
    assert [position for group in groups for position in group] == list(range(len(extents)))
    for group in groups:
        length = max(extents[p][1] for p in group) - extents[group[0]][0]
        assert len(group) == 1 or length <= max_bytes


@pytest.mark.parametrize(
    ("start", "end", "expected"), [(0, 10, (0, 10)), (1, 2, (0, 10)), (9, 11, (0, 20)), (20, 24, (20, 25))]
)
def test_widening(start, end, expected):
    assert ranges.widen(start, end, 10, 25) == expected


_plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | st.dictionaries(st.text().filter(lambda key: not key.startswith("$")), children, max_size=4)
    ),
    max_leaves=12,
)


def _same(a, b):
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@given(value=_plain)
def test_values_come_back_exactly(value):
    assert _same(values.decode(json.loads(json.dumps(values.encode(value), allow_nan=False))), value)


def test_nan_comes_back():
    assert math.isnan(values.decode(json.loads(json.dumps(values.encode(math.nan), allow_nan=False))))


@pytest.mark.parametrize("value", [b"", {1: 2}, {"$a": 1}, {1}, torch.ones(1), torch.Size([1]), 1j, range(3)], ids=repr)
def test_other_values_are_refused(value):
    with pytest.raises(values.NotPlainError):
        values.encode([value])


@pytest.mark.parametrize("data", [{"$tuple": 1}, {"$float": "1"}, {"$code": ""}, {"$tuple": [], "a": 1}])
def test_unknown_tags_are_refused(data):
    with pytest.raises(FormatError):
        values.decode(data)


def test_manifest_comes_back():
    chunk = Chunk(Box((1, 0), (2, 3)), "f", 64, 2000, 700, BlockSums(4096, b"12345678"), ("stream.x/1",))
    first = Chunk(Box((0, 0), (1, 3)), "f", 3000, 50, 3010, BlockSums(4096, b"abcdefgh"))
    manifest = Manifest(
        tensors={
            "a.b": TensorEntry("float32", (3, 3), (first, chunk), ("a", "b")),
            "c": TensorEntry("bool", (0,), (), None),
        },
        objects={
            "x": ObjectEntry("f", 0, 10, inline=Inline((1, None)), checksum=2**64 - 1, path=("x",)),
            "y": ObjectEntry("f", 0, 10, blob=b"\x00\xff", checksum=0, path=("y", 0, "z")),
        },
        files={"f": 3050},
        attempt="1",
        layout="pp=4",
        saved_by={"torch": "2"},
        fingerprints={"c": "bool[0]:0"},
    )
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest.total_bytes == 3050
    assert manifest.values() == {"x": (1, None)}


def test_the_manifest_of_a_foreign_checkpoint_comes_back():
    """It may lack checksums, and where the elements begin."""
    chunk = Chunk(Box((0,), (3,)), "f", 3000, 50, None, transforms=("stream.x/1",))
    objects = {"y": ObjectEntry("f", 0, 10, path=None)}
    manifest = Manifest({"a": TensorEntry("float32", (3,), (chunk,), ("a",))}, objects, {"f": 3050})
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_a_manifest_is_shown_in_a_line():
    many = {f"{n}": ObjectEntry("f", 0, 10, checksum=1, path=None) for n in range(1000)}
    expected = "<Manifest of 0 tensors and 1000 objects, 10 bytes in 1 files, layout 'pp=4'>"
    assert str(Manifest({}, many, {"f": 10}, layout="pp=4")) == repr(Manifest({}, many, {"f": 10}, layout="pp=4"))
    assert str(Manifest({}, many, {"f": 10}, layout="pp=4")) == expected


def test_manifest_needs_neither_torch_nor_pyarrow(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys, ray_ckpt.format.manifest; print(sorted({'torch', 'pyarrow', 'ray', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "size"),
    [("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1), ("bool", 1), ("complex128", 16), ("float4_e2m1fn_x2", 1)],
)
def test_item_sizes_come_from_the_name(name, size):
    assert itemsize(name) == size
