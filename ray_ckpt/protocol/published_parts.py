"""What a rank has published last, and what has changed since.

every rank   offer     copies what it holds, and compares what it had with the record of the step before
one of them  decide    who writes what of a delta; None where it has to be a whole checkpoint
every rank   changes   what it writes of the delta
every rank   keep      once the step is committed, what it has copied is what it has published last
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import CheckpointError, StorageError, UsageError
from ray_ckpt.format import deltas
from ray_ckpt.format.block_sums import BlockHasher, BlockSums, sums_of
from ray_ckpt.format.deltas import Key, Link, Part
from ray_ckpt.format.manifest import Manifest, itemsize
from ray_ckpt.format.memory import fault
from ray_ckpt.format.translate import OPTIM
from ray_ckpt.format.wanted_names import is_below
from ray_ckpt.protocol.holdings import hold
from ray_ckpt.protocol.messages import TensorSpec, num_bytes
from ray_ckpt.protocol.save_options import SaveOptions
from ray_ckpt.protocol.selecting import select
from ray_ckpt.state.buffers import buffers_of
from ray_ckpt.storage.checkpoint_reader import CheckpointReader
from ray_ckpt.storage.delta_codec import encode_delta
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.staging import Converted, bytes_of, host_pieces


@dataclass(frozen=True)
class Before:
    """The step before, as a rank finds it in the store."""

    link: Link
    manifest: Manifest
    """What it stands for."""

    @classmethod
    def at(cls, storage: Storage, step: int) -> Before:
        """
        Raises:
            CheckpointError, StorageError: it is gone or damaged, or the storage does not answer.
        """
        reader = CheckpointReader(storage)
        stored = reader.read_stored()
        return cls(Link(step, deltas.identity(stored)), reader.read_manifest(stored))


@dataclass(frozen=True)
class Offer:
    """What a rank could publish of a delta."""

    link: Link | None
    """What it would be built on; None where this rank does not have what that held."""
    parts: Mapping[Key, tuple[bytes, int]]
    """Digest and size of what it holds."""
    differing: frozenset[Key]
    """Buffers of which it had something else than was published."""
    buffers: frozenset[str]
    """Names in which ranks may differ."""
    absent: frozenset[str]
    """What was asked for by name and this rank holds nothing of."""


class _Part(NamedTuple):
    spec: TensorSpec
    data: torch.Tensor
    """Its bytes."""
    sums: BlockSums


@dataclass
class _Version:
    """What a rank holds at one moment."""

    parts: dict[Key, _Part] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    """Everything else, by name."""

    @property
    def kinds(self) -> dict[Key, TensorSpec]:
        return {key: part.spec for key, part in self.parts.items()}


class PublishedParts:
    """What this rank has published last. It takes the memory of that, and while it publishes twice that."""

    def __init__(self) -> None:
        self._before: _Version | None = None
        self._now = _Version()

    def offer(
        self, state: Stateful | Mapping[str, Any], options: SaveOptions, find: Callable[[], Before | None]
    ) -> Offer:
        """Copy what is to be published. The state may change after that.

        Args:
            find: looks for the step before, in the store.

        Raises:
            UsageError: it is no state of weights, or as `hold` and `select`.
        """
        selected = select(hold(state.state_dict() if isinstance(state, Stateful) else state), options)
        names = {item.name for item in selected.holdings.items}
        if taken := deltas.taken_names(names):
            raise UsageError(f"{taken[0]!r} is a name that deltas have for themselves; give it another one")
        if optimizers := sorted(name for name in names if is_below(name, OPTIM)):
            raise UsageError(
                f"deltas are for weights, and {optimizers[0]} is an optimizer's state, most of which changes in every "
                "step: say what is to be published by only=('model',)"
            )
        self._now = version = _Version()
        for (name, _, spec), value in zip(selected.holdings.items, selected.holdings.values, strict=True):
            if spec is None:
                version.values[name] = value
            else:
                version.parts[name, spec.offsets] = _copied(name, spec, value)
        buffers = options.saved_names(buffers_of(state))
        link, differing = self._link(find, buffers)
        parts = {key: (_digest(part.sums), part.data.nbytes) for key, part in version.parts.items()}
        return Offer(link, parts, differing, buffers, selected.absent)

    def _link(self, find: Callable[[], Before | None], buffers: Collection[str]) -> tuple[Link | None, frozenset[Key]]:
        """What a delta of this rank would be built on, if anything, and buffers of which others have that."""
        before = self._before
        if before is None or before.kinds != self._now.kinds:
            return None, frozenset()
        try:
            found = find()
        except (CheckpointError, StorageError):
            found = None  # a whole checkpoint needs nothing of it
        if found is None:
            return None, frozenset()
        differing = {key for key, part in before.parts.items() if not _is_in(found.manifest, key, part)}
        is_mine = all(name in buffers for name, _ in differing)
        return (found.link if is_mine else None), frozenset(differing)

    def changes(self, mine: Collection[Key], link: Link, rank: int) -> dict[str, Any]:
        """The entries of this rank in a delta.

        Args:
            mine: the parts that it is to write.
        """
        assert self._before is not None, "it has offered a link"
        parts: dict[Key, Part] = {}
        coded, start, holder = [], 0, f"{deltas.BYTES}.{rank}"
        for key in sorted(mine):
            spec, now, sums = self._now.parts[key]
            before = self._before.parts[key].data
            data: bytes | memoryview = encode_delta(bytes_of(before), bytes_of(now), itemsize(spec.dtype))
            coding = deltas.CHANGED
            if len(data) >= now.nbytes:
                coding, data = deltas.WHOLE, bytes_of(now)
            parts[key] = Part(coding, holder, start, len(data), sums)
            coded.append(data)
            start += len(data)
        entries: dict[str, Any] = {**self._now.values, deltas.LINK: deltas.link_text(link)}
        if parts:
            entries[f"{deltas.PARTS}.{rank}"] = deltas.parts_text(parts)
        if start:
            entries[holder] = torch.frombuffer(bytearray(b"".join(coded)), dtype=torch.uint8)
        return entries

    def keep(self) -> None:
        """What was offered last has been committed."""
        self._before, self._now = self._now, _Version()


def decide(offers: Sequence[Offer]) -> tuple[Link, list[list[Key]]] | None:
    """What a delta is built on, and what each rank writes of it.

    None where it has to be a whole checkpoint: a rank has not what the step before held, or holds other tensors or
    parts than then, or what speaks against a save is for that to say.
    """
    link = offers[0].link
    if link is None or any(offer.link != link for offer in offers):
        return None
    if frozenset.intersection(*(offer.absent for offer in offers)):
        return None
    holders: dict[Key, list[int]] = defaultdict(list)
    for rank, offer in enumerate(offers):
        for key in offer.parts:
            holders[key].append(rank)
    buffers = frozenset().union(*(offer.buffers for offer in offers))
    loads, shares = [0] * len(offers), [list[Key]() for _ in offers]
    for key, ranks in holders.items():
        if key[0] in buffers:
            ranks = [rank for rank in ranks if key not in offers[rank].differing][:1]
        elif len({offers[rank].parts[key][0] for rank in ranks}) > 1:
            return None
        if not ranks:
            return None
        writer = min(ranks, key=loads.__getitem__)
        loads[writer] += offers[writer].parts[key][1]
        shares[writer].append(key)
    return link, shares


def _copied(name: str, spec: TensorSpec, value: torch.Tensor | Converted) -> _Part:
    if wrong := fault(value.tensor if isinstance(value, Converted) else value):
        raise UsageError(f"{name!r} {wrong}")
    size = num_bytes(spec)
    data, hasher, end = torch.empty(size, dtype=torch.uint8), BlockHasher(deltas.part_block_size(size)), 0
    memory = bytes_of(data)
    for _, piece in host_pieces([(name, value)]):
        memory[end : end + len(piece)] = piece
        hasher.update(memory[end : end + len(piece)])
        end += len(piece)
    assert end == size, "a part has the bytes of its spec"
    return _Part(spec, data, hasher.finish())


def _digest(sums: BlockSums) -> bytes:
    return xxhash.xxh3_128_digest(sums.sums)


def _is_in(manifest: Manifest, key: Key, part: _Part) -> bool:
    """Whether a record has exactly this part."""
    entry = manifest.tensors.get(key[0])
    if entry is None or (entry.dtype, entry.shape) != (part.spec.dtype, part.spec.shape):
        return False
    for chunk in entry.chunks:
        if (chunk.box.offsets, chunk.box.sizes) == (part.spec.offsets, part.spec.sizes):
            if chunk.checksums is None:
                return False
            return sums_of(bytes_of(part.data), chunk.checksums.block_bytes) == chunk.checksums.sums
    return False
