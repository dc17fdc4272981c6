"""Selections against brute force: as many tokens as asked, the right ones, and the documented mistake."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch.nn import functional as F

from lego import DeepSupervisionTransformer, collect_hard_examples
from lego.base.artifacts import ArtifactError
from lego.growing.hard_batches import HardBlockBatches, HardTokenBatches
from lego.growing.selection import (
    easy,
    everything,
    exit_loss,
    expected_gain,
    random,
    reducible_loss,
    scores_of,
    top,
    whole_blocks,
    with_replay,
)
from lego.mining.hard_tokens import exit_states
from lego.mining.hidden_states import HiddenStateStore, StoreWriter
from lego.model.exit_criteria import Ridge
from tests.conftest import VOCAB, random_batches

CPU = torch.device("cpu")
BATCHES = random_batches(5)


@pytest.fixture(scope="module")
def model() -> DeepSupervisionTransformer:
    torch.manual_seed(0)
    return DeepSupervisionTransformer(VOCAB, 32, 2, 4, exit_layer=2, init_std=0.3)


@pytest.fixture(scope="module")
def store(model, tmp_path_factory) -> HiddenStateStore:
    folder = tmp_path_factory.mktemp("store")
    confidences = torch.cat([batch[3].flatten() for batch in exit_states(model, BATCHES, "cpu")])
    writer = StoreWriter(folder, float(confidences.quantile(0.4)), "float32", 100)
    for batch in exit_states(model, BATCHES, "cpu"):
        writer.add(*batch)
    writer.close(split="train", macs=0, block1_sha256="", tokenizer_sha256="")
    return HiddenStateStore(folder)


def losses(model: DeepSupervisionTransformer) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none") for x, y in BATCHES])


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=5), st.integers(0, 8))
def test_top_takes_the_largest_and_of_equal_ones_the_first(rows, count):
    scores = [torch.tensor([row], dtype=torch.float) for row in rows]
    masks, values = top(scores, count), [value for row in rows for value in row]
    best = sorted(range(len(values)), key=lambda place: (-values[place], place))[:count]
    assert set(flat(masks).nonzero().flatten().tolist()) == set(best)
    assert [mask.shape for mask in masks] == [score.shape for score in scores]


def test_losses_and_confidences_are_those_of_the_model(model, store):
    assert len(store.shards) > 1
    torch.testing.assert_close(flat(scores_of(store, exit_loss(model, CPU), 3)), losses(model))
    with torch.no_grad():
        confidence = torch.cat([model(x).softmax(-1).amax(-1).flatten() for x, _ in BATCHES])
    torch.testing.assert_close(flat(scores_of(store, easy, 3)), confidence)


def test_reducible_loss_subtracts_the_references(model, store):
    torch.manual_seed(1)
    reference = DeepSupervisionTransformer(VOCAB, 16, 1, 4, exit_layer=1, init_std=0.3)
    found = flat(scores_of(store, reducible_loss(model, reference, CPU), 2))
    torch.testing.assert_close(found, losses(model) - losses(reference))


def test_expected_gain_orders_by_what_was_fitted(model, store):
    torch.manual_seed(2)
    direction, fit = 0.05 * torch.randn(32), Ridge(32)  # gains of a fraction of a nat, as they are
    states = torch.cat([batch[2].flatten(0, 1) for batch in exit_states(model, BATCHES, "cpu")])
    gains = states @ direction
    fit.add(states, -gains)  # the criterion's log-odds are the negative gain
    found = flat(scores_of(store, expected_gain(fit.solve(1e-6), CPU), 4))
    assert spearmanr(found, gains).statistic > 0.98


def test_random_is_any_share_and_the_same_for_a_seed(store):
    one, again, other = (flat(scores_of(store, random(seed), 4)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    share = flat(top(scores_of(store, random(3), 4), 100)).float().mean()
    assert share == pytest.approx(100 / len(one))


def test_replay_mixes_easy_tokens_among_the_hard_ones(store):
    def masks(share: float) -> torch.Tensor:
        view = with_replay(store, share, seed=1)
        return flat([view.read_shard(index)["hard"] for index in range(len(view.shards))])

    hard = masks(0.0)
    assert with_replay(store, 0.0, 1) is store
    for share in (0.1, 0.25):
        both = masks(share)
        assert not (hard & ~both).any()
        assert (both & ~hard).sum() / both.sum() == pytest.approx(share, abs=0.01)
    assert masks(0.9).all()  # there are no more


def test_whole_blocks_is_the_mistake_that_makes_nearly_all_hard(store):
    assert flat(everything(store)).all()
    masks, hard = flat(whole_blocks(store)), flat([store.read_shard(n)["hard"] for n in range(len(store.shards))])
    assert hard.float().mean() == pytest.approx(0.4, abs=0.01)
    assert masks.float().mean() > 0.95
    assert not (hard & ~masks).any()


def test_a_selection_takes_the_place_of_the_hard_tokens_everywhere(model, store):
    masks = top(scores_of(store, easy, 4), 60)
    view = store.selecting(masks)
    assert view.hard_tokens == 60
    assert store.hard_tokens != 60
    assert [int(view.hard_counts(n).sum()) for n in range(len(view.shards))] == [int(mask.sum()) for mask in masks]
    wanted = collect_hard_examples(model, BATCHES, 2.0, "cpu")["targets"][flat(masks)]
    for kind in (HardTokenBatches, HardBlockBatches):
        batches = kind(view, 20, 60, seed=0)
        seen = []
        for batch in batches:
            seen += (batch[1] if kind is HardTokenBatches else batch[2][batch[1]]).tolist()
        if kind is HardTokenBatches:
            assert sorted(seen) == sorted(wanted.tolist())
        else:
            assert set(seen) <= set(wanted.tolist())
    with pytest.raises(ArtifactError, match="no token is selected"):
        store.selecting([mask & False for mask in masks])
