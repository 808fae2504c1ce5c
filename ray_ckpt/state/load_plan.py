"""What each part of a training state wants from a checkpoint: planned first, then read, then applied.

SavedState            the checkpoint as a part sees it: names, shapes, dtypes, and all values that are not tensors
part.plan(saved) ->   LoadPlan(claims, apply): nothing is changed yet, so a state that does not fit is left alone
    handover.take()   objects that may refuse what was saved take it, or it is undone and nothing has changed
    claim.target()    the memory that a tensor is read into; only now it is allocated
    plan.apply(...)   after the reading
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.errors import UsageError
from ray_ckpt.format.inner_tensors import Recipe, take_apart
from ray_ckpt.format.manifest import Path
from ray_ckpt.format.memory import overlapping
from ray_ckpt.format.torch_container import dtype_name
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.format.wanted_names import is_below
from ray_ckpt.format.wrappers import is_made_of_others

KeyMap = Mapping[str, str] | Callable[[str], str]
"""Wanted name -> saved name. A name that a mapping lacks, or that comes back as it is, was saved under itself. The
public one may also have a `Saved` in the place of a saved name: `RankLoad` has applied those to the checkpoint."""


@dataclass(frozen=True)
class Spec:
    """Dtype and shape of a whole tensor, whatever part of it this rank holds."""

    dtype: str
    """`str(torch.dtype)` without the `torch.` prefix."""
    shape: tuple[int, ...]
    """Global shape, not that of the shard."""
    recipe: Recipe | None = None
    """How it is made of other tensors; None if its elements are its own."""

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "a tensor") -> Spec:
        """Raises:
        UsageError: it is made of other tensors in a way that cannot be saved or loaded.
        """
        is_plain = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
        if is_plain and not tensor.is_nested:  # nearly all are, and there may be many thousands of them
            return cls(dtype_name(tensor.dtype), tuple(tensor.shape))
        if tensor.is_nested:
            raise UsageError(f"{name!r} is a nested tensor: give its values and offsets names of their own")
        recipe = take_apart(name, tensor).recipe if is_made_of_others(tensor) else None
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape), recipe)

    @classmethod
    def of_target(cls, tensor: torch.Tensor, name: str) -> Spec:
        """Of a tensor that is to be read into.

        Raises:
            UsageError: as `of`, or several elements lie in one place.
        """
        is_strided = tensor.layout is torch.strided  # of others torch cannot tell whether they are contiguous
        if is_strided and not tensor.is_contiguous() and (wrong := overlapping(local_tensor(tensor))):
            raise UsageError(f"{name!r} {wrong}")
        return cls.of(tensor, name)

    def __str__(self) -> str:
        return str(self.recipe or f"{self.dtype}{list(self.shape)}")


@dataclass(frozen=True)
class Claim:
    """One entry of the checkpoint that a part wants."""

    saved: str
    """Name of the entry in the checkpoint."""
    spec: Spec | None = None
    """Required dtype and shape; None for a value that is not a tensor."""
    target: Callable[[], torch.Tensor | None] | None = None
    """Returns the tensor to read into, allocating it if there is none yet; None where this rank has no part of it. None
    for a value that is not a tensor."""


@dataclass(frozen=True)
class Handover:
    """An object that takes its state by its own `load_state_dict`, which may refuse it: so it is asked first."""

    name: str
    """What messages call it."""
    owner: Stateful
    claims: Mapping[str, Claim]
    """Those claims of the plan that are the object's: read before all others."""
    state_of: Callable[[Mapping[str, torch.Tensor]], Any]
    """The state that it takes, from wanted name -> tensor that was read."""
    may_be_asked: bool = True
    """Whether its `state_dict` may be asked beforehand: a data loader would start its workers for that."""


@dataclass(frozen=True)
class LoadPlan:
    """What one part wants, and how it takes it."""

    claims: Mapping[str, Claim]
    """Wanted name -> claim."""
    apply: Callable[[Mapping[str, torch.Tensor]], None]
    """Called after the reading with wanted name -> tensor that was read. Values come from `SavedState`."""
    problems: Sequence[str] = ()
    """Reasons why the checkpoint does not fit, apart from names, shapes and dtypes."""
    doubts: Sequence[str] = ()
    """Reasons why it may not fit, which only a strict load refuses."""
    taken: Iterable[str] = ()
    """Further names of the checkpoint that this part accounts for, so that they are not unexpected."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Section -> what happens to it, where that depends on the layout."""
    handovers: Sequence[Handover] = ()
    """Objects that take their state before the first tensor of anything else is read."""
    section: str = ""
    """What messages call the part whose plan it is."""


class SavedState:
    """The names in a checkpoint, and the values of what is not a tensor.

    Args:
        tensors: name -> spec.
        values: name -> value of everything that is not a tensor, and of tensors that are hyper-parameters.
        layout: name of the layout that saved it.
        paths: name -> keys that led to it in the state dict, where that is known and more than the name.
        only: prefixes of the wanted names (whole components of them); None: everything.
        key_map: from wanted to saved names.
    """

    def __init__(
        self,
        tensors: Mapping[str, Spec],
        values: Mapping[str, Any],
        *,
        layout: str | None = None,
        paths: Mapping[str, Path] | None = None,
        only: Sequence[str] | None = None,
        key_map: KeyMap | None = None,
    ) -> None:
        self.tensors = tensors
        self.values = values
        self.layout = layout
        self._paths = paths or {}
        self._only = only
        self._key_map = key_map
        self.names = frozenset((*tensors, *values))
        self._sorted = sorted(self.names)

    def holding(self, tensors: Mapping[str, Spec], values: Mapping[str, Any]) -> SavedState:
        """The same checkpoint with other names in it."""
        return SavedState(
            tensors, values, layout=self.layout, paths=self._paths, only=self._only, key_map=self._key_map
        )

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def under(self, prefix: str) -> list[str]:
        """The prefix itself, when it is a name, and the names that continue it by a dot."""
        start = bisect.bisect_left(self._sorted, f"{prefix}.")
        end = bisect.bisect_left(self._sorted, f"{prefix}/")  # the character after the dot
        return ([prefix] if prefix in self else []) + self._sorted[start:end]

    def path_of(self, name: str) -> Path:
        """The keys that led to an entry in the state dict that was saved."""
        return self._paths.get(name, (name,))

    def wants(self, name: str) -> bool:
        """Whether this name, or something below it, is to be loaded at all."""
        return self._only is None or any(is_below(name, chosen) or is_below(chosen, name) for chosen in self._only)

    def name_of(self, wanted: str) -> str:
        """The name under which `wanted` was saved."""
        if self._key_map is None:
            return wanted
        if isinstance(self._key_map, Mapping):
            return self._key_map.get(wanted, wanted)
        name = self._key_map(wanted)
        if not isinstance(name, str):
            raise UsageError(
                f"key_map gives {name!r:.200} for {wanted!r}: a function returns names; joins and splits need a mapping"
            )
        return name


class StatePart(Protocol):
    """One section of a training state, such as the model or the schedulers."""

    section: str
    """First component of the names of this part."""

    def leaves(self) -> dict[str, Any]:
        """Name within the section -> live tensor, or a value as `sealing.seal` makes it."""
        ...

    def plan(self, saved: SavedState) -> LoadPlan: ...
