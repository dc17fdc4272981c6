"""Blocks above block 2 through their stages, tiny: what is mined, trained and answered; a further block runs alone."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lego.base.artifacts import read_json
from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.base.params import load_params
from lego.evaluation.cascade import ExitTable, certified_thresholds, exit_table, gates_for
from lego.evaluation.routed import perplexity
from lego.mining.hidden_states import HiddenStateStore
from lego.model.checkpoint import load_model
from lego.model.cost import Ledger, cascade_macs
from lego.routing.cascade import CascadeDecoder
from lego.routing.decoder import ALWAYS_DEEP, RoutedDecoder
from lego.tokens.batches import split_batches
from stages.cascade import evaluate, mine, train
from stages.cascade.settings import FILE, block_of, load_blocks
from tests.conftest import ROOT, Clone
from tests.model.test_blocks import SHAPES, models
from tests.model.test_cost import counted_macs
from tests.stages.conftest import code_deps, code_lines, copy_of

STAGES = yaml.safe_load((ROOT / "stages/cascade/dvc.yaml").read_text())["stages"]
THIRD = {"layers": 1, "lr": 3e-3, "epochs": 1}
FOURTH = {"from": "cascade/third", "repeats": 2, "branch": "lora", "branch_rank": 4, "init_new_layers": "random"}


def with_blocks(folder: Path, **blocks: dict) -> None:
    """Writes the parameters of the pipeline: each block is the one that is shipped, with changes."""
    values = yaml.safe_load((ROOT / FILE).read_text())["blocks"]["third"]
    file = folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        yaml.safe_dump({"blocks": {name: values | changes for name, changes in blocks.items()}}, sort_keys=False)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_deps_equal_the_transitive_imports(stage):
    entry = STAGES[stage]["do"]
    assert entry["cmd"] == f"python -m stages.cascade.{stage} ${{key}}"
    assert code_deps(entry) == code_lines(f"cascade/{stage}")


@pytest.fixture(scope="module")
def run(finished, tmp_path_factory) -> Path:
    """A finished run of the root pipeline with two blocks more."""
    folder = copy_of(finished.folder, tmp_path_factory.mktemp("cascade") / "run").folder
    with_blocks(folder, third=THIRD, fourth=THIRD | FOURTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("third", "fourth"):
            for stage in (mine, train, evaluate):
                stage.main(name)
    return folder


@pytest.fixture
def inside(run, monkeypatch) -> Path:
    monkeypatch.chdir(run)
    return run


def test_what_is_mined_is_hard_at_every_exit_below(inside):
    model, store = load_model("data/cascade/third"), HiddenStateStore("data/cascade_hard/fourth")
    thresholds = store.manifest["mined"]["thresholds"]
    assert len(thresholds) == 3
    shard = store.read_shard(0)
    for x, hard in zip(shard["inputs"].long().split(8), shard["hard"].split(8), strict=True):
        gone = CascadeDecoder(model, thresholds[:2], len(x)).read(x)
        last = exit_confidences(model, x)[-1]
        assert torch.equal(hard.flatten(), (gone.exits == 3) & (last < thresholds[2]))
    assert 0 < store.hard_tokens < 0.7 * 0.7 * store.manifest["tokens"]


@torch.no_grad()
def exit_confidences(model, x: torch.Tensor) -> list[torch.Tensor]:
    """Of every exit, each token having come there."""
    states = dict(model.outputs(x, model.exits))
    return [model.compute_confidence(states[layer], layer).flatten() for layer in model.exits]


def test_each_block_leaves_what_is_below_as_it_is_and_has_learned(inside):
    for below, name in (("data/phase2", "third"), ("data/cascade/third", "fourth")):
        grown = load_model(f"data/cascade/{name}")
        state, block = grown.state_dict(), grown.blocks[-1]
        for key, tensor in load_model(below).state_dict().items():
            assert torch.equal(tensor, state[key]), key
        assert (block.repeats, len(block.own)) == (1 if name == "third" else 2, 1)
        last, repeated = grown.layer(block.first), grown.layer(block.first - block.repeats)
        assert not torch.equal(last.self_attn.q_proj.weight, repeated.self_attn.q_proj.weight)


def test_the_metrics_are_what_decoding_answers(inside):
    """Routed perplexity at the thresholds of calibration text, mixed by gates, token after token."""
    found, model = read_json("metrics/cascade/fourth.json"), load_model("data/cascade/fourth")
    calibration = split_batches("data/tokens", "calibration", 8)
    first = (0.0, read_json("data/exit/exit.json")["fit_tokens"] / calibration.blocks.tokens)
    gates = gates_for(model, split_batches("data/tokens", "calibration", 8, first), "cpu")
    table = exit_table(model, calibration, "cpu", gates)
    mined = read_json("data/cascade/fourth/mined.json")
    thresholds = table.thresholds(mined["ratios"])
    losses, exits = [], []
    for x, y in split_batches("data/tokens", "test", 8):
        decoder = CascadeDecoder(model, thresholds, len(x), gates=gates)
        read = decoder.read(x)
        losses.append(torch.nn.functional.cross_entropy(read.logits, y.flatten(), reduction="none"))
        exits.append(read.exits)
    assert perplexity(torch.cat(losses).double().numpy()) == pytest.approx(found["ppl"], rel=1e-5)
    for block in (2, 3, 4):
        assert float((torch.cat(exits) >= block).double().mean()) == pytest.approx(found[f"share_{block}"], abs=1e-9)
    two = read_json("metrics/details/ashem.json")  # of the root pipeline, with its own gate
    assert found["exit_1_ppl"] == pytest.approx(two["shallow_ppl"], rel=1e-6)
    assert found["exit_2_ppl"] == pytest.approx(two["deep_ppl"], rel=1e-5)
    shares = [found[f"share_{block}"] for block in (2, 3, 4)]
    ledger = Ledger.of(model, 32)
    assert found["macs"] == pytest.approx(cascade_macs(model, 32, shares) / ledger.shallow())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ledger_counts_what_torch_counts(shape):
    """All tokens at every exit; and of two blocks what the ledger of two says."""
    *_, model = models(shape)
    x = torch.randint(0, 97, (3, 12))
    decoder = CascadeDecoder(model, [ALWAYS_DEEP] * len(shape), 3)
    assert counted_macs(lambda: decoder.read(x)) == cascade_macs(model, 12, [1.0] * len(shape)) * x.numel()
    if len(shape) == 1:
        ledger = Ledger.of(model, 12)
        assert cascade_macs(model, 12, [0.3]) == pytest.approx(ledger.routed(0.7))
        assert counted_macs(lambda: RoutedDecoder(model, ALWAYS_DEEP, 3).read(x)) == ledger.routed(0.0) * x.numel()


def test_tokens_leave_at_the_first_exit_that_is_sure():
    confidence = np.array([[0.9, 0.1, 0.2, 0.3], [0.1, 0.9, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5]])
    table = ExitTable(np.arange(12.0).reshape(3, 4), np.ones((3, 4), dtype=bool), confidence)
    assert table.exits([0.5, 0.5]).tolist() == [0, 1, 2, 2]
    assert table.routed([0.5, 0.5])["share_2"] == 0.75
    assert table.routed([0.5, 0.5])["share_3"] == 0.5
    low, high = table.thresholds([0.75, 0.5])
    assert (confidence[0] < low).sum() == 3
    assert 0.1 < high < 0.9
    assert table.thresholds([0.0, 0.5])[1] == 0.0  # nobody comes there


def test_one_number_moves_all_thresholds_to_the_most_exits_whose_risk_is_certified():
    """Where the unsure tokens alone need block 2, and none block 3, most may leave at once."""
    generator = np.random.default_rng(0)
    sure = generator.random((2, 40_000))
    nll = np.stack([np.where(sure[0] < 0.2, 3.0, 1.0), np.ones(40_000), np.ones(40_000)])
    table = ExitTable(nll, nll < 2, np.vstack([sure, sure[:1]]))
    params = load_params(ROOT / "params.yaml").routing.model_copy(update={"epsilon": 0.05, "risk_candidates": 20})
    units = np.arange(30_000) // 30
    thresholds, found = certified_thresholds(table.part(0, 10_000), table.part(10_000), units, params)
    risk = table.routed_nll(thresholds)[10_000:].mean() - 1.0
    assert found.chosen is not None
    assert 0 <= risk <= 0.05
    assert thresholds[0] < 0.5  # most leave at once
    with pytest.raises(StageError, match="cannot be certified with max_prob"):
        certified_thresholds(
            table.part(0, 10_000), table.part(10_000), units, params.model_copy(update={"epsilon": 1e-4})
        )
    free = params.model_copy(update={"epsilon": 1e-4, "otherwise": "always_deep"})
    assert certified_thresholds(table.part(0, 10_000), table.part(10_000), units, free)[0] == [ALWAYS_DEEP] * 2


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ({}, "blocks must name at least one, got none"),
        ({"a": {"from": "phase1"}}, "blocks.a.from must be one of phase2, got 'phase1'"),
        ({"a": {"from": "cascade/b"}, "b": {"from": "cascade/a"}}, "blocks.a.from goes in a circle: a on b on a"),
        ({"A": {}}, "blocks must have names of letters a-z, digits and _"),
        ({"a": {"repeats": 0, "layers": 0}}, "repeats 0 repeats no layer, and layers adds none"),
        ({"a": {"hard_example_ratio": 1.5}}, "blocks.a.hard_example_ratio must be in (0, 1), got 1.5"),
    ],
)
def test_parameters_that_cannot_work_are_named(blocks, said, tmp_path, monkeypatch):
    with_blocks(tmp_path, **blocks)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=re.escape(said)):
        load_blocks()


def test_a_block_that_is_not_there_or_does_not_fit_is_named(inside, monkeypatch):
    with pytest.raises(StageError, match=r"params\.yaml: blocks must have 'fifth', it has third, fourth"):
        block_of("fifth")
    below, _ = train.stands_on("phase2")
    block = block_of("third").model_copy(update={"repeats": 9})
    with pytest.raises(StageError, match=r"stages/cascade/params\.yaml: repeats must be in 0\.\."):
        train.grown(block, below, 0)


@pytest.mark.slow
def test_a_further_block_runs_alone(reproduced, tmp_path):
    clone: Clone = copy_of(reproduced, tmp_path / "clone")
    with_blocks(clone.folder, third=THIRD)
    ran = re.findall(r"Running stage '(?:.*:)?([\w@]+)'", clone.run("dvc", "repro", "stages/cascade/dvc.yaml"))
    assert ran == ["mine@third", "train@third", "evaluate@third"]
    with_blocks(clone.folder, third=THIRD, fourth=THIRD | FOURTH)
    ran = re.findall(r"Running stage '(?:.*:)?([\w@]+)'", clone.run("dvc", "repro", "stages/cascade/dvc.yaml"))
    assert ran == ["mine@fourth", "train@fourth", "evaluate@fourth"]
    assert {file.stem for file in (clone.folder / "metrics/cascade").iterdir()} == {"third", "fourth"}
