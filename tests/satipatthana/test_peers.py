"""The scores that trust is compared with."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lego.satipatthana.peers import OWN, networks, peer
from lego.satipatthana.peers import judge as judge_peer
from tests.satipatthana.conftest import PARAMS, a_task

VOID = PARAMS.void.model_copy(update={"kinds": ["gaussian"]})


@pytest.mark.parametrize("name", PARAMS.peers.names)
def test_peers_tell_what_is_far_from_what_is_near(name):
    task = a_task(120)
    outside = {"far": 3 * torch.randn(60, 12, generator=torch.Generator().manual_seed(5))}
    settings = PARAMS.peers.model_copy(update={"epochs": 20, "hidden": 32, "dim": 32})
    kind = name if name in OWN else "plain"

    def judged():
        return judge_peer(peer(name, networks(kind, task, settings, 0, VOID), task, settings, 0), task.test, outside)

    found = judged()
    assert found["accuracy"] > 0.9
    assert 0 <= found["auroc_far"] <= 1
    if name in ("knn", "input_knn", "mahalanobis", "outlier_exposure", "isolation_forest"):
        assert found["auroc_far"] > 0.8
    again = judged()
    assert found == again or (math.isnan(found["auroc_correct"]) and copy.copy(found).keys() == again.keys())
