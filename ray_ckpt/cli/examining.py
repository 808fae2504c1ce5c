"""doctor: whether a cluster and a storage are fit for a long run."""

from __future__ import annotations

import click

from ray_ckpt.cli.output import as_json, json_option, printable

_COLORS = {"fine": "green", "note": "yellow", "wrong": "red"}


@click.command()
@click.option("--storage", metavar="URI", help="Where checkpoints will go, as every node knows it.")
@click.option("--address", help="Ray cluster to look at.  [default: RAY_ADDRESS, or a running one]")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=1),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="For the nodes to answer, in each of four rounds.",
)
@json_option
def doctor(storage: str | None, address: str | None, timeout_s: float, in_json: bool) -> int:
    """Look at a Ray cluster and a storage before a long run, and say what is wrong and how to mend it.

    Every node writes 64 MiB to the storage, which are removed again. Where no Ray is running, this machine is looked at
    alone. Exit code 1 when something is wrong.

    \b
    ray-ckpt doctor
    ray-ckpt doctor --storage s3://bucket/run --address 10.0.0.1:6379
    """
    from ray_ckpt.cluster.doctor import doctor as look

    report = look(storage, address, timeout_s=timeout_s)
    if in_json:
        as_json({"healthy": report.healthy, "findings": report.findings, "nodes": report.nodes})
    else:
        for finding in report.findings:
            click.echo(f"{click.style(finding.level.ljust(5), fg=_COLORS[finding.level])}  {printable(finding)}")
    return int(not report.healthy)


COMMANDS = (doctor,)
