"""diagnose(facts): what machines and a storage are like -> findings, each with what to do about it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ray_ckpt.inspection.machines import Machine, Read, Written
from ray_ckpt.text import listed
from ray_ckpt.text_units import format_bytes

__all__ = ["DoctorReport", "Finding", "NodeFacts", "diagnose"]

LEAST_SHARED_MEMORY_BYTES = 256 << 20
"""Containers have 64 MiB unless told otherwise, which NCCL and data loaders exceed."""

LEAST_OPEN_FILES, FEW_OPEN_FILES = 1024, 8192
"""Below the first, Ray and data loaders fail soon; 65536 is what Ray recommends."""

LEAST_TEMPORARY_SHARE = 0.05
"""Ray takes no more objects on a disk that is fuller than this."""

MOST_SKEW_S = 5.0
"""Clocks that are further apart make `clean` and logs misjudge what is new."""

SLOW = 4.0
"""A node is slow whose rate is that much below the median."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Example:
        >>> from ray_ckpt import Finding
        >>> str(Finding("wrong", "storage", "cannot be written", "give another place"))
        'storage: cannot be written; give another place'
    """

    level: Literal["fine", "note", "wrong"]
    subject: str
    """What was looked at, such as `storage`."""
    text: str
    mend: str = ""
    """What to do about it; empty where nothing is to be done."""

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}" + (f"; {self.mend}" if self.mend else "")


@dataclass(frozen=True)
class NodeFacts:
    """What is known of one node, or of the machine that the driver runs on.

    Example:
        >>> from ray_ckpt import NodeFacts
        >>> NodeFacts("gpu-7 (10.0.0.7)", problem="no answer within 120 s").machine is None
        True
    """

    node: str
    problem: str = ""
    """Why it could not be looked at."""
    versions: Mapping[str, str | None] | None = None
    """Version of Python, torch, Ray and ray_ckpt there; None for what is not installed."""
    machine: Machine | None = None
    ray_gpus: float = 0.0
    """GPUs that Ray counts there."""
    clock_ahead_s: float = 0.0
    """How far its clock is ahead of the driver's at least, if it is."""
    written: Written | None = None
    read: Read | None = None
    read_of: str = ""
    """The node whose file it read."""


@dataclass(frozen=True)
class DoctorReport:
    """What `doctor` found.

    Example:
        >>> from ray_ckpt import DoctorReport, Finding
        >>> report = DoctorReport((Finding("fine", "python", "3.11.7 everywhere"),), ())
        >>> report.healthy
        True
    """

    findings: tuple[Finding, ...]
    nodes: tuple[NodeFacts, ...]
    """What was seen on each node, and on the driver's machine, which is the last."""

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return all(finding.level != "wrong" for finding in self.findings)


def diagnose(nodes: Sequence[NodeFacts], storage: str | None, checkpoint_bytes: int | None = None) -> Iterator[Finding]:
    """What is to be said of these nodes.

    Args:
        storage: what the storage is called; None when none was looked at.
        checkpoint_bytes: size of a checkpoint, if it is known.
    """
    for text, where in _grouped({node.node: node.problem for node in nodes if node.problem}):
        yield Finding("wrong", "nodes", f"{text} on {where}", "see that ray_ckpt is installed and Ray healthy there")
    yield from _versions(nodes)
    machines = {node.node: node.machine for node in nodes if node.machine is not None}
    if machines:
        yield from _gpus(nodes)
        yield from _limits(machines)
        yield from _clocks(nodes)
    if storage is not None:
        yield from _storage(nodes, storage)
        yield from _room(nodes, storage, checkpoint_bytes)


def _grouped(texts: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Each text once, with the nodes that it is said of."""
    nodes: dict[str, list[str]] = {}
    for node, text in texts.items():
        nodes.setdefault(text, []).append(node)
    for text, where in nodes.items():
        yield text, listed(where)


def _versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    known = {node.node: node.versions for node in nodes if node.versions is not None}
    for name in dict.fromkeys(name for versions in known.values() for name in versions):
        texts = {node: versions.get(name) or "not installed" for node, versions in known.items()}
        found = list(_grouped(texts))
        if len(found) == 1 and found[0][0] != "not installed":
            yield Finding("fine", name, found[0][0] + (" everywhere" if len(known) > 1 else ""))
        else:
            told = "; ".join(f"{text} on {where}" for text, where in found)
            yield Finding("wrong", name, f"differs or is missing: {told}", "install the same version on every node")


def _gpus(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    counts: dict[str, str] = {}
    for node in nodes:
        seen = node.machine.num_gpus if node.machine else None
        if node.machine is None:
            continue
        if node.ray_gpus > (seen or 0):
            text = f"Ray counts {node.ray_gpus:g} on {node.node}, torch sees {seen or 0}"
            yield Finding("wrong", "GPUs", text, "install a CUDA build of torch and a driver that fits it")
        elif seen and not node.machine.nccl:
            text = f"torch on {node.node} has no NCCL"
            yield Finding("wrong", "GPUs", text, "install a build of torch with NCCL, or use backend gloo")
        else:
            counts[node.node] = f"{seen}, NCCL {node.machine.nccl}" if seen else "none"
    found = list(_grouped(counts))
    if found:
        told = found[0][0] if len(found) == 1 else "; ".join(f"{text} on {where}" for text, where in found)
        per_node = " per node" if len(nodes) > 1 and len(found) == 1 and told != "none" else ""
        yield Finding("fine", "GPUs", "none: workers train on the CPU" if told == "none" else told + per_node)


def _limits(machines: Mapping[str, Machine]) -> Iterator[Finding]:
    small = {
        node: f"{format_bytes(machine.shared_memory_bytes)} of shared memory"
        for node, machine in machines.items()
        if machine.shared_memory_bytes is not None and machine.shared_memory_bytes < LEAST_SHARED_MEMORY_BYTES
    }
    for text, where in _grouped(small):
        mend = "start the container with --shm-size=4g, or mount a memory volume at /dev/shm"
        yield Finding("wrong", "shared memory", f"only {text} on {where}", mend)
    if not small:
        sizes = [m.shared_memory_bytes for m in machines.values() if m.shared_memory_bytes is not None]
        yield Finding("fine", "shared memory", f"{format_bytes(min(sizes))} or more" if sizes else "no /dev/shm")
    few = {node: f"{m.open_files} open files" for node, m in machines.items() if m.open_files < FEW_OPEN_FILES}
    for text, where in _grouped(few):
        level: Literal["note", "wrong"] = "wrong" if int(text.split()[0]) < LEAST_OPEN_FILES else "note"
        mend = "raise the limit: `ulimit -n 65536` before `ray start`, or LimitNOFILE= of the service"
        yield Finding(level, "file handles", f"a process may have only {text} on {where}", mend)
    if not few:
        yield Finding("fine", "file handles", f"{min(m.open_files for m in machines.values())} or more per process")
    full = {
        node: f"{format_bytes(machine.temporary_free_bytes)} free of {format_bytes(machine.temporary_total_bytes)}"
        for node, machine in machines.items()
        if machine.temporary_free_bytes < LEAST_TEMPORARY_SHARE * machine.temporary_total_bytes
    }
    for text, where in _grouped(full):
        mend = "free some, or put RAY_TMPDIR and TMPDIR on another disk: Ray stops above 95 %"
        yield Finding("wrong", "temporary disk", f"{text} on {where}", mend)
    if not full:
        least = min(machine.temporary_free_bytes for machine in machines.values())
        yield Finding("fine", "temporary disk", f"{format_bytes(least)} free or more")


def _clocks(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    skews = {node.node: node.clock_ahead_s for node in nodes}
    late = {f"{node}'s": skew for node, skew in skews.items() if abs(skew) > MOST_SKEW_S}
    stored = {
        f"the storage's, as {node.node} sees it,": node.written.clock_ahead_s
        for node in nodes
        if node.written and node.written.clock_ahead_s and abs(node.written.clock_ahead_s) > MOST_SKEW_S
    }
    for whose, skew in (late | stored).items():
        text = f"{whose} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}"
        yield Finding("wrong", "clock", text, "let NTP or chrony set the clocks of all machines")
    if not late | stored:
        yield Finding("fine", "clock", f"no two are more than {MOST_SKEW_S:g} s apart")


def _storage(nodes: Sequence[NodeFacts], storage: str) -> Iterator[Finding]:
    problems = {node.node: node.written.problem for node in nodes if node.written and node.written.problem}
    for text, where in _grouped(problems):
        yield Finding("wrong", "storage", f"{text}, from {where}", "let every node write there, or give another place")
    read = [node for node in nodes if node.read is not None]
    unseen = {n.node: f"the file that {n.read_of} wrote" for n in read if n.read and not n.read.is_there}
    if unseen:
        told = "; ".join(f"{node} does not see {what}" for node, what in list(unseen.items())[:5])
        mend = "give a directory that is mounted on every node, or an object store such as s3://bucket/path"
        yield Finding("wrong", "storage", f"{storage} is not shared: {told}", mend)
    for text, where in _grouped({n.node: n.read.problem for n in read if n.read and n.read.problem}):
        yield Finding("wrong", "storage", f"{text}, on {where}", "let every node read there, or give another place")
    if problems or unseen or any(n.read and n.read.problem for n in read) or not read:
        return
    everywhere = ", shared by all" if len(nodes) > 1 else ""
    yield Finding("fine", "storage", f"{storage} can be written{everywhere}")
    writes = {n.node: n.written.bytes_per_s for n in nodes if n.written}
    reads = {n.node: n.read.bytes_per_s for n in read if n.read}
    for verb, rates in (("writes", writes), ("reads", reads)):
        middle = statistics.median(rates.values())
        yield Finding("fine", "storage", f"each node {verb} {format_bytes(middle)}/s, all at once")
        for node, rate in rates.items():
            if rate * SLOW < middle:
                text = f"{node} {verb} only {format_bytes(rate)}/s"
                yield Finding("note", "storage", text, "look at its network and mount")


def _room(nodes: Sequence[NodeFacts], storage: str, checkpoint_bytes: int | None) -> Iterator[Finding]:
    free = [n.written.free_bytes for n in nodes if n.written and n.written.free_bytes is not None]
    if not free:
        return
    least = min(free)
    if checkpoint_bytes is None:
        fitting = f"two checkpoints of up to {format_bytes(least / 2)} each fit, as they must"
        yield Finding("fine", "room", f"{format_bytes(least)} free at {storage}: {fitting}")
        return
    text = (
        f"{format_bytes(least)} free at {storage}, the latest checkpoint there takes {format_bytes(checkpoint_bytes)}"
    )
    if least < 2 * checkpoint_bytes:
        yield Finding("wrong", "room", text, "free some, as by `ray-ckpt prune`: two must fit beside what is there")
    else:
        yield Finding("fine", "room", text)
