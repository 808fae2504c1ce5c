"""doctor(storage, address): whether a cluster and a storage are fit for a long run, looked at before it begins.

driver                      every node, as a task that is bound to it
    find the cluster
    versions  ── by value ─────────>  also where ray_ckpt is missing
    look      ─────────────────────>  GPUs, limits, room, clock
    write     ── storage ──────────>  a file of its own, all at once
    read      ─────────────────────>  the file of the next node
    remove the files; diagnose

The driver's own machine takes part like a node: it is the one that commits. Without a cluster it is looked at alone.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ckpt.cluster.connect import connect, find_cluster
from ray_ckpt.cluster.worker import CallOutcome, attempt, resolve
from ray_ckpt.errors import CheckpointError, StorageError, UsageError
from ray_ckpt.inspection.diagnosis import DoctorReport, Finding, NodeFacts, diagnose
from ray_ckpt.inspection.machines import Written, clock_ahead, look_at_machine, read_trial, write_trial
from ray_ckpt.storage.files import Storage
from ray_ckpt.storage.store import CheckpointStore

__all__ = ["doctor"]

DRIVER = ""
"""Key of the driver's own machine, where node ids are keys."""

_HERE = "the driver's machine"


def doctor(storage: str | None = None, address: str | None = None, *, timeout_s: float = 120.0) -> DoctorReport:
    """Look at a cluster and a storage before a long run: what is wrong, and what to do about it.

    Ray: whether it is there and looks after nodes of one version of Python, torch, Ray and ray_ckpt; its GPUs, and
    those that torch sees. Every node: shared memory, open files, room for temporary files, clock. The storage: whether
    every node and this process can write there and see each other's files, at what rate, its clock, and whether two
    more checkpoints of the size of the latest one fit. Each node writes 64 MiB there, which are removed again.

    Example:
        >>> from ray_ckpt import doctor
        >>> report = doctor("run", address="local")
        >>> [finding for finding in report.findings if finding.subject == "storage"][0].level
        'fine'

    Args:
        storage: a store's directory, as every node knows it: a path or a URI.
        address: of the cluster; by default the one that this process is connected to, else RAY_ADDRESS, else the one
            that `ray start` left on this machine. Where there is none, or for `"local"`, this machine is looked at.
        timeout_s: how long the nodes may take for each of the four rounds.

    Raises:
        UsageError: `storage` is no path and no URI.
    """
    place = None if storage is None else Storage(storage)
    trials = None if place is None else place.child(f".ray_ckpt-doctor-{secrets.token_hex(6)}")
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        nodes: list[Mapping[str, Any]] = []
        try:
            if _is_reached(address, stack):
                nodes = [node for node in ray.nodes() if node["Alive"]]
                cpus = ray.cluster_resources().get("CPU", 0)
                findings.append(Finding("fine", "cluster", f"{len(nodes)} nodes with {cpus:g} CPUs answer"))
            else:
                why = "as asked" if address == "local" else "as no Ray is running here"
                mend = "to look at a cluster, start it by `ray start --head` or give --address"
                findings.append(Finding("note", "cluster", f"only this machine was looked at, {why}", mend))
        except UsageError as error:
            findings.append(Finding("wrong", "cluster", str(error)))
        facts = _examine(nodes, trials, timeout_s)
    about = (None, None) if place is None else (place.address, _latest_size(place))
    return DoctorReport((*findings, *diagnose(facts, *about)), tuple(facts))


def _is_reached(address: str | None, stack: contextlib.ExitStack) -> bool:
    """Be connected to the cluster, if there is one.

    Raises:
        UsageError: none answers where one was said to be.
    """
    if address == "local":
        return False
    if ray.is_initialized():
        return True
    found = find_cluster(address)
    if found is None or found == "local":
        return False
    stack.enter_context(connect(found))
    return True


def _latest_size(place: Storage) -> int | None:
    with contextlib.suppress(CheckpointError, StorageError):
        store = CheckpointStore(place)
        latest = store.latest(fallback=True)
        return None if latest is None else store.manifest(latest).total_bytes
    return None


# ------------------------------------------------------------------------------------------------------- the rounds


def _examine(nodes: Sequence[Mapping[str, Any]], trials: Storage | None, timeout_s: float) -> list[NodeFacts]:
    """All rounds on all nodes; what fails on one is said of it."""
    names = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in nodes}
    names[DRIVER] = _HERE if nodes else socket.gethostname()
    gpus = {node["NodeID"]: node["Resources"].get("GPU", 0.0) for node in nodes}
    facts = {key: NodeFacts(name, ray_gpus=gpus.get(key, 0.0)) for key, name in names.items()}
    everywhere = _Rounds(facts, timeout_s)
    everywhere.ask("versions", _versions_probe(), dict.fromkeys(facts, ()))
    began = time.time()
    everywhere.ask("machine", look_at_machine, {key: (gpus.get(key, 0.0) > 0,) for key in facts})
    ended = time.time()
    for key, known in facts.items():
        if known.machine is not None:
            facts[key] = replace(known, clock_ahead_s=clock_ahead(known.machine.clock_s, began, ended))
    if trials is not None:
        _try_storage(everywhere, trials)
    return [facts[key] for key in (*(key for key in facts if key != DRIVER), DRIVER)]


def _try_storage(everywhere: _Rounds, trials: Storage) -> None:
    facts = everywhere.facts
    keys = [key for key, known in facts.items() if not known.problem]
    file_of = {key: f"{number}.trial" for number, key in enumerate(keys)}
    try:
        everywhere.ask("written", write_trial, {key: (trials, file_of[key]) for key in keys})
        wrote = {key: known.written for key in keys if (known := facts[key]).written and not known.problem}
        good = [key for key, written in wrote.items() if written is not None and not written.problem]
        following = {key: good[(number + 1) % len(good)] for number, key in enumerate(good)}
        for key, other in following.items():
            facts[key] = replace(facts[key], read_of=facts[other].node)
        digests = {key: _written(facts[key]).digest for key in good}
        to_read = {key: (trials, file_of[other], digests[other]) for key, other in following.items()}
        everywhere.ask("read", read_trial, to_read)
    finally:
        everywhere.ask("", _remove_trials, dict.fromkeys(keys, (trials,)))
        _remove_trials(trials)  # also what a node has left that did not answer


def _written(facts: NodeFacts) -> Written:
    assert facts.written is not None, "only those that have written are asked"
    return facts.written


def _remove_trials(trials: Storage) -> None:
    """Remove what is seen from here: what a node has written, another may not see."""
    with contextlib.suppress(StorageError):
        for name in trials.list_files():
            trials.delete(name)
    if found := trials.parent():
        with contextlib.suppress(StorageError):
            found[0].delete_empty_directory(found[1])


def _versions_probe() -> Callable[[], dict[str, str | None]]:
    """A function that travels by value, as one within another does: the node need not have this module."""

    def versions() -> dict[str, str | None]:
        import importlib
        import importlib.metadata
        import platform

        found: dict[str, str | None] = {"python": platform.python_version()}
        for name in ("torch", "ray"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = None
        try:
            found["ray_ckpt"] = importlib.import_module("ray_ckpt").__version__
        except ImportError:
            found["ray_ckpt"] = None
        return found

    return versions


class _Rounds:
    """Questions to all nodes at once.

    Args:
        facts: by node id, and of the driver's machine; answers are put in here.
    """

    def __init__(self, facts: dict[str, NodeFacts], timeout_s: float) -> None:
        self.facts = facts
        self._timeout_s = timeout_s

    def ask(self, field: str, fn: Callable[..., Any], args_of: Mapping[str, tuple[Any, ...]]) -> None:
        """Call `fn(*args)` on each node, and put what it returns into a field of its facts.

        Args:
            field: empty for an answer that nobody wants.
        """
        # A function that travels by value is called as it is: what would wrap it is not there by value.
        call = fn if field == "versions" else _call
        asked = {
            _on(key, call).remote(*(args if call is fn else (fn, args))): key
            for key, args in args_of.items()
            if key != DRIVER and not self.facts[key].problem
        }
        if DRIVER in args_of:
            self._take(DRIVER, field, _call(fn, args_of[DRIVER]))
        if not asked:
            return
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=self._timeout_s)
        for ref in silent:
            ray.cancel(ref, force=True)
            self._note(asked[ref], f"no answer within {self._timeout_s:g} s")
        for ref in answered:
            try:
                self._take(asked[ref], field, ray.get(ref))
            except RayError as error:
                lines = [line.strip() for line in str(error).splitlines() if line.strip()]
                self._note(asked[ref], lines[-1] if lines else type(error).__name__)

    def _take(self, key: str, field: str, answer: Any) -> None:
        if isinstance(answer, CallOutcome):
            if answer.failure is not None:
                self._note(key, f"{answer.failure.error_type}: {answer.failure.message}")
                return
            answer = answer.value
        if field:
            self.facts[key] = replace(self.facts[key], **{field: answer})

    def _note(self, key: str, problem: str) -> None:
        self.facts[key] = replace(self.facts[key], problem=problem)


def _call(fn: Callable[..., Any] | str, args: tuple[Any, ...]) -> CallOutcome:
    return attempt(0, lambda: resolve(fn)(*args))


def _on(node_id: str, fn: Callable[..., Any]) -> Any:
    """A task that runs on this node, however busy it is."""
    settings: dict[str, Any] = {
        "num_cpus": 0,
        "max_retries": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False),
        "name": "ray_ckpt doctor",
    }
    return ray.remote(**settings)(fn)
