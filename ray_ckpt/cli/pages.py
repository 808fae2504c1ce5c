"""What `inspect` prints: a page, however many tensors there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ray_ckpt.cli.output import count, more, printable, table
from ray_ckpt.text import listed
from ray_ckpt.text_units import format_bytes

if TYPE_CHECKING:
    from ray_ckpt.inspection.contents import CheckpointContents
    from ray_ckpt.inspection.statistics import TensorStatistics

_WIDEST_BAR = 40
_MOST_GROUPS = 10
_MOST_CHUNKS = 20


def show_overview(contents: CheckpointContents, *, max_lines: int) -> None:
    """Sections, modules, hyper-parameters and values."""
    _show_head(contents)
    rows = [
        [s.name, count(s.num_tensors), count(s.num_elements), format_bytes(s.num_bytes), count(s.num_values)]
        for s in contents.sections()[:max_lines]
    ]
    table(rows, head=["section", "tensors", "elements", "size", "values"], right=[1, 2, 3, 4])
    click.echo()
    show_tree(contents, max_lines=max_lines)
    groups = contents.groups()
    for number, group in enumerate(groups[:_MOST_GROUPS]):
        values = ", ".join(f"{key}={value!r}" for key, value in group.values.items())
        click.echo(f"\nhyper-parameters {number}: {printable(values, at_most=300)}")
        click.echo(f"  of {len(group.parameters)} parameters: {printable(listed(group.parameters, at_most=3))}")
    if groups:
        click.echo()
    more(groups, _MOST_GROUPS, "groups of hyper-parameters")
    values_of = contents.values()
    for name in list(values_of)[:max_lines]:
        click.echo(printable(f"{name} = {values_of[name]!r}", at_most=120))
    more(values_of, max_lines, "values")


def show_tree(contents: CheckpointContents, *, max_lines: int) -> None:
    """The names as a tree."""
    from ray_ckpt.inspection.modules import module_tree

    lines = module_tree(contents.manifest.tensors, max_lines=max_lines)
    rows = [
        [
            "  " * line.depth + line.name,
            count(line.num_elements),
            format_bytes(line.num_bytes),
            line.text or _tensors(line),
        ]
        for line in lines
    ]
    table(rows, head=["module", "elements", "size", ""], right=[1, 2])


def show_files(contents: CheckpointContents, *, max_lines: int) -> None:
    """Who wrote what."""
    _show_head(contents)
    rows = [
        [
            "-" if f.rank is None else f.rank,
            f.name,
            format_bytes(f.num_bytes),
            count(f.num_tensors),
            count(f.num_values),
        ]
        for f in contents.files()[:max_lines]
    ]
    table(rows, head=["rank", "file", "size", "tensors", "values"], right=[0, 2, 3, 4])
    more(contents.manifest.files, max_lines, "files")


def show_layout(contents: CheckpointContents, *, max_lines: int) -> None:
    """How tensors are cut."""
    _show_head(contents)
    ranks = {file.name: file.rank for file in contents.files()}
    cuts: dict[str, list[Any]] = {}
    for tensor in contents.tensors():
        writers = sorted({"?" if ranks[file] is None else str(ranks[file]) for _, _, file in tensor.chunks})
        row = cuts.setdefault(f"{len(tensor.chunks)} chunks by ranks {listed(writers, at_most=8)}", [0, 0, tensor.name])
        row[0] += 1
        row[1] += tensor.num_bytes
    rows = [
        [cut, count(number), format_bytes(num_bytes), example] for cut, (number, num_bytes, example) in cuts.items()
    ]
    table(rows[:max_lines], head=["cut into", "tensors", "size", "such as"], right=[1, 2])
    more(rows, max_lines, "kinds")


def show_tensor(found: TensorStatistics) -> None:
    """One tensor: where it lies, and what is in it."""
    click.echo(f"{printable(found.name)}: {found.dtype} {list(found.shape)}, {format_bytes(found.num_bytes)}")
    rows = [[list(offsets), list(sizes), file] for offsets, sizes, file in found.chunks[:_MOST_CHUNKS]]
    table(rows, head=["chunk at", "size", "file"])
    more(found.chunks, _MOST_CHUNKS, "chunks")
    click.echo(f"min {found.minimum!r}  max {found.maximum!r}  mean {found.mean!r}  std {found.std!r}")
    click.echo(f"{count(found.num_nan)} NaN, {count(found.num_inf)} Inf")
    most = max((number for _, _, number in found.histogram), default=0) or 1
    for start, end, number in found.histogram:
        bar = "#" * round(_WIDEST_BAR * number / most)
        click.echo(f"[{start:>12.5g}, {end:>12.5g})  {count(number):>14}  {bar}".rstrip())


def contents_as_data(contents: CheckpointContents) -> dict[str, Any]:
    """What `--json` prints."""
    manifest = contents.manifest
    return {
        "uri": contents.uri,
        "step": contents.step,
        "kind": contents.kind,
        "notes": contents.notes,
        "layout": manifest.layout,
        "saved_by": manifest.saved_by,
        "total_bytes": manifest.total_bytes,
        "sections": contents.sections(),
        "tensors": list(contents.tensors()),
        "groups": contents.groups(),
        "values": contents.values(),
        "files": contents.files(),
    }


def _show_head(contents: CheckpointContents) -> None:
    manifest = contents.manifest
    step = "" if contents.step is None else f", step {contents.step}"
    by = ", ".join(f"{name} {version}" for name, version in manifest.saved_by.items())
    click.echo(
        printable(
            f"{contents.uri}{step}: {contents.kind}, {format_bytes(manifest.total_bytes)} in {len(manifest.files)} "
            f"files, layout {manifest.layout or 'not recorded'}" + (f", saved with {by}" if by else "")
        )
    )
    for note in contents.notes:
        click.echo(printable(f"note: {note}"))
    click.echo()


def _tensors(line: Any) -> str:
    return f"{count(line.num_tensors)} tensors"
