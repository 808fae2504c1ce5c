"""What a rank holds -> what it saves of it: only some names, under other names, joined or split, in another dtype.

hold(state_dict) ── select(holdings, options) ──> Selected     nothing is copied: parts are views, a cast is a promise

A key map is applied as a load applies it (`format/rearrange.py`): to a record whose chunks are this rank's own parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from ray_ckpt.errors import UsageError
from ray_ckpt.format.boxes import Box, shared_box
from ray_ckpt.format.inner_tensors import RECORD
from ray_ckpt.format.manifest import Chunk, Manifest, Path, TensorEntry
from ray_ckpt.format.rearrange import rearrange
from ray_ckpt.format.saved import Saved
from ray_ckpt.format.torch_container import parse_dtype
from ray_ckpt.format.translate import OPTIM
from ray_ckpt.format.views import Piece
from ray_ckpt.format.wanted_names import is_below
from ray_ckpt.protocol.holdings import Holdings
from ray_ckpt.protocol.messages import Item, TensorSpec
from ray_ckpt.protocol.save_options import CASTABLE, SaveOptions
from ray_ckpt.storage.staging import Converted
from ray_ckpt.text import listed


@dataclass(frozen=True)
class Selected:
    """What a rank saves."""

    holdings: Holdings
    absent: frozenset[str]
    """What was asked for by name and this rank holds nothing of: fine, unless no rank does."""


def select(holdings: Holdings, options: SaveOptions) -> Selected:
    """What is saved of what a rank holds.

    Raises:
        UsageError: the options cannot be carried out on it.
        StateMismatchError: shapes do not allow what the key map asks for, or it uses an element twice.
    """
    absent: set[str] = set()
    if options.only is not None:
        names = {item.name for item in holdings.items} | holdings.elsewhere.keys()
        absent |= {f"only={prefix!r}" for prefix in options.only if not any(is_below(n, prefix) for n in names)}
        holdings = _restricted(holdings, options)
    if options.cast or options.key_map:
        _refuse_optimizer(holdings)
    if options.key_map:
        made = {name: saved for name, saved in options.key_map.items() if _has_operands(name, saved, holdings)}
        absent |= {f"key_map[{name!r}]" for name in options.key_map.keys() - made.keys()}
        holdings = _rearranged(holdings, made)
    if options.cast:
        holdings = _converted(holdings, options.cast)
    return Selected(holdings, frozenset(absent))


def _restricted(holdings: Holdings, options: SaveOptions) -> Holdings:
    kept = [position for position, item in enumerate(holdings.items) if options.takes(item.name)]
    return Holdings(
        tuple(holdings.items[position] for position in kept),
        tuple(holdings.values[position] for position in kept),
        {name: kind for name, kind in holdings.elsewhere.items() if options.takes(name)},
    )


def _refuse_optimizer(holdings: Holdings) -> None:
    if names := [item.name for item in holdings.items if is_below(item.name, OPTIM)]:
        raise UsageError(
            f"cast and key_map are for weights, and {names[0]} is an optimizer's state: it would lose its names or its "
            "digits. Say what is to be saved by only=('model',)"
        )


def _has_operands(name: str, saved: Saved, holdings: Holdings) -> bool:
    """Whether a rank knows all that a name is made of; it may hold no element of it."""
    known = {item.name for item in holdings.items if item.spec is not None} | holdings.elsewhere.keys()
    lacking = [operand for operand in dict.fromkeys(saved.names()) if operand not in known]
    if lacking and not known.isdisjoint(saved.names()):
        raise UsageError(
            f"key_map[{name!r}] is made of tensors of which this rank's state has only some; it lacks "
            f"{listed(lacking)}. What is joined has to be in the state of one rank"
        )
    return not lacking


def _rearranged(holdings: Holdings, key_map: Mapping[str, Saved]) -> Holdings:
    used = {operand for saved in key_map.values() for operand in saved.names()}
    paths = {item.name: item.path for item in holdings.items}
    kept = [position for position, item in enumerate(holdings.items) if item.name not in used]
    if taken := sorted(key_map.keys() & {holdings.items[position].name for position in kept}):
        raise UsageError(f"key_map makes {listed(taken)}, which the state has already; use another name, or only=")
    items, values = [holdings.items[position] for position in kept], [holdings.values[position] for position in kept]
    views = rearrange(Manifest(_entries(holdings, used), {}, {}), key_map, _read_nothing, with_optimizer=False).views
    for name, view in views.items():
        path = _path(name, paths.get(next(key_map[name].names())))
        for piece in view.pieces:
            spec = TensorSpec(view.dtype, view.shape, piece.box.offsets, piece.box.sizes)
            items.append(Item(name, path, spec))
            values.append(_in_view(holdings.values[int(piece.chunk.file)], piece))
    elsewhere = {name: kind for name, kind in holdings.elsewhere.items() if name not in used}
    elsewhere |= {name: (view.dtype, view.shape) for name, view in views.items() if not view.pieces}
    return Holdings(tuple(items), tuple(values), elsewhere)


def _entries(holdings: Holdings, used: Collection[str]) -> dict[str, TensorEntry]:
    """What a key map uses, as a record has it. A chunk's file is the position of the part that it stands for."""
    chunks: dict[str, list[Chunk]] = {name: [] for name in used & holdings.elsewhere.keys()}
    kinds = dict(holdings.elsewhere)
    for position, (name, _, spec) in enumerate(holdings.items):
        if spec is not None and name in used:
            chunks.setdefault(name, []).append(Chunk(shared_box(spec.offsets, spec.sizes), str(position), 0, 0, None))
            kinds[name] = spec.dtype, spec.shape
    return {name: TensorEntry(*kinds[name], tuple(parts)) for name, parts in chunks.items()}


def _read_nothing(tensors: Mapping[str, torch.Tensor]) -> None:
    assert not tensors, "only an optimizer's state is compared"


def _in_view(part: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The elements of a piece, out of the part of a tensor that they lie in, with the dims of the view."""
    box = piece.in_chunk(Box.whole(piece.box.sizes))
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        part = part.narrow(dim, offset, size)
    for dim in reversed(range(part.dim())):
        if piece.dims[dim] is None:
            part = part.select(dim, 0)
    kept = [of for of in piece.dims if of is not None]
    part = part.permute(sorted(range(len(kept)), key=kept.__getitem__))
    for dim in range(len(piece.box.sizes)):
        if dim not in kept:
            part = part.unsqueeze(dim)
    return part


def _path(name: str, like: Path | None) -> Path | None:
    """The keys of a new name in the nested state dict: as far down as those of what it is made of."""
    if like is None or not name.startswith(f"{like[0]}."):
        return None
    return like[0], name.removeprefix(f"{like[0]}.")


def _converted(holdings: Holdings, dtype: str) -> Holdings:
    suffix = f".{RECORD}"
    made_of_others = {item.name.removesuffix(suffix) for item in holdings.items if item.name.endswith(suffix)}
    specs: dict[TensorSpec, TensorSpec] = {}  # equal ones stay one object
    items, values = [], []
    for item, value in zip(holdings.items, holdings.values, strict=True):
        spec = item.spec
        if spec is None or spec.dtype not in CASTABLE or spec.dtype == dtype or _is_inner(item.name, made_of_others):
            items.append(item)
            values.append(value)
            continue
        items.append(item._replace(spec=specs.setdefault(spec, spec._replace(dtype=dtype))))
        values.append(Converted(item.name, value, parse_dtype(dtype)))
    return Holdings(tuple(items), tuple(values), holdings.elsewhere)


def _is_inner(name: str, made_of_others: Collection[str]) -> bool:
    return any(is_below(name, whole) for whole in made_of_others)
