"""write_report(target, path): one HTML file that shows a checkpoint, and needs nothing else to do so.

record, layout, reports of saves and loads, losses
  ── gather ──> PageReport       capped, so that the page opens whatever the checkpoint's size (contents.py)
  ── render ──> the page         tables by Jinja, which escapes every text; the same as JSON; charts from the JSON

Vega, which draws the charts, is part of the page. Its policy forbids it to ask the network for anything.
"""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ray_ckpt.errors import UsageError
from ray_ckpt.inspection.contents import CheckpointContents
from ray_ckpt.inspection.opening import Opened, open_record, size_problem
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.pictures.charts import charts
from ray_ckpt.pictures.contents import PageReport, Verification
from ray_ckpt.pictures.modules import module_map
from ray_ckpt.pictures.resharding import reshard_of, writers_of
from ray_ckpt.pictures.timeline import losses_of, operations_of, phases_of
from ray_ckpt.plain_data import plain
from ray_ckpt.progress import Progress
from ray_ckpt.report import LoadReport, SaveReport, VerifyReport
from ray_ckpt.storage.address import refuse_uri
from ray_ckpt.storage.resolve import Target, committed_at, held
from ray_ckpt.text import printable
from ray_ckpt.text_units import count, format_bytes

__all__ = ["check_report_path", "write_report"]

MAX_SECTIONS = 40
"""Sections that are listed."""

MAX_DAMAGES = 200
"""Damaged ranges that are listed."""

_LIBRARIES = {"vl_convert": "vl-convert-python", "jinja2": "jinja2"}


def write_report(
    target: Target,
    path: str | os.PathLike[str],
    step: int | None = None,
    *,
    layout: Layout | str | None = None,
    verify: bool | VerifyReport = True,
    trusted: bool = False,
    saves: Sequence[SaveReport] = (),
    loads: Sequence[Sequence[LoadReport]] = (),
    losses: Mapping[str, Mapping[int, float]] | None = None,
    events: Sequence[str] = (),
    progress: Progress | None = None,
) -> PageReport:
    """Draw a checkpoint as one HTML page that needs no network: modules, who wrote and who reads what, times, losses.

    The page holds its numbers as JSON too, in the element `report-data`: what this returns. Needs the extra `report`.

    Example:
        >>> import torch
        >>> from ray_ckpt import save, write_report
        >>> saved = save({"model": {"weight": torch.ones(4, 3)}}, "run", step=1)
        >>> losses = {"first": {0: 0.5, 1: 0.4}}
        >>> page = write_report("run", "report.html", layout="fsdp2x2", saves=[saved], losses=losses)
        >>> page.num_tensors, page.verification.verified, page.damaged
        (1, True, '')

    Args:
        target: a checkpoint, whoever wrote it, or a store.
        path: the HTML file; one that is there is replaced.
        step: number of the step in the store; by default the highest committed one.
        layout: the layout that reads the checkpoint, or would: `fsdp2x2.tp2` or a `Layout`.
        verify: read every byte and compare it with its checksum, or what such a look has found. With False only the
            files' sizes are looked at.
        trusted: as for `verify`.
        saves: reports of saves whose times are shown.
        loads: reports of loads: of each one per rank, in rank order. The last one is into `layout`, if it was this
            checkpoint that it loaded.
        losses: run -> training step -> loss.
        events: further lines, such as failures.
        progress: called with the bytes that were verified, and all that will be.

    Raises:
        UsageError: there is no such layout, the path cannot be written, or the extra is not installed.
        CheckpointNotFoundError: there is no such checkpoint.
        CheckpointError, StorageError: its record is damaged, or the storage does not answer.
    """
    check_report_path(path)
    reader = Layout.parse(layout) if isinstance(layout, str) else layout
    with held(lambda: committed_at(target, step)) as location:
        opened = open_record(location.storage, trusted=trusted)
        checked = verify if isinstance(verify, VerifyReport) else None
        if verify is True:
            from ray_ckpt.checkpoint.verifying import verify as verify_checkpoint  # it loads torch

            checked = verify_checkpoint(location.storage, trusted=trusted, progress=progress)
        report = _gather(opened, location.step, reader, checked, _Job(saves, loads, losses or {}, tuple(events)))
        try:
            # What is no text, such as half of a surrogate pair in a name, is spelled out.
            _write_whole(Path(path), _render(report).encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise UsageError(f"cannot write the report to {os.fspath(path)}: {error.strerror or error}") from error
        return report


def check_report_path(path: str | os.PathLike[str]) -> None:
    """Refuse what could not be written, before any work is done.

    Raises:
        UsageError: a library is not installed, or there is no such directory, or it is a URI.
    """
    if missing := [name for module, name in _LIBRARIES.items() if importlib.util.find_spec(module) is None]:
        raise UsageError(
            f"a report needs {' and '.join(missing)}, which is not installed: pip install 'ray-ckpt[report]'"
        )
    refuse_uri(path, "a report")
    if not Path(path).absolute().parent.is_dir() or Path(path).is_dir():
        raise UsageError(f"cannot write the report to {os.fspath(path)}: give a file in a directory that exists")


def _write_whole(path: Path, data: bytes) -> None:
    """All of a file or nothing, so that a full disk takes no earlier page."""
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(data)
        return
    path = path.resolve()
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _Job(NamedTuple):
    """What is not in the checkpoint."""

    saves: Sequence[SaveReport]
    loads: Sequence[Sequence[LoadReport]]
    losses: Mapping[str, Mapping[int, float]]
    events: tuple[str, ...]


def _gather(
    opened: Opened, step: int | None, reader: Layout | None, checked: VerifyReport | None, job: _Job
) -> PageReport:
    manifest = opened.manifest
    sections = CheckpointContents(opened.address, step, opened.kind, opened.notes, manifest).sections()
    phases, phases_aggregated = phases_of(job.saves, job.loads)
    losses, losses_aggregated = losses_of(job.losses)
    return PageReport(
        uri=opened.address,
        step=step,
        kind=opened.kind,
        notes=opened.notes,
        layout=manifest.layout,
        saved_by=manifest.saved_by,
        total_bytes=manifest.total_bytes,
        num_files=len(manifest.files),
        num_tensors=len(manifest.tensors),
        num_elements=sum(section.num_elements for section in sections),
        num_values=len(manifest.objects),
        damage=size_problem(opened),
        sections=sections[:MAX_SECTIONS],
        writers=writers_of(manifest),
        modules=module_map(manifest.tensors, _last_part(opened.address)),
        reshard=reshard_of(manifest, reader, job.loads[-1] if job.loads else ()),
        verification=None if checked is None else _verification(checked),
        operations=operations_of(job.saves, job.loads),
        phases=phases,
        phases_aggregated=phases_aggregated,
        losses=losses,
        losses_aggregated=losses_aggregated,
        events=job.events,
    )


def _verification(checked: VerifyReport) -> Verification:
    damages = checked.damages
    text = str(checked) if not damages else f"{len(damages)} ranges are damaged, of {len(checked.damaged)} names"
    return Verification(
        verified=checked.verified,
        text=text,
        total_bytes=checked.total_bytes,
        seconds=checked.seconds,
        num_damages=len(damages),
        damages=damages[:MAX_DAMAGES],
        num_unchecked=len(checked.unchecked),
    )


def _render(report: PageReport) -> str:
    import jinja2

    source = importlib.resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(bytes=format_bytes, count=count, line=printable)
    return environment.from_string(source).render(
        report=report,
        title=_last_part(report.uri),
        data=plain(report),
        charts=charts(report),
        vega=_vega(),
    )


@functools.lru_cache(maxsize=1)
def _vega() -> str:
    """Vega and what embeds it in a page: about 0.9 MB of JavaScript."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _last_part(uri: str) -> str:
    return uri.rstrip("/").rpartition("/")[2] or uri
