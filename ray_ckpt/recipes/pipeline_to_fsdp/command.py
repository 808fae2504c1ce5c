"""The main job's command line."""

from __future__ import annotations

from typing import Any

import click

from ray_ckpt.recipes.json_output import check_json_path, check_report_path, events_written, json_alone, write_json


@click.command(context_settings={"show_default": True})
@click.option("--from", "source", metavar="LAYOUT", help="Layout to train and save in.  [default: pp4]")
@click.option("--to", "target", metavar="LAYOUT", help="Layout to load into.  [default: fsdp2x4]")
@click.option("--workers", type=click.IntRange(min=1), default=4, help="Short for --from ppN --to fsdp2xN.")
@click.option("--target", "kind", type=click.Choice(["fsdp2", "fsdp1"]), help="Short for --to KINDxN.")
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Training steps before the save, and after.")
@click.option("--dim", type=click.IntRange(min=1), default=500, help="Width of each layer of the default model.")
@click.option("--layers", type=click.IntRange(min=1), default=4, help="Layers of the default model.")
@click.option("--model", metavar="PKG.MODULE:FACTORY", help="Your own model instead of the default one.")
@click.option("--storage", metavar="PATH|URI", help="Shared storage.  [default: a temporary directory]")
@click.option("--overwrite", is_flag=True, help="Replace a checkpoint that is already there.")
@click.option("--address", help="Ray cluster to join.  [default: RAY_ADDRESS, a running one, or a local Ray]")
@click.option("--backend", metavar="NAME", help="Process-group backend.  [default: NCCL with a GPU each, else gloo]")
@click.option("--cpus-per-worker", type=click.FloatRange(min=0), help="[default: 1, or the share the cluster has]")
@click.option("--gpus-per-worker", type=click.FloatRange(min=0), help="[default: 1, or the share the cluster has]")
@click.option("--start-timeout", "start_timeout_s", type=click.FloatRange(min=1), default=300.0, help="Seconds.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=1), default=1800.0, help="Seconds for each phase.")
@click.option("--report", metavar="FILE", help="Draw the checkpoint and the run as one HTML page.")
@click.option("--json", "json_path", metavar="PATH", help="Write the results as JSON; - for standard output.")
@click.option("--events", "events_path", metavar="FILE", help="Append what happens, one JSON object per line.")
@click.option("--verbose", is_flag=True, help="Show what Ray and the workers print.")
def pipeline_to_fsdp(
    json_path: str | None,
    events_path: str | None,
    source: str | None,
    target: str | None,
    workers: int,
    kind: str | None,
    **options: Any,
) -> int:
    """Save a pipeline-parallel run stage by stage, load it with FSDP, and prove that nothing changed.

    Or from any layout to any other: tokens joined by dots, such as pp2.fsdp2x2.tp2. Known are single, ppN, ppNxV (V
    stages on each of N ranks), ddpN, fsdp1xN, fsdp2xN, hsdpRxS (R replicas of S shards), tpN and epN.
    """
    # Imported here, so that a wrong option costs no second of loading.
    from rich.console import Console

    from ray_ckpt.parallel.layout import Layout
    from ray_ckpt.recipes.pipeline_to_fsdp import job
    from ray_ckpt.recipes.screen import Screen
    from ray_ckpt.recipes.setting import check_layouts

    check_json_path(json_path)
    check_report_path(options["report"])
    if target is not None and kind is not None:
        raise click.UsageError(f"--target {kind} is short for --to {kind}x{workers}: give one of the two")
    asked = job.Options(
        source=Layout.parse(source or f"pp{workers}"),
        target=Layout.parse(target or f"{kind or 'fsdp2'}x{workers}"),
        **options,
    )
    with events_written(events_path) as events, json_alone(json_path):
        console = Console()
        screen = Screen(console, events)
        check_layouts(asked.workload, (asked.source, asked.target), screen)
        report = job.run(asked, screen)
        report.show(console)
    if json_path is not None:
        write_json(report.to_json(), json_path)
    return 0 if report.verified else 1
