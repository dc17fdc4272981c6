"""The log of a way: detached, counted, joined row by row."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from lego.satipatthana.log import SantanaLog
from tests.satipatthana.conftest import small, system


def test_r3_6_the_log_is_detached_counts_states_and_keeps_no_graph():
    made, x = system(small(sati__eps_rel=0.05)).train(), torch.randn(7, 12)
    thought = made.samatha(x)
    log, ends = thought.log, thought.pair
    states = log.to_tensor()
    assert not states.requires_grad
    assert log.energies().shape == (len(log) - 1, 7)
    assert torch.equal(log.lengths, log.steps + 1)
    assert torch.equal(log.initial, states[0])
    for row in range(7):
        last = int(log.lengths[row]) - 1
        assert (states[last:, row] == states[last, row]).all()  # copied on
        steps = (states[1 : last + 1, row] - states[:last, row]).square().sum(1)
        torch.testing.assert_close(log.energies()[:last, row], steps)
        assert not log.energies()[last:, row].any()
    assert ends[0].grad_fn is not None
    assert ends[1].grad_fn is not None
    graph = weakref.ref(ends[0])
    del thought, ends
    gc.collect()
    assert graph() is None  # holding the log keeps no autograd graph alive
    log.clear()
    assert len(log) == 0
    with pytest.raises(ValueError, match="the log is empty"):
        _ = log.lengths
    with pytest.raises(ValueError, match="energy must be per sample"):
        log.add(torch.zeros(3, 8), torch.zeros(()))


def test_logs_are_joined_row_by_row():
    logs = []
    for steps in (2, 4):
        log = SantanaLog()
        log.add(torch.zeros(3, 2))
        for step in range(1, steps + 1):
            log.add(torch.full((3, 2), float(step)), torch.full((3,), float(step)))
        logs.append(log)
    joined = SantanaLog.joined(logs)
    assert joined.lengths.tolist() == [3, 3, 3, 5, 5, 5]
    assert joined.to_tensor()[:, 0, 0].tolist() == [0, 1, 2, 2, 2]
    assert joined.energies().sum(0).tolist() == [3, 3, 3, 10, 10, 10]
    assert joined.rows(torch.tensor([5, 0])).lengths.tolist() == [5, 3]
