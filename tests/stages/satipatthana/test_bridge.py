"""The bridge to ASHEM: trust is an exit criterion like the others, trained on exit states, its cost measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lego.base.harness import StageError
from lego.base.params import load_params
from lego.evaluation.routed import TokenTable, token_table
from lego.model.exit_criteria import needs_logits
from lego.model.transformer import DeepSupervisionTransformer
from lego.routing.decoder import ALWAYS_DEEP, RoutedDecoder
from lego.satipatthana.ablation import macs
from lego.satipatthana.sections import with_profile
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.tasks import Task
from stages.satipatthana.bridge import KINDS, Criterion, cuts, task_of, train
from stages.satipatthana.bridge import told_apart as told_apart_by
from tests.conftest import ROOT
from tests.satipatthana.conftest import PARAMS, small

DIM, VOCAB = 16, 24


def exit_states(seed: int, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Exit states (n, D) of which one feature says whether block 1 is right (n,)."""
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(rows, generator=generator) > 0.5
    states = torch.randn(rows, DIM, generator=generator)
    states[:, 0] += torch.where(right, 3.0, -3.0)
    return states, right


@pytest.fixture(scope="module")
def told_apart() -> tuple[torch.Tensor, torch.Tensor]:
    return exit_states(0)


@pytest.fixture(scope="module")
def system(told_apart) -> Satipatthana:
    epochs = {f"stage{number}__epochs": 8 for number in range(4)}
    params = small(PARAMS, stage1__weight_guidance=1.0, stage2__lr=0.01, stage3__lr=0.01, **epochs)
    return train(task_of(*told_apart, 320, 1), params, 0)


def test_the_task_is_drawn_from_exit_states_at_unit_root_mean_square(told_apart):
    states, right = told_apart
    task = task_of(states, right, 320, 1)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [280, 40, 40]
    torch.testing.assert_close(task.train.x.square().mean(dim=1), torch.ones(280))
    assert float(((task.train.x[:, 0] > 0) == task.train.y.bool()).float().mean()) > 0.99
    assert torch.equal(task.train.deserved, task.train.y.float())
    with pytest.raises(StageError, match=r"bridge\.rows is 401, but there are 400 fitted tokens"):
        task_of(states, right, 401, 1)
    with pytest.raises(StageError, match="right on all fitted tokens or on none"):
        task_of(states, torch.ones_like(right), 320, 1)


def test_trust_routes_tokens_as_any_criterion_does(system):
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(VOCAB, DIM, 4, 2, exit_layer=2, block2_context="sequence").eval()
    trust, answer = (Criterion(system, kind) for kind in KINDS)
    assert not needs_logits(trust)
    x = torch.randint(VOCAB, (3, 20))
    table = token_table(model, [(x, x.roll(-1, dims=1))], "cpu", {"trust": trust, "answer": answer})
    cut = float(np.median(table.score("trust")))
    read = RoutedDecoder(model, cut, 3, trust).read(x)
    torch.testing.assert_close(read.score.double(), torch.from_numpy(table.score("trust")).double())
    assert 0.3 < read.deep.float().mean() < 0.7
    assert len(trust(torch.zeros(0, DIM))) == len(answer(torch.zeros(0, DIM))) == 0


def test_thresholds_come_from_text_that_nothing_was_fitted_on():
    scores = np.concatenate([np.zeros(30), np.linspace(0.1, 1, 100)])  # low on the text that was fitted
    n, root = len(scores), load_params(ROOT / "params.yaml")
    table = TokenTable(*(np.zeros(n) for _ in range(5)), scores={"trust_0": scores})
    as_mined = root.routing.model_copy(update={"hard_ratio": None})
    found = cuts(table, 30, 0.4, root.model_copy(update={"routing": as_mined}))
    assert (scores[30:] < found.quantile("trust_0")).mean() == pytest.approx(0.4, abs=0.011)
    for ratio, expected in ((0.0, 0.0), (1.0, ALWAYS_DEEP)):
        routing = root.routing.model_copy(update={"hard_ratio": ratio})
        whole = cuts(table, 30, 0.4, root.model_copy(update={"routing": routing}))
        assert whole.quantile("trust_0") == expected


def test_trust_and_answer_tell_right_from_wrong_on_tokens_they_have_not_seen(system):
    states, right = exit_states(5)
    task = task_of(states, right, 400, 2)
    found = told_apart_by(system, Task(task.train, task.train, task.train, {}, task.classes))
    assert set(found) == {"trust", "answer"}
    assert found["answer"] > 0.95
    assert found["trust"] > 0.8


def test_the_cost_is_measured_and_trust_is_spared_the_decoder(system, told_apart):
    states, _ = told_apart
    trust, answer = (macs(Criterion(system, kind), states[:64]) for kind in KINDS)
    sizes = small()
    width = sizes.system.dim + system.vipassana.context_dim
    h = sizes.heads.decoder_hidden
    assert answer - trust == width * h + h * h + h * 2
    assert trust > DIM * sizes.adapter.hidden + sizes.system.dim**2


def test_the_profile_fits_exit_states():
    params = with_profile(PARAMS, "bridge", ROOT / "stages/satipatthana/profiles.yaml")
    assert params.stage1.batch_size == 128
    assert not {"cut_paste", "patch_permutation"} & set(params.void.kinds)
