"""Who may remove a step: pins of those who want it kept, claims of those who are about to delete it.

    .pins/step-<N>                        a pin
    .pins/step-<N>.<id>.<attempt>.claim   a delete of that attempt's checkpoint has begun

Each side writes its own file first and looks for the other's afterwards, so that of a pin and a delete at the same time
at least one sees the other, on any storage whose listings show what was written before. Whoever pins and sees a claim
gives up with an error; whoever claims and sees a pin leaves the step alone. A pin is removed by `unpin` alone: several
may rely on it.

All of these files are empty, since a full disk has room for a name where it has none for data. Where it has none for a
name either, a delete goes without a claim and holds the lock of the store's directory instead, as every pin does: it
sees the pins that were there before, and a pin that comes after it finds the step gone.
"""

from __future__ import annotations

import errno
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray_ckpt.errors import StorageError, UsageError
from ray_ckpt.storage.files import Storage

_DIRECTORY = ".pins"
_NAME = re.compile(r"step-(0|[1-9][0-9]*)(?:\.[0-9a-f]{12}(?:\.([0-9a-f]{12})?)?(\.claim))?")
_TEMPORARY = re.compile(r"(?:step-[0-9]+(?:\.[0-9a-f]{12}\.claim)?|now)\.[0-9a-f]{12}\.tmp")
_ATTEMPT = re.compile(r"[0-9a-f]{12}")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


def pin_name(step: int) -> str:
    """Name of a step's pin in its store."""
    return f"{_DIRECTORY}/step-{step}"


@dataclass(frozen=True)
class DeleteClaim:
    """A delete of a step that has begun and not ended."""

    step: int
    attempt: str
    """The attempt that it is to remove; empty when that one's record is damaged."""
    file: str
    """Its name in the directory of pins."""
    modified_s: float | None
    """When it was written, in seconds since the epoch by the storage's clock; None where that is not kept."""


@dataclass(frozen=True)
class Wishes:
    """All pins and claims of a store, as one listing shows them."""

    pins: dict[int, float | None]
    """Step -> when it was pinned, in seconds since the epoch."""
    claims: tuple[DeleteClaim, ...]
    """Deletes that have begun."""
    temporaries: dict[str, float | None]
    """Name -> when it was written: what a process left that died while it wrote here."""


class Pins:
    """Pins and claims as small files, which all processes see.

    Args:
        storage: of the store.
    """

    def __init__(self, storage: Storage) -> None:
        self._store = storage
        self._storage = storage.child(_DIRECTORY)

    def list(self) -> Wishes:
        pins: dict[int, float | None] = {}
        claims: list[DeleteClaim] = []
        temporaries: dict[str, float | None] = {}
        for name, scanned in self._storage.scan().items():
            if match := _NAME.fullmatch(name):
                step = int(match[1])
                if match[3] is None:
                    pins[step] = scanned.modified_s
                else:
                    claims.append(DeleteClaim(step, match[2] or "", name, scanned.modified_s))
            elif _TEMPORARY.fullmatch(name):
                temporaries[name] = scanned.modified_s
        return Wishes(pins, tuple(claims), temporaries)

    def pin(self, step: int) -> bool:
        """Pin a step.

        Returns:
            Whether it is safe: False when a delete of it has begun that may not have seen the pin.
        """
        self._refuse_link()
        with self._store.locked():
            self._create(f"step-{step}")
        return all(claim.step != step for claim in self.list().claims)

    def unpin(self, step: int) -> None:
        self._refuse_link()
        self.discard(f"step-{step}")

    @contextmanager
    def deleting(self, step: int, attempt: str) -> Iterator[bool]:
        """Announce a delete of this attempt's checkpoint while it goes on; yields False when the step is pinned.

        A delete that raises has not ended: its claim stays, for a clean-up to finish it.
        """
        self._refuse_link()
        attempt = attempt if _ATTEMPT.fullmatch(attempt) else ""
        claim = f"step-{step}.{uuid.uuid4().hex[:12]}.{attempt}.claim"
        try:
            self._create(claim)
        except StorageError as error:
            if getattr(error.__cause__, "errno", None) not in _NO_ROOM:
                raise
            with self._store.locked() as is_locked:
                if not is_locked:
                    raise
                yield step not in self.list().pins
            return
        is_free = step not in self.list().pins
        if not is_free:
            self.discard(claim)
        yield is_free
        if is_free:
            self.discard(claim)

    def now(self) -> float | None:
        """The storage's time, from a file that is written for it; None where it cannot be had."""
        name = f"now.{uuid.uuid4().hex[:12]}.tmp"
        try:
            self._create(name)
        except StorageError:
            return None
        found = self.list().temporaries.get(name)
        self.discard(name)
        return found

    def discard(self, file: str) -> None:
        self._storage.delete(file, durable=True)

    def _refuse_link(self) -> None:
        """What is written there could not be removed again, as nothing is through a link."""
        if self._store.has_local_files and os.path.islink(path := self._store.path(_DIRECTORY)):
            raise UsageError(f"{path} is a link, through which nothing is removed: put a directory there")

    def _create(self, name: str) -> None:
        with self._storage.create(name):
            pass
