"""One protocol scores whatever answers with trust."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lego.satipatthana.evaluation import Protocol, evaluate
from lego.satipatthana.peers import judge as judge_peer
from lego.satipatthana.peers import networks, peer
from lego.satipatthana.sections import changed
from lego.satipatthana.tasks import Task
from tests.satipatthana.conftest import PARAMS, clusters, small, system


def test_r11_1_anything_that_answers_with_trust_is_scored_by_the_same_code():
    """A plain network with its largest probability as trust: the same keys, with the numbers of the peer."""
    peers = changed(PARAMS, {"peers.epochs": 5}, "test").peers
    outside = {"far": torch.randn(20, 12, generator=torch.Generator().manual_seed(5))}
    task = Task(clusters(), clusters(30, seed=1), clusters(30, seed=2), outside, ["a", "b", "c"])
    (plain,) = networks("plain", task, peers, 0, PARAMS.void)

    @torch.no_grad()
    def answers(x: torch.Tensor) -> SimpleNamespace:
        logits = plain(x)[1]
        return SimpleNamespace(output=logits, trust=torch.softmax(logits.double(), dim=1).amax(dim=1, keepdim=True))

    protocol = Protocol(task.test, task.outside, PARAMS.stage2, 0)
    found, own = evaluate(answers, protocol), evaluate(system(small()), protocol)
    assert found.keys() < own.keys()
    wanted = judge_peer(peer("msp", [plain], task, peers, 0), task.test, task.outside)
    assert {"accuracy", "nll", "ece", "aurc", "auroc_far", "fpr95_far", "auroc_correct"} <= wanted.keys() & found.keys()
    for key in wanted.keys() & found.keys():
        assert found[key] == pytest.approx(wanted[key], abs=1e-6, nan_ok=True), key
    engine = {"recon_mse", "last_step", "last_step_squared", "probes_used", "probe_perplexity", "parameters"}
    assert engine | {"trust_drunk", "auroc_mismatch", "aux_accuracy_20T", "auroc_far_recon"} <= own.keys()
