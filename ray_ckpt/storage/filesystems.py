"""Which file system an address means: pyarrow's own, one that is registered, or fsspec's."""

from __future__ import annotations

import urllib.parse

import pyarrow.fs as pafs

from ray_ckpt.storage.address import ARROW_SCHEMES, Address
from ray_ckpt.storage.registered import REGISTERED, open_registered

__all__ = ["open_filesystem"]


def open_filesystem(address: Address) -> tuple[pafs.FileSystem, str]:
    """The file system, and the path of the address in it."""
    if address.is_local:
        return pafs.LocalFileSystem(), address.path
    if address.scheme in REGISTERED:
        return open_registered(address)
    if address.scheme not in ARROW_SCHEMES:
        return _open_fsspec(address)
    if address.scheme == "s3" and (anonymous := _open_anonymous_s3(address)):
        return anonymous
    filesystem, path = pafs.FileSystem.from_uri(address.text)
    return filesystem, path


def _open_fsspec(address: Address) -> tuple[pafs.FileSystem, str]:
    import fsspec  # only those who use such a URI need it

    if address.scheme not in fsspec.available_protocols():
        raise ValueError(f"no file system is known for {address.scheme}://, neither by pyarrow nor by fsspec")
    filesystem, path = fsspec.url_to_fs(address.text)
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def _open_anonymous_s3(address: Address) -> tuple[pafs.FileSystem, str] | None:
    """What `from_uri` cannot say: S3 without credentials, asked for by `anonymous=true`."""
    options = dict(urllib.parse.parse_qsl(address.options))
    if options.pop("anonymous", "false").lower() != "true":
        return None
    return pafs.S3FileSystem(anonymous=True, **options), urllib.parse.unquote(address.place + address.path)
