"""A job's command in this process: for what it refuses before it goes to Ray."""

from __future__ import annotations

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
    monkeypatch.setattr(sys, "argv", ["job.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, message)


def assert_one_line(text: str, message: str) -> None:
    [line] = text.splitlines()
    assert line.startswith("error: ")
    assert message in line
