"""Tensors that are made of saved ones without reading them: which elements of which chunk stand where.

View.of(entry)              a saved tensor as it is
evaluate(Saved, look_up)    what a key map makes of it
view.pieces                 boxes of the view, each of one chunk: what a load reads
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ray_ckpt.errors import StateMismatchError
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.manifest import Chunk, TensorEntry
from ray_ckpt.format.saved import Saved

__all__ = ["Piece", "View", "evaluate"]


class Piece(NamedTuple):
    """Elements of a chunk as a box of a view."""

    box: Box
    """Place in the view."""
    chunk: Chunk
    start: tuple[int, ...]
    """First element in the chunk, in its own coordinates."""
    dims: tuple[int | None, ...]
    """Dim of the view that each dim of the chunk is; None where one index was selected. The view's other dims have
    size 1 in this piece."""

    def in_chunk(self, box: Box) -> Box:
        """The elements at a box, given in the piece's own coordinates, in those of the chunk."""
        offsets = tuple(
            first + (0 if dim is None else box.offsets[dim]) for first, dim in zip(self.start, self.dims, strict=True)
        )
        return Box(offsets, tuple(1 if dim is None else box.sizes[dim] for dim in self.dims))


@dataclass(frozen=True)
class View:
    """A tensor made of saved ones."""

    dtype: str
    """`str(torch.dtype)` without the `torch.` prefix."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, entry: TensorEntry) -> View:
        """A saved tensor as it is."""
        dims = tuple(range(len(entry.shape)))
        pieces = (Piece(chunk.box, chunk, (0,) * len(dims), dims) for chunk in entry.chunks)
        return cls(entry.dtype, entry.shape, tuple(pieces))


def evaluate(saved: Saved, look_up: Callable[[str], View]) -> View:
    """What an expression makes of saved tensors.

    Raises:
        StateMismatchError: shapes or dtypes of the operands do not allow it.
    """
    if not saved.operation:
        return look_up(saved.name)
    views = [evaluate(operand, look_up) for operand in saved.operands]
    try:
        return _OPERATIONS[saved.operation](views, *saved.arguments)
    except _Misfit as misfit:
        shapes = ", ".join(f"{view.dtype}{list(view.shape)}" for view in views[:4])
        raise StateMismatchError(f"the key map asks for {str(saved)[:300]}, of {shapes}: {misfit}") from misfit


class _Misfit(ValueError):
    pass


def _dim(view: View, dim: int, more: int = 0) -> int:
    num_dims = len(view.shape) + more
    if not -num_dims <= dim < num_dims:
        raise _Misfit(f"there is no dim {dim}")
    return dim % num_dims


def _narrow(views: Sequence[View], dim: int, start: int, length: int) -> View:
    view = views[0]
    dim = _dim(view, dim)
    if not 0 <= start < start + length <= view.shape[dim]:
        raise _Misfit(f"[{start}, {start + length}) is no part of a dim of size {view.shape[dim]}")
    frame = Box(_with((0,) * len(view.shape), dim, start), _with(view.shape, dim, length))
    pieces = []
    for piece in view.pieces:
        common = piece.box.intersect(frame)
        if common is not None:
            start_in_chunk = piece.in_chunk(common.within(piece.box)).offsets
            pieces.append(Piece(common.within(frame), piece.chunk, start_in_chunk, piece.dims))
    return View(view.dtype, frame.sizes, tuple(pieces))


def _chunk(views: Sequence[View], chunks: int, dim: int, index: int) -> View:
    size = views[0].shape[_dim(views[0], dim)]
    if size % chunks:
        raise _Misfit(f"a size of {size} is not divided by {chunks}")
    return _narrow(views, dim, index * (size // chunks), size // chunks)


def _select(views: Sequence[View], dim: int, index: int) -> View:
    dim = _dim(views[0], dim)
    size = views[0].shape[dim]
    if not -size <= index < size:
        raise _Misfit(f"there is no index {index} in a dim of size {size}")
    view = _narrow(views, dim, index % size, 1)

    def without(piece: Piece) -> Piece:
        dims = tuple(None if of == dim or of is None else of - (of > dim) for of in piece.dims)
        return Piece(Box(_less(piece.box.offsets, dim), _less(piece.box.sizes, dim)), piece.chunk, piece.start, dims)

    return View(view.dtype, _less(view.shape, dim), tuple(map(without, view.pieces)))


def _transpose(views: Sequence[View], dim0: int, dim1: int) -> View:
    view = views[0]
    dim0, dim1 = _dim(view, dim0), _dim(view, dim1)
    order = list(range(len(view.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]

    def swapped(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sizes[dim] for dim in order)

    pieces = (
        Piece(
            Box(swapped(piece.box.offsets), swapped(piece.box.sizes)),
            piece.chunk,
            piece.start,
            tuple(None if dim is None else order[dim] for dim in piece.dims),
        )
        for piece in view.pieces
    )
    return View(view.dtype, swapped(view.shape), tuple(pieces))


def _cat(views: Sequence[View], dim: int) -> View:
    dim = _dim(views[0], dim)
    if len({(view.dtype, len(view.shape), _less(view.shape, dim)) for view in views}) > 1:
        raise _Misfit(f"they differ in more than dim {dim}")
    pieces, at = [], 0
    for view in views:
        for piece in view.pieces:
            box = Box(_with(piece.box.offsets, dim, piece.box.offsets[dim] + at), piece.box.sizes)
            pieces.append(piece._replace(box=box))
        at += view.shape[dim]
    return View(views[0].dtype, _with(views[0].shape, dim, at), tuple(pieces))


def _stack(views: Sequence[View], dim: int) -> View:
    dim = _dim(views[0], dim, more=1)
    return _cat([_unsqueeze(view, dim) for view in views], dim)


def _unsqueeze(view: View, dim: int) -> View:
    def wider(sizes: tuple[int, ...], item: int) -> tuple[int, ...]:
        return (*sizes[:dim], item, *sizes[dim:])

    pieces = (
        Piece(
            Box(wider(piece.box.offsets, 0), wider(piece.box.sizes, 1)),
            piece.chunk,
            piece.start,
            tuple(None if of is None else of + (of >= dim) for of in piece.dims),
        )
        for piece in view.pieces
    )
    return View(view.dtype, wider(view.shape, 1), tuple(pieces))


def _with(sizes: Sequence[int], dim: int, item: int) -> tuple[int, ...]:
    return (*sizes[:dim], item, *sizes[dim + 1 :])


def _less(sizes: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*sizes[:dim], *sizes[dim + 1 :])


_OPERATIONS: dict[str, Callable[..., View]] = {
    "narrow": _narrow,
    "chunk": _chunk,
    "select": _select,
    "transpose": _transpose,
    "cat": _cat,
    "stack": _stack,
}


def used_boxes(saved: Saved, shapes: Callable[[str], tuple[str, tuple[int, ...]]]) -> Iterable[tuple[str, Box]]:
    """Which elements of which saved tensor an expression uses.

    Args:
        shapes: name -> dtype and shape.
    """

    def whole(name: str) -> View:
        dtype, shape = shapes(name)
        return View.of(TensorEntry(dtype, shape, (Chunk(Box.whole(shape), name, 0, 0, None),)))

    for piece in evaluate(saved, whole).pieces:
        yield piece.chunk.file, piece.in_chunk(Box.whole(piece.box.sizes))
