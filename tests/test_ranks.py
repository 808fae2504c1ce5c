"""The rank harness: results by rank, failures by name and at once."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import RanksError, run_ranks


def _sum_of_ranks(rank, offset):
    total = torch.tensor(rank + offset)
    dist.all_reduce(total)
    return rank, int(total)


def _raise_on_one(rank, culprit):
    if rank == culprit:
        raise ValueError("the culprit speaks")
    dist.barrier()


def _die_on_one(rank, culprit):
    if rank == culprit:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang(rank):
    dist.barrier() if rank == 0 else dist.recv(torch.zeros(1), src=0)


def test_results_come_back_by_rank(tmp_path):
    assert run_ranks(_sum_of_ranks, 4, tmp_path, 10) == [(rank, 46) for rank in range(4)]


@pytest.mark.parametrize(("function", "expected"), [(_raise_on_one, "the culprit speaks"), (_die_on_one, "died with")])
def test_failing_rank_is_named_at_once(tmp_path, function, expected):
    run_ranks(_sum_of_ranks, 2, tmp_path, 0)  # warms the fork server up
    started = time.monotonic()
    with pytest.raises(RanksError) as raised:
        run_ranks(function, 4, tmp_path, 2)
    assert expected in raised.value.failures[2]
    assert time.monotonic() - started < 30  # of 60 s, after which those are stopped that wait for it


def test_ranks_that_hang_are_stopped(tmp_path):
    with pytest.raises(RanksError, match="still running"):
        run_ranks(_hang, 2, tmp_path, timeout_s=2)
