"""What the text of a target means: a local path, or a URI with a place, credentials and options.

    parse(target) ──> Address ─┬─ text       round-trips through `parse`; holds the secrets
                               ├─ display    for messages, reports and logs; holds none
                               ├─ child, parent
                               └─ redact     takes the secrets out of what a library says

Whatever could be a mistyped URI is refused: saved as it stands, it would become a directory below the current one.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ray_ckpt.errors import UsageError

__all__ = ["ARROW_SCHEMES", "Address", "parse", "refuse_uri"]

ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs"})
"""Schemes whose file systems pyarrow has; all others but `file` go to fsspec."""

_LOCAL_SCHEMES = frozenset({"file", "local"})
_BUCKET_SCHEMES = frozenset({"s3", "gs", "gcs"})
"""Schemes whose place has no port: a colon in it can only precede a password."""
_CONTAINER_SCHEMES = frozenset({"abfs", "abfss"})
_KNOWN_SCHEMES = (
    _LOCAL_SCHEMES
    | ARROW_SCHEMES
    | {"s3a", "s3n", "az", "adl", "oss", "memory", "ram", "http", "https", "ftp", "sftp", "ssh", "smb", "webhdfs"}
)
"""A relative path that begins with one of these words and a colon is a mistyped URI."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_MISTYPED = re.compile(
    r"[:;,]*(?:SCHEME)[\s:;.,]*//|(?:SCHEME):|\w[\w+.-]*:[/\\]".replace("SCHEME", "|".join(sorted(_KNOWN_SCHEMES))),
    re.IGNORECASE,
)
_HOST_AND_PORT = re.compile(r"(?:[^:\[\]]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?")
_LEGAL_IN_PATH = "/:@!$&'()*+,;=-._~"
_LEGAL_IN_USERINFO = ":!$&'()*+,;=-._~"
_MIN_SECRET_LENGTH = 3
"""Shorter secrets appear in messages by chance: they are removed only together with the text around them."""


@dataclass(frozen=True, repr=False)
class Address:
    """A parsed target."""

    scheme: str
    """The scheme in lower case; `file` for a local path."""
    userinfo: str
    """The part before the `@`, encoded as in the URI; empty without credentials."""
    place: str
    """Bucket or host with port; empty for a local path."""
    path: str
    """A local path: absolute, nothing encoded. Else what follows the place, as the URI holds it."""
    options: str
    """The part after the `?`."""

    def __repr__(self) -> str:
        return f"Address({self.display!r})"

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def text(self) -> str:
        """The target in one form for each meaning. It holds the credentials."""
        if self.is_local:
            return self.path
        credentials = f"{self.userinfo}@" if self.userinfo else ""
        options = f"?{self.options}" if self.options else ""
        return f"{self.scheme}://{credentials}{self.place}{self.path}{options}"

    @property
    def display(self) -> str:
        """The target without credentials and options."""
        return self.path if self.is_local else f"{self.scheme}://{self._container}{self.place}{self.path}"

    @property
    def _container(self) -> str:
        """Azure's URIs have the container, or the account, in the place of credentials."""
        is_name = self.scheme in _CONTAINER_SCHEMES and ":" not in urllib.parse.unquote(self.userinfo)
        return f"{self.userinfo}@" if is_name and self.userinfo else ""

    def child(self, name: str) -> Address:
        """The address of a name below this one; the name is a relative path, nothing in it encoded."""
        encoded = urllib.parse.quote(name, safe=_LEGAL_IN_PATH) if self.scheme in ARROW_SCHEMES else name
        return replace(self, path=f"{self.path.rstrip('/')}/{encoded}")

    def with_option(self, name: str, value: str) -> Address:
        """The address with one option more, which has nothing to encode."""
        return replace(self, options="&".join(filter(None, [self.options, f"{name}={value}"])))

    def parent(self) -> tuple[Address, str] | None:
        """The directory that holds the target, and the target's name in it; None at the top of a file system."""
        directory, _, name = self.path.rstrip("/").rpartition("/")
        if not name:
            return None
        decoded = urllib.parse.unquote(name) if self.scheme in ARROW_SCHEMES else name
        return replace(self, path=directory or ("/" if self.is_local else "")), decoded

    def redact(self, text: str) -> str:
        """The text without credentials and values of options, in whatever spelling a library repeats them."""
        for secret in self._secrets():
            text = text.replace(secret, "***")
        return text

    def _secrets(self) -> list[str]:
        """Longest first, so that none is left in part."""
        userinfo = "" if self._container else self.userinfo
        parts = [userinfo] if userinfo else []
        user, _, password = userinfo.partition(":")
        parts += [half for half in (user, password) if len(half) >= _MIN_SECRET_LENGTH]
        for option in filter(None, self.options.split("&")):
            value = option.partition("=")[2]
            parts += [option, value] if len(value) >= _MIN_SECRET_LENGTH else [option]
        return sorted({spelling for part in parts for spelling in _spellings(part)}, key=len, reverse=True)


def _spellings(text: str) -> Iterator[str]:
    """A text as it stands, decoded, and encoded anew."""
    decoded = urllib.parse.unquote(text)
    yield from (text, decoded, urllib.parse.unquote_plus(text))
    yield from (urllib.parse.quote(decoded, safe=""), urllib.parse.quote_plus(decoded), urllib.parse.quote(decoded))


def parse(target: str | os.PathLike[str]) -> Address:
    """Understand a target.

    Raises:
        UsageError: it is empty, mistyped, or can mean several things. The message holds no credentials.
    """
    try:
        text = os.fsdecode(target)
    except TypeError as error:
        raise UsageError(f"a target is a path or a URI, not {type(target).__name__}") from error
    if not text.strip() or "\0" in text:
        raise UsageError(
            "the target is empty, or holds a NUL character: name a directory or a URI, as in s3://bucket/run"
        )
    head, separator, rest = text.partition("://")
    if separator and "/" not in head:
        return _parse_uri(head.lower(), rest)
    if text[0].isspace():
        raise UsageError("the target begins with white space; a local path of such a name is written './ ...'")
    if _MISTYPED.match(text):
        if text.lower().startswith("file:/"):
            return _parse_file_uri(text[len("file:") :])  # RFC 8089 writes it with one slash, too
        raise UsageError(
            "the target begins like a URI, but is none: a URI is written as in s3://bucket/run (pathlib.Path takes one "
            "of its slashes away, so give it as str); a local path of such a name is written ./..."
        )
    return _local(text)


def refuse_uri(path: str | os.PathLike[str], what: str) -> None:
    """Of something that is a local file, whatever a target may be.

    Raises:
        UsageError: it is a URI. The message holds none of it, as it may have credentials.
    """
    if (scheme := parse(path).scheme) != "file" or "://" in os.fsdecode(path):
        raise UsageError(f"{what} is a local file: give a path, not {scheme}://...")


def _local(text: str) -> Address:
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise UsageError(
            f"no home directory is known for {text.partition('/')[0]}: write ./~... for a path of that name"
        )
    return Address("file", "", "", _absolute(expanded), "")


def _absolute(path: str) -> str:
    """One spelling for each path. Python keeps two slashes at the front, which Linux takes for one."""
    absolute = os.path.abspath(path)
    return absolute[1:] if absolute.startswith("//") else absolute


def _parse_uri(scheme: str, rest: str) -> Address:
    if not _SCHEME.fullmatch(scheme):
        raise UsageError(
            "what stands before :// is no URI scheme, as in s3://bucket/run; a local path of that name is written ./..."
        )
    if scheme in ("http", "https"):
        raise UsageError(
            f"{scheme}:// is no storage that can be listed and written to; name the bucket itself, as in s3://bucket/run"
        )
    if scheme in _LOCAL_SCHEMES:
        return _parse_file_uri(f"//{rest}")
    return _parse_remote(scheme, rest)


def _parse_file_uri(rest: str) -> Address:
    """Of `file:`, what follows the colon."""
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if not slash or host.lower() not in ("", "localhost"):
            raise UsageError(
                "a file:// URI has three slashes and an absolute path, as in file:///data/run, for it names a file of "
                "this host; the path itself will do as well"
            )
        rest = f"/{path}"
    for mark, name in (("?", "options"), ("#", "a fragment")):
        if mark in rest:
            raise UsageError(
                f"a file:// URI has no {name}: give the path itself, or write {urllib.parse.quote(mark)} for the {mark}"
            )
    path = os.fsdecode(urllib.parse.unquote_to_bytes(os.fsencode(rest)))
    if "\0" in path:
        raise UsageError("the target holds a NUL character")
    return Address("file", "", "", _absolute(path), "")


def _parse_remote(scheme: str, rest: str) -> Address:
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    userinfo, _, place = authority.rpartition("@")
    behind = rest[len(authority) :]
    path, _, options = behind.partition("?")
    before = rest.rpartition("@")[0]
    if "@" in behind and (":" in before or "#" in before or not _are_options(before.partition("?")[2])):
        # It can be a name and a password, and nothing tells where they end: none of it may be shown.
        raise UsageError(
            f"{scheme}://... has an @ behind a /, ? or #, and may mean credentials: in those, write %2F, %3F and %23; "
            "in a path or an option, write %40"
        )
    if ":" in place and (scheme in _BUCKET_SCHEMES or not _HOST_AND_PORT.fullmatch(place)):
        raise UsageError(f"{scheme}://... has a colon that is neither before a port nor before a password and its @")
    if scheme in ARROW_SCHEMES:
        return _parse_arrow(scheme, userinfo, place, path, options)
    if scheme == "ram":
        _check_names(scheme, userinfo, place, path)
    if not place and not path.strip("/"):
        raise UsageError(f"{scheme}:// names no place: write {scheme}://place/directory")
    return Address(scheme, userinfo, place, path.rstrip("/"), options)


def _parse_arrow(scheme: str, userinfo: str, place: str, path: str, options: str) -> Address:
    """Characters that a URI may not hold are encoded, since pyarrow reads no other."""
    if not place:
        raise UsageError(f"{scheme}:// names no bucket or host: write {scheme}://bucket/run, with two slashes")
    if "#" in place + path + options:
        raise UsageError(f"{scheme}://... holds a #, behind which a URI's path ends: write %23 in a name")
    if not _are_options(options):
        raise UsageError(f"{scheme}://... has options that are not name=value; write %3F for a ? in a name")
    path = _encode(path, _LEGAL_IN_PATH).rstrip("/")
    return Address(scheme, _encode(userinfo, _LEGAL_IN_USERINFO), place, path, options)


def _check_names(scheme: str, userinfo: str, place: str, path: str) -> None:
    """Of a storage of ours, which takes names as they are: there each spelling would be another place."""
    names = (place, *path.rstrip("/").split("/")[1:])
    if userinfo or ":" in place or "#" in place + path or not {"", ".", ".."}.isdisjoint(names):
        raise UsageError(
            f"{scheme}:// is followed by a name and directories, as in {scheme}://run/model, without credentials, a "
            "port, a #, and parts that are empty, . or .."
        )


def _are_options(text: str) -> bool:
    return not text or all(re.match(r"[A-Za-z_][\w.-]*=", option) for option in text.split("&"))


def _encode(text: str, legal: str) -> str:
    """Percent-encode what a URI may not hold, and leave alone what is encoded."""
    return "".join(
        part if re.fullmatch(r"%[0-9A-Fa-f]{2}", part) else urllib.parse.quote(part, safe=legal)
        for part in re.split(r"(%[0-9A-Fa-f]{2})", text)
    )
