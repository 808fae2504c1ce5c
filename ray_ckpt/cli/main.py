"""The command's entry point. Nothing here loads torch, Ray or pyarrow: a command does when it runs."""

from __future__ import annotations

import os
import pkgutil

import click

import ray_ckpt
from ray_ckpt.cli import comparing, examining, keeping, looking, moving, signing
from ray_ckpt.recipes.command import main

__all__ = ["cli", "run"]

_JOBS = {
    "demo": "ray_ckpt.recipes.pipeline_to_fsdp.command:pipeline_to_fsdp",
    "reshard": "ray_ckpt.recipes.reshard.command:reshard",
    "train": "ray_ckpt.recipes.train_elastic.command:train_elastic",
}
"""The jobs, which `jobs/*.py` run too."""


class _Commands(click.Group):
    """Commands of this room, and the jobs, which are imported only when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_JOBS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _JOBS:
            command: click.Command = pkgutil.resolve_name(_JOBS[cmd_name])
            return command
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(ray_ckpt.__version__, prog_name="ray-ckpt", message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Look at checkpoints, check them, compare them and keep them in order.

    A URI is a local path or an object store's, such as s3://bucket/run: of a store of steps, or of one checkpoint, ours
    or another program's. `--step` picks a step of a store; without it the highest is taken.

    \b
    Exit codes:  0  fine    1  the answer is no, or it failed    2  wrong use
    Completion:  eval "$(_RAY_CKPT_COMPLETE=bash_source ray-ckpt)"      (or zsh_source, fish_source)
    """
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        ctx.color = False  # else click asks the terminal


for _command in (
    *looking.COMMANDS,
    *comparing.COMMANDS,
    *moving.COMMANDS,
    *keeping.COMMANDS,
    *examining.COMMANDS,
    *signing.COMMANDS,
):
    cli.add_command(_command)


def run() -> None:
    """Run the command that the process was started with, and leave with its exit code."""
    main("ray_ckpt.cli.main:cli")
