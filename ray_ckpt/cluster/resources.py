"""What each worker asks of the cluster, and why a group does not fit. Pure arithmetic over Ray's node table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ray_ckpt.errors import UsageError

Resources = Mapping[str, float]
"""Resource name -> amount, as Ray counts them: `{"CPU": 8.0, "GPU": 2.0}`."""

NCCL = "cpu:gloo,cuda:nccl"
"""GPU workers also get gloo: DCP's object collectives and its async saves run on the CPU."""


@dataclass(frozen=True)
class WorkerDemand:
    """The demand of each worker of a group, and the process-group backend that goes with it."""

    cpus: float
    gpus: float
    backend: str
    note: str = ""
    """A remark for the user about this choice; empty when it is the obvious one."""

    @property
    def bundle(self) -> dict[str, float]:
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}


def choose_demand(
    nodes: Sequence[Resources],
    num_workers: int,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float | None = None,
    backend: str | None = None,
) -> WorkerDemand:
    """One CPU and, where the cluster has any, one GPU per worker, or the fraction of them that lets all workers fit.

    A cluster that has no worker node yet (an autoscaled one) shows no CPU or GPU to divide: it is asked for whole
    CPUs, and for GPUs only if `gpus_per_worker` says so.

    Raises:
        UsageError: the backend cannot work with what the workers get.
    """
    cpus = (
        cpus_per_worker if cpus_per_worker is not None else _share([node.get("CPU", 0) for node in nodes], num_workers)
    )
    if gpus_per_worker is None:
        gpus = [node.get("GPU", 0) for node in nodes]
        gpus_per_worker = _share(gpus, num_workers) if sum(gpus) >= 1 else 0.0
    note = ""
    if 0 < gpus_per_worker < 1:
        if backend is not None and "nccl" in backend:
            raise UsageError(
                f"backend {backend} needs one GPU per worker, but {num_workers} workers get {gpus_per_worker:g} GPU "
                "each: NCCL refuses two ranks on one GPU. Ask for fewer workers, or for --backend gloo"
            )
        note = f"workers share GPUs ({gpus_per_worker:g} each): gloo over CUDA tensors, as NCCL wants one GPU per rank"
    if backend is not None and "nccl" in backend and not gpus_per_worker:
        raise UsageError(f"backend {backend} needs GPUs, and the workers get none: add --gpus-per-worker 1")
    if backend is None:
        backend = NCCL if gpus_per_worker >= 1 else "gloo"
    return WorkerDemand(cpus, gpus_per_worker, backend, note)


def _share(amounts: Sequence[float], num_workers: int) -> float:
    """The largest of 1, 1/2, 1/3, ... of which the nodes together hold `num_workers`; 1 when they hold nothing."""
    if sum(amounts) <= 0:
        return 1.0
    parts = 1
    while sum(int(amount * parts) for amount in amounts) < num_workers:
        parts += 1
    # Ray counts in units of 1e-4; rounding down keeps `parts` shares within the whole.
    return int(10_000 / parts) / 10_000


def explain_shortage(bundle: Resources, num_workers: int, nodes: Sequence[Resources], available: Resources) -> str:
    """Which resource keeps the group from being placed: what is asked, what the cluster has, what to do."""
    asked = f"{num_workers} x {describe(bundle)}"
    totals = {name: sum(node.get(name, 0) for node in nodes) for name in bundle}
    if short := {name: amount * num_workers for name, amount in bundle.items() if totals[name] < amount * num_workers}:
        missing = ", ".join(f"{name}: needs {need:g}, has {totals[name]:g}" for name, need in short.items())
        advice = "ask for less (--workers, --cpus-per-worker, --gpus-per-worker), or add nodes"
    elif busy := [name for name, amount in bundle.items() if available.get(name, 0) < amount * num_workers]:
        missing = ", ".join(
            f"{name}: needs {bundle[name] * num_workers:g}, {available.get(name, 0):g} of {totals[name]:g} free"
            for name in busy
        )
        advice = "wait for other work to end (`ray status` shows it), or ask for less"
    else:
        num_fitting = sum(fitting(bundle, node) for node in nodes)
        missing = f"only {num_fitting} workers fit, as no worker can be split over two nodes"
        advice = "ask for less per worker, or for fewer workers"
    return f"asked for {asked}; the cluster has {describe_nodes(nodes)}; missing {missing}. What to do: {advice}"


def fitting(bundle: Resources, free: Resources) -> int:
    """Workers of this demand that fit on one node."""
    # Ray counts in units of 1e-4, so that three thirds may be a little less than a whole.
    return int(min((free.get(name, 0) + 1e-6) / amount for name, amount in bundle.items()))


def describe_nodes(nodes: Sequence[Resources]) -> str:
    totals = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'} with {describe(totals)}"


def describe(resources: Resources) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in resources.items()) + "}"
