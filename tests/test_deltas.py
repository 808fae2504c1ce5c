"""Weights published as what has changed: rebuilt bit for bit in any layout, or refused by name."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ray_ckpt import (
    ArrowStorageReader,
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointStore,
    IntegrityError,
    Saved,
    StateMismatchError,
    TrainState,
    UsageError,
    WeightFollower,
    WeightPublisher,
    compare,
    convert,
    diff,
    export,
    inspect,
    keep_last,
    list_steps,
    load,
    open_weights,
    save,
    scan_nonfinite,
    sign,
    verify,
)
from ray_ckpt.errors import CheckpointExistsError, FormatError
from ray_ckpt.format import deltas
from ray_ckpt.storage import checkpoint_reader, delta_codec
from ray_ckpt.storage.delta_codec import apply_delta, encode_delta
from tests.support.clusters import wait_until
from tests.support.ranks import run_ranks

NUM_VERSIONS = 8
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KINDS = {
    "matrix": (torch.bfloat16, (37, 64)),
    "large": (torch.bfloat16, (300, 400)),
    "exact": (torch.float32, (129,)),
    "double": (torch.float64, (5, 7)),
    "mask": (torch.bool, (11, 3)),
    "counts": (torch.int64, (4,)),
    "scalar": (torch.bfloat16, ()),
    "empty": (torch.float16, (0, 3)),
    "eighths": (torch.float8_e4m3fn, (10, 10)),
}


def any_bits(dtype: torch.dtype, shape: tuple[int, ...], chance: torch.Generator) -> torch.Tensor:
    """Every pattern of bits, with NaN of all kinds, infinities and denormals."""
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=chance).bool()
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=chance).view(dtype).view(shape)


def step_on(state: dict[str, torch.Tensor], chance: torch.Generator) -> None:
    """Change some elements of some tensors, to any bits."""
    for tensor in state.values():
        words = WORDS[tensor.itemsize]
        flat = tensor.view(-1).view(words)
        fresh = any_bits(tensor.dtype, tuple(tensor.shape), chance).view(-1).view(words)
        changed = torch.rand(flat.shape, generator=chance) < 0.05
        changed &= torch.rand((), generator=chance) < 0.7
        flat[changed] = fresh[changed]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and bytes(
        one.contiguous().view(-1).view(torch.uint8).tolist()
    ) == bytes(other.contiguous().view(-1).view(torch.uint8).tolist())


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same_bits(found[name], wanted[name])] == []


def blank(of: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(tensor) for name, tensor in of.items()}


def publish_versions(target: Path, seed: int = 0, **options: Any) -> list[dict[str, torch.Tensor]]:
    """Versions from 0 of all kinds of tensors."""
    chance = torch.Generator().manual_seed(seed)
    state = {name: any_bits(dtype, shape, chance) for name, (dtype, shape) in KINDS.items()}
    publisher, versions = WeightPublisher(target, **options), []
    for version in range(NUM_VERSIONS):
        publisher.save(state, version)
        versions.append({name: tensor.clone() for name, tensor in state.items()})
        step_on(state, chance)
    return versions


def is_delta(store: CheckpointStore, step: int) -> bool:
    return deltas.LINK in store.manifest(step).objects


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


class TestCodec:
    @given(
        before=st.binary(max_size=4096),
        element_bytes=st.sampled_from([1, 2, 4, 8, 16]),
        seed=st.integers(0, 1000),
        frame=st.sampled_from([16, 64, 1 << 20]),
    )
    @settings(deadline=None)
    def test_what_changed_makes_the_next_version(
        self, before: bytes, element_bytes: int, seed: int, frame: int
    ) -> None:
        before = before[: len(before) // element_bytes * element_bytes]
        chance = random.Random(seed)
        now = bytes(byte ^ (chance.randrange(256) if chance.random() < 0.1 else 0) for byte in before)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(delta_codec, "FRAME_BYTES", frame)
            coded = encode_delta(memoryview(before), memoryview(now), element_bytes)
            version = bytearray(before)
            apply_delta(memoryview(coded), memoryview(version), element_bytes)
        assert version == now

    def test_a_few_changes_take_few_bytes(self) -> None:
        before = torch.randn(1 << 20).bfloat16()
        now = before.clone()
        now[::1000] += 1
        views = [memoryview(tensor.view(torch.uint8).numpy()) for tensor in (before, now)]  # type: ignore[arg-type]
        assert len(encode_delta(*views, 2)) < before.nbytes // 100

    @pytest.mark.parametrize("damage", ["cut", "longer", "no head", "bits", "of fewer", "of more"])
    def test_what_is_no_delta_of_these_elements_is_refused(self, damage: str) -> None:
        before, now = bytes(10_000), bytes(range(250)) * 40
        coded = encode_delta(memoryview(before), memoryview(now), 2)
        wrong = {
            "cut": coded[:-1],
            "longer": coded + b"x",
            "no head": coded[:3],
            "bits": coded[:8] + bytes([coded[8] ^ 255]) + coded[9:],
            "of fewer": encode_delta(memoryview(before[:9000]), memoryview(now[:9000]), 2),
            "of more": encode_delta(memoryview(before + b"xx"), memoryview(now + b"yy"), 2),
        }[damage]
        with pytest.raises(FormatError):
            apply_delta(memoryview(wrong), memoryview(bytearray(before)), 2)


class TestVersions:
    @pytest.mark.parametrize("seed", range(3))
    def test_each_is_rebuilt_bit_for_bit(self, tmp_path: Path, seed: int) -> None:
        versions = publish_versions(tmp_path, seed)
        store = CheckpointStore(tmp_path)
        assert [is_delta(store, step) for step in store.steps()] == [False] + [True] * 7
        assert store.manifest(7).total_bytes < store.manifest(0).total_bytes / 2
        for step, wanted in enumerate(versions):
            held = blank(wanted)
            assert not same_bits(held["matrix"], wanted["matrix"])
            load(held, store, step)
            assert_same(held, wanted)
            assert compare(held, store, step).equal
            assert not compare(held, store, (step + 1) % 8).equal
            assert verify(store, step=step).verified
            assert_same(dict(open_weights(store, step)), wanted)
        assert store.latest() == 7

    @pytest.mark.parametrize("batch_bytes", [1, 10_000])
    def test_they_are_rebuilt_in_batches_of_any_size(
        self, tmp_path: Path, batch_bytes: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = publish_versions(tmp_path)
        monkeypatch.setattr(checkpoint_reader, "BATCH_BYTES", batch_bytes)
        held, told = blank(versions[7]), list[tuple[int, int]]()
        load(held, tmp_path, progress=lambda done, total: told.append((done, total)))
        assert_same(held, versions[7])
        assert told[-1][0] == told[-1][1] > 0

    def test_every_so_many_are_whole(self, tmp_path: Path) -> None:
        publish_versions(tmp_path, whole_every=3)
        store = CheckpointStore(tmp_path)
        assert [step for step in store.steps() if not is_delta(store, step)] == [0, 3, 6]
        with pytest.raises(UsageError, match="whole_every=0"):
            WeightPublisher(tmp_path, whole_every=0)

    def test_a_version_with_other_tensors_is_whole(self, tmp_path: Path) -> None:
        publisher, store = WeightPublisher(tmp_path), CheckpointStore(tmp_path)
        states = [
            {"a": torch.ones(300)},
            {"a": torch.ones(300), "b": torch.ones(3)},
            {"a": torch.ones(300)},
            {"a": torch.ones(300).bfloat16()},
            {"a": torch.ones(30, 10).bfloat16()},
            {"a": torch.ones(30, 10).bfloat16()},
        ]
        for step, state in enumerate(states):
            publisher.save(state, step)
            held = blank(state)
            load(held, store, step)
            assert_same(held, state)
        assert [is_delta(store, step) for step in store.steps()] == [False] * 5 + [True]

    def test_a_tensor_is_a_delta_only_where_that_is_smaller(self, tmp_path: Path) -> None:
        publisher, store = WeightPublisher(tmp_path), CheckpointStore(tmp_path)
        chance = torch.Generator().manual_seed(0)
        state = {"noise": any_bits(torch.float32, (1000,), chance), "still": torch.randn(1000)}
        publisher.save(state, 0)
        state["noise"] = any_bits(torch.float32, (1000,), chance)
        publisher.save(state, 1)
        parts = deltas.parts_of(store.manifest(1))
        assert {key[0]: (part.coding, part.length < 4000) for key, part in parts.items()} == {
            "noise": ("whole", False),
            "still": ("xor", True),
        }
        held = blank(state)
        load(held, store)
        assert_same(held, state)

    def test_values_and_options_go_with_them(self, tmp_path: Path) -> None:
        publisher = WeightPublisher(tmp_path)
        fused = {"model.qk": Saved.cat([Saved("model.q"), Saved("model.k")])}
        for version in (1, 2):
            state = {
                "model": {"q": torch.full((4, 8), float(version)), "k": torch.ones(2, 8), "extra": {"seen": version}},
                "optim": {"momentum": torch.ones(3)},
            }
            publisher.save(state, version, only=("model",), cast="bfloat16", key_map=fused)
            wanted = torch.cat([state["model"]["q"], state["model"]["k"]]).bfloat16()
            held = {"model": {"qk": torch.zeros(6, 8).bfloat16(), "extra": {"seen": 0}}}
            load(held, tmp_path)
            assert torch.equal(held["model"]["qk"], wanted)
            assert held["model"]["extra"] == {"seen": version}
        assert is_delta(CheckpointStore(tmp_path), 2)

    def test_what_is_no_state_of_weights_is_refused(self, tmp_path: Path) -> None:
        model = torch.nn.Linear(3, 3)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        publisher = WeightPublisher(tmp_path)
        with pytest.raises(UsageError, match=r"deltas are for weights.*only=\('model',\)"):
            publisher.save(TrainState(model, optimizer), 0)
        with pytest.raises(UsageError, match="a name that deltas have for themselves"):
            publisher.save({deltas.SECTION: {"link": torch.ones(3)}}, 0)
        assert CheckpointStore(tmp_path).steps() == ()
        publisher.save(TrainState(model, optimizer), 0, only=("model",))
        publisher.save(TrainState(model, optimizer), 1, only=("model",))
        assert is_delta(CheckpointStore(tmp_path), 1)
        assert dict(open_weights(tmp_path)).keys() == {"weight", "bias"}

    def test_of_two_publishers_each_builds_on_its_own(self, tmp_path: Path) -> None:
        publishers, store = [WeightPublisher(tmp_path), WeightPublisher(tmp_path)], CheckpointStore(tmp_path)
        states = [{"a": torch.full((500,), float(number))} for number in range(2)]
        for step in range(6):
            state = states[step % 2]
            state["a"][step] = 7
            publishers[step % 2].save(state, step)
            held = blank(state)
            load(held, store)
            assert_same(held, state)
        assert [is_delta(store, step) for step in range(6)] == [False, False, True, True, True, True]
        assert_same(dict(open_weights(store, 4)), states[0])

    def test_after_a_failure_the_next_builds_on_what_was_published(self, tmp_path: Path) -> None:
        publisher, store = WeightPublisher(tmp_path), CheckpointStore(tmp_path)
        state = {"a": torch.zeros(500)}
        publisher.save(state, 0)
        save({"a": torch.ones(500)}, store, 1)
        state["a"][1] = 1
        with pytest.raises(CheckpointExistsError):
            publisher.save(state, 1)
        state["a"][2] = 2
        publisher.save(state, 2)
        assert is_delta(store, 2)
        assert deltas.link_of(store.manifest(2)).step == 0  # type: ignore[union-attr]
        assert_same(dict(open_weights(store, 2)), state)

    @pytest.mark.parametrize("change", ["saved again", "deleted", "damaged", "pruned between"])
    def test_without_the_version_before_one_is_whole(self, tmp_path: Path, change: str) -> None:
        publisher, store = WeightPublisher(tmp_path), CheckpointStore(tmp_path)
        state = {"a": torch.zeros(500)}
        publisher.save(state, 0)
        publisher.save(state, 1)
        if change == "saved again":
            save({"a": torch.ones(500)}, store, 1, overwrite=True)
        elif change == "deleted":
            store.delete(1)
        elif change == "damaged":
            flip(tmp_path / "step-1" / "manifest.json", 40)
        else:
            store.delete(0)
        publisher.save(state, 2)
        assert not is_delta(store, 2)
        assert_same(dict(open_weights(store, 2)), state)


class TestChains:
    def test_a_missing_step_is_named_and_what_needs_it_is_damaged(self, tmp_path: Path) -> None:
        versions = publish_versions(tmp_path)
        store = CheckpointStore(tmp_path)
        store.delete(3)
        held = blank(versions[0])
        for verb in (load, compare):
            with pytest.raises(CheckpointNotFoundError, match=r"step-4 is built on step 3 of .*, which is not there"):
                verb(held, store, 6)
        with pytest.raises(CheckpointNotFoundError, match="built on step 3"):
            open_weights(store, 7)
        assert_same(held, blank(versions[0]))
        with pytest.raises(FormatError, match=r"step 7 .* is damaged: .*built on step 3 .* step 2 is good"):
            store.latest()
        assert load(held, store, fallback=True).step == 2
        assert_same(held, versions[2])
        assert "built on step 3" in str(verify(store, step=7))

    def test_another_step_of_the_same_number_is_no_base(self, tmp_path: Path) -> None:
        versions = publish_versions(tmp_path)
        store = CheckpointStore(tmp_path)
        other = {name: tensor.clone() for name, tensor in versions[0].items()}
        other["counts"][0] ^= 1
        save(other, store, 0, overwrite=True)
        held = blank(versions[0])
        with pytest.raises(FormatError, match=r"step-1 is built on a step 0 that held .*: it was saved again"):
            load(held, store, 7)
        assert_same(held, blank(versions[0]))
        assert not verify(store, step=1).verified
        save(versions[0], store, 0, overwrite=True)  # the same again
        load(held, store, 7)
        assert_same(held, versions[7])

    @pytest.mark.parametrize("step", [0, 3, 7])
    def test_a_flipped_bit_anywhere_in_the_chain_is_found(self, tmp_path: Path, step: int) -> None:
        versions = publish_versions(tmp_path)
        store = CheckpointStore(tmp_path)
        manifest = store.manifest(step)
        name = "large" if step == 0 else f"{deltas.BYTES}.0"
        [chunk] = manifest.tensors[name].chunks
        assert chunk.data_start is not None
        flip(tmp_path / f"step-{step}" / chunk.file, chunk.data_start + 100)
        with pytest.raises(IntegrityError):
            load(blank(versions[7]), store, 7)
        with pytest.raises(IntegrityError):
            dict(open_weights(store, 7))
        assert not verify(store, step=step).verified

    def test_what_is_rebuilt_is_compared_with_what_was_published(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = publish_versions(tmp_path)

        def wrong(coded: memoryview, version: memoryview, element_bytes: int) -> None:
            apply_delta(coded, version, element_bytes)
            if len(version):
                version[0] ^= 1

        monkeypatch.setattr("ray_ckpt.storage.delta_chain.apply_delta", wrong)
        with pytest.raises(IntegrityError):
            load(blank(versions[7]), tmp_path, 7)

    def test_prune_keeps_what_is_built_on(self, tmp_path: Path) -> None:
        versions = publish_versions(tmp_path, whole_every=3)  # 0 1 2, 3 4 5, 6 7
        store = CheckpointStore(tmp_path)
        assert store.prune(keep_last(3)).removed == (0, 1, 2)
        held = blank(versions[5])
        load(held, store, 5)
        assert_same(held, versions[5])
        assert store.prune(keep_last(1)).kept == (6, 7)
        load(held, store)
        assert_same(held, versions[7])

    def test_a_delta_outside_its_store_is_refused(self, tmp_path: Path) -> None:
        publish_versions(tmp_path / "policy")
        (tmp_path / "policy" / "step-7").rename(tmp_path / "alone")
        with pytest.raises(CheckpointNotFoundError, match="is built on step 6"):
            load({"scalar": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "alone")

    @pytest.mark.parametrize(
        ("entry", "value"),
        [
            (deltas.LINK, "{}"),
            (deltas.LINK, "no JSON"),
            (deltas.LINK, '{"step": -1, "identity": ""}'),
            (deltas.LINK, '{"step": true, "identity": ""}'),
            (f"{deltas.PARTS}.0", "nonsense"),
            (f"{deltas.PARTS}.0", 3),
        ],
    )
    def test_a_record_that_says_nonsense_is_refused(self, tmp_path: Path, entry: str, value: object) -> None:
        publisher = WeightPublisher(tmp_path)
        state = {"a": torch.zeros(500)}
        publisher.save(state, 0)
        publisher.save(state, 1)
        manifest = CheckpointStore(tmp_path).manifest(1)
        hostile = {name: found.inline.value for name, found in manifest.objects.items() if found.inline is not None}
        hostile |= {f"{deltas.BYTES}.0": torch.zeros(40, dtype=torch.uint8), entry: value}
        save(hostile, tmp_path, 2)
        with pytest.raises(FormatError):
            load(state, tmp_path, 2)


class TestFollower:
    def test_it_reads_only_what_has_changed(self, tmp_path: Path) -> None:
        publisher, follower = WeightPublisher(tmp_path, whole_every=6), WeightFollower(tmp_path)
        state = {"a": torch.randn(500, 300).bfloat16(), "b": torch.randn(70).bfloat16()}
        served, read = blank(state), []
        for version in range(8):
            publisher.save(state, version)
            if version not in (3, 4):  # it need not come every time
                report = follower.fetch(served, wait_for=version, wait_s=30)
                assert report.step == version
                assert_same(served, state)
                read.append(report.num_bytes)
            state["a"].view(-1)[version::1000] += 1
            state["b"][:] += 1
        size = 2 * (500 * 300 + 70)
        assert [num_bytes == size for num_bytes in read] == [True, False, False, False, True, False]
        assert all(num_bytes in (size, *range(1, size // 20)) for num_bytes in read)
        assert follower.fetch(served).num_bytes == 0

    def test_late_ones_and_those_that_have_fallen_behind_get_all_of_it(self, tmp_path: Path) -> None:
        versions = publish_versions(tmp_path, whole_every=4)  # 0 1 2 3, 4 5 6 7
        late, behind = WeightFollower(tmp_path), WeightFollower(tmp_path)
        served = blank(versions[0])
        assert late.fetch(served).step == 7
        assert_same(served, versions[7])
        for step in (1, 7, 2):
            behind.fetch(served, step)
            assert_same(served, versions[step])

    @pytest.mark.parametrize("change", ["one bit", "another tensor", "swapped"])
    def test_what_was_changed_meanwhile_is_loaded_whole(self, tmp_path: Path, change: str) -> None:
        versions = publish_versions(tmp_path)
        follower, served = WeightFollower(tmp_path), blank(versions[0])
        follower.fetch(served, 3)
        if change == "one bit":
            served["large"].view(torch.int16)[299, 399] ^= 1
        elif change == "another tensor":
            served["large"] = torch.zeros_like(served["large"])
        else:
            served["double"].copy_(versions[2]["double"].flip(0))
        assert follower.fetch(served, 4).num_bytes == sum(tensor.nbytes for tensor in served.values())
        assert_same(served, versions[4])
        assert follower.fetch(served, 5).num_bytes < 100_000
        assert_same(served, versions[5])

    def test_tied_and_strided_tensors_are_right(self, tmp_path: Path) -> None:
        publisher, follower = WeightPublisher(tmp_path), WeightFollower(tmp_path)
        tied = torch.zeros(20, 30)
        wide = torch.zeros(30, 40)
        served = {"one": tied, "two": tied, "column": wide[:, 3:13], "turned": torch.zeros(6, 9).t()}
        state = {"one": torch.ones(20, 30), "column": torch.ones(30, 10), "turned": torch.ones(9, 6)}
        for version in range(3):
            publisher.save({**state, "two": state["one"]}, version)
            follower.fetch(served)
            assert_same(served, {"one": state["one"], "two": state["one"], **state})
            for tensor in state.values():
                tensor[version] += 3
        del served["two"]
        for version in (3, 4, 5):
            publisher.save(state, version)
            num_bytes = follower.fetch(served).num_bytes
            assert_same(served, state)
            state["column"][0] += 1
        assert num_bytes < 400
        assert not wide[:, :3].any()
        assert not wide[:, 13:].any()

    def test_a_part_that_was_published_whole_is_taken_whole(self, tmp_path: Path) -> None:
        publisher, follower = WeightPublisher(tmp_path), WeightFollower(tmp_path)
        chance = torch.Generator().manual_seed(0)
        state = {"noise": any_bits(torch.float32, (1000,), chance), "still": torch.randn(1000)}
        served = blank(state)
        publisher.save(state, 0)
        follower.fetch(served)
        for version in (1, 2, 3):
            if version < 3:
                state["noise"] = any_bits(torch.float32, (1000,), chance)
            publisher.save(state, version)
        follower.fetch(served)
        assert_same(served, state)

    def test_a_fetch_that_fails_changes_nothing_and_the_next_one_is_right(self, tmp_path: Path) -> None:
        versions = publish_versions(tmp_path)
        follower, served = WeightFollower(tmp_path), blank(versions[0])
        follower.fetch(served, 5)
        [chunk] = CheckpointStore(tmp_path).manifest(7).tensors[f"{deltas.BYTES}.0"].chunks
        assert chunk.data_start is not None
        flip(tmp_path / "step-7" / chunk.file, chunk.data_start)
        with pytest.raises(IntegrityError):
            follower.fetch(served, 7)
        assert_same(served, versions[5])
        follower.fetch(served, 6)
        assert_same(served, versions[6])
        flip(tmp_path / "step-7" / chunk.file, chunk.data_start)
        assert follower.fetch(served, 7).num_bytes < 100_000
        assert_same(served, versions[7])

    def test_what_is_not_what_was_published_in_the_end_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        versions = publish_versions(tmp_path)
        follower, served = WeightFollower(tmp_path), blank(versions[0])
        follower.fetch(served, 6)

        def wrong(coded: memoryview, version: memoryview, element_bytes: int) -> None:
            apply_delta(coded, version, element_bytes)
            if len(version):
                version[0] ^= 1

        with monkeypatch.context() as patch:
            patch.setattr("ray_ckpt.storage.delta_chain.apply_delta", wrong)
            with pytest.raises(CheckpointError, match="is not what was published"):
                follower.fetch(served, 7)
        assert follower.fetch(served, 7).num_bytes > 100_000
        assert_same(served, versions[7])

    def test_a_step_that_is_saved_again_is_not_taken_for_the_one_that_is_held(self, tmp_path: Path) -> None:
        store, follower = CheckpointStore(tmp_path), WeightFollower(tmp_path)
        served = {"a": torch.zeros(500)}
        save({"a": torch.ones(500)}, store, 0)
        follower.fetch(served)
        save({"a": torch.full((500,), 2.0)}, store, 0, overwrite=True)
        follower.fetch(served)
        assert served["a"].eq(2).all()

    def test_what_does_not_fit_is_refused_by_name(self, tmp_path: Path) -> None:
        publish_versions(tmp_path)
        follower = WeightFollower(tmp_path)
        with pytest.raises(StateMismatchError, match="nobody"):
            follower.fetch({"nobody": torch.zeros(3)})
        with pytest.raises(UsageError, match="give fetch a state dict of tensors"):
            follower.fetch({"model": torch.nn.Linear(2, 2)})
        with pytest.raises(CheckpointNotFoundError, match="step 9"):
            follower.fetch({"scalar": torch.zeros((), dtype=torch.bfloat16)}, 9)


LAYOUTS: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "ddp2": ((2,), [Replicate()]),
    "fsdp2x4": ((4,), [Shard(0)]),
    "hsdp2x2": ((2, 2), [Replicate(), Shard(0)]),
    "tp2": ((2,), [Shard(1)]),
}
SHAPES = {"q": (7, 6), "k": (2, 6), "wide": (130, 90), "norm": (6, 3)}


def version_of(number: int) -> dict[str, torch.Tensor]:
    """What the ranks hold in a version. Few elements change from one to the next."""
    chance = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=chance).bfloat16() for name, shape in SHAPES.items()}
    for each in range(1, number + 1):
        for tensor in state.values():
            tensor.view(-1)[each % 7 :: 50] += each
    return state


def distributed(whole: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    sizes, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", sizes)
    return {name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole.items()}


def publish_in(rank: int, path: str, layout: str) -> None:
    publisher = WeightPublisher(path)
    for version in range(5):
        publisher.save(distributed(version_of(version), layout), version)


def follow_in(rank: int, path: str, layout: str, steps: tuple[int, ...]) -> list[int]:
    follower, read = WeightFollower(path), []
    served = distributed({name: torch.zeros_like(tensor) for name, tensor in version_of(0).items()}, layout)
    for step in steps:
        read.append(follower.fetch(served, step).num_bytes)
        wanted, other = distributed(version_of(step), layout), distributed(version_of(step + 1), layout)
        for name, tensor in served.items():
            assert torch.equal(tensor.to_local(), wanted[name].to_local()), (step, name)  # type: ignore[attr-defined]
        assert any(not torch.equal(t.to_local(), other[n].to_local()) for n, t in served.items())  # type: ignore[attr-defined]
        if rank == 0 and step == 3:  # on one rank alone
            served["wide"].to_local()[0, 0] += 1  # type: ignore[attr-defined]
    return read


@pytest.mark.slow  # a quarter of a minute each
@pytest.mark.parametrize(
    ("published", "followed"), [("fsdp2x4", "tp2"), ("ddp2", "fsdp2x4"), ("tp2", "hsdp2x2"), ("hsdp2x2", "ddp2")]
)
def test_any_layout_follows_any_other(tmp_path: Path, published: str, followed: str) -> None:
    path = str(tmp_path / "policy")
    run_ranks(publish_in, math.prod(LAYOUTS[published][0]), tmp_path, path, published)
    store = CheckpointStore(path)
    assert [is_delta(store, step) for step in store.steps()] == [False] + [True] * 4
    assert all(verify(store, step=step).verified for step in store.steps())
    assert_same(dict(open_weights(store)), version_of(4))
    steps = (0, 1, 3, 4)
    for read in run_ranks(follow_in, math.prod(LAYOUTS[followed][0]), tmp_path, path, followed, steps):
        assert read[1] < read[0] / 2
        assert read[2] < read[0] / 2
        assert read[3] > read[0] / 2  # a rank held something else, so all of them load


def publish_with_other_buffers(rank: int, path: str) -> None:
    """Statistics of a BatchNorm differ among ranks; the weights do not, until they do."""
    torch.manual_seed(0)
    model, publisher = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.BatchNorm1d(40)), WeightPublisher(path)
    for version in range(3):
        model[1].running_mean += rank + 1
        with torch.no_grad():
            model[0].weight[version] += 1
        publisher.save({"model": model}, version)
    if rank == 1:
        with torch.no_grad():
            model[0].weight[5] += 1
    with pytest.raises(CheckpointError, match=r"'model\.0\.weight' on ranks 0 and 1"):
        publisher.save({"model": model}, 3)


def test_replicas_are_published_once_and_may_differ_in_buffers_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "policy")
    run_ranks(publish_with_other_buffers, 2, tmp_path, path)
    store = CheckpointStore(path)
    assert [is_delta(store, step) for step in store.steps()] == [False, True, True]
    weights = dict(open_weights(store))
    assert weights["1.running_mean"].unique().tolist() in ([3.0], [6.0])
    assert weights["0.weight"].shape == (40, 40)


def publish_less_on_one(rank: int, path: str) -> None:
    publisher = WeightPublisher(path)
    publisher.save({f"a{rank}": torch.zeros(500)}, 0)
    if rank == 1:
        publisher = WeightPublisher(path)  # a worker that was started anew
    publisher.save({f"a{rank}": torch.ones(500)}, 1)
    publisher.save({f"a{rank}": torch.ones(500)}, 2)


def test_one_rank_without_a_base_makes_all_publish_whole(tmp_path: Path) -> None:
    path = str(tmp_path / "policy")
    run_ranks(publish_less_on_one, 2, tmp_path, path)
    store = CheckpointStore(path)
    assert [is_delta(store, step) for step in store.steps()] == [False, False, True]
    assert_same(dict(open_weights(store)), {f"a{rank}": torch.ones(500) for rank in range(2)})


class TestOtherVerbs:
    def test_what_copies_looks_and_signs(self, tmp_path: Path) -> None:
        versions = publish_versions(tmp_path / "policy")
        store = CheckpointStore(tmp_path / "policy")
        contents = inspect(store, 7)
        assert {found.name: found.shape for found in contents.tensors()} == {n: s for n, (_, s) in KINDS.items()}
        export(store, tmp_path / "whole", step=7, to="safetensors")
        assert_same(dict(open_weights(tmp_path / "whole")), versions[7])
        convert(store, tmp_path / "copy", step=7)
        held = blank(versions[7])
        load(held, tmp_path / "copy")
        assert_same(held, versions[7])
        assert diff(store, tmp_path / "copy", left_step=7).equal
        assert not diff(store, tmp_path / "copy", left_step=6).equal
        assert scan_nonfinite(store, 7).keys() == scan_nonfinite(tmp_path / "copy").keys()
        by_dcp = blank(versions[7])
        with pytest.warns(UserWarning, match="single process"):
            dcp.load(by_dcp, storage_reader=ArrowStorageReader(store.location(7)), no_dist=True)
        assert_same(by_dcp, versions[7])
        with pytest.raises(UsageError, match="is a delta"):
            sign(store, tmp_path / "no.pem", 7)
        [seventh] = [found for found in list_steps(store).steps if found.step == 7]
        assert seventh.damage == ""


PUBLISH = """
import itertools, sys, torch
from ray_ckpt import WeightPublisher
publisher, state = WeightPublisher(sys.argv[1], whole_every=4), {"a": torch.zeros(3_000_000)}
for version in itertools.count():
    state["a"][version::1000] += 1
    publisher.save(state, version)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 4, 6])
def test_a_publisher_that_is_killed_leaves_whole_versions(tmp_path: Path, victim: int) -> None:
    """It is killed as soon as the directory of a version is there."""
    store = CheckpointStore(tmp_path / "policy")
    with subprocess.Popen([sys.executable, "-c", PUBLISH, str(tmp_path / "policy")]) as process:
        wait_until((tmp_path / "policy" / f"step-{victim}").exists, 60, lambda: store.steps())
        process.kill()
    latest, state = store.latest(), torch.zeros(3_000_000)
    assert latest in (victim - 1, victim)
    for version in range(latest + 1):
        state[version::1000] += 1
    held = {"a": torch.zeros(3_000_000)}
    load(held, store)
    assert torch.equal(held["a"], state)
    store.clean(older_than_s=0)
    assert all(verify(store, step=step).verified for step in store.steps())
    WeightPublisher(store).save({"a": state}, latest + 1)
    assert not is_delta(store, latest + 1)
