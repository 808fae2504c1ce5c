"""export(source, target, to=...): a checkpoint becomes what other programs read."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Mapping, Sequence

from ray_ckpt.conversion import torch_state
from ray_ckpt.conversion.engine import Plan, identity_of, run
from ray_ckpt.conversion.jobs import FileJob, TensorJob, Written, batches
from ray_ckpt.conversion.remainder import SUFFIX
from ray_ckpt.conversion.selection import Rename, chosen, is_cast, model_of, parse_dtype_name, renamed, renamed_path
from ray_ckpt.conversion.source import Source, container_jobs, source_at
from ray_ckpt.conversion.writing import joined
from ray_ckpt.errors import CheckpointExistsError, UsageError
from ray_ckpt.format import dcp_metadata, safetensors
from ray_ckpt.format.manifest import MANIFEST_NAME, itemsize
from ray_ckpt.progress import Progress
from ray_ckpt.report import ConversionReport
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.resolve import Target
from ray_ckpt.text import quoted

__all__ = ["FORMS", "MAX_SHARD_BYTES", "export"]

FORMS = ("safetensors", "torch", "dcp")

MAX_SHARD_BYTES = 5_000_000_000
"""As transformers cuts its models."""

_SUFFIXES = (safetensors.SUFFIX, safetensors.INDEX_SUFFIX, ".bin", ".distcp")
"""Ends of the names of files that hold tensors, or say where they are."""

_BESIDE_MODEL = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|preprocessor_config|"
    r"processor_config|chat_template|merges|spiece|sentencepiece\.bpe|tokenizer\.model)"
    r"\.(json|txt|model|jinja|vocab)|tokenizer\.model(\.v\d+)?"
)
"""Files that transformers keeps beside the weights, and that say what they are."""


def export(
    source: Target,
    target: str | os.PathLike[str] | Storage,
    *,
    to: str,
    step: int | None = None,
    only: Collection[str] = (),
    dtype: str | None = None,
    rename: Sequence[Rename] = (),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    config: str | os.PathLike[str] | Storage | None = None,
    trusted: bool = False,
    ray: bool = False,
    address: str | None = None,
    progress: Progress | None = None,
) -> ConversionReport:
    """Write a checkpoint, whoever wrote it and in whatever layout, as other programs read it, in bounded memory.

    - `safetensors`: a directory that transformers' `from_pretrained` opens: the model's weights, tied ones once, under
      their own names, in `model.safetensors` or in shards with `model.safetensors.index.json`.
    - `torch`: a file that `torch.load(weights_only=True)` reads, also with `mmap=True`: `model`, `optimizer` as its
      `load_state_dict` takes it, `schedulers`, `counters` and what else there is.
    - `dcp`: a directory that stock `dcp.load` reads, under the checkpoint's own names.

    What was cut off goes on where it was when it is called again: files that are finished and whole stay. The index, or
    the only file's name, comes last, when all has been read back and is what was read from the source.

    Example:
        >>> import torch
        >>> from ray_ckpt import TrainState, export, save
        >>> model = torch.nn.Linear(2, 2)
        >>> report = save(TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1)), "run", step=1)
        >>> export("run", "weights", to="safetensors").num_tensors
        2
        >>> report = export("run", "state.pt", to="torch")
        >>> sorted(torch.load("state.pt", weights_only=True))
        ['model', 'optimizer']

    Args:
        source: a checkpoint, or a store.
        target: a directory, or for `torch` a file.
        to: `safetensors`, `torch` or `dcp`.
        step: number of the step in the store; by default the highest committed one.
        only: sections that are wanted, such as `("model",)`: first parts of names. By default all; for safetensors,
            the model.
        dtype: what the model's floating-point weights are cast to, as `Tensor.to` casts: `bfloat16`, `float16`,
            `float32` or `float64`, or short `bf16`, ... Those of 8 bits stay.
        rename: regular expressions, and what replaces what they match in the names of the target (for `torch`: of the
            model), one after the other.
        max_shard_bytes: bytes of tensors in one file at most, unless one tensor is larger. A `torch` file is one.
        config: directory with `config.json` and the tokenizer's files, which are copied beside safetensors.
        trusted: as for `verify`.
        ray: write the files as tasks on a Ray cluster, which must see source and target.
        address: of that cluster; by default the one this process is connected to, the one that runs, or a local Ray.
        progress: called with the bytes that were written and read back, and all that will be.

    Raises:
        UsageError: the options cannot work, or a cast would make finite elements infinite.
        CheckpointNotFoundError: there is no such source.
        CheckpointExistsError: the target is taken, or holds what was left of another attempt.
        IntegrityError: the source is damaged, or the target reads back as something else; nothing was committed.
        CheckpointError, StorageError: the source cannot be read, or the target not be written.
        WorkerError: tasks on the cluster failed; names them by the numbers of their files.
    """
    if to not in FORMS:
        raise UsageError(f"to={to!r}: give one of {', '.join(FORMS)}")
    if max_shard_bytes < 1:
        raise UsageError(f"a file of at most {max_shard_bytes} bytes holds nothing")
    if config is not None and to != "safetensors":
        raise UsageError(f"config= is for safetensors; {to} files need none")
    asked = _Asked(
        tuple(only), None if dtype is None else parse_dtype_name(dtype), tuple(rename), max_shard_bytes, config
    )
    with source_at(source, step, trusted=trusted) as given:
        storage = Storage.of(target)
        plan = {"safetensors": _safetensors, "torch": _torch, "dcp": _dcp}[to](given, storage, asked)
        return run(plan, progress, ray=ray, address=address)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The options, once they have been looked at."""

    only: tuple[str, ...]
    dtype: str | None
    rename: tuple[Rename, ...]
    max_shard_bytes: int
    config: str | os.PathLike[str] | Storage | None

    def dtype_of(self, dtype: str) -> str | None:
        """What weights of this dtype are cast to; None where they are not."""
        return self.dtype if self.dtype is not None and is_cast(dtype) else None

    def identity(self, source: Source, to: str) -> str:
        config = None if self.config is None else Storage.of(self.config).address
        return identity_of(source.opened, {**dataclasses.asdict(self), "config": config, "to": to})


def _taken(target: Storage, beside: Collection[str] = ()) -> list[str]:
    """Files of a checkpoint of any form in a directory: what reads it could not tell which one it is."""
    records = {MANIFEST_NAME, dcp_metadata.METADATA_NAME, *beside}
    return [name for name in target.list_files() if name in records or name.endswith(_SUFFIXES)]


# -------------------------------------------------------------------------------------------------- safetensors


def _safetensors(source: Source, target: Storage, asked: _Asked) -> Plan:
    model, manifest = model_of(source.manifest, source.lists), source.manifest
    names, left_out = dict(model.names), []
    if asked.only and not set(asked.only) <= {model.key, "model"}:
        found = chosen(manifest, model, asked.only, source.opened.address)
        names = {name: name for name in found if name in manifest.tensors}
    else:
        left_out = [f"{alias}: tied to {first}" for alias, first in model.aliases.items()]
    if not names:
        raise UsageError(f"{source.opened.address} holds no tensors of a model")
    names = renamed(names, asked.rename)
    jobs = [
        source.tensor_job(name, wanted, asked.dtype_of(manifest.tensors[name].dtype) if name in model.names else None)
        for name, wanted in names.items()
    ]
    safetensors.header((job.name, job.dtype, job.shape) for job in jobs)  # refuses what no file can hold
    cut = list(batches([job.num_bytes for job in jobs], asked.max_shard_bytes))
    files = [
        FileJob(
            f"model-{number:05}-of-{len(cut):05}{safetensors.SUFFIX}" if len(cut) > 1 else _single(target),
            "safetensors",
            # The widest first, so that every tensor is aligned.
            tuple(sorted((jobs[index] for index in batch), key=lambda job: -itemsize(job.dtype))),
        )
        for number, batch in enumerate(cut, start=1)
    ]
    beside = {} if asked.config is None else _config_files(Storage.of(asked.config))
    index_name = f"model{safetensors.INDEX_SUFFIX}"

    def commit(written: Mapping[str, Written]) -> None:
        for name, data in beside.items():
            target.write_atomic(name, data)
        if len(files) > 1:
            places = {job.name: file.name for file in files for job in file.tensors}
            target.write_atomic(index_name, safetensors.index(places, sum(job.num_bytes for job in jobs)))
        else:
            _give_name(target, files[0].name, _SINGLE)

    return Plan(
        source=source.opened.files,
        source_address=source.opened.address,
        target=target,
        uri=target.address,
        files=files,
        identity=asked.identity(source, "safetensors"),
        what=f"export of {source.opened.address} to safetensors",
        commit=commit,
        taken=lambda: _taken(target, beside),
        records=(*beside, index_name),
        final={} if len(files) > 1 or target.puts_at_once else {files[0].name: _SINGLE},
        left_out=(*source.opened.notes, *left_out),
    )


_SINGLE = f"model{safetensors.SUFFIX}"

_UNCHECKED = ".unchecked"
"""Suffix of the only file of a target until it has been read back, where names can be changed."""


def _single(target: Storage, name: str = _SINGLE) -> str:
    return name if target.puts_at_once else name + _UNCHECKED


def _give_name(target: Storage, written: str, name: str) -> None:
    """The commit of a target that is one file. It may have been done before."""
    if written == name or not target.exists(written):
        return
    if target.exists(name):
        raise CheckpointExistsError(
            f"{target.address}/{name} was written meanwhile by somebody else; nothing was changed"
        )
    target.rename(written, name, replace=False)


def _config_files(directory: Storage) -> dict[str, bytes]:
    names = sorted(name for name in directory.list_files() if _BESIDE_MODEL.fullmatch(name))
    if "config.json" not in names:
        raise UsageError(f"--config {directory.address} has no config.json: give the directory of a model of its kind")
    return {name: directory.read_bytes(name) for name in names}


# ---------------------------------------------------------------------------------------------------------- dcp


def _dcp(source: Source, target: Storage, asked: _Asked) -> Plan:
    manifest, address = source.manifest, source.opened.address
    model = model_of(manifest, source.lists)
    names = renamed({name: name for name in chosen(manifest, model, asked.only, address)}, asked.rename)
    tensors = [
        dataclasses.replace(
            source.tensor_job(name, names[name], asked.dtype_of(entry.dtype) if name in model.plain else None),
            path=renamed_path(entry.path, names[name]),
        )
        for name, entry in manifest.tensors.items()
        if name in names
    ]
    objects = {
        names[name]: (name, entry._replace(path=renamed_path(entry.path, names[name])))
        for name, entry in manifest.objects.items()
        if name in names and not entry.refusal
    }
    left_out = [f"{quoted(name)}: {entry.refusal}" for name, entry in manifest.objects.items() if entry.refusal]

    def commit(written: Mapping[str, Written]) -> None:
        target.write_atomic(dcp_metadata.METADATA_NAME, dcp_metadata.dumps_as_stock(joined(written)))

    return Plan(
        source=source.opened.files,
        source_address=address,
        target=target,
        uri=target.address,
        files=container_jobs(tensors, objects, asked.max_shard_bytes, "__0_{}.distcp"),
        identity=asked.identity(source, "dcp"),
        what=f"export of {address} to dcp",
        commit=commit,
        taken=lambda: _taken(target),
        records=(dcp_metadata.METADATA_NAME,),
        left_out=(*source.opened.notes, *left_out),
    )


# -------------------------------------------------------------------------------------------------------- torch


def _torch(source: Source, target: Storage, asked: _Asked) -> Plan:
    found = target.parent()
    if found is None or (not found[0].exists(found[1]) and (target.list_files() or target.list_directories())):
        raise UsageError(
            f"{target.address} is a directory: a torch file needs a name, such as {target.address}/state.pt"
        )
    directory, name = found
    state = torch_state.state_of(source, asked.only, asked.rename)
    tensors: list[TensorJob] = []
    for wanted, (saved, is_weight) in state.tensors.items():
        entry = source.manifest.tensors[saved]
        tensors.append(source.tensor_job(saved, wanted, asked.dtype_of(entry.dtype) if is_weight else None))
    written_as = name if directory.puts_at_once else name + _UNCHECKED
    job = FileJob(written_as, "torch", tuple(tensors), pickled=state.pickled(tensors))
    return Plan(
        source=source.opened.files,
        source_address=source.opened.address,
        target=directory,
        uri=target.address,
        files=[job],
        identity=asked.identity(source, f"torch {name}"),
        what=f"export of {source.opened.address} to torch",
        commit=lambda written: _give_name(directory, written_as, name),
        taken=lambda: [name] if directory.exists(name) else [],
        note=f"{name}.{SUFFIX}",
        final={} if directory.puts_at_once else {written_as: name},
        left_out=(*source.opened.notes, *state.left_out),
    )
