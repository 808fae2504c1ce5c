"""The reshard job's command line."""

from __future__ import annotations

from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.option(
    "--source", required=True, metavar="PATH|URI", help="The checkpoint to rewrite, or the store of its steps."
)
@click.option("--to", required=True, metavar="LAYOUT", help="The layout to write it for, such as fsdp2x2.tp2.")
@click.option("--target", required=True, metavar="PATH|URI", help="Shared storage for the new checkpoint.")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is already there.")
@click.option("--report", metavar="FILE", help="Draw who wrote and who reads what as one HTML page.")
@click.option("--address", help="Ray cluster to join.  [default: RAY_ADDRESS, a running one, or a local Ray]")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=3600.0, help="Seconds for all tasks.")
@click.option("--events", "events_path", metavar="FILE", help="Append what happens, one JSON object per line.")
@click.option("--verbose", is_flag=True, help="Show what Ray and the tasks print.")
def reshard(events_path: str | None, **options: Any) -> int:
    """Rewrite a checkpoint so that every rank of a layout finds its own bytes in a file of its own."""
    # Imported here, so that a wrong option costs no second of loading.
    from rich.console import Console

    from ray_ckpt.recipes.json_output import check_report_path, events_written
    from ray_ckpt.recipes.reshard import job
    from ray_ckpt.recipes.screen import Screen

    check_report_path(options["report"])
    with events_written(events_path) as events:
        job.run(job.Options(**options), Screen(Console(), events))
    return 0
