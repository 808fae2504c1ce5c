"""How many workers the cluster could take right now."""

from __future__ import annotations

from ray._private.state import available_resources_per_node

from ray_ckpt.cluster.resources import Resources


def num_placeable(bundle: Resources) -> int:
    """Workers of this demand that fit into what is free, node by node, as no worker can be split over two.

    A node that has just died counts until Ray has noticed: seconds, as a rule.
    """
    return sum(fitting(bundle, free) for free in available_resources_per_node().values())


def fitting(bundle: Resources, free: Resources) -> int:
    """Workers of this demand that fit on one node."""
    # Ray counts in units of 1e-4, so that three thirds may be a little less than a whole.
    return int(min((free.get(name, 0) + 1e-6) / amount for name, amount in bundle.items()))
