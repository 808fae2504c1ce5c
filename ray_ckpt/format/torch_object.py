"""The container that `torch.save` puts around a non-tensor, looked through before anybody rebuilds what is in it.

    container bytes ── inspect ──> Inspected     the value itself where it is plain; else `torch.load` may have it

`torch.load(weights_only=True)` runs nothing either, but allocates whatever a pickle asks for (a `bytearray` of 4 GiB, a
storage that is longer than its bytes, a compressed member) and hashes whatever it uses as a key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ray_ckpt.errors import FormatError
from ray_ckpt.format import limits, torch_pickle, zip_directory
from ray_ckpt.format.stand_ins import find_unknown
from ray_ckpt.text import quoted

__all__ = ["Inspected", "inspect"]


class Inspected(NamedTuple):
    """A container that holds to the limits."""

    is_plain: bool
    """Whether it holds nothing but Python's own values and torch's sizes, dtypes and devices."""
    value: Any
    """What it holds, when that is plain."""


def inspect(data: bytes, what: str) -> Inspected:
    """Read the pickle of a container without making anything of it.

    Args:
        what: name of the object, for messages.

    Raises:
        FormatError: it is no container, is damaged, or exceeds a limit.
    """
    members = zip_directory.read_members(lambda offset, length: data[offset : offset + length], len(data), what)
    pickle_name = next((name for name in members if name.endswith("/data.pkl")), None)
    if pickle_name is None:
        raise FormatError(f"{what} is a zip archive without a data.pkl: torch.save did not write it")
    limits.RECORD_BYTES.check(members[pickle_name].num_bytes, f"data.pkl of {what}")
    content = torch_pickle.read(_member(data, members[pickle_name], what), what)
    prefix = pickle_name.removesuffix("data.pkl")
    for key, num_bytes in content.storages.items():
        member = members.get(f"{prefix}data/{key}")
        if member is None or num_bytes > member.num_bytes:
            found = "none" if member is None else str(member.num_bytes)
            raise FormatError(f"{what} speaks of {num_bytes} bytes in its storage {quoted(key)}, which has {found}")
        _member(data, member, what)
    is_plain = not find_unknown(content.root, what) and not content.storages and not content.has_lost_attributes
    return Inspected(is_plain, content.root if is_plain else None)


def _member(data: bytes, member: zip_directory.Member, what: str) -> bytes:
    header = data[member.header_start : member.header_start + zip_directory.LOCAL_HEADER_BYTES]
    start = zip_directory.data_start(header, member.header_start, what)
    content = data[start : start + member.num_bytes]
    zip_directory.check_crc(content, member, what)
    return content
