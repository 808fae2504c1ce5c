"""Flip single bits of checkpoints and see what becomes of it: found, harmless, or silently wrong. Then read checkpoints
that mean harm: every known kind, and made-up ones.

    python benchmarks/damage.py         3 000 flips of every kind of file, 1 000 made-up checkpoints of every kind
    python benchmarks/damage.py --count 300 --hostile 100 --seed 7

Every flip is one load (for `.metadata` one `verify`, and a load by stock DCP where that finds nothing) in this process;
every hostile checkpoint is one load in a process of its own, or of a few.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

import ray_ckpt
from ray_ckpt.errors import RayCkptError
from ray_ckpt.format.manifest import MANIFEST_NAME
from tests.support import amplified, hostile
from tests.support.isolated import Outcome, Readers

DEADLINE_S = 5.0
MEMORY_BYTES = 512 << 20

SAVED: dict[str, Any] = {
    "model": {"weight": torch.arange(700.0).reshape(20, 35), "bias": torch.arange(9).to(torch.bfloat16)},
    "optim": {"exp_avg": torch.full((20, 35), 0.5), "lr": 0.0003, "betas": (0.9, 0.999)},
    "step": 7,
    "shape": torch.Size([20, 35]),
}


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    kind: str
    tried: int = 0
    refused: int = 0
    """Inputs that ended in an error of ours, or that `verify` found."""
    right: int = 0
    """Inputs that loaded as what was saved: nothing that was flipped is read, or means anything."""
    wrong: int = 0
    """Inputs that loaded as something else without an error."""
    hangs: int = 0
    """Inputs that took longer than `DEADLINE_S`."""
    over_memory: int = 0
    """Inputs that raised the peak of this process's memory by more than `MEMORY_BYTES`."""
    foreign: int = 0
    """Inputs that ended in an exception that is not ours."""
    examples: list[str] = field(default_factory=list)
    """Some inputs that did not end well, to look at."""

    @property
    def is_clean(self) -> bool:
        return not (self.wrong or self.hangs or self.over_memory or self.foreign)

    def row(self) -> str:
        numbers = (self.tried, self.refused, self.right, self.wrong, self.hangs, self.over_memory, self.foreign)
        return f"{self.kind:34}" + "".join(f"{number:>10}" for number in numbers)


HEADER = f"{'flips in':34}" + "".join(
    f"{title:>10}" for title in ("tried", "refused", "right", "wrong", "hangs", ">512 MiB", "foreign")
)


@dataclass(frozen=True)
class Subject:
    """A kind of file, and what is done with a damaged one."""

    kind: str
    file: Path
    read: Callable[[], bool]
    """Whether what comes out is what was saved; raises an error of ours where it is refused."""


def flipped(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """The data with one bit flipped, `count` times: what was flipped, and the result."""
    generator = random.Random(seed)
    for _ in range(count):
        position, bit = generator.randrange(len(data)), generator.randrange(8)
        damaged = bytearray(data)
        damaged[position] ^= 1 << bit
        yield f"bit {bit} of byte {position}", bytes(damaged)


def damage(subject: Subject, count: int, seed: int) -> Tally:
    """Try flips of one file, which is as before afterwards."""
    tally, original = Tally(subject.kind), subject.file.read_bytes()
    try:
        for what, data in flipped(original, count, seed):
            subject.file.write_bytes(data)
            _attempt(subject, tally, what)
    finally:
        subject.file.write_bytes(original)
    return tally


def _attempt(subject: Subject, tally: Tally, what: str) -> None:
    tally.tried += 1
    before = _peak_bytes()
    try:
        with _deadline():
            is_right = subject.read()
        tally.right += is_right
        tally.wrong += not is_right
        ends_well = is_right
    except RayCkptError:
        tally.refused += 1
        ends_well = True
    except TimeoutError:
        tally.hangs += 1
        ends_well = False
    except (Exception, CheckpointException) as error:
        tally.foreign += 1
        ends_well, what = False, f"{what}: {type(error).__name__}: {error}"
    if _peak_bytes() - before > MEMORY_BYTES:
        tally.over_memory += 1
        ends_well = False
    if not ends_well and len(tally.examples) < 5:
        tally.examples.append(what[:300])


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def _deadline() -> Iterator[None]:
    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------------- subjects


def blank() -> dict[str, Any]:
    """A state like the saved one, without its values."""
    model = {name: torch.zeros_like(value) for name, value in SAVED["model"].items()}
    return {"model": model, "optim": {"exp_avg": torch.zeros(20, 35), "lr": 0.0, "betas": ()}, "step": 0, "shape": None}


def is_saved(state: dict[str, Any]) -> bool:
    """Whether a state is bit for bit the saved one."""
    return _is_same(state, SAVED)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(other, dict):
        return (
            isinstance(one, dict) and list(one) == list(other) and all(_is_same(one[key], other[key]) for key in other)
        )
    if isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def loads_right(target: Path) -> bool:
    """Whether our load gives what was saved."""
    state = blank()
    ray_ckpt.load(state, target)
    return is_saved(state)


def _verify_or_stock(directory: Path) -> bool:
    report = ray_ckpt.verify(directory)
    if report.damages:
        raise RayCkptError(str(report.damages[0]))
    state = blank()
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    return is_saved(state)


def subjects(root: Path) -> list[Subject]:
    """Checkpoints in a directory of their own, ours and others', and every kind of file in them."""
    ours, stock, torch_file = root / "ours", root / "stock", root / "file.pt"
    ray_ckpt.save(SAVED, ours)
    dcp.save(SAVED, checkpoint_id=stock, no_dist=True)
    torch.save(SAVED, torch_file)
    [data], [stock_data] = ours.glob("*.distcp"), stock.glob("*.distcp")
    return [
        Subject("our manifest.json", ours / MANIFEST_NAME, lambda: loads_right(ours)),
        Subject("our .metadata", ours / ".metadata", lambda: _verify_or_stock(ours)),
        Subject("our data files", data, lambda: loads_right(ours)),
        Subject("stock DCP's data files", stock_data, lambda: loads_right(stock)),
        Subject("torch.save's files", torch_file, lambda: loads_right(torch_file)),
    ]


# -------------------------------------------------------------------------------------------------------- hostile

HOSTILE_HEADER = f"{'hostile':34}" + "".join(
    f"{title:>10}" for title in ("tried", "refused", "loaded", "hangs", ">512 MiB", "foreign", "odd text")
)


def hostile_row(kind: str, outcomes: Sequence[Outcome]) -> str:
    """How many were refused by an error of ours, loaded, took too long, held too much, ended in an exception that is
    not ours or with a process that died or was changed, and had a message that is long or not printable."""
    numbers = (
        len(outcomes),
        sum(outcome.is_ours and outcome.kind != "loaded" for outcome in outcomes),
        sum(outcome.kind == "loaded" for outcome in outcomes),
        sum(outcome.seconds > DEADLINE_S for outcome in outcomes),
        sum(outcome.held_bytes > MEMORY_BYTES for outcome in outcomes),
        sum(not outcome.is_ours and outcome.kind != "timeout" for outcome in outcomes),
        sum(len(outcome.message) >= 2000 or not outcome.message.isprintable() for outcome in outcomes),
    )
    return f"{kind:34}" + "".join(f"{number:>10}" for number in numbers)


def read_hostile(count: int) -> Iterator[str]:
    """A row for the known kinds, and one for each kind of made-up checkpoints."""
    with tempfile.TemporaryDirectory() as directory, Readers() as readers:
        known = []
        for number, write in enumerate((hostile.KNOWN | amplified.KNOWN).values()):
            path = Path(directory, f"known-{number}", "step-1")
            path.mkdir(parents=True)
            known.append(("load", write(path)))
        yield hostile_row("known kinds", [readers.read([task])[0] for task in known])
        for kind in hostile.KINDS:
            outcomes = []
            for first in range(0, count, 20):
                with tempfile.TemporaryDirectory(dir=directory) as place:
                    numbers = range(first, min(first + 20, count))
                    outcomes += readers.read(
                        [("load", hostile.make(kind, number, Path(place, str(number)))) for number in numbers]
                    )
            yield hostile_row(kind, outcomes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help="flips of each kind of file")
    parser.add_argument("--hostile", type=int, default=1000, help="made-up checkpoints of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of the flips")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(HEADER)
    with tempfile.TemporaryDirectory() as directory:
        for subject in subjects(Path(directory)):
            tally = damage(subject, options.count, options.seed)
            print(tally.row(), flush=True)
            for example in tally.examples:
                print(f"    {example}")
    print(HOSTILE_HEADER)
    for row in read_hostile(options.hostile):
        print(row, flush=True)


if __name__ == "__main__":
    main()
