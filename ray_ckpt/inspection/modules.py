"""module_tree(contents): the names of tensors as a tree that fits on a page.

layers.0, layers.1, ... of one structure  ──>  one line, `layers.[0-31]`
too many lines                            ──>  the deepest levels are left out, largest depth that fits
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ray_ckpt.format.manifest import TensorEntry, itemsize
from ray_ckpt.format.tensor_table import outlines
from ray_ckpt.gc_pause import collector_paused

__all__ = ["TreeLine", "module_tree"]

_DEEPEST = 64
"""Levels of a tree; what lies deeper stands in it by the rest of its name."""


@dataclass(frozen=True)
class TreeLine:
    """A module, or a tensor."""

    depth: int
    name: str
    """The last part of its name; `[0-31]` for numbered siblings of one structure."""
    num_tensors: int
    num_elements: int
    num_bytes: int
    text: str
    """Dtype, shape and number of chunks of a tensor; empty for a module."""
    num_siblings: int = 1
    """How many are folded into this line. Its numbers are of all of them; those of lines below it are of one."""


@dataclass(slots=True)
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    text: str = ""
    totals: tuple[int, int, int] = (0, 0, 0)
    signature: int = 0

    def finish(self) -> None:
        """Add up what is below, and find out what it is made of."""
        parts: list[object] = [self.text]
        num_tensors, num_elements, num_bytes = self.totals
        for name, child in self.children.items():
            if child.children:
                child.finish()
            else:
                child.signature = hash(child.text)
            tensors_there, elements_there, bytes_there = child.totals
            num_tensors, num_elements = num_tensors + tensors_there, num_elements + elements_there
            num_bytes += bytes_there
            parts += name, child.signature
        self.totals, self.signature = (num_tensors, num_elements, num_bytes), hash(tuple(parts))


def module_tree(tensors: Mapping[str, TensorEntry], *, max_lines: int, fold: bool = True) -> tuple[TreeLine, ...]:
    """The tree of all tensors, in at most so many lines, the deepest levels left out where there are more.

    Args:
        max_lines: at least 1. The top level is shown whatever it has, cut after so many lines.
        fold: whether numbered siblings of one structure are one line.
    """
    with collector_paused():
        root = _grow(tensors)
    lines: list[TreeLine] = []
    for depth in range(1, _DEEPEST):
        deeper = list(itertools.islice(_lines(root, 0, depth, fold=fold), max_lines + 1))
        if (len(deeper) > max_lines and lines) or len(deeper) == len(lines):
            break
        lines = deeper
    return tuple(lines[:max_lines])


def _grow(tensors: Mapping[str, TensorEntry]) -> _Node:
    root = _Node()
    kinds: dict[tuple[str, tuple[int, ...], int], tuple[str, tuple[int, int, int]]] = {}
    modules = {"": root}
    for name, dtype, shape, num_chunks in outlines(tensors):
        above, _, last = name.rpartition(".")
        if above.count(".") >= _DEEPEST - 1:
            *modules_above, last = name.split(".", _DEEPEST - 1)
            above = ".".join(modules_above)
        module = modules.get(above)
        if module is None:
            module = modules[above] = _descend(root, above.split("."))
        kind = dtype, shape, num_chunks
        if kind not in kinds:
            num_elements = math.prod(shape)
            text = f"{dtype} {list(shape)}" + _chunks(num_chunks)
            kinds[kind] = text, (1, num_elements, num_elements * itemsize(dtype))
        if last not in module.children:
            module.children[last] = _Node()
        node = module.children[last]
        node.text, node.totals = kinds[kind]
    root.finish()
    return root


def _descend(node: _Node, parts: Sequence[str]) -> _Node:
    for part in parts:
        if part not in node.children:
            node.children[part] = _Node()
        node = node.children[part]
    return node


def _lines(node: _Node, depth: int, max_depth: int, *, fold: bool) -> Iterator[TreeLine]:
    if depth == max_depth:
        return
    for names in _runs(node.children) if fold else [[name] for name in node.children]:
        child, count = node.children[names[0]], len(names)
        label = names[0] if count == 1 else f"[{names[0]}-{names[-1]}]"
        num_tensors, num_elements, num_bytes = (count * total for total in child.totals)
        yield TreeLine(depth, label, num_tensors, num_elements, num_bytes, child.text, count)
        yield from _lines(child, depth + 1, max_depth, fold=fold)


def _runs(children: Mapping[str, _Node]) -> list[Sequence[str]]:
    """Consecutive numbers of one structure together; everything else by itself."""
    numbered = sorted((name for name in children if _is_number(name)), key=int)
    runs: list[list[str]] = []
    for name in numbered:
        last = runs[-1][-1] if runs else None
        if last is not None and int(name) == int(last) + 1 and children[name].signature == children[last].signature:
            runs[-1].append(name)
        else:
            runs.append([name])
    return [*([name] for name in children if not _is_number(name)), *runs]


def _is_number(name: str) -> bool:
    return len(name) < 10 and name.isdecimal()  # Python refuses to read numbers of thousands of digits


def _chunks(count: int) -> str:
    return "" if count == 1 else f", {count} chunks"
