"""The functions that a transfer calls on the workers of either side. Bytes travel as objects of Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from ray_ckpt.cluster.worker import WorkerContext, resolve
from ray_ckpt.cluster.worker_side import LOADS, StateOf
from ray_ckpt.errors import CheckpointError
from ray_ckpt.format.manifest import Manifest
from ray_ckpt.protocol.messages import Assignment
from ray_ckpt.protocol.save_options import SaveOptions
from ray_ckpt.protocol.stream_plan import Proof, StreamOffer, stream_name
from ray_ckpt.text import first_line

if TYPE_CHECKING:
    from ray_ckpt.protocol.comparison import Held
    from ray_ckpt.protocol.share_plan import Wants
    from ray_ckpt.protocol.streaming import RankStream, StreamedLoad
    from ray_ckpt.storage.files import Storage

_STREAMS = "ray_ckpt.streams"


@dataclass(frozen=True)
class Sent:
    """A window of a rank's stream, copied out of its state."""

    object: Any
    """Reference to the pieces and their checksum."""
    start: int
    end: int
    num_bytes: int
    proof: Proof
    """As in `StreamWindow`."""
    is_last: bool


# ------------------------------------------------------------------------------------------------------- source


def offer(ctx: WorkerContext, attempt: str, state_of: StateOf | str, options: SaveOptions) -> StreamOffer:
    """Look through the state."""
    from ray_ckpt.protocol.streaming import RankStream

    stream = RankStream(options)
    _streams(ctx)[attempt] = stream
    return stream.offer(resolve(state_of)(ctx))


def begin(ctx: WorkerContext, assignment: Assignment, by_fingerprint: frozenset[str]) -> None:
    """Be told what other ranks send, and of which tensors the target needs fingerprints."""
    _streams(ctx)[assignment.attempt].begin(assignment, by_fingerprint)


def send(ctx: WorkerContext, attempt: str, max_bytes: int) -> Sent:
    """Copy the next window out of the state."""
    window = _streams(ctx)[attempt].window(max_bytes)
    pieces = window.pieces
    start, end = (pieces[0].start, pieces[-1].start + len(pieces[-1].data)) if pieces else (0, 0)
    copied = ray.put((pieces, window.checksum)) if pieces else None
    return Sent(copied, start, end, window.num_bytes, window.proof, window.is_last)


def end(ctx: WorkerContext, attempt: str) -> None:
    """Release the state."""
    _streams(ctx).pop(attempt, None)


def _streams(ctx: WorkerContext) -> dict[str, RankStream]:
    """Attempt -> this rank's side of it."""
    streams: dict[str, RankStream] = ctx.objects.setdefault(_STREAMS, {})
    return streams


# ------------------------------------------------------------------------------------------------------- target


def open_transfer(
    ctx: WorkerContext,
    attempt: str,
    storage: Storage,
    options: Mapping[str, Any],
    atomic: bool,
    state_of: StateOf | str,
    manifest: Manifest,
) -> bool:
    """As `worker_side.open_load`, whose other functions follow.

    Args:
        storage: what messages call the source.
    """
    from ray_ckpt.protocol.streaming import of_stream
    from ray_ckpt.state.train_state import TrainState

    load = of_stream(options, storage, atomic=atomic)
    load.open(manifest)
    ctx.objects.setdefault(LOADS, {})[attempt] = load
    return load.may_be_foreign and isinstance(resolve(state_of)(ctx), TrainState)


def expect(
    ctx: WorkerContext, attempt: str, state_of: StateOf | str, planned: Manifest
) -> tuple[Wants, frozenset[str]]:
    """What is wanted of which stream, and which tensors are to be compared by fingerprints.

    Args:
        planned: the record as it will be, without its checksums.
    """
    from ray_ckpt.protocol.comparison import Comparing

    wants = _load(ctx, attempt).expect()
    return wants, Comparing(resolve(state_of)(ctx), None, planned).needing()


def take(ctx: WorkerContext, attempt: str, windows: Mapping[int, Any], timeout_s: float) -> None:
    """Take windows into the state.

    Args:
        windows: rank of the source -> reference to what it has sent.
        timeout_s: how long its bytes may take to come to this node.
    """
    load = _load(ctx, attempt)
    for rank, sent in windows.items():
        try:
            pieces, checksum = ray.get(sent, timeout=timeout_s)
        except RayError as error:
            raise CheckpointError(f"what rank {rank} of the source has sent is lost: {first_line(error)}") from error
        load.fill(stream_name(rank), pieces, checksum)


def settle(ctx: WorkerContext, attempt: str) -> None:
    """Give the state its new values."""
    _load(ctx, attempt).settle()


def compare(ctx: WorkerContext, state_of: StateOf | str, proof: Manifest, by_fingerprint: frozenset[str]) -> Held:
    """What this rank holds of what was sent."""
    from ray_ckpt.protocol.comparison import Comparing

    return Comparing(resolve(state_of)(ctx), None, proof).held(by_fingerprint)


def _load(ctx: WorkerContext, attempt: str) -> StreamedLoad:
    load: StreamedLoad = ctx.objects[LOADS][attempt]
    return load
