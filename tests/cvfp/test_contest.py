"""The contest around its models: digests of rows, the search of the rate, and a page that leaves outdated rows out."""

from __future__ import annotations

import pytest
import torch

from lego.base.harness import StageError
from lego.base.parameter_files import ParamsError
from lego.cvfp.contest import made_of, trial_digest
from lego.cvfp.sections import changed
from lego.report.page import Page
from stages.cvfp.baselines.contest import Run, chosen
from stages.cvfp.compared import NGRAMS, Compared
from stages.cvfp.figures import scaling
from stages.cvfp.trials import shown
from tests.conftest import ROOT
from tests.cvfp.conftest import PARAMS
from tests.cvfp.test_peers import toy_text


def test_the_digest_of_a_row_follows_what_it_is_made_of(monkeypatch):
    text = toy_text().digests()

    def of(name: str, **changes: object) -> str:
        return made_of(name, changed(PARAMS, {key.replace("__", "."): one for key, one in changes.items()}, "t"), text)

    monkeypatch.chdir(ROOT)  # where the profiles lie
    assert of("seed") != of("seed", contest__seed_sweeps=3)
    assert of("gru") == of("gru", phase1__lr=0.5) == of("gru", contest__workers=1, checks__lags=3)
    assert of("gru") != of("gru", peers__window=32)
    assert of("gru") != of("gru", phase2__epochs=2)
    assert of("gru") != of("gru", **{"contest__peers__gru": 0.1})
    assert of("sound") == of("sound", peers__window=32)
    assert of("sound") != of("sound", phase1__dist_reg_weight=0.5)
    assert of("sound") != made_of("sound", PARAMS, text | {"train": "other"})


def test_the_search_takes_the_best_rate_of_the_first_seed_and_says_when_it_is_an_end():
    asked = []

    def runs(wanted: list[Run]) -> list[dict[str, float]]:
        asked.extend(wanted)
        return [{"val_loss": abs(lr - 0.02) + 0.1 * seed, "ppl": 5.0, "bits_per_byte": 1.0} for seed, lr, _ in wanted]

    def diverges(wanted: list[Run]) -> list[dict[str, object]]:
        return [{"val_loss": 1.0} | ({"diverged": "x"} if seed else {}) for seed, *_ in wanted]

    params = changed(PARAMS, {"contest.seeds": 3, "contest.lr_factors": [0.5, 1.0, 2.0]}, "test")
    found, searched = chosen("gru", params, 0.01, runs)
    assert asked == [Run(0, 0.005), Run(0, 0.01), Run(0, 0.02), Run(1, 0.02), Run(2, 0.02)]
    assert len(found) == 3
    assert (searched["lr"], searched["rate_at_an_end"]) == (0.02, True)
    _, searched = chosen("gru", params, 0.02, runs)
    assert (searched["lr"], searched["rate_at_an_end"]) == (0.02, False)
    with pytest.raises(StageError, match=r"gru: seed 1 diverged at rate 0\.02"):
        chosen("gru", params, 0.04, diverges)


def test_no_sentence_of_the_page_speaks_of_an_outdated_row(monkeypatch):
    monkeypatch.chdir(ROOT)
    digests = toy_text().digests()
    tokens = {f"{split}_sha256": one for split, one in digests.items()}
    tokens |= {f"test_{name}_{key}": 50.0 for name in NGRAMS for key in ("ppl", "bits_per_byte")}

    def of(name: str, ppl: float) -> dict[str, object]:
        seeds = {f"{key}_{seed}": ppl + seed / 10 for key in ("ppl", "bits_per_byte") for seed in range(3)}
        blind = {"ppl_trained_zero_contexts": 70.0, "ppl_trained_shuffled_contexts": 71.0}
        kinds = [f"{key}_trained_{kind}_contexts" for key in ("ppl", "bits_per_byte") for kind in ("zero", "shuffled")]
        blind |= {f"{kind}_{seed}": 70.0 + seed for kind in kinds for seed in range(3)}
        facts = {
            "parameters": 9,
            "parameters_without_embeddings": 8,
            "tokens": 7,
            "seconds": 6.0,
            "peak_mib": 5.0,
            "lr": 0.1,
        }
        made = {"made_of": made_of(name, PARAMS, digests), "rate_at_an_end": False}
        return {"ppl": ppl, "bits_per_byte": 1.0} | seeds | blind | facts | made

    found = {name: of(name, ppl) for name, ppl in (("sound", 40), ("untrained", 60), ("gru", 39), ("lstm", 30))}
    compared = Compared(PARAMS, found, {}, tokens)
    assert compared.rivals() == ["untrained", "gru", "lstm"]  # the best of all is named, whoever it is
    assert "lstm 30.0 (+10.0" in compared.answer()
    assert "gru 39.0 (+1.0" in compared.answer()
    assert len(compared.claims()) == 1
    goals = compared.goals()
    assert [("**not reached**" in one, name in one) for one, name in zip(goals, ("untrained", "gru"), strict=True)] == [
        (False, True),
        (True, True),
    ]
    old = Compared(PARAMS, found | {"lstm": found["lstm"] | {"made_of": "x"}}, {}, tokens)
    assert "lstm" not in old.answer()
    page = Page("t")
    old.write(page, {})
    assert "Not run yet: sound_reservoir, " in page.markdown()  # of the models of contest those that have no row
    assert "| sound, head trained with C* = 0 | 71.00 [68.52, 73.48] | 71.000 [68.516, 73.484] | " in page.markdown()
    assert "**outdated**" in next(line for line in page.markdown().splitlines() if line.startswith("| lstm"))
    assert Compared(PARAMS, found, {}, tokens | {"test_sha256": "y"}).answer().startswith("Outdated")
    assert Compared(PARAMS, {}, {}, tokens).answer().startswith("Not run yet")


def test_the_curve_over_train_text_ends_in_the_contest_and_leaves_outdated_rows_out(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = toy_text()
    half = text.first(0.5)
    assert text.first(1.0) is text
    assert torch.equal(half.ids["train"], text.ids["train"][: len(text.ids["train"]) // 2])
    assert torch.equal(half.ids["test"], text.ids["test"])
    assert Run(2, 0.01, 0.5).file() != Run(2, 0.01, 0.25).file() != Run(2, 0.01).file()
    tokens = {f"{split}_sha256": one for split, one in text.digests().items()}
    tokens |= {"train_tokens": 1000, "test_fivegram_ppl": 50.0}
    made = {name: {"made_of": made_of(name, PARAMS, text.digests())} for name in ("gru", "fivegram")}
    found = {"gru": {"ppl": 31.0, "ppl_0": 30.0, "ppl_1": 32.0} | made["gru"]}
    curves = {"gru": {"0.25": {"ppl_0": 60.0, "ppl_1": 62.0}}, "fivegram": {"0.25": {"ppl_0": 70.0}}}
    curves = {name: one | made[name] for name, one in curves.items()}
    compared = Compared(PARAMS, found, curves, tokens)
    assert [(size, one.mean) for size, one in compared.curves["gru"]] == [(250, 61), (1000, 31)]
    assert [(size, one.mean) for size, one in compared.curves["fivegram"]] == [(250, 70), (1000, 50)]
    drawn = {"scaling": scaling(tmp_path, compared.curves)}
    assert (tmp_path / "scaling.svg").stat().st_size > 1000
    assert "gru 61.0 to 31.0" in drawn["scaling"].alt
    for old in ({"gru": curves["gru"] | {"made_of": "x"}}, {"gru": curves["gru"]}):
        kept = found if old["gru"]["made_of"] == "x" else {}
        assert not Compared(PARAMS, kept, old, tokens).curves
    wrong = {"contest.scaling.models": {"gru": 1}, "contest.peers": {"lstm": 0.1}}
    with pytest.raises(ParamsError, match=r"scaling\.models must be of contest\.own or contest\.peers, got gru"):
        changed(PARAMS, wrong, "test")
    with pytest.raises(ParamsError, match=r"scaling\.shares must differ, got \[0\.5, 0\.5\]"):
        changed(PARAMS, {"contest.scaling.shares": [0.5, 0.5]}, "test")


def test_every_trial_changes_what_there_is():
    for name, changes in PARAMS.contest.trials.items():
        assert changed(PARAMS, changes, name) != PARAMS or name == "unchanged"


def test_trials_are_shown_with_what_they_change_seed_by_seed_and_outdated_ones_are_left_out(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = toy_text().digests()
    trials = {"unchanged": {}, "wide": {"predict.bptt_len": 64}, "late": {"predict.lr": 0.5}}
    params = changed(PARAMS, {"contest.trials": trials, "contest.trial_seeds": 2}, "test")

    def found(name: str, *losses: float) -> dict:
        values = {f"{key}_{seed}": 10 * one for key in ("val_loss", "ppl") for seed, one in enumerate(losses)}
        mean = {key: 10 * sum(losses) / max(1, len(losses)) for key in ("val_loss", "ppl")}
        made = {"made_of": trial_digest(changed(params, trials[name], "test"), text), "diverged": not losses}
        return made | (values | mean if losses else {})

    results = {"unchanged": found("unchanged", 0.4, 0.5), "wide": found("wide", 0.3, 0.45), "late": found("late")}
    tokens = {f"{split}_sha256": one for split, one in text.items()}
    fits = shown.current(params, results, tokens)
    assert list(fits) == ["wide", "unchanged", "late"]
    wide, base, late = shown.rows(params, fits)
    assert late == ["late", "predict.lr: 0.5", "diverged", "", "", ""]
    assert shown.current(changed(params, {"contest.trial_seeds": 3}, "test"), results, tokens) == {}
    assert (
        shown.current(changed(params, {"contest.seeds": 9, "contest.own.sound": 0.5}, "test"), results, tokens) == fits
    )
    assert wide == ["wide", "predict.bptt_len: 64", "3.750", "-1.000, -0.500", "3.75", "-1.00, -0.50"]
    assert base == ["**unchanged**", "", "4.500", "", "4.50", ""]
    page = Page("p")
    shown.write(page, params, results | {"late": results["late"] | {"made_of": "x"}}, tokens)
    assert "Not run yet, or outdated: late." in page.markdown()
    assert "with one change each, 2 seeds" in page.markdown()
    assert shown.current(changed(params, {"predict.weight_decay": 0.5}, "test"), results, tokens) == {}
    empty = Page("p")
    shown.write(empty, params, {}, tokens)
    assert "Not run yet" in empty.markdown()
