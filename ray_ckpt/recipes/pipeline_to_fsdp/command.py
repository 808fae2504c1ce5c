"""The main job's command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.option("--workers", type=click.IntRange(min=1), default=4, help="Workers, pipeline stages and FSDP ranks.")
@click.option("--target", type=click.Choice(["fsdp2", "fsdp1"]), default="fsdp2", help="How to load.")
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
@click.option("--json", "json_path", metavar="PATH", help="Write the results as JSON; - for standard output.")
@click.option("--verbose", is_flag=True, help="Show what Ray and the workers print.")
def pipeline_to_fsdp(json_path: str | None, **options: Any) -> int:
    """Save a pipeline-parallel run stage by stage, load it with FSDP, and prove that nothing changed."""
    # Imported here, so that a wrong option costs no second of loading.
    from rich.console import Console

    from ray_ckpt.recipes.pipeline_to_fsdp import job
    from ray_ckpt.recipes.pipeline_to_fsdp.report import write_json
    from ray_ckpt.recipes.screen import Screen

    if json_path not in (None, "-") and not Path(str(json_path)).absolute().parent.is_dir():
        raise click.UsageError(f"--json {json_path}: there is no such directory to write it to")
    console = Console(stderr=json_path == "-")
    asked = job.Options(**options)
    job.check(asked)
    report = job.run(asked, Screen(console))
    report.show(console)
    if json_path is not None:
        write_json(report.to_json(), json_path)
    return 0 if report.verified else 1
