"""Schedules of the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing

from lego.training.steps import build_scheduler


def test_schedules_warm_up_and_end_where_they_say():
    def rates(kind: str, decay_share: float = 0.2) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = build_scheduler(optimizer, kind, 4, total_steps=12, min_ratio=0.1, decay_share=decay_share)
        seen = []
        for _ in range(14):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        return seen

    assert rates("constant") == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1.0] * 10)
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(9)]
    assert rates("wsd") == pytest.approx([0.2, 0.4, 0.6, 0.8, *[1.0] * 6, 0.85, 0.475, 0.1, 0.1])
    straight = [1 - 0.9 * i / 8 for i in range(9)]
    assert rates("wsd", 1.0) == pytest.approx([0.2, 0.4, 0.6, 0.8, *straight, 0.1])  # falls from the warm-up's end on
    assert rates("cosine") == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine, 0.1])
