"""How every job's command ends: one rule for exit codes and messages.

0    what was asked is done, and verified     1    it failed, or what arrived differs
2    wrong use: one line, nothing touched     130  Ctrl-C        143  SIGTERM, which `ray job stop` sends
141  who read its output reads no more, as `head` does once it has its lines
"""

from __future__ import annotations

import errno
import os
import pkgutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INSIST_S = 1.0
"""How long after a signal it is raised again, if nothing has come of it."""


_OUTPUT_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What the file that the output goes to may fail with. A storage's failures are exceptions of ours."""

_OUR_ERRORS = "ray_ckpt.errors."
"""Begins the qualified names of our exceptions."""


def main(command: str) -> None:
    """Run the command and leave the process with its exit code. Failures are one line on standard error.

    Args:
        command: `"package.module:name"` of a click command, which is imported here, after signals have a handler.
    """
    with _Signals().raised():
        code = _run(command)
    sys.exit(code)


def _run(command: str) -> int:
    output = sys.stdout
    try:
        import click

        from ray_ckpt.errors import RayCkptError, UsageError, WorkerError
        from ray_ckpt.text import without_credentials

        try:
            return int(pkgutil.resolve_name(command).main(standalone_mode=False) or 0)
        except click.ClickException as error:
            return _fail(without_credentials(error.format_message()), code=2)
        except UsageError as error:
            return _fail(str(error), code=2)
        except WorkerError as error:
            # A process that died has left none, and an error of ours says in its message what is to be known.
            others = [failure for failure in error.failures if not failure.error_type.startswith(_OUR_ERRORS)]
            if tracebacks := WorkerError(tuple(others)).tracebacks():
                print(tracebacks, file=sys.stderr)
            return _fail(str(error), code=1)
        except RayCkptError as error:
            return _fail(str(error), code=1)
        except click.Abort:
            # What click makes of KeyboardInterrupt.
            return _fail("interrupted", code=128 + signal.SIGINT)
    except KeyboardInterrupt:
        return _fail("interrupted", code=128 + signal.SIGINT)
    except OSError as error:
        if error.filename is not None or error.errno not in _OUTPUT_ERRORS:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more as it ends
        return _fail(f"the output cannot be written: {error}", code=1)
    except SystemExit as error:
        if sys.stdout is not output:
            return 128 + signal.SIGPIPE  # by a broken pipe: click puts up another output, and leaves
        if error.code in (signal.SIGTERM, 1):
            # What our handler and Ray's own raise, and what a wait of Ray's makes of that. Nothing else here leaves so.
            return _fail("terminated", code=128 + signal.SIGTERM)
        raise


class _Signals:
    """Raises SIGINT as KeyboardInterrupt and SIGTERM as SystemExit; once the job has ended, both are ignored.

    What a signal raises is lost where Python cannot raise, as in a destructor, or in a callback from C. So it is raised
    again, until an exception is on its way.
    """

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._insisting = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Take the signals from here on. A SIGINT that is ignored, as in a shell's background, stays so."""
        numbers = signal.SIGINT, signal.SIGTERM
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        hook = sys.unraisablehook
        sys.unraisablehook = lambda lost: hook(lost) if lost.exc_type not in (KeyboardInterrupt, SystemExit) else None
        try:
            yield
        finally:
            self._ended.set()
            for number in numbers:
                signal.signal(number, signal.SIG_IGN)  # which Python, unlike a handler, leaves in place as it ends
            sys.unraisablehook = hook

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._insisting:
            threading.Thread(target=self._insist, args=(number,), daemon=True).start()
        elif sys.exc_info()[0] is not None:
            return  # it is on its way, and what is cleaned up meanwhile is not to be interrupted
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(number)

    def _insist(self, number: int) -> None:
        main_thread = threading.main_thread().ident
        assert main_thread is not None, "it has started"
        while not self._ended.wait(INSIST_S):
            self._insisting = True
            signal.pthread_kill(main_thread, number)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
