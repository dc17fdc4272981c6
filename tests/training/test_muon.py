"""Muon with AdamW as one optimizer: the steps of torch's own two, who trains what, and states that are restored."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from lego import DeepSupervisionTransformer, grow_model
from lego.base.params import load_params
from lego.training.epochs import History, TrainingState
from lego.training.muon import Optimizers, build_muon, hidden_matrices
from lego.training.setup import build_training
from tests.conftest import ROOT, VOCAB, random_batches

TRAIN = load_params(ROOT / "params.yaml").train.model_copy(
    update={"optimizer": "muon", "warmup_steps": 2, "min_lr_ratio": 0.2, "adamw_lr_ratio": 0.3, "schedule": "wsd"}
)


def model_of(**sizes) -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    return DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2, **sizes)


def learn(model: nn.Module, optimizers: list, seed: int) -> None:
    x, y = random_batches(1, seed=seed)[0]
    model.loss_at(model.forward_to_hidden(x), model.num_layers, y).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def test_its_steps_are_those_of_torchs_two_optimizers():
    model = model_of(tie_embeddings=False)
    twin = copy.deepcopy(model)
    optimizer, options = build_training(model, 0.02, 10, TRAIN)
    norms = [p for name, p in twin.named_parameters() if "norm" in name]
    hidden = [p for name, p in twin.named_parameters() if "_proj" in name]
    muon = Muon(hidden, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(
        [
            {"params": [twin.output_head.weight], "weight_decay": 0.1},
            {"params": [twin.embedding.weight, *norms], "weight_decay": 0.0},
        ],
        betas=(TRAIN.beta1, TRAIN.beta2),
        fused=True,
    )
    for step, factor in enumerate([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 0.6]):  # the last 2 of 10 fall to a fifth
        for part, peak in ((muon, 0.02), (adamw, 0.3 * 0.02)):
            for group in part.param_groups:
                group["lr"] = factor * peak
        learn(model, [optimizer], step)
        learn(twin, [muon, adamw], step)
        options.scheduler.step()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.02)


@pytest.mark.parametrize("head", ["shared", "own", "shared_trainable"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_trained_weight_has_one_optimizer_and_heads_are_not_hidden(head, tied):
    grown = grow_model(model_of(tie_embeddings=tied), 4, head=head)
    first, *rest = build_muon(grown, 0.02, 0.01, 0.1, (0.9, 0.95)).param_groups
    names = {id(p): name for name, p in grown.named_parameters()}
    by_muon, by_adamw = ([names[id(p)] for group in groups for p in group["params"]] for groups in ([first], rest))
    assert sorted(by_muon + by_adamw) == sorted(name for name, p in grown.named_parameters() if p.requires_grad)
    assert len(by_muon) == 2 * 7
    assert all("_proj" in name for name in by_muon)
    assert not any("_proj" in name for name in by_adamw)
    assert len(hidden_matrices(grown)) == 4 * 7


def test_low_rank_changes_are_hidden_matrices_and_what_they_change_stays():
    grown = grow_model(model_of(), 3, branch_layer=0, branch_rank=4, block2_context="sequence")
    optimizer = build_muon(grown, 0.02, 0.01, 0.1, (0.9, 0.95))
    names = {id(p): name for name, p in grown.named_parameters()}
    by_muon = {names[id(p)] for p in optimizer.param_groups[0]["params"]}
    low = {f"{part}.weight" for part in ("down", "up")}
    assert len(by_muon) == 2 * 2 * 5 + 7  # of two branch layers five matrices each, and a new layer
    assert sum(name.rpartition("_proj.")[2] in low for name in by_muon) == 2 * 2 * 5
    before = {name: p.detach().clone() for name, p in grown.named_parameters()}
    x, y = random_batches(1)[0]
    for _ in range(2):  # at first the half that is zero moves, which lets the other move
        grown.loss_at(grown.run_layers(grown.embedding(x), 1, grown.num_layers), grown.num_layers, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in grown.named_parameters() if not torch.equal(p, before[name])}
    assert by_muon <= moved
    assert moved <= {name for name, p in grown.named_parameters() if p.requires_grad}


def test_a_restored_state_takes_the_same_steps(tmp_path):
    """Through JSON and safetensors; the schedule goes on to change what both parts step with."""
    ends = []
    for killed in (False, True):
        model = model_of(tie_embeddings=True)
        optimizer, options = build_training(model, 0.02, 6, TRAIN)
        for step in range(6):
            if killed and step == 3:
                best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                TrainingState(tmp_path / "state", model, optimizer, options.scheduler).save(best, History())
                model = model_of(tie_embeddings=True)
                optimizer, options = build_training(model, 0.02, 6, TRAIN)
                best = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
                assert TrainingState(tmp_path / "state", model, optimizer, options.scheduler).load(best) is not None
            learn(model, [optimizer], step)
            options.scheduler.step()
        ends.append((model.state_dict(), [group["lr"] for group in optimizer.param_groups]))
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    assert ends[0][1] == ends[1][1]


def test_a_model_of_matrices_alone_has_muon_alone():
    optimizer = build_muon(nn.Linear(4, 4, bias=False), 0.1, 0.1, 0.0, (0.9, 0.99))
    assert isinstance(optimizer, Optimizers)
    assert [type(part) for part in optimizer.parts] == [Muon]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_steps_its_own_weights(copied):
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4))
    optimizer = build_muon(model, 0.1, 0.1, 0.0, (0.9, 0.99))
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    other = copied(optimizer)
    other.param_groups[0]["lr"] = 0.0
    for group in other.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    moved = [p.detach().clone() for group in other.param_groups for p in group["params"]]
    other.step()
    after = [p.detach() for group in other.param_groups for p in group["params"]]
    assert [torch.equal(a, b) for a, b in zip(moved, after, strict=True)] == [True, False, False]  # Muon's rate is 0
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_what_it_cannot_do_is_named():
    optimizer = build_muon(nn.Linear(4, 4), 0.1, 0.1, 0.0, (0.9, 0.99))
    with pytest.raises(ValueError, match="give all parameters when the optimizer is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="closures are not supported"):
        optimizer.step(lambda: 1.0)
