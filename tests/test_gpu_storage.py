"""Saving from and loading to CUDA memory, through pinned buffers."""

from __future__ import annotations

import pytest
import torch

from ray_ckpt.dcp.reader import ArrowStorageReader
from ray_ckpt.dcp.writer import ArrowStorageWriter
from ray_ckpt.errors import IntegrityError
from ray_ckpt.storage.staging import STAGING_BYTES, host_pieces
from tests.support import driver

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def _state(device):
    generator = torch.Generator().manual_seed(0)
    rows = 3 * STAGING_BYTES // 4000 + 7
    state = {
        "larger than the buffers": torch.randn(rows, 1000, generator=generator),
        "transposed": torch.randn(700, 900, generator=generator).t(),
        "half": torch.randn(1001, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0),
        **{f"small.{number}": torch.full((5,), float(number)) for number in range(50)},
    }
    return {name: tensor.to(device) for name, tensor in state.items()}


def _blank(device):
    return {name: torch.full_like(tensor, -1).contiguous() for name, tensor in _state(device).items()}


def _differing(found):
    return [name for name, tensor in _state("cpu").items() if not torch.equal(found[name].cpu(), tensor)]


@pytest.mark.parametrize(("saved_on", "loaded_on"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_round_trip(tmp_path, saved_on, loaded_on):
    driver.save([_state(saved_on)], [ArrowStorageWriter(tmp_path)])
    target = _blank(loaded_on)
    assert len(_differing(target)) == len(target) - 1  # all but the empty one
    assert _differing(driver.load(target, ArrowStorageReader(tmp_path))) == []


def test_pieces_keep_their_order_across_devices():
    tensors = [(n, torch.full((n + 1,), n, dtype=torch.uint8, device=("cpu", "cuda")[n % 2])) for n in range(20)]
    assert [(key, bytes(piece)) for key, piece in host_pieces(tensors)] == [
        (n, bytes([n]) * (n + 1)) for n in range(20)
    ]


def test_damage_is_found_on_the_way_to_the_device(tmp_path):
    driver.save([_state("cuda")], [ArrowStorageWriter(tmp_path)])
    chunk = ArrowStorageReader(tmp_path).read_manifest().tensors["half"].chunks[0]
    data = bytearray((tmp_path / chunk.file).read_bytes())
    data[chunk.data_start] ^= 1
    (tmp_path / chunk.file).write_bytes(data)
    with pytest.raises(IntegrityError, match="'half'"):
        driver.load(_blank("cuda"), ArrowStorageReader(tmp_path))
