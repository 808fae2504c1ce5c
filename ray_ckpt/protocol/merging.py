"""The plans of all ranks as one: who writes what. Pure functions of plain data.

merge(items of all ranks)    decides it, for the carriers whose ranks wait to be told      -> GlobalPlan
adopt(planned, reports)      checks what somebody else has decided, as DCP's planner does  -> GlobalPlan
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ray_ckpt.errors import CommitError
from ray_ckpt.format.boxes import check_cover, shared_box
from ray_ckpt.format.manifest import Path
from ray_ckpt.protocol.messages import Item, TensorSpec, num_bytes
from ray_ckpt.text import listed

Key = tuple[str, tuple[int, ...] | None]
"""Name and offsets of a part: what is saved once, however many ranks hold it. Offsets are None for an object."""

Names = Mapping[str, tuple[Path | None, TensorSpec | None]]
"""Every name that is saved, with its path and the spec of one of its parts, in the manifest's order."""

_Holder = tuple[int, int]
"""A rank that holds a part, and the part's position in that rank's items."""


@dataclass(frozen=True)
class GlobalPlan:
    """What each rank holds, and which rank writes it."""

    items: Sequence[Sequence[Item]]
    """What each rank holds, by rank."""
    skipped: Sequence[Sequence[int]]
    """Positions in `items` that another rank writes, ascending, by rank."""
    writers: Mapping[Key, int]
    """The rank that writes each part that several ranks hold."""
    names: Names
    buffers: Collection[str] = frozenset()
    """Names of which the first rank's are saved, although other ranks may hold something else."""


def merge(plans: Sequence[Sequence[Item]], buffers: Collection[str] = frozenset()) -> GlobalPlan:
    """Decide who writes what. Linear in the number of parts that all ranks hold together.

    A part that only one rank holds is that rank's to write. The others go, one after the other, to the holder that has
    the fewest bytes to write so far; buffers to the first that holds them.

    Args:
        plans: what each rank holds, by rank.
        buffers: names in which ranks may differ.

    Raises:
        CommitError: the ranks' parts do not cover a tensor exactly once, or contradict each other.
    """
    names: dict[str, tuple[Path | None, TensorSpec | None]] = {}
    holders: dict[Key, list[_Holder]] = {}
    for rank, items in enumerate(plans):
        for position, item in enumerate(items):
            name, path, spec = item
            known = names.setdefault(name, (path, spec))[1]
            # Equal specs of one rank are one object, which spares most comparisons.
            if known is not spec and _of_whole(known) != _of_whole(spec):
                raise CommitError(
                    f"refusing to save: {name!r} is {_describe(spec)} on rank {rank} and {_describe(known)} on "
                    "another rank; give them different names"
                )
            holders.setdefault(key_of(item), []).append((rank, position))
    _check_replicas_alike(plans, holders)
    _check_cover((plans[rank][position] for (rank, position), *_ in holders.values()), holders, len(plans))
    skipped, writers = _assign(plans, holders, buffers)
    return GlobalPlan(plans, skipped, writers, names, buffers)


def adopt(
    names: Names,
    planned: Collection[Key],
    items: Sequence[Sequence[Item]],
    skipped: Sequence[Sequence[int]],
) -> GlobalPlan:
    """Take over a decision that was made elsewhere, and check it.

    Args:
        planned: the parts that were to be written, in no order.
        items: what each rank reports to hold, by rank.
        skipped: positions in `items` that the rank did not write, by rank.

    Raises:
        CommitError: a part was written by no rank, by two, or without having been planned; or the parts do not cover a
            tensor exactly once.
    """
    writers: dict[Key, int] = {}
    written: list[Item] = []
    for rank, held in enumerate(items):
        left_out = set(skipped[rank])
        for position, item in enumerate(held):
            if position in left_out:
                continue
            key = key_of(item)
            if key in writers:
                raise CommitError(
                    f"refusing to commit: {_part(key)} was written by ranks {writers[key]} and {rank}, not once"
                )
            writers[key] = rank
            written.append(item)
    if missing := sorted(map(_part, set(planned) - writers.keys())):
        raise CommitError(f"refusing to commit: no rank reported to have written {listed(missing)}")
    if unplanned := sorted(map(_part, writers.keys() - set(planned))):
        raise CommitError(f"refusing to commit: ranks wrote what nobody planned: {listed(unplanned)}")
    _check_cover(written)
    return GlobalPlan(items, skipped, writers, names)


def key_of(item: Item) -> Key:
    return item.name, None if item.spec is None else item.spec.offsets


def _check_replicas_alike(plans: Sequence[Sequence[Item]], holders: Mapping[Key, Sequence[_Holder]]) -> None:
    """Parts at the same offsets must be of the same size: only one of them is written."""
    for (name, offsets), held in holders.items():
        (first_rank, first_position), *others = held
        first = plans[first_rank][first_position].spec
        for rank, position in others:
            spec = plans[rank][position].spec
            if spec != first:
                raise CommitError(
                    f"refusing to save: the part of {name!r} at {offsets} is {_size_of(spec)} on rank {rank} and "
                    f"{_size_of(first)} on rank {first_rank}"
                )


def _check_cover(
    parts: Iterable[Item], holders: Mapping[Key, Sequence[_Holder]] | None = None, num_ranks: int = 0
) -> None:
    """Whether the distinct parts of each tensor cover it exactly once.

    Args:
        holders: who holds each part, to name the ranks that hold none of a tensor.
    """
    specs: dict[str, list[TensorSpec]] = {}
    for name, _, spec in parts:
        if spec is not None:
            specs.setdefault(name, []).append(spec)
    for name, of_name in specs.items():
        first = of_name[0]
        if len(of_name) == 1 and first.sizes == first.shape:
            continue
        if problem := check_cover(first.shape, [shared_box(spec.offsets, spec.sizes) for spec in of_name]):
            without = _ranks_without(name, holders or {}, num_ranks)
            raise CommitError(f"refusing to save: tensor {name!r} is not covered exactly once: {problem}{without}")


def _ranks_without(name: str, holders: Mapping[Key, Sequence[_Holder]], num_ranks: int) -> str:
    """The ranks that hold nothing of a tensor, and what to do if it is an optimizer's."""
    holding = {rank for (held, _), of_part in holders.items() if held == name for rank, _ in of_part}
    if not holding or len(holding) == num_ranks:
        return ""
    lacking = listed([str(rank) for rank in range(num_ranks) if rank not in holding], at_most=8)
    text = f"; ranks {listed(sorted(map(str, holding)), at_most=8)} hold parts of it, ranks {lacking} none"
    if name.startswith("optim."):
        text += (
            ". An optimizer has no state of a parameter that it has not stepped: give the parameter a gradient on "
            "every rank before the step (zeros will do)"
        )
    return text


def _assign(
    plans: Sequence[Sequence[Item]], holders: Mapping[Key, Sequence[_Holder]], buffers: Collection[str]
) -> tuple[list[tuple[int, ...]], dict[Key, int]]:
    """What each rank skips, and who writes each replicated part."""
    sizes = {key: _size(plans[held[0][0]][held[0][1]].spec) for key, held in holders.items()}
    # First the parts that only one rank holds; then replicas even out the loads.
    loads = [0] * len(plans)
    for key, held in holders.items():
        if len(held) == 1:
            loads[held[0][0]] += sizes[key]
    skipped: list[list[int]] = [[] for _ in plans]
    writers: dict[Key, int] = {}
    for key, held in holders.items():
        if len(held) == 1:
            continue
        ranks = [rank for rank, _ in held]
        writer = writers[key] = min(ranks) if key[0] in buffers else min(ranks, key=loads.__getitem__)
        loads[writer] += sizes[key]
        for rank, position in held:
            if rank != writer:
                skipped[rank].append(position)
    # Sorted, because the order of `holders` is that of the ranks which named a part first.
    return [tuple(sorted(positions)) for positions in skipped], writers


def _size(spec: TensorSpec | None) -> int:
    """Bytes, as far as they count for who writes an item; an object counts as one."""
    return 1 if spec is None else num_bytes(spec)


def _of_whole(spec: TensorSpec | None) -> tuple[str, tuple[int, ...]] | None:
    return None if spec is None else (spec.dtype, spec.shape)


def _describe(spec: TensorSpec | None) -> str:
    return "no tensor" if spec is None else f"{spec.dtype}{list(spec.shape)}"


def _size_of(spec: TensorSpec | None) -> str:
    return "no tensor" if spec is None else f"of size {list(spec.sizes)}"


def _part(key: Key) -> str:
    """A part, for messages: `'name'`, or `'name' at (4, 0)` where it is not the first or only one."""
    name, offsets = key
    return f"{name!r} at {offsets}" if offsets is not None and any(offsets) else repr(name)
