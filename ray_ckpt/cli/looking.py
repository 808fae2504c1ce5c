"""ls, inspect, verify: what is there, and whether it is whole."""

from __future__ import annotations

from typing import Any

import click

from ray_ckpt.cli.output import (
    as_json,
    clock,
    count,
    json_option,
    more,
    printable,
    step_option,
    table,
    trusted_option,
    uri_argument,
)
from ray_ckpt.text_units import format_bytes

_PAGE = 40
"""Lines of one part of what `inspect` prints."""


@click.command()
@uri_argument()
@click.option("--front", metavar="URI", help="The store's front, such as ram://run: which step is in which tier.")
@json_option
def ls(uri: str, front: str | None, in_json: bool) -> int:
    """List the steps of a store, or the one checkpoint at URI.

    \b
    ray-ckpt ls /mnt/run
    ray-ckpt ls s3://bucket/run --json
    """
    from ray_ckpt.inspection.listing import list_steps
    from ray_ckpt.storage.store import CheckpointStore

    found = list_steps(uri if front is None else CheckpointStore(uri, front))
    is_damaged = any(step.damage for step in found.steps)
    if in_json:
        as_json(found)
        return int(is_damaged)
    rows = [
        [
            "-" if step.step is None else step.step,
            "damaged" if step.damage else "committed",
            clock(step.saved_s),
            format_bytes(step.total_bytes),
            step.layout or "-",
            step.saved_by.get("torch", "-"),
            step.kind,
            " ".join(
                filter(None, [*step.tiers, "pinned" * step.pinned, "latest" * (step.step == found.latest is not None)])
            ),
        ]
        for step in found.steps
    ]
    table(rows, head=["step", "state", "saved", "size", "layout", "torch", "written by", ""], right=[0, 3])
    for step in found.steps:
        if step.damage:
            click.echo(click.style(f"damaged: {printable(step.damage)}", fg="red"))
    if found.orphans:
        click.echo(
            f"{len(found.orphans)} files with {format_bytes(found.orphan_bytes)} belong to no step: of a save that "
            "failed or is under way; `ray-ckpt clean` shows those that are old enough to go"
        )
    return int(is_damaged)


@click.command()
@uri_argument()
@step_option
@click.option("--tree", "view", flag_value="tree", help="All modules, with shape, dtype and chunks.")
@click.option("--files", "view", flag_value="files", help="Which rank wrote which file.")
@click.option("--layout", "view", flag_value="layout", help="How the tensors are cut, and by what layout.")
@click.option("--tensor", metavar="NAME", help="One tensor: its chunks, and statistics of its elements.")
@trusted_option
@json_option
def inspect(uri: str, step: int | None, view: str | None, tensor: str | None, trusted: bool, in_json: bool) -> int:
    """Show what a checkpoint holds. Only `--tensor` reads more than its record.

    \b
    ray-ckpt inspect /mnt/run --step 100
    ray-ckpt inspect model.safetensors --tree
    ray-ckpt inspect /mnt/run --tensor model.embed.weight
    """
    from ray_ckpt.cli import pages
    from ray_ckpt.inspection.contents import inspect as inspect_checkpoint

    if tensor is not None:
        from ray_ckpt.inspection.statistics import tensor_statistics

        statistics = tensor_statistics(uri, tensor, step, trusted=trusted)
        as_json(statistics) if in_json else pages.show_tensor(statistics)
        return 0
    contents = inspect_checkpoint(uri, step, trusted=trusted)
    if in_json:
        as_json(pages.contents_as_data(contents))
    elif view == "tree":
        pages.show_tree(contents, max_lines=10 * _PAGE)
    elif view == "files":
        pages.show_files(contents, max_lines=2 * _PAGE)
    elif view == "layout":
        pages.show_layout(contents, max_lines=_PAGE)
    else:
        pages.show_overview(contents, max_lines=_PAGE)
    return 0


@click.command()
@uri_argument()
@step_option
@click.option("--signature", "public_key", metavar="KEY", help="Check its signature first, with this public key.")
@click.option("--scan-nan", is_flag=True, help="Also name the tensors that hold NaN or Inf, in the same read.")
@click.option("--ray", "on_ray", is_flag=True, help="Spread the reading over a Ray cluster, as tasks.")
@click.option("--address", help="With --ray: cluster to join.  [default: RAY_ADDRESS, a running one, or a local Ray]")
@click.option("--events", "events_path", metavar="FILE", help="Append what happens, one JSON object per line.")
@trusted_option
@json_option
def verify(
    uri: str,
    step: int | None,
    public_key: str | None,
    scan_nan: bool,
    on_ray: bool,
    address: str | None,
    events_path: str | None,
    trusted: bool,
    in_json: bool,
) -> int:
    """Read every byte of a checkpoint, and compare it with what was recorded when it was saved.

    The answer is no (exit code 1) when something is damaged, or with --scan-nan when a tensor holds NaN or Inf. What
    other programs wrote has few checksums or none: what could not be compared is said, and is no damage.

    \b
    ray-ckpt verify /mnt/run --step 100
    ray-ckpt verify s3://bucket/run --scan-nan
    ray-ckpt verify s3://bucket/run --ray --address 10.0.0.1:6379
    ray-ckpt verify /mnt/run --signature key.pub
    """
    from ray_ckpt.cli.progress import shown
    from ray_ckpt.recipes.json_output import events_written

    if address is not None and not on_ray:
        raise click.UsageError("--address is the cluster for --ray")
    signature = None
    if public_key is not None:
        from ray_ckpt.signing import verify_signature

        with shown("signature", quiet=in_json) as progress:
            signature = verify_signature(uri, public_key, step, progress=progress)
    with events_written(events_path) as events, shown("verify", quiet=in_json) as progress:
        options: dict[str, Any] = {"scan_nan": scan_nan, "trusted": trusted, "progress": progress, "events": events}
        if on_ray:
            from ray_ckpt.cluster.verifying import verify_by_tasks

            report = verify_by_tasks(uri, step, address=address, **options)
        else:
            from ray_ckpt.checkpoint.verifying import verify as verify_checkpoint

            report = verify_checkpoint(uri, step, **options)
    odd = report.nonfinite or {}
    if in_json:
        as_json({"report": report, "verified": report.verified, "nonfinite": odd, "signature": signature})
    else:
        if signature is not None:
            click.echo(printable(signature))
        for damage in report.damages[:_PAGE]:
            click.echo(click.style(f"damaged: {printable(damage)}", fg="red"))
        more(report.damages, _PAGE, "damaged ranges")
        for name, found in list(odd.items())[:_PAGE]:
            click.echo(f"{printable(name)}: {count(found.num_nan)} NaN, {count(found.num_inf)} Inf")
        more(odd, _PAGE, "tensors")
        click.echo(
            printable(report if not report.damages else f"DAMAGED: {len(report.damages)} ranges of {report.uri}")
        )
    return int(bool(report.damages or odd))


@click.command()
@uri_argument()
@click.option("-o", "--output", required=True, metavar="FILE", help="The HTML file; one that is there is replaced.")
@step_option
@click.option("--target", metavar="LAYOUT", help="Who would read what in this layout, such as fsdp2x2.tp2.")
@click.option("--verify/--no-verify", default=True, help="Read and compare every byte, too.  [default: verify]")
@trusted_option
@json_option
def report(
    uri: str, output: str, step: int | None, target: str | None, verify: bool, trusted: bool, in_json: bool
) -> int:
    """Draw a checkpoint as one HTML page: its modules, which rank wrote and which would read what, what is damaged.

    The page needs no network. It holds its numbers as the JSON that --json prints. Exit code 1 when something is
    damaged; the page says what.

    \b
    ray-ckpt report /mnt/run -o report.html
    ray-ckpt report s3://bucket/run --step 100 -o report.html --target fsdp2x2.tp2
    """
    from ray_ckpt.cli.progress import shown
    from ray_ckpt.pictures.page import write_report

    with shown("verify", quiet=in_json) as progress:
        page = write_report(uri, output, step, layout=target, verify=verify, trusted=trusted, progress=progress)
    if in_json:
        as_json(page)
    else:
        click.echo(printable(f"{output}: {page.num_tensors} tensors of {page.uri}"))
        if page.damaged:
            click.echo(click.style(f"damaged: {printable(page.damaged)}", fg="red"))
    return int(bool(page.damaged))


COMMANDS = (ls, inspect, verify, report)
