"""Layouts: degrees and ranks, and how they are written."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ckpt import Layout
from ray_ckpt.errors import UsageError

WRITTEN = {
    "single": Layout(),
    "pp4": Layout(pp=4),
    "pp2x3": Layout(pp=2, stages_per_rank=3),
    "ddp2": Layout(dp="ddp", dp_replicate=2),
    "fsdp1x4": Layout(dp="fsdp1", dp_shard=4),
    "fsdp2x3": Layout(dp="fsdp2", dp_shard=3),
    "fsdp2x1": Layout(dp="fsdp2"),
    "hsdp2x4": Layout(dp="fsdp2", dp_replicate=2, dp_shard=4),
    "hsdp2x1": Layout(dp="fsdp2", dp_replicate=2),
    "tp8": Layout(tp=8),
    "ep2": Layout(ep=2),
    "pp2.fsdp2x2.tp2": Layout(pp=2, dp="fsdp2", dp_shard=2, tp=2),
    "hsdp2x2.cp2.tp2.ep3": Layout(dp="fsdp2", dp_replicate=2, dp_shard=2, cp=2, tp=2, ep=3),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_parse_and_print_are_inverse(text: str) -> None:
    assert Layout.parse(text) == WRITTEN[text]
    assert str(WRITTEN[text]) == text


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    degree = st.integers(1, 3)
    kind = draw(st.sampled_from(["none", "ddp", "fsdp1", "fsdp2"]))
    pp = draw(degree)
    return Layout(
        pp=pp,
        dp_replicate=draw(degree) if kind in ("ddp", "fsdp2") else 1,
        dp_shard=draw(degree) if kind in ("fsdp1", "fsdp2") else 1,
        cp=draw(degree),
        tp=draw(degree),
        ep=draw(degree),
        dp=kind,
        stages_per_rank=draw(degree) if pp > 1 else 1,
    )


@given(layouts())
def test_every_layout_comes_back_from_its_text(layout: Layout) -> None:
    assert Layout.parse(str(layout)) == layout


@given(layouts())
def test_ranks_and_coordinates_are_inverse(layout: Layout) -> None:
    coordinates = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert [layout.rank(coordinate) for coordinate in coordinates] == list(range(layout.world_size))
    assert len({tuple(coordinate.values()) for coordinate in coordinates}) == layout.world_size


@given(layouts())
def test_every_stage_and_every_part_of_a_batch_is_on_as_many_ranks(layout: Layout) -> None:
    ranks = range(layout.world_size)
    stages = list(itertools.chain.from_iterable(layout.stages_of(rank) for rank in ranks))
    parts = [layout.batch_part_of(rank) for rank in ranks]
    assert sorted(stages) == sorted(list(range(layout.num_stages)) * (layout.world_size // layout.pp))
    assert sorted(parts) == sorted(list(range(layout.num_batch_parts)) * (layout.world_size // layout.num_batch_parts))


def test_the_innermost_axis_is_the_fastest() -> None:
    layout = Layout.parse("pp2.fsdp2x2.tp2")
    assert layout.coordinate(5) == {"pp": 1, "dp_replicate": 0, "dp_shard": 0, "cp": 0, "tp": 1, "ep": 0}
    assert Layout.parse("pp2x2").stages_of(1) == (1, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "token ''"),
        ("fsdp2", "token 'fsdp2'"),
        ("pp2..tp2", "token ''"),
        ("single.tp2", "token 'single'"),
        ("pp-1", "token 'pp-1'"),
        ("pp0", "not {'pp': 0}"),
        ("pp2.pp3", "names pp twice"),
        ("ddp2.fsdp2x2", "names dp twice"),
        ("pp1x2", "pp is 1"),
    ],
)
def test_text_that_is_not_a_layout_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dp_shard": 2}, "dp_replicate=1 and dp_shard=2"),
        ({"dp": "ddp", "dp_replicate": 2, "dp_shard": 3}, "dp_replicate=2 and dp_shard=3"),
        ({"dp": "fsdp1", "dp_replicate": 2, "dp_shard": 3}, "hsdp2x3"),
        ({"tp": 1.5}, "1.5"),
    ],
)
def test_degrees_that_contradict_each_other_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Layout(**fields)  # type: ignore[arg-type]


def test_the_number_of_ranks_is_checked_with_all_numbers() -> None:
    layout = Layout.parse("pp2.hsdp3x5.tp7")
    layout.check_world(210)
    with pytest.raises(UsageError, match=r"needs 210 ranks .* = 2 x 3 x 5 x 1 x 7 x 1\), but there are 8"):
        layout.check_world(8)


def test_ranks_outside_the_mesh_are_refused() -> None:
    layout = Layout.parse("pp2")
    with pytest.raises(UsageError, match="ranks 0 to 1, not 2"):
        layout.coordinate(2)
    with pytest.raises(UsageError, match="pp from 0 to 1, not 2"):
        layout.rank({"pp": 2})
    with pytest.raises(UsageError, match=r"\['dp'\] are no axes"):
        layout.rank({"dp": 0})


def test_a_layout_needs_no_torch() -> None:
    code = "import sys; from ray_ckpt import Layout; Layout.parse('pp2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
