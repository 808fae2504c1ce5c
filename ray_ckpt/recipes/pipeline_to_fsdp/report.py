"""What the main job found, as one value: for the program that reads JSON and for the person at the screen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_ckpt.format.snapshot import Mismatch
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.screen import format_bytes

SHOWN_MISMATCHES = 40
"""Rows of the mismatch table on the screen; the JSON has all."""


@dataclass(frozen=True)
class JobReport:
    """The fields of the JSON object."""

    verified: bool
    """Everything arrived bit for bit, and training went on as if nothing had happened."""
    workers: int
    """Process-group backend of the first group."""
    backend: str
    source: str
    """Layout that was trained and saved; `from` in the JSON."""
    target: str
    """Layout that it was loaded into; `to` in the JSON, where `target` is its kind of data parallelism."""
    storage: str
    checkpoint_bytes: int
    tensors_compared: int
    objects_compared: int
    mismatches: list[Mismatch]
    losses: dict[str, list[float]]
    """`pipeline` (in the first layout) and `resumed` (in the second): one number per step; `reference`: the
    uninterrupted run's, one per step of both."""
    phases: dict[str, float]
    """Phase name -> seconds."""

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {"from": fields.pop("source"), "to": self.target, **fields, "target": Layout.parse(self.target).dp}

    def show(self, console: Console) -> None:
        """Print the phases with their rates, then the verdict."""
        table = Table("phase", "seconds", "bytes", "rate")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, seconds in self.phases.items():
            moved = self.checkpoint_bytes if name in ("save", "load") else 0
            table.add_row(
                name,
                f"{seconds:.2f}",
                format_bytes(moved) if moved else "",
                f"{format_bytes(moved / seconds)}/s" if moved else "",
            )
        console.print(table)
        if self.mismatches:
            console.print(_mismatch_table(self.mismatches))
        if self.losses["resumed"]:
            pipeline, resumed = self.losses["pipeline"], self.losses["resumed"]
            console.print(
                f"loss {pipeline[0]:.4f} -> {pipeline[-1]:.4f} as {self.source}, {resumed[0]:.4f} -> {resumed[-1]:.4f} "
                f"as {self.target}; largest relative difference to the uninterrupted run {self.loss_difference:.1e}",
                highlight=False,
                soft_wrap=True,
            )
        verdict = "[bold green]verified[/]" if self.verified else "[bold red]NOT VERIFIED[/]"
        console.print(
            f"{verdict}: {self.tensors_compared} tensors and {self.objects_compared} objects compared bit for bit, "
            f"{len(self.mismatches)} mismatches",
            highlight=False,
            soft_wrap=True,
        )

    @property
    def loss_difference(self) -> float:
        """The largest relative difference of a step's loss to the uninterrupted run's."""
        found = self.losses["pipeline"] + self.losses["resumed"]
        return max(abs(a - b) / abs(b) for a, b in zip(found, self.losses["reference"], strict=True))


def _mismatch_table(mismatches: list[Mismatch]) -> Table:
    table = Table("name", "expected", "found", "ranks", title="mismatches")
    for mismatch in mismatches[:SHOWN_MISMATCHES]:
        table.add_row(mismatch.name, mismatch.expected, mismatch.found, ", ".join(map(str, mismatch.ranks)))
    if len(mismatches) > SHOWN_MISMATCHES:
        table.add_row(f"and {len(mismatches) - SHOWN_MISMATCHES} more", "", "", "")
    return table
