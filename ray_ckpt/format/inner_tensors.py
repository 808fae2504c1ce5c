"""Tensors that are made of other tensors: quantized weights, optimizer states of 8 bits. Taken apart, and made again.

    tensor ── take_apart ──> Parts     its inner tensors by name, plain or DTensors, and a recipe of plain values
    recipe, inner tensors ── make ──> tensor

    model.weight  ->  model.weight.codes  model.weight.scale  model.weight.$subclass

Inner tensors may be subclasses again: their names are joined by dots. `wrappers.py` says which tensors are meant, and
`inner_shards.py` where the inner tensors of a DTensor's shard lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from ray_ckpt.errors import FormatError, UsageError
from ray_ckpt.format import contexts
from ray_ckpt.format.inner_shards import Shape, spread
from ray_ckpt.format.torch_container import dtype_name, parse_dtype
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.format.wrappers import Nodes, flatten, is_inner_wrapper, join, nodes_of, placed_like
from ray_ckpt.text import quoted

RECORD = "$subclass"
"""Last component of the entry that holds the recipe."""


class Leaf(NamedTuple):
    """A tensor that others are made of, and that is made of none."""

    dtype: str
    """`str(torch.dtype)` without the `torch.` prefix."""
    shape: Shape | None
    """Global shape; None on a rank whose shard is empty, which cannot tell."""

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape or ())}"


class Recipe(NamedTuple):
    """How a tensor is made of others, in any layout."""

    kind: tuple[str, str]
    """Module and name of its class."""
    dtype: str
    """The dtype that it shows, without `torch.`."""
    shape: tuple[int, ...]
    """Its global shape."""
    context: contexts.Plain
    inner: tuple[tuple[str, Any], ...]
    """Attribute -> `Leaf`; or the recipe of it, if it is a subclass again."""

    def __str__(self) -> str:
        return f"{self.kind[1]} of {self.dtype}{list(self.shape)}"

    @property
    def leaves(self) -> dict[str, Leaf]:
        """Name below the tensor's -> each tensor that it is made of in the end."""
        leaves: dict[str, Leaf] = {}
        for attribute, made in self.inner:
            within = made.leaves if isinstance(made, Recipe) else {"": made}
            leaves |= {join(attribute, name): leaf for name, leaf in within.items()}
        return leaves

    def plain(self) -> tuple[Any, ...]:
        """As the record holds it."""
        inner = tuple((name, made.plain() if isinstance(made, Recipe) else tuple(made)) for name, made in self.inner)
        return (self.kind, self.dtype, self.shape, self.context, inner)

    @classmethod
    def parse(cls, value: Any, name: str) -> Recipe:
        """Raises:
        FormatError: it is not what `plain` gives.
        """
        try:
            (module, qualname), dtype, shape, context, inner = value
            parts = tuple((_text(key), cls._parse_inner(made, name)) for key, made in inner)
            kind = _text(module), _text(qualname)
            return cls(kind, _text(dtype), _sizes(shape), context, parts)
        except (TypeError, ValueError) as error:
            raise FormatError(f"{name!r} does not say how a tensor is made of others: {quoted(value)}") from error

    @classmethod
    def _parse_inner(cls, value: Any, name: str) -> Leaf | Recipe:
        return Leaf(_text(value[0]), _sizes(value[1])) if len(value) == 2 else cls.parse(value, name)


def _text(value: object) -> str:
    if type(value) is not str or not value:
        raise ValueError("no text")
    return value


def _sizes(value: Any) -> Shape:
    if not all(type(size) is int and size >= 0 for size in value):
        raise ValueError("no sizes")
    return tuple(value)


class Parts(NamedTuple):
    """What a tensor is made of."""

    recipe: Recipe
    tensors: Mapping[str, torch.Tensor]
    """Name below the tensor's -> inner tensor: plain, or a DTensor. None of a shard without elements."""


def take_apart(name: str, tensor: torch.Tensor) -> Parts:
    """The inner tensors of a tensor that is made of others. Nothing is copied.

    Args:
        name: of the tensor, for messages.

    Raises:
        UsageError: its context is no plain value, its inner tensors do not follow its sharding, or it has no
            fixed shape.
    """
    local = local_tensor(tensor)
    try:
        if local.is_nested or not all(type(size) is int for size in tensor.shape):
            raise UsageError("its shape is not fixed: save its values and offsets as tensors of their own")
        nodes = nodes_of(local)
        shapes: Mapping[str, Shape] = {inner: tuple(node.shape) for inner, node in nodes.items()}
        tensors = dict(nodes)
        if isinstance(tensor, DTensor):
            found = spread(tensor, nodes)
            tensors = {inner: found.place(inner, nodes[inner]) for inner in found.shapes if inner}
            shapes = found.shapes or {"": tuple(tensor.shape)}
        recipe = _recipe(local, shapes)
    except UsageError as error:
        kind = ".".join(contexts.class_name(type(local)))
        raise UsageError(f"{name!r} is a {kind}, which cannot be saved or loaded: {error}") from None
    return Parts(recipe, {leaf: _detached(tensors[leaf]) for leaf in recipe.leaves if leaf in tensors})


def _recipe(tensor: torch.Tensor, shapes: Mapping[str, Shape]) -> Recipe:
    parts, context = flatten(tensor)
    inner = []
    for attribute, part in parts.items():
        is_again = is_inner_wrapper(part)
        made = (
            _recipe(part, below(attribute, shapes)) if is_again else Leaf(dtype_name(part.dtype), shapes.get(attribute))
        )
        inner.append((attribute, made))
    plain = contexts.encode(context, tuple(tensor.shape))
    return Recipe(contexts.class_name(type(tensor)), dtype_name(tensor.dtype), shapes.get("", ()), plain, tuple(inner))


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach() if tensor.requires_grad else tensor


def below(attribute: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """What has the attribute's name, or a name below it, by the rest of the name."""
    prefix = f"{attribute}."
    found = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
    return found | ({"": named[attribute]} if attribute in named else {})


def make(recipe: Recipe, inner: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> torch.Tensor:
    """Make a tensor of its inner tensors, by the class of the recipe.

    Args:
        inner: the leaves by name.
        shapes: size of the tensor and of each inner one that is made of others again, by name, on this rank.

    Raises:
        FormatError: the class is not loaded, or does not take what was saved.
    """
    cls: Any = subclass_of(recipe)
    tensors = {}
    for attribute, made in recipe.inner:
        if isinstance(made, Recipe):
            tensors[attribute] = make(made, below(attribute, inner), below(attribute, shapes))
        else:
            tensors[attribute] = inner[attribute]
    size, device = torch.Size(shapes[""]), next(iter(inner.values())).device
    try:
        context = contexts.decode(recipe.context, tuple(size), device)
        stride = torch.empty(size, device="meta").stride()
        return cls.__tensor_unflatten__(tensors, context, size, stride)  # type: ignore[no-any-return]
    except FormatError:
        raise
    except Exception as error:  # the class is somebody else's, and the context came out of a file
        raise FormatError(
            f"{cls.__qualname__} cannot be made of what was saved: {type(error).__name__}: {str(error)[:200]}"
        ) from error


def subclass_of(recipe: Recipe) -> type:
    """The class of the recipe, as this process has loaded it. Nothing is imported.

    Raises:
        FormatError: there is none, or it is no subclass that is made of other tensors.
    """
    module, name = recipe.kind
    kinds: list[type] = [kind for kind in _loaded(torch.Tensor) if hasattr(kind, "__tensor_unflatten__")]
    named = [kind for kind in kinds if kind.__qualname__ == name]
    found = [kind for kind in named if kind.__module__ == module] or named  # libraries move their classes
    if len(found) != 1:
        raise FormatError(f"{quoted(f'{module}.{name}')} is no tensor subclass that this process has imported")
    return found[0]


def _loaded(kind: type) -> Iterator[type]:
    for found in list[type](kind.__subclasses__()):
        yield found
        yield from _loaded(found)


def rebuild(recipe: Recipe, like: torch.Tensor) -> torch.Tensor:
    """A new tensor of the recipe, with uninitialized memory.

    Args:
        like: plain, of the recipe's shape: says how and on which device the new one lies.

    Raises:
        FormatError: as `make`.
        UsageError: its inner tensors cannot be sharded as `like` is.
    """
    local = local_tensor(like)
    if isinstance(like, DTensor) and not local.numel():
        return like  # of a shard without elements, no class says what it is made of
    placed = {"": recipe.shape, **_shapes_within(recipe)}
    if isinstance(like, DTensor):
        nodes: Nodes = nodes_of(make(recipe, _empty(recipe, placed, torch.device("meta")), placed))
        placed = dict(spread(like, nodes).local_shapes)
    made = make(recipe, _empty(recipe, placed, local.device), placed)
    return placed_like(like, made)


def _empty(recipe: Recipe, shapes: Mapping[str, Shape], device: torch.device) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty(shapes[name], dtype=parse_dtype(leaf.dtype), device=device)
        for name, leaf in recipe.leaves.items()
    }


def _shapes_within(recipe: Recipe) -> dict[str, Shape]:
    """Global shape of each inner tensor, at any depth."""
    found: dict[str, Shape] = {}
    for attribute, made in recipe.inner:
        found[attribute] = made.shape
        if isinstance(made, Recipe):
            found |= {join(attribute, name): shape for name, shape in _shapes_within(made).items()}
    return found


def misfits(saved: Recipe, live: Recipe) -> Iterator[str]:
    """What keeps a tensor that was saved by one recipe from being read into one of the other, as texts."""
    if saved.kind[1] != live.kind[1]:
        yield f"saved {saved}, wanted {live}"
        return
    if (saved.dtype, saved.shape) != (live.dtype, live.shape):
        yield f"saved {saved}, wanted {live}"
    if any(leaf.shape is None for leaf in live.leaves.values()):
        return  # an empty shard: what its class says of itself may depend on that
    yield from contexts.differences(saved.context, live.context)
    one, other = dict(saved.inner), dict(live.inner)
    for attribute in dict.fromkeys([*one, *other]):
        made, wanted = one.get(attribute), other.get(attribute)
        if isinstance(made, Recipe) and isinstance(wanted, Recipe):
            yield from (f"{attribute}: {text}" for text in misfits(made, wanted))
        elif made != wanted:
            yield f"{attribute}: saved {made or 'without it'}, wanted {wanted or 'without it'}"
