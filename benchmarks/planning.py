"""What planning and committing a save costs beside stock DCP, for many simulated ranks and many tensors.

    PYTHONPATH=. python benchmarks/planning.py                 4 to 256 ranks, up to 100 000 tensors (minutes)
    PYTHONPATH=. python benchmarks/planning.py --max-parts 50000
    PYTHONPATH=. python benchmarks/planning.py --max-parts 1010000     also 4 096 ranks (half an hour)

One process plays all ranks in turn; nothing is written, and no time is spent on a network. Both sides plan the same
state, and every message is pickled and unpickled as it would be on its way.

    rank             what the slowest rank spends: looks through its state, pickles its plan and its record
    coordinator      what the coordinator spends between them: unpickles all plans, merges, pickles the orders,
                     unpickles all records, checks, and makes what is committed (ours: JSON and `.metadata`)
    again            the coordinator's part of the next save of an unchanged state, which ours remembers

"stages": every tensor lies whole on one rank, as in a pipeline. "shards": every rank has a row of every tensor, as
under FSDP. A part is what one rank holds of one tensor. The exponent is the slope of log(seconds) over log(parts).
"""

from __future__ import annotations

import argparse
import gc
import math
import pickle
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.manifest import TensorColumns
from ray_ckpt.gc_pause import collector_paused
from ray_ckpt.protocol.coordinator import Coordinator, PlanCache
from ray_ckpt.protocol.holdings import hold
from ray_ckpt.protocol.messages import Assignment, FileRecord, LocalPlan, RankRecord
from ray_ckpt.protocol.rank_save import PlanMemory
from ray_ckpt.protocol.save_options import SAVE_ALL
from ray_ckpt.protocol.selecting import select
from ray_ckpt.storage.files import Storage

T = TypeVar("T")
WIDTH = 4
"""Elements per row."""


@dataclass(frozen=True)
class Case:
    layout: str
    """stages or shards."""
    ranks: int
    tensors: int

    @property
    def parts(self) -> int:
        return self.tensors * (self.ranks if self.layout == "shards" else 1)

    def state_of(self, rank: int) -> dict[str, Any]:
        if self.layout == "stages":
            value = torch.zeros(1, WIDTH)
            return {f"layer{n}.weight": value for n in range(rank, self.tensors, self.ranks)}
        return {f"layer{n}.weight": Row(rank, self.ranks) for n in range(self.tensors)}


CASES = [
    *(Case("stages", ranks, tensors) for ranks in (4, 64, 256) for tensors in (1_000, 10_000, 100_000)),
    *(Case("shards", 4, tensors) for tensors in (1_000, 10_000, 100_000)),
    *(Case("shards", ranks, 1_600) for ranks in (4, 16, 64, 256)),
    *(Case("shards", ranks, 245) for ranks in (512, 1_024, 2_048, 4_096)),
]


class Row(torch.Tensor):
    """A shard that needs no device mesh: plans what a DTensor's shard plans."""

    _rank: int
    _num_ranks: int

    @staticmethod
    def __new__(cls, rank: int, num_ranks: int) -> Row:
        row = torch.zeros(1, WIDTH).as_subclass(cls)
        row._rank, row._num_ranks = rank, num_ranks
        return row

    def __create_write_items__(self, name: str, value: object) -> list[WriteItem]:
        offsets, sizes = torch.Size((self._rank, 0)), torch.Size((1, WIDTH))
        data = TensorWriteData(
            dcp.ChunkStorageMetadata(offsets, sizes), dcp.TensorProperties(), torch.Size((self._num_ranks, WIDTH))
        )
        return [WriteItem(dcp.MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[dcp.ChunkStorageMetadata]:
        return [dcp.ChunkStorageMetadata(torch.Size((self._rank, 0)), torch.Size((1, WIDTH)))]

    def __get_tensor_shard__(self, index: dcp.MetadataIndex) -> torch.Tensor:
        return self


@dataclass
class Cost:
    """Seconds of processor time, which neighbors on the machine do not change much."""

    rank: float = 0.0
    """Of the slowest."""
    coordinator: float = 0.0
    again: float = 0.0
    sent_bytes: int = 0
    """All plans and records of one save, pickled."""


def _timed(action: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    value = action()
    return time.process_time() - start, value


# -------------------------------------------------------------------------------------------------------- ours


def measure_ours(case: Case) -> Cost:
    cost, cache = Cost(), PlanCache()
    memories = [PlanMemory() for _ in range(case.ranks)]
    cost.coordinator = _save_with_ours(case, cost, cache, memories)
    cost.again = _save_with_ours(case, Cost(), cache, memories)
    return cost


def _save_with_ours(case: Case, cost: Cost, cache: PlanCache, memories: Sequence[PlanMemory]) -> float:
    plans, num_items, by_rank = [], [], []
    for rank in range(case.ranks):
        state, known = case.state_of(rank), cache.token_of(rank)

        def plan(state: Any = state, memory: PlanMemory = memories[rank], known: Any = known) -> tuple[int, bytes]:
            selected = select(hold(state), SAVE_ALL)
            return len(selected.holdings.items), pickle.dumps(memory.plan(selected, known))

        seconds, (count, data) = _timed(plan)
        by_rank.append(seconds)
        num_items.append(count)
        plans.append(data)
    coordinator = Coordinator(Storage("memory://planning"), overwrite=True, cache=cache)

    def merge() -> bytes:
        with collector_paused():  # as while they arrive
            received: list[LocalPlan] = [pickle.loads(data) for data in plans]
        return pickle.dumps(coordinator.merge(received))

    merging, orders = _timed(merge)
    records = []
    for rank, assignment in enumerate(pickle.loads(orders)):
        seconds, data = _timed(lambda a=assignment, n=num_items[rank]: pickle.dumps(_record(a, n)))
        by_rank[rank] += seconds
        records.append(data)

    def commit() -> int:
        received: list[RankRecord] = [pickle.loads(data) for data in records]
        manifest = coordinator.describe(received)
        with collector_paused():
            record = manifest.to_json()
        return len(record) + len(dcp_metadata.dumps(manifest))

    committing, _ = _timed(commit)
    cost.rank, cost.sent_bytes = max(by_rank), sum(map(len, plans)) + sum(map(len, records))
    return merging + committing


def _record(assignment: Assignment, num_items: int) -> RankRecord:
    """As `RankSave.write` would return it, of tensors of one checksum block each."""
    positions = array("q", sorted(set(range(num_items)) - set(assignment.skipped)))
    starts = array("q", range(0, 2048 * len(positions), 2048))
    lengths = array("q", [1500]) * len(positions)
    data_starts = array("q", [start + 1024 for start in starts])
    blocks = array("q", [4096]) * len(positions)
    name = f"__{assignment.rank}_0-{assignment.attempt}.distcp"
    file = FileRecord(
        TensorColumns(name, starts, lengths, data_starts, blocks, bytes(8 * len(positions))), positions, {}
    )
    return RankRecord((file,), bytes(16 * len(assignment.skipped)))


# --------------------------------------------------------------------------------------------------------- stock


def measure_stock(case: Case) -> Cost:
    """DCP's default planner and what its file-system writer does with the results."""
    plans, by_rank, cost = [], [], Cost()
    for rank in range(case.ranks):
        planner, state = DefaultSavePlanner(), case.state_of(rank)

        def plan(planner: DefaultSavePlanner = planner, state: Any = state, is_first: bool = rank == 0) -> bytes:
            planner.set_up_planner(state, None, is_first)
            return pickle.dumps(planner.create_local_plan())

        seconds, data = _timed(plan)
        by_rank.append(seconds)
        plans.append(data)

    def merge() -> tuple[list[bytes], dcp.Metadata]:
        received: list[SavePlan] = [pickle.loads(data) for data in plans]
        merged, metadata = DefaultSavePlanner().create_global_plan(received)
        return [pickle.dumps(plan) for plan in merged], metadata

    merging, (orders, metadata) = _timed(merge)
    results = []
    for rank, order in enumerate(orders):
        seconds, data = _timed(lambda o=order, r=rank: pickle.dumps(_results(pickle.loads(o), r)))
        by_rank[rank] += seconds
        results.append(data)

    def commit() -> int:
        received: list[list[WriteResult]] = [pickle.loads(data) for data in results]
        metadata.storage_data = {result.index: result.storage_data for of_rank in received for result in of_rank}
        return len(pickle.dumps(metadata))

    committing, _ = _timed(commit)
    cost.rank, cost.coordinator = max(by_rank), merging + committing
    cost.again, cost.sent_bytes = cost.coordinator, sum(map(len, plans)) + sum(map(len, results))
    return cost


def _results(plan: SavePlan, rank: int) -> list[WriteResult]:
    name = f"__{rank}_0.distcp"
    return [WriteResult(item.index, 1500, _StorageInfo(name, 2048 * n, 1500)) for n, item in enumerate(plan.items)]


# --------------------------------------------------------------------------------------------------------- table


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Slope of log(seconds) over log(parts), by least squares."""
    xs, ys = [math.log(parts) for parts, _ in points], [math.log(max(seconds, 1e-6)) for _, seconds in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return above / sum((x - mean_x) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-parts", type=int, default=410_000, help="leave out larger cases")
    options = parser.parse_args()
    print("| layout | ranks | tensors | parts | who | rank s | coordinator s | again s | sent MiB |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: |", flush=True)
    points: dict[str, list[tuple[int, float]]] = {"ours": [], "stock DCP": []}
    for case in (case for case in CASES if case.parts <= options.max_parts):
        for who, measure in (("ours", measure_ours), ("stock DCP", measure_stock)):
            gc.collect()  # of what the case before has left
            cost = measure(case)
            points[who].append((case.parts, cost.coordinator))
            print(
                f"| {case.layout} | {case.ranks} | {case.tensors} | {case.parts} | {who} | {cost.rank:.3f} "
                f"| {cost.coordinator:.3f} | {cost.again:.3f} | {cost.sent_bytes / 2**20:.1f} |",
                flush=True,
            )
    for who, of_who in points.items():
        large = [point for point in of_who if point[0] >= 10_000]
        if len({parts for parts, _ in large}) > 1:
            print(f"\n{who}: coordinator's seconds grow with parts to the power {exponent(large):.2f} (from 10 000 on)")


if __name__ == "__main__":
    main()
