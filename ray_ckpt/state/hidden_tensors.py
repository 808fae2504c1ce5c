"""Tensors that optimizers keep and do not show: nothing can save them, so the report of a save names them.

Named is what holds a tensor for each parameter of a group, as slow weights, averages and master weights do, or what
goes by parameters. Buffers of other shapes, gradients, and whatever is saved under any name are not.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ray_ckpt.format.memory import fault
from ray_ckpt.format.torch_internals import local_tensor
from ray_ckpt.state import hyperparameters
from ray_ckpt.state.own_optimizers import has_own_state_dict

_SEQUENCES = (list, tuple, set, deque)
_SAMPLE = 64
"""Number of elements at either end by which a copy of a tensor is known again."""


def hidden(optimizers: Iterable[Any], saved: Iterable[Any]) -> tuple[str, ...]:
    """Names of attributes, such as `Lookahead.slow_weights`.

    Args:
        optimizers: as they were given: they may be wrappers, of any class.
        saved: all that is saved.
    """
    names: list[str] = []
    known: _Known | None = None
    for given in optimizers:
        several = [(name, value) for name, value in _attributes(given) if any(True for _ in _tensors(value))]
        if not several:
            continue  # as with nearly all, and a parameter's id for each would take longer
        members = [p for inner in _optimizers(given) for p in hyperparameters.members(inner)]
        ids = frozenset(map(id, members))
        gradients = [local_tensor(p.grad) for p in members if p.grad is not None]
        of_gradients = {gradient.data_ptr() for gradient in gradients if not fault(gradient)}
        for name, value in several:
            kept = list(_kept(value, ids))
            if not _is_of_parameters(kept, given):
                continue
            known = known or _Known(saved)
            left = [(t, found) for t, found in kept if t.data_ptr() not in of_gradients and t not in known]
            if _is_of_parameters(left, given):
                names.append(name)
    return tuple(sorted(set(names)))


def _holders(given: Any) -> Iterator[tuple[str, Any]]:
    """What is given, and the optimizers that it holds, each once, as they may hold each other; by their names."""
    waiting, seen = deque([(type(given).__qualname__, given)]), {id(given)}
    while waiting:
        name, holder = waiting.popleft()
        yield name, holder
        for attribute, value in vars(holder).items():
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, torch.optim.Optimizer) and id(inner) not in seen:
                    seen.add(id(inner))
                    waiting.append((f"{name}.{attribute}", inner))


def _optimizers(given: Any) -> Iterator[torch.optim.Optimizer]:
    return (holder for _, holder in _holders(given) if isinstance(holder, torch.optim.Optimizer))


def _is_of_parameters(several: list[tuple[torch.Tensor, bool]], given: Any) -> bool:
    if any(by_parameter for _, by_parameter in several):
        return True
    shapes = Counter(tensor.shape for tensor, _ in several)
    groups = [group["params"] for optimizer in _optimizers(given) for group in optimizer.param_groups] if shapes else []
    for group in groups:
        wanted = Counter(local.shape for p in group if (local := local_tensor(p)).numel() > 1)
        if wanted and not wanted - shapes:
            return True
    return False


def _attributes(given: Any) -> Iterator[tuple[str, Any]]:
    """What an optimizer, and those that it holds, keep beside what they show for sure."""
    for name, holder in _holders(given):
        shown = {"param_groups"}
        if isinstance(holder, torch.optim.Optimizer) and not has_own_state_dict(holder):
            shown.add("state")
        yield from (
            (f"{name}.{attribute}", value) for attribute, value in vars(holder).items() if attribute not in shown
        )


def _kept(value: Any, members: frozenset[int]) -> Iterator[tuple[torch.Tensor, bool]]:
    """Tensors with elements that are no parameters, and whether they are found by a parameter."""
    for tensor, by_parameter in _tensors(value, members):
        local = local_tensor(tensor)
        if id(tensor) not in members and local.numel() and not fault(local):
            yield local, by_parameter


def _tensors(value: Any, members: frozenset[int] = frozenset(), depth: int = 0) -> Iterator[tuple[torch.Tensor, bool]]:
    if isinstance(value, torch.Tensor):
        yield value, False
    elif isinstance(value, nn.Module):
        yield from ((tensor, False) for tensor in (*value.parameters(), *value.buffers()))
    elif isinstance(value, (torch.optim.Optimizer, type)) or depth > 4:
        return
    elif isinstance(value, Mapping):
        for key, item in value.items():
            is_parameter = id(key) in members or (type(key) is int and key in members)
            found_below = _tensors(item, members, depth + 1)
            yield from ((tensor, found or is_parameter) for tensor, found in found_below)
    elif isinstance(value, _SEQUENCES):
        for item in value:
            yield from _tensors(item, members, depth + 1)
    elif depth == 0 and hasattr(value, "__dict__") and not callable(value):
        for item in vars(value).values():
            yield from _tensors(item, members, depth + 1)


class _Known:
    """Tensors that are saved: by their memory, or by their elements, as some objects show copies."""

    def __init__(self, saved: Iterable[Any]) -> None:
        self._addresses: set[int] = set()
        self._alike: dict[tuple[torch.dtype, torch.Size], list[torch.Tensor]] = {}
        for value in saved:
            if isinstance(value, torch.Tensor) and not fault(value):
                self._addresses.add(value.data_ptr())
                self._alike.setdefault((value.dtype, value.shape), []).append(value)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        if tensor.data_ptr() in self._addresses:
            return True
        alike = self._alike.get((tensor.dtype, tensor.shape), ())
        ends = _ends(tensor) if alike else tensor
        return any(torch.equal(ends, _ends(other).to(ends.device)) for other in alike)


def _ends(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:]])
