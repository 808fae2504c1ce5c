"""Signals wait while Ray connects or leaves: an exception in the middle of either may end in a crash of Ray's core."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ray_ckpt.cluster.ray_internals import without_signal_handlers

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM at the end of the block, to the handlers that they had before.

    Ray's own handler of SIGTERM, which ends Python in an orderly way, is left in place where there was none. A second
    signal is not deferred, so that a person can end a connection that takes forever.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # the handlers are not ours to change here, nor Ray's
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        handler = before[signal.Signals(number)]
        if came and callable(handler):
            handler(number, frame)
        came.append(number)

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        with without_signal_handlers() as wished:
            yield
    finally:
        if wished and before[signal.SIGTERM] is signal.SIG_DFL:
            before[signal.SIGTERM] = wished[-1]
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
