"""The members of a zip archive that `torch.save` wrote: each stored as it is, none twice, none over another.

    central directory ── read_members ──> Member: where its local header begins, and how many bytes it has
    local header      ── data_start   ──> where its bytes begin
    its bytes         ── check_crc    ──> an error where they are not those that were written

Source of the format: PKWARE APPNOTE 6.3, and PyTorch's `caffe2/serialize/inline_container.cc`.
"""

from __future__ import annotations

import binascii
import io
import struct
import zipfile
from collections.abc import Callable
from typing import NamedTuple

from ray_ckpt.errors import FormatError, RayCkptError
from ray_ckpt.format import limits
from ray_ckpt.text import quoted

__all__ = ["LOCAL_HEADER_BYTES", "MAGIC", "Member", "check_crc", "data_start", "read_members"]

MAGIC = b"PK\3\4"
"""First bytes of a zip archive."""

LOCAL_HEADER_BYTES = 30
"""Size of the fixed part of a member's local header, which tells how long the rest of it is."""

_LOCAL_HEADER = struct.Struct("<4s22x2H")
_BUFFER_BYTES = 64 << 10


class Member(NamedTuple):
    """A member, as the directory describes it."""

    header_start: int
    """Byte offset of its local header."""
    num_bytes: int
    crc: int
    """CRC-32 of its bytes; 0 where whoever wrote it left it out."""


def read_members(read: Callable[[int, int], bytes], num_bytes: int, file: str) -> dict[str, Member]:
    """The members by name.

    Args:
        read: gives `(offset, length)` of the archive, which has `num_bytes` bytes.

    Raises:
        FormatError: the archive is damaged, exceeds a limit, or torch.save did not write it.
    """
    try:
        # A directory is read whole: neither it nor the 64 KiB that end an archive may exceed the limit together.
        window = _Window(read, num_bytes, limits.DIRECTORY_BYTES.value + (128 << 10), file)
        with zipfile.ZipFile(window) as archive:
            infos = archive.infolist()
            end = archive.start_dir
    except RayCkptError:
        raise
    except Exception as error:  # a damaged archive raises nearly anything
        raise FormatError(f"{file} is a damaged zip archive: {type(error).__name__}: {str(error)[:200]}") from error
    if any(info.filename.endswith("/constants.pkl") for info in infos):
        raise FormatError(f"{file} is a TorchScript archive, which holds code: save its state_dict() instead")
    if odd := next((info for info in infos if info.compress_type or info.flag_bits & 1), None):
        raise FormatError(f"{file} holds {quoted(odd.filename)} compressed or encrypted: torch.save did not write it")
    _check_places(infos, end, file)
    members = {info.filename: Member(info.header_offset, info.file_size, info.CRC) for info in infos}
    if len(members) < len(infos):
        raise FormatError(f"{file} holds two members of one name: torch.save did not write it")
    return members


def _check_places(infos: list[zipfile.ZipInfo], end: int, file: str) -> None:
    """Whether the members lie one behind the other, before the directory."""
    at = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < at:
            raise FormatError(f"{file} is a damaged zip archive: {quoted(info.filename)} lies over another member")
        at = info.header_offset + LOCAL_HEADER_BYTES + info.file_size
        if info.compress_size != info.file_size or at > end:
            raise FormatError(
                f"{file} is a damaged zip archive: {quoted(info.filename)} is said to have {info.file_size} bytes at "
                f"{info.header_offset}, of {end} before the directory"
            )


def data_start(header: bytes, header_start: int, file: str) -> int:
    """Byte offset of a member's bytes in the file.

    Args:
        header: the first `LOCAL_HEADER_BYTES` bytes of its local header.
        header_start: byte offset of that header in the file.

    Raises:
        FormatError: there is no header of a member.
    """
    magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
    if magic != MAGIC:
        raise FormatError(f"{file} has no member at byte {header_start}, where its directory says that one begins")
    return header_start + LOCAL_HEADER_BYTES + int(name_length) + int(extra_length)


def check_crc(data: bytes | memoryview, member: Member, what: str) -> None:
    """Whether a member's bytes are those that were written, as far as its CRC-32 tells.

    Raises:
        FormatError: they are not.
    """
    if member.crc and (found := binascii.crc32(data)) != member.crc:
        raise FormatError(f"{what} is damaged: its CRC-32 is {found:08x}, saved with {member.crc:08x}")


class _Window(io.RawIOBase):
    """A file of known size as `zipfile` wants to see it, of which only so many bytes are read."""

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int, max_read: int, file: str) -> None:
        super().__init__()
        self._read = read
        self._num_bytes = num_bytes
        self._max_read = max_read
        self._num_read = 0
        self._file = file
        self._position = 0
        self._held_start, self._held = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"no position {base + offset}")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._num_bytes - self._position)
        length = left if size < 0 else min(size, left)
        if length == 0:
            return b""
        begin = self._position - self._held_start
        if not 0 <= begin <= begin + length <= len(self._held):
            self._fetch(length)
            begin = self._position - self._held_start
        self._position += length
        return self._held[begin : begin + length]

    def _fetch(self, length: int) -> None:
        """At least the next `length` bytes; near its end, all that is left of the file."""
        begin = min(self._position, max(0, self._num_bytes - _BUFFER_BYTES))
        size = max(self._position - begin + length, min(_BUFFER_BYTES, self._num_bytes - begin))
        self._num_read += size
        if self._num_read > self._max_read:
            raise limits.DIRECTORY_BYTES.error(f"a zip directory that takes {self._num_read} bytes to read", self._file)
        self._held_start, self._held = begin, self._read(begin, size)
