"""The command, called in this process."""

from __future__ import annotations

import click.testing

from ray_ckpt.cli.main import cli
from ray_ckpt.errors import RayCkptError


def call(*arguments: object) -> tuple[int, str]:
    """Exit code and output; an error of ours is code 1 and its message."""
    found = click.testing.CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)
    if isinstance(found.exception, RayCkptError):
        return 1, str(found.exception)
    if found.exception is not None:
        raise found.exception
    return int(found.return_value or 0), found.stdout
