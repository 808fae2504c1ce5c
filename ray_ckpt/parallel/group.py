"""Join and leave a process group.

rank 0:       serve_store() -> port           a TCP store on port 0, so no port is ever guessed
every rank:   join(host, port, ...)           same store, torch.distributed initialized
every rank:   leave()                         barrier, then destroy: nobody leaves while a peer still works
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist


def serve_store(host: str, world_size: int, timeout_s: float) -> dist.TCPStore:
    """Open the group's store on a free port of this process. Keep the object for the life of the group.

    Args:
        host: the address of this host to listen on. Whoever reaches it can write to the store, which asks for nothing.

    Raises:
        OSError: the address cannot be bound.
    """
    # Left alone, the store listens on all of the host's interfaces.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family, backlog=max(128, world_size))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        # Waiting for the workers here would block the only thread that can tell them the port.
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join(
    store_host: str,
    store_port: int,
    *,
    rank: int,
    world_size: int,
    backend: str,
    device: torch.device,
    host: str,
    timeout_s: float,
) -> None:
    """Initialize torch.distributed in this process. Blocks until all ranks are there.

    Args:
        store_host: where rank 0 serves the store.
        backend: as for `init_process_group`: `gloo`, `nccl` or `cpu:gloo,cuda:nccl`.
        device: where this rank's tensors live; a CUDA device becomes the current one.
        host: this host's address as the other ranks know it; gloo listens there.
        timeout_s: for the rendezvous and for every collective after it.

    Raises:
        torch.distributed.DistError: the store cannot be reached, or a rank is missing after the timeout.
    """
    _bind_gloo(host)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore(store_host, store_port, world_size, is_master=False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("ray_ckpt", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if "nccl" in backend else None,
    )


def leave() -> None:
    """Wait for the peers, then destroy the process group. Does nothing when there is none."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _bind_gloo(host: str) -> None:
    """Make gloo listen on the interface that the other hosts reach.

    Left alone it takes the interface of the host's own name, which many machines map to 127.0.0.1.
    """
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
