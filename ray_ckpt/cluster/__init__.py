"""Ray, and its only home: how to reach a cluster, worker groups, and the verbs driven by actor calls.

from ray_ckpt import cluster
cluster.save(group, state_of, target)       state_of(ctx) returns what a worker holds
cluster.load(group, state_of, target)
cluster.verify(group, target)
"""

from ray_ckpt.cluster.loading import load
from ray_ckpt.cluster.saving import save
from ray_ckpt.cluster.verifying import verify

__all__ = ["load", "save", "verify"]
