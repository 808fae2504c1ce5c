"""Who may remove a step: pins of those who want it kept, claims of those who are about to delete it.

    .pins/step-<N>              a pin
    .pins/step-<N>.<id>.claim   a delete that has begun; it holds the attempt that it is to remove

Each side writes its own file first and looks for the other's afterwards, so that of a pin and a delete at the same time
at least one sees the other, on any storage whose listings show what was written before. Whoever pins and sees a claim
gives up with an error; whoever claims and sees a pin leaves the step alone. A pin is removed by `unpin` alone: several
may rely on it.
"""

from __future__ import annotations

import re
import uuid
from dataclasses import dataclass

from ray_ckpt.errors import StorageError
from ray_ckpt.storage.files import Storage

_DIRECTORY = ".pins"
_NAME = re.compile(r"step-(0|[1-9][0-9]*)(?:\.([0-9a-f]{12})\.claim)?")
_TEMPORARY = re.compile(r"step-[0-9]+(?:\.[0-9a-f]{12}\.claim)?\.[0-9a-f]{12}\.tmp")


@dataclass(frozen=True)
class Claim:
    """A delete of a step, from its begin to its end."""

    step: int
    file: str
    """Its name in the directory of pins."""
    modified_s: float | None


@dataclass(frozen=True)
class Wishes:
    """All pins and claims of a store, as one listing shows them."""

    pins: dict[int, float | None]
    """Step -> when it was pinned, in seconds since the epoch."""
    claims: tuple[Claim, ...]
    temporaries: dict[str, float | None]
    """Name -> when it was written: what a process left that died while it wrote a pin or a claim."""


class Pins:
    """Pins and claims as small files, which all processes see.

    Args:
        storage: of the store.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage.child(_DIRECTORY)

    def list(self) -> Wishes:
        pins: dict[int, float | None] = {}
        claims: list[Claim] = []
        temporaries: dict[str, float | None] = {}
        for name, scanned in self._storage.scan().items():
            if match := _NAME.fullmatch(name):
                step = int(match[1])
                if match[2] is None:
                    pins[step] = scanned.modified_s
                else:
                    claims.append(Claim(step, name, scanned.modified_s))
            elif _TEMPORARY.fullmatch(name):
                temporaries[name] = scanned.modified_s
        return Wishes(pins, tuple(claims), temporaries)

    def pin(self, step: int) -> bool:
        """Pin a step.

        Returns:
            Whether it is safe: False when a delete of it has begun that may not have seen the pin.
        """
        self._write(f"step-{step}", b"kept until unpinned\n")
        return all(claim.step != step for claim in self.list().claims)

    def unpin(self, step: int) -> None:
        self.discard(f"step-{step}")

    def claim(self, step: int, attempt: str) -> Claim | None:
        """Announce that this attempt's checkpoint is about to be deleted; None when the step is pinned."""
        claim = Claim(step, f"step-{step}.{uuid.uuid4().hex[:12]}.claim", None)
        self._write(claim.file, attempt.encode())
        if step not in self.list().pins:
            return claim
        self.discard(claim.file)
        return None

    def claimed_attempt(self, claim: Claim) -> str | None:
        """The attempt that the delete was to remove; None when the delete has ended meanwhile."""
        try:
            return self._storage.read_bytes(claim.file).decode("ascii", "replace")
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def discard(self, file: str) -> None:
        self._storage.delete(file, durable=True)

    def _write(self, name: str, data: bytes) -> None:
        self._storage.write_atomic(name, data)
