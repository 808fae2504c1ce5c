"""Layout: how a model lies across ranks, as degrees per axis of a device mesh. Pure arithmetic, no torch.

    Layout.parse("pp2.fsdp2x2.tp2")      2 pipeline stages x 2 FSDP2 shards x 2 tensor-parallel shards: 8 ranks

A layout is written as tokens joined by dots, outermost axis first:

    single       one rank, nothing is split              fsdp1xN    FullyShardedDataParallel over N ranks
    ppN          N pipeline ranks, one stage each        fsdp2xN    fully_shard over N ranks
    ppNxV        N pipeline ranks, V stages each         hsdpRxS    fully_shard: R replicas of S shards
    ddpN         N replicas                              tpN, epN   tensor and expert parallel over N ranks
                                                         cpN        context parallel: only names an axis
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray_ckpt.errors import UsageError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
"""Outermost first: neighboring ranks differ in the last axis that is split."""

DataParallel = Literal["none", "ddp", "fsdp1", "fsdp2"]

_SHOWN_AXES = "pp x dp_replicate x dp_shard x cp x tp x ep"


@dataclass(frozen=True)
class Layout:
    """How a model lies across ranks: the degree of each axis of a device mesh. The product is the number of ranks.

    Example:
        >>> from ray_ckpt import Layout
        >>> layout = Layout.parse("pp2.fsdp2x2.tp2")
        >>> layout == Layout(pp=2, dp="fsdp2", dp_shard=2, tp=2)
        True
        >>> layout.world_size, str(layout)
        (8, 'pp2.fsdp2x2.tp2')
        >>> layout.coordinate(6)
        {'pp': 1, 'dp_replicate': 0, 'dp_shard': 1, 'cp': 0, 'tp': 0, 'ep': 0}

    Raises:
        UsageError: a degree is below 1, or the degrees contradict the kind of data parallelism.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    dp: DataParallel = "none"
    """The wrapper that makes replicas and shards."""
    stages_per_rank: int = 1
    """Pipeline stages on each pipeline rank; more than one is called interleaved. Stage `s` lies on rank `s % pp`."""

    def __post_init__(self) -> None:
        degrees = {axis: getattr(self, axis) for axis in AXES} | {"stages_per_rank": self.stages_per_rank}
        if wrong := {name: degree for name, degree in degrees.items() if type(degree) is not int or degree < 1}:
            raise UsageError(f"a degree is a number from 1 on, not {wrong}")
        replicas, shards = self.dp_replicate, self.dp_shard
        found = f"dp={self.dp!r} with dp_replicate={replicas} and dp_shard={shards}"
        if self.dp == "none" and (replicas, shards) != (1, 1):
            raise UsageError(f"{found}: say what makes replicas and shards, one of 'ddp', 'fsdp1', 'fsdp2'")
        if self.dp == "ddp" and shards != 1:
            raise UsageError(f"{found}: DDP has replicas only, so dp_shard must be 1")
        if self.dp == "fsdp1" and replicas != 1:
            raise UsageError(f"{found}: replicas of shards are made by fsdp2, written hsdp{replicas}x{shards}")
        if self.stages_per_rank > 1 and self.pp == 1:
            raise UsageError(f"stages_per_rank={self.stages_per_rank} needs several pipeline ranks, and pp is 1")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return math.prod(self.degrees.values())

    @property
    def degrees(self) -> dict[str, int]:
        """Axis -> degree, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages; 1 without a pipeline."""
        return self.pp * self.stages_per_rank

    @property
    def num_batch_parts(self) -> int:
        """Parts that each batch is cut into: replicas and shards of data parallelism see different samples."""
        return self.dp_replicate * self.dp_shard

    def check_world(self, world_size: int) -> None:
        """Refuse a number of ranks that is not this layout's.

        Raises:
            UsageError: `world_size` is another number; the message has all degrees.
        """
        if world_size != self.world_size:
            degrees = " x ".join(str(degree) for degree in self.degrees.values())
            raise UsageError(
                f"layout {self} needs {self.world_size} ranks ({_SHOWN_AXES} = {degrees}), but there are {world_size}"
            )

    def check_supported(self) -> None:
        """Refuse what torch cannot combine, by name.

        Raises:
            UsageError: the layout combines what torch cannot; the message says what to use instead.
        """
        reasons = {
            "context parallel splits activations, not weights; leave it out": self.cp > 1,
            "torch's FSDP1 does not combine with other axes; use fsdp2": self.dp == "fsdp1"
            and self.world_size != self.dp_shard,
            "torch's DDP does not combine with other axes; use hsdpRx1, replicas made by fully_shard": self.dp == "ddp"
            and self.world_size != self.dp_replicate,
            "experts that ep has split cannot be split by tp again; combine ep with fsdp2 or pp": self.ep > 1
            and self.tp > 1,
        }
        if wrong := [reason for reason, applies in reasons.items() if applies]:
            raise UsageError(f"layout {self} is not supported: {'; '.join(wrong)}")

    def coordinate(self, rank: int) -> dict[str, int]:
        """Axis -> position of a rank on it.

        Raises:
            UsageError: there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise UsageError(f"layout {self} has ranks 0 to {self.world_size - 1}, not {rank}")
        found = {}
        for axis, degree in reversed(self.degrees.items()):
            rank, found[axis] = divmod(rank, degree)
        return {axis: found[axis] for axis in AXES}

    def rank(self, coordinate: Mapping[str, int]) -> int:
        """The rank at a coordinate; axes that are left out count as 0.

        Raises:
            UsageError: it is outside the mesh, or names an unknown axis.
        """
        if unknown := coordinate.keys() - set(AXES):
            raise UsageError(f"{sorted(unknown)} are no axes; those are {', '.join(AXES)}")
        rank = 0
        for axis, degree in self.degrees.items():
            at = coordinate.get(axis, 0)
            if not 0 <= at < degree:
                raise UsageError(f"layout {self} has {axis} from 0 to {degree - 1}, not {at}")
            rank = rank * degree + at
        return rank

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The pipeline stages that a rank holds, in the order they run."""
        first = self.coordinate(rank)["pp"]
        return tuple(range(first, self.num_stages, self.pp))

    def batch_part_of(self, rank: int) -> int:
        """Which of the `num_batch_parts` parts of each batch a rank sees."""
        at = self.coordinate(rank)
        return at["dp_replicate"] * self.dp_shard + at["dp_shard"]

    def __str__(self) -> str:
        tokens = []
        if self.pp > 1:
            tokens.append(f"pp{self.pp}" + (f"x{self.stages_per_rank}" if self.stages_per_rank > 1 else ""))
        if self.dp == "ddp":
            tokens.append(f"ddp{self.dp_replicate}")
        elif self.dp == "fsdp2" and self.dp_replicate > 1:
            tokens.append(f"hsdp{self.dp_replicate}x{self.dp_shard}")
        elif self.dp != "none":
            tokens.append(f"{self.dp}x{self.dp_shard}")
        tokens += [f"{axis}{getattr(self, axis)}" for axis in ("cp", "tp", "ep") if getattr(self, axis) > 1]
        return ".".join(tokens) or "single"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Parse the text form of a layout, such as `pp2.fsdp2x2.tp2`. `str` is the inverse.

        Raises:
            UsageError: a token is unknown, or an axis is named twice.
        """
        if text == "single":
            return cls()
        found: dict[str, Any] = {}
        for token in text.split("."):
            fields = _parse_token(token, text)
            if twice := found.keys() & fields.keys():
                raise UsageError(f"layout {text!r} names {', '.join(sorted(twice))} twice")
            found |= fields
        return cls(**found)


_TOKENS: tuple[tuple[re.Pattern[str], Callable[..., dict[str, Any]]], ...] = (
    (re.compile(r"pp(\d+)"), lambda pp: {"pp": int(pp)}),
    (re.compile(r"pp(\d+)x(\d+)"), lambda pp, stages: {"pp": int(pp), "stages_per_rank": int(stages)}),
    (re.compile(r"ddp(\d+)"), lambda replicas: {"dp": "ddp", "dp_replicate": int(replicas)}),
    (re.compile(r"(fsdp[12])x(\d+)"), lambda kind, shards: {"dp": kind, "dp_shard": int(shards)}),
    (
        re.compile(r"hsdp(\d+)x(\d+)"),
        lambda replicas, shards: {"dp": "fsdp2", "dp_replicate": int(replicas), "dp_shard": int(shards)},
    ),
    (re.compile(r"(cp|tp|ep)(\d+)"), lambda axis, degree: {axis: int(degree)}),
)


def _parse_token(token: str, text: str) -> dict[str, Any]:
    for pattern, fields in _TOKENS:
        if match := pattern.fullmatch(token):
            return fields(*match.groups())
    raise UsageError(
        f"layout {text!r} has the token {token!r}; known are single, ppN, ppNxV, ddpN, fsdp1xN, fsdp2xN, hsdpRxS, cpN, "
        "tpN, epN, joined by dots as in pp2.fsdp2x2.tp2"
    )
