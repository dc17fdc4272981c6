"""What a finished run holds against the texts and models it is of; that dvc makes the same bytes is in test_dvc.py."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer

from lego import (
    DeepSupervisionTransformer,
    HiddenStateStore,
    StageConfig,
    Trainer,
    TrainingConfig,
    compute_confidence_threshold,
    load_model,
)
from lego.base.artifacts import read_tensors
from lego.base.params import load_params
from lego.model.checkpoint import same_block1
from lego.text.corpus import Corpus
from lego.text.sources import stdlib_documents
from lego.text.tokenizer import fit_bpe
from lego.tokens.batches import EvaluationBatches
from lego.tokens.blocks import PackedBlocks, train_text
from tests.conftest import TINY, Clone


@pytest.fixture(scope="module")
def clone(finished) -> Clone:
    return finished


def test_the_tables_of_all_tokens_give_the_metrics(clone):
    table, metrics = (
        read_tensors(clone.folder / "data/evaluation/test.safetensors"),
        clone.json("metrics/details/ashem.json"),
    )
    params, mined = (
        load_params(clone.folder / "params.yaml"),
        clone.json("data/facts/compute_threshold.json")["threshold"],
    )
    easy = table[f"score_{params.routing.criterion}"] >= metrics["threshold"]
    nll = torch.where(easy, table["nll_shallow"], table["nll_deep"]).double()
    assert nll.mean().exp().item() == pytest.approx(metrics["ppl"], rel=1e-6)
    assert torch.where(easy, table["right_shallow"], table["right_deep"]).double().mean() == metrics["acc"]
    hard = table["confidence"] < mined
    assert not torch.equal(hard, ~easy)  # what was mined is not what is routed
    assert table["nll_deep"][hard].double().mean().exp().item() == pytest.approx(metrics["hard_ppl_deep"], rel=1e-6)
    assert nll[hard].mean().exp().item() == pytest.approx(metrics["hard_ppl_after"], rel=1e-6)
    assert (clone.folder / "data/evaluation/validation.safetensors").exists()


def test_block_1_is_bit_identical_in_the_published_model(clone):
    block1, model = (load_model(clone.folder / "data" / phase) for phase in ("phase1", "phase2"))
    assert isinstance(model, DeepSupervisionTransformer)
    assert same_block1(block1, model)
    assert clone.json("data/facts/train_phase2.json")["block1_unchanged"] is True
    assert model.routing_threshold == clone.json("data/facts/compute_threshold.json")["threshold"]
    assert model.block2_context == "sequence"


def routed_trainer(model: DeepSupervisionTransformer) -> Trainer:
    n = model.num_layers
    return Trainer(TrainingConfig([StageConfig((n, n))], model.routing_threshold, model.exit_layer), 300)


def test_3_4_phase_2_stops_on_routed_validation_perplexity(clone):
    """The perplexity that chose the published model is the routed one on validation text, and no other."""
    model = load_model(clone.folder / "data/phase2")
    validation = EvaluationBatches(PackedBlocks(clone.folder / "data/tokens", "validation"), 16)
    stats = routed_trainer(model).evaluate(model, validation)
    assert clone.json("data/facts/train_phase2.json")["val_ppl"] == pytest.approx(stats["ppl"], rel=1e-6)
    assert stats["shallow_ratio"] not in (0.0, 1.0)


def test_the_threshold_is_the_calibration_texts_and_keeps_its_share_after_phase_2(clone):
    recorded_threshold = clone.json("data/facts/compute_threshold.json")
    assert (recorded_threshold["split"], recorded_threshold["leaky"]) == ("calibration", False)
    calibration = EvaluationBatches(PackedBlocks(clone.folder / "data/tokens", "calibration"), 16)
    block1, model = (load_model(clone.folder / "data" / phase) for phase in ("phase1", "phase2"))
    ratio = load_params(clone.folder / "params.yaml").ashem.hard_example_ratio
    assert compute_confidence_threshold(block1, calibration, ratio, "cpu") == recorded_threshold["threshold"]
    share = routed_trainer(model).evaluate(model, calibration)["shallow_ratio"]
    assert share == pytest.approx(1 - ratio, abs=1 / calibration.blocks.tokens)


def test_the_store_holds_the_part_of_train_that_phase_1_did_not_read_in_another_order(clone):
    store, ashem = HiddenStateStore(clone.folder / "data/hard"), load_params(clone.folder / "params.yaml").ashem
    stored = torch.cat([store.read_shard(index)["inputs"] for index in range(len(store.shards))]).tolist()
    parts = []
    for phase in (1, 2):
        blocks = train_text(clone.folder / "data/tokens", phase, ashem.phase2_share, ashem.phase2_split, seed=0)
        parts.append(blocks.rows(torch.arange(len(blocks)))[:, :-1].tolist())
    assert sorted(stored) == sorted(parts[1])
    assert stored != parts[1]
    whole = PackedBlocks(clone.folder / "data/tokens", "train")
    assert sorted(parts[0] + stored) == sorted(whole.rows(torch.arange(len(whole)))[:, :-1].tolist())
    assert clone.json("data/facts/train_phase1.json")["train_text_tokens"] == len(parts[0]) * 32


def test_the_tokenizer_is_fitted_on_train_alone(clone, tmp_path):
    corpus = Corpus(stdlib_documents(), tmp_path / "spool", dict(validation=0.1, calibration=0.1, test=0.1))
    expected = fit_bpe(corpus.texts("train"), TINY["vocab_size"], TINY["max_tokenizer_bytes"])
    published = Tokenizer.from_file(str(clone.folder / "data/tokens/tokenizer/tokenizer.json"))
    assert published.get_vocab() == expected.get_vocab()


def test_the_yardstick_costs_what_mining_and_phase_2_cost(clone):
    assert abs(clone.json("data/facts/train_shallow_continued.json")["distance_from_budget"]) <= 0.02
    routed, yardstick = (clone.json(f"metrics/details/{n}.json") for n in ("ashem", "shallow_continued"))
    assert routed["train_macs"] == pytest.approx(yardstick["train_macs"], rel=0.02)
    added = clone.json("data/facts/added_macs.json")
    assert added["added_macs"] == added["collect_hard_macs"] + added["train_phase2_macs"]
    assert added["collect_hard_macs"] == clone.json("data/facts/collect_hard.json")["macs"]


def test_the_store_is_of_fresh_text_and_the_share_is_near_the_ratio(clone):
    manifest = clone.json("data/hard/manifest.json")
    assert (manifest["split"], manifest["text"], len(manifest["shards"])) == ("train", "fresh", 4)
    assert manifest["tokens"] == clone.json("data/facts/collect_hard.json")["n_tokens"]
    ratio = load_params(clone.folder / "params.yaml").ashem.hard_example_ratio
    assert manifest["hard_tokens"] / manifest["tokens"] == pytest.approx(ratio, abs=0.2)
    assert clone.json("data/facts/compute_threshold.json")["hard_share"] == pytest.approx(ratio, abs=0.001)
