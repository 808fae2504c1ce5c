"""The random generators of a process: as we save them, and as others do.

rng.rank<n>.seed  .python. ...  .numpy. ...  .torch  .cuda          ours
rng.$rank<n>.python  .numpy  .torch  .cuda  .cuda.<device>          others', under our names; without $rank<n> all
                                                                    processes had the same
"""

from __future__ import annotations

import random
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import xxhash

from ray_ckpt.format.foreign_sections import OF_RANK
from ray_ckpt.state.load_plan import SavedState
from ray_ckpt.state.replicated_parts import claim_under
from ray_ckpt.text import quoted

_FOREIGN = re.compile(rf"rng\.(?:{re.escape(OF_RANK)}([0-9]+)\.)?([a-z]+)(?:\.([0-9]+))?")


class Rng:
    """The random generators of this process: Python's, NumPy's if it is loaded, torch's on CPU and on its device."""

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "seed": torch.initial_seed(),
            "python": _python(random.getstate()),
            "torch": torch.get_rng_state(),
        }
        if numpy := sys.modules.get("numpy"):
            kind, keys, position, has_gauss, cached = numpy.random.get_state()
            state["numpy"] = _numpy((str(kind), keys.tolist(), int(position), int(has_gauss), float(cached)))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the generators whose state is there and that this process has."""
        if "python" in state:
            python = state["python"]
            random.setstate((python["version"], tuple(python["numbers"].tolist()), python["gauss"]))
        if "torch" in state:
            torch.set_rng_state(state["torch"])
        if "numpy" in state and (numpy := sys.modules.get("numpy")):
            saved = state["numpy"]
            keys = numpy.array(saved["keys"].tolist(), dtype=numpy.uint32)
            numpy.random.set_state((saved["kind"], keys, saved["position"], saved["has_gauss"], saved["cached"]))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])

    def reseed(self, *parts: object) -> None:
        """Seed all generators from a hash of these parts."""
        seed = xxhash.xxh3_64_intdigest(repr(parts).encode()) >> 1
        random.seed(seed)
        torch.manual_seed(seed)
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed(seed % 2**32)


class ForeignGenerators:
    """What another program saved of the generators of each of its processes.

    Args:
        saved: its checkpoint, under our names.
        rank, num_ranks: this process, and the number of them now.
    """

    def __init__(self, saved: SavedState, rank: int, num_ranks: int) -> None:
        self._saved = saved
        of_ranks: dict[int | None, dict[str, str]] = defaultdict(dict)
        for name in saved.under("rng"):
            # Those of all devices of a process that has none are an empty list.
            if (found := _FOREIGN.fullmatch(name)) and saved.values.get(name, True) not in ([], None):
                number = None if found[1] is None else int(found[1])
                if found[3] is None or int(found[3]) == _device():
                    of_ranks[number][found[2]] = name
        of_all = of_ranks.pop(None, {})
        numbers = sorted(number for number in of_ranks if number is not None)
        self.is_as_many = numbers in ([], list(range(num_ranks)))
        """Whether it had as many processes as there are now, or all of them had the same."""
        first = of_ranks[numbers[0]] if numbers else {}
        own = {**of_all, **(of_ranks.get(rank, {}) if self.is_as_many else first)}
        self._names = own if self.is_as_many else dict(sorted(own.items(), key=lambda item: item[0] != "torch")[:1])
        """Generator -> saved name, of those that this process takes; of one generator if there are others now."""
        self.claims = {flat: claim for name in self._names.values() for flat, claim in claim_under(saved, name).items()}
        self.doubts = [
            f"{name} is no state of {kind}'s random generator: {wrong}"
            for kind, name in self._names.items()
            if (wrong := self._fault(kind, name))
        ]
        self.lacking = sorted(set(Rng().state_dict()) - {"seed"} - self._names.keys())
        """Generators of this process of which nothing was saved."""

    def _fault(self, kind: str, name: str) -> str:
        """What is wrong with a state, as far as it can be told before anything is read."""
        value, spec = self._saved.values.get(name), self._saved.tensors.get(name)
        if kind in ("torch", "cuda"):
            is_good = spec is not None and spec.dtype == "uint8" and len(spec.shape) == 1
            return "" if is_good else str(spec or quoted(value))
        try:
            _check(kind, value)
        except Exception as error:  # the generators' own checks raise various ones
            return f"{type(error).__name__}: {error}"
        return ""

    def state(self, loaded: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What `Rng` takes."""
        return {
            kind: loaded[name] if name in loaded else _FORMS[kind](self._saved.values[name])
            for kind, name in self._names.items()
        }

    def seed(self, loaded: Mapping[str, torch.Tensor]) -> int:
        """A number that follows from what the first process saved."""
        name = next(iter(self._names.values()))
        content = loaded[name].tolist() if name in loaded else self._saved.values[name]
        return xxhash.xxh3_64_intdigest(repr(content).encode())


def _check(kind: str, value: Any) -> None:
    """Give a state to a generator that nobody uses."""
    if kind == "python":
        version, numbers, gauss = value
        random.Random().setstate((version, tuple(numbers), gauss))
    elif numpy := sys.modules.get("numpy"):
        numpy.random.RandomState().set_state(tuple(value))


def _python(value: Any) -> dict[str, Any]:
    version, numbers, gauss = value
    return {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss}


def _numpy(value: Any) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = value
    words = torch.tensor(keys, dtype=torch.int64)
    return {"kind": kind, "keys": words, "position": position, "has_gauss": has_gauss, "cached": cached}


_FORMS = {"python": _python, "numpy": _numpy}
"""Generator -> its state as we have it, of what Python and NumPy return."""


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else -1
