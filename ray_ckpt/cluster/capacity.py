"""How many workers the cluster could take."""

from __future__ import annotations

import ray

from ray_ckpt.cluster.ray_internals import draining_nodes, free_resources
from ray_ckpt.cluster.resources import Resources, fitting


def free_slots(bundle: Resources) -> int:
    """Workers of this demand that fit into what is free, node by node, as no worker can be split over two.

    Ray learns with a delay, of about a second each, what was given back and which node has died. Nodes that are drained
    take no more.
    """
    going = draining_nodes()
    return sum(fitting(bundle, free) for node, free in free_resources().items() if node not in going)


def all_slots(bundle: Resources) -> int:
    """Workers of this demand that would fit if nothing else ran on the nodes that are up and stay."""
    going = draining_nodes()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]
    return sum(fitting(bundle, node["Resources"]) for node in nodes)
