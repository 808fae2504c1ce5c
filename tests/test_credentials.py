"""Where credentials go that are in a URI."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from ray_ckpt.cluster.group import WorkerGroup
from ray_ckpt.storage.files import Storage
from tests.support import rank_functions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

SECRET = "Pl4ntedS3cretKeyOfTheObjectStore"


def found_in_object_store(text: str) -> bool:
    """Whether it is in the memory that Ray's object store shares with this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "plasma" not in line:
            continue
        at, end = (int(number, 16) for number in line.split()[0].split("-"))
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(at)
            while at < end and (read := memory.read(min(end - at, 1 << 24))):
                if text.encode() in read:
                    return True
                at += len(read)
    return False


@pytest.mark.usefixtures("local_ray")
def test_credentials_stay_out_of_the_object_store_beside_what_is_large() -> None:
    storage = Storage(f"s3://key:{SECRET}@bucket/run?region=us-east-1")
    with WorkerGroup(1, cpus_per_worker=0.5, process_group=False, start_timeout_s=60) as group:
        marker = "TheLargePartOfTheCall"
        large = marker.encode() * 50_000
        assert group.run(rank_functions.sizes_of, storage, large) == [(len(storage.uri), len(large))]
        assert found_in_object_store(marker)
        assert not found_in_object_store(SECRET)
        held = ray.put(SECRET.encode() * 100_000)
        assert found_in_object_store(SECRET), "the search finds nothing at all"
        del held
