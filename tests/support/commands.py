"""A job's command in this process: for what it refuses before it goes to Ray."""

from __future__ import annotations

import signal
import sys

import click
import pytest

from ray_ckpt.recipes.command import main


def assert_refused(
    command: click.Command,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It ends with exit code 2, and one line on standard error that holds the message."""
    assert command.callback is not None
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as ended:
        main(f"{command.callback.__module__}:{command.callback.__name__}")
    for number, handler in before.items():
        signal.signal(number, handler)
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, message)


def assert_one_line(text: str, message: str) -> None:
    [line] = text.splitlines()
    assert line.startswith("error: ")
    assert message in line
