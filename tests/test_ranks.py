"""The warm pool of ranks: results by rank, the same processes again, and failures that are told and do not hang."""

import os
import time

import pytest
import torch

from tests.ranks import RankError, run_ranks


def sum_of_ranks(offset):
    total = torch.tensor([float(os.environ["RANK"]) + offset])
    torch.distributed.all_reduce(total)
    return os.getpid(), total


def fail_on_rank_1():
    if os.environ["RANK"] == "1":
        raise ValueError("num_heads=3 cannot be split")
    torch.distributed.barrier()


def exit_on_rank_0():
    if os.environ["RANK"] == "0":
        os._exit(7)
    torch.distributed.barrier()


def wait_for_ever():
    time.sleep(3600)


def test_results_come_by_rank_and_the_processes_stay_warm():
    first, second = run_ranks(sum_of_ranks, 2, 1.0), run_ranks(sum_of_ranks, 2, 2.0)
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({pid for pid, _ in first}) == 2
    assert [total.item() for _, total in first] == [3.0, 3.0]
    assert [total.item() for _, total in second] == [5.0, 5.0]


def test_a_failure_names_rank_and_reason_and_the_next_call_works():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2: Traceback.*fail_on_rank_1.*num_heads=3 cannot be split"):
        run_ranks(fail_on_rank_1, 2)
    with pytest.raises(RankError, match="rank 0 of 2: died with exit code 7"):
        run_ranks(exit_on_rank_0, 2)
    with pytest.raises(RankError, match=r"rank 0 of 2: no answer after 5 s"):
        run_ranks(wait_for_ever, 2, timeout_s=5)
    assert run_ranks(sum_of_ranks, 2, 0.0)[0][1].item() == 1.0
