"""Rows of stage 2 by path: shares, targets, mismatches, and the lowest loss that a head can reach."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lego.base.parameter_files import ParamsError
from lego.satipatthana.paths import Rows, Way, allocate, by_path, damaged, floor, floors, losses
from lego.satipatthana.settings import PATHS
from lego.satipatthana.void import VoidSource, derangement, derangements
from tests.satipatthana.conftest import PARAMS, a_log, clusters, small, system


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=5), st.integers(5, 200))
def test_r6_1_rows_follow_the_shares_and_every_path_has_one(weights, rows):
    shares = {path: weight / sum(weights) for path, weight in zip(PATHS, weights, strict=False)}
    counts = allocate(shares, rows)
    assert sum(counts.values()) == rows
    assert min(counts.values()) >= 1
    assert all(counts[path] == 1 for path, share in shares.items() if share * rows < 1 - 1e-9)
    assert all(counts[path] < share * rows + 1 + 1e-9 for path, share in shares.items() if share * rows >= 1)
    if all(share * rows >= 1 for share in shares.values()):
        assert all(counts[path] > share * rows - 1 - 1e-9 for path, share in shares.items())
    with pytest.raises(ValueError, match="is too small for"):
        allocate(shares, len(shares) - 1)


def test_r8_7_clean_augmented_drunk_mismatched_and_void_rows_in_their_shares():
    made, train = system(small()), clusters(80)
    counts = allocate(PARAMS.paths.shares(), 40)
    void = VoidSource(train.x, train.y, PARAMS.void)
    clean = Way.of(made, train.x)
    rows = damaged(made, clean, counts, PARAMS.stage2, void, torch.Generator().manual_seed(0))
    of = {path: rows.path == number for number, path in enumerate(PATHS)}
    assert {path: int(one.sum()) for path, one in of.items()} == counts
    assert (rows.target[of["clean"]] == 1).all()
    assert not rows.target[of["drunk"] | of["mismatch"]].any()
    assert (rows.target[of["void"]] == torch.tensor(PARAMS.stage2.void_target)).all()
    severities = 1 - rows.target[of["augmented"]]
    assert len(severities.unique()) == counts["augmented"]
    for path in ("clean", "augmented"):  # states as the log ends
        torch.testing.assert_close(rows.state[of[path]], rows.log.final[of[path]])
    again = damaged(made, clean, counts, PARAMS.stage2, void, torch.Generator().manual_seed(0))
    assert torch.equal(again.state, rows.state)
    with pytest.raises(ParamsError, match=r"must be in \(0, 1\)"):
        small(paths__clean=0.0)
    with pytest.raises(ParamsError, match=r"must sum to 1, got 1\.1"):
        small(paths__clean=0.35)
    with pytest.raises(ParamsError, match=r"must sum to 1, got 0\.95"):
        small(paths__clean=0.2)
    assert small(paths__void=0.0).paths.shares()["clean"] == pytest.approx(0.4)  # it inherits with the augmented ones
    assert sum(small(paths__void=0.0).paths.shares().values()) == pytest.approx(1)


def test_r6_1_rows_go_to_paths_at_random_in_each_batch():
    made, train = system(small()), clusters(40)
    clean, generator, taken = Way.of(made, train.x), torch.Generator().manual_seed(0), []
    for _ in range(200):
        rows = damaged(made, clean, {"clean": 20, "mismatch": 20}, PARAMS.stage2, None, generator)
        kept = rows.encoded[rows.path == PATHS.index("clean")]
        taken.append((kept[:, None] == train.x).all(dim=2).any(dim=0).float())
    share = torch.stack(taken).mean(dim=0)  # of batches in which each row was clean
    assert float(share.min()) > 0.35
    assert float(share.max()) < 0.65


def test_r6_3b_every_head_has_its_floor_and_every_path_its_numbers():
    path = torch.tensor([PATHS.index(one) for one in ("clean", "mismatch", "augmented")])
    rows = Rows(torch.zeros(3, 8), a_log(3), torch.zeros(3, 1), torch.zeros(3, 12), torch.tensor([1.0, 0.0, 0.5]), path)
    found = floors(rows, ("trust", "conformity"), ())
    assert found["floor"] == pytest.approx(math.log(2) / 3, rel=1e-4)  # the half alone is undecided
    assert found["floor_conformity"] == pytest.approx(math.log(2) / 2, rel=1e-4)  # which is not shown the mismatch
    pooled = floors(rows, ("trust",), ("clean", "augmented", "mismatch"))
    assert pooled["pooled_constant"] == pytest.approx(0.5)
    assert pooled["floor"] == pytest.approx(math.log(2), rel=1e-4)
    told = by_path(rows, torch.tensor([0.9, 0.2, 0.4]))
    assert (told["trust_mismatch"], told["target_augmented"], told["rows_clean"]) == (pytest.approx(0.2), 0.5, 1)
    assert told["floor_augmented"] == pytest.approx(math.log(2), rel=1e-4)


def test_r6_3_a_mismatch_is_another_row_and_its_error_is_that_of_the_state_shown():
    for seed in range(20):
        order = derangement(6, torch.Generator().manual_seed(seed))
        assert sorted(order.tolist()) == list(range(6))
        assert not (order == torch.arange(6)).any()
    orders = derangements(6000, 4, torch.Generator().manual_seed(0))
    kinds, counts = torch.unique(orders, dim=0, return_counts=True)
    assert not (orders == torch.arange(4)).any()
    assert len(kinds) == 6  # the cycles through all four, each as often
    assert counts.min() > 850
    with pytest.raises(ValueError, match="needs at least 2 rows"):
        derangement(1, torch.Generator())
    made, train = system(small()), clusters(12)
    clean = Way.of(made, train.x)
    rows = damaged(made, clean, {"mismatch": 12}, PARAMS.stage2, None, torch.Generator().manual_seed(3))
    assert ((rows.state - rows.log.final).norm(dim=1) > 1e-4).all()
    honest = damaged(made, clean, {"clean": 12}, PARAMS.stage2, None, torch.Generator().manual_seed(3))
    assert float(rows.recon_error.mean()) != pytest.approx(float(honest.recon_error.mean()), rel=1e-6)


def test_r6_3_a_head_that_cannot_see_the_state_is_not_trained_on_mismatch():
    path = torch.tensor([PATHS.index(one) for one in ("clean", "mismatch", "drunk")])
    rows = Rows(torch.zeros(3, 8), a_log(3), torch.zeros(3, 1), torch.zeros(3, 12), torch.tensor([1.0, 0.0, 0.0]), path)
    logits = {head: torch.tensor([2.0, 9.0, -2.0]) for head in ("trust", "conformity")}
    found = losses(logits, rows, {"trust": 1.0, "conformity": 2.0})
    seen = functional.binary_cross_entropy_with_logits(torch.tensor([2.0, -2.0]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found["conformity"], seen)
    assert float(found["trust"]) > 2
    torch.testing.assert_close(found["loss"], found["trust"] + 2 * found["conformity"])


def test_r6_3b_the_floor_of_pooled_paths_is_the_constant_of_the_note():
    path = torch.tensor([PATHS.index(one) for one in ("clean", "augmented", "mismatch", "drunk")])
    target = torch.tensor([1.0, 0.7, 0.0, 0.0])
    lowest, constant = floor(target, path, ("clean", "augmented", "mismatch"))
    assert constant == pytest.approx(0.567, abs=1e-3)  # which the first notes took for success
    p = torch.tensor([constant, constant, constant, 0.0])
    expected = functional.binary_cross_entropy(p.clamp(1e-7, 1 - 1e-7), target)
    assert lowest == pytest.approx(float(expected), rel=1e-5)
    separable, none = floor(target, path, ())
    assert math.isnan(none)
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3)) / 4
    assert separable == pytest.approx(entropy, rel=1e-4)
