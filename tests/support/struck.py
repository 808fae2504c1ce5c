"""A job whose process is struck by a signal at an exact place: as one of its functions is entered.

struck_at("ray_ckpt.storage.publish:publish")    the start of a command line, before the job's own path
struck_at("ray_ckpt.cluster.group:_enlist", 2)   the second time
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from types import FrameType
from typing import Any


def struck_at(function: str, time: int = 1, number: signal.Signals = signal.SIGKILL) -> tuple[str, ...]:
    """The beginning of a command line.

    Args:
        function: `"module:name"` of a function or method.
        time: which of its calls, from 1.
    """
    return sys.executable, "-m", __name__, function, str(time), str(int(number))


def strike_at(function: str, time: int = 1, number: int = signal.SIGKILL) -> None:
    """Let the signal strike this process when this thread enters the function."""
    module, name = function.split(":")
    left = time

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event == "call" and frame.f_code.co_name == name and frame.f_globals.get("__name__") == module:
            left -= 1
            if left == 0:
                sys.setprofile(None)
                os.kill(os.getpid(), number)

    sys.setprofile(look)


def main() -> None:
    function, time, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.argv[:4] = []
    sys.path[0] = os.path.dirname(sys.argv[0])
    strike_at(function, time, number)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
