"""What the verbs return: numbers with units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Phase:
    """A stretch of time that a rank spent on one thing in a save or a load.

    Example:
        >>> import torch
        >>> from ray_ckpt import Phase, save
        >>> phases: tuple[Phase, ...] = save({"weight": torch.ones(3)}, "run/step-1").phases
        >>> [(phase.rank, phase.name, phase.num_bytes) for phase in phases if phase.name == "write"]
        [(0, 'write', 12)]
    """

    name: str
    """`plan`, `copy` (with `blocking=False`), `write`, `checksum`, `check` and `commit` in a save; `open`, `plan`,
    `prepare`, `read` and `set` in a load."""
    rank: int | None
    """The rank; None for the coordinator's part, which is rank 0's, or the driver's of a `WorkerGroup`."""
    start_s: float
    """When it began, in seconds since the epoch by the clock of the rank's node."""
    seconds: float
    """Time spent. That of `checksum` is spent in many parts during `write`."""
    num_bytes: int = 0
    """Bytes of tensors that it wrote or read."""


@dataclass(frozen=True)
class SaveReport:
    """What a save returns: where the committed checkpoint is, and how large.

    Example:
        >>> import torch
        >>> from ray_ckpt import save
        >>> report = save({"weight": torch.ones(3)}, "run/step-1")
        >>> report.num_files, report.uri.endswith("run/step-1")
        (1, True)
    """

    uri: str
    """The checkpoint's directory, without credentials and options."""
    total_bytes: int
    """Size of all data files together."""
    num_files: int
    """Number of data files."""
    seconds: float
    """Time from the first plan to the commit, on this rank."""
    step: int | None = None
    """The checkpoint's step in its store; None where the target is no store."""
    differing_buffers: tuple[str, ...] = ()
    """Names of the modules' buffers in which ranks differed, such as the statistics of a BatchNorm under data
    parallelism. What the first rank holds was saved, as `DistributedDataParallel` goes on with it."""
    phases: tuple[Phase, ...] = field(default=(), repr=False)
    """What took how long on which rank."""
    num_retries: int = 0
    """How often the ranks asked the storage again after an error that may pass."""
    num_failed_before: int = 0
    """Saves that failed since the last one that ended well, where `on_error="warn"` let the run go on."""
    not_durable: tuple[str, ...] = ()
    """Where the store has a front: what could not be copied to the durable tier until then, with reasons."""
    lost_ranks: tuple[int, ...] = ()
    """Ranks of a `WorkerGroup` whose processes were gone before they could write. The others held all that they held,
    as replicas do, and have saved it without them."""
    left_out: tuple[str, ...] = ()
    """What is not saved, as each lost rank had it of its own: its random generators and the place of its data loader.
    A load seeds new ones, and goes on where the other data loaders were if the sampler can be set."""
    unsaved: tuple[str, ...] = ()
    """What optimizers, and wrappers of them, keep for their parameters and do not show by `state_dict`, such as
    `Lookahead.slow_weights`: it begins anew after a load. Give it in `TrainState(extra=...)`, or show it."""


@dataclass(frozen=True)
class TransferReport:
    """What `cluster.transfer` returns. It is there only if the target holds what was sent.

    Example:
        >>> import torch
        >>> from ray_ckpt import WorkerGroup, cluster
        >>> def state_of(ctx):
        ...     return ctx.objects.setdefault("stage", {f"stage{ctx.rank}": torch.ones(3)})
        >>> with WorkerGroup(2, process_group=False) as group:
        ...     report = cluster.transfer(group, state_of, group, state_of)
        >>> report.num_bytes, report.num_compared
        (24, 2)
    """

    num_bytes: int
    """Size of the tensor data that the source has sent, each byte once."""
    seconds: float
    """Time from the source's plan to the end of the comparison."""
    source_seconds: float
    """Time after which the source's part was copied, and its state could change."""
    num_windows: int
    """Number of windows of the longest stream."""
    num_compared: int
    """Number of tensors that both sides have, which are equal."""
    missing: tuple[str, ...]
    """Names that the target wants and the source has not sent; they keep the values that they had."""
    unexpected: tuple[str, ...]
    """Names that were sent and that the target does not want."""


@dataclass(frozen=True)
class LoadReport:
    """What a load returns on each rank. The names are sorted and the same on all ranks.

    Example:
        >>> import torch
        >>> from ray_ckpt import load, save
        >>> report = save({"weight": torch.ones(3)}, "run/step-1")
        >>> load({"weight": torch.zeros(3), "bias": torch.zeros(3)}, "run/step-1", strict=False).missing
        ('bias',)
    """

    uri: str
    """The checkpoint's directory or file, without credentials and options."""
    num_bytes: int
    """Size of the tensor data that this rank has read."""
    seconds: float
    """Time from opening the manifest to setting the last value, on this rank."""
    missing: tuple[str, ...]
    """Names that some rank wants and the checkpoint lacks; they keep the values that they had."""
    unexpected: tuple[str, ...]
    """Names in the checkpoint that no rank wants, among the parts that were to be loaded."""
    cast: tuple[str, ...]
    """Names of tensors that were saved in another dtype and converted."""
    rng: str | None
    """Random generators: `restored`; `reseeded` when another layout saved them; None when they were not loaded."""
    dataloader: str | None
    """Data loader: `restored`, in another layout with the number of samples that come again, if any; `left as it was`,
    and why, when another layout saved it and its sampler cannot be set; None when it was not loaded."""
    lost: str = ""
    """What of another program's checkpoint was not loaded: what it had already lost when it was saved, and what lies
    beside the model and the optimizer and is not translated, or not part of the state. Empty when nothing."""
    base: str | None = None
    """Frozen parameters of a `trainable_only` state: how many are those of the save, which are others, and which could
    not be compared, as the checkpoint has no fingerprint of them. None where there are none."""
    step: int | None = None
    """The checkpoint's step in its store; None where the target is no store."""
    passed_over: tuple[str, ...] = ()
    """Higher steps that were not loaded because they are damaged, each with path and reason; see `fallback`."""
    phases: tuple[Phase, ...] = field(default=(), repr=False)
    """What took how long on this rank."""
    num_retries: int = 0
    """How often this rank asked the storage again after an error that may pass."""
    bytes_by_file: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Data file -> bytes of tensors that this rank has read from it."""
    tier: str | None = None
    """Where a store has two tiers, the one that was loaded from: `front` or `durable`; else None."""
    durable_bytes: int = 0
    """Bytes that came to this rank from the durable tier: of tensors, and of what was damaged in the front."""
    damaged_copies: tuple[str, ...] = ()
    """What was found damaged or gone and read from another copy instead, and from where."""


@dataclass(frozen=True)
class RemovalReport:
    """What `delete`, `prune` or `clean` removed from a store, or would remove.

    Example:
        >>> import torch
        >>> from ray_ckpt import CheckpointStore, keep_last, save
        >>> store = CheckpointStore("run")
        >>> reports = [save({"weight": torch.ones(3)}, store, step=step) for step in (1, 2, 3)]
        >>> report = store.prune(keep_last(1), dry_run=True)
        >>> report.removed, report.kept, len(report.files)
        ((1, 2), (3,), 2)
    """

    uri: str
    """The store, without credentials and options."""
    removed: tuple[int, ...]
    """Steps that are no longer there, ascending."""
    kept: tuple[int, ...]
    """Committed steps that stay, ascending, as the listing at the start showed them."""
    files: tuple[str, ...]
    """Names of the removed data files, relative to the store."""
    total_bytes: int
    """Size of the removed data files together."""
    dry_run: bool
    """Whether this is only what would be removed."""
    damages: Mapping[int, str] = field(default_factory=dict)
    """Step -> path and reason, of the damaged steps that `prune` left alone."""
    uploads: tuple[str, ...] = ()
    """Names of files whose unfinished uploads `clean` aborted, on S3."""


@dataclass(frozen=True)
class CopyReport:
    """What has not been copied from the front of a store to its durable tier, as `CheckpointStore.copying` tells.

    Example:
        >>> from ray_ckpt import CheckpointStore
        >>> CheckpointStore("run").copying()  # there is nothing to be copied without a front
        CopyReport(waiting={}, given_up={})
    """

    waiting: Mapping[int, str]
    """Step -> why it could not be copied so far; empty when nothing is wrong. It is tried again."""
    given_up: Mapping[int, str]
    """Step -> why it is not going to be durable."""

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each step that could not be copied."""
        found = {**{step: f"{why}; it is tried again" for step, why in self.waiting.items() if why}, **self.given_up}
        return tuple(f"step {step} is not durable: {why}" for step, why in sorted(found.items()))


@dataclass(frozen=True)
class NonFinite:
    """Elements of a tensor that are no finite numbers.

    Example:
        >>> from ray_ckpt import NonFinite
        >>> NonFinite(num_nan=1, num_inf=0).num_nan
        1
    """

    num_nan: int
    num_inf: int

    def __add__(self, other: NonFinite) -> NonFinite:
        return NonFinite(self.num_nan + other.num_nan, self.num_inf + other.num_inf)


@dataclass(frozen=True, order=True)
class Damage:
    """Bytes of a committed checkpoint that differ from what was saved, as `VerifyReport.damages` lists them.

    Example:
        >>> import pathlib, torch
        >>> from ray_ckpt import save, verify
        >>> report = save({"weight": torch.ones(1000)}, "run/step-1")
        >>> file = next(pathlib.Path("run/step-1").glob("*.distcp"))
        >>> data = bytearray(file.read_bytes())
        >>> data[2000] ^= 1
        >>> num_bytes = file.write_bytes(data)
        >>> [damage.name for damage in verify("run/step-1").damages]
        ['weight']
    """

    file: str
    """Name of the file, relative to the checkpoint's directory."""
    start: int
    """First byte of the damaged range `[start, end)` in the file."""
    end: int
    """Byte after the last one of the damaged range."""
    name: str
    """Name of the tensor or object; empty when the damage is in the file itself or in bytes that belong to neither."""
    problem: str
    """What was found instead of what was saved."""

    def __str__(self) -> str:
        return f"{self.file} [{self.start}, {self.end}) {self.name!r}: {self.problem}"


_NAMED = 5
"""How many names a line of text shows of each kind."""


@dataclass(frozen=True)
class CompareReport:
    """What `compare` found: whether ranks hold what a checkpoint holds.

    Example:
        >>> import torch
        >>> from ray_ckpt import compare, save
        >>> state = {"weight": torch.ones(3), "step": 7}
        >>> report = save(state, "run/step-1", fingerprints=True)
        >>> compare(state, "run/step-1").equal
        True
        >>> state["weight"][1] = 2
        >>> compare(state, "run/step-1").differing
        {'weight': 'other elements'}
    """

    uri: str
    """The checkpoint's directory, without credentials and options."""
    num_compared: int
    """Number of tensors and objects that were compared."""
    differing: Mapping[str, str]
    """Name -> how it differs."""
    missing: tuple[str, ...]
    """Names in the checkpoint that no rank holds."""
    unexpected: tuple[str, ...]
    """Names that ranks hold and the checkpoint does not."""
    unknown: tuple[str, ...]
    """Names that could not be compared, as the checkpoint was saved without fingerprints or by another program."""
    step: int | None = None
    """The checkpoint's step in its store; None where the target is no store."""

    @property
    def equal(self) -> bool:
        """Whether everything was compared and nothing differs."""
        return not (self.differing or self.missing or self.unexpected or self.unknown)

    def __str__(self) -> str:
        where = self.uri if self.step is None else f"{self.uri} (step {self.step})"
        if self.equal:
            return f"equal: {self.num_compared} tensors and objects are as in {where}"
        parts = [
            f"{name}: {', '.join(names[:_NAMED])}{f' and {len(names) - _NAMED} more' * (len(names) > _NAMED)}"
            for name, names in (
                ("differ", [f"{name} ({how})" for name, how in self.differing.items()]),
                ("are missing here", self.missing),
                ("are not in the checkpoint", self.unexpected),
                ("have no fingerprints there", self.unknown),
            )
            if names
        ]
        return f"NOT EQUAL to {where}: " + "; ".join(parts)


@dataclass(frozen=True)
class VerifyReport:
    """What `verify` found when it read every byte of a checkpoint.

    Example:
        >>> import torch
        >>> from ray_ckpt import save, verify
        >>> report = save({"weight": torch.ones(3), "step": 7}, "run/step-1")
        >>> checked = verify("run/step-1")
        >>> checked.verified, checked.num_tensors, checked.num_objects, checked.damages
        (True, 1, 1, ())
    """

    uri: str
    """The checkpoint's directory, without credentials and options."""
    num_files: int
    """Number of files that were read."""
    num_tensors: int
    """Number of tensors in the checkpoint."""
    num_objects: int
    """Number of values in the checkpoint that are not tensors."""
    total_bytes: int
    """Number of bytes that were read."""
    seconds: float
    """Time of the rank that took longest."""
    damages: tuple[Damage, ...]
    """Every damaged range, sorted by file and position."""
    unchecked: tuple[str, ...]
    """Names that were read but have no checksum of ours, as in a checkpoint that another program wrote."""
    notes: tuple[str, ...] = ()
    """Remarks on the check, such as that a record of format version 1 has no digest of itself."""
    step: int | None = None
    """The checkpoint's step in its store; None where the target is no store."""
    nonfinite: Mapping[str, NonFinite] | None = None
    """Tensor -> its NaN and Inf, of those that hold some; None when they were not counted."""

    @property
    def verified(self) -> bool:
        """Whether everything was compared with a checksum and nothing differs."""
        return not self.damages and not self.unchecked

    @property
    def damaged(self) -> tuple[str, ...]:
        """Names of the damaged tensors and objects, sorted."""
        return tuple(sorted({damage.name for damage in self.damages if damage.name}))

    def __str__(self) -> str:
        asked = (
            f"{self.num_tensors} tensors and {self.num_objects} objects in {self.num_files} files of {self.uri}, "
            f"{self.total_bytes / 2**20:.1f} MiB in {self.seconds:.1f} s"
        )
        if self.nonfinite is not None:
            asked += f", {len(self.nonfinite) or 'none'} of which hold{'s' * (len(self.nonfinite) == 1)} NaN or Inf"
        notes = "".join(f"; {note}" for note in self.notes)
        if self.damages:
            return f"DAMAGED: {len(self.damaged)} of {asked}: " + "; ".join(map(str, self.damages)) + notes
        if self.unchecked:
            return f"read, but not verified: {asked}; {len(self.unchecked)} of them have no checksum of ours" + notes
        return f"verified: {asked}" + notes

    @staticmethod
    def merge(shares: Sequence[VerifyReport]) -> VerifyReport:
        """One report of what several ranks found, each in its share of the files."""
        counted = [share.nonfinite for share in shares if share.nonfinite is not None]
        names = dict.fromkeys(name for found in counted for name in found)
        nothing = NonFinite(0, 0)
        nonfinite = {name: sum((found.get(name, nothing) for found in counted), nothing) for name in names}
        return replace(
            shares[0],
            total_bytes=sum(share.total_bytes for share in shares),
            seconds=max(share.seconds for share in shares),
            damages=tuple(sorted({damage for share in shares for damage in share.damages})),
            notes=tuple(dict.fromkeys(note for share in shares for note in share.notes)),
            nonfinite=nonfinite if counted else None,
        )


@dataclass(frozen=True)
class ConversionReport:
    """What `export` and `convert` return: what lies in the target, read back and found equal to the source.

    Example:
        >>> import torch
        >>> from ray_ckpt import export, save
        >>> report = save({"model": {"weight": torch.ones(3)}}, "run/step-1")
        >>> export("run/step-1", "weights", to="safetensors").files
        ('model.safetensors',)
    """

    uri: str
    """The target, without credentials and options."""
    source: str
    """The source, without credentials and options."""
    files: tuple[str, ...]
    """Names of the files with tensors."""
    num_tensors: int
    """Number of tensors in them."""
    total_bytes: int
    """Size of these files together."""
    cast: tuple[str, ...]
    """Names of the tensors that were converted to another dtype, as the target has them."""
    kept: tuple[str, ...]
    """Files that an attempt before this one had finished, and that were not written again."""
    left_out: tuple[str, ...]
    """What of the source is not in the target, and why."""
    seconds: float
    """Time from reading the source's record to the last check."""


@dataclass(frozen=True)
class SignatureReport:
    """What `sign` and `verify_signature` return.

    Example:
        >>> from ray_ckpt import SignatureReport
        >>> report = SignatureReport("/mnt/run/step-1", "signature fits", ("manifest.json", ".metadata"), 700, True)
        >>> print(report)
        signature fits: 2 files with 700 bytes of /mnt/run/step-1; its data files are covered by checksums alone
    """

    uri: str
    """The checkpoint, without credentials and options."""
    verdict: str
    """`signed` or `signature fits`."""
    files: tuple[str, ...]
    """Names of the files that the signature covers."""
    total_bytes: int
    """Size of these files together."""
    record_only: bool
    """Whether it covers the record alone: data files are then tied to it by checksums that can be forged."""

    def __str__(self) -> str:
        note = "; its data files are covered by checksums alone" if self.record_only else ""
        return f"{self.verdict}: {len(self.files)} files with {self.total_bytes} bytes of {self.uri}{note}"
