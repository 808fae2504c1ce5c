"""diff: what differs between two checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ray_ckpt.cli.output import as_json, count, json_option, more, printable, table, trusted_option, uri_argument
from ray_ckpt.text_units import format_bytes

if TYPE_CHECKING:
    from ray_ckpt.inspection.differing import DiffReport

_PAGE = 40


@click.command()
@uri_argument("left")
@uri_argument("right")
@click.option("--left-step", type=click.IntRange(min=0), help="Step of the first store.  [default: the highest]")
@click.option("--right-step", type=click.IntRange(min=0), help="Step of the second store.  [default: the highest]")
@click.option("--values", is_flag=True, help="Also by how much elements differ.")
@trusted_option
@json_option
def diff(
    left: str, right: str, left_step: int | None, right_step: int | None, values: bool, trusted: bool, in_json: bool
) -> int:
    """Compare two checkpoints, whatever layouts or programs wrote them: exit code 1 when they differ.

    \b
    ray-ckpt diff /mnt/a /mnt/b
    ray-ckpt diff /mnt/run /mnt/run --left-step 100 --right-step 200 --values
    """
    from ray_ckpt.cli.progress import shown
    from ray_ckpt.inspection.differing import diff as diff_checkpoints

    with shown("diff", quiet=in_json) as progress:
        report = diff_checkpoints(
            left,
            right,
            left_step=left_step,
            right_step=right_step,
            values=values,
            trusted=trusted,
            progress=progress,
        )
    as_json({"report": report, "equal": report.equal}) if in_json else _show(report)
    return int(not report.equal)


def _show(report: DiffReport) -> None:
    for side, names in (("left", report.only_left), ("right", report.only_right)):
        for name in names[:_PAGE]:
            click.echo(printable(f"only {side}: {name}"))
        more(names, _PAGE, f"only {side}")
    rows = []
    for found in report.tensors[:_PAGE]:
        how = f"{found.left} / {found.right}" if found.left else ""
        if found.num_different is not None:
            how = f"{count(found.num_different)} elements"
        if found.max_absolute is not None and found.max_relative is not None:
            how += f", at most {found.max_absolute:.3g} apart, relative {found.max_relative:.3g}"
        rows.append([f"{found.what} differ" + "s" * (found.what != "elements"), found.name, how])
    table(rows)
    more(report.tensors, _PAGE, "tensors")
    for name, (left, right) in list(report.values.items())[:_PAGE]:
        click.echo(printable(f"value differs: {name}: {left} / {right}"))
    more(report.values, _PAGE, "values")
    for name in report.uncompared[:_PAGE]:
        click.echo(printable(f"value differs, or is the same in other bytes: {name}, which cannot be loaded safely"))
    more(report.uncompared, _PAGE, "such values")
    verdict = "equal" if report.equal else "different"
    click.echo(
        printable(
            f"{verdict}: {count(report.num_equal)} tensors are the same bit for bit; {report.num_by_fingerprint} were "
            f"compared by fingerprint, {format_bytes(report.bytes_read)} read"
        )
    )


COMMANDS = (diff,)
