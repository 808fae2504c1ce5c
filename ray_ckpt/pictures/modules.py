"""The tensors of a checkpoint as nested rectangles, few enough to be drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ray_ckpt.format.manifest import TensorEntry
from ray_ckpt.inspection.modules import TreeLine, module_tree
from ray_ckpt.pictures.contents import ModuleMap, ModuleNode
from ray_ckpt.text_units import count

__all__ = ["module_map"]

MAX_NODES = 800
"""Rectangles that a browser draws at once, and a person can still tell apart."""


def module_map(tensors: Mapping[str, TensorEntry], title: str) -> ModuleMap:
    """The map. Numbered siblings of one structure are one rectangle, and deep levels left out, only where there are
    more than `MAX_NODES`.

    Args:
        title: what the rectangle around all others is called.
    """
    lines = module_tree(tensors, max_lines=MAX_NODES + 1, fold=False) if len(tensors) <= MAX_NODES else ()
    is_whole = len(lines) <= MAX_NODES and sum(1 for line in lines if line.text) == len(tensors)
    if not is_whole:
        lines = module_tree(tensors, max_lines=MAX_NODES)
    nodes = _nodes(lines, title, tensors)
    drawn = sum(1 for node in nodes if node.own_bytes or not node.num_bytes)
    aggregated = ""
    if not is_whole:
        aggregated = (
            f"{count(len(tensors))} tensors are drawn as {count(drawn)} rectangles: numbered siblings of one structure "
            "are one, and so is what lies deeper in a module than there is room for"
        )
        if nodes[0].own_bytes:
            aggregated += "; the empty part is of names beyond those that fit"
    return ModuleMap(nodes, aggregated)


def _nodes(lines: tuple[TreeLine, ...], title: str, tensors: Mapping[str, TensorEntry]) -> tuple[ModuleNode, ...]:
    """The root, then one node per line."""
    total = sum(entry.num_bytes for entry in tensors.values())
    num_elements = sum(line.num_elements for line in lines if line.depth == 0)
    nodes = [ModuleNode(0, None, title, title, "", len(tensors), num_elements, total, total, "")]
    siblings = [1]
    """How many modules what lies in each node stands for."""
    open_at = [0]
    """Node that is open at each depth."""
    own = [total]
    for number, line in enumerate(lines, start=1):
        del open_at[line.depth + 1 :]
        parent, times = open_at[-1], siblings[open_at[-1]]
        open_at.append(number)
        siblings.append(times * line.num_siblings)
        num_bytes = times * line.num_bytes
        own[parent] -= num_bytes
        own.append(num_bytes)
        nodes.append(
            ModuleNode(
                id=number,
                parent=parent,
                name=line.name,
                path=f"{nodes[parent].path}.{line.name}" if parent else line.name,
                section=nodes[parent].section or line.name,
                num_tensors=times * line.num_tensors,
                num_elements=times * line.num_elements,
                num_bytes=num_bytes,
                own_bytes=0,
                text=line.text,
            )
        )
    return tuple(replace(node, own_bytes=number) for node, number in zip(nodes, own, strict=True))
