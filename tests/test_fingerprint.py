"""The fingerprint of a tensor depends on its bits, their places, its dtype and its shape, and on nothing else."""

from __future__ import annotations

import pickle
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.errors import FormatError
from ray_ckpt.format import fingerprinting, word_sums
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.fingerprint import Fingerprint, merge
from ray_ckpt.format.fingerprinting import fingerprint

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


def fingerprint_part(whole: torch.Tensor, box: Box) -> Fingerprint:
    """The fingerprint a rank would report that holds only this part of `whole`."""
    part = whole
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        part = part.narrow(dim, offset, size)
    total = fingerprinting.sum_of_part(part, box, whole.shape)
    return Fingerprint(str(whole.dtype).removeprefix("torch."), tuple(whole.shape), {box: total})


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
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.complex128, torch.uint8]))
    return torch.arange(Box.whole(shape).num_elements).reshape(shape).to(dtype), boxes


@given(tensor_and_parts())
@settings(max_examples=150, deadline=None)
def test_any_split_adds_up_to_the_whole(case: tuple[torch.Tensor, list[Box]]) -> None:
    whole, boxes = case
    assert merge([fingerprint_part(whole, box) for box in boxes]).digest == fingerprint(whole).digest


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
        monkeypatch.setattr(fingerprinting, "CHUNK_WORDS", chunk)
        digests |= {
            fingerprint(tensor).digest,
            fingerprint(tensor.permute(2, 0, 1).contiguous().permute(1, 2, 0)).digest,
        }
    assert len(digests) == 1


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2)])
def test_scalars_and_empty_tensors_have_a_digest(shape: tuple[int, ...]) -> None:
    assert fingerprint(torch.ones(shape)).digest.startswith(f"float32{list(shape)}:")


def test_the_digest_is_the_formula_in_plain_integers() -> None:
    tensor = torch.arange(1000, dtype=torch.float32) - 500
    assert fingerprint(tensor).digest == "float32[1000]:" + format(_plain_sum(tensor.tolist()), "016x")


def _plain_sum(values: list[float]) -> int:
    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    words = [struct.unpack("<i", struct.pack("<f", value))[0] for value in values]
    return sum(mix((mix(i + 1) + word * 0x9E3779B97F4A7C15) % 2**64) for i, word in enumerate(words)) % 2**64


@given(tensor_and_parts(), st.sampled_from([5, 64, 1 << 16]))
@settings(max_examples=100, deadline=None)
def test_torch_and_numpy_add_up_to_the_same(case: tuple[torch.Tensor, list[Box]], chunk: int) -> None:
    """GPUs take torch's operations, which run here too."""
    whole, boxes = case
    for box in boxes:
        part = whole[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))].contiguous()
        words, dims = fingerprinting._words_and_dims(part, box, whole.shape)
        assert word_sums.sum_words(words.numpy(), dims, chunk) == fingerprinting._sum_on_device(words, dims)


def test_parts_of_any_width_are_the_formula_too() -> None:
    """Narrow and wide rows, of more words than are mixed at once."""
    whole = torch.arange(40 * 3000, dtype=torch.float32).reshape(40, 3000)
    expected = "float32[40, 3000]:" + format(_plain_sum(whole.flatten().tolist()), "016x")
    for cut in (1, 2, 1700):
        boxes = [Box((0, 0), (40, cut)), Box((0, cut), (40, 3000 - cut))]
        assert merge([fingerprint_part(whole, box) for box in boxes]).digest == expected


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
