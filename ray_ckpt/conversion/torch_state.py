"""A checkpoint as the nested state dict that a program by hand saves with `torch.save`.

    model        the weights by name
    optimizer    {"state": {number: ...}, "param_groups": [...]}, as `optimizer.load_state_dict` takes it
    schedulers   name -> what `scheduler.load_state_dict` takes
    everything else, such as `counters`, by its own name

Of ours, parameters are numbered group after group, and a group is the parameters whose hyper-parameters are equal.
Another program's checkpoint keeps its keys; an optimizer in it that has names for numbers gets numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ray_ckpt.conversion.jobs import TensorJob
from ray_ckpt.conversion.optimizers import indexed, named_optimizer
from ray_ckpt.conversion.schedulers import scheduler_states
from ray_ckpt.conversion.selection import Model, Rename, chosen, model_of, optimizer_parts, renamed
from ray_ckpt.conversion.source import Source
from ray_ckpt.errors import FormatError, UnsafeCheckpointError
from ray_ckpt.format.foreign_optimizers import find_optimizers
from ray_ckpt.format.manifest import ObjectEntry, Path, TensorEntry
from ray_ckpt.format.torch_container import StoredElsewhere, parse_dtype, pickled
from ray_ckpt.state import sealing
from ray_ckpt.text import quoted

__all__ = ["TorchState", "state_of"]


@dataclass(frozen=True)
class Reference:
    """Stands for a tensor of the source in the state."""

    saved: str
    """Its name in the source."""


@dataclass
class TorchState:
    """What is to be saved."""

    root: dict[str, Any]
    """Nested; each tensor is a `Reference`."""
    weights: frozenset[str]
    """Names in the source of the model's tensors."""
    left_out: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, tuple[str, bool]]:
        """Name in the target, once it is flattened -> name in the source, and whether it is one of the model's."""
        found: dict[str, tuple[str, bool]] = {}
        for path, reference in _references(self.root, ()):
            name = ".".join(map(str, path))
            if name in found:
                raise FormatError(
                    f"two tensors would both be called {quoted(name)}: leave one out by only=, or rename it"
                )
            found[name] = reference.saved, reference.saved in self.weights
        return found

    def pickled(self, tensors: Sequence[TensorJob]) -> bytes:
        """The pickle of the file.

        Args:
            tensors: in the order of `tensors`.
        """
        stored = iter(
            StoredElsewhere(parse_dtype(tensor.dtype), tensor.shape, str(number))
            for number, tensor in enumerate(tensors)
        )
        return pickled(_replaced(self.root, lambda reference: next(stored)))


def state_of(source: Source, only: Sequence[str], rename: Sequence[Rename]) -> TorchState:
    """
    Raises:
        UsageError: there is nothing below a name in `only`.
        FormatError: two entries would have one name.
    """
    manifest = source.manifest
    model = model_of(manifest, source.lists)
    names = set(chosen(manifest, model, only, source.opened.address))
    values, left_out = _values(source, [name for name in manifest.objects if name in names])
    weights = frozenset(name for name in model.plain if name in names)
    if manifest.has_own_names:
        leaves: dict[str, Any] = {name: Reference(name) for name in manifest.tensors if name in names}
        state = _ours(leaves | values, model, rename, left_out)
    else:
        state = _foreign(source, names, values, model, rename, left_out)
    return TorchState(state, weights, left_out)


def _values(source: Source, names: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Values that are no tensors, and those that cannot be had, with the reason."""
    entries = {name: source.manifest.objects[name] for name in names}
    try:
        return source.values(entries), []
    except UnsafeCheckpointError:
        pass  # One by one, to find which.
    values: dict[str, Any] = {}
    left_out: list[str] = []
    for name, entry in entries.items():
        try:
            values |= source.values({name: entry})
        except UnsafeCheckpointError as error:
            left_out.append(f"{quoted(name)}: {error}")
    return values, left_out


# ---------------------------------------------------------------------------------------------------------- ours


def _ours(leaves: Mapping[str, Any], model: Model, rename: Sequence[Rename], left_out: list[str]) -> dict[str, Any]:
    """Our sections; what is sealed is opened."""
    sections: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        section, _, rest = name.partition(".")
        sections.setdefault(section, {})[rest] = leaf
    root: dict[str, Any] = {}
    weights = renamed({name: plain for name, plain in model.plain.items() if name in leaves}, rename)
    if weights:
        root["model"] = {wanted: leaves[model.aliases.get(name, name)] for name, wanted in weights.items()}
    groups: list[list[str]] = []
    if "optim" in sections:
        plain = {name.removeprefix("model."): wanted for name, wanted in weights.items()}
        in_order = [name.removeprefix("model.") for name in model.names]
        root |= named_optimizer(sections["optim"], in_order, sections.get("schedulers", {}), plain, groups)
    if "schedulers" in sections:
        states, lacking = scheduler_states(sections["schedulers"], groups)
        root |= {"schedulers": states} if states else {}
        left_out += lacking
    for section, of_section in sections.items():
        if section in ("optim", "schedulers"):
            continue
        others = {name: leaf for name, leaf in of_section.items() if f"{section}.{name}" not in model.plain}
        if "" in others:
            root[section] = sealing.unpack(section, {section: others[""], **_below(section, others)})
        elif others and section != "model":
            root[section] = sealing.unpack(section, _below(section, others))
        elif others:
            root[section] = {**root.get(section, {}), **sealing.unpack(section, _below(section, others))}
    return root


def _below(section: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{section}.{name}": leaf for name, leaf in leaves.items() if name}


# ------------------------------------------------------------------------------------------------------- foreign


def _foreign(
    source: Source,
    names: Collection[str],
    values: Mapping[str, Any],
    model: Model,
    rename: Sequence[Rename],
    left_out: list[str],
) -> dict[str, Any]:
    """The nested state dict as it was."""
    manifest = source.manifest
    optimizers = find_optimizers(manifest, source.lists)
    wanted = renamed({name: plain for name, plain in model.plain.items() if name in names}, rename)
    root: dict[Any, Any] = {}
    of_optimizers: dict[str, dict[str, Any]] = {optimizer.prefix: {} for optimizer in optimizers}
    parts = optimizer_parts(optimizers)
    for name in _in_order(manifest.tensors, manifest.objects, names):
        if name not in manifest.tensors and name not in values:
            continue
        leaf = Reference(name) if name in manifest.tensors else values[name]
        prefix = next((prefix for start, prefix in parts if name.startswith(start)), None)
        if prefix is not None:
            of_optimizers[prefix][name[len(prefix) :]] = leaf
        elif name in wanted:
            _put(root, ((model.key, wanted[name]) if model.key else (wanted[name],)), leaf)
        else:
            entry: TensorEntry | ObjectEntry = manifest.tensors.get(name) or manifest.objects[name]
            _put(root, _path(entry.path, name), leaf)
    for optimizer in optimizers:
        if leaves := of_optimizers[optimizer.prefix]:
            state = indexed(optimizer, leaves)
            path = tuple(optimizer.prefix.rstrip(".").split(".")) if optimizer.prefix else ()
            if path:
                _put(root, path, state)
            else:
                root |= state
    return {key: _lists(item) for key, item in root.items()}


def _in_order(tensors: Iterable[str], objects: Iterable[str], wanted: Collection[str]) -> list[str]:
    return [name for name in (*tensors, *objects) if name in wanted]


def _path(path: Path | None, name: str) -> Path:
    return path if path else (name,)


def _put(root: dict[Any, Any], path: Path, leaf: Any) -> None:
    for part in path[:-1]:
        root = root.setdefault(part, {})
        if not isinstance(root, dict):
            raise FormatError(f"{quoted('.'.join(map(str, path)))} lies within what is no dict")
    root[path[-1]] = leaf


def _lists(value: Any) -> Any:
    """Dicts whose keys are the indices of a list become one."""
    if type(value) is not dict:
        return value
    items = {key: _lists(item) for key, item in value.items()}
    if items and all(type(key) is int for key in items) and sorted(items) == list(range(len(items))):
        return [items[index] for index in range(len(items))]
    return items


# ------------------------------------------------------------------------------------------------- whole states


def _references(value: Any, path: tuple[Any, ...]) -> Iterable[tuple[tuple[Any, ...], Reference]]:
    """References in the order in which `_replaced` meets them."""
    if isinstance(value, Reference):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _references(item, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _references(item, (*path, index))


def _replaced(value: Any, replace: Callable[[Reference], Any]) -> Any:
    if isinstance(value, Reference):
        return replace(value)
    if isinstance(value, Mapping):
        return type(value)((key, _replaced(item, replace)) for key, item in value.items())  # type: ignore[call-arg]
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, replace) for item in value)
    if isinstance(value, torch.Tensor):
        raise FormatError("a value that is no tensor holds one, which cannot be written piece by piece")
    return value
