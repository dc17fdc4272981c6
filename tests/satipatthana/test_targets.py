"""What the specification asks of digits: the targets hold on five seeds and with bare defaults; when stages may end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lego.base.artifacts import read_json
from lego.report.page import Page
from lego.satipatthana import tasks
from lego.satipatthana.curriculum import STAGES, advance, begin, how_to_use, judge
from lego.satipatthana.evaluation import Protocol, evaluate
from lego.satipatthana.merit import cross_fitted, deserved
from lego.satipatthana.paths import Way, damaged
from lego.satipatthana.peers import judge as judge_peer
from lego.satipatthana.peers import networks, peer
from lego.satipatthana.sections import changed
from lego.satipatthana.specs import spec_of
from lego.satipatthana.system import Satipatthana
from lego.satipatthana.targets import AHEAD, AT_LEAST, AT_MOST, FAR, REFERENCE, targets
from lego.satipatthana.tasks import Split, Task
from lego.satipatthana.training import finished, run_stage
from stages.satipatthana.report import asked
from stages.satipatthana.wording import over_seeds
from tests.conftest import ROOT
from tests.satipatthana.conftest import COMPAT, PARAMS, clusters, small, system

SEEDS = read_json(ROOT / "metrics/satipatthana/seeds.json")


def means() -> dict[str, float]:
    return {key: sum(one[key] for one in SEEDS.values()) / len(SEEDS) for key in (*SEEDS["0"],) if defined(key)}


def defined(key: str) -> bool:
    return all(one[key] is not None for one in SEEDS.values())


def test_r11_2_all_rows_of_the_target_column_hold_on_five_seeds():
    """Of the numbers that the pipeline wrote; that they are of this code, .ci/check_lock.py compares."""
    assert len(SEEDS) == PARAMS.seeds == 5
    found = targets(means())
    assert [one for one in found if not one.met] == []
    assert len(found) == len(AT_LEAST) + len(AT_MOST) + 4 + len((*AHEAD, *FAR))  # none was left out


def test_a_target_that_is_missed_is_named_and_one_that_was_not_measured_is_none():
    good = means() | {"auroc_near": 0.98, "auroc_near_recon": 0.97, "auroc_noisy_0.5_recon": 0.9}
    assert [one.name for one in targets(good) if not one.met] == []
    worse = {"auroc_near": 0.96, "recon_mse": 0.051, "auroc_uniform_recon": 1.0, "auroc_uniform": 0.9975}
    missed = {one.name for one in targets(good | worse) if not one.met}
    assert missed == {"auroc_near", "near: trust less -recon_error", "recon_mse", "uniform: trust less -recon_error"}
    unguided = {key: one for key, one in good.items() if not key.startswith(("aux", "auroc_near"))}
    names = {one.name for one in targets(good)} - {one.name for one in targets(unguided)}
    assert names == {"guide at T less at 20 T", "auroc_near", "near: trust less -recon_error"}


def test_the_page_of_digits_says_what_was_asked_and_lives_without_some_of_it():
    found = {name: over_seeds(list(SEEDS.values())) for name in ("satipatthana", "compat")}
    page = Page("t")
    asked(page, found)
    text = page.markdown()
    assert "| accuracy | 0.99" in text
    assert "| at least 0.985 | yes |" in text
    assert "| trust_clean |" in text
    assert "| near: trust less -recon_error | +0.0" in text
    assert "| above 0 | yes |" in text
    few = {name: {key: one[key] for key in ("accuracy", "recon_mse")} for name, one in found.items()}
    page = Page("t")
    asked(page, few)
    assert "auroc_near" not in page.markdown()


def test_r8_4_states_of_trained_systems_stay_apart_and_r9_1_more_steps_change_nothing():
    for one in SEEDS.values():
        assert one["cosine"] < 0.95
        assert one["distinct_1T"] > 0.99
        assert abs(one["aux_accuracy_20T"] - one["aux_accuracy_1T"]) <= 0.005
        assert one["recon_mse_20T"] == pytest.approx(one["recon_mse_1T"], rel=0.02)
        assert one["contraction"] < 1


def test_trust_that_does_not_fall_from_path_to_path_is_named():
    missed = [one.name for one in targets(means() | {"trust_augmented": 0.999}) if not one.met]
    assert missed == ["trust, least fall from path to path"]


def test_r8_10_probes_are_used_on_digits():
    assert means()["probe_perplexity"] >= 0.6 * PARAMS.vitakka.n_probes


@pytest.mark.slow
def test_r7_1_bare_defaults_train_to_the_acceptance_table():
    """One seed, from parameters as they are; compat does not."""
    task = tasks.load(PARAMS.task, PARAMS.test)
    made = begin(task, PARAMS, 7)
    for number in STAGES:
        advance(made, number, task, PARAMS, 7)
        if number == 1:
            perplexity = usage_perplexity(made, task.train.x)
            assert perplexity >= 0.6 * PARAMS.vitakka.n_probes  # after stage 1
    found = judge(made, task, how_to_use(made, task, PARAMS.reject), PARAMS, 7)
    assert [one for one in targets(found) if not one.met] == []
    whole = made(task.test.x)  # on trained weights: states to 1e-6, what is read out of them to rounding
    alone = [made(one[None]) for one in task.test.x[:40]]
    assert torch.equal(torch.cat([one.steps for one in alone]), whole.steps[:40])
    for name, near in (("s_star", 1e-6), ("trust", 1e-5), ("output", 1e-4), ("v_ctx", 1e-4)):
        rows = torch.cat([getattr(one, name) for one in alone])
        torch.testing.assert_close(rows, getattr(whole, name)[:40], atol=near, rtol=0)


def usage_perplexity(made: Satipatthana, x: torch.Tensor) -> float:
    with torch.no_grad():
        share = made.samatha(x).meta.probs.mean(dim=0)
    return float((-(share * share.log()).sum()).exp())


def test_r4_2_every_output_of_a_row_is_that_of_the_row_alone():
    made, x = system(small()), clusters(rows=9).x
    whole = made(x)
    for row in range(len(x)):
        alone = made(x[row : row + 1])
        for name in ("output", "s_star", "v_ctx", "trust", "conformity", "confidence", "recon_error", "features"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[row], atol=1e-6, rtol=0)
        assert int(alone.steps[0]) == int(whole.steps[row])


@pytest.mark.parametrize(
    ("number", "history", "residual", "ends"),
    [
        (0, [1.0, 0.5, 0.499, 0.498], 0.0, True),
        (0, [1.0, 0.5, 0.499, 0.4], 0.0, False),
        (0, [1.0, 0.5], 0.0, False),  # no epochs before the last two to compare with
        (1, [1.0, 0.5, 0.5, 0.5], 9e-4, True),
        (1, [1.0, 0.5, 0.5, 0.5], 2e-3, False),  # its states still move
        (1, [1.0, 0.5, 0.4, 0.3], 9e-4, False),  # settled, but it still learns
        (2, [0.5, 0.31, 0.309, 0.31], 0.0, True),
        (2, [0.5, 0.31, 0.305, 0.302], 0.0, False),
        (2, [0.31, 0.295, 0.295, 0.295], 0.0, True),  # below a floor of pooled paths that it can tell apart after all
        (3, [0.3, 0.3, 0.3], 0.0, True),
    ],
)
def test_r5_7_a_stage_ends_where_nothing_changes_any_more(number, history, residual, ends):
    rows = [{"loss": one, "residual": residual, "validation": one, "validation_floor": 0.3} for one in history]
    assert finished(number, rows, 2) is ends


def test_r5_7_fixed_epochs_are_the_fallback_and_patience_ends_a_stage(capsys):
    train = clusters()
    for patience, epochs in ((0, 6), (1, 2)):
        params = small(stage0__epochs=6, stage0__lr=1e-9, stage0__patience=patience)
        made = system(params)
        history = run_stage(made, spec_of(0, made, train, params, 0), 0)
        assert len(history) == epochs
        said = "stage 0: nothing changes any more; it ends after epoch 2" in capsys.readouterr().out
        assert said == bool(patience)


def test_r9_4_rows_that_a_guide_of_other_rows_gets_wrong_deserve_no_trust():
    train = clusters(rows=90)
    wrong = torch.tensor([4, 31, 77])
    labels = train.y.clone()
    labels[wrong] = (labels[wrong] + 1) % 3
    right = cross_fitted(Split(train.x, labels), PARAMS, 0)
    assert (right == 0).nonzero()[:, 0].tolist() == wrong.tolist()
    assert torch.equal(cross_fitted(train, PARAMS, 0), torch.ones(90))
    assert torch.equal(cross_fitted(Split(train.x[:4], train.y[:4]), PARAMS, 0), torch.ones(4))  # too few for folds
    rare = torch.cat([labels, torch.tensor([3, 3])])
    with_rare = cross_fitted(Split(torch.cat([train.x, train.x[:2]]), rare), PARAMS, 0)
    assert with_rare[90:].tolist() == [1, 1]  # of a class with fewer rows than folds
    assert float(with_rare[wrong].sum()) == 0
    known = Split(train.x, train.y, torch.arange(90) / 90)
    assert torch.equal(deserved(known, PARAMS, 0), known.deserved)  # where the task itself knows
    task = {"task.name": "table", "task.file": "rows.csv", "task.label": "y", "task.job": "regression"}
    line = train.x[:, 0].clone()
    line[wrong] += 5
    number = cross_fitted(Split(train.x, line), changed(PARAMS, task, "test"), 0)
    assert set(wrong.tolist()) <= set((number == 0).nonzero()[:, 0].tolist())
    assert float(number.mean()) > 0.8
    made, counts = system(small()), {"clean": 40, "augmented": 40}
    generator = torch.Generator().manual_seed(0)
    clean = Way.of(made, train.x)
    rows = damaged(made, clean, counts, PARAMS.stage2, None, generator, right)
    fewer = damaged(made, clean, counts, PARAMS.stage2, None, torch.Generator().manual_seed(0))
    lower = rows.target < fewer.target
    shown = [place for place in wrong.tolist() if bool((fewer.encoded == train.x[place]).all(dim=1).any())]
    assert int(lower[:40].sum()) == len(shown)
    assert bool((rows.target[lower] == 0).all())
    assert PARAMS.stage2.correctness is True
    assert COMPAT.stage2.correctness is False


def test_r11_1_anything_that_answers_with_trust_is_scored_by_the_same_code():
    """A plain network with its largest probability as trust: the same keys, with the numbers of the peer."""
    peers = changed(PARAMS, {"peers.epochs": 5}, "test").peers
    outside = {"far": torch.randn(20, 12, generator=torch.Generator().manual_seed(5))}
    task = Task(clusters(), clusters(30, seed=1), clusters(30, seed=2), outside, ["a", "b", "c"])
    (plain,) = networks("plain", task, peers, 0, PARAMS.void)

    @torch.no_grad()
    def answers(x: torch.Tensor) -> SimpleNamespace:
        logits = plain(x)[1]
        return SimpleNamespace(output=logits, trust=torch.softmax(logits.double(), dim=1).amax(dim=1, keepdim=True))

    protocol = Protocol(task.test, task.outside, PARAMS.stage2, 0)
    found, own = evaluate(answers, protocol), evaluate(system(small()), protocol)
    assert found.keys() < own.keys()
    wanted = judge_peer(peer("msp", [plain], task, peers, 0), task.test, task.outside)
    assert {"accuracy", "nll", "ece", "aurc", "auroc_far", "fpr95_far", "auroc_correct"} <= wanted.keys() & found.keys()
    for key in wanted.keys() & found.keys():
        assert found[key] == pytest.approx(wanted[key], abs=1e-6, nan_ok=True), key
    engine = {"recon_mse", "last_step", "last_step_squared", "probes_used", "probe_perplexity", "parameters"}
    assert engine | {"trust_drunk", "auroc_mismatch", "aux_accuracy_20T", "auroc_far_recon"} <= own.keys()


def test_the_targets_are_numbers_that_evaluate_gives():
    assert set(AT_LEAST) | set(REFERENCE) <= set(SEEDS["0"])
