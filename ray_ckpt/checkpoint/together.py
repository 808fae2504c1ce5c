"""What ranks do together, or alone, and how every rank learns of every failure."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ray_ckpt.errors import CheckpointError, RayCkptError, UsageError


@contextmanager
def together(operation: str) -> Iterator[None]:
    """Run the block on every rank, then exchange failures: all ranks go on, or all raise, with every failure named."""
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    text = None if failure is None else _describe(failure)
    texts: list[str | None] = [text]
    if dist.is_initialized():
        texts *= dist.get_world_size()
        dist.all_gather_object(texts, text)
    if failures := {rank: text for rank, text in enumerate(texts) if text is not None}:
        raise _combine(operation, failures, len(texts), failure) from failure


@contextmanager
def with_dcp(operation: str) -> Iterator[None]:
    """Call DCP on all ranks. Its exception, which is a BaseException and the same on all of them, becomes ours."""
    try:
        with _as_one_process():
            yield
    except CheckpointException as error:
        failures = {rank: _describe(cause) for rank, (cause, _) in error.failures.items()}
        num_ranks = dist.get_world_size() if dist.is_initialized() else 1
        first = next((cause for cause, _ in error.failures.values()), None)
        raise _combine(operation, failures, num_ranks, first) from error


@contextmanager
def alone_with_dcp() -> Iterator[None]:
    """Call DCP on this rank alone, with `no_dist=True`: what failed is raised as it is."""
    try:
        with _as_one_process():
            yield
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            raise cause from error
        raise CheckpointError(str(error)) from error


@contextmanager
def _as_one_process() -> Iterator[None]:
    """Without a process group DCP warns that it assumes one process. That is as good as any other layout."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _combine(
    operation: str, failures: Mapping[int, str], num_ranks: int, example: BaseException | None
) -> RayCkptError:
    """What a rank raises: the failure itself where it is everybody's, else an error that names who failed."""
    is_everybodys = isinstance(example, UsageError) or len(failures) == num_ranks
    if isinstance(example, RayCkptError) and is_everybodys and len(set(failures.values())) == 1:
        return example
    ranks_of: dict[str, list[str]] = {}
    for rank, text in failures.items():
        ranks_of.setdefault(text, []).append(str(rank))
    causes = "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in ranks_of.items())
    return CheckpointError(f"{operation} failed on {causes}")
