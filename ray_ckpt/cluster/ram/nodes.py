"""The nodes of the cluster, by their ids."""

from __future__ import annotations

import ray

HEAD_RESOURCE = "node:__internal_head__"
"""A resource that Ray gives to the node that its control service runs on."""


def alive_nodes() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def head_node() -> str:
    [head] = [node["NodeID"] for node in ray.nodes() if HEAD_RESOURCE in node["Resources"]]
    return str(head)
