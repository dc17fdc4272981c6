"""Baselines: what each starts as, what it costs by the ledger and by torch's counter, and the search of the rate."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lego import DeepSupervisionTransformer, Ledger, Trainer
from lego.base.ashem_sections import BaselinesParams, JointParams
from lego.base.harness import StageError
from lego.base.params import load_params
from lego.training.budget import Budget
from lego.training.epochs import History
from lego.training.search import Trial, search_rates
from lego.training.steps import NonFiniteLossError
from stages.evidence.baselines import (
    joint_macs,
    losses_of,
    middle_depth,
    resized,
    small_reference,
    start_joint,
    widened,
)
from tests.conftest import ROOT, VOCAB, random_batches

T = 12
KINDS = {
    "shallow_longer": {"start": "scratch", "depth": "shallow"},
    "dense": {"start": "scratch", "depth": "full"},
    "deep_supervision": {"start": "scratch", "depth": "full", "exits": "both"},
    "static_mid": {"start": "scratch", "depth": "middle"},
    "shallow_wide": {"start": "scratch", "depth": "shallow", "widened": True},
    "grow_copy": {"start": "grown", "depth": "full", "budget": "added"},
    "grow_late": {"start": "late", "depth": "full"},
    "grow_late_exits": {"start": "late", "depth": "full", "exits": "both"},
    "continued": {"start": "block1", "depth": "shallow", "budget": "added"},
}


def entry(name: str) -> JointParams:
    return JointParams(**({"budget": "total", "widened": False, "exits": "last", "lr": 1e-3} | KINDS[name]))


@pytest.fixture(scope="module")
def block1() -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    return DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2, ffn_dim=64, tie_embeddings=True)


@pytest.fixture(scope="module")
def ledger(block1) -> Ledger:
    return Ledger.of(block1, T).grown(6, "sequence")


@pytest.mark.parametrize("name", KINDS)
def test_what_training_costs_is_what_torch_counts(name, block1, ledger):
    model = start_joint(entry(name), block1, ledger, 0.5)
    trainer, (x, y) = Trainer(losses_of(entry(name), model), VOCAB), random_batches(1, length=T)[0]
    counter = FlopCounterMode(display=False)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        trainer.compute_loss(model, x, y).backward()
    # nothing before the first layer needs a gradient of its input, so its three products cost one less
    assert counter.get_total_flops() / 2 == pytest.approx(joint_macs(entry(name), model, T, x.numel()), rel=0.02)


def test_depths_and_starts(block1, ledger):
    def start(name):
        return start_joint(entry(name), block1, ledger, 0.5)

    depths = {name: start(name).num_layers for name in KINDS}
    assert depths == {
        "shallow_longer": 2,
        "dense": 6,
        "deep_supervision": 6,
        "static_mid": 4,
        "shallow_wide": 2,
        "grow_copy": 6,
        "grow_late": 6,
        "grow_late_exits": 6,
        "continued": 2,
    }
    grown = start("grow_copy")
    assert [start(name).exit_layer for name in ("grow_late", "grow_late_exits")] == [6, 2]
    for number in range(6):
        for key, tensor in grown.layers[number].state_dict().items():
            assert torch.equal(tensor, block1.layers[number % 2].state_dict()[key])
    assert all(parameter.requires_grad for parameter in grown.parameters())
    x = random_batches(1)[0][0]
    assert torch.equal(start("continued")(x), block1(x))
    assert start("continued").embedding.weight is not block1.embedding.weight
    supervised = start("deep_supervision")
    assert (supervised.exit_layer, list(losses_of(entry("deep_supervision"), supervised).layer_weights())) == (
        2,
        [2, 6],
    )


def test_two_exits_need_two_depths(block1, ledger):
    """Few tokens go deep, so the middle depth is that of block 1."""
    wanted = entry("static_mid").model_copy(update={"exits": "both"})
    with pytest.raises(StageError, match="a baseline with exits both and depth middle has 2 layers, as block 1"):
        start_joint(wanted, block1, ledger, 0.05)


def test_the_middle_depth_is_the_average_of_the_routed():
    assert [middle_depth(2, 4, ratio) for ratio in (0.1, 0.5, 0.9)] == [2, 3, 4]
    assert middle_depth(2, 6, 0.3) == 3
    assert [middle_depth(2, 3, 0.5), middle_depth(3, 4, 0.5)] == [3, 4]  # two are as near: the larger


def test_the_wide_model_costs_as_much_as_the_routed_one(block1, ledger):
    gated = replace(ledger, gated=True)
    wanted = gated.routed(0.5, 300)
    wide = start_joint(entry("shallow_wide"), block1, gated, 0.5, 300)
    step = Ledger.of(DeepSupervisionTransformer(**widened(block1.sizes, T, 1.3 * wanted), exit_layer=2), T).full
    assert Ledger.of(wide, T).full == pytest.approx(wanted, rel=0.15)
    assert step == pytest.approx(1.3 * wanted, rel=0.15)
    assert wide.sizes["num_layers"] == 2


@pytest.mark.parametrize(("heads", "dim", "found"), [(3, 32, 30), (6, 32, 36), (4, 1, 8), (4, 24, 24)])
def test_a_model_of_another_width_has_whole_pairs_in_each_head(heads, dim, found):
    sizes = resized({"num_heads": heads, "dim": 12 * heads, "ffn_dim": 24 * heads}, dim)
    assert sizes == {"num_heads": heads, "dim": found, "ffn_dim": 2 * found}


def test_the_reference_is_small(block1):
    reference = small_reference(block1, 16, 1)
    assert (reference.num_layers, reference.sizes["dim"], reference.sizes["ffn_dim"]) == (1, 16, 32)


def test_the_distance_from_the_budget_and_what_counts_as_added():
    assert Budget(100.0, 50.0).spent(101.0, 1e-3) == {
        "lr": 1e-3,
        "train_macs": 151.0,
        "added_macs": 101.0,
        "budget_macs": 100.0,
        "distance_from_budget": pytest.approx(0.01),
    }
    assert Budget(150.0).spent(150.0, 1e-3)["added_macs"] is None


def trial(lr: float, ppl: float) -> Trial:
    return Trial(lr, torch.nn.Linear(1, 1), History(best={"ppl": ppl}))  # type: ignore[arg-type]


def test_the_search_keeps_the_best_and_says_when_it_lies_at_an_end(capsys):
    ppl = {0.5: 9.0, 1.0: 8.0, 2.0: 8.5}
    found = search_rates(1.0, [0.5, 1.0, 2.0], lambda lr: trial(lr, ppl[lr]))
    assert found.facts == {"lr": 1.0, "lr_tried": 3, "lr_at_edge": False}
    assert found.tried == ppl
    assert "0.5: 9.000, 1: 8.000, 2: 8.500; taken: 1" in capsys.readouterr().out
    assert search_rates(2.0, [0.5, 1.0], lambda lr: trial(lr, ppl[lr])).facts["lr_at_edge"]
    assert "the end of what was tried" in capsys.readouterr().out
    alone = search_rates(1.0, [2.0], lambda lr: trial(lr, ppl[lr]))
    assert alone.facts == {"lr": 2.0, "lr_tried": 1, "lr_at_edge": False}


def test_a_rate_that_diverges_is_passed_over_unless_all_do(capsys):
    def train(lr: float) -> Trial:
        if lr > 1:
            raise NonFiniteLossError("loss is nan")
        return trial(lr, 5.0)

    found = search_rates(1.0, [1.0, 2.0], train)
    assert (found.best.lr, found.tried[2.0]) == (1.0, math.inf)
    assert "learning rate 2: loss is nan" in capsys.readouterr().out
    with pytest.raises(NonFiniteLossError):
        search_rates(4.0, [1.0, 2.0], train)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"start": "block1"}, "budget must be added"),
        ({"start": "scratch", "budget": "added"}, "budget must be total"),
        ({"start": "grown", "budget": "added", "depth": "shallow"}, "depth shallow does not go with start grown"),
        ({"depth": "shallow", "exits": "both"}, "exits must be last"),
    ],
)
def test_impossible_baselines_are_refused(changes, sentence):
    values = {"budget": "total", "start": "scratch", "depth": "full", "widened": False, "exits": "last", "lr": 1e-3}
    with pytest.raises(ValueError, match=sentence):
        JointParams(**(values | changes))


def test_names_are_files_so_they_are_plain_and_none_is_taken():
    rest = load_params(ROOT / "params.yaml").baselines.model_dump(exclude={"block2"}) | {"joint": {}}
    block2 = {"select": "random", "protocol": "ashem", "lr": 1e-3}
    for name in ("shallow_continued", "ashem", "../x", "Big"):
        with pytest.raises(ValueError, match="name"):
            BaselinesParams(block2={name: block2}, **rest)
    assert BaselinesParams(block2={"random_2": block2}, **rest)
