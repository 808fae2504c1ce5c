"""Saves and loads on S3: time beside plain pyarrow requests, bytes fetched per byte needed, and requests.

    PYTHONPATH=. python benchmarks/s3.py
    PYTHONPATH=. python benchmarks/s3.py --size 0.02 --repeats 3

The tests' own S3 server (moto) on loopback, in one Python process: it is the bottleneck, so seconds say little but how
much waits for it; bytes and requests are what a real store would see and bill. Four ranks save four pipeline stages and
load them as rows, as in `benchmarks/storage.py`. "raw" puts one object per stage, and gets the wanted rows of each
tensor by one ranged request.
"""

from __future__ import annotations

import argparse
import collections
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow.fs as pafs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, zeros

from benchmarks.measuring import Sample, measure, ratio
from benchmarks.plugins import PLUGINS, Plugin, State, local_rows, stages
from tests.support.ranks import run_ranks
from tests.support.s3 import run_s3

NUM_RANKS = 4
PARTS = ("weight", "exp_avg", "exp_avg_sq")


def _raw_save(state: State, uri: str) -> None:
    filesystem, path = pafs.FileSystem.from_uri(uri)
    with filesystem.open_output_stream(f"{path}/{dist.get_rank()}.raw") as file:
        for tensor in state.values():
            file.write(memoryview(tensor.numpy()).cast("B"))


def _raw_load(state: State, uri: str) -> None:
    filesystem, path = pafs.FileSystem.from_uri(uri)
    for stage, targets in stages(state).items():
        with filesystem.open_input_file(f"{path}/{stage}.raw") as file:
            position = 0
            for target in targets:
                local, first_row = local_rows(target)
                file.seek(position + first_row * (local.nbytes // max(1, len(local))))
                file.readinto(memoryview(local.numpy()).cast("B"))
                position += target.numel() * target.element_size()


CONTESTANTS = {
    "ours": PLUGINS["ours"],
    "ours, our verbs": PLUGINS["ours, our verbs"],
    "raw": Plugin("raw", _raw_save, _raw_load),
}


def _save(rank: int, name: str, width: int, uri: str) -> Sample:
    warnings.simplefilter("ignore")
    state: State = {f"stage{rank}.{part}": torch.full((width, width), float(rank)) for part in PARTS}
    return measure(lambda: CONTESTANTS[name].save(state, uri))


def _load(rank: int, name: str, width: int, uri: str) -> Sample:
    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: State = {
        f"stage{stage}.{part}": zeros(width, width, device_mesh=mesh, placements=[Shard(0)]).fill_(-1)
        for stage in range(NUM_RANKS)
        for part in PARTS
    }
    sample = measure(lambda: CONTESTANTS[name].load(state, uri))
    for key, tensor in state.items():
        if not torch.all(tensor.to_local() == float(key[len("stage")])):
            raise AssertionError(f"{name} loaded something else than was saved")
    return sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.1, help="GiB, all stages together")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    width = int((options.size * 2**30 / (NUM_RANKS * len(PARTS) * 4)) ** 0.5)
    total = NUM_RANKS * len(PARTS) * width * width * 4
    operations: dict[str, Callable[..., Sample]] = {"save": _save, "load": _load}
    seconds: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    requests: dict[tuple[str, str], collections.Counter[str]] = {}
    fetched: dict[tuple[str, str], int] = {}
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request
    with run_s3() as s3, tempfile.TemporaryDirectory() as scratch:
        for repeat in range(options.repeats):
            for name in CONTESTANTS:
                uri = s3.uri(f"{name.replace(', ', '-').replace(' ', '-')}/{repeat}")
                for operation, function in operations.items():
                    s3.reset()
                    samples = run_ranks(function, NUM_RANKS, Path(scratch), name, width, uri, timeout_s=600)
                    seconds[operation, name].append(max(sample.seconds for sample in samples))
                    requests[operation, name] = collections.Counter(s3.requests)
                    fetched[operation, name] = s3.sent_bytes
    print("| operation | who | seconds | of raw | fetched | GET | HEAD | PUT and POST |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for operation, name in sorted(seconds, key=lambda entry: list(operations).index(entry[0])):
        took = statistics.median(seconds[operation, name])
        count = requests[operation, name]
        print(
            f"| {operation} | {name} | {took:.3f} | {ratio(took, statistics.median(seconds[operation, 'raw']))} "
            f"| {fetched[operation, name] / total:.3f} | {count['GET']} | {count['HEAD']} "
            f"| {count['PUT'] + count['POST']} |"
        )


if __name__ == "__main__":
    main()
