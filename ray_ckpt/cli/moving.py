"""export, import: a checkpoint becomes what other programs read, and what they wrote becomes one of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ray_ckpt.cli.output import as_json, count, json_option, printable, step_option, trusted_option
from ray_ckpt.text_units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from ray_ckpt.report import ConversionReport

_ray = click.option("--ray", is_flag=True, help="Write the files as tasks on a Ray cluster.")
_address = click.option("--address", help="Ray cluster to join.  [default: RAY_ADDRESS, a running one, or a local Ray]")


class _Bytes(click.ParamType[int]):
    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else parse_bytes(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class _Rename(click.ParamType[tuple[str, str]]):
    name = "regex=to"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        pattern, equals, replacement = str(value).rpartition("=")
        if not equals or not pattern:
            self.fail(f"{value!r} is not REGEX=TO", param, ctx)
        return pattern, replacement


@click.command()
@click.argument("uri", metavar="URI")
@click.argument("target", metavar="TARGET")
@click.option(
    "--to",
    type=click.Choice(["safetensors", "torch", "dcp"]),
    required=True,
    help="What to write: a directory for transformers, a file for torch.load, or a directory for stock dcp.load.",
)
@step_option
@click.option(
    "--only", metavar="SECTION", multiple=True, help="A section that is wanted, such as model.  [default: all]"
)
@click.option("--dtype", metavar="DTYPE", help="Cast the model's floating-point weights: bf16, fp16, fp32, fp64.")
@click.option("--rename", type=_Rename(), metavar="REGEX=TO", multiple=True, help="Change names in the target.")
@click.option(
    "--max-shard", type=_Bytes(), default="5GB", show_default=True, metavar="SIZE", help="Size of a file, such as 5GB."
)
@click.option("--config", metavar="DIR", help="Directory with config.json and the tokenizer's files to copy.")
@trusted_option
@_ray
@_address
@json_option
def export(
    uri: str, target: str, rename: tuple[tuple[str, str], ...], max_shard: int, in_json: bool, **options: Any
) -> int:
    """Write a checkpoint as other programs read it. What was cut off goes on where it was.

    \b
    ray-ckpt export /mnt/run /mnt/weights --to safetensors --dtype bf16 --config /mnt/base-model
    ray-ckpt export /mnt/run --step 100 state.pt --to torch
    ray-ckpt export s3://bucket/run s3://bucket/stock --to dcp
    """
    from ray_ckpt.cli.progress import shown
    from ray_ckpt.conversion.exporting import export as export_checkpoint

    with shown("export", quiet=in_json) as progress:
        report = export_checkpoint(uri, target, rename=rename, max_shard_bytes=max_shard, progress=progress, **options)
    as_json(report) if in_json else _show(report, "exported")
    return 0


@click.command("import")
@click.argument("source", metavar="SOURCE")
@click.argument("target", metavar="TARGET")
@step_option
@click.option("--target-step", type=click.IntRange(min=0), help="Step of the target's store.  [default: it is none]")
@trusted_option
@_ray
@_address
@json_option
def import_(source: str, target: str, in_json: bool, **options: Any) -> int:
    """Make any checkpoint one of ours, with checksums. What was cut off goes on where it was.

    \b
    ray-ckpt import lightning.ckpt /mnt/run/step-100
    ray-ckpt import checkpoint-500 /mnt/run --target-step 500
    """
    from ray_ckpt.cli.progress import shown
    from ray_ckpt.conversion.importing import convert

    with shown("import", quiet=in_json) as progress:
        report = convert(source, target, progress=progress, **options)
    as_json(report) if in_json else _show(report, "imported")
    return 0


def _show(report: ConversionReport, verb: str) -> None:
    kept = f", {len(report.kept)} of them finished before" if report.kept else ""
    cast = f", {count(len(report.cast))} cast" if report.cast else ""
    click.echo(
        printable(
            f"{verb} {count(report.num_tensors)} tensors{cast} to {report.uri}: {len(report.files)} files{kept}, "
            f"{format_bytes(report.total_bytes)}, {report.seconds:.1f} s; read back and found equal to {report.source}"
        )
    )
    for reason in report.left_out:
        click.echo(printable(f"left out: {reason}"))


COMMANDS = (export, import_)
