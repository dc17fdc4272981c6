"""The bridge to ASHEM: trust is an exit criterion like the others, trained on exit states, its cost measured."""

from __future__ import annotations

import pytest
import torch
from conftest import ROOT
from satipatthana_systems import PARAMS, small
from sklearn.metrics import roc_auc_score

from lego.criteria import features, needs_logits
from lego.evaluation import token_table
from lego.harness import StageError
from lego.routing import RoutedDecoder
from lego.satipatthana.sections import with_profile
from lego.satipatthana.system import Satipatthana
from lego.transformer import DeepSupervisionTransformer
from stages.satipatthana.bridge import TrustCriterion, task_of, thresholds, train

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
    epochs = {f"stage{number}__epochs": 2 if number == 2 else 8 for number in range(4)}
    return train(task_of(*told_apart, 320, 1), small(PARAMS, stage1__weight_guidance=1.0, stage3__lr=0.01, **epochs))


def test_the_task_is_drawn_from_exit_states_at_unit_root_mean_square(told_apart):
    states, right = told_apart
    task = task_of(states, right, 320, 1)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [240, 40, 40]
    torch.testing.assert_close(task.train.x.square().mean(dim=1), torch.ones(240))
    assert float(((task.train.x[:, 0] > 0) == task.train.y.bool()).float().mean()) > 0.99
    with pytest.raises(StageError, match=r"bridge\.rows is 401, but there are 400 fitted tokens"):
        task_of(states, right, 401, 1)
    with pytest.raises(StageError, match="right on all fitted tokens or on none"):
        task_of(states, torch.ones_like(right), 320, 1)


def test_trust_routes_tokens_as_any_criterion_does(system):
    torch.manual_seed(0)
    model = DeepSupervisionTransformer(VOCAB, DIM, 4, 2, exit_layer=2, block2_context="sequence").eval()
    trust, answer = TrustCriterion(system), TrustCriterion(system, answers=True)
    assert not needs_logits(trust)
    x = torch.randint(VOCAB, (3, 20))
    table = token_table(model, [(x, x.roll(-1, dims=1))], "cpu", {"trust": trust, "answer": answer})
    cut = thresholds(table, 10, 0.5, ["trust"])["trust"]
    read = RoutedDecoder(model, cut, 3, trust).read(x)
    torch.testing.assert_close(read.score.double(), torch.from_numpy(table.score("trust")).double())
    assert torch.equal(read.deep, read.score < cut)
    assert 0.3 < read.deep.float().mean() < 0.7
    assert len(trust(torch.zeros(0, DIM))) == 0


def test_the_answer_learns_whether_block_1_is_right(system):
    states, right = exit_states(5)  # others than those it was trained on
    score = TrustCriterion(system, answers=True)(states)
    assert torch.equal(score, system(features(states)).output.softmax(dim=1)[:, 1])
    assert roc_auc_score(right.numpy(), score.numpy()) > 0.95


def test_the_cost_is_measured_and_grows_with_the_size(system, told_apart):
    states, _ = told_apart
    macs = TrustCriterion(system).macs(states[:64])
    width = small().vicara, small().system.dim
    assert macs > DIM * small().adapter.hidden + width[1] ** 2
    larger = train(task_of(*told_apart, 128, 1), small(system__dim=16, **{f"stage{n}__epochs": 1 for n in range(4)}))
    assert TrustCriterion(larger).macs(states[:64]) > macs


def test_the_profile_fits_exit_states():
    params = with_profile(PARAMS, "bridge", ROOT / "stages/satipatthana/profiles.yaml")
    assert params.stage1.batch_size == 128
    assert not {"cut_paste", "patch_permutation"} & set(params.void.kinds)
