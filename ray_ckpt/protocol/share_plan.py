"""Who reads what several ranks want: by bytes of files alone, so that it holds for any layouts.

every rank    the ranges that it would read, as they are cut for its reads ── gather ──>
coordinator   share_out: who wants what is cut where anybody's range begins or ends, and joined to extents
              every extent gets one reader, of those that want it; all ranks are equally far, whatever they want
              <── broadcast ── windows, which bound how much of it a rank holds at a time
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ray_ckpt.errors import UsageError
from ray_ckpt.storage.files import Storage

Edges = npt.NDArray[np.int64]

WINDOW_BYTES = 64 << 20
"""What a rank sends, receives and keeps of one window, apart from an extent."""

LONGEST_EXTENT_BYTES, WIDEST_GAP_BYTES = 4 << 20, 512 << 10
"""An extent is one read, as `ranged_reads.REMOTE` has them, unless a single range is longer."""


Share = bool | Literal["auto"]
"""Whether ranks that want the same bytes read them once; "auto" where that is the faster way."""


def is_shared(share: Share, storage: Storage) -> bool:
    """Whether ranks that want the same bytes of this storage read them once. The same on all ranks.

    Raises:
        UsageError: `share` is nothing that it may be.
    """
    if share not in ("auto", True, False):
        raise UsageError(f"share={share!r} is none of 'auto', True and False")
    return share is True or (share == "auto" and storage.opening_costs_a_request)


class Wants(NamedTuple):
    """The ranges that a rank would read by itself."""

    edges: Mapping[str, bytes]
    """File -> start and end of every range `[start, end)`, as 64-bit integers one after the other."""
    on_cuda: bool = False
    """Whether what they are read for is on a CUDA device."""

    @classmethod
    def of(cls, found: Collection[tuple[str, int, int]], *, on_cuda: bool = False) -> Wants:
        """Args:
        found: file, start and end of each range.
        """
        by_file: dict[str, list[int]] = {}
        for file, start, end in found:
            by_file.setdefault(file, []).extend((start, end))
        return cls({file: np.array(edges, np.int64).tobytes() for file, edges in by_file.items()}, on_cuda)

    def of_file(self, file: str) -> Edges:
        """Rows of start and end."""
        return np.frombuffer(self.edges.get(file, b""), np.int64).reshape(-1, 2)


class Extent(NamedTuple):
    """Bytes `[start, end)` of a file that one rank reads, for itself and others."""

    file: str
    start: int
    end: int
    reader: int
    receivers: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


class SharePlan(NamedTuple):
    """What is read once for several ranks, and with it all that they would otherwise read alone."""

    windows: Sequence[Sequence[Extent]]
    """Extents in the order in which all ranks go through them."""
    on_cuda: bool
    """Whether bytes had better travel between CUDA devices: on all ranks that is where they are wanted."""


class _Stretch(NamedTuple):
    """An extent that nobody has been told to read yet."""

    file: str
    start: int
    end: int
    ranks: tuple[int, ...]
    """Who wants it, ascending."""


def share_out(wants: Sequence[Wants], *, window_bytes: int = WINDOW_BYTES) -> SharePlan | None:
    """Who reads what, by what each rank wants; None where no two ranks want the same byte.

    Every wanted byte is in one extent, which has all ranks that want it. A range of a rank may lie in several extents.
    """
    files = sorted({file for of_rank in wants for file in of_rank.edges})
    stretches = [stretch for file in files for stretch in _stretches(file, [w.of_file(file) for w in wants])]
    if all(len(stretch.ranks) == 1 for stretch in stretches):
        return None
    loads = [0] * len(wants)
    extents = []
    for stretch in _side_by_side(stretches):
        reader = min(stretch.ranks, key=loads.__getitem__)
        loads[reader] += stretch.end - stretch.start
        receivers = tuple(rank for rank in stretch.ranks if rank != reader)
        extents.append(Extent(stretch.file, stretch.start, stretch.end, reader, receivers))
    windows = list(_windows(extents, len(wants), window_bytes))
    return SharePlan(windows, all(of_rank.on_cuda for of_rank in wants if of_rank.edges))


def _stretches(file: str, ranges_of: Sequence[Edges]) -> Iterator[_Stretch]:
    """The wanted bytes of a file, in order, cut where another set of ranks wants them."""
    edges: Edges = np.unique(np.concatenate([ranges.ravel() for ranges in ranges_of]))
    wanted = np.zeros((len(ranges_of), len(edges)), bool)
    for rank, ranges in enumerate(ranges_of):
        # How many of the rank's ranges begin at an edge, less those that end there: added up, how many are open.
        opened = np.zeros(len(edges), np.int64)
        np.add.at(opened, np.searchsorted(edges, ranges[:, 0]), 1)
        np.add.at(opened, np.searchsorted(edges, ranges[:, 1]), -1)
        wanted[rank] = np.cumsum(opened) > 0
    groups, group_of = np.unique(wanted, axis=1, return_inverse=True)
    ranks_of = [tuple(int(rank) for rank in np.flatnonzero(group)) for group in groups.T]
    positions, of_position = edges.tolist(), group_of.ravel().tolist()
    last: _Stretch | None = None
    for place, (start, end) in enumerate(pairwise(positions)):
        ranks = ranks_of[of_position[place]]
        if not ranks:
            continue
        if last is not None and _belong_together(last, ranks, start, end):
            last = last._replace(end=end)
            continue
        if last is not None:
            yield last
        last = _Stretch(file, start, end, ranks)
    if last is not None:
        yield last


def _belong_together(last: _Stretch, ranks: tuple[int, ...], start: int, end: int) -> bool:
    return last.ranks == ranks and start - last.end <= WIDEST_GAP_BYTES and end - last.start <= LONGEST_EXTENT_BYTES


def _side_by_side(stretches: Sequence[_Stretch]) -> list[_Stretch]:
    """In an order in which each group of ranks is always equally far: else some would wait while others have theirs."""
    totals: dict[tuple[int, ...], int] = {}
    for stretch in stretches:
        totals[stretch.ranks] = totals.get(stretch.ranks, 0) + stretch.end - stretch.start
    done = dict.fromkeys(totals, 0)
    progress = []
    for stretch in stretches:
        done[stretch.ranks] += stretch.end - stretch.start
        progress.append(done[stretch.ranks] / totals[stretch.ranks])
    return [stretches[place] for place in sorted(range(len(stretches)), key=progress.__getitem__)]


def _windows(extents: Sequence[Extent], num_ranks: int, window_bytes: int) -> Iterator[list[Extent]]:
    window: list[Extent] = []
    held = [0] * num_ranks
    for extent in extents:
        for rank in (extent.reader, *extent.receivers):
            held[rank] += extent.num_bytes
        if window and max(held) > window_bytes:
            yield window
            window, held = [], [0] * num_ranks
            for rank in (extent.reader, *extent.receivers):
                held[rank] = extent.num_bytes
        window.append(extent)
    if window:
        yield window
