"""The report's statements on records made up so that the right ones are known, whole and with parts missing."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest

from lego.model.cost import Ledger
from stages.evidence import routing_tables, tables, wording
from stages.evidence.gather import searched_rates
from stages.evidence.pictures import hard_against_random, regime_map, routed_against_cost, training_curves
from stages.evidence.summary import DEEP, Suite, between_settings, compared_in, difference, rivals
from stages.evidence.token_pictures import fullest

TOKENS = [100, 400, 250]
RATE = 0.008
KEYS = ("ashem.phase2_lr", "yardstick.lr", "baselines.joint.dense.lr", "baselines.block2.random.lr")
TRIED = dict.fromkeys((*KEYS, "baselines.block2.leaky_validation.lr"), RATE) | {"search.lr_factors": [0.5, 1.0, 2.0]}


def record(ppl: float, total: bool = False, leaky: bool = False, two_exits: bool = False, deep: float = 0.0, **more):
    """A model whose test perplexity is this on every document."""
    losses, deeper = ([n * math.log(value) for n in TOKENS] for value in (ppl, deep or ppl))
    documents = {"tokens": TOKENS, "nll": losses, "nll_deep": deeper, "hard_tokens": [50, 200, 100]}
    documents["nll_hard"] = [n * math.log(2 * ppl) for n in documents["hard_tokens"]]
    metrics = {
        "ppl": ppl,
        "deep_ppl": deep or ppl,
        "shallow_ppl": 40.0,
        "oracle_ppl": 20.0,
        "threshold": 0.2 if two_exits else None,
        "shallow_ratio": 0.5,
        "flops_ratio": 0.9,
        "deep_flops_ratio": 1.0,
        "hard_ppl_after": 2 * ppl,
        "hard_ppl_deep": 2 * (deep or ppl),
        "hard_ppl_before": 90.0,
        "val_ppl": ppl + 1,
        "val_hard_ppl_before": 90.0,
        "val_hard_ppl_after": 10.0,
        "hard_share": 0.5,
        "lr": RATE,
        "train_macs": 1e12,
        "added_macs": None if total else 5e11,
        "distance_from_budget": 0.001,
        "leaky": leaky,
    }
    curve = {"macs": [1e11, 2e11], "val_ppl": [50.0, ppl]}
    found = {"metrics": metrics, "documents": documents, "curve": curve, "revision": "abc", "params": dict(TRIED)}
    return found | more


def ashem(ppl: float, tokens: int = 1_000_000, **more):
    """ASHEM's own record, with what it knows of block 1 (perplexity 40)."""
    phase1 = {"train_tokens": tokens, "parameters": 100_000, "phase1_converged": False, "val_ppl": 41.0}
    phase1["train_text_tokens"] = tokens // 2
    extra = {
        "shallow_documents": record(40.0)["documents"],
        "phase1": phase1,
        "phase1_curve": {"macs": [1e10, 1e11], "val_ppl": [90.0, 41.0]},
        "sweep": {"flops_ratio": [1.1, 0.7], "ppl": [ppl, 40.0]},
        "criteria": {"test": {"max_prob": {"ppl": ppl, "gain_auroc": 0.6, "flops_ratio": 0.9}}},
    }
    return record(ppl, two_exits=True, deep=ppl + 2, **extra, **more)


@pytest.fixture
def records() -> dict:
    seeds = {str(seed): shift for seed, shift in enumerate((-0.1, 0.0, 0.1))}
    return {
        "default": {
            "ashem": {seed: ashem(35 + shift) for seed, shift in seeds.items()},
            "shallow_continued": {seed: record(33 + shift) for seed, shift in seeds.items()},
            "dense": {seed: record(38 - shift, total=True) for seed, shift in seeds.items()},
            "random": {seed: record(36 + shift, two_exits=True, deep=34.0) for seed, shift in seeds.items()},
            "leaky_validation": {seed: record(30.0, leaky=True) for seed in seeds},
        }
    }


def test_differences_are_paired_and_the_verdicts_those_of_the_numbers(records):
    core = Suite.of("core", records)
    found = difference(core, "default", "ashem", "shallow_continued")
    assert found.over_seeds.mean == pytest.approx(2.0)
    assert found.over_seeds.high - found.over_seeds.low == pytest.approx(0, abs=1e-9)  # the same shift in both
    assert found.verdict == "worse"
    assert difference(core, "default", "ashem", "dense").verdict == "better"
    assert difference(core, "default", "ashem", "random", "nll_hard").over_seeds.mean == pytest.approx(-2.0)
    assert difference(core, "default", "ashem", "ashem", shallow=True).over_seeds.mean == pytest.approx(-5.0)


def test_a_model_with_two_exits_is_also_compared_at_its_full_depth(records):
    core = Suite.of("core", records)
    assert difference(core, "default", "ashem", "random" + DEEP).verdict == "worse"
    assert "dense" + DEEP not in core.models("default")
    assert core.values("default", "random" + DEEP, "flops_ratio") == [1.0] * 3
    assert rivals(core, "default", "added") == ["shallow_continued", "random" + DEEP, "random"]  # the leaky one is none
    assert rivals(core, "default", "total") == ["dense"]
    assert core.values("default", "random", "ppl") == [35.9, 36.0, 36.1]


def test_the_answer_and_the_tables_say_so(records):
    core = Suite.of("core", records)
    said = wording.answer(core, "default")
    assert said.startswith("At 10.0 tokens of phase 1 a parameter ASHEM reaches a test perplexity of 35.00 [")
    assert "better than its own block 1 (-5.00" in said
    assert "worse than the best model of equal added MACs, shallow_continued (+2.00" in said
    assert said.endswith(
        "Always deep it reaches 37.00 [36.75, 37.25]: worse than shallow_continued (+4.00 [+4.00, +4.00]; "
        "over documents +4.00 [+4.00, +4.00])."
    )
    short = {row[0]: row for row in tables.short_table(core, "default")[1]}
    assert short["**ASHEM, always deep**"][1:] == ["its own", "37.00 [36.75, 37.25]", "", "", "", "", "1.00"]
    assert [short["random, always deep"][i] for i in (4, 6)] == ["worse", "worse"]
    assert [short["dense"][i] for i in (4, 6)] == ["better", "better"]
    records["default"]["ashem"]["0"]["params"]["search.lr_factors"] = [0.5, 1.0]
    header, rows, _ = tables.main_table(core, "default")
    assert [row[0] for row in rows[:3]] == ["leaky_validation (leaky)", "shallow_continued", "random, always deep"]
    row = next(row for row in rows if row[0] == "**ashem**")
    assert dict(zip(header, row, strict=True))["rate"] == f"{RATE:g} (end)"
    assert all(name != "leaky_validation" for name, *_ in tables.short_table(core, "default")[1])
    assert "41.00 -> 31.00" in wording.leak(core, "default")
    assert "count like 2.4 equal ones" in wording.documents_fact(core, "default")


def test_the_sentence_on_cost_is_that_of_the_gate():
    ledger = Ledger(1024, 32, 4, 4, 96, num_layers=8, exit_layer=2, seq_len=128, block2_context="sequence")
    for macs in (None, 32):
        even, cost = ledger.break_even_shallow_ratio(macs), ledger.flops_ratio(0.7, macs)
        assert wording.break_even(ledger, 0.3, macs) == (
            f"Routing costs less than the full model from a shallow ratio of {even:.3f} on; at 0.70 it costs "
            f"{cost:.3f} of it."
        )
    gated = replace(ledger, gated=True)
    assert f"so always deep costs {(ledger.full + ledger.head) / ledger.full:.3f}." in wording.break_even(gated, 0.3, 9)


def test_one_seed_is_no_verdict(records):
    one = {"default": {model: {"0": seeds["0"]} for model, seeds in records["default"].items()}}
    core = Suite.of("core", one)
    assert difference(core, "default", "ashem", "shallow_continued").verdict == "one seed"
    assert "against its own block 1 -5.10 (one seed)" in wording.answer(core, "default")


def test_parts_that_are_missing_are_left_out(records, tmp_path):
    del records["default"]["dense"]["1"], records["default"]["random"]["0"]
    records["default"]["shallow_continued"] = {}
    core = Suite.of("core", records)
    assert difference(core, "default", "ashem", "dense").seeds == 2
    assert "shallow_continued" not in core.models("default")
    assert difference(core, "default", "ashem", "shallow_continued") is None
    assert wording.phrase(None, "x") == "not compared with x"
    counted = {row[0]: row[2] for row in tables.main_table(core, "default")[1]}
    assert (counted["**ashem**"], counted["dense"], counted["random"]) == ("3", "2", "2")
    for picture in (routed_against_cost(tmp_path, core, "default"), training_curves(tmp_path, core, "default")):
        assert picture.file.stat().st_size > 1000


def test_the_regime_map_says_where_each_model_is_passed_and_bears_an_unfinished_run(records, tmp_path):
    def setting(tokens: int, difference: float) -> dict:
        seeds = {str(seed): shift for seed, shift in enumerate((-0.1, 0.0, 0.1))}
        return {
            "shallow_continued": {seed: record(35 - difference + shift) for seed, shift in seeds.items()},
            "ashem": {seed: ashem(35 + shift, tokens) for seed, shift in seeds.items()},
        }

    found = {
        "late": setting(4_000_000, -1.5),
        "early": setting(200_000, 3.0),
        "late_dim_32": setting(8_000_000, -2.0),
        "unfinished": {"shallow_continued": {"0": record(35.0)}, "random": {"0": record(30.0)}},
    }
    regime = Suite.of("regime", copy.deepcopy(found))
    assert compared_in(regime) == ["shallow_continued", "random"]
    said = wording.crossover(regime)
    assert said == [
        "against shallow_continued: better at 40.0, 80.0; worse at 2.0 tokens of phase 1 per parameter, so the border "
        "lies between 2.0 and 40.0"
    ]
    assert wording.when(regime) == (
        "When: of the models of equal added MACs, their always-deep form counted as another, ASHEM is, by tokens of "
        "phase 1 a parameter, at 2.0 better than 0 of 1 and worse than 1; at 40.0 better than 1 of 1 and worse than 0; "
        "at 80.0 better than 1 of 1 and worse than 0. Always deep it is at 2.0 better than 0 of 1 and worse than 1; at "
        "40.0 better than 0 of 1 and worse than 1; at 80.0 better than 0 of 1 and worse than 0."
    )
    assert [row[6].split()[-1] for row in tables.regime_table(regime, "ashem" + DEEP)[1]] == ["worse"] * 2 + [
        "distinguishable"
    ]
    for seed in ("0", "1"):
        regime.records["early"]["ashem"][seed]["sweep"]["ppl"] = [30.0, 31.0, 40.0]
    regime.records["early"]["ashem"]["2"]["sweep"]["ppl"] = [30.3, 30.0, 40.0]
    assert "in 2 of 3 seeds at 2.0 (elsewhere at most 1.00 % above), in 3 of 3 seeds at 40.0, in 3 " in wording.deepest(
        regime
    )
    assert "by 20.0 % at 2.0, 8.8 % at 40.0, 7.5 % at 80.0 tokens a parameter" in wording.how_far(regime)
    assert routing_tables.criteria_table(regime)[1] == [["max_prob", *["35.00 [34.75, 35.25]; 0.600; 0.90"] * 3]]
    assert [row[0] for row in tables.regime_table(regime)[1]] == ["2.0", "40.0", "80.0"]
    assert [row[5] for row in tables.regime_table(regime)[1]] == ["37.00 [36.75, 37.25]"] * 3  # always deep
    assert routing_tables.attainable_table(regime)[1] == []
    for name, shift in (("late", 0.0), ("late_dim_32", -0.3)):
        for seed, one in regime.records[name]["ashem"].items():
            captured = {"gain": 0.9 + shift + 0.01 * int(seed), "max_prob": None, "probe": 0.1}
            one["of_attainable"] = {"0.3": captured, "0.5": captured | {"max_prob": 0.5}}
    header, rows, _ = routing_tables.attainable_table(regime)
    assert header == ("criterion", "deep share", "40.0 tokens a parameter", "80.0 tokens a parameter")
    assert rows[0] == ["gain", "0.3", "0.91 [0.89, 0.93]", "0.61 [0.59, 0.63]"]
    assert [row[2] for row in rows[2:]] == ["", "0.50 [0.50, 0.50]"]
    assert regime_map(tmp_path, regime).file.exists()
    nothing = Suite.of("regime", {"unfinished": found["unfinished"]})
    assert wording.crossover(nothing) == []
    assert tables.regime_table(nothing)[1] == []


def test_ratios_without_random_selection_are_passed_over(records, tmp_path):
    ratios = Suite.of("ratios", {"ratio_30": records["default"], "ratio_70": {"ashem": records["default"]["ashem"]}})
    _, rows, _ = tables.ratios_table(ratios)
    deep = difference(ratios, "ratio_30", "ashem", "random" + DEEP)
    assert [row[:5] for row in rows] == [["0.30", *rows[0][1:3], "-1.00 [-1.00, -1.00]", "better"]]
    assert rows[0][5:] == [f"{deep.over_seeds:+.2f}", deep.verdict]
    assert hard_against_random(tmp_path, ratios).file.exists()


def test_options_are_compared_with_the_unchanged_setting_on_the_same_text(records):
    base = records["default"]["ashem"]
    better, cut = copy.deepcopy(base), copy.deepcopy(base)
    for seed in base:
        better[seed] = ashem(34 + float(seed) / 10 - 0.1)
        cut[seed]["documents"]["tokens"] = [100, 400, 249]
    suite = Suite.of("options", {"base": {"ashem": base}, "depth_6": {"ashem": better}, "text": {"ashem": cut}})
    found = between_settings(suite, "depth_6", "base")
    assert (found.over_seeds.mean, found.verdict) == (pytest.approx(-1.0), "better")
    assert between_settings(suite, "text", "base") is None  # other test text
    _, rows, _ = tables.options_table(suite, "base")
    assert [row[0] for row in rows] == ["depth_6", "**nothing**", "text"]
    assert rows[0][5] == "better"
    assert rows[1][3:6] == rows[2][3:6] == ["", "", ""]


def test_rates_that_were_tried_are_shown_where_they_were_kept(records):
    log = "epoch 1\nvalidation perplexity by learning rate: 0.003: 40.125, 0.006: inf; taken: 0.003, the end\nlast"
    tried = searched_rates(log)
    assert tried == {"0.003": 40.125, "0.006": None}
    assert searched_rates("epoch 1\n") == {}
    records["default"]["dense"]["0"]["tried"] = tried
    records["default"]["random"]["0"]["tried"] = {}
    header, rows, _ = tables.rates_table(Suite.of("core", records), "default")
    assert rows == [["dense", "0.003: 40.12", "0.006: diverged"]]
    assert len(header) == 3


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (["worse", "worse", "not distinguishable", "better"], ", so the border lies between 2.0 and 4.0"),
        (["worse", "better", "worse", "better"], ""),  # it turns back
        (["better", "better", "worse", "worse"], ""),
        (["worse", "not distinguishable", "not distinguishable", "worse"], ""),
        (["better", "better", "better", "better"], ""),
    ],
)
def test_a_border_is_named_where_there_is_one(told, expected):
    assert wording.border(list(zip([1.0, 2.0, 3.0, 4.0], told, strict=True))) == expected


def test_a_sample_is_the_stretch_that_fills_the_most():
    blank, full = [("\n", False)] * 400, [("word ", True)] * 400
    assert fullest([*blank, *full, *blank], columns=40, lines=5) == 400
    assert fullest([("a", True)] * 30, columns=40, lines=5) == 0


def test_an_end_of_the_search_is_marked_by_the_rates_that_the_record_tried(records):
    core, key = Suite.of("core", records), "baselines.block2.random.lr"
    kept = records["default"]["random"]["0"]["params"]
    assert tables.at_end(core, "default", "random") == ""
    for share, factors, mark in ((0.5, [0.5, 1.0, 2.0], " (end)"), (0.5, [2.0], ""), (1, [1.0, 2.0], " (end)")):
        kept |= {key: share * RATE, "search.lr_factors": factors}  # one rate is no search
        assert tables.at_end(core, "default", "random") == mark
    _, rows, _ = tables.difference_table(core, "default")
    assert {row[0]: "(end)" in row[1] for row in rows if "deep" not in row[0]}["random"]


def test_records_whose_text_is_not_here_are_not_called_outdated():
    made = {name: Suite.of(name, {"default": {"ashem": {"0": ashem(30.0)}}}) for name in ("core", "wikitext2")}
    said = wording.provenance(made, {"core": [["lego/model", "ashem.phase2_lr"]], "wikitext2": None})
    assert said[0].endswith("made at abc; 1 of its 1 records are not current: ashem.phase2_lr, lego/model changed")
    assert "its text is not here, so whether its records are still current was not checked" in said[1]
    assert "not current:" not in said[1]
