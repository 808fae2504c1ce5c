"""Random generators as others save them, under our names. Needs neither torch nor NumPy.

    rng_state_<rank>. ...  random_states_<rank>. ...  rng.<rank>. ...  <kind>_rng_state        which process's they are
        python   random_state        random_rng_state   ->   python     what `random.getstate()` returns
        numpy    numpy_random_seed   np_rng_state       ->   numpy      what `numpy.random.get_state()` returns
        cpu      torch_manual_seed   torch_rng_state    ->   torch
        cuda     torch_cuda_manual_seed.<device>        ->   cuda       or cuda.<device> of a process with several

transformers' `Trainer`, accelerate, verl, Lightning's `collect_rng_states`, Composer, and scripts by hand write these.
"""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple

from ray_ckpt.format.stand_ins import Instance

__all__ = ["Generator", "find", "numpy_state"]

_KINDS = {
    "python": ("python", "random", "random_state", "random_rng_state", "python_rng_state"),
    "numpy": ("numpy", "np", "numpy_random_seed", "np_rng_state", "numpy_rng_state"),
    "torch": ("", "cpu", "torch", "torch_manual_seed", "torch_rng_state"),
    "cuda": ("cuda", "torch.cuda", "torch_cuda_manual_seed", "cuda_rng_state"),
}
"""Our name of a generator -> others' names. A state without a name is torch's, as that is a tensor."""

_OURS = {other: ours for ours, others in _KINDS.items() for other in others}

_NAMES = re.compile(
    r"(?:rng_states?|random_states|rng)\.(?P<item>[0-9]{1,7})\.(?P<in_item>\w.*)"
    r"|(?:rng_states?|random_states)(?:_(?P<file>[0-9]{1,7}))?(?:\.(?P<in_file>\w.*))?"
    r"|(?P<alone>(?:torch|cuda|numpy|np|python|random)_rng_state(?:\.[0-9]{1,3})?)"
)

_OF_VERL = re.compile(r"rng(?:\.(.+))?")

_DEVICE = re.compile(r"\.[0-9]{1,3}$")

_ARRAYS = re.compile(r"numpy\.(?:_core|core)\.multiarray\._reconstruct")

_MERSENNE_TWISTER, _NUM_WORDS = "MT19937", 624


class Generator(NamedTuple):
    """Whose state lies under a name."""

    rank: str | None
    """Number of the process; None when all had the same."""
    kind: str
    """Our name of it, with the number of its device if it has one; empty when it is none that we know."""


def find(name: str, *, of_verl: bool = False) -> Generator | None:
    """Which generator's state lies under a saved name; None when none does.

    Args:
        of_verl: whether verl has named it, without the number of a process.
    """
    if of_verl:
        found = _OF_VERL.fullmatch(name)
        return found and Generator(None, _kind_of(found[1] or ""))
    if found := _NAMES.fullmatch(name):
        # What has no number is one process's.
        return Generator(
            found["file"] or found["item"] or "0",
            _kind_of(found["in_file"] or found["in_item"] or found["alone"] or ""),
        )
    return None


def _kind_of(key: str) -> str:
    device = _DEVICE.search(key)
    ours = _OURS.get(key[: device.start()] if device else key, "")
    if device is None:
        return ours
    return f"cuda{device[0]}" if ours == "cuda" else ""


def numpy_state(value: Any) -> tuple[Any, ...] | None:
    """What `numpy.random.get_state()` returned, with the array in it as plain numbers; None for anything else.

    Args:
        value: as it was pickled: the array is a stand-in.
    """
    if type(value) is not tuple or len(value) != 5 or value[0] != _MERSENNE_TWISTER:
        return None
    if any(type(number) not in (int, float) for number in value[2:]):
        return None
    words = _words(value[1])
    return None if words is None else (value[0], words, *value[2:])


def _words(array: Any) -> tuple[int, ...] | None:
    if not isinstance(array, Instance) or not _ARRAYS.fullmatch(array.name):
        return None
    match array.state:
        case (
            _,
            (int() as size,),
            Instance(name="numpy.dtype", args=("u4", *_), state=(_, "<", *_)),
            _,
            bytes() as data,
        ):
            if size == _NUM_WORDS and len(data) == 4 * _NUM_WORDS:
                return struct.unpack(f"<{_NUM_WORDS}I", data)
    return None
