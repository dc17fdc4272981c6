"""States that phase 2 makes anew: the batches, selections and steps of stored ones, without a store of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lego import Trainer, create_standard_config, grow_model
from lego.base.artifacts import ArtifactError
from lego.growing import selection
from lego.growing.hard_batches import HardBlockBatches, HardTokenBatches
from lego.growing.upper_layers import train_gathered
from lego.mining.hidden_states import HiddenStateStore
from tests.conftest import VOCAB, logits_close
from tests.mining.test_hidden_states import random_block1, write

DEVICE = torch.device("cpu")


def stores_of(folder: Path, layer: int | None = None) -> list[HiddenStateStore]:
    """One with states of a layer in float32 and one that makes them anew, of the same text and model."""
    model, found = random_block1(), []
    for dtype in ("float32", None):
        (folder / str(dtype)).mkdir()
        found.append(write(folder / str(dtype), model, dtype, layer=layer)[0])
    selection.recompute(found[1], model, DEVICE, layer)
    return found


@pytest.fixture
def stores(tmp_path):
    return stores_of(tmp_path)


def test_a_store_without_states_is_smaller_by_them_alone(stores):
    stored, online = stores
    assert (stored.online, online.online) == (False, True)
    for one, other in zip(stored.shards, online.shards, strict=True):
        assert {key: one[key] for key in ("blocks", "tokens", "hard_tokens")} == {
            key: other[key] for key in ("blocks", "tokens", "hard_tokens")
        }
        sizes = [(store.folder / shard["file"]).stat().st_size for store, shard in ((stored, one), (online, other))]
        assert sizes[0] - sizes[1] == pytest.approx(4 * 32 * one["tokens"], abs=200)
    assert {*stored.read_shard(0)} - {*online.read_shard(0)} == {"exit_states"}


def test_batches_are_those_of_stored_states(stores):
    batches = [HardBlockBatches(store, batch_size=30, tokens_per_epoch=60, seed=3) for store in stores]
    lone = [HardTokenBatches(store, 50, 120, seed=3) for store in stores]
    for number in range(3):
        for pair in (batches, lone):
            for one in pair:
                one.set_epoch(number)
            for mine, theirs in zip(*pair, strict=True):
                logits_close(mine[0], theirs[0])
                assert all(torch.equal(a, b) for a, b in zip(mine[1:], theirs[1:], strict=True))
    logits_close(*(store.hard_examples(1)["hidden_states"] for store in stores))


@pytest.mark.parametrize(("layer", "rank"), [(None, 0), (1, 0), (0, 0), (0, 3)])
def test_block_2_takes_the_same_steps(tmp_path, layer, rank):
    weights = []
    for store in stores_of(tmp_path, layer):
        torch.manual_seed(1)
        grown = grow_model(random_block1(), 4, block2_context="sequence", branch_layer=layer, branch_rank=rank)
        optimizer = Trainer(create_standard_config(4), VOCAB).create_optimizer(grown, 1e-3)
        batches = HardBlockBatches(store, batch_size=30, tokens_per_epoch=60, seed=3)
        loss = train_gathered(grown, batches, optimizer, DEVICE)
        weights.append(torch.cat([torch.tensor([loss]), *(p.detach().flatten() for p in grown.parameters())]))
    logits_close(*weights)


def test_selections_by_exit_states_are_the_same(stores):
    model = random_block1()
    for score in (selection.exit_loss(model, DEVICE), selection.easy):
        one, other = (selection.scores_of(store, score, 5) for store in stores)
        for mine, theirs in zip(one, other, strict=True):
            logits_close(mine, theirs)


def test_without_a_model_it_says_what_is_missing(stores):
    stores[1].compute = None
    with pytest.raises(ArtifactError, match=r"holds no exit states \(ashem\.states online\); give it a model"):
        stores[1].hard_examples(0)
    with pytest.raises(KeyError, match="nonsense"):
        selection.scores_of(stores[0], lambda blocks: blocks["nonsense"], 5)
