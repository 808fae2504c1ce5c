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
    """What to keep of any committed steps, given in ascending order."""

    text: str
    """As it was asked for."""
    choose: Callable[[Sequence[int]], Collection[int]]
    """Those of the steps that are kept."""

    def __or__(self, other: Policy) -> Policy:
        return Policy(f"{self.text} | {other.text}", lambda steps: {*self.choose(steps), *other.choose(steps)})

    def __repr__(self) -> str:
        return self.text


def keep_last(count: int) -> Policy:
    """The `count` highest steps.

    Raises:
        UsageError: `count` is less than 1.
    """
    if count < 1:
        raise UsageError(f"keep_last({count}) would keep nothing: the count starts at 1")
    return Policy(f"keep_last({count})", lambda steps: steps[-count:])


def keep_every(interval: int) -> Policy:
    """Every step that is a multiple of `interval`.

    Raises:
        UsageError: `interval` is less than 1.
    """
    if interval < 1:
        raise UsageError(f"keep_every({interval}): the interval starts at 1")
    return Policy(f"keep_every({interval})", lambda steps: [step for step in steps if step % interval == 0])


def keep(wanted: Iterable[int]) -> Policy:
    """These steps."""
    chosen = frozenset(wanted)
    return Policy(f"keep({sorted(chosen)})", lambda steps: [step for step in steps if step in chosen])


def retained(steps: Iterable[int], policies: Iterable[Policy], pins: Collection[int] = ()) -> tuple[int, ...]:
    """What stays, ascending: what a policy keeps, what is pinned, and always the highest step.

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
