"""The elastic job's command line."""

from __future__ import annotations

import signal
from typing import Any

import click

from ray_ckpt.recipes.json_output import check_json_path, check_report_path, events_written, json_alone, write_json


@click.command(context_settings={"show_default": True})
@click.option("--layouts", default="pp4,fsdp2x3,fsdp2x2,single", help="Preferred first, joined by commas.")
@click.option("--steps", type=click.IntRange(min=1), default=40, help="Steps to train in all.")
@click.option("--save-every", type=click.IntRange(min=1), default=5, help="Steps between saves.")
@click.option("--keep-last", type=click.IntRange(min=1), default=3, help="Checkpoints to keep.")
@click.option(
    "--wait-for-capacity",
    "wait_for_capacity_s",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Seconds to wait for room for the first layout before a later one is taken.",
)
@click.option("--grow", is_flag=True, help="Go back to an earlier layout at a checkpoint, when there is room again.")
@click.option("--max-failures", type=click.IntRange(min=0), default=3, help="Restarts before the job gives up.")
@click.option(
    "--grace", "grace_s", type=click.FloatRange(min=1), default=30.0, help="Seconds from SIGTERM to the end: saves."
)
@click.option("--dim", type=click.IntRange(min=1), default=500, help="Width of each layer of the default model.")
@click.option("--layers", type=click.IntRange(min=1), default=4, help="Layers of the default model.")
@click.option("--model", metavar="PKG.MODULE:FACTORY", help="Your own model instead of the default one.")
@click.option("--storage", metavar="PATH|URI", help="Shared storage, resumed from.  [default: a temporary directory]")
@click.option("--front", metavar="ram|URI", help="Save into the cluster's memory first; a URI as ram://run?replicas=2.")
@click.option(
    "--durable-every", type=click.IntRange(min=1), default=1, help="With --front: steps that are copied to --storage."
)
@click.option("--address", help="Ray cluster to join.  [default: RAY_ADDRESS, a running one, or a local Ray]")
@click.option("--backend", metavar="NAME", help="Process-group backend.  [default: NCCL with a GPU each, else gloo]")
@click.option("--cpus-per-worker", type=click.FloatRange(min=0), default=1.0)
@click.option("--gpus-per-worker", type=click.FloatRange(min=0), default=0.0)
@click.option("--start-timeout", "start_timeout_s", type=click.FloatRange(min=1), default=300.0, help="Seconds.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=1800.0, help="Seconds for each step.")
@click.option("--report", metavar="FILE", help="Draw the checkpoint and the run as one HTML page.")
@click.option("--json", "json_path", metavar="PATH", help="Write the results as JSON; - for standard output.")
@click.option("--events", "events_path", metavar="FILE", help="Append what happens, one JSON object per line.")
@click.option("--verbose", is_flag=True, help="Show what Ray and the workers print.")
def train_elastic(json_path: str | None, events_path: str | None, layouts: str, **options: Any) -> int:
    """Train on the first layout that fits, and go on in another when workers are lost."""
    # Imported here, so that a wrong option costs no second of loading.
    from rich.console import Console

    from ray_ckpt.parallel.layout import Layout
    from ray_ckpt.recipes.screen import Screen
    from ray_ckpt.recipes.train_elastic import job

    check_json_path(json_path)
    check_report_path(options["report"])
    asked = job.Options(layouts=tuple(Layout.parse(text.strip()) for text in layouts.split(",")), **options)
    with events_written(events_path) as events, json_alone(json_path):
        console = Console()
        screen = Screen(console, events)
        job.check(asked, screen)
        report = job.run(asked, screen)
        report.show(console)
    if json_path is not None:
        write_json(report.to_json(), json_path)
    return 128 + signal.SIGTERM if report.stopped else 0
