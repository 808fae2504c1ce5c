"""convert(source, target): any checkpoint becomes one of ours, with checksums of everything.

Names stay what they are: a load translates them, as it does for the source.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping

from ray_ckpt.conversion.engine import Plan, identity_of, run
from ray_ckpt.conversion.jobs import Written
from ray_ckpt.conversion.source import Source, container_jobs, source_at
from ray_ckpt.conversion.writing import joined
from ray_ckpt.errors import UsageError
from ray_ckpt.format import dcp_metadata
from ray_ckpt.format.manifest import MANIFEST_NAME
from ray_ckpt.format.translate import origin_of
from ray_ckpt.progress import Progress
from ray_ckpt.report import ConversionReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.publish import is_of_attempt, publish
from ray_ckpt.storage.resolve import Target, destination
from ray_ckpt.storage.step_names import parse_steps
from ray_ckpt.text import quoted

__all__ = ["convert"]

MAX_FILE_BYTES = 5_000_000_000


def convert(
    source: Target,
    target: Target,
    *,
    step: int | None = None,
    target_step: int | None = None,
    trusted: bool = False,
    ray: bool = False,
    address: str | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Copy a checkpoint, whoever wrote it, into one of ours: in any layout, with checksums, in bounded memory.

    What was cut off goes on where it was when it is called again: files that are finished and whole stay. Nothing is
    committed before all has been read back and is what was read from the source.

    Example:
        >>> import torch
        >>> from ray_ckpt import convert, verify
        >>> torch.save({"weight": torch.ones(3)}, "weights.pt")
        >>> convert("weights.pt", "run/step-1").num_tensors
        1
        >>> verify("run/step-1").verified
        True

    Args:
        source: a checkpoint, or a store.
        target: directory of the new checkpoint, or a store.
        step: number of the step in the source's store; by default the highest committed one.
        target_step: number of the step in the target's store; None where the target is no store.
        trusted: as for `verify`.
        ray: write the files as tasks on a Ray cluster, which must see source and target.
        address: of that cluster; by default the one this process is connected to, the one that runs, or a local Ray.
        progress: called with the bytes that were written and read back, and all that will be.

    Raises:
        CheckpointNotFoundError: there is no such source.
        CheckpointExistsError: the target holds a checkpoint, or what was left of another attempt.
        IntegrityError: the source is damaged, or the target reads back as something else; nothing was committed.
        CheckpointError, StorageError: the source cannot be read, or the target not be written.
        WorkerError: tasks on the cluster failed; names them by the numbers of their files.
    """
    with source_at(source, step, trusted=trusted) as given:
        storage = destination(target, target_step).storage
        real = os.path.realpath if storage.is_local else str  # a link may lead to the source
        if real(storage.address) == real(given.opened.address):
            raise UsageError(f"{storage.address} is the source: give the new checkpoint a place of its own")
        if target_step is None and (steps := parse_steps(storage.list_directories())):
            raise UsageError(
                f"{storage.address} is a store, with step {max(steps)}: give target_step= (--target-step), or another "
                "place"
            )
        return run(_plan(given, storage), progress, ray=ray, address=address)


def _plan(source: Source, target: Storage) -> Plan:
    opened, manifest = source.opened, source.manifest
    identity = identity_of(opened, {"to": "ray_ckpt"})
    attempt = identity[:12]
    tensors = [
        dataclasses.replace(source.tensor_job(name, name), path=entry.path) for name, entry in manifest.tensors.items()
    ]
    objects = {name: (name, entry) for name, entry in manifest.objects.items() if not entry.refusal}
    left_out = [f"{quoted(name)}: {entry.refusal}" for name, entry in manifest.objects.items() if entry.refusal]

    def commit(written: Mapping[str, Written]) -> None:
        if is_of_attempt(target, attempt):
            return  # the attempt before was cut off right after this
        files = joined(written)
        record = dataclasses.replace(
            files,
            # In the order of the source: by it parameters are told that an optimizer has by number.
            tensors={name: files.tensors[name] for name in manifest.tensors},
            objects={name: files.objects[name] for name in objects},
            attempt=attempt,
            layout=manifest.layout,
            saved_by=_saved_by(source),
            fingerprints=manifest.fingerprints,
        )
        publish(target, record, dcp_metadata.dumps(record), overwrite=False)

    return Plan(
        source=opened.files,
        source_address=opened.address,
        target=target,
        uri=target.address,
        files=container_jobs(tensors, objects, MAX_FILE_BYTES, f"__0_{{}}-{attempt}.distcp"),
        identity=identity,
        what=f"import of {opened.address}",
        commit=commit,
        taken=lambda: _taken(target),
        records=(MANIFEST_NAME, dcp_metadata.METADATA_NAME),
        left_out=(*opened.notes, *left_out),
    )


def _taken(target: Storage) -> list[str]:
    return [name for name in (MANIFEST_NAME, dcp_metadata.METADATA_NAME) if target.exists(name)]


def _saved_by(source: Source) -> dict[str, str]:
    manifest = source.manifest
    versions = manifest.saved_by if manifest.attempt else {"torch": importlib.metadata.version("torch")}
    return {**versions, **origin_of(manifest, source.opened.kind)}
