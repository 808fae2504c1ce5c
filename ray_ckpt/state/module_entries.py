"""The entries of modules' state dicts: which tensor each belongs to, and into which memory it is read.

A tensor is read straight into the live one where the state dict shows that under the name of the attribute. Hooks, and
modules with a state dict of their own, may show it under another name, a part of it, or something made of it; what is
read for those gets memory of its own, as their own `load_state_dict` copies from it into live tensors, one after the
other, and could overwrite what it still has to copy.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ray_ckpt.errors import StateMismatchError, UsageError
from ray_ckpt.format.fingerprint import Fingerprint
from ray_ckpt.format.fingerprinting import fingerprint
from ray_ckpt.format.memory import fault
from ray_ckpt.format.torch_internals import has_entry, local_tensor, without_weak_references
from ray_ckpt.format.wrappers import are_alike, are_same, is_made_of_others, nodes_of, with_memory
from ray_ckpt.state import sealing
from ray_ckpt.state.unsaved_buffers import device_of
from ray_ckpt.text import listed

EXTRA_STATE = "_extra_state"
"""Last component of the key that a module's `get_extra_state` has in its state dict."""


@dataclass(frozen=True)
class Entry:
    """One entry of a module's state dict."""

    module: nn.Module
    key: str
    """Key of the entry in the module's own state dict."""
    value: Any

    @property
    def is_opaque(self) -> bool:
        """Whether only the module knows what it is, so that it need not be like what the module has now."""
        return not isinstance(self.value, torch.Tensor) or self.key.rpartition(".")[2] == EXTRA_STATE


def live_tensor(entry: Entry) -> torch.Tensor:
    """The parameter or buffer itself."""
    owner, name = owner_of(entry)
    return getattr(owner, name)  # type: ignore[no-any-return]


def has_no_place(entry: Entry) -> bool:
    """Whether an entry on meta is none of its module's own tensors, so that nothing can be given memory for it."""
    if entry.is_opaque or not entry.value.is_meta:
        return False
    try:
        owner, name = owner_of(entry)
    except AttributeError:
        return True
    return not has_entry(owner, name)


def owner_of(entry: Entry) -> tuple[nn.Module, str]:
    """The module that has the entry as its own parameter or buffer, within wrappers that leave no trace in the key."""
    path, _, name = entry.key.rpartition(".")
    module = entry.module.get_submodule(path)
    while not has_entry(module, name) and len(module._modules) == 1:
        [inner] = module._modules.values()
        if inner is None:
            break
        module = inner
    return module, name


def memory_of(entry: Entry) -> torch.Tensor:
    """The live tensor of an entry, given memory if it is on the meta device."""
    if not entry.value.is_meta:
        return entry.value  # type: ignore[no-any-return]
    live = live_tensor(entry)
    if live.is_meta:
        memory = with_memory(live.detach(), device_of(entry.module))
        owner, name = owner_of(entry)
        if isinstance(live, nn.Parameter):
            try:
                # Whoever holds the parameter, such as an optimizer, shall hold the same one afterwards.
                with without_weak_references(owner):
                    torch.utils.swap_tensors(live, nn.Parameter(memory, requires_grad=live.requires_grad))
            except RuntimeError as error:
                raise UsageError(
                    f"{entry.key!r} is on the meta device and cannot be given memory ({error}): call "
                    "to_empty(device=...) before the optimizer is made"
                ) from error
        else:
            setattr(owner, name, memory)
    return live_tensor(entry).detach()


_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")
_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict")


def has_own_form(module: nn.Module) -> bool:
    """Whether a state dict may show something else than live tensors under the names of their attributes.

    Under FSDP1, whose state dicts are torch's own, it may not.
    """
    return not FullyShardedDataParallel.fsdp_modules(module) and any(map(_has_own_methods, module.modules()))


def _has_own_methods(module: nn.Module) -> bool:
    hooks = [hook for name in _HOOKS for hook in getattr(module, name, {}).values()]
    return not all(map(_is_torchs, hooks)) or not all(_is_torchs(getattr(type(module), name)) for name in _METHODS)


def _is_torchs(function: Any) -> bool:
    function = getattr(function, "hook", function)  # within torch's own wrapper of hooks
    function = getattr(function, "func", function)  # of a partial
    return f"{getattr(function, '__module__', '')}.".startswith("torch.")


def may_show_else(module: nn.Module, loaded: Mapping[str, Any]) -> bool:
    """Whether a module may show something else than was read although its load went well, as by what it makes of its
    extra state."""
    has_extra_state = any(key.rpartition(".")[2] == EXTRA_STATE for key in loaded)
    return has_own_form(module) or (has_extra_state and not FullyShardedDataParallel.fsdp_modules(module))


def target_of(entry: Entry, *, has_own_form: bool) -> Callable[[], torch.Tensor]:
    """What gives the memory that an entry is read into.

    Args:
        has_own_form: whether the entry's module has.
    """

    def apart() -> torch.Tensor:
        memory = memory_of(entry)
        return with_memory(memory.detach(), local_tensor(memory).device)

    is_apart = has_own_form and (entry.value.is_meta or not _is_live(entry))
    return apart if is_apart else lambda: memory_of(entry)


def _is_live(entry: Entry) -> bool:
    """Whether the state dict shows the attribute of the entry's name itself."""
    try:
        live = live_tensor(entry)
    except AttributeError:
        return False
    return isinstance(live, torch.Tensor) and are_alike(entry.value, live, _are_one_memory)


def _are_one_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.shape, one.stride(), one.device) != (other.shape, other.stride(), other.device):
        return False
    return one.data_ptr() == other.data_ptr()


def with_targets(module: nn.Module) -> dict[str, Any]:
    """A module's state dict to read into: of what is not live in it under its name, copies."""
    state = module.state_dict()
    if not has_own_form(module):
        return state
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and not value.is_meta}
    made = {key: value for key, value in tensors.items() if not _is_live(Entry(module, key, value))}
    return {**state, **{key: value.detach().clone() for key, value in made.items()}}


class Shown:
    """What was read for a module, before its own `load_state_dict` takes it: that could write to the same memory."""

    def __init__(self, module: nn.Module, loaded: Mapping[str, Any]) -> None:
        self._module = module
        self._loaded = loaded
        tensors = {key: value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
        self._bits = {key: _bits(value) for key, value in tensors.items()} if has_own_form(module) else {}

    def check(self) -> None:
        """Ask the module for its state again.

        Raises:
            StateMismatchError: it shows something else.
        """
        shown = self._module.state_dict()
        if wrong := [key for key, value in self._loaded.items() if not self._shows(key, value, shown)]:
            raise StateMismatchError(
                f"after the load {type(self._module).__name__} does not show what was read as "
                f"{listed(wrong, at_most=4)}: its own load_state_dict makes something else of it, or leaves it on the "
                "meta device"
            )

    def _shows(self, key: str, read: Any, shown: Mapping[str, Any]) -> bool:
        value = shown.get(key)
        if _is_encoded(read) or (key.endswith(EXTRA_STATE) and isinstance(read, torch.Tensor)):
            return True  # the same may be written in several ways, such as a pickle
        if not isinstance(read, torch.Tensor):
            return key in shown and sealing.is_same(read, value)
        if not isinstance(value, torch.Tensor):
            return False
        return _bits(value) == self._bits[key] if key in self._bits else are_same(read, value)


def _is_encoded(value: Any) -> bool:
    return isinstance(value, (bytes, bytearray, io.BytesIO))


def _bits(tensor: torch.Tensor) -> dict[str, Fingerprint]:
    """Fingerprints of a tensor's elements on this rank, or of those of the tensors that it is made of."""
    local = local_tensor(tensor)
    nodes = nodes_of(local) if is_made_of_others(local) else {"": local}
    return {name: fingerprint(node) for name, node in nodes.items() if not fault(local_tensor(node))}
