"""The fingerprint of a tensor depends on its bits, their places, its dtype and its shape, and on nothing else."""

from __future__ import annotations

import pickle
import random
import struct
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.errors import FormatError
from ray_ckpt.format import fingerprinting, word_sums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.fingerprint import CURRENT, FIRST, Fingerprint, formula_of, merge
from ray_ckpt.format.fingerprinting import fingerprint, fingerprint_by

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]


def fingerprint_part(whole: torch.Tensor, box: Box, formula: int = CURRENT) -> Fingerprint:
    """The fingerprint a rank would report that holds only this part of `whole`."""
    part = whole
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        part = part.narrow(dim, offset, size)
    total = fingerprinting.sum_of_part(part, box, whole.shape, formula=formula)
    return Fingerprint(str(whole.dtype).removeprefix("torch."), tuple(whole.shape), {box: total}, formula)


@st.composite
def tensor_and_parts(draw: st.DrawFn) -> tuple[torch.Tensor, list[Box]]:
    """A tensor and a random recursive split of it into boxes."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 4))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.sizes[dim]))
        left = Box(box.offsets, tuple(cut if d == dim else s for d, s in enumerate(box.sizes)))
        right = Box(
            tuple(o + cut if d == dim else o for d, o in enumerate(box.offsets)),
            tuple(s - cut if d == dim else s for d, s in enumerate(box.sizes)),
        )
        boxes += [part for part in (left, right) if part.num_elements]
    dtype = draw(st.sampled_from(DTYPES))
    return torch.arange(Box.whole(shape).num_elements).reshape(shape).to(dtype), boxes


@given(tensor_and_parts(), st.sampled_from([FIRST, CURRENT]))
@settings(max_examples=300, deadline=None)
def test_any_split_adds_up_to_the_whole(case: tuple[torch.Tensor, list[Box]], formula: int) -> None:
    whole, boxes = case
    parts = [fingerprint_part(whole, box, formula) for box in boxes]
    assert merge(parts).digest == fingerprint_by(formula, whole).digest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_flipped_bit_changes_the_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(35).reshape(5, 7).to(dtype)
    before = fingerprint(tensor).digest
    assert fingerprint(tensor.clone()).digest == before
    tensor.view(torch.uint8).reshape(-1)[3] ^= 1
    assert fingerprint(tensor).digest != before


def test_moved_elements_other_dtype_and_other_shape_change_the_digest() -> None:
    tensor = torch.arange(12, dtype=torch.int32).reshape(3, 4)
    digests = {
        fingerprint(tensor).digest,
        fingerprint(tensor.flip(0)).digest,
        fingerprint(tensor.reshape(4, 3)).digest,
        fingerprint(tensor.view(torch.float32)).digest,
        fingerprint(torch.zeros_like(tensor)).digest,
    }
    assert len(digests) == 5


def test_negative_zero_and_nan_payloads_are_bits() -> None:
    assert fingerprint(torch.tensor([0.0])).digest != fingerprint(torch.tensor([-0.0])).digest
    quiet, loud = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32).split(1)
    assert fingerprint(quiet).digest != fingerprint(loud).digest
    assert fingerprint(quiet).digest == fingerprint(quiet.clone()).digest


def test_strided_tensors_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(6 * 10 * 4, dtype=torch.float32).reshape(6, 10, 4)
    digests = set()
    for chunk in (7, 64, 1 << 18):
        monkeypatch.setattr(fingerprinting, "COPIED_ELEMENTS", chunk)
        digests |= {
            fingerprint(tensor).digest,
            fingerprint(tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)).digest,
        }
    assert len(digests) == 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scalars_and_empty_tensors_have_a_digest(shape: tuple[int, ...]) -> None:
    assert fingerprint(torch.ones(shape)).digest.startswith(f"float32{list(shape)}:")


# ------------------------------------------------------------------------------------------------- the formula


def _mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@cache
def _sequence(number: int) -> int:
    return _mix(number * 0x9E3779B97F4A7C15 % 2**64)


def _plain_sum(tensor: torch.Tensor) -> int:
    """What the docstring of `fingerprinting.py` says, a word at a time."""
    size = min(tensor.element_size(), 4) if not tensor.is_complex() else 4
    data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    total, half, block_words = 0, 16, 8192
    for n, at in enumerate(range(0, len(data), size)):
        word = int.from_bytes(data[at : at + size], "little")
        word ^= word >> half
        of_block = _sequence(2 * block_words + 1 + n // block_words)
        key = _sequence((of_block >> 51) + n % block_words + 1) | 1
        total += word * key * (of_block | 1)
    return total % 2**64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_digest_is_the_formula_in_plain_integers(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 256, (20_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensor = (bits % 2).bool() if dtype is torch.bool else bits.view(dtype)
    name = str(dtype).removeprefix("torch.")
    assert fingerprint(tensor).digest == f"{name}[{len(tensor)}]:2:{_plain_sum(tensor):016x}"


def test_the_first_formula_is_what_it_was() -> None:
    tensor = torch.arange(1000, dtype=torch.float32) - 500
    words = [struct.unpack("<i", struct.pack("<f", value))[0] for value in tensor.tolist()]
    odd = 0x9E3779B97F4A7C15
    total = sum(_mix((_mix(i + 1) + word * odd) % 2**64) for i, word in enumerate(words)) % 2**64
    assert fingerprint_by(FIRST, tensor).digest == f"float32[1000]:{total:016x}"


def test_sums_by_two_formulas_are_told_apart() -> None:
    first, current = (fingerprint_by(formula, torch.ones(3)) for formula in (FIRST, CURRENT))
    assert [formula_of(each.digest) for each in (first, current)] == [FIRST, CURRENT]
    with pytest.raises(FormatError, match="different formulas: 1 and 2"):
        merge([first, current])


@given(tensor_and_parts(), st.sampled_from([5, 64, 1 << 16]))
@settings(max_examples=100, deadline=None)
def test_torch_and_numpy_add_up_to_the_same(case: tuple[torch.Tensor, list[Box]], chunk: int) -> None:
    """GPUs take torch's operations, which run here too."""
    whole, boxes = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprinting, "_DEVICE_CHUNK_WORDS", chunk)
        for box in boxes:
            _compare_on_device(whole, box)


def _compare_on_device(whole: torch.Tensor, box: Box) -> None:
    part = whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))].contiguous()
    by_torch = fingerprinting._sum_on_device(*fingerprinting._words_and_dims(part, box, whole.shape))
    assert by_torch == fingerprinting.sum_of_part(part, box, whole.shape)


@pytest.mark.parametrize("shape", [(9, 3000), (3, 12_345), (100, 5, 41)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_parts_of_any_width_are_the_formula_too(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Narrow and wide rows, of more words than a block has, that begin in one block and end in the next."""
    count = Box.whole(shape).num_elements
    whole = torch.randn(count, generator=torch.Generator().manual_seed(2)).to(dtype).reshape(shape)
    expected = _plain_sum(whole)
    for dim in range(len(shape)):
        for cut in (1, shape[dim] // 2, shape[dim] - 1):
            halves = (0, cut), (cut, shape[dim] - cut)
            boxes = [_slab(shape, dim, offset, size) for offset, size in halves]
            assert merge([fingerprint_part(whole, box) for box in boxes]).digest.endswith(f":2:{expected:016x}")
            for box in boxes:
                _compare_on_device(whole, box)


def _slab(shape: Sequence[int], dim: int, offset: int, size: int) -> Box:
    offsets = tuple(offset if d == dim else 0 for d in range(len(shape)))
    return Box(offsets, tuple(size if d == dim else length for d, length in enumerate(shape)))


# ---------------------------------------------------------------------------------------------------- accidents


Accident = Callable[[torch.Tensor, random.Random], None]
"""Changes the bits of a matrix: of bytes, (rows, columns, bytes of an element)."""


def _flip_a_bit(bits: torch.Tensor, chance: random.Random) -> None:
    bits.view(-1)[chance.randrange(bits.numel())] ^= 1 << chance.randrange(8)


def _flip_signs(bits: torch.Tensor, chance: random.Random) -> None:
    """The highest bits of two elements."""
    elements = bits.view(-1, bits.shape[-1])
    elements[chance.sample(range(len(elements)), 2), -1] ^= 0x80


def _flip_all_signs(bits: torch.Tensor, _: random.Random) -> None:
    bits[..., -1] ^= 0x80


def _swap_elements(bits: torch.Tensor, chance: random.Random) -> None:
    elements = bits.view(-1, bits.shape[-1])
    one, other = chance.sample(range(len(elements)), 2)
    elements[[one, other]] = elements[[other, one]]


def _swap_rows(bits: torch.Tensor, chance: random.Random) -> None:
    one, other = chance.sample(range(len(bits)), 2)
    bits[[one, other]] = bits[[other, one]]


def _swap_blocks(bits: torch.Tensor, _: random.Random) -> None:
    """Rows of as many elements as blocks of keys have words, or twice as many."""
    blocks = bits.view(-1)[: 4 * 32768].view(4, -1)
    blocks.copy_(blocks[[1, 0, 3, 2]].clone())


def _shift(bits: torch.Tensor, _: random.Random) -> None:
    elements = bits.view(-1, bits.shape[-1])
    elements.copy_(elements.roll(1, 0))


def _transpose_a_square(bits: torch.Tensor, chance: random.Random) -> None:
    """Two elements of one row with those below them: what keys that are sums of two would miss."""
    (row, below), (column, other) = (chance.sample(range(size), 2) for size in bits.shape[:2])
    one, two = bits[row, column].clone(), bits[row, other].clone()
    bits[row, column], bits[row, other], bits[below, column], bits[below, other] = two, one, one, two


def _move_zeros(bits: torch.Tensor, chance: random.Random) -> None:
    """A run of zeros, by one element."""
    elements = bits.view(-1, bits.shape[-1])
    start = chance.randrange(len(elements) - 100)
    elements[start : start + 50] = elements[start + 1 : start + 51].clone()


ACCIDENTS = [
    _flip_a_bit, _flip_signs, _flip_all_signs, _swap_elements, _swap_rows, _swap_blocks, _shift, _transpose_a_square,
    _move_zeros,
]  # fmt: skip


@pytest.mark.parametrize("accident", ACCIDENTS)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_accidents_change_the_digest(size: int, accident: Accident) -> None:
    """Elements of each width, of random bits and with most of them zero, as rows of one block of keys and others."""
    dtype = {1: torch.uint8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64, 16: torch.complex128}[size]
    chance, generator = random.Random(size), torch.Generator().manual_seed(size)
    for columns in (1000, 8192):
        bits = torch.randint(0, 256, (131_072 // columns, columns, size), dtype=torch.uint8, generator=generator)
        for _ in range(3):
            changed = bits.clone()
            accident(changed, chance)
            is_same = torch.equal(changed, bits)
            assert (fingerprint(changed.view(dtype)).digest == fingerprint(bits.view(dtype)).digest) == is_same
            bits[torch.rand(bits.shape[:2], generator=generator) < 0.7] = 0


def test_a_permutation_of_the_rows_of_an_identity_changes_the_digest() -> None:
    """Blocks that hold the same elements elsewhere, one of them each."""
    for size in (64, 8192 // 4):
        one = torch.eye(size)
        assert fingerprint(one[torch.arange(size).roll(1)]).digest != fingerprint(one).digest
        assert fingerprint(one[torch.randperm(size)]).digest != fingerprint(one).digest


@pytest.mark.parametrize(("flipped", "num_lost"), [(0, 0), (15, 15)])
def test_pairs_of_changes_cancel_as_seldom_as_is_said(flipped: int, num_lost: int) -> None:
    """Bit 0 of two words, or bit 15, the highest of a word of two bytes: the lowest b bits of the sum stay alike by a
    chance of 2^(1 + v - b), v being the number of lower bits that are alike in any case."""
    chance = np.random.default_rng(0)
    b, count = num_lost + 11, 1 << 20
    at = chance.integers(0, 1 << 30, (2, count))
    signs = chance.choice([-1, 1], (2, count))
    starts, factors = word_sums.keys_of(at >> word_sums.BLOCK_BITS)
    keys = word_sums.TABLE[starts + at % word_sums.BLOCK_WORDS] * factors
    sums = (signs * keys).sum(0) << flipped
    found = int(((sums % (1 << b)) == 0).sum())
    expected = count * 2.0 ** (1 + num_lost - b)
    assert 0.8 * expected < found < 1.25 * expected


def test_factors_and_keys_are_odd_and_no_two_keys_are_the_same() -> None:
    starts, factors = word_sums.keys_of(np.arange(1 << 16))
    assert (factors % 2 == 1).all()
    assert (word_sums.TABLE % 2 == 1).all()
    assert len(np.unique(factors)) == len(factors)
    assert len(np.unique(word_sums.TABLE)) == len(word_sums.TABLE)
    assert starts.min() >= 0
    assert starts.max() < word_sums.BLOCK_WORDS


def test_fingerprinting_leaves_the_tensor_alone() -> None:
    for dtype in DTYPES:
        tensor = torch.arange(64).to(dtype)
        before = tensor.clone()
        fingerprint(tensor)
        assert torch.equal(tensor.view(torch.uint8), before.view(torch.uint8))


def test_an_incomplete_fingerprint_has_no_digest() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    with pytest.raises(FormatError, match="4 of 12 elements are missing"):
        _ = fingerprint_part(whole, Box((0, 0), (2, 4))).digest


def test_overlapping_parts_have_no_digest() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    parts = [fingerprint_part(whole, Box((0, 0), (2, 4))), fingerprint_part(whole, Box((1, 0), (2, 4)))]
    with pytest.raises(FormatError, match="overlap"):
        _ = merge(parts).digest


def test_replicas_count_once_and_must_agree() -> None:
    one = fingerprint(torch.ones(3))
    assert merge([one, one]).digest == one.digest
    with pytest.raises(FormatError, match="replicas differ"):
        merge([one, fingerprint(torch.zeros(3))])
    with pytest.raises(FormatError, match="different tensors"):
        merge([one, fingerprint(torch.ones(4))])


def test_a_fingerprint_survives_pickle() -> None:
    one = fingerprint(torch.ones(3))
    assert pickle.loads(pickle.dumps(one)) == one


def test_meta_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        fingerprint(torch.empty(3, device="meta"))
