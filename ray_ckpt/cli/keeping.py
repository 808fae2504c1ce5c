"""prune, clean, delete, pin, unpin, ram: what stays in a store. What would go is shown first, and goes with --yes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ray_ckpt.cli.output import as_json, json_option, more, printable, uri_argument
from ray_ckpt.text_units import format_bytes

if TYPE_CHECKING:
    from ray_ckpt.report import RemovalReport
    from ray_ckpt.storage.store import CheckpointStore

_PAGE = 20
"""Files that are listed."""

_yes = click.option("--yes", is_flag=True, help="Do it. Without this only what would go is shown.")
_steps = click.argument("steps", metavar="STEP...", type=click.IntRange(min=0), nargs=-1, required=True)


def _store_at(uri: str) -> CheckpointStore:
    """The store, also one without a step: a run may not have saved yet.

    Raises:
        CheckpointNotFoundError: nothing at all is there, as where the address is misspelled.
    """
    from ray_ckpt.errors import CheckpointNotFoundError
    from ray_ckpt.storage.files import Storage
    from ray_ckpt.storage.store import CheckpointStore

    storage = Storage(uri)
    if not (storage.list_files() or storage.list_directories()):
        raise CheckpointNotFoundError(f"no store at {storage.address}: nothing is there")
    return CheckpointStore(storage)


@click.command()
@uri_argument()
@click.option("--keep-last", type=click.IntRange(min=1), metavar="N", help="Keep the N highest steps.")
@click.option("--keep-every", type=click.IntRange(min=1), metavar="N", help="Keep every step that is a multiple of N.")
@click.option("--keep", "named", type=click.IntRange(min=0), metavar="STEP", multiple=True, help="Keep this step.")
@_yes
@json_option
def prune(
    uri: str, keep_last: int | None, keep_every: int | None, named: tuple[int, ...], yes: bool, in_json: bool
) -> int:
    """Remove the steps that none of the options keeps. Pinned steps and the highest good one always stay.

    \b
    ray-ckpt prune /mnt/run --keep-last 3 --keep-every 1000
    ray-ckpt prune /mnt/run --keep-last 3 --keep-every 1000 --yes
    """
    from ray_ckpt.storage import retention

    policies = [retention.keep_last(keep_last)] if keep_last else []
    policies += [retention.keep_every(keep_every)] if keep_every else []
    policies += [retention.keep(named)] if named else []
    if not policies:
        raise click.UsageError("say what to keep: --keep-last, --keep-every or --keep")
    report = _store_at(uri).prune(*policies, dry_run=not yes)
    _show(report, in_json, "steps that no option keeps")
    return 0


@click.command()
@uri_argument()
@click.option(
    "--older-than",
    "hours",
    type=click.FloatRange(min=0),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="Leave alone what was written later. 0 takes all, so only when nobody is saving.",
)
@_yes
@json_option
def clean(uri: str, hours: float, yes: bool, in_json: bool) -> int:
    """Remove what failed saves and deletes have left: files of ours that no manifest names. URI is a store, or the
    directory of one checkpoint.

    \b
    ray-ckpt clean /mnt/run
    ray-ckpt clean /mnt/run --older-than 48 --yes
    """
    report = _store_at(uri).clean(older_than_s=hours * 3600, dry_run=not yes)
    _show(report, in_json, "files that no manifest names")
    return 0


@click.command()
@uri_argument()
@_steps
@_yes
@json_option
def delete(uri: str, steps: tuple[int, ...], yes: bool, in_json: bool) -> int:
    """Remove steps, also the latest. A pinned step stays, and nothing is removed if one of them is.

    \b
    ray-ckpt delete /mnt/run 300 400
    ray-ckpt delete /mnt/run 300 400 --yes
    """
    from ray_ckpt.storage.store import CheckpointStore

    _show(CheckpointStore(uri).delete(*steps, dry_run=not yes), in_json, "the named steps")
    return 0


@click.command()
@uri_argument()
@_steps
@json_option
def pin(uri: str, steps: tuple[int, ...], in_json: bool) -> int:
    """Keep steps, whatever policies say, until they are unpinned.

    \b
    ray-ckpt pin /mnt/run 300
    """
    from ray_ckpt.storage.store import CheckpointStore

    store = CheckpointStore(uri)
    for step in steps:
        store.pin(step)
    _show_pins(store.pins(), in_json)
    return 0


@click.command()
@uri_argument()
@_steps
@json_option
def unpin(uri: str, steps: tuple[int, ...], in_json: bool) -> int:
    """Let policies decide again.

    \b
    ray-ckpt unpin /mnt/run 300
    """
    from ray_ckpt.storage.store import CheckpointStore

    store = CheckpointStore(uri)
    for step in steps:
        store.unpin(step)
    _show_pins(store.pins(), in_json)
    return 0


@click.command()
@click.option("--drop", "name", metavar="NAME", required=True, help="Free all that ram://NAME holds, on all nodes.")
@json_option
def ram(name: str, in_json: bool) -> int:
    """End a storage in the memory of the cluster that RAY_ADDRESS names, or that `ray start` left on this machine.

    Exit code 1 when there is none of that name.

    \b
    ray-ckpt ram --drop run1
    """
    from ray_ckpt.cluster.ram.client import drop_memory

    name = name.removeprefix("ram://")
    dropped = drop_memory(name)
    if in_json:
        as_json({"dropped": dropped})
    else:
        click.echo(f"ram://{name} is dropped" if dropped else f"there is no ram://{name}")
    return int(not dropped)


def _show(report: RemovalReport, in_json: bool, what: str) -> None:
    if in_json:
        as_json(report)
        return
    verb = "would remove" if report.dry_run else "removed"
    steps = f"steps {', '.join(map(str, report.removed))}" if report.removed else "no step"
    click.echo(f"{verb} {what}: {steps}; {len(report.files)} files with {format_bytes(report.total_bytes)}")
    for name in report.files[:_PAGE]:
        click.echo(f"  {printable(name)}")
    more(report.files, _PAGE, "files")
    for name in report.uploads[:_PAGE]:
        click.echo(f"  {printable(name)}: an upload that was cut off")
    more(report.uploads, _PAGE, "uploads")
    if report.kept:
        click.echo(f"kept: {', '.join(map(str, report.kept))}")
    for step, damage in report.damages.items():
        click.echo(printable(f"damaged, neither counted nor removed: step {step}: {damage}"))
    if report.dry_run and (report.removed or report.files or report.uploads):
        click.echo("nothing was removed; give --yes to do it")


def _show_pins(pins: tuple[int, ...], in_json: bool) -> None:
    if in_json:
        as_json({"pins": pins})
    else:
        click.echo(f"pinned: {', '.join(map(str, pins)) or 'none'}")


COMMANDS = (prune, clean, delete, pin, unpin, ram)
