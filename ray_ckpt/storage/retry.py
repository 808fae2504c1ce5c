"""Which errors of a storage may pass by themselves, and how an operation is tried again after one."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from ray_ckpt.errors import StorageError, UsageError

__all__ = ["RetryPolicy", "is_transient", "retried"]

T = TypeVar("T")

_logger = logging.getLogger("ray_ckpt")

_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EINTR,
        errno.ETIMEDOUT,
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EPIPE,
        errno.ESTALE,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    }
)
_TRANSIENT_TEXT = re.compile(
    r"SLOW_?DOWN|THROTTL|TOO_?MANY_?REQUESTS|SERVICE_UNAVAILABLE|ServiceUnavailable|INTERNAL_FAILURE|InternalError"
    r"|REQUEST_TIMEOUT|RequestTimeout|NETWORK_CONNECTION|HTTP (?:status|response code):? ?(?:408|429|500|502|503|504)"
    r"|curlCode|[Tt]imed? ?out|[Cc]onnection (?:reset|aborted|refused|closed)"
)


@dataclass(frozen=True)
class RetryPolicy:
    """How transient errors are retried: after random waits whose upper limit doubles with every attempt.

    Example:
        >>> from ray_ckpt import RetryPolicy, Storage
        >>> patient = Storage("s3://bucket/run", retry=RetryPolicy(attempts=10, max_wait_s=60.0))

    Raises:
        UsageError: `attempts` is below 1, or the waits are not `0 <= first_wait_s <= max_wait_s`.
    """

    attempts: int = 7
    """Number of times that an operation is tried in all."""
    first_wait_s: float = 0.2
    """Upper limit of the first random wait."""
    max_wait_s: float = 20.0
    """Upper limit of every wait."""

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.first_wait_s < 0 or self.max_wait_s < self.first_wait_s:
            raise UsageError(f"{self} is not a policy: it needs attempts >= 1 and 0 <= first_wait_s <= max_wait_s")


def is_transient(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRNOS
    return isinstance(error, TimeoutError) or bool(_TRANSIENT_TEXT.search(str(error)))


def retried(action: Callable[[], T], policy: RetryPolicy, on_retry: Callable[[], object] = lambda: None) -> T:
    """Run an action, and again after each transient StorageError. Every retry is logged as a WARNING.

    Args:
        on_retry: called before each further try.

    Raises:
        StorageError: the error was not transient, or was still there at the last attempt.
    """
    try:
        return action()
    except StorageError as error:
        if not error.transient or policy.attempts == 1:
            raise
        _tell(error, attempt=1, policy=policy, wait_s=0.0)
        on_retry()
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(policy.attempts - 1),
        wait=tenacity.wait_random_exponential(multiplier=policy.first_wait_s, max=policy.max_wait_s),
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, StorageError) and error.transient),
        before_sleep=lambda state: _tell_of(state, policy, on_retry),
        reraise=True,
    )
    try:
        return retrying(action)
    except StorageError as error:
        if not error.transient:
            raise
        cause = f"{error.cause} (still so at attempt {policy.attempts})"
        raise StorageError(error.operation, error.path, cause, transient=True) from error


def _tell_of(state: tenacity.RetryCallState, policy: RetryPolicy, on_retry: Callable[[], object]) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    if isinstance(error, StorageError):
        _tell(error, attempt=state.attempt_number + 1, policy=policy, wait_s=state.upcoming_sleep)
    on_retry()


def _tell(error: StorageError, *, attempt: int, policy: RetryPolicy, wait_s: float) -> None:
    _logger.warning(
        "cannot %s %s at attempt %d of %d, trying again in %.1f s: %s",
        error.operation,
        error.path,
        attempt,
        policy.attempts,
        wait_s,
        error.cause,
    )
