"""How every job's command ends: one rule for exit codes and messages.

0    what was asked is done, and verified     1    it failed, or what arrived differs
2    wrong use: one line, nothing touched     130  Ctrl-C        143  SIGTERM, which `ray job stop` sends
"""

from __future__ import annotations

import signal
import sys

import click

from ray_ckpt.errors import RayCkptError, UsageError, WorkerError


def main(command: click.Command) -> None:
    """Run the command and leave the process with its exit code. Failures are one line on standard error."""
    sys.exit(_run(command))


def _run(command: click.Command) -> int:
    try:
        return int(command.main(standalone_mode=False) or 0)
    except click.ClickException as error:
        return _fail(error.format_message(), code=2)
    except UsageError as error:
        return _fail(str(error), code=2)
    except WorkerError as error:
        print(error.tracebacks(), file=sys.stderr)
        return _fail(str(error), code=1)
    except RayCkptError as error:
        return _fail(str(error), code=1)
    except click.Abort:
        # What click makes of KeyboardInterrupt.
        return _fail("interrupted", code=128 + signal.SIGINT)
    except SystemExit as error:
        if error.code in (signal.SIGTERM, 1):
            # What Ray's own handler raises, and what a wait of Ray's makes of that. Nothing else here leaves so.
            return _fail("terminated", code=128 + signal.SIGTERM)
        raise


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
