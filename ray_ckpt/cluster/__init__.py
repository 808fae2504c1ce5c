"""Ray, and its only home: how to reach a cluster, worker groups, and the verbs driven by actor calls.

    import ray_ckpt

    with ray_ckpt.WorkerGroup(4) as group:
        group.run(prepare)                                    # prepare(ctx) builds a model on every worker
        ray_ckpt.cluster.load(group, state_of, store)         # state_of(ctx) returns what a worker holds
        for step in range(1000):
            group.run(train)
            if step % 100 == 99:
                ray_ckpt.cluster.save(group, state_of, store, step + 1, blocking=False)
        ray_ckpt.cluster.verify(group, store)
    ray_ckpt.cluster.verify_by_tasks(store)                   # without a group, on all CPUs of the cluster

The verbs are functions of a group rather than its methods: `WorkerGroup` knows nothing of checkpoints.
"""

from ray_ckpt.cluster.comparing import compare
from ray_ckpt.cluster.loading import load
from ray_ckpt.cluster.metrics import Metrics
from ray_ckpt.cluster.publishing import WeightPublisher
from ray_ckpt.cluster.ram.client import drop_memory
from ray_ckpt.cluster.saving import save
from ray_ckpt.cluster.transferring import TransferHandle, transfer
from ray_ckpt.cluster.verifying import verify, verify_by_tasks

__all__ = [
    "Metrics",
    "TransferHandle",
    "WeightPublisher",
    "compare",
    "drop_memory",
    "load",
    "save",
    "transfer",
    "verify",
    "verify_by_tasks",
]
