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
from lego.model.reached import Reached
from tests.conftest import VOCAB, logits_close
from tests.mining.test_hidden_states import random_block1, write

DEVICE = torch.device("cpu")


def stores_of(folder: Path, layer: int | None = None) -> list[HiddenStateStore]:
    """One with states of a layer in float32, one that makes them anew, and of a lower layer one with keys and values.

    All are of the same text and model.
    """
    model, found = random_block1(), []
    for dtype, kept in (("float32", False), (None, False), ("float32", True))[: 2 + (layer is not None)]:
        place = folder / f"{dtype}{kept}"
        place.mkdir()
        found.append(write(place, model, dtype, layer=layer, keys_values=kept)[0])
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
    for other in weights[1:]:
        logits_close(other, weights[0])


@pytest.mark.parametrize("layer", [None, 0, 1])
def test_selections_by_exit_states_are_the_same(tmp_path, layer):
    model, found = random_block1(), stores_of(tmp_path, layer)
    for score in (selection.exit_loss(model, DEVICE, layer), selection.easy):
        first, *others = (selection.scores_of(store, score, 5) for store in found)
        for other in others:
            for mine, theirs in zip(first, other, strict=True):
                logits_close(mine, theirs)


@torch.no_grad()
def test_what_is_kept_comes_back_as_it_was():
    model, ids = random_block1(), torch.randint(0, VOCAB, (2, 7))
    reached = model.reach(model.embedding(ids), begin=0)
    packed = reached.packed()
    assert packed.shape == (2, 7, 2 * 32 + 2 * 2 * 32)
    again = Reached.unpacked(packed, model.sizes)
    assert torch.equal(again.states[0], reached.states[0])
    assert torch.equal(again.states[1], reached.states[-1])
    for mine, theirs in zip(again.keys_values, reached.keys_values, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_without_a_model_it_says_what_is_missing(stores):
    stores[1].compute = None
    with pytest.raises(ArtifactError, match=r"holds no exit states \(ashem\.states online\); give it a model"):
        stores[1].hard_examples(0)
    with pytest.raises(KeyError, match="nonsense"):
        selection.scores_of(stores[0], lambda blocks: blocks["nonsense"], 5)
