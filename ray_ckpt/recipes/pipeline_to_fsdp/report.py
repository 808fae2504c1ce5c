"""What the main job found, as one value: for the program that reads JSON and for the person at the screen."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ray_ckpt.format.snapshot import Mismatch
from ray_ckpt.parallel.layout import Layout
from ray_ckpt.recipes.pipeline_to_fsdp.continuation import Closeness, Continuation
from ray_ckpt.text_units import format_bytes

SHOWN_MISMATCHES = 40
"""Rows of the mismatch table on the screen; the JSON has all."""


@dataclass(frozen=True)
class JobReport:
    """What the job proved. `to_json` gives the fields of the JSON object."""

    bits_verified: bool
    """Every tensor and every value arrived, bit for bit."""
    continuation: Continuation | None
    """How training went on after the load; None: not tried, as other bits arrived."""
    workers: int
    """Number of workers in the first group."""
    backend: str
    """Process-group backend of the first group."""
    source: str
    """Layout that was trained and saved; `from` in the JSON."""
    target: str
    """Layout that it was loaded into; `to` in the JSON, where `target` is its kind of data parallelism."""
    storage: str
    checkpoint_bytes: int
    tensors_compared: int
    objects_compared: int
    mismatches: list[Mismatch]
    """Mismatches of the bits and of the continuation."""
    losses: dict[str, list[float]]
    """`pipeline` (in the first layout) and `resumed` (in the second): one number per step; `reference`: the
    uninterrupted run's, one per step of both."""
    phases: dict[str, float]
    """Phase name -> seconds."""

    @property
    def continuation_verified(self) -> bool:
        """Training went on as it would have without a save and a load."""
        return self.continuation is not None and not self.continuation.mismatches

    @property
    def verified(self) -> bool:
        """Both proofs hold."""
        return self.bits_verified and self.continuation_verified

    def to_json(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        if self.continuation is not None:
            del fields["continuation"]["mismatches"]  # they are among the job's
        return {
            "verified": self.verified,
            "bits_verified": fields.pop("bits_verified"),
            "continuation_verified": self.continuation_verified,
            "from": fields.pop("source"),
            "to": self.target,
            **fields,
            "target": Layout.parse(self.target).dp,
        }

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
        for text in self.verdicts:
            verdict, _, rest = text.partition(":")
            style = "bold red" if verdict.startswith("NOT") else "bold green"
            console.print(f"[{style}]{verdict}[/]:{escape(rest)}", highlight=False, soft_wrap=True)

    @property
    def verdicts(self) -> list[str]:
        """Whether the bits arrived, and whether training went on as it would have."""
        proofs = {
            self._describe_bits(): self.bits_verified,
            f"continuation: {self._describe_continuation()}": self.continuation_verified,
        }
        return [f"{'verified' if verified else 'NOT VERIFIED'}: {text}" for text, verified in proofs.items()]

    def _describe_bits(self) -> str:
        count = len(self.mismatches) - (len(self.continuation.mismatches) if self.continuation else 0)
        return (
            f"{self.tensors_compared} tensors and {self.objects_compared} objects compared bit for bit, "
            f"{count} mismatches"
        )

    def _describe_continuation(self) -> str:
        if self.continuation is None:
            return "not tried, as other bits arrived than were saved"
        found, num_steps = self.continuation, len(self.losses["reference"])
        parts = []
        if found.step is not None:
            parts.append(f"the next step differs by {_describe(found.step)}")
        if found.losses is not None:
            parts.append(f"the losses of {num_steps} steps by {_describe(found.losses)}")
        return "; ".join(filter(None, [", ".join(parts), found.note]))


def _describe(closeness: Closeness) -> str:
    return f"{closeness.difference:.1e} (allowed: {closeness.allowed:.1e})"


def _mismatch_table(mismatches: list[Mismatch]) -> Table:
    table = Table("name", "expected", "found", "ranks", title="mismatches")
    for mismatch in mismatches[:SHOWN_MISMATCHES]:
        table.add_row(mismatch.name, mismatch.expected, mismatch.found, ", ".join(map(str, mismatch.ranks)))
    if len(mismatches) > SHOWN_MISMATCHES:
        table.add_row(f"and {len(mismatches) - SHOWN_MISMATCHES} more", "", "", "")
    return table
