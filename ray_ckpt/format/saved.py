"""`Saved`: a tensor that a key map makes of saved ones, by joining, splitting and transposing them. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ray_ckpt.errors import UsageError

__all__ = ["Saved"]


@dataclass(frozen=True)
class Saved:
    """A saved tensor as a key map names it, or what is made of several: nothing is read before it is wanted.

    Operations are torch's, by their names and arguments. Dims may be counted from the end.

    Example:
        >>> import torch
        >>> from ray_ckpt import Saved, load, save
        >>> report = save({"q": torch.zeros(2, 4), "k": torch.ones(2, 4)}, "run/split")
        >>> state = {"qk": torch.full((4, 4), 7.0)}
        >>> report = load(state, "run/split", key_map={"qk": Saved.cat([Saved("q"), Saved("k")], dim=0)})
        >>> state["qk"][:, 0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """

    name: str = ""
    """Name of the saved tensor; empty where it is made of others."""
    operation: str = ""
    """What is done to the operands; empty for a saved tensor as it is."""
    operands: tuple[Saved, ...] = ()
    """What it is made of."""
    arguments: tuple[int, ...] = ()
    """Dims, indices and lengths of the operation."""

    @staticmethod
    def cat(parts: Sequence[Saved], dim: int = 0) -> Saved:
        """The parts one behind the other along a dim that they have."""
        return _joined("cat", parts, dim)

    @staticmethod
    def stack(parts: Sequence[Saved], dim: int = 0) -> Saved:
        """The parts one behind the other along a dim of its own, such as the experts of a layer."""
        return _joined("stack", parts, dim)

    def narrow(self, dim: int, start: int, length: int) -> Saved:
        """The indices `[start, start + length)` of a dim. **None is an error, and so is an index beyond the end.**"""
        return Saved(operation="narrow", operands=(self,), arguments=(dim, start, length))

    def select(self, dim: int, index: int) -> Saved:
        """One index of a dim, without that dim, such as a layer of stacked ones."""
        return Saved(operation="select", operands=(self,), arguments=(dim, index))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Saved, ...]:
        """Equal parts along a dim. **Unlike torch's, a size that they do not divide is an error.**"""
        return tuple(
            Saved(operation="chunk", operands=(self,), arguments=(chunks, dim, index)) for index in range(chunks)
        )

    def transpose(self, dim0: int, dim1: int) -> Saved:
        """Two dims swapped."""
        return Saved(operation="transpose", operands=(self,), arguments=(dim0, dim1))

    def names(self) -> Iterator[str]:
        """The saved tensors that it is made of, from the first to the last; one that occurs twice comes twice."""
        if not self.operation:
            yield self.name
        for operand in self.operands:
            yield from operand.names()

    def renamed(self, rename: Callable[[str], str]) -> Saved:
        """The same of other tensors."""
        name = self.name if self.operation else rename(self.name)
        return replace(self, name=name, operands=tuple(operand.renamed(rename) for operand in self.operands))

    def __str__(self) -> str:
        if not self.operation:
            return self.name
        inside = ", ".join(map(str, (*self.operands, *self.arguments)))
        return f"{self.operation}({inside})"


def _joined(operation: str, parts: Sequence[Saved], dim: int) -> Saved:
    if not parts or not all(isinstance(part, Saved) for part in parts):
        raise UsageError(f"{operation} takes a list of Saved, and at least one of them")
    return Saved(operation=operation, operands=tuple(parts), arguments=(dim,))
