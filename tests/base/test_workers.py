"""Work side by side: order, set-up of the workers, and what is said when one is killed."""

import os
import signal

import pytest
import torch

from lego.base.harness import StageError
from lego.base.workers import side_by_side


def facts(number: int) -> tuple[int, int, int, bool]:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number, os.getpid(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()


def test_results_come_in_order_from_processes_of_their_own_and_a_killed_worker_is_named():
    found = []
    with pytest.raises(StageError, match=r"a worker was killed .* lower workers in params\.yaml, and run again"):
        for one in side_by_side(facts, [3, 1, 2, -1], 1, 1, "workers in params.yaml"):
            found.append(one)
    assert [one[0] for one in found] == [3, 1, 2]
    assert os.getpid() not in {one[1] for one in found}
    assert {one[2:] for one in found} == {(1, True)}


def test_nothing_to_do_starts_no_process():
    assert list(side_by_side(facts, [], 2, 1, "workers")) == []
