"""save(only=, cast=, key_map=): bit for bit what saving the whole and converting it would give, in any layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ray_ckpt import CheckpointStore, Manifest, Saved, TrainState, UsageError, compare, load, save, verify
from ray_ckpt.errors import CheckpointError, StateMismatchError
from ray_ckpt.storage.staging import STAGING_BYTES, Converted, host_pieces
from tests.support.ranks import run_ranks

KEY_MAP: dict[str, str | Saved] = {
    "model.qkv": Saved.cat([Saved("model.q"), Saved("model.k"), Saved("model.v")]),
    "model.embed": Saved("model.padded").narrow(0, 0, 5),
    "model.gate": Saved("model.gate_up").chunk(2)[0],
    "model.up": Saved("model.gate_up").chunk(2)[1].transpose(0, 1),
    "model.experts": Saved.stack([Saved("model.expert0"), Saved("model.expert1")]),
    "model.norm": "model.scale",
}
LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "ddp4": ((4,), [Replicate()]),
    "fsdp2x4": ((4,), [Shard(0)]),
    "hsdp2x2": ((2, 2), [Replicate(), Shard(0)]),
    "tp2": ((2,), [Shard(1)]),
    "fsdp2-tp2": ((2, 2), [Shard(0), Shard(1)]),
}


def weights() -> dict[str, torch.Tensor]:
    """Uneven sizes; k has fewer rows than some layouts have ranks."""
    shapes = {"q": (7, 6), "k": (2, 6), "v": (2, 6), "padded": (8, 6), "gate_up": (10, 6), "scale": (6, 3)}
    shapes |= {"expert0": (3, 5), "expert1": (3, 5)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def published() -> dict[str, torch.Tensor]:
    """What torch itself makes of the weights."""
    w = weights()
    made = {
        "qkv": torch.cat([w["q"], w["k"], w["v"]]),
        "embed": w["padded"][:5],
        "gate": w["gate_up"][:5],
        "up": w["gate_up"][5:].T.contiguous(),
        "experts": torch.stack([w["expert0"], w["expert1"]]),
        "norm": w["scale"],
    }
    return {name: tensor.bfloat16() for name, tensor in made.items()}


def distributed(whole: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    sizes, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", sizes)
    return {name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole.items()}


def publish(rank: int, path: str, layout: str, blocking: bool) -> None:
    state = {"model": distributed(weights(), layout), "optim": {"moments": torch.ones(3)}, "step": 3}
    saved = save(state, path, only=("model",), cast="bfloat16", key_map=KEY_MAP, blocking=blocking, fingerprints=True)
    if not blocking:
        for tensor in state["model"].values():
            tensor.to_local().zero_()  # training goes on
        saved.result(30)  # type: ignore[union-attr]


def fetch(rank: int, path: str, layout: str) -> tuple[int, int, bool, bool]:
    """Number of different tensors before and after, and whether `compare` finds no difference, and finds one bit."""
    expected = distributed(published(), layout)
    state = {"model": {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}}

    def differing() -> int:
        pairs = [(state["model"][name].to_local(), expected[name].to_local()) for name in expected]
        return sum(not torch.equal(held, wanted) for held, wanted in pairs)

    before = differing()
    load(state, path)
    after, equal = differing(), compare(state, path).equal
    if rank == 0:
        state["model"]["qkv"].to_local().view(torch.int16)[0, 0] ^= 1
    return before, after, equal, compare(state, path).equal


@pytest.mark.parametrize(
    ("saved", "loaded", "blocking"),
    [
        ("fsdp2x4", "tp2", False),
        ("fsdp2-tp2", "fsdp2x4", True),
        pytest.param("tp2", "hsdp2x2", False, marks=pytest.mark.slow),
        pytest.param("hsdp2x2", "ddp4", True, marks=pytest.mark.slow),
        pytest.param("ddp4", "fsdp2-tp2", True, marks=pytest.mark.slow),
    ],
)
def test_any_layout_publishes_what_any_other_fetches(tmp_path: Path, saved: str, loaded: str, blocking: bool) -> None:
    path = str(tmp_path / "policy")
    run_ranks(publish, math.prod(LAYOUTS[saved][0]), tmp_path, path, saved, blocking)
    assert verify(path).num_tensors == len(KEY_MAP)
    for before, after, equal, flipped in run_ranks(fetch, math.prod(LAYOUTS[loaded][0]), tmp_path, path, loaded):
        assert (before > 0, after, equal, flipped) == (True, 0, True, False)


def test_what_is_saved_is_what_saving_all_and_converting_gives(tmp_path: Path) -> None:
    state = {"model": weights(), "step": 3}
    save(state, tmp_path / "whole")
    save(state, tmp_path / "part", only=("model",), cast=torch.bfloat16, key_map=KEY_MAP)
    read = {"model": {name: torch.zeros_like(tensor) for name, tensor in published().items()}}
    load(read, tmp_path / "whole", cast=True, strict=False, only=("model",), key_map=KEY_MAP)
    got = {"model": {name: torch.zeros_like(tensor) for name, tensor in published().items()}}
    load(got, tmp_path / "part")
    for name, expected in published().items():
        assert torch.equal(read["model"][name], expected), name
        assert torch.equal(got["model"][name], expected), name


def model_and_optimizer() -> TrainState:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return TrainState(model, optimizer, step=5)


def test_a_part_is_honest_about_being_one(tmp_path: Path) -> None:
    state = model_and_optimizer()
    store = CheckpointStore(tmp_path)
    save(state, store, 1, only=("model",), cast="bfloat16")
    dtypes = {name: entry.dtype for name, entry in store.manifest(1).tensors.items()}
    assert dtypes["model.0.weight"] == "bfloat16"
    assert dtypes["model.1.num_batches_tracked"] == "int64"
    assert all(name.startswith("model.") for name in dtypes)
    fresh = model_and_optimizer()
    with pytest.raises(StateMismatchError, match=r"counters.step: not saved.*optim.param_groups.0.bias: not saved"):
        load(fresh, store, cast=True)
    with pytest.raises(StateMismatchError, match=r"saved bfloat16\[4\], wanted float32\[4\].*cast=True"):
        load(fresh, store, only=("model",))
    assert load(fresh, store, only=("model",), cast=True).missing == ()
    for name, tensor in fresh.state_dict()["model"].items():
        assert torch.equal(tensor, state.state_dict()["model"][name].bfloat16().to(tensor.dtype)), name


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"cast": "bfloat16"}, UsageError, r"optim.state.0.weight.step is an optimizer's state.*only=\('model',\)"),
    ({"key_map": {"model.w": "model.0.weight"}}, UsageError, "is an optimizer's state"),
    ({"only": ("modle",)}, UsageError, "no rank holds anything of only='modle'"),
    ({"only": "model"}, UsageError, "one text"),
    ({"cast": "int8", "only": ("model",)}, UsageError, "cast='int8' is none of the dtypes"),
    ({"key_map": str.upper, "only": ("model",)}, UsageError, "is a mapping"),
    ({"key_map": {"x": "model.0.wieght"}, "only": ("model",)}, UsageError, r"no rank holds anything of key_map\['x'\]"),
    ({"key_map": {"model.0.bias": "model.0.weight"}, "only": ("model",)}, UsageError, "which the state has already"),
    (
        {"key_map": {"x": Saved.cat([Saved("model.0.weight"), Saved("model.none")])}, "only": ("model",)},
        UsageError,
        r"it lacks model\.none",
    ),
    (
        {"key_map": {n: Saved("model.0.weight").narrow(0, 0, 3) for n in "a"} | {"b": "model.0.weight"}},
        UsageError,
        "is an optimizer's state",
    ),
    (
        {
            "key_map": {"a": Saved("model.0.weight").narrow(0, 0, 3), "b": "model.0.weight"},
            "only": ("model",),
        },
        StateMismatchError,
        "more than once",
    ),
]


@pytest.mark.parametrize(("options", "error", "text"), REFUSED)
def test_what_cannot_be_is_refused_and_nothing_is_saved(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        save(model_and_optimizer(), tmp_path / "run", **options)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("blocking", [True, False])
def test_a_cast_that_makes_a_number_infinite_is_refused_by_name(tmp_path: Path, blocking: bool) -> None:
    state = {"fine": torch.tensor([math.inf, math.nan, -60_000.0]), "large": torch.tensor([1.0, 70_000.0])}

    def saved(**options: Any) -> None:
        done = save(state, tmp_path / "run", cast="float16", blocking=blocking, **options)
        if not blocking:
            done.result(30)

    with pytest.raises((UsageError, CheckpointError), match=r"'large' has elements beyond 65504, the largest torch.fl"):
        saved()
    saved(only=("fine",))
    got = {"fine": torch.zeros(3, dtype=torch.float16)}
    load(got, tmp_path / "run")
    assert got["fine"].isinf().tolist() == [True, False, False]
    assert got["fine"].isnan().tolist() == [False, True, False]


def test_options_that_change_between_saves_are_seen(tmp_path: Path) -> None:
    state = {"a": torch.ones(3), "b": torch.ones(2)}
    for number, options in enumerate([{"only": ("a",)}, {}, {"only": ("a",)}, {"cast": "float16"}]):
        save(state, tmp_path / str(number), **options)
    names = [
        {
            n: e.dtype
            for n, e in Manifest.from_json((tmp_path / str(i) / "manifest.json").read_bytes(), "").tensors.items()
        }
        for i in range(4)
    ]
    assert names == [
        {"a": "float32"},
        {"a": "float32", "b": "float32"},
        {"a": "float32"},
        dict.fromkeys("ab", "float16"),
    ]
    with pytest.raises(UsageError, match="only='c'"):
        save(state, tmp_path / "4", only=("a", "b", "c"), cast="float16")  # the same plan as before


def test_a_cast_takes_bounded_memory() -> None:
    tensor = torch.arange(3 * STAGING_BYTES // 4, dtype=torch.float32).reshape(6, -1).T
    for dtype in (torch.bfloat16, torch.float64):
        wanted = tensor.to(dtype).contiguous().view(torch.uint8).reshape(-1)
        windows = list(Converted("x", tensor, dtype).windows())
        assert max(window.nbytes for window in windows) <= STAGING_BYTES
        pieces = [bytes(piece) for _, piece in host_pieces([("x", Converted("x", tensor, dtype))])]
        assert b"".join(pieces) == wanted.numpy().tobytes()
