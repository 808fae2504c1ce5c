"""Where the ranks of a group meet: who can reach it."""

from __future__ import annotations

import gc
from datetime import timedelta

import psutil
import pytest
import torch.distributed as dist

from ray_ckpt.parallel.group import serve_store

NO_TIME = timedelta(milliseconds=1)


def listening() -> set[tuple[str, int]]:
    """Addresses and ports that this process listens on."""
    connections = psutil.Process().net_connections(kind="tcp")
    return {tuple(each.laddr) for each in connections if each.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"])
def test_the_store_listens_on_the_address_that_it_is_given_and_on_no_other(host: str) -> None:
    before = listening()
    store = serve_store(host, 2, timeout_s=10)
    assert listening() - before == {(host, store.port)}
    client = dist.TCPStore(host, store.port, 2, is_master=False, wait_for_workers=False)
    client.set("name", "value")
    assert store.get("name") == b"value"
    with pytest.raises(dist.DistNetworkError):
        dist.TCPStore("127.0.0.3", store.port, 2, is_master=False, wait_for_workers=False, timeout=NO_TIME)
    del client, store
    gc.collect()
    assert listening() == before
