"""What looks at the way: features by hand, paths and their targets, floors, metrics, thresholds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from lego.base.params import ParamsError
from lego.satipatthana import metrics
from lego.satipatthana.introspect import Vipassana, dynamics2, grounded8, velocity
from lego.satipatthana.log import SantanaLog
from lego.satipatthana.paths import Rows, Way, allocate, by_path, damaged, floor, floors, losses
from lego.satipatthana.reject import fit_temperature, fit_trust, threshold
from lego.satipatthana.settings import PATHS
from lego.satipatthana.specs import spec_of
from lego.satipatthana.void import VoidError, VoidSource, acceptance, derangement, derangements
from tests.satipatthana.conftest import COMPAT, PARAMS, clusters, small, system


def a_log(rows: int = 6, seed: int = 0) -> SantanaLog:
    """Random ways of different lengths."""
    generator, log = torch.Generator().manual_seed(seed), SantanaLog()
    state = torch.randn(rows, 8, generator=generator)
    log.add(state)
    for step in range(1, 6):
        active = torch.arange(rows) % 5 + 1 >= step
        new = torch.where(active[:, None], state + 0.3 * torch.randn(rows, 8, generator=generator), state)
        log.add(new, (new - state).square().sum(1), active=active)
        state = new
    return log


def test_r8_5_and_r8_8_velocity_and_energy_by_hand_and_by_row():
    log, states = a_log(), a_log().to_tensor()
    found = dynamics2(log.final, log)
    for row in range(6):
        last = int(log.lengths[row]) - 1
        steps = [states[t, row] - states[t - 1, row] for t in range(1, last + 1)]
        energy = sum(float(one.square().sum()) for one in steps) / last
        expected = torch.tensor([float(steps[-1].norm()), energy]).log1p()
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
    assert found.shape == (6, 2)
    assert len(found[:, 1].unique()) == 6
    alone = dynamics2(log.rows(torch.tensor([3])).final, log.rows(torch.tensor([3])))
    torch.testing.assert_close(alone[0], found[3])  # unaffected by the other rows


def test_r3_7a_the_trust_of_the_note_reads_two_numbers_and_nothing_of_the_state():
    made = system(small(COMPAT))
    assert made.vipassana.trust_head[0].in_features == 2
    log = a_log()
    axes = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    probes, error = made.vitakka.read(), torch.zeros(6, 1)

    def trust(change) -> torch.Tensor:
        other = SantanaLog()
        energies = log.energies()
        for place, state in enumerate(log.to_tensor()):
            active = None if not place else energies[place - 1] > 0
            other.add(change(state), None if not place else energies[place - 1], active=active)
        return made.vipassana(change(log.final), other, probes, error, 5).trust.detach()

    plain = trust(lambda rows: rows)
    torch.testing.assert_close(trust(lambda rows: rows[:, axes]), plain)
    torch.testing.assert_close(trust(lambda rows: rows @ rotation), plain)
    assert float(plain.std()) > 0
    scaled = trust(lambda rows: torch.cat([3 * rows[:1], rows[1:]]))
    assert scaled[0] != plain[0]
    assert torch.equal(scaled[1:], plain[1:])  # only that row's trust changes


def test_r3_7_velocity_sees_the_state_that_is_shown():
    log = a_log()
    shown = log.final.roll(1, 0)
    assert (velocity(shown, log) > velocity(log.final, log)).float().mean() > 0.6
    whole = (shown - log.initial).norm(dim=1).log1p()
    torch.testing.assert_close(dynamics2(shown, log, "whole_way")[:, 0], whole)


def test_grounded_features_by_hand():
    log, probes, error = a_log(), torch.randn(4, 8), torch.rand(6, 1)
    found = grounded8(log.final, log, probes, error, 10)
    distances = torch.cdist(log.final, probes)
    p = torch.softmax(-distances, 1)
    assert found.shape == (6, 8)
    torch.testing.assert_close(found[:, 0], log.steps / 10)
    torch.testing.assert_close(found[:, 1], -(p * p.log()).sum(1))
    torch.testing.assert_close(found[:, 2], distances.amin(1).log1p())
    torch.testing.assert_close(found[:, 3], torch.cdist(log.initial, probes).amin(1).log1p())
    torch.testing.assert_close(found[:, 4], (log.final - log.initial).norm(dim=1).log1p())
    torch.testing.assert_close(found[:, 5], error[:, 0].log1p())
    torch.testing.assert_close(found[:, 6:], dynamics2(log.final, log))


def test_r3_7b_no_norm_over_the_batch_and_c_every_parameter_from_construction_on():
    for params in (small(), small(COMPAT)):
        look = Vipassana(8, params.vipassana)
        assert not [one for one in look.modules() if "Norm" in type(one).__name__]
        before = {id(one) for one in look.parameters()}
        look(a_log().final, a_log(), torch.randn(4, 8), torch.rand(6, 1), 10)
        assert {id(one) for one in look.parameters()} == before
        assert (
            look(a_log().final, a_log(), torch.randn(4, 8), torch.rand(6, 1), 10).context.shape[1] == look.context_dim
        )


def test_beyond_the_range_of_the_training_rows_trust_only_falls():
    head = Vipassana(8, small().vipassana).trust_head
    inside, direction = torch.zeros(1, 8), torch.ones(1, 8)
    trusted = [float(head(inside + scale * direction).detach()) for scale in (head.limit, 5, 50, 500)]
    assert trusted == sorted(trusted, reverse=True)
    assert trusted[-1] < trusted[0] - 100


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


def test_r6_4_void_rows_are_of_their_kind_and_the_filter_gives_up_loudly(capsys):
    train = clusters(90)
    source, generator = VoidSource(train.x, train.y, PARAMS.void), torch.Generator().manual_seed(0)
    mixed = source.of("mixup", 50, generator)
    sums = (train.x[:, None] + train.x[None]).flatten(0, 1)
    assert (2 * mixed[:, None] - sums[None]).abs().amax(2).amin(1).max() < 1e-6
    pasted = source.of("cut_paste", 50, generator)
    assert all((pasted[:, column, None] == train.x[:, column]).any(1).all() for column in range(12))
    shuffled = source.of("feature_shuffle", 50, generator)
    assert all((shuffled[:, column, None] == train.x[:, column]).any(1).all() for column in range(12))
    permuted = source.of("patch_permutation", 20, generator)
    ordered = permuted.sort(1).values[:, None] - train.x.sort(1).values[None]
    assert ordered.abs().amax(2).amin(1).max() < 1e-6
    far = VoidSource(train.x, None, PARAMS.void.model_copy(update={"min_distance": 1.5}))
    rows = far.of("filtered_uniform", 40, generator)
    assert torch.cdist(rows, train.x).min() >= 1.5
    never = VoidSource(train.x, None, PARAMS.void.model_copy(update={"min_distance": 100.0}))
    with pytest.raises(VoidError, match=r"0 of 10 rows lie at least 100 from the data after 20 attempts; lower"):
        never.of("filtered_uniform", 10, generator)
    filtered = small(void__kinds=["filtered_uniform"], void__min_distance=0.01, test__kinds=["inverted"])
    spec_of(2, system(filtered), clusters(40), filtered, 0)
    assert "warning: void.min_distance keeps 100.0 % of uniform rows" in capsys.readouterr().out
    assert acceptance(VoidSource(torch.randn(500, 64), None, PARAMS.void), generator) > 0.99  # vacuous in 64 dimensions
    with pytest.raises(ParamsError, match=r"kind that test\.kinds holds back, as are uniform and uniform"):
        small(void__kinds=["uniform", "mixup"])
    for kind, other in (("gaussian", "gauss_matched"), ("patch_permutation", "pixel_perm")):
        with pytest.raises(ParamsError, match=f"as are {kind} and {other}"):
            small(void__kinds=[kind])


def test_r3_2_augmented_rows_need_an_augmenter():
    with pytest.raises(ParamsError, match=r"augmenter\.kind must not be identity when paths\.augmented is above 0"):
        small(augmenter__kind="identity")


# metrics against brute force


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30))
def test_metrics_equal_brute_force(rows):
    confidence = np.array([float(one) for one, _ in rows])
    wrong = np.array([one for _, one in rows])
    order = sorted(range(len(rows)), key=lambda i: -confidence[i])
    risks = [sum(wrong[order[:k]]) / k for k in range(1, len(rows) + 1)]
    assert metrics.aurc(confidence, wrong) == pytest.approx(np.mean(risks))
    general = [sum(wrong[order[:k]]) / len(rows) for k in range(1, len(rows) + 1)]
    assert metrics.augrc(confidence, wrong) == pytest.approx(np.mean(general))
    inside, outside = confidence[~wrong], confidence[wrong]
    if len(inside) and len(outside):
        wins = np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in outside] for a in inside])
        assert metrics.auroc(inside, outside) == pytest.approx(wins)
    else:
        assert math.isnan(metrics.auroc(inside, outside))
        assert math.isnan(metrics.fpr95(inside, outside))
    half = max(1, round(0.5 * len(rows)))
    assert metrics.risk_at(confidence, wrong, 0.5) == pytest.approx(risks[half - 1])


def test_metrics_of_known_cases():
    inside, outside = np.linspace(0.5, 1, 101), np.array([0.1, 0.52, 0.53, 0.9])
    assert metrics.fpr95(inside, outside) == 0.5  # the 5 % quantile is .525
    confidence = np.linspace(0.1, 0.9, 150)
    assert metrics.ece(confidence, confidence) == pytest.approx(0)
    assert metrics.ece(np.full(150, 0.8), np.arange(150) % 2 == 0) == pytest.approx(0.3, abs=0.01)
    wrong = np.array([False] * 90 + [True] * 10)
    best = metrics.eaurc(-np.arange(100.0), wrong)
    assert abs(best) < 0.002
    assert metrics.eaurc(np.arange(100.0), wrong) > 0.1
    p = np.array([[0.7, 0.3], [0.2, 0.8]])
    assert metrics.brier(p, np.array([0, 1])) == pytest.approx((0.18 + 0.08) / 2)
    assert metrics.nll(p, np.array([0, 1])) == pytest.approx(-(math.log(0.7) + math.log(0.8)) / 2)
    assert math.isnan(metrics.ece(np.array([]), np.array([])))


def test_thresholds_give_what_was_wanted():
    random = np.random.default_rng(0)
    trust = random.uniform(size=2000)
    right = random.uniform(size=2000) < trust
    assert (trust >= threshold(trust, right, "coverage", 0.8)).mean() == pytest.approx(0.8, abs=0.001)
    for rows, wanted in itertools.product((10, 100, 1000), (0.5, 0.8, 0.9, 0.95)):
        kept = (trust[:rows] >= threshold(trust[:rows], right[:rows], "coverage", wanted)).sum()
        assert kept == math.ceil(round(wanted * rows, 6)), (rows, wanted)
    cut = threshold(trust, right, "risk", 0.2)
    assert 0.15 < (~right[trust >= cut]).mean() <= 0.2
    assert threshold(trust, np.zeros(2000, bool), "risk", 0.2) > 1
    tied = np.repeat([0.9, 0.5, 0.1], 20)  # rows of equal trust are accepted together
    half = np.concatenate([np.ones(20, bool), np.arange(20) < 10, np.zeros(20, bool)])
    assert threshold(tied, half, "risk", 0.2) == 0.9
    assert threshold(tied[20:40], half[20:40], "risk", 0.2) > 1
    for n in (10, 19, 20, 152):  # at least 90 % of new rows, whatever the number of validation rows
        cuts = [threshold(random.uniform(size=n), np.ones(n, bool), "conformal", 0.9) for _ in range(4000)]
        kept = 1 - np.mean(cuts)  # of uniform rows
        assert 0.9 - 0.003 <= kept <= 0.9 + 1 / n, n
    assert threshold(trust[:5], right[:5], "conformal", 0.9) == 0  # too few to promise more
    with pytest.raises(ValueError, match="needs validation rows"):
        threshold(trust[:0], right[:0], "coverage", 0.8)


def test_calibration_finds_the_temperature_and_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 5, generator=generator)
    labels = torch.multinomial(torch.softmax(logits / 3, 1), 1, generator=generator)[:, 0]
    assert fit_temperature(logits, labels) == pytest.approx(3, rel=0.1)
    trust = np.random.default_rng(0).uniform(size=4000)
    share = 1 / (1 + np.exp(-(0.5 * np.log(trust / (1 - trust)) + 0.8)))
    right = np.random.default_rng(1).uniform(size=4000) < share
    for kind in ("temperature", "isotonic"):
        mapped = fit_trust(trust, right, kind)(trust)
        assert metrics.ece(mapped, right) < 0.04 < metrics.ece(trust, right), kind
        assert (np.diff(mapped[np.argsort(trust)]) >= -1e-9).all()
    assert fit_trust(trust, right, "none")(trust) == pytest.approx(trust)


def test_r6_4_a_mixture_is_of_two_classes_however_rare_one_is():
    x, y = torch.arange(200.0)[:, None], (torch.arange(200) % 100 == 7).long()  # two rows of the second class
    source, generator = VoidSource(x, y, PARAMS.void), torch.Generator().manual_seed(0)
    one, other = (rows[:, 0].long() for rows in source._pairs(3000, generator))
    assert (y[one] != y[other]).all()
    assert len(torch.unique(one)) > 190  # any row is mixed
    three = VoidSource(torch.arange(9.0)[:, None], torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1]), PARAMS.void)
    one, other = (rows[:, 0].long() for rows in three._pairs(6000, generator))
    pairs, counts = torch.unique(torch.stack([one, other]), dim=1, return_counts=True)
    assert pairs.shape[1] == 9 * 6  # every row with every row of the other classes, as often
    assert counts.min() > 70
    alone = VoidSource(x, torch.zeros(200, dtype=torch.long), PARAMS.void)
    assert alone.of("mixup", 5, generator).shape == (5, 1)
