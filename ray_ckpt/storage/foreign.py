"""What lies at a target that is no checkpoint of ours: recognized, and described by a Manifest.

    recognize(storage) ─┬─ a directory  `.metadata`                                  stock DCP; with meta.pt Lightning's
                        │               `pytorch_model_fsdp_0/`, `optimizer_0/`      accelerate's, DCP in each
                        │               `*.safetensors.index.json`, `*.safetensors`  one or several safetensors files
                        └─ a file       a zip archive                                by torch.save
                                        a safetensors file, or the index of several

Headers are read here and nothing else: the reader then fetches the bytes that are wanted, as of any checkpoint. Nothing
runs from any of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ray_ckpt.errors import CheckpointError, CheckpointNotFoundError, FormatError, RayCkptError
from ray_ckpt.format import dcp_metadata, limits, safetensors, torch_file, zip_directory
from ray_ckpt.format.boxes import Box
from ray_ckpt.format.dcp_metadata import METADATA_NAME
from ray_ckpt.format.manifest import MANIFEST_NAME, Chunk, Manifest, ObjectEntry, TensorEntry
from ray_ckpt.storage.files import InputFile, Storage
from ray_ckpt.storage.foreign_names import ACCELERATE_MODEL, ACCELERATE_OPTIMIZER
from ray_ckpt.storage.ranged_reads import Piece, Source, Tuning, fetch, tuning_for
from ray_ckpt.text import listed, quoted

__all__ = ["Found", "recognize"]

LIGHTNING_EXTRA = "meta.pt"
"""Beside `.metadata`: what Lightning's FSDP strategy keeps outside of DCP (`_METADATA_FILENAME` in its source)."""

_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""A file of torch before 1.6 begins with this."""

_HEADER_GAP_BYTES = 16 << 10
"""Local headers of a zip archive that are nearer than this are read together."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that another program wrote."""

    kind: str
    """Kind of checkpoint, for messages."""
    storage: Storage
    """Where the manifest's files are."""
    manifest: Manifest
    notes: tuple[str, ...] = ()
    """Parts that cannot be read, and why."""


def recognize(storage: Storage, *, trusted: bool = False) -> Found:
    """Recognize what lies at the target.

    Args:
        trusted: unpickle a `.metadata` without a guard. Torch files are read with one all the same.

    Raises:
        CheckpointNotFoundError: nothing that this reader knows.
        FormatError, UnsafeCheckpointError: something that it knows, but damaged or not safe to read.
    """
    try:
        return _recognize(storage, trusted=trusted)
    except RayCkptError:
        raise
    except Exception as error:  # whatever the bytes make of it
        raise FormatError(f"{storage.address} cannot be read: {type(error).__name__}: {str(error)[:200]}") from error


def _recognize(storage: Storage, *, trusted: bool) -> Found:
    if storage.exists(METADATA_NAME):
        return _stock(storage, trusted=trusted)
    parent = storage.parent()
    if parent is not None:
        directory, name = parent
        num_bytes = directory.size(name)
        if num_bytes is not None:
            return _file(directory, name, num_bytes)
    files, directories = storage.list_files(), storage.list_directories()
    if ACCELERATE_MODEL in directories or ACCELERATE_OPTIMIZER in directories:
        return _accelerate(storage, directories, trusted=trusted)
    indexes = sorted(name for name in files if name.endswith(safetensors.INDEX_SUFFIX))
    shards = sorted(name for name in files if name.endswith(safetensors.SUFFIX))
    if len(indexes) > 1:
        raise FormatError(f"{storage.address} holds {len(indexes)} checkpoints: name one of {listed(indexes)}")
    if indexes:
        return _indexed(storage, indexes[0])
    if shards:
        headers = {name: _header(storage, name, files[name]) for name in shards}
        return Found("a safetensors directory", storage, safetensors.combine(headers))
    raise _not_found(storage, files)


def _not_found(storage: Storage, files: Iterable[str]) -> CheckpointNotFoundError:
    single = sorted(name for name in files if name.endswith((".pt", ".pth", ".bin", ".ckpt")))
    advice = f"; to load a file that torch.save wrote, name the file: {', '.join(single[:3])}" if single else ""
    return CheckpointNotFoundError(
        f"no checkpoint in {storage.address}: it holds neither {MANIFEST_NAME} nor {METADATA_NAME}, nor safetensors "
        f"files, nor accelerate's {ACCELERATE_MODEL}, and is no file{advice}"
    )


# ------------------------------------------------------------------------------------------------ DCP inside


def _stock(storage: Storage, *, trusted: bool) -> Found:
    metadata = dcp_metadata.loads(storage.read_bytes(METADATA_NAME), trusted=trusted)
    if dcp_metadata.is_ours(metadata):
        raise CheckpointNotFoundError(
            f"no committed checkpoint in {storage.address}: a save by ray_ckpt was interrupted just before it "
            f"wrote {MANIFEST_NAME}; load an earlier step"
        )
    manifest = dcp_metadata.to_manifest(metadata)
    extra_bytes = storage.size(LIGHTNING_EXTRA)
    if extra_bytes is None:
        return Found("a checkpoint of stock DCP", storage, manifest)
    kind = "Lightning's sharded FSDP checkpoint"
    try:
        extra = _torch_file(storage, LIGHTNING_EXTRA, extra_bytes)
    except CheckpointError as error:
        # The model and the optimizer can be had without it.
        return Found(kind, storage, manifest, (f"{LIGHTNING_EXTRA} is left out: {error}",))
    return Found(kind, storage, _join([manifest, extra], storage))


def _accelerate(storage: Storage, directories: Iterable[str], *, trusted: bool) -> Found:
    more = [name for name in directories if name.startswith(("pytorch_model_fsdp_", "optimizer_"))]
    if other := sorted(set(more) - {ACCELERATE_MODEL, ACCELERATE_OPTIMIZER}):
        raise FormatError(
            f"{storage.address} is accelerate's directory of several models or optimizers: name one of its "
            f"directories, such as {ACCELERATE_MODEL} or {other[0]}"
        )
    parts = []
    for name in (ACCELERATE_MODEL, ACCELERATE_OPTIMIZER):
        if name in directories:
            inside = storage.child(name)
            if not inside.exists(METADATA_NAME):
                raise FormatError(
                    f"{inside.address} looks like accelerate's, but holds no {METADATA_NAME}: its save was "
                    "interrupted, or made with use_dcp=False, which nothing but the same ranks can load"
                )
            with storage.open_input(f"{name}/{METADATA_NAME}"):
                pass  # the directory may be a link that leaves this one
            parts.append(_below(name, _stock(inside, trusted=trusted).manifest))
    return Found("accelerate's FSDP directory", storage, _join(parts, storage))


def _below(directory: str, manifest: Manifest) -> Manifest:
    """The manifest as seen from the directory above."""
    tensors = {
        name: TensorEntry(
            entry.dtype,
            entry.shape,
            tuple(
                Chunk(chunk.box, f"{directory}/{chunk.file}", chunk.start, chunk.length, None, None, chunk.transforms)
                for chunk in entry.chunks
            ),
            entry.path,
        )
        for name, entry in manifest.tensors.items()
    }
    objects = {
        name: dataclasses.replace(entry, file=f"{directory}/{entry.file}") for name, entry in manifest.objects.items()
    }
    return Manifest(tensors, objects, {f"{directory}/{file}": size for file, size in manifest.files.items()})


def _join(manifests: Iterable[Manifest], storage: Storage) -> Manifest:
    """One manifest of several parts.

    Raises:
        FormatError: two of them hold one name.
    """
    tensors: dict[str, TensorEntry] = {}
    objects: dict[str, ObjectEntry] = {}
    files: dict[str, int] = {}
    for manifest in manifests:
        names = manifest.tensors.keys() | manifest.objects.keys()
        if twice := sorted(names & (tensors.keys() | objects.keys())):
            raise FormatError(f"two parts of {storage.address} hold {quoted(twice[0])}")
        tensors |= manifest.tensors
        objects |= manifest.objects
        files |= manifest.files
    return Manifest(tensors, objects, files)


# ------------------------------------------------------------------------------------------------ single files


def _file(directory: Storage, name: str, num_bytes: int) -> Found:
    """What the first bytes of a file, or its name, tell."""
    if name.endswith(safetensors.INDEX_SUFFIX):
        return _indexed(directory, name)
    with directory.open_input(name) as file:
        start = _read(file, 0, min(num_bytes, len(_LEGACY_MAGIC)))
    if start.startswith(zip_directory.MAGIC):
        return Found("a file that torch.save wrote", directory, _torch_file(directory, name, num_bytes))
    if start == _LEGACY_MAGIC:
        raise FormatError(
            f"{name} was saved in the format of torch before 1.6: rewrite it once, by "
            "torch.save(torch.load(file, weights_only=True), file)"
        )
    if name.endswith(safetensors.SUFFIX) or start[safetensors.LENGTH_BYTES :].lstrip().startswith(b"{"):
        manifest = safetensors.combine({name: _header(directory, name, num_bytes)})
        return Found("a safetensors file", directory, manifest)
    raise FormatError(
        f"{directory.address}/{name} is neither a checkpoint's directory, nor a file by torch.save or safetensors"
    )


def _indexed(storage: Storage, index_name: str) -> Found:
    index = safetensors.parse_index(storage.read_bytes(index_name), index_name)
    headers = {}
    for name in sorted(set(index.values())):
        num_bytes = storage.size(name)
        if num_bytes is None:
            raise FormatError(f"{index_name} names {name}, which is not there; the checkpoint is incomplete")
        headers[name] = _header(storage, name, num_bytes)
    return Found("a sharded safetensors checkpoint", storage, safetensors.combine(headers, index))


def _header(storage: Storage, name: str, num_bytes: int) -> safetensors.Header:
    with storage.open_input(name) as file:
        start = _read(file, 0, min(num_bytes, safetensors.LENGTH_BYTES))
        length = safetensors.header_length(start, name, num_bytes)
        return safetensors.parse_header(_read(file, safetensors.LENGTH_BYTES, length), name, num_bytes)


def _torch_file(storage: Storage, name: str, num_bytes: int) -> Manifest:
    with storage.open_input(name) as file:
        members = zip_directory.read_members(lambda offset, length: _read(file, offset, length), num_bytes, name)
        pickle_name = next((member for member in members if member.endswith("/data.pkl")), None)
        if pickle_name is None:
            raise FormatError(f"{name} is a zip archive without a data.pkl: torch.save did not write it")
        prefix = pickle_name.removesuffix("data.pkl")
        small = {key: members[prefix + key] for key in ("data.pkl", "byteorder") if prefix + key in members}
        for key, member in small.items():
            limits.RECORD_BYTES.check(member.num_bytes, f"{key} in {name}")
        contents = {key: _member(file, member) for key, member in small.items()}
    if contents.get("byteorder", b"little").strip() != b"little":
        raise FormatError(f"{name} was saved on a big-endian machine: load it with torch.load and save it again here")
    content = torch_file.parse(contents["data.pkl"], name)
    storages = {key: members[f"{prefix}data/{key}"] for key in content.storages if f"{prefix}data/{key}" in members}
    return torch_file.to_manifest(content, _places(storage, name, storages), name, num_bytes)


def _member(file: InputFile, member: zip_directory.Member) -> bytes:
    header = _read(file, member.header_start, zip_directory.LOCAL_HEADER_BYTES)
    data = _read(file, zip_directory.data_start(header, member.header_start, file.name), member.num_bytes)
    zip_directory.check_crc(data, member, file.name)
    return data


def _places(storage: Storage, file: str, members: Mapping[str, zip_directory.Member]) -> dict[str, torch_file.Place]:
    """Where the bytes of these members lie. Their local headers are read, many at a time."""
    size = zip_directory.LOCAL_HEADER_BYTES
    headers = {key: torch.empty(size, dtype=torch.uint8) for key in members}
    pieces = [
        Piece(Source(key, file, member.header_start, (1,), torch.uint8, size, None), Box((0,), (size,)), headers[key])
        for key, member in members.items()
    ]
    fetch(storage, pieces, _header_tuning(storage))
    return {
        key: torch_file.Place(
            zip_directory.data_start(headers[key].numpy().tobytes(), member.header_start, file),
            member.num_bytes,
            member.crc,
        )
        for key, member in members.items()
    }


def _header_tuning(storage: Storage) -> Tuning:
    return dataclasses.replace(tuning_for(storage), max_gap_bytes=_HEADER_GAP_BYTES)


def _read(file: InputFile, offset: int, length: int) -> bytes:
    data = bytearray(length)
    if length:
        file.read_into(offset, memoryview(data))
    return bytes(data)
