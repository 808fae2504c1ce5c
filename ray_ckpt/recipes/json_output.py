"""What a job hands to other programs, and to browsers: one JSON object, one page, a file of events."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ray_ckpt.events import Listeners


def check_json_path(path: str | None) -> None:
    """Refuse a path that could not be written, before the job begins.

    Raises:
        UsageError: it is a URI.
        click.UsageError: its directory does not exist.
    """
    if path is None or path == "-":
        return
    from ray_ckpt.storage.address import refuse_uri

    refuse_uri(path, "what --json names")
    if not Path(path).absolute().parent.is_dir():
        raise click.UsageError(f"--json {path}: there is no such directory to write it to")


def check_report_path(path: str | None) -> None:
    """Refuse a page that could not be drawn, before the job begins.

    Raises:
        UsageError: its directory does not exist, or a library is not installed.
    """
    if path is not None:
        from ray_ckpt.pictures.page import check_report_path as check

        check(path)


@contextlib.contextmanager
def events_written(path: str | None) -> Iterator[Listeners]:
    """Those who are told the job's events within the block: a file, where one is asked for.

    Raises:
        UsageError: it is a URI, or cannot be written.
    """
    from ray_ckpt.events import EventFile, Listeners

    if path is not None:
        from ray_ckpt.storage.address import refuse_uri

        refuse_uri(path, "what --events names")
    with contextlib.nullcontext() if path is None else EventFile(path) as file:
        yield Listeners(*filter(None, [file]))


@contextlib.contextmanager
def json_alone(path: str | None) -> Iterator[None]:
    """Within the block, what anybody prints goes to standard error if the JSON goes to `-`: a user's model, too, what
    it starts, and what is no Python."""
    if path != "-":
        yield
        return
    with contextlib.redirect_stdout(sys.stderr), _descriptor_redirected():
        yield


@contextlib.contextmanager
def _descriptor_redirected() -> Iterator[None]:
    try:
        out = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(out, 1)
        os.close(out)


def write_json(report: dict[str, Any], path: str) -> None:
    """Write one JSON object to a file, or to standard output for `-`."""
    text = json.dumps(report, indent=2)
    if path == "-":
        print(text)
    else:
        with open(path, "w") as file:
            file.write(text + "\n")
