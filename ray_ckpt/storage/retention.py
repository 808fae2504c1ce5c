"""Which steps of a store to keep: pure functions of step numbers, joined with `|`.

keep_last(3) | keep_every(1000) | keep([0, 500])      a step is kept if any of them keeps it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from ray_ckpt.errors import UsageError

__all__ = ["Policy", "keep", "keep_every", "keep_last", "retained"]


@dataclass(frozen=True)
class Policy:
    """A rule that says which committed steps to keep. Policies are joined with `|`.

    Example:
        >>> from ray_ckpt import keep_every, keep_last
        >>> policy = keep_last(2) | keep_every(100)
        >>> policy
        keep_last(2) | keep_every(100)
        >>> sorted(policy.choose([90, 100, 110, 120]))
        [100, 110, 120]
    """

    text: str
    """The policy as it was written, such as `keep_last(2) | keep_every(100)`."""
    choose: Callable[[Sequence[int]], Collection[int]]
    """Takes the committed steps in ascending order and returns those to keep."""

    def __or__(self, other: Policy) -> Policy:
        return Policy(f"{self.text} | {other.text}", lambda steps: {*self.choose(steps), *other.choose(steps)})

    def __repr__(self) -> str:
        return self.text


def keep_last(count: int) -> Policy:
    """Keep the `count` highest steps.

    Example:
        >>> from ray_ckpt import keep_last
        >>> list(keep_last(2).choose([10, 20, 30]))
        [20, 30]

    Raises:
        UsageError: `count` is less than 1.
    """
    if count < 1:
        raise UsageError(f"keep_last({count}) would keep nothing: the count starts at 1")
    return Policy(f"keep_last({count})", lambda steps: steps[-count:])


def keep_every(interval: int) -> Policy:
    """Keep every step that is a multiple of `interval`.

    Example:
        >>> from ray_ckpt import keep_every
        >>> list(keep_every(1000).choose([500, 1000, 1500, 2000]))
        [1000, 2000]

    Raises:
        UsageError: `interval` is less than 1.
    """
    if interval < 1:
        raise UsageError(f"keep_every({interval}): the interval starts at 1")
    return Policy(f"keep_every({interval})", lambda steps: [step for step in steps if step % interval == 0])


def keep(wanted: Iterable[int]) -> Policy:
    """Keep the named steps.

    Example:
        >>> from ray_ckpt import keep
        >>> list(keep([0, 500]).choose([0, 250, 500]))
        [0, 500]
    """
    chosen = frozenset(wanted)
    return Policy(f"keep({sorted(chosen)})", lambda steps: [step for step in steps if step in chosen])


def retained(steps: Iterable[int], policies: Iterable[Policy], pins: Collection[int] = ()) -> tuple[int, ...]:
    """The steps that stay, ascending: those that a policy keeps, those that are pinned, and always the highest.

    Raises:
        UsageError: there is no policy at all.
    """
    ordered = sorted(steps)
    rules = list(policies)
    if not rules:
        raise UsageError("say what to keep, as in prune(keep_last(3)): no policy would leave the latest step alone")
    kept = {*ordered[-1:], *pins}
    for policy in rules:
        kept.update(policy.choose(ordered))
    return tuple(step for step in ordered if step in kept)
